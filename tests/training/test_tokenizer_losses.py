"""The tokenizer's losses against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextstep_jax.training.tokenizer_losses import (
    disturb_latents,
    gradient_error,
    kl_divergence,
    psnr,
)


def test_disturbed_latents():
    """Equation 3: one alpha a sample, uniform in [0, gamma], times standard normal noise."""
    clean = jnp.asarray(np.random.default_rng(0).standard_normal((4000, 4, 4, 8)), jnp.float32)
    noise = np.asarray(disturb_latents(clean, jax.random.key(0), 0.5) - clean)
    alpha = noise.std(axis=(1, 2, 3))
    # 128 values a sample: the estimate of alpha is off by alpha / 16; edges have room for 5 sigma.
    assert alpha.min() >= 0
    assert alpha.max() < 0.5 * (1 + 5 / 16)
    assert alpha.mean() == pytest.approx(0.25, abs=4 * 0.5 / np.sqrt(12 * 4000))
    assert alpha.std() == pytest.approx(0.5 / np.sqrt(12), rel=0.03)
    assert noise.mean() == pytest.approx(0, abs=5 * 0.29 / np.sqrt(noise.size))
    # E[(alpha eps)^4] / E[(alpha eps)^2]^2 = 3 * 9/5: one alpha a sample, not one a value.
    assert (noise**4).mean() / (noise**2).mean() ** 2 == pytest.approx(27 / 5, rel=0.05)
    still = disturb_latents(clean, jax.random.key(0), 0.0)
    np.testing.assert_array_equal(still, clean)


@pytest.mark.parametrize("num_scales", [1, 2, 3])
def test_gradient_error_is_the_formula(num_scales):
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 2, 8, 12, 3))
    expected, x, y = 0.0, a, b
    for _ in range(num_scales):
        for image, other in ((x, y),):
            expected += np.abs(np.diff(image, axis=1) - np.diff(other, axis=1)).mean()
            expected += np.abs(np.diff(image, axis=2) - np.diff(other, axis=2)).mean()
        x, y = (
            (i[:, ::2] + i[:, 1::2])[:, :, ::2] + (i[:, ::2] + i[:, 1::2])[:, :, 1::2]
            for i in (x / 4, y / 4)
        )
    error = gradient_error(jnp.float32(a), jnp.float32(b), num_scales)
    assert float(error) == pytest.approx(expected / num_scales, rel=1e-5)


def test_gradient_error_ignores_brightness():
    images = jnp.asarray(np.random.default_rng(2).standard_normal((1, 9, 7, 3)), jnp.float32)
    assert float(gradient_error(images, images, 2)) == 0.0
    assert float(gradient_error(images, images + 0.5, 2)) < 1e-6


def test_psnr():
    """8-bit noise of one level is 48.13 dB; peak 2."""
    assert float(psnr(jnp.float32((2 / 255) ** 2))) == pytest.approx(48.1308, abs=1e-3)
    assert float(psnr(jnp.float32(4.0))) == 0.0
    assert np.isfinite(float(psnr(jnp.float32(0.0))))


def test_kl_divergence_is_that_of_gaussians():
    """By numerical integration of p log(p / q) for one value, and 0 for the standard normal."""
    assert float(kl_divergence(jnp.zeros((1, 2, 2, 8)))) == 0.0
    mean, log_variance = 0.7, -0.5
    x = np.linspace(-12, 12, 200_001)
    p = np.exp(-((x - mean) ** 2) / (2 * np.exp(log_variance)))
    p /= np.sqrt(2 * np.pi * np.exp(log_variance))
    q = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    expected = np.trapezoid(np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(q)), 0), x)
    moments = jnp.broadcast_to(jnp.asarray([mean, log_variance]), (2, 3, 3, 2))
    assert float(kl_divergence(moments)) == pytest.approx(expected, rel=1e-5)
