"""Pixel measures against scipy, explicit cosine sums and small cases."""

import io
import itertools

import numpy as np
import PIL.Image
import pytest
import scipy.ndimage

from nextstep_jax.curation import measures
from nextstep_jax.data.shapes import ShapesSource


def noise(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pictures(number):
    source = ShapesSource("pair", image_size=128)
    return [source[i].images[0].pixels for i in range(number)]


def distance(a, b):
    return (a ^ b).bit_count()


def grey(pixels):
    return np.rint(pixels @ np.array([0.299, 0.587, 0.114]) - 1e-9)


def test_resolution_and_aspect():
    pixels = noise(0, 30, 90)
    assert measures.resolution(pixels) == {"min_side": 30.0, "pixels": 2700.0}
    assert measures.aspect(pixels) == {"aspect": 3.0}
    assert measures.aspect(pixels.swapaxes(0, 1)) == {"aspect": 3.0}


def test_clarity_is_the_variance_of_scipys_laplacian():
    pixels = noise(1, 40, 56)
    expected = scipy.ndimage.laplace(grey(pixels))[1:-1, 1:-1].var()
    # Pillow's luma is an integer, rounded by its own fixed-point numbers.
    assert measures.clarity(pixels, 256)["clarity"] == pytest.approx(expected, rel=1e-3)


def test_clarity_falls_under_blur():
    sharp = pictures(1)[0]
    blurred = [
        scipy.ndimage.gaussian_filter(sharp, (sigma, sigma, 0)) for sigma in (0, 0.7, 1.5, 3)
    ]
    values = [measures.clarity(pixels, 256)["clarity"] for pixels in blurred]
    assert all(low < 0.7 * high for high, low in itertools.pairwise(values)), values
    assert measures.clarity(np.full((9, 9, 3), 77, np.uint8), 256) == {"clarity": 0.0}
    assert measures.clarity(noise(0, 2, 9), 256) == {"clarity": 0.0}


def test_clarity_is_seen_at_one_size():
    """An image and its enlargement are as clear as one another, once both are shrunk."""
    small = pictures(1)[0]
    large = np.asarray(PIL.Image.fromarray(small).resize((512, 512), PIL.Image.Resampling.LANCZOS))
    same = [measures.clarity(pixels, 64)["clarity"] for pixels in (small, large)]
    assert same[0] == pytest.approx(same[1], rel=0.03)
    assert measures.clarity(large, 512)["clarity"] < 0.1 * measures.clarity(small, 512)["clarity"]


def test_phash_is_a_sum_of_cosines():
    pixels = noise(2, 32, 32)
    y = np.asarray(PIL.Image.fromarray(pixels).convert("L"), np.float64)
    n = np.arange(32)
    cosines = np.cos(np.pi * (2 * n[None, :] + 1) * np.arange(8)[:, None] / 64)
    low = 4 * cosines @ y @ cosines.T
    bits = "".join("1" if value > np.median(low) else "0" for value in low.reshape(-1))
    assert measures.phash(pixels) == int(bits, 2)


def test_dhash_compares_neighbours():
    pixels = noise(3, 8, 9)
    y = np.asarray(PIL.Image.fromarray(pixels).convert("L")).astype(int)
    bits = "".join("1" if y[i, j + 1] > y[i, j] else "0" for i in range(8) for j in range(8))
    assert measures.dhash(pixels) == int(bits, 2)


def test_blank_images_have_one_hash():
    assert len({measures.phash(np.full((50, 70, 3), v, np.uint8)) for v in range(1, 255, 13)}) == 1


def test_copies_are_near_and_others_are_not():
    originals = pictures(12)
    hashes = [measures.phash(pixels) for pixels in originals]
    for pixels, found in zip(originals, hashes, strict=True):
        image, file = PIL.Image.fromarray(pixels), io.BytesIO()
        image.resize((90, 90)).resize((200, 180)).save(file, "JPEG", quality=50)
        copy = np.asarray(PIL.Image.open(file).convert("RGB"))
        assert distance(found, measures.phash(copy)) <= 4
    others = [distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(others) > 8
