"""Pictures for people: grids of images with their captions under them."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MARGIN = 8
_FONT_SIZE = 12


def captioned_grid(
    images: Sequence[Image.Image],
    captions: Sequence[str] | None = None,
    columns: int = 4,
    cell: int = 160,
    marks: Sequence[bool] | None = None,
) -> Image.Image:
    """Images in rows, each enlarged or reduced to a cell, captions below.

    Args:
        images: Of any sizes.
        captions: One for each image, wrapped to the cell.
        columns: Images in a row.
        cell: Side of a cell in pixels.
        marks: Frames an image green (True) or red (False).

    Returns:
        An RGB picture.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    lines = [
        textwrap.wrap(text, max(8, int(cell / (0.55 * _FONT_SIZE)))) for text in captions or []
    ]
    text_height = (_FONT_SIZE + 3) * max((len(one) for one in lines), default=0)
    width, height = cell + _MARGIN, cell + text_height + _MARGIN
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * width + _MARGIN, rows * height + _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(images):
        x = _MARGIN + (i % columns) * width
        y = _MARGIN + (i // columns) * height
        # Small images keep hard pixels: smoothing would flatter them.
        method = Image.Resampling.NEAREST if image.width < cell else Image.Resampling.LANCZOS
        canvas.paste(image.convert("RGB").resize((cell, cell), method), (x, y))
        if marks is not None:
            color = "#1a7f37" if marks[i] else "#cf222e"
            draw.rectangle((x - 2, y - 2, x + cell + 1, y + cell + 1), outline=color, width=2)
        if lines:
            draw.multiline_text((x, y + cell + 3), "\n".join(lines[i]), fill="black", font=font)
    return canvas


def pairs_grid(left: np.ndarray, right: np.ndarray, columns: int = 4) -> Image.Image:
    """Two uint8 stacks (n, height, width, 3) side by side, image by image."""
    both = np.concatenate([left, right], axis=2)
    cells = [Image.fromarray(one) for one in both]
    aspect = both.shape[2] / both.shape[1]
    rows = -(-len(cells) // columns)
    side = 96
    size = (int(side * aspect), side)
    canvas = Image.new("RGB", (columns * (size[0] + 4), rows * (size[1] + 4)), "white")
    for i, image in enumerate(cells):
        place = ((i % columns) * (size[0] + 4), (i // columns) * (size[1] + 4))
        canvas.paste(image.resize(size, Image.Resampling.NEAREST), place)
    return canvas
