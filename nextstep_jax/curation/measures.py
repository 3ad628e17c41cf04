"""What can be measured on pixels alone: resolution, aspect, clarity and perceptual hashes.

The images of NextStep-1 were filtered by resolution and clarity (arXiv 2508.10711, section 3);
the paper gives no formulas, so those here are ours where no source is named.

    min_side   shorter side in pixels
    pixels     height x width
    aspect     longer side / shorter side, at least 1
    clarity    Var(L), L = Y(i-1,j) + Y(i+1,j) + Y(i,j-1) + Y(i,j+1) - 4 Y(i,j)
    phash      signs of the 8 x 8 lowest DCT coefficients of a 32 x 32 copy, against their median
    dhash      signs of the horizontal differences of a 9 x 8 copy

Y is the luma 0.299 R + 0.587 G + 0.114 B in [0, 255]. Hashes are 64 bits, row by row, the most
significant first; two are as far apart as bits differ.
"""

from collections.abc import Callable, Mapping

import numpy as np
import PIL.Image
import scipy.fft
from jaxtyping import Float, UInt8

Pixels = UInt8[np.ndarray, "height width 3"]

_HASH_SIDE = 8
_DCT_SIDE = 32
# Far below what a visible difference makes, far above the rounding of the transform: on a blank
# image all coefficients but the mean count as zero.
_DCT_DECIMALS = 6


def luma(pixels: Pixels, height: int, width: int) -> Float[np.ndarray, "{height} {width}"]:
    """The grey copy of an image, resized by Lanczos (which averages where it shrinks)."""
    grey = PIL.Image.fromarray(pixels).convert("L")
    if grey.size != (width, height):
        grey = grey.resize((width, height), PIL.Image.Resampling.LANCZOS)
    return np.asarray(grey, np.float64)


def resolution(pixels: Pixels) -> dict[str, float]:
    """`min_side` and `pixels`."""
    height, width = pixels.shape[:2]
    return {"min_side": float(min(height, width)), "pixels": float(height * width)}


def aspect(pixels: Pixels) -> dict[str, float]:
    """`aspect`: 1 of a square, 2 of an image twice as wide as high or twice as high as wide."""
    height, width = pixels.shape[:2]
    return {"aspect": max(height, width) / min(height, width)}


def clarity(pixels: Pixels, side: int) -> dict[str, float]:
    """`clarity`: the variance of the Laplacian of a grey copy of fixed size; blur lowers it.

    Args:
        pixels: The image.
        side: The copy's longer side. Sharpness is judged at this size, so that a large
            photograph, soft when looked at closely, is not worse than a small one. Smaller images
            stay as they are.

    Returns:
        Zero of an image too small to have a pixel with four neighbours.
    """
    height, width = pixels.shape[:2]
    scale = min(1.0, side / max(height, width))
    grey = luma(pixels, max(1, round(scale * height)), max(1, round(scale * width)))
    if min(grey.shape) < 3:
        return {"clarity": 0.0}
    laplacian = (
        grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    )
    return {"clarity": float(laplacian.var())}


def phash(pixels: Pixels) -> int:
    """The perceptual hash of the library imagehash: blind to size, compression and brightness.

    It sees luma only: pictures that differ in hue alone have the same hash.
    """
    grey = luma(pixels, _DCT_SIDE, _DCT_SIDE)
    low = scipy.fft.dctn(grey, type=2)[:_HASH_SIDE, :_HASH_SIDE].round(_DCT_DECIMALS)
    return _bits(low > np.median(low))


def dhash(pixels: Pixels) -> int:
    """The difference hash: cheaper than `phash`, and sees flat areas less well."""
    grey = luma(pixels, _HASH_SIDE, _HASH_SIDE + 1)
    return _bits(grey[:, 1:] > grey[:, :-1])


HASHES: Mapping[str, Callable[[Pixels], int]] = {"phash": phash, "dhash": dhash}


def _bits(signs: np.ndarray) -> int:
    return int.from_bytes(np.packbits(signs.reshape(-1)).tobytes(), "big")
