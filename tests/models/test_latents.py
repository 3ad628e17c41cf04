"""Tokens, normalisation and samples of latents against explicit loops in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from nextstep_jax.models.latents import (
    depth_to_space,
    normalize_latents,
    normalize_tokens,
    sample_posterior,
    space_to_depth,
)


def _draw(*seed_and_shape):
    """Standard normal float32 values; the last argument is the shape."""
    *seed, shape = seed_and_shape
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _relative_error(value, reference):
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    assert value.shape == reference.shape
    return np.abs(value - reference).max() / np.abs(reference).max()


@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_space_to_depth_is_row_major_and_channel_major_inside_a_token(patch_size):
    rows, columns, channels = 2, 3, 5
    latents = _draw(0, (2, rows * patch_size, columns * patch_size, channels))
    expected = np.empty((2, rows * columns, channels * patch_size**2), np.float32)
    for row in range(rows):
        for column in range(columns):
            for c in range(channels):
                for p in range(patch_size):
                    for q in range(patch_size):
                        position = (c * patch_size + p) * patch_size + q
                        y, x = row * patch_size + p, column * patch_size + q
                        expected[:, row * columns + column, position] = latents[:, y, x, c]
    tokens = space_to_depth(jnp.asarray(latents), patch_size)
    np.testing.assert_array_equal(tokens, expected)
    # Without and with more leading axes.
    np.testing.assert_array_equal(space_to_depth(jnp.asarray(latents[0]), patch_size), expected[0])
    np.testing.assert_array_equal(
        space_to_depth(jnp.asarray(latents[:, None]), patch_size), expected[:, None]
    )


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (2, 5), (5, 2), (1, 3)])
def test_depth_to_space_inverts_space_to_depth(rows, columns):
    tokens = jnp.asarray(_draw(1, (3, rows * columns, 16)))
    latents = depth_to_space(tokens, (rows, columns), 2, 4)
    assert latents.shape == (3, 2 * rows, 2 * columns, 4)
    np.testing.assert_array_equal(space_to_depth(latents, 2), tokens)


def test_shapes_off_the_grid_are_named():
    with pytest.raises(ValueError, match=r"6x5 .* patch_size=2"):
        space_to_depth(jnp.zeros((6, 5, 4)), 2)
    with pytest.raises(ValueError, match="5 tokens do not fill grid=2x3"):
        depth_to_space(jnp.zeros((5, 16)), (2, 3), 2, 4)
    with pytest.raises(ValueError, match="width 15 are not channels=4"):
        depth_to_space(jnp.zeros((6, 15)), (2, 3), 2, 4)


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_normalize_tokens(spread):
    # At a spread of 1e-3 the variance equals eps, so that a missing or misplaced eps shows.
    tokens = spread * _draw(2, (3, 7, 64)) + 0.5
    wide = tokens.astype(np.float64)
    mean, variance = wide.mean(-1, keepdims=True), wide.var(-1, keepdims=True)
    expected = (wide - mean) / np.sqrt(variance + 1e-6)
    result = normalize_tokens(jnp.asarray(tokens), 1e-6)
    assert _relative_error(result, expected) < 1e-6 + 1e-7 / spread
    if spread == 1.0:
        np.testing.assert_allclose(np.var(result, axis=-1), 1.0, atol=1e-4)
    else:
        assert np.std(result) < 0.8


def test_normalize_tokens_computes_in_float32():
    tokens = jnp.asarray(_draw(3, (5, 64)) + 30.0, jnp.bfloat16)
    result = normalize_tokens(tokens, 1e-6)
    assert result.dtype == jnp.bfloat16
    wide = np.asarray(tokens, np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    # Half a unit in the last place of bfloat16, the rounding of the result alone.
    assert _relative_error(result.astype(jnp.float32), expected) <= 2**-8


@pytest.mark.parametrize("patch_size", [1, 2])
def test_normalize_latents_over_each_patch(patch_size):
    latents = 3 * _draw(4, (2, 4, 6, 16)) + 1
    expected = np.empty(latents.shape)
    for y in range(0, 4, patch_size):
        for x in range(0, 6, patch_size):
            where = np.s_[:, y : y + patch_size, x : x + patch_size]
            values = latents[where].astype(np.float64)
            mean = values.mean(axis=(1, 2, 3), keepdims=True)
            variance = values.var(axis=(1, 2, 3), keepdims=True)
            expected[where] = (values - mean) / np.sqrt(variance + 1e-6)
    result = normalize_latents(jnp.asarray(latents), patch_size, 1e-6)
    assert _relative_error(result, expected) < 1e-6


def test_sample_posterior_clamps_the_log_variance():
    mean, noise = jnp.full(4, 2.0), jnp.asarray([1.0, -1.0, 1.0, 1.0])
    log_variance = jnp.asarray([0.0, np.log(9.0), 25.0, -1000.0])
    sample = sample_posterior(mean, log_variance, noise)
    np.testing.assert_allclose(sample, [3.0, -1.0, 2 + np.exp(10), 2 + np.exp(-15)], rtol=1e-6)
    # The clamp below is seen in the noise term alone.
    tail = sample_posterior(jnp.zeros(1), jnp.asarray([-1000.0]), jnp.ones(1))
    np.testing.assert_allclose(tail, np.exp(-15), rtol=1e-5)


def test_normalize_latents_over_each_channel():
    latents = 3 * _draw(5, (2, 4, 6, 8)) + 1
    values = latents.astype(np.float64)
    mean, variance = values.mean(axis=(1, 2)), values.var(axis=(1, 2))
    expected = (values - mean[:, None, None]) / np.sqrt(variance[:, None, None] + 1e-6)
    result = normalize_latents(jnp.asarray(latents), 2, 1e-6, "channel")
    np.testing.assert_allclose(result, expected, atol=2e-6)
