import json

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from PIL import Image

from nextstep_jax.evaluation.latent_statistics import (
    LatentStatistics,
    effective_dimension,
    merge_moments,
    moments_of,
    plot_latent_statistics,
)
from nextstep_jax.models.latents import space_to_depth


def draw(num_images, rows=4, columns=6, width=5, seed=0):
    """Latents with channels of unlike means, variances and tails, far from 0."""
    rng = np.random.default_rng([seed])
    shape = (num_images, rows, columns, width)
    values = np.stack(
        [rng.normal(size=shape[:3]), *(rng.standard_t(5 + i, shape[:3]) for i in range(width - 1))],
        axis=-1,
    )
    values[..., 1] += 0.8 * values[..., 0]
    return (values * (1 + np.arange(width)) + 30 * np.arange(width)).astype(np.float32)


def gather(latents, cuts, patch_size=2):
    statistics = LatentStatistics(patch_size)
    for piece in np.split(latents, cuts):
        statistics.update(piece)
    return statistics.as_dict()


def test_moments_of_pieces_are_those_of_scipy():
    values = np.random.default_rng([1]).gamma(2.0, 3.0, (500, 3)) + 1e4
    merged = moments_of(values[:3], axis=0)
    for piece in (values[3:200], values[200:499], values[499:]):
        merged = merge_moments(merged, moments_of(piece, axis=0))
    assert merged.count == 500
    np.testing.assert_allclose(merged.mean, values.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(merged.variance, values.var(axis=0), rtol=1e-11)
    np.testing.assert_allclose(merged.kurtosis, scipy.stats.kurtosis(values), rtol=1e-9)
    skewness = merged.sum3 / merged.count / merged.variance**1.5
    np.testing.assert_allclose(skewness, scipy.stats.skew(values), rtol=1e-9)


def test_kurtosis_where_all_is_equal_is_zero():
    for value in (0.0, 0.1, -7e8):
        assert moments_of(np.full(9, value), axis=0).kurtosis == 0


def test_statistics_are_those_of_the_formulas():
    latents = draw(7)
    stats = gather(latents, [2, 3])
    assert json.loads(json.dumps(stats)) == stats
    x = latents.astype(np.float64)
    assert (stats["num_images"], stats["num_tokens"], stats["patch_size"]) == (7, 6, 2)
    tokens = np.asarray(space_to_depth(jnp.asarray(latents), 2)).astype(np.float64)
    views = {
        "all": x.ravel(),
        "channels": x.reshape(-1, 5),
        "positions": tokens.transpose(0, 2, 1).reshape(-1, 6),
    }
    for name, values in views.items():
        np.testing.assert_allclose(stats[name]["mean"], values.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(stats[name]["variance"], values.var(axis=0), rtol=1e-12)
        expected = scipy.stats.kurtosis(values)
        np.testing.assert_allclose(stats[name]["kurtosis"], expected, rtol=1e-10)
    singles = {
        "mean": tokens.mean(axis=2),
        "variance": tokens.var(axis=2),
        "kurtosis": scipy.stats.kurtosis(tokens, axis=2),
        "norm": np.sqrt((tokens**2).sum(axis=2)),
    }
    for name, values in singles.items():
        found = stats["tokens"][name]
        assert found["mean"] == pytest.approx(values.mean(), rel=1e-11)
        assert found["std"] == pytest.approx(values.std(), rel=1e-11)
    norms = singles["norm"]
    dispersion = stats["dispersion"]
    assert dispersion["norm_variation"] == pytest.approx(norms.std() / norms.mean(), rel=1e-11)
    eigenvalues = np.linalg.eigvalsh(np.cov(x.reshape(-1, 5), rowvar=False))
    expected = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    assert 1.5 < expected < 4.5
    assert dispersion["effective_channels"] == pytest.approx(expected, rel=1e-11)
    edges, counts = stats["histogram"]["edges"], stats["histogram"]["counts"]
    np.testing.assert_array_equal(counts, np.histogram(x, edges)[0])
    assert sum(counts) == x.size


def test_pieces_do_not_matter():
    latents = draw(9, seed=2)
    whole, pieces, reordered = (
        gather(latents, []),
        gather(latents, [1, 5]),
        gather(latents[::-1], [4]),
    )

    def close(a, b):
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            for name in a:
                close(a[name], b[name])
        else:
            np.testing.assert_allclose(a, b, rtol=1e-10)

    close(whole, pieces)
    close(whole, reordered)


def test_normalised_tokens_lie_on_a_sphere():
    tokens = np.random.default_rng([3]).normal(size=(20, 8, 16))
    tokens -= tokens.mean(axis=2, keepdims=True)
    tokens /= tokens.std(axis=2, keepdims=True)
    # 4 latent pixels a token, one after the other along the columns' patches.
    latents = tokens.reshape(20, 2, 4, 4, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(20, 4, 8, 4)
    stats = gather(latents, [])
    assert stats["dispersion"]["norm_variation"] < 1e-12
    assert abs(stats["tokens"]["mean"]["mean"]) < 1e-12
    assert stats["tokens"]["variance"]["mean"] == pytest.approx(1.0)
    assert stats["tokens"]["norm"]["mean"] == pytest.approx(4.0)
    assert 3.5 < stats["dispersion"]["effective_channels"] <= 4


def test_values_beyond_the_histogram_are_counted():
    latents = np.array([-1e9, 1e9, 0.01, 0.02], np.float32).reshape(1, 2, 2, 1)
    counts = gather(latents, [])["histogram"]["counts"]
    assert (counts[0], counts[-1], counts[len(counts) // 2]) == (1, 1, 2)


def test_effective_dimension():
    assert effective_dimension(np.eye(6) * 3) == pytest.approx(6)
    assert effective_dimension(np.outer([1.0, 2, 3], [1.0, 2, 3])) == pytest.approx(1)
    assert effective_dimension(np.zeros((2, 2))) == 0


def test_what_cannot_be_counted_is_refused():
    statistics = LatentStatistics()
    with pytest.raises(ValueError, match="no latents"):
        statistics.as_dict()
    with pytest.raises(ValueError, match="4x5 do not divide into patches of patch_size=2"):
        statistics.update(np.zeros((1, 4, 5, 3)))
    with pytest.raises(ValueError, match="empty"):
        statistics.update(np.zeros((0, 4, 4, 3)))
    statistics.update(np.zeros((1, 4, 4, 3)))
    for other in (np.zeros((1, 4, 4, 2)), np.zeros((1, 4, 8, 3))):
        with pytest.raises(ValueError, match="must be of one size"):
            statistics.update(other)
    assert statistics.as_dict()["num_images"] == 1


def test_plot(tmp_path):
    plot_latent_statistics(gather(draw(5), []), tmp_path / "latents.png")
    with Image.open(tmp_path / "latents.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape == (840, 1440, 3)
    # Every one of the six panels has drawn something that is neither white nor black.
    panels = pixels.reshape(2, 420, 3, 480, 3).transpose(0, 2, 1, 3, 4).reshape(6, -1, 3)
    assert all((np.ptp(panel.astype(int), axis=1) > 50).sum() > 200 for panel in panels)
