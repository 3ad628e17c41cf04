"""The values that flow through the data system: documents, sequences and packed batches.

A document is what a source yields: text and images in reading order, with the flag that says
whether predicting a part is trained. It becomes a sequence (`data/layout.py`), sequences are
packed into rows (`data/packing.py`), and rows are stacked into the batch that the train step
reads.

Axes: batch rows B, row length L, images of one size N, image tokens of an image n, token width 64
(latent channels x patch x patch).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

import numpy as np
from jaxtyping import Float32, Int32

Kind = Literal["text", "pair", "edit", "interleaved"]
KINDS: tuple[Kind, ...] = ("text", "pair", "edit", "interleaved")


@dataclasses.dataclass(frozen=True)
class Text:
    """A run of text.

    Attributes:
        text: The string, as the tokenizer shall see it.
        loss: Whether cross-entropy is taken on its tokens.
        wordings: The same thing said in other words, by key, such as a short caption or one in
            another language; the layout may draw one of them in place of `text`. A key for
            `text` itself may be among them.
    """

    text: str
    loss: bool = True
    wordings: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Image:
    """An image in exactly one of three forms.

    Attributes:
        pixels: uint8 (height, width, 3), or None.
        encoded: The bytes of an image file, or None.
        latents: float (n, token_dim) image tokens already encoded, or None; needs `grid`.
        grid: (rows, columns) of the token grid; needed with `latents`, else derived from pixels.
        loss: Whether the flow loss is taken on its tokens.
    """

    pixels: np.ndarray | None = None
    encoded: bytes | None = None
    latents: np.ndarray | None = None
    grid: tuple[int, int] | None = None
    loss: bool = True

    def __post_init__(self):
        """Checks that exactly one form is given."""
        forms = [self.pixels is not None, self.encoded is not None, self.latents is not None]
        if sum(forms) != 1:
            raise ValueError("Image: give exactly one of pixels, encoded, latents")
        if self.latents is not None and self.grid is None:
            raise ValueError("Image: latents need grid=(rows, columns)")


Part = Text | Image


@dataclasses.dataclass(frozen=True)
class Document:
    """Text and images in reading order, from one source.

    Attributes:
        parts: The parts, in reading order.
        id: Unique within the source; log lines and random choices refer to it.
        source: The name of the source.
        kind: One of `KINDS`; decides the layout (`data/layout.py`).
        metadata: What a checker or a curator wants to know; never seen by the model.
    """

    parts: tuple[Part, ...]
    id: str
    source: str
    kind: Kind
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def images(self) -> tuple[Image, ...]:
        """The images in reading order."""
        return tuple(part for part in self.parts if isinstance(part, Image))


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One document laid out as a sequence of L tokens (`data/layout.py`).

    Attributes:
        token_ids: int32 (L,); the placeholder id stands where an image token is.
        text_weights: float32 (L,), the weight of the cross-entropy of predicting what stands AT
            this position.
        image_weights: float32 (L,), the same for the flow loss; zero off the placeholders.
        image_ref: int32 (L,), at a placeholder the running number of the image token among all
            image tokens of the document, in reading order; -1 elsewhere.
        images: In reading order: uint8 (height, width, 3) pixels, or float (n, token_dim) tokens.
        grids: (rows, columns) of each image.
        document_id: Where it comes from; for error messages.
        kind: The kind of the document.
    """

    token_ids: Int32[np.ndarray, " length"]
    text_weights: Float32[np.ndarray, " length"]
    image_weights: Float32[np.ndarray, " length"]
    image_ref: Int32[np.ndarray, " length"]
    images: tuple[np.ndarray, ...]
    grids: tuple[tuple[int, int], ...]
    document_id: str
    kind: Kind

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.token_ids)


class Batch(TypedDict, total=False):
    """What the pipeline yields: B packed rows of L tokens, numpy on the host.

    Fields:
        token_ids: int32 (B, L).
        segment_ids: int32 (B, L), 1.. for the documents of a row, 0 for padding.
        positions: int32 (B, L), counted from 0 within a segment; 0 on padding.
        text_weights: float32 (B, L), the weight of predicting what stands at this position; zero
            at the first position of a segment, which nothing precedes.
        image_weights: float32 (B, L), the same for the flow loss.
        kinds: int8 (B, L), 1 + the index in `KINDS` of the document's kind; 0 on padding.
        document_ids: Of each row, the documents of its segments in order; stays on the host.
        images: For every size that occurs, under the key "HxW", uint8 (N, H, W, 3): all images of
            this size in the batch. N differs from batch to batch. Absent where documents carry
            latents.
        image_slots: For every size that occurs, int32 (N, n): where each token of each image
            stands, as row * L + column. Absent where documents carry latents.
        latents: float32 (B, L, token_dim), zero off images. Only where documents carry latents.
    """

    token_ids: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    text_weights: np.ndarray
    image_weights: np.ndarray
    kinds: np.ndarray
    document_ids: list[list[str]]
    images: dict[str, np.ndarray]
    image_slots: dict[str, np.ndarray]
    latents: np.ndarray
