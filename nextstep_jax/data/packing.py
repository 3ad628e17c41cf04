"""Packing: sequences of different lengths side by side in rows of one length.

NextStep-1 (arXiv 2508.10711) packs its samples to the maximum length. Here a row keeps its
documents apart by segment ids and positions that start anew; `attend_across_documents` gives the
released trainer's form, in which a row is one long sequence. Sequences are placed by best fit and
never split, except plain text that is longer than a row.

A row holds, besides its tokens, the pixels of its images in a fixed number I of slots for every
size, and for every image token its place in the row's image-token buffer. A train step encodes
the slots, lays the tokens of all slots of all sizes end to end (N tokens), and gathers:

    latents[l] = buffer[image_index[l]]   where image_index[l] >= 0

Axes: row length L, slots I of a size, image tokens n of an image, token width D.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from nextstep_jax.data import buckets
from nextstep_jax.data.schema import Sequence

Element = dict[str, Any]

# Area token, at least one token of size string, begin and end of image.
_LEAST_TOKENS_AROUND_IMAGE = 4

_SLOTS = "slots_"  # Prefix of the packed features that count the images of a size.


@dataclasses.dataclass(frozen=True)
class PackingConfig:
    """The shape of a row.

    Attributes:
        row_length: Tokens of a row.
        pad_id: Fills the rest of a row.
        image_sizes: Every (height, width) that images of the run have.
        max_images_per_row: Most slots for images of one size in a row; None gives each size as
            many as fit by length. Every slot is encoded, used or not, so with many sizes a limit
            saves work; too low a limit shows as padding.
        pixels_per_token: Pixels along one side of an image token.
        latent_dim: Width of an image token if documents carry latents, None if pixels.
        num_packing_bins: Rows that are open at the same time. More rows, less padding, more
            memory, and more documents read again after a restart.
        seed: Shuffles the finished rows.
        attend_across_documents: One segment for the whole row, positions running on.
    """

    row_length: int
    pad_id: int
    image_sizes: tuple[buckets.Size, ...] = ()
    max_images_per_row: int | None = None
    pixels_per_token: int = 16
    latent_dim: int | None = None
    num_packing_bins: int = 32
    seed: int = 0
    attend_across_documents: bool = False

    def __post_init__(self):
        """Checks the ranges, and that an image fits into a row."""
        for name in ("row_length", "max_images_per_row", "num_packing_bins"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for size in self.image_sizes:
            if self.slots_of(size) == 0:
                raise ValueError(
                    f"row_length={self.row_length} is too short for an image of size "
                    f"{buckets.image_key(size)}, which has {self.tokens_of(size)} tokens and "
                    f"{_LEAST_TOKENS_AROUND_IMAGE} around them"
                )

    def tokens_of(self, size: buckets.Size) -> int:
        """Image tokens of an image of this size."""
        rows, columns = buckets.grid_of(*size, self.pixels_per_token)
        return rows * columns

    def slots_of(self, size: buckets.Size) -> int:
        """Slots of this size in a row."""
        fitting = self.row_length // (self.tokens_of(size) + _LEAST_TOKENS_AROUND_IMAGE)
        return fitting if self.max_images_per_row is None else min(fitting, self.max_images_per_row)

    @functools.cached_property
    def buffer_offsets(self) -> dict[buckets.Size, int]:
        """Where the tokens of each size begin in a row's image-token buffer."""
        offsets, offset = {}, 0
        for size in sorted(self.image_sizes):
            offsets[size] = offset
            offset += self.slots_of(size) * self.tokens_of(size)
        return offsets


class PrepareSequences(grain.experimental.FlatMapTransform):
    """Turns a sequence into the elements that the packer takes: one, or pieces of plain text."""

    max_fan_out = 1_000_000  # Only the random-access form of flat_map looks at it.

    def __init__(self, config: PackingConfig):
        """Prepares for rows of this shape."""
        self._config = config

    def flat_map(self, element: Sequence) -> list[Element]:
        """The elements of a sequence."""
        pieces = split_text(element, self._config.row_length)
        return [to_element(piece, self._config) for piece in pieces]


def split_text(sequence: Sequence, row_length: int) -> list[Sequence]:
    """Cuts a sequence without images into pieces of at most a row; others come back whole."""
    if sequence.images or len(sequence) <= row_length:
        return [sequence]
    return [
        dataclasses.replace(
            sequence,
            **{
                name: getattr(sequence, name)[start : start + row_length]
                for name in ("token_ids", "text_weights", "image_weights", "image_ref")
            },
        )
        for start in range(0, len(sequence), row_length)
    ]


def to_element(sequence: Sequence, config: PackingConfig) -> Element:
    """The features of one sequence, as if it stood alone in a row.

    Raises:
        ValueError: If it does not fit into an empty row, or its images have another form or size
            than the run's; names the document.
    """

    def refuse(reason: str) -> ValueError:
        return ValueError(f"document {sequence.document_id}: {reason}")

    length = len(sequence)
    if length > config.row_length:
        raise refuse(
            f"{length} tokens do not fit into row_length={config.row_length}; "
            "documents with images are not split"
        )
    element: Element = {
        "token_ids": sequence.token_ids,
        "text_weights": sequence.text_weights,
        "image_weights": sequence.image_weights,
    }
    expected_ndim = 3 if config.latent_dim is None else 2
    if any(image.ndim != expected_ndim for image in sequence.images):
        form = "pixels" if config.latent_dim is None else "latents"
        raise refuse(f"every image of the run must come as {form}")
    if config.latent_dim is not None:
        return element | {"latents": _scatter_latents(sequence, config.latent_dim, refuse)}
    images_by_size = {size: [] for size in sorted(config.image_sizes)}
    local_index = []
    for image in sequence.images:
        size = (image.shape[0], image.shape[1])
        if size not in images_by_size:
            known = ", ".join(map(buckets.image_key, images_by_size))
            raise refuse(f"image size {buckets.image_key(size)} is none of the run's: {known}")
        slot, num_tokens = len(images_by_size[size]), config.tokens_of(size)
        start = config.buffer_offsets[size] + slot * num_tokens
        local_index.append(np.arange(start, start + num_tokens, dtype=np.int32))
        images_by_size[size].append(image)
    for size, images in images_by_size.items():
        if len(images) > config.slots_of(size):
            raise refuse(
                f"{len(images)} images of size {buckets.image_key(size)}, but a row has "
                f"{config.slots_of(size)} slots of it "
                f"(max_images_per_row={config.max_images_per_row})"
            )
        # The packer only counts slots; the pixels ride along and are copied once, into the row.
        element[_SLOTS + buckets.image_key(size)] = np.zeros(len(images), np.int8)
    element["image_index"] = _scatter_index(sequence.image_ref, local_index)
    element["images"] = images_by_size
    return element


def _scatter_index(image_ref: np.ndarray, local_index: list[np.ndarray]) -> np.ndarray:
    """Buffer indices of image tokens in reading order, put where the tokens stand; else -1."""
    if not local_index:
        return np.full(len(image_ref), -1, np.int32)
    in_reading_order = np.concatenate([*local_index, np.array([-1], np.int32)])
    return in_reading_order[image_ref]  # image_ref is -1 off images, which reads the last entry.


def _scatter_latents(sequence: Sequence, latent_dim: int, refuse) -> np.ndarray:
    """float32 (L, D), zero off images."""
    latents = np.zeros((len(sequence), latent_dim), np.float32)
    for image in sequence.images:
        if image.shape[-1] != latent_dim:
            raise refuse(f"latents have width {image.shape[-1]}, the model takes {latent_dim}")
    if sequence.images:
        latents[sequence.image_ref >= 0] = np.concatenate(sequence.images)
    return latents


def finish_row(packed: Element, config: PackingConfig) -> Element:
    """Turns a row from the packer into a row of the batch (`schema.Batch` without axis B)."""
    segment_ids = packed["token_ids_segment_ids"]
    row: Element = {
        "token_ids": packed["token_ids"],
        "segment_ids": segment_ids,
        "positions": packed["token_ids_positions"],
        "text_weights": packed["text_weights"],
        "image_weights": packed["image_weights"],
    }
    if config.latent_dim is None:
        row |= _finish_images(packed, segment_ids, config)
    else:
        row["latents"] = packed["latents"]
    if config.attend_across_documents:
        filled = segment_ids > 0
        row["segment_ids"] = filled.astype(np.int32)
        row["positions"] = np.where(filled, np.arange(config.row_length), 0).astype(np.int32)
    # Nothing in its segment precedes the first token, so nothing predicts it.
    row["text_weights"] = np.where(row["positions"] > 0, row["text_weights"], 0).astype(np.float32)
    return row


def _finish_images(packed: Element, segment_ids: np.ndarray, config: PackingConfig) -> Element:
    """Puts the images of a row into their slots and moves the indices to them."""
    alone = packed["image_index"]
    index = alone.copy()
    images = {}
    for size, offset in config.buffer_offsets.items():
        key = buckets.image_key(size)
        num_tokens, slots = config.tokens_of(size), config.slots_of(size)
        pixels = np.zeros((slots, *size, 3), np.uint8)
        arrays = [image for document in packed["images"] for image in document[size]]
        if arrays:
            np.stack(arrays, out=pixels[: len(arrays)])
        images[key] = pixels
        # The index of a segment counts slots from its own first image of this size.
        slot_segments = packed[f"{_SLOTS}{key}_segment_ids"]
        here = (alone >= offset) & (alone < offset + slots * num_tokens)
        first_slot = np.searchsorted(slot_segments[: len(arrays)], segment_ids[here])
        index[here] += (first_slot * num_tokens).astype(index.dtype)
    return {"images": images, "image_index": index}


class _Row(grain.transforms.Map):
    """`finish_row` as a transform that pickles."""

    def __init__(self, config: PackingConfig):
        self._config = config

    def map(self, element: Element) -> Element:
        return finish_row(element, self._config)


def pack(dataset: grain.IterDataset, config: PackingConfig) -> grain.IterDataset:
    """Packs a dataset of `Sequence` into rows by best fit.

    A document goes to the open row that it fills best; when one fits into none, all open rows are
    emitted, shuffled.
    """
    dataset = grain.experimental.FlatMapIterDataset(dataset, PrepareSequences(config))
    lengths = dict.fromkeys(("token_ids", "text_weights", "image_weights"), config.row_length)
    padding = {"token_ids": config.pad_id, "text_weights": 0.0, "image_weights": 0.0}
    meta_features: tuple[str, ...] = ()
    if config.latent_dim is None:
        lengths["image_index"], padding["image_index"] = config.row_length, -1
        for size in config.image_sizes:
            name = _SLOTS + buckets.image_key(size)
            lengths[name], padding[name] = config.slots_of(size), 0
        meta_features = ("images",)
    else:
        lengths["latents"], padding["latents"] = config.row_length, 0.0
    packed = grain.experimental.BestFitPackIterDataset(
        dataset,
        length_struct=lengths,
        padding_struct=padding,
        num_packing_bins=config.num_packing_bins,
        seed=config.seed,
        meta_features=meta_features,
    )
    return packed.map(_Row(config))


def padding_share(batch: Mapping[str, Any]) -> float:
    """The share of a batch's positions that hold no document."""
    return float(np.mean(np.asarray(batch["segment_ids"]) == 0))
