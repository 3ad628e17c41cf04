"""Pictures for people: grids of images with their captions under them."""

import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

_MARGIN = 8
_FONT_SIZE = 12
_LINE_HEIGHT = _FONT_SIZE + 3
_MAX_LINES = 8
_PAIR_SIDE = 192
_RIGHT, _WRONG = "#1a7f37", "#cf222e"


def captioned_grid(
    images: Sequence[Image.Image],
    captions: Sequence[str] | None = None,
    columns: int = 4,
    side: int = 160,
    marks: Sequence[bool] | None = None,
) -> Image.Image:
    """Images in rows, each enlarged or reduced to one scale, captions below.

    Args:
        images: Of any sizes; at least one.
        captions: One for each image, wrapped to the width of the cells, cut after some lines.
        columns: Images in a row, at most.
        side: Length of the longer side of every image in the grid, in pixels.
        marks: Frames an image green (True) or red (False).

    Returns:
        An RGB picture.

    Raises:
        ValueError: No images, or another number of captions or marks than of images.
    """
    for name, values in (("captions", captions), ("marks", marks)):
        if values is not None and len(values) != len(images):
            raise ValueError(f"{len(values)} {name} for {len(images)} images")
    if not images:
        raise ValueError("a grid needs at least one image")
    images = [_to_side(image, side) for image in images]
    cell = (max(image.width for image in images), max(image.height for image in images))
    texts = [_wrap(caption, cell[0]) for caption in captions or []]
    text_height = _LINE_HEIGHT * max((text.count("\n") + 1 for text in texts), default=0)
    width, height = cell[0] + _MARGIN, cell[1] + text_height + _MARGIN
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * width + _MARGIN, rows * height + _MARGIN), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(_FONT_SIZE)
    for i, image in enumerate(images):
        x, y = _MARGIN + (i % columns) * width, _MARGIN + (i // columns) * height
        canvas.paste(image, (x, y))
        if marks is not None:
            frame = (x - 2, y - 2, x + image.width + 1, y + image.height + 1)
            draw.rectangle(frame, outline=_RIGHT if marks[i] else _WRONG, width=2)
        if texts:
            draw.multiline_text((x, y + cell[1] + 3), texts[i], fill="black", font=font)
    return canvas


def pairs_grid(
    left: UInt8[np.ndarray, "n height width 3"],
    right: UInt8[np.ndarray, "n height width 3"],
    columns: int = 4,
) -> Image.Image:
    """Pairs of images, such as an original and its reconstruction, each pair side by side."""
    pairs = np.concatenate([left, right], axis=2)
    return captioned_grid([Image.fromarray(pair) for pair in pairs], None, columns, _PAIR_SIDE)


def _to_side(image: Image.Image, side: int) -> Image.Image:
    """The image as RGB with its longer side scaled to `side`."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Small images keep hard pixels: smoothing would flatter them.
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, method)


def _wrap(caption: str, width: int) -> str:
    """The caption in lines of about `width` pixels; letters are 0.55 of their height wide."""
    letters = max(8, int(width / (0.55 * _FONT_SIZE)))
    return "\n".join(textwrap.wrap(caption, letters, max_lines=_MAX_LINES, placeholder=" ..."))
