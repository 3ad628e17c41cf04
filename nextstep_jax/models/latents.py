"""Latents: their normalisation, and the way to image tokens and back.

NextStep-1 (arXiv 2508.10711), section on the image tokenizer: the latent is normalised without
gain or bias over the values of each 2x2 patch and folded into tokens of width 64.

Words for axes: latents are (batch, height, width, channels), one pixel for every 8x8 of the image;
tokens are (batch, tokens, token) with token = (c, p, q), where p and q are the row and the column
inside a patch.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nextstep_jax.models.config import VAEConfig

# Range of the log-variance that a sample is drawn with, as in the original LDM.
LOG_VARIANCE_RANGE = (-30.0, 20.0)


def space_to_depth(
    latents: Float[Array | np.ndarray, "... height width channels"], patch_size: int
) -> Float[Array | np.ndarray, "... tokens token"]:
    """Folds patches into tokens: row-major tokens, (c, p, q) inside a token.

    Raises:
        ValueError: A side is not a multiple of `patch_size`.
    """
    *batch, height, width, channels = latents.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"latents of {height}x{width} do not divide into patches of patch_size={patch_size}"
        )
    rows, columns = height // patch_size, width // patch_size
    patches = latents.reshape(math.prod(batch), rows, patch_size, columns, patch_size, channels)
    patches = patches.transpose(0, 1, 3, 5, 2, 4)  # batch, row, column, c, p, q
    return patches.reshape(*batch, rows * columns, channels * patch_size**2)


def depth_to_space(
    tokens: Float[Array, "... tokens token"],
    grid: tuple[int, int],
    patch_size: int,
    channels: int,
) -> Float[Array, "... height width {channels}"]:
    """The inverse of `space_to_depth`; `grid` is (rows, columns) of tokens.

    Raises:
        ValueError: The tokens are not rows * columns many, or not channels * patch_size^2 wide.
    """
    rows, columns = grid
    *batch, num_tokens, token_dim = tokens.shape
    if num_tokens != rows * columns:
        raise ValueError(f"{num_tokens} tokens do not fill grid={rows}x{columns}")
    if token_dim != channels * patch_size**2:
        raise ValueError(
            f"tokens of width {token_dim} are not channels={channels} x patch_size={patch_size}^2"
        )
    patches = tokens.reshape(math.prod(batch), rows, columns, channels, patch_size, patch_size)
    patches = patches.transpose(0, 1, 4, 2, 5, 3)  # batch, row, p, column, q, c
    return patches.reshape(*batch, rows * patch_size, columns * patch_size, channels)


def normalize_tokens(tokens: Float[Array, "... token"], eps: float) -> Float[Array, "... token"]:
    """LayerNorm over the last axis without gain or bias, in float32 inside.

    The same formula serves as the optional norm of sampled tokens.
    """
    centered = tokens.astype(jnp.float32)
    centered -= jnp.mean(centered, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    return (centered / jnp.sqrt(variance + eps)).astype(tokens.dtype)


def normalize_latents(
    latents: Float[Array, "... height width channels"],
    patch_size: int,
    eps: float,
    over: str = "token",
) -> Float[Array, "... height width channels"]:
    """`normalize_tokens` over the channels * patch_size^2 values of every patch.

    With over="channel" instead over all pixels of every channel, which needs no patches.
    """
    height, width, channels = latents.shape[-3:]
    if over == "channel":
        pixels = jnp.moveaxis(latents, -1, -3).reshape(*latents.shape[:-3], channels, -1)
        pixels = normalize_tokens(pixels, eps).reshape(*pixels.shape[:-1], height, width)
        return jnp.moveaxis(pixels, -3, -1)
    tokens = normalize_tokens(space_to_depth(latents, patch_size), eps)
    grid = (height // patch_size, width // patch_size)
    return depth_to_space(tokens, grid, patch_size, channels)


def sample_posterior(
    mean: Float[Array, "*shape"],
    log_variance: Float[Array, "*shape"],
    noise: Float[Array, "*shape"],
) -> Float[Array, "*shape"]:
    """A sample of the encoder's Gaussian, given standard normal noise."""
    log_variance = jnp.clip(log_variance, *LOG_VARIANCE_RANGE)
    return mean + jnp.exp(0.5 * log_variance) * noise


def latents_of(
    config: VAEConfig,
    moments: Float[Array, "batch rows columns moments"],
    noise: Float[Array, "batch rows columns latent"] | None = None,
) -> Float[Array, "batch rows columns latent"]:
    """What `VAE.encode` makes of the encoder's moments."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    if config.norm_patch_size is not None:
        # The mean alone: the log-variance keeps the scale that the encoder gave it.
        mean = normalize_latents(
            mean, config.norm_patch_size, config.latent_norm_eps, config.norm_over
        )
    if noise is None or config.deterministic:
        return mean
    return sample_posterior(mean, log_variance, noise)
