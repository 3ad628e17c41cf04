"""What the image tokenizer is trained on (arXiv 2508.10711, section on the image tokenizer, eq 3).

The published losses are reconstruction and perceptual; the KL term of the VAE's ancestors is
optional, and `gradient_error` stands in for a perceptual network where there are no weights of
one.

Axes: batch, height, width, channels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from nextstep_jax.models.latents import LOG_VARIANCE_RANGE


def disturb_latents(
    latents: Float[Array, "batch height width channels"], key: Key[Array, ""], gamma: float
) -> Float[Array, "batch height width channels"]:
    """latents + alpha * eps, alpha ~ U[0, gamma] per sample, eps ~ N(0, I) (eq 3)."""
    alpha_key, noise_key = jax.random.split(key)
    alpha = jax.random.uniform(alpha_key, (latents.shape[0], 1, 1, 1), maxval=gamma)
    return latents + alpha * jax.random.normal(noise_key, latents.shape)


def gradient_error(
    images: Float[Array, "batch height width channels"],
    others: Float[Array, "batch height width channels"],
    num_scales: int,
) -> Float[Array, ""]:
    """Mean absolute difference of horizontal and vertical differences, averaged over scales.

    Every scale halves the one before by averaging 2x2 pixels. Edges that are shifted, blurred or
    missing cost more than an error of the same size in brightness. No published model uses it.
    """
    error = jnp.zeros((), jnp.float32)
    difference = images - others  # taking differences and averaging are both linear
    for _ in range(num_scales):
        error += jnp.mean(jnp.abs(jnp.diff(difference, axis=1)))
        error += jnp.mean(jnp.abs(jnp.diff(difference, axis=2)))
        batch, height, width, channels = difference.shape
        halves = (batch, height // 2, 2, width // 2, 2, channels)
        difference = difference[:, : height // 2 * 2, : width // 2 * 2].reshape(halves)
        difference = jnp.mean(difference, axis=(2, 4))
    return error / num_scales


def kl_divergence(moments: Float[Array, "batch height width moments"]) -> Float[Array, ""]:
    """KL(N(mean, exp(log_variance)) || N(0, I)) for each value of the latent, averaged.

    (mean^2 + variance - 1 - log variance) / 2 (Kingma and Welling, arXiv 1312.6114, appendix B).
    `moments` is [mean, log-variance] along the last axis, as the encoder gives them.
    """
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    log_variance = jnp.clip(log_variance, *LOG_VARIANCE_RANGE)
    return 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)


def psnr(mean_squared_error: Float[Array, ""]) -> Float[Array, ""]:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], peak 2."""
    return 10 * jnp.log10(4.0 / jnp.maximum(mean_squared_error, 1e-12))
