"""From prompts and input images to what the model is prompted with: branches, grids, seeds.

The branches of guidance are those of the released code of NextStep-1 (arXiv 2508.10711, eq 4),
which the second and third scale of `flow.guidance.guide` belong to:

    1  the prompt with its input images
    2  the prompt with its input images; the negative prompt alone
    3  the prompt with its input images; the input images, then the negative prompt; the negative
       prompt alone

Words: a branch is a row of token ids; a grid is (rows, columns) in image tokens; a base is the
side in pixels of the square that a grid is as large as.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from nextstep_jax.data.buckets import Grid, aspect_grid_of, base_of, nearest_grid
from nextstep_jax.data.images import resize_cover, rgb_of
from nextstep_jax.data.layout import IMAGE_TAG, prompt_prefix
from nextstep_jax.data.text_tokenizer import TextTokenizer
from nextstep_jax.sampling.presets import Preset

# Images of one call may have different sizes: the names are not bound to one length.
InputImage = UInt8[np.ndarray, "_height _width 3"]

# Seeds are the 32-bit words that typed keys are made of.
NUM_SEEDS = 2**32
# Characters of a prompt that an error message repeats.
_QUOTED_PROMPT = 60


@dataclasses.dataclass(frozen=True)
class Request:
    """One image to be made.

    Attributes:
        branches: Token ids of each branch of guidance.
        sees_inputs: Which branches hold the placeholders of the input images.
        seed: What its key is made of.
    """

    branches: tuple[tuple[int, ...], ...]
    sees_inputs: tuple[bool, ...]
    seed: int


def guidance_branches(
    prompt: str,
    preset: Preset,
    grid: Grid,
    input_grids: Sequence[Grid],
    tokenizer: TextTokenizer,
    max_prompt_length: int,
) -> tuple[tuple[tuple[int, ...], ...], tuple[bool, ...]]:
    """Ids of the 1 to 3 guidance branches of a prompt, and which of them see the input images.

    Branches whose velocity the scales cancel are left out: without a text scale (1) the negative
    prompt, without an image scale (1) or without input images the middle branch. The negative
    prompt of two branches stands alone, also where there are input images; text guidance then
    pushes towards the input images too. The released code knows one input image a prompt; here
    the middle branch has all of them, in order. It also has no middle branch where the text scale
    alone is 1, although the image scale asks for it.

    Args:
        prompt: The caption, with the places of the input images marked by `<image>`.
        preset: Its scales and its texts are used.
        grid: (rows, columns) of the image to make.
        input_grids: (rows, columns) of the input images.
        tokenizer: Gives the ids.
        max_prompt_length: Longest branch in text tokens, with the size strings; the tokens of
            input images do not count.

    Raises:
        ValueError: A branch is too long, or tags and input images differ in number.
    """
    negative = preset.negative_prompt
    full = f"{prompt} {preset.positive_prompt}" if preset.positive_prompt else prompt
    rows = [("prompt", full, tuple(input_grids))]
    has_middle = bool(input_grids) and preset.image_guidance_scale != 1.0
    if has_middle:
        rows.append(("negative prompt", IMAGE_TAG * len(input_grids) + negative, rows[0][2]))
    if has_middle or preset.guidance_scale != 1.0:
        rows.append(("negative prompt", negative, ()))
        if IMAGE_TAG in negative:
            raise ValueError(
                f"the negative prompt has {negative.count(IMAGE_TAG)} {IMAGE_TAG} tags;"
                " only a prompt places input images"
            )
    branches = []
    for name, text, grids in rows:
        ids = tuple(prompt_prefix(text, grid, tokenizer, grids))
        # What an input image takes follows from its size; nobody can shorten it as a text.
        num_text = len(ids) - sum(height * width for height, width in grids)
        if num_text > max_prompt_length:
            given = full if name == "prompt" else negative
            cut = given if len(given) <= _QUOTED_PROMPT else given[:_QUOTED_PROMPT] + "..."
            raise ValueError(
                f"the {name} {cut!r} has {num_text} text tokens with its size string;"
                f" the limit is {max_prompt_length}"
            )
        branches.append(ids)
    return tuple(branches), tuple(bool(grids) for _, _, grids in rows)


def output_grid(
    height: int | None,
    width: int | None,
    default: tuple[int, int],
    inputs: Sequence[InputImage],
    stride: int,
) -> Grid:
    """The grid of the image to make.

    Args:
        height: Pixels, or None.
        width: Pixels, or None.
        default: (height, width) where they are not given. With input images and neither given,
            the image takes the aspect grid nearest to the first input, at the default's base (the
            "source bucket" of the released settings for edits).
        inputs: The input images.
        stride: Pixels along one side of an image token.

    Raises:
        ValueError: If the size is not on one of the aspect grids; lists the nearest that are.
    """
    if height is None and width is None and inputs:
        base = base_of(aspect_grid_of(*default, stride), stride)
        return nearest_grid(*inputs[0].shape[:2], base, stride=stride)
    height = default[0] if height is None else height
    return aspect_grid_of(height, default[1] if width is None else width, stride)


def input_images(image: Any) -> list[InputImage]:
    """The pixels of none, one or several input images: PIL of any mode, or uint8 arrays.

    PIL images are converted like files of training data: see `data.images.decode`.

    Raises:
        ValueError: If one is neither, or cannot be read.
    """
    images = [] if image is None else image if isinstance(image, list | tuple) else [image]
    pixels = [rgb_of(one) if isinstance(one, Image.Image) else np.asarray(one) for one in images]
    for one in pixels:
        if one.dtype != np.uint8 or one.ndim != 3 or one.shape[-1] != 3 or not one.size:
            raise ValueError(
                f"image must be a PIL image or uint8 (height, width, 3),"
                f" got {one.dtype} {one.shape}"
            )
    return pixels


def fit_inputs(inputs: Sequence[InputImage], grid: Grid, stride: int) -> list[InputImage]:
    """Each input image resized and cropped to its own nearest aspect grid, at the output's base.

    Args:
        inputs: The input images.
        grid: (rows, columns) of the image to make.
        stride: Pixels along one side of an image token.
    """
    base, fitted = base_of(grid, stride), []
    for pixels in inputs:
        rows, columns = nearest_grid(*pixels.shape[:2], base, stride=stride)
        fitted.append(resize_cover(pixels, rows * stride, columns * stride))
    return fitted


def first_seeds(
    seed: int | np.integer | Sequence[int],
    num_prompts: int,
    num_images: int,
    *,
    shared_noise: bool = False,
) -> list[int]:
    """The seed of the first image of every prompt; image j of a prompt has that plus j.

    Args:
        seed: One for all prompts, or one a prompt.
        num_prompts: Number of prompts.
        num_images: Images of every prompt.
        shared_noise: All prompts take the seeds, and so the noise, of the first.

    Raises:
        ValueError: If there are more or fewer seeds than prompts, or some are out of range.
    """
    one = isinstance(seed, int | np.integer)
    seeds = [int(seed)] * num_prompts if one else [int(value) for value in seed]
    if len(seeds) != num_prompts:
        raise ValueError(f"seed: {len(seeds)} seeds for {num_prompts} prompts")
    if shared_noise:
        seeds = seeds[:1] * num_prompts
    if min(seeds) < 0 or max(seeds) + num_images > NUM_SEEDS:
        raise ValueError(f"seeds of images must lie in [0, {NUM_SEEDS}), got {seed}")
    return seeds
