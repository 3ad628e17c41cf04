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

Cross-entropy is taken on text, area string, end of image and eos; not on begin of image and
placeholders, which are never sampled, nor on an eos right after an image, which is not either.
The flow loss is taken on the placeholders of the images whose `loss` flag says so (of an edit,
the source sets it only on the last one).

Words: weights belong to the position of the token that is predicted, not to the one before it.
"""

import dataclasses
import functools
from collections.abc import Sequence as ListLike

import numpy as np
from jaxtyping import Shaped

from nextstep_jax.data import buckets, images
from nextstep_jax.data.schema import Document, Image, Part, Sequence, Text
from nextstep_jax.data.text_tokenizer import TextTokenizer

IMAGE_TAG = "<image>"
"""Marks the place of an input image in a prompt."""


@dataclasses.dataclass(frozen=True)
class LayoutConfig:
    """How documents become sequences.

    Attributes:
        image_first_prob: Probability that the image of a pair stands before its caption.
        image_bases: Sides of the square bucket; an image goes to the largest whose area it fills.
        square_only: Crop every image to the square instead of the nearest aspect bucket.
        pixels_per_token: Pixels along one side of an image token.
    """

    image_first_prob: float = 0.3
    image_bases: tuple[int, ...] = (256,)
    square_only: bool = False
    pixels_per_token: int = 16

    def __post_init__(self):
        """Checks the ranges, and that every base has a grid."""
        if not 0.0 <= self.image_first_prob <= 1.0:
            raise ValueError(f"image_first_prob={self.image_first_prob} must lie in [0, 1]")
        if not self.image_bases:
            raise ValueError("image_bases must name at least one base, such as (256,)")
        object.__setattr__(self, "image_bases", tuple(self.image_bases))
        _ = self.image_sizes

    @property
    def image_sizes(self) -> tuple[buckets.Size, ...]:
        """Every (height, width) that an image can be fitted to, ascending."""
        return buckets.sizes_of_bases(
            self.image_bases, stride=self.pixels_per_token, square_only=self.square_only
        )


@dataclasses.dataclass(frozen=True)
class _Block:
    """A run of tokens with the weights of predicting them."""

    ids: list[int]
    text_weights: list[float]
    image_weights: list[float]


def lay_out(
    document: Document,
    tokenizer: TextTokenizer,
    config: LayoutConfig,
    rng: np.random.Generator,
) -> Sequence:
    """Lays a document out as a sequence.

    Args:
        document: The document. Its pixels are decoded and fitted to their bucket here.
        tokenizer: Gives the ids.
        config: The choices.
        rng: Draws the random choices; a pipeline seeds it by document, so that they do not depend
            on which worker reads the document, nor when.

    Raises:
        ValueError: If the parts do not fit the kind, or an image cannot be used; names the
            document.
    """
    try:
        blocks, arrays, grids = [], [], []
        for part in arrange_parts(document, config, rng):
            if isinstance(part, Text):
                blocks.append(_text_block(part, tokenizer))
            else:
                array, grid = fit_image(part, config)
                arrays.append(array)
                grids.append(grid)
                blocks.append(_image_block(grid, part.loss, tokenizer))
    except ValueError as error:
        raise ValueError(f"document {document.source}/{document.id}: {error}") from error
    blocks.append(_eos_block(document, blocks, tokenizer))

    token_ids = np.array([i for block in blocks for i in block.ids], np.int32)
    is_image = token_ids == tokenizer.image_placeholder_id
    return Sequence(
        token_ids=token_ids,
        text_weights=np.array([w for b in blocks for w in b.text_weights], np.float32),
        image_weights=np.array([w for b in blocks for w in b.image_weights], np.float32),
        image_ref=np.where(is_image, np.cumsum(is_image) - 1, -1).astype(np.int32),
        images=tuple(arrays),
        grids=tuple(grids),
        document_id=f"{document.source}/{document.id}",
        kind=document.kind,
    )


def arrange_parts(
    document: Document, config: LayoutConfig, rng: np.random.Generator
) -> tuple[Part, ...]:
    """The parts of a document in the order of its layout. All random choices are made here.

    Raises:
        ValueError: If the parts do not fit the kind.
    """
    parts = document.parts
    texts = tuple(part for part in parts if isinstance(part, Text))
    num_texts, num_images = len(texts), len(document.images)
    found = f"found {num_texts} texts and {num_images} images"
    match document.kind:
        case "text":
            if not num_texts or num_images:
                raise ValueError(f"kind 'text' has texts and no images; {found}")
            return parts
        case "pair":
            if num_texts != 1 or num_images != 1:
                raise ValueError(f"kind 'pair' has one text and one image; {found}")
            # Drawn for every pair, so that the number of draws does not depend on the config.
            image_first = rng.random() < config.image_first_prob
            return (*document.images, *texts) if image_first else (*texts, *document.images)
        case "edit":
            if num_texts < 1 or num_images < 2:
                raise ValueError(f"kind 'edit' has an instruction and two or more images; {found}")
            return parts
        case "interleaved":
            if not parts:
                raise ValueError("kind 'interleaved' has at least one part; found none")
            return parts
    raise ValueError(f"kind {document.kind!r} is none of 'text', 'pair', 'edit', 'interleaved'")


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


def fit_image(image: Image, config: LayoutConfig) -> tuple[Shaped[np.ndarray, "..."], buckets.Grid]:
    """The array of an image as the sequence holds it, and its grid.

    Args:
        image: In any of its forms.
        config: Says which buckets there are.

    Returns:
        uint8 (height, width, 3), decoded and fitted to its bucket; or the latents as they are.

    Raises:
        ValueError: If the image cannot be decoded, or its latents do not fill its grid.
    """
    if image.latents is not None:
        rows, columns = image.grid
        if image.latents.ndim != 2 or len(image.latents) != rows * columns:
            raise ValueError(
                f"latents must be (rows * columns, token_dim) for grid {rows}x{columns}, "
                f"got shape {image.latents.shape}"
            )
        return image.latents, (rows, columns)
    pixels = images.pixels_of(image)
    stride = config.pixels_per_token
    height, width = buckets.choose_size(
        *pixels.shape[:2], config.image_bases, stride=stride, square_only=config.square_only
    )
    return images.resize_cover(pixels, height, width), buckets.grid_of(height, width, stride)


def _text_block(text: Text, tokenizer: TextTokenizer) -> _Block:
    ids = tokenizer.encode(text.text)
    return _Block(ids, [float(text.loss)] * len(ids), [0.0] * len(ids))


def _image_block(grid: buckets.Grid, loss: bool, tokenizer: TextTokenizer) -> _Block:
    ids = image_ids(grid, tokenizer)
    num_tokens = grid[0] * grid[1]
    num_area = len(ids) - num_tokens - 2
    return _Block(
        ids,
        # The size string counts as text even where the image itself is only an input.
        text_weights=[1.0] * num_area + [0.0] * (1 + num_tokens) + [1.0],
        image_weights=[0.0] * (num_area + 1) + [float(loss)] * num_tokens + [0.0],
    )


def _eos_block(document: Document, blocks: list[_Block], tokenizer: TextTokenizer) -> _Block:
    """The end of text: trained like the text that it ends, never right after an image."""
    last_ids = next((block.ids for block in reversed(blocks) if block.ids), [])
    if last_ids and last_ids[-1] == tokenizer.eoi_id:
        weight = 0.0
    else:
        texts = [part for part in document.parts if isinstance(part, Text)]
        weight = float(texts[-1].loss) if texts else 0.0
    return _Block([tokenizer.eos_id], [weight], [0.0])
