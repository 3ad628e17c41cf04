"""The path, its velocity and its score against closed forms of Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from nextstep_jax.flow import path

MEAN, STD = 1.5, 0.6


def gaussian_velocity(x, t):
    """E[data - noise | x_t = x] for data N(MEAN, STD^2), by conditioning a joint Gaussian."""
    covariance = t * STD**2 - (1 - t)
    variance = t**2 * STD**2 + (1 - t) ** 2
    return MEAN + covariance / variance * (x - t * MEAN)


def test_interpolate_and_velocity_by_hand():
    x = jnp.array([[2.0, -4.0], [1.0, 0.0]])
    noise = jnp.array([[1.0, 1.0], [-1.0, 3.0]])
    got = path.interpolate(x, noise, jnp.array([0.25, 1.0]))
    np.testing.assert_array_equal(got, [[1.25, -0.25], [1.0, 0.0]])
    np.testing.assert_array_equal(path.interpolate(x, noise, jnp.array(0.0)), noise)
    np.testing.assert_array_equal(path.velocity_target(x, noise), [[1.0, -5.0], [2.0, -3.0]])


def test_interpolate_differentiates_to_the_velocity():
    rng = np.random.default_rng([0])
    x, noise = (jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for _ in range(2))
    t = jnp.array([0.1, 0.5, 0.9])
    _, slope = jax.jvp(lambda t: path.interpolate(x, noise, t), (t,), (jnp.ones_like(t),))
    np.testing.assert_allclose(slope, path.velocity_target(x, noise), atol=1e-6)


def test_results_are_float32_for_lower_precision_input():
    x = jnp.ones((2, 3), jnp.bfloat16)
    t = jnp.full((2,), 0.3)
    for got in (
        path.interpolate(x, x, t),
        path.velocity_target(x, x),
        path.score_from_velocity(x, x, t),
    ):
        assert got.dtype == jnp.float32
    # In bfloat16 the weights 0.3 and 0.7 would be off by 1e-3.
    np.testing.assert_allclose(path.interpolate(x, 0 * x, t), 0.3, atol=1e-7)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.7, 0.98])
def test_score_against_the_gaussian_density(t):
    x = np.linspace(-3.0, 4.0, 15)
    mean, variance = t * MEAN, t**2 * STD**2 + (1 - t) ** 2
    velocity = gaussian_velocity(x, t)
    got = path.score_from_velocity(
        jnp.asarray(velocity, jnp.float32)[:, None],
        jnp.asarray(x, jnp.float32)[:, None],
        jnp.array(t, jnp.float32),
    )[:, 0]
    expected = -(x - mean) / variance
    np.testing.assert_allclose(got, expected, atol=3e-5 * np.abs(expected).max())
    # The expectation itself is checked by its density: a central difference of log p.
    log_density = stats.norm(mean, np.sqrt(variance)).logpdf
    difference = (log_density(x + 1e-5) - log_density(x - 1e-5)) / 2e-5
    np.testing.assert_allclose(expected, difference, rtol=1e-5, atol=1e-5)


def test_closed_form_velocity_is_the_regression_of_the_target():
    # Guards the velocity on which the solver tests stand: least squares of (data - noise) on x_t.
    rng = np.random.default_rng([1])
    data, noise = MEAN + STD * rng.normal(size=200_000), rng.normal(size=200_000)
    x = 0.3 * data + 0.7 * noise
    slope, offset = np.polyfit(x, data - noise, 1)
    expected = gaussian_velocity(np.array([0.0, 1.0]), 0.3)
    np.testing.assert_allclose([offset, offset + slope], expected, atol=0.01)


def test_logit_normal_times_follow_their_distribution():
    t = np.asarray(path.logit_normal_times(jax.random.key(3), (4, 5000)))
    assert t.shape == (4, 5000) and t.dtype == np.float32
    assert t.min() > 0 and t.max() < 1
    logits = np.log(t.ravel()) - np.log1p(-t.ravel())
    assert stats.kstest(logits, "norm").pvalue > 0.01
    again = path.logit_normal_times(jax.random.key(3), (4, 5000))
    np.testing.assert_array_equal(t, again)


def test_times_from_normal_is_the_sigmoid():
    u = np.array([-2.0, 0.0, 1.0], np.float32)
    expected = 1 / (1 + np.exp(-u.astype(np.float64)))
    np.testing.assert_allclose(path.times_from_normal(jnp.asarray(u)), expected, rtol=1e-6)
