"""How the latents of an image tokenizer are distributed over a data set.

NextStep-1 (arXiv 2508.10711, its study of the tokenizer) traces the quality and the stability of
generation back to the latent space: normalised, well spread, close to Gaussian. Here that is in
numbers: mean, variance and excess kurtosis by channel, by token and by position, and two measures
of dispersion. Everything is gathered as central moments in float64, in any number of pieces.

Words for axes: latents are (batch, rows, columns, latent); a token is a patch of p x p latent
pixels, of latent * p^2 values (`models.latents.space_to_depth`). All moments are of the population
(divided by n, as in scipy.stats by default).
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float64
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nextstep_jax.evaluation.image_metrics import FeatureStatistics
from nextstep_jax.models.latents import space_to_depth

# Bins of the histogram: narrow around 0, wide far out, so that it serves latents of any scale
# without a look at the data first; 0.05 wide at 0, 0.16 at 3, out to +-1490. Ours.
_NUM_BINS = 320
_EDGES = np.sinh(np.linspace(-8.0, 8.0, _NUM_BINS + 1))
# What a plot shows of the histogram.
_PLOTTED = 5.0


class Moments(NamedTuple):
    """Count, mean and sums of the 2nd, 3rd and 4th powers of the deviations from it."""

    count: int
    mean: Float64[np.ndarray, "*shape"]
    sum2: Float64[np.ndarray, "*shape"]
    sum3: Float64[np.ndarray, "*shape"]
    sum4: Float64[np.ndarray, "*shape"]

    @property
    def variance(self) -> Float64[np.ndarray, "*shape"]:
        """Of the population."""
        return np.asarray(self.sum2 / self.count)

    @property
    def kurtosis(self) -> Float64[np.ndarray, "*shape"]:
        """Excess kurtosis, count * sum4 / sum2^2 - 3: 0 for a Gaussian, and where all is equal."""
        # Deviations of the size of the mean's own rounding are none.
        rounding = self.count * np.square(4 * np.finfo(np.float64).eps * self.mean)
        varied = self.sum2 > rounding
        ratio = self.count * self.sum4 / np.square(np.where(varied, self.sum2, 1.0))
        return np.where(varied, ratio - 3, 0.0)


def moments_of(values: Float[np.ndarray, "*shape"], axis: int | tuple[int, ...]) -> Moments:
    """The moments along some axes, which must not be empty."""
    values = np.asarray(values, np.float64)
    axes = (axis,) if isinstance(axis, int) else axis
    count = int(np.prod([values.shape[i] for i in axes]))
    mean = values.mean(axis=axes, keepdims=True)
    deviations = values - mean
    squares = np.square(deviations)
    sums = [np.asarray(p.sum(axis=axes)) for p in (squares, squares * deviations, squares**2)]
    return Moments(count, np.asarray(mean.squeeze(axes)), *sums)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """The moments of the values of both (Pebay, Sandia report SAND2008-6212, 2008)."""
    n, m, total = a.count, b.count, a.count + b.count
    d = b.mean - a.mean
    sum2 = a.sum2 + b.sum2 + d**2 * n * m / total
    sum3 = a.sum3 + b.sum3 + d**3 * n * m * (n - m) / total**2
    sum3 += 3 * d * (n * b.sum2 - m * a.sum2) / total
    sum4 = a.sum4 + b.sum4 + d**4 * n * m * (n**2 - n * m + m**2) / total**3
    sum4 += 6 * d**2 * (n**2 * b.sum2 + m**2 * a.sum2) / total**2
    sum4 += 4 * d * (n * b.sum3 - m * a.sum3) / total
    return Moments(total, a.mean + d * m / total, sum2, sum3, sum4)


def effective_dimension(covariance: Float64[np.ndarray, "width width"]) -> float:
    """The participation ratio tr(C)^2 / tr(C^2) = (sum of eigenvalues)^2 / sum of their squares.

    The width where the variance is spread evenly over all directions, 1 where one direction has
    all of it; 0 where there is none.
    """
    squares = float(np.sum(np.square(covariance)))
    return float(np.trace(covariance) ** 2 / squares) if squares > 0 else 0.0


class LatentStatistics:
    """Gathers the statistics of latents of one size, batch after batch.

    Args:
        patch_size: Latent pixels along one side of a token.
    """

    def __init__(self, patch_size: int = 2):
        self._patch_size = patch_size
        self._num_images = 0
        self._histogram = np.zeros(_NUM_BINS, np.int64)
        self._moments: dict[str, Moments] = {}
        self._channels: FeatureStatistics | None = None

    def update(self, latents: Float[np.ndarray, "batch rows columns latent"]) -> None:
        """Adds a batch.

        Raises:
            ValueError: The batch is empty, its sides do not divide into patches, or it is of
                another size than those before.
        """
        latents = np.asarray(latents, np.float64)
        if not latents.size:
            raise ValueError(f"latents of shape {latents.shape} are empty")
        tokens = space_to_depth(latents, self._patch_size)
        num_images, width = len(latents), latents.shape[-1]
        each = moments_of(tokens, axis=2)
        new = {
            "all": moments_of(latents, axis=(0, 1, 2, 3)),
            "channels": moments_of(latents, axis=(0, 1, 2)),
            "positions": moments_of(tokens, axis=(0, 2)),
            # One value a token; of these, the distribution over all tokens.
            "token_mean": moments_of(each.mean, axis=(0, 1)),
            "token_variance": moments_of(each.variance, axis=(0, 1)),
            "token_kurtosis": moments_of(each.kurtosis, axis=(0, 1)),
            "token_norm": moments_of(np.linalg.norm(tokens, axis=2), axis=(0, 1)),
        }
        for name, old in self._moments.items():
            if old.mean.shape != new[name].mean.shape:
                raise ValueError(
                    f"latents of {latents.shape[1:]} after others with {len(old.mean)} {name}: all"
                    " must be of one size"
                )
        self._moments = {
            name: merge_moments(self._moments[name], one) if name in self._moments else one
            for name, one in new.items()
        }
        vectors = FeatureStatistics.of(latents.reshape(-1, width))
        self._channels = vectors if self._channels is None else self._channels.merge(vectors)
        inside = np.clip(latents, _EDGES[0], _EDGES[-1])
        self._histogram += np.histogram(inside, _EDGES)[0]
        self._num_images += num_images

    def as_dict(self) -> dict[str, Any]:
        """All statistics as plain values, ready for JSON.

        Returns:
            num_images, num_tokens (of an image), patch_size;
            all, channels (lists, one entry a channel), positions (lists, one entry a token in
            row-major order): mean, variance and kurtosis of the values there over all images;
            tokens: mean, variance, kurtosis and norm, taken token by token, each with its mean and
            standard deviation over all tokens;
            dispersion: `norm_variation`, standard deviation of the tokens' norms over their mean
            (0: all tokens on one sphere, as normalisation puts them), and `effective_channels`,
            see `effective_dimension`, of the covariance of the channels;
            histogram: edges and counts of all values, those beyond the ends in the last bins.

        Raises:
            ValueError: No latents have been added.
        """
        if self._channels is None:
            raise ValueError("no latents have been added")
        moments = self._moments
        tokens = {
            name: _spread(moments[f"token_{name}"])
            for name in ("mean", "variance", "kurtosis", "norm")
        }
        norm = tokens["norm"]
        covariance = self._channels.scatter / self._channels.count
        return {
            "num_images": self._num_images,
            "num_tokens": len(moments["positions"].mean),
            "patch_size": self._patch_size,
            **{name: _summary(moments[name]) for name in ("all", "channels", "positions")},
            "tokens": tokens,
            "dispersion": {
                "norm_variation": norm["std"] / norm["mean"] if norm["mean"] else 0.0,
                "effective_channels": effective_dimension(covariance),
            },
            "histogram": {"edges": _EDGES.tolist(), "counts": self._histogram.tolist()},
        }


def _summary(moments: Moments) -> dict[str, Any]:
    return {name: getattr(moments, name).tolist() for name in ("mean", "variance", "kurtosis")}


def _spread(moments: Moments) -> dict[str, float]:
    return {"mean": float(moments.mean), "std": float(np.sqrt(moments.variance))}


# Pictures.


def plot_latent_statistics(stats: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws what `LatentStatistics.as_dict` returned: the distribution, the channels, the tokens.

    Args:
        stats: The statistics.
        path: A file; its suffix names the format.
    """
    # Not through pyplot: no display, and no state that is shared with the caller's figures.
    figure = Figure(figsize=(12, 7), layout="constrained")
    (density, mean, variance), (kurtosis, level, norm) = figure.subplots(2, 3)
    _draw_density(density, stats)
    for axes, name in ((mean, "mean"), (variance, "variance"), (kurtosis, "kurtosis")):
        values = stats["channels"][name]
        axes.bar(range(len(values)), values, color="tab:blue")
        axes.axhline(1.0 if name == "variance" else 0.0, color="black", linewidth=0.8)
        axes.set_title(("excess " if name == "kurtosis" else "") + f"{name} by channel")
        axes.set_xlabel("channel")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    positions = stats["positions"]
    for name in ("mean", "variance", "kurtosis"):
        level.plot(positions[name], label=name, linewidth=1)
    level.set_title("tokens by position (row-major)")
    level.set_xlabel("position")
    level.xaxis.set_major_locator(MaxNLocator(integer=True))
    level.legend()
    _draw_tokens(norm, stats)
    figure.savefig(path, dpi=120)


def _draw_density(axes, stats):
    """The histogram as a density beside a Gaussian of mean 0 and variance 1."""
    edges, counts = (np.asarray(stats["histogram"][name]) for name in ("edges", "counts"))
    density = counts / counts.sum() / np.diff(edges)
    axes.stairs(density, edges, fill=True, alpha=0.5, label="latent values")
    x = np.linspace(-_PLOTTED, _PLOTTED, 201)
    axes.plot(x, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), "k--", linewidth=1, label="N(0, 1)")
    axes.set_xlim(-_PLOTTED, _PLOTTED)
    whole = stats["all"]
    axes.set_title(f"variance {whole['variance']:.3g}, excess kurtosis {whole['kurtosis']:.3g}")
    axes.legend()


def _draw_tokens(axes, stats):
    """Mean and spread over all tokens of what is taken token by token."""
    names = ("mean", "variance", "kurtosis")
    means = [stats["tokens"][name]["mean"] for name in names]
    spreads = [stats["tokens"][name]["std"] for name in names]
    axes.errorbar(range(len(names)), means, spreads, fmt="o", capsize=6)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.axhline(0.0, color="black", linewidth=0.8)
    dispersion = stats["dispersion"]
    axes.set_title("single tokens: mean and std over all")
    width = len(stats["channels"]["mean"])
    axes.set_xlabel(
        f"norms: std / mean {dispersion['norm_variation']:.2g}\n"
        f"effective channels {dispersion['effective_channels']:.1f} of {width}"
    )
