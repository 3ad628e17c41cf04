"""How close pictures are to others: PSNR, SSIM, Frechet distance, and a baseline to beat.

NextStep-1 (arXiv 2508.10711, Table 8 and figure 6) judges its image tokenizer by PSNR, SSIM and
the Frechet distance of Inception features (rFID). PSNR and SSIM are taken image by image on pixels
in 0 ... 255; the Frechet distance is between two sets of feature vectors, of whatever network.

Axes: batch, height, width, channels; n vectors of `features` values.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Array, Float, Float64, UInt8

PEAK = 255.0
# Ours: an image that is reproduced exactly shall not make the mean over images infinite. A 256x256
# image with one value off by one is at 101 dB.
MAX_PSNR = 100.0

# Wang et al. 2004: Gaussian of 1.5 pixels, cut at 3.5 of them, and two constants against 0 / 0.
_RADIUS = 5
WINDOW_SIZE = 2 * _RADIUS + 1
_SIGMA = 1.5
_LUMINANCE_CONSTANT = (0.01 * PEAK) ** 2
_CONTRAST_CONSTANT = (0.03 * PEAK) ** 2

Pixels = (
    UInt8[Array, "batch height width channels"]
    | UInt8[np.ndarray, "batch height width channels"]
    | Float[Array, "batch height width channels"]
    | Float[np.ndarray, "batch height width channels"]
)


# Single images.


def psnr(pixels: Pixels, others: Pixels) -> Float[Array, " batch"]:
    """Peak signal-to-noise ratio of each image in dB: 10 log10(255^2 / mean squared error).

    Args:
        pixels: Images in 0 ... 255, uint8 or float.
        others: Images of the same shape.

    Returns:
        At most `MAX_PSNR`, which identical images get.
    """
    x, y = _as_floats(pixels, others)
    squares = jnp.square(x - y)
    # One axis after the other: partial sums stay short, and float32 keeps its digits.
    error = jnp.mean(jnp.mean(jnp.mean(squares, axis=2), axis=1), axis=1)
    return jnp.minimum(10 * jnp.log10(PEAK**2 / error), MAX_PSNR)


def ssim(pixels: Pixels, others: Pixels) -> Float[Array, " batch"]:
    """Structural similarity of each image (Wang et al., IEEE TIP 13, 2004), mean over channels.

    Means, variances and covariance under a Gaussian window of 11x11 pixels (sigma 1.5, no sample
    correction), wherever the window fits inside the image:
    (2 mx my + c1) (2 vxy + c2) / ((mx^2 + my^2 + c1) (vx + vy + c2)), c1 = (0.01 * 255)^2,
    c2 = (0.03 * 255)^2.

    Args:
        pixels: Images in 0 ... 255, uint8 or float.
        others: Images of the same shape.

    Raises:
        ValueError: A side is smaller than the window.
    """
    x, y = _as_floats(pixels, others)
    _, height, width, _ = x.shape
    if min(height, width) < WINDOW_SIZE:
        raise ValueError(
            f"ssim: sides must be at least {WINDOW_SIZE} (its window), got {height}x{width}"
        )
    # E[x^2] - E[x]^2 would lose all digits of a small variance on a bright ground. The law of
    # total variance does not, and keeps the window separable: the (co)variance inside the rows of
    # the window, averaged, plus the (co)variance of the means of its rows.
    row_x, row_y, inside = _window_moments(x, y, axis=2)
    mean_x, mean_y, between = _window_moments(row_x, row_y, axis=1)
    var_x, var_y, covariance = (
        _window_mean(moment, axis=1) + more for moment, more in zip(inside, between, strict=True)
    )
    numerator = (2 * mean_x * mean_y + _LUMINANCE_CONSTANT) * (2 * covariance + _CONTRAST_CONSTANT)
    luminance = jnp.square(mean_x) + jnp.square(mean_y) + _LUMINANCE_CONSTANT
    similarity = numerator / (luminance * (var_x + var_y + _CONTRAST_CONSTANT))
    return jnp.mean(jnp.mean(jnp.mean(similarity, axis=2), axis=1), axis=1)


def bicubic_baseline(
    pixels: UInt8[np.ndarray, "batch height width 3"], num_values: int
) -> UInt8[np.ndarray, "batch height width 3"]:
    """What is left of images that are scaled down to a number of values and up again.

    Pillow's bicubic filter, with antialiasing on the way down and rounded to uint8 in between. The
    small image is of `baseline_size`.

    Raises:
        ValueError: `num_values` is below 1.
    """
    _, height, width, _ = pixels.shape
    rows, columns = baseline_size(height, width, num_values)
    bicubic = PIL.Image.Resampling.BICUBIC
    return np.stack(
        [
            np.asarray(
                PIL.Image.fromarray(image)
                .resize((columns, rows), bicubic)
                .resize((width, height), bicubic)
            )
            for image in pixels
        ]
    )


def baseline_size(height: int, width: int, num_values: int) -> tuple[int, int]:
    """The smallest (rows, columns) of the image's aspect with 3 * rows * columns >= num_values.

    Both sides are rounded up, in favour of the baseline: it keeps at least as many values as what
    it is compared with; never more than the image has.

    Raises:
        ValueError: `num_values` is below 1.
    """
    if num_values < 1:
        raise ValueError(f"num_values={num_values} must be at least 1")
    rows = _ceil_sqrt(num_values * height, 3 * width)
    columns = _ceil_sqrt(num_values * width, 3 * height)
    return min(rows, height), min(columns, width)


def _as_floats(pixels, others):
    if pixels.shape != others.shape:
        raise ValueError(f"images of shapes {pixels.shape} and {others.shape} cannot be compared")
    return jnp.asarray(pixels, jnp.float32), jnp.asarray(others, jnp.float32)


def _window_mean(x, axis):
    """Means under the Gaussian window along one axis, where it fits."""
    length = x.shape[axis] - WINDOW_SIZE + 1
    slices = [np.index_exp[:] * axis + np.index_exp[i : i + length] for i in range(WINDOW_SIZE)]
    return sum(float(w) * x[s] for w, s in zip(_gaussian(), slices, strict=True))


def _window_moments(x, y, axis):
    """Means, and (variance, variance, covariance), under the window along one axis."""
    mean_x, mean_y = _window_mean(x, axis), _window_mean(y, axis)
    length = mean_x.shape[axis]
    var_x = var_y = covariance = 0.0
    for i, weight in enumerate(_gaussian()):
        where = np.index_exp[:] * axis + np.index_exp[i : i + length]
        off_x, off_y = x[where] - mean_x, y[where] - mean_y
        var_x += float(weight) * jnp.square(off_x)
        var_y += float(weight) * jnp.square(off_y)
        covariance += float(weight) * (off_x * off_y)
    return mean_x, mean_y, (var_x, var_y, covariance)


def _gaussian() -> Float64[np.ndarray, " window"]:
    offsets = np.arange(-_RADIUS, _RADIUS + 1)
    weights = np.exp(-0.5 * (offsets / _SIGMA) ** 2)
    return weights / weights.sum()


def _ceil_sqrt(numerator: int, denominator: int) -> int:
    """The smallest integer whose square is at least the fraction, without rounding errors."""
    return math.isqrt(-(-numerator // denominator) - 1) + 1


# Sets of images.


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of feature vectors, in float64, gathered piece by piece.

    Pieces are merged by the formula of Chan et al. (1979), which is stable; into how many pieces
    the vectors fall and in which order they come moves nothing but the last digits.

    Attributes:
        count: Number of vectors.
        mean: Their mean.
        scatter: Sum of the outer products of their deviations from the mean.
    """

    count: int
    mean: Float64[np.ndarray, " features"]
    scatter: Float64[np.ndarray, "features features"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "n features"]) -> "FeatureStatistics":
        """The statistics of some vectors; of none it is the zero that `merge` starts from."""
        features = np.asarray(features, np.float64)
        count, width = features.shape
        mean = features.mean(axis=0) if count else np.zeros(width)
        deviations = features - mean
        return cls(count, mean, deviations.T @ deviations)

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """The statistics of the vectors of both.

        Raises:
            ValueError: The vectors are of different lengths.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"features of {len(self.mean)} and of {len(other.mean)} values cannot be merged"
            )
        count = self.count + other.count
        if count == 0:
            return self
        difference = other.mean - self.mean
        scatter = self.scatter + other.scatter
        scatter += np.outer(difference, difference) * (self.count * other.count / count)
        return type(self)(count, self.mean + difference * (other.count / count), scatter)

    @property
    def covariance(self) -> Float64[np.ndarray, "features features"]:
        """The unbiased covariance, scatter / (count - 1).

        Raises:
            ValueError: There are fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 vectors, got {self.count}")
        return self.scatter / (self.count - 1)

    @functools.cached_property
    def factor(self) -> Float64[np.ndarray, "features rank"]:
        """F with F F^T = covariance, of as many columns as the covariance has rank.

        The eigenvectors, each times the root of its eigenvalue; eigenvalues that are nothing but
        rounding, as those beyond the number of vectors, are left out. Kept once computed.
        """
        values, vectors = np.linalg.eigh(self.covariance)
        kept = values > values.max(initial=0.0) * len(values) * np.finfo(np.float64).eps
        return vectors[:, kept] * np.sqrt(values[kept])


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Frechet distance of two Gaussians: |ma - mb|^2 + tr(A + B - 2 (A B)^(1/2)).

    (Dowson and Landau 1982; of Inception features it is the FID.) With A = F F^T and B = G G^T,
    tr (A B)^(1/2) is the sum of the roots of the eigenvalues of the symmetric F^T B F = (F^T G)
    (F^T G)^T: the sum of the singular values of F^T G, which are taken from it directly because
    squaring would halve the digits of the small ones. Singular covariances need no care.

    Raises:
        ValueError: Features of different lengths, or fewer than two vectors.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features of {len(a.mean)} and of {len(b.mean)} values cannot be compared"
        )
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    shared = np.linalg.svd(a.factor.T @ b.factor, compute_uv=False).sum()
    return float(np.sum(np.square(a.mean - b.mean)) + traces - 2 * shared)
