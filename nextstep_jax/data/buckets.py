"""Aspect buckets: the token grids that images are fitted to.

NextStep-1 (arXiv 2508.10711) trains on 17 aspect ratios. At base 256 an image token covers 16
pixels, and the grids run from 8 x 32 to 32 x 8 around the square of 16 x 16; bases 512, 768 and
1024 multiply both sides by 2, 3 and 4. A base that is smaller or no multiple of 256 (the tiny
models of a laptop) has the square, and those of the 17 shapes that scale to whole tokens. Images
are made in these shapes alone: others have never been trained.

Words: a grid is (rows, columns) in image tokens; a size is (height, width) in pixels; stride is
the number of pixels along one side of an image token.
"""

import functools
import math
from collections.abc import Iterable

Grid = tuple[int, int]
Size = tuple[int, int]

_WIDE = ((8, 32), (9, 28), (10, 25), (11, 23), (12, 21), (13, 19), (14, 18), (15, 17))
ASPECT_GRIDS: tuple[Grid, ...] = (
    *_WIDE,
    (16, 16),
    *((columns, rows) for rows, columns in reversed(_WIDE)),
)
"""The 17 published grids at base 256 with 16 pixels a token."""

_SQUARE_SIDE = 16
# Sizes that an error lists.
_NUM_NEAREST = 4


@functools.cache  # Asked for every image.
def grids_of_base(base: int, *, stride: int = 16, square_only: bool = False) -> tuple[Grid, ...]:
    """The grids of a base, widest first.

    Args:
        base: The side of the square image in pixels.
        stride: Pixels along one side of an image token.
        square_only: Only the square.

    Raises:
        ValueError: If `base` is no positive multiple of `stride`.
    """
    if base <= 0 or base % stride:
        raise ValueError(f"base={base} must be a positive multiple of stride={stride}")
    side = base // stride
    if square_only:
        return ((side, side),)
    scaled = ((rows * side, columns * side) for rows, columns in ASPECT_GRIDS)
    return tuple(
        (rows // _SQUARE_SIDE, columns // _SQUARE_SIDE)
        for rows, columns in scaled
        if rows % _SQUARE_SIDE == 0 and columns % _SQUARE_SIDE == 0
    )


def nearest_grid(
    height: int, width: int, base: int, *, stride: int = 16, square_only: bool = False
) -> Grid:
    """The grid of a base whose aspect ratio is nearest, on the logarithmic scale.

    The logarithm makes wide and tall the same problem: the answer for the transposed image is the
    transposed grid. (The paper does not say how the distance is measured.)
    """
    _check_positive(height, width)
    aspect = math.log(height / width)
    return min(
        grids_of_base(base, stride=stride, square_only=square_only),
        key=lambda grid: abs(math.log(grid[0] / grid[1]) - aspect),
    )


def choose_size(
    height: int,
    width: int,
    bases: Iterable[int],
    *,
    stride: int = 16,
    square_only: bool = False,
) -> Size:
    """The pixel size that an image is fitted to.

    The base is the largest one whose area fits into the image's area (the released trainer's rule
    for several bases), or the smallest base for an image smaller than all.
    """
    _check_positive(height, width)
    ascending = sorted(bases)
    base = max((b for b in ascending if b * b <= height * width), default=ascending[0])
    rows, columns = nearest_grid(height, width, base, stride=stride, square_only=square_only)
    return rows * stride, columns * stride


def sizes_of_bases(
    bases: Iterable[int], *, stride: int = 16, square_only: bool = False
) -> tuple[Size, ...]:
    """All pixel sizes that `choose_size` can answer, ascending and without repetition."""
    sizes = {
        (rows * stride, columns * stride)
        for base in bases
        for rows, columns in grids_of_base(base, stride=stride, square_only=square_only)
    }
    return tuple(sorted(sizes))


def grid_of(height: int, width: int, stride: int = 16) -> Grid:
    """The token grid of an image of exactly this size.

    Raises:
        ValueError: If a side is no multiple of `stride`; the message lists the nearest sizes.
    """
    if height > 0 and width > 0 and height % stride == 0 and width % stride == 0:
        return height // stride, width // stride
    options = sorted(
        {(h, w) for h in _multiples(height, stride) for w in _multiples(width, stride)},
        key=lambda size: abs(size[0] - height) + abs(size[1] - width),
    )
    listed = ", ".join(image_key(size) for size in options)
    raise ValueError(
        f"image size {height}x{width} (height x width) is off the grid of {stride} pixels; "
        f"the nearest sizes are {listed}"
    )


def aspect_grid_of(height: int, width: int, stride: int = 16) -> Grid:
    """The grid of an image of exactly this size, which must be one that some base has.

    The bases are all multiples of `stride`, so that every square of whole tokens is one of them.

    Raises:
        ValueError: If no base has this size. The message lists the nearest sizes that are, by the
            pixels added to or taken from the height plus those of the width.
    """
    if height > 0 and width > 0 and height % stride == 0 and width % stride == 0:
        grid = height // stride, width // stride
        if _side_of(grid) is not None:
            return grid
    nearest = ", ".join(image_key(size) for size in _nearest_sizes(height, width, stride))
    raise ValueError(
        f"image size {height}x{width} (height x width) is off the {len(ASPECT_GRIDS)} aspect grids"
        f" with {stride} pixels a token; the nearest sizes are {nearest}"
    )


def base_of(grid: Grid, stride: int = 16) -> int:
    """The base, in pixels, that has a grid: the inverse of `grids_of_base`.

    There is never more than one, as no two of the 17 grids have the same aspect ratio.

    Raises:
        ValueError: If no base has the grid.
    """
    side = _side_of(grid)
    if side is None:
        raise ValueError(f"no base has the grid of {grid[0]} x {grid[1]} tokens")
    return side * stride


def _side_of(grid: Grid) -> int | None:
    """Tokens along the side of the square of the base that has the grid."""
    for rows, columns in ASPECT_GRIDS:
        # The grid is (rows, columns) * side / 16 for a whole side.
        side, remainder = divmod(grid[0] * _SQUARE_SIDE, rows)
        if not remainder and side > 0 and grid[1] * _SQUARE_SIDE == columns * side:
            return side
    return None


def _nearest_sizes(height: int, width: int, stride: int) -> list[Size]:
    """The sizes of all bases that are nearest to one that is none of them, nearest first."""
    sizes = set()
    for rows, columns in ASPECT_GRIDS:
        # The sizes of this shape are the multiples of a smallest one. Along them the distance
        # falls and then rises, with corners where the height or the width is met: the nearest
        # few lie around those corners.
        divisor = math.gcd(rows, columns, _SQUARE_SIDE)
        unit = rows // divisor * stride, columns // divisor * stride
        for corner in (height // unit[0], width // unit[1]):
            for factor in range(corner - _NUM_NEAREST, corner + _NUM_NEAREST + 1):
                if factor > 0:
                    sizes.add((factor * unit[0], factor * unit[1]))
        sizes.add(unit)

    def distance(size: Size) -> tuple[int, Size]:
        return abs(size[0] - height) + abs(size[1] - width), size

    return sorted(sizes, key=distance)[:_NUM_NEAREST]


def image_key(size: Size) -> str:
    """The name of a size, "HxW", as used for the keys of `Batch.images`."""
    return f"{size[0]}x{size[1]}"


def parse_image_key(key: str) -> Size:
    """The inverse of `image_key`."""
    height, _, width = key.partition("x")
    return int(height), int(width)


def ordered_image_keys(keys: Iterable[str]) -> list[str]:
    """The keys of `Batch.images` in the order of the row's image-token buffer.

    The order is by height, then width, as numbers. It differs from the order of the strings
    ("128x128" sorts before "64x64"), in which jax flattens a dict.
    """
    return sorted(keys, key=parse_image_key)


def _check_positive(height: int, width: int) -> None:
    if height <= 0 or width <= 0:
        raise ValueError(f"an image must have a positive size, got {height}x{width}")


def _multiples(length: int, stride: int) -> set[int]:
    below = length // stride * stride
    return {max(stride, below), max(stride, -(-length // stride) * stride)}
