"""From a document to a sequence of tokens, with the weight of predicting each of them.

The layouts are those of the released trainer of NextStep-1 (arXiv 2508.10711). An image block is

    <|image_area|> r o w s * c o l s <|begin_of_image|> placeholder ... <|end_of_image|>

with one placeholder for each token of the rows x columns grid, row by row; rows*cols is ordinary
text that is tokenised on its own, so that it never merges with the caption. Then

    text         text eos
    pair         caption, image block, eos; or image block, caption, eos, with a probability of
                 0.3. The second order trains the branch that guidance calls unconditional: an
                 image with no text before it
    edit         source image block, instruction, target image block, eos: the parts in order
    interleaved  the parts in order, eos

Which parts a document keeps, in which wording and order, is drawn in `data/arrangement.py`.
Cross-entropy is taken on text, area string, end of image and eos; not on begin of image and
placeholders, which are never sampled, nor on an eos right after an image, which is not either.
The flow loss is taken on the placeholders of the images whose `loss` flag says so, of an edit only
on those of the last one.

Words: weights belong to the position of the token that is predicted, not to the one before it.
"""

import dataclasses
import functools
from collections.abc import Sequence as ListLike
from typing import Any

import numpy as np
from jaxtyping import Shaped

from nextstep_jax.data import buckets, images
from nextstep_jax.data.arrangement import Draws, LayoutConfig, arrange_parts
from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.schema import Document, Image, Part, Sequence, Text
from nextstep_jax.data.text_tokenizer import TextTokenizer

IMAGE_TAG = "<image>"
"""Marks the place of an input image in a prompt."""


@dataclasses.dataclass(frozen=True)
class _Block:
    """A run of tokens with the weights of predicting them."""

    ids: np.ndarray
    text_weights: np.ndarray
    image_weights: np.ndarray

    @classmethod
    def of(cls, ids: ListLike[int], text_weights: Any = 0.0, image_weights: Any = 0.0) -> "_Block":
        """The arrays of these numbers; a weight may be one for all tokens."""
        block = cls(
            np.array(ids, np.int32),
            np.empty(len(ids), np.float32),
            np.empty(len(ids), np.float32),
        )
        block.text_weights[:] = text_weights
        block.image_weights[:] = image_weights
        return block


Fitted = tuple[Shaped[np.ndarray, "..."], buckets.Grid]
"""The array of an image as the sequence holds it, and its grid; see `fit_image`."""


@dataclasses.dataclass(frozen=True)
class Draft:
    """A document whose choices are made and whose texts are tokenised; no image is opened yet.

    Attributes:
        document: The document.
        parts: What is left of it, in order.
        blocks: The tokens of each part; None for an image, whose grid is not known.
        places: Of each image, where it is cropped; see `images.resize_cover`.
    """

    document: Document
    parts: tuple[Part, ...]
    blocks: tuple[_Block | None, ...]
    places: tuple[tuple[float, float], ...]


def lay_out(
    document: Document,
    tokenizer: TextTokenizer,
    config: LayoutConfig,
    rng: np.random.Generator,
) -> Sequence:
    """Lays a document out as a sequence: `draft`, `fit_images` and `assemble` in turn.

    Args:
        document: The document. Its pixels are decoded and fitted to their bucket here.
        tokenizer: Gives the ids.
        config: The choices.
        rng: Draws the random choices; a pipeline seeds it by document, so that they do not depend
            on which worker reads the document, nor when.

    Raises:
        DocumentError: If the parts do not fit the kind, or an image cannot be used; names the
            document.
    """
    drafted = draft(document, tokenizer, config, rng)
    return assemble(drafted, fit_images(drafted, config), tokenizer)


def draft(
    document: Document,
    tokenizer: TextTokenizer,
    config: LayoutConfig,
    rng: np.random.Generator,
) -> Draft:
    """The first step of `lay_out`: all choices, and the tokens of the texts.

    Raises:
        DocumentError: If the parts do not fit the kind; names the document.
    """
    draws = Draws.of(rng)
    try:
        parts = arrange_parts(document, config, draws)
    except DocumentError as error:
        raise _naming(document, error) from error
    num_images = sum(isinstance(part, Image) for part in parts)
    centre = (0.5, 0.5)
    return Draft(
        document,
        parts,
        tuple(_text_block(p, tokenizer) if isinstance(p, Text) else None for p in parts),
        tuple(tuple(rng.random(2)) if config.random_crop else centre for _ in range(num_images)),
    )


def fit_images(drafted: Draft, config: LayoutConfig) -> list[Fitted]:
    """The second step of `lay_out`: nearly all of its work, where there are images.

    Raises:
        DocumentError: If an image cannot be used; names the document.
    """
    found = [part for part in drafted.parts if isinstance(part, Image)]
    try:
        pairs = zip(found, drafted.places, strict=True)
        return [fit_image(image, config, place) for image, place in pairs]
    except DocumentError as error:
        raise _naming(drafted.document, error) from error


def assemble(drafted: Draft, fitted: ListLike[Fitted], tokenizer: TextTokenizer) -> Sequence:
    """The last step of `lay_out`: the arrays of the sequence."""
    document, blocks, grids = drafted.document, [], iter(grid for _, grid in fitted)
    for part, block in zip(drafted.parts, drafted.blocks, strict=True):
        blocks.append(block or _image_block(next(grids), part.loss, tokenizer))
    blocks.append(_eos_block(drafted.parts, blocks, tokenizer))

    token_ids = np.concatenate([block.ids for block in blocks])
    places = np.flatnonzero(token_ids == tokenizer.image_placeholder_id)
    image_ref = np.full(len(token_ids), -1, np.int32)
    image_ref[places] = np.arange(len(places))
    return Sequence(
        token_ids=token_ids,
        text_weights=np.concatenate([block.text_weights for block in blocks]),
        image_weights=np.concatenate([block.image_weights for block in blocks]),
        image_ref=image_ref,
        images=tuple(array for array, _ in fitted),
        grids=tuple(grid for _, grid in fitted),
        document_id=f"{document.source}/{document.id}",
        kind=document.kind,
    )


def _naming(document: Document, error: DocumentError) -> DocumentError:
    return error.within(f"document {document.source}/{document.id}")


@functools.lru_cache(maxsize=1024)  # A run has few grids, and asks for one with every image.
def area_ids(grid: buckets.Grid, tokenizer: TextTokenizer) -> tuple[int, ...]:
    """The ids that announce an image of rows x columns tokens: area token, "rows*cols"."""
    return (tokenizer.image_area_id, *tokenizer.encode(f"{grid[0]}*{grid[1]}"))


def image_ids(grid: buckets.Grid, tokenizer: TextTokenizer) -> list[int]:
    """The ids of a whole image block."""
    return [
        *area_ids(grid, tokenizer),
        tokenizer.boi_id,
        *[tokenizer.image_placeholder_id] * (grid[0] * grid[1]),
        tokenizer.eoi_id,
    ]


def prompt_prefix(
    caption: str,
    grid: buckets.Grid,
    tokenizer: TextTokenizer,
    input_grids: ListLike[buckets.Grid] = (),
) -> list[int]:
    """The ids that a sampler starts from: caption, area string, begin of image.

    They equal the beginning of the training layout of the same text and images, so that the
    sampler continues a sequence that training has shown.

    Args:
        caption: The prompt. Each `<image>` in it is the place of an input image; the tag itself
            is not encoded. Without tags the input images stand first, as in the layout of edits
            (the released code has no such default: there a tag is required).
        grid: (rows, columns) of the image to make.
        tokenizer: Gives the ids.
        input_grids: (rows, columns) of the input images, in the order of their tags. Their
            placeholders are to be replaced by the images' tokens.

    Raises:
        ValueError: If the number of tags, where there are any, is not that of the input images.
    """
    pieces = caption.split(IMAGE_TAG)
    if len(pieces) == 1:
        pieces = [""] * len(input_grids) + pieces
    if len(pieces) != len(input_grids) + 1:
        raise ValueError(
            f"the prompt has {len(pieces) - 1} {IMAGE_TAG} tags for {len(input_grids)} input images"
        )
    ids = tokenizer.encode(pieces[0])
    for input_grid, piece in zip(input_grids, pieces[1:], strict=True):
        ids += image_ids(input_grid, tokenizer) + tokenizer.encode(piece)
    return [*ids, *area_ids(grid, tokenizer), tokenizer.boi_id]


def fit_image(
    image: Image, config: LayoutConfig, place: tuple[float, float] = (0.5, 0.5)
) -> Fitted:
    """The array of an image as the sequence holds it, and its grid.

    Args:
        image: In any of its forms.
        config: Says which buckets there are, and which images are refused.
        place: Where pixels are cropped; see `images.resize_cover`.

    Returns:
        uint8 (height, width, 3), decoded and fitted to its bucket; or the latents as they are.

    Raises:
        DocumentError: If the image cannot be decoded or has an absurd size, or its latents do not
            fill its grid.
    """
    if image.latents is not None:
        rows, columns = image.grid
        if image.latents.ndim != 2 or len(image.latents) != rows * columns:
            raise DocumentError(
                "bad_document",
                f"latents must be (rows * columns, token_dim) for grid {rows}x{columns}, "
                f"got shape {image.latents.shape}",
            )
        return image.latents, (rows, columns)
    picture = images.picture_of(image)
    size = images.size_of(picture)
    shorter, longer = sorted(size)
    if shorter < config.smallest_side or longer > config.max_aspect_ratio * shorter:
        raise DocumentError(
            "image_size",
            f"an image of {size[0]}x{size[1]} pixels (height x width); sides must"
            f" be at least {config.smallest_side} and differ by at most a factor of"
            f" {config.max_aspect_ratio}",
        )
    stride = config.pixels_per_token
    (height, width), grid = _bucket_of(size, config.image_bases, stride, config.square_only)
    return images.resize_cover(picture, height, width, place), grid


@functools.lru_cache(maxsize=4096)  # Data sets have many images of a few sizes.
def _bucket_of(
    size: buckets.Size, bases: tuple[int, ...], stride: int, square_only: bool
) -> tuple[buckets.Size, buckets.Grid]:
    """The size that an image is fitted to, and the grid of that."""
    fitted = buckets.choose_size(*size, bases, stride=stride, square_only=square_only)
    return fitted, buckets.grid_of(*fitted, stride)


def _text_block(text: Text, tokenizer: TextTokenizer) -> _Block:
    return _Block.of(tokenizer.encode(text.text), float(text.loss))


@functools.lru_cache(maxsize=1024)  # As `area_ids`.
def _image_block(grid: buckets.Grid, loss: bool, tokenizer: TextTokenizer) -> _Block:
    ids = image_ids(grid, tokenizer)
    num_tokens = grid[0] * grid[1]
    num_area = len(ids) - num_tokens - 2
    return _Block.of(
        ids,
        # The size string counts as text even where the image itself is only an input.
        text_weights=[1.0] * num_area + [0.0] * (1 + num_tokens) + [1.0],
        image_weights=[0.0] * (num_area + 1) + [float(loss)] * num_tokens + [0.0],
    )


def _eos_block(parts: ListLike[Part], blocks: list[_Block], tokenizer: TextTokenizer) -> _Block:
    """The end of text: trained like the text that it ends, never right after an image."""
    last_ids = next((block.ids for block in reversed(blocks) if len(block.ids)), None)
    if last_ids is not None and last_ids[-1] == tokenizer.eoi_id:
        weight = 0.0
    else:
        texts = [part for part in parts if isinstance(part, Text)]
        weight = float(texts[-1].loss) if texts else 0.0
    return _Block.of([tokenizer.eos_id], weight)
