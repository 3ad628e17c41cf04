"""From packed rows to the arrays of a batch (`schema.Batch`).

A row keeps its documents apart by segment ids and by positions that start anew at each of them;
`attend_across_documents` gives the released trainer's form instead, in which a row is one long
sequence (NextStep-1, arXiv 2508.10711). The images of all rows lie side by side, sorted by size,
each with the places of its tokens, so that a batch holds as many images as it has and no others.

Axes: rows B, row length L, images of one size N, image tokens of an image n, token width D.
"""

import dataclasses
from collections.abc import Sequence as ListLike

import numpy as np

from nextstep_jax.data.buckets import image_key, ordered_image_keys
from nextstep_jax.data.packing import Piece, Row
from nextstep_jax.data.schema import KINDS, Batch


@dataclasses.dataclass(frozen=True)
class CollateConfig:
    """The form of a batch.

    Attributes:
        row_length: Tokens of a row.
        pad_id: Fills the rest of a row.
        latent_dim: Width of an image token if documents carry latents, None if pixels.
        attend_across_documents: One segment for the whole row, positions running on.
    """

    row_length: int
    pad_id: int
    latent_dim: int | None = None
    attend_across_documents: bool = False


def collate(rows: ListLike[Row], config: CollateConfig) -> Batch:
    """The batch of B rows.

    Raises:
        ValueError: A document's images have another form than the run's, or latents another
            width; names the document.
    """
    shape = (len(rows), config.row_length)
    batch: Batch = {
        "token_ids": np.full(shape, config.pad_id, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "text_weights": np.zeros(shape, np.float32),
        "image_weights": np.zeros(shape, np.float32),
        "kinds": np.zeros(shape, np.int8),
        "document_ids": [[p.sequence.document_id for p in row.pieces] for row in rows],
    }
    pixels: dict[str, list[np.ndarray]] = {}
    slots: dict[str, list[np.ndarray]] = {}
    if config.latent_dim is not None:
        batch["latents"] = np.zeros((*shape, config.latent_dim), np.float32)
    for number, row in enumerate(rows):
        start = 0
        for segment, piece in enumerate(row.pieces, start=1):
            here = slice(start, start + len(piece))
            _place_tokens(batch, number, here, segment, piece)
            _check_form(piece, config)
            # Of a piece with images all of the sequence is there.
            is_image = piece.sequence.image_ref[piece.start : piece.end] >= 0
            at = number * config.row_length + start + np.flatnonzero(is_image)
            if config.latent_dim is not None:
                if piece.sequence.images:
                    tokens = np.concatenate(piece.sequence.images)
                    batch["latents"].reshape(-1, config.latent_dim)[at] = tokens
            else:
                _place_images(pixels, slots, piece, at)
            start += len(piece)
        if config.attend_across_documents:
            batch["segment_ids"][number, :start] = 1
            batch["positions"][number, :start] = np.arange(start)
    # Nothing in its segment precedes the first token, so nothing predicts it.
    batch["text_weights"][batch["positions"] == 0] = 0.0
    if config.latent_dim is None:
        keys = ordered_image_keys(pixels)
        batch["images"] = {key: np.stack(pixels[key]) for key in keys}
        batch["image_slots"] = {key: np.stack(slots[key]).astype(np.int32) for key in keys}
    return batch


def _place_tokens(batch: Batch, row: int, here: slice, segment: int, piece: Piece) -> None:
    """Writes what every token has."""
    part = slice(piece.start, piece.end)
    batch["token_ids"][row, here] = piece.sequence.token_ids[part]
    batch["segment_ids"][row, here] = segment
    batch["positions"][row, here] = np.arange(len(piece))
    batch["text_weights"][row, here] = piece.sequence.text_weights[part]
    batch["image_weights"][row, here] = piece.sequence.image_weights[part]
    batch["kinds"][row, here] = 1 + KINDS.index(piece.sequence.kind)


def _place_images(
    pixels: dict[str, list[np.ndarray]],
    slots: dict[str, list[np.ndarray]],
    piece: Piece,
    at: np.ndarray,
) -> None:
    """Files the images of a piece by size, each with its share of the places `at`."""
    start = 0
    for image, (rows, columns) in zip(piece.sequence.images, piece.sequence.grids, strict=True):
        key = image_key(image.shape[:2])
        pixels.setdefault(key, []).append(image)
        slots.setdefault(key, []).append(at[start : start + rows * columns])
        start += rows * columns


def _check_form(piece: Piece, config: CollateConfig) -> None:
    sequence, latent_dim = piece.sequence, config.latent_dim
    form, ndim = ("pixels", 3) if latent_dim is None else ("latents", 2)
    if any(image.ndim != ndim for image in sequence.images):
        raise ValueError(
            f"document {sequence.document_id}: every image of the run must come as {form}"
        )
    for image in sequence.images:
        if latent_dim is not None and image.shape[-1] != latent_dim:
            raise ValueError(
                f"document {sequence.document_id}: latents have width {image.shape[-1]}, the model"
                f" takes {latent_dim}"
            )
