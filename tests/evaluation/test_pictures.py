import numpy as np
import pytest
from PIL import Image

from nextstep_jax.evaluation.pictures import captioned_grid, pairs_grid

MARGIN = 8


def solid(color, width=10, height=10):
    return Image.new("RGB", (width, height), color)


def test_images_stand_in_rows():
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    grid = captioned_grid([solid(color) for color in colors], columns=2, side=40)
    assert grid.size == (2 * 48 + MARGIN, 2 * 48 + MARGIN)
    pixels = np.asarray(grid)
    for color, (row, column) in zip(colors, [(0, 0), (0, 1), (1, 0)], strict=True):
        y, x = MARGIN + 48 * row, MARGIN + 48 * column
        assert (pixels[y : y + 40, x : x + 40] == color).all()
    assert (pixels[MARGIN + 48 :, MARGIN + 48 :] == 255).all()


def test_images_keep_their_aspect():
    grid = captioned_grid([solid("red", 20, 10), solid("blue", 5, 10)], side=40)
    red, blue = ((np.asarray(grid) == color).all(-1) for color in ((255, 0, 0), (0, 0, 255)))
    assert [np.ptp(np.flatnonzero(red.any(axis))) + 1 for axis in (1, 0)] == [20, 40]
    assert [np.ptp(np.flatnonzero(blue.any(axis))) + 1 for axis in (1, 0)] == [40, 20]


def test_captions_stand_below_and_widen_the_rows():
    images = [solid("red")] * 2
    plain = captioned_grid(images, side=80)
    one_line = captioned_grid(images, ["a red square", ""], side=80)
    lines = captioned_grid(images, ["a long caption " * 3, ""], side=80)
    endless = captioned_grid(images, ["a long caption " * 300, ""], side=80)
    heights = [plain.height, one_line.height, lines.height, endless.height]
    assert heights[1] == heights[0] + 15
    assert heights[2] > heights[1]
    assert heights[3] == heights[0] + 8 * 15
    below = np.asarray(one_line)[MARGIN + 80 :]
    dark = (below.max(-1) < 100).any(0)
    assert dark[:88].any() and not dark[88:].any()


def test_marks_frame_the_images():
    pixels = np.asarray(captioned_grid([solid("white")] * 2, side=40, marks=[True, False]))
    assert pixels[20, MARGIN - 2].tolist() == [0x1A, 0x7F, 0x37]
    assert pixels[20, MARGIN + 48 - 2].tolist() == [0xCF, 0x22, 0x2E]


def test_pairs_stand_side_by_side():
    left = np.full((5, 8, 8, 3), 50, np.uint8)
    right = np.full((5, 8, 8, 3), 150, np.uint8)
    grid = pairs_grid(left, right, columns=4)
    assert grid.size == (4 * (192 + MARGIN) + MARGIN, 2 * (96 + MARGIN) + MARGIN)
    pixels = np.asarray(grid)
    for y, x in [(MARGIN, MARGIN), (MARGIN + 104, MARGIN), (MARGIN, MARGIN + 3 * 200)]:
        assert (pixels[y : y + 96, x : x + 96] == 50).all()
        assert (pixels[y : y + 96, x + 96 : x + 192] == 150).all()


def test_bad_input():
    with pytest.raises(ValueError, match="at least one image"):
        captioned_grid([])
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        captioned_grid([solid("red")] * 2, ["a"])
    with pytest.raises(ValueError, match="3 marks for 2 images"):
        captioned_grid([solid("red")] * 2, marks=[True] * 3)
