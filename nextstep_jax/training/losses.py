"""The two losses of NextStep-1 (arXiv 2508.10711, eq 2) over packed rows.

A weight says how much predicting what stands AT a position counts; the prediction is made by the
hidden state before it. Text takes cross-entropy, never holding (B, L, vocab) logits; image tokens
take the flow-matching error, computed on a gathered, static number of positions.

Axes: batch, length, embed; n = image positions gathered from a row; draws = times and noises for
each of them; token = values of an image token.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from nextstep_jax.flow import path


def chunked_cross_entropy(
    logits_fn: Callable[[jax.Array], jax.Array],
    hidden: Float[Array, "batch length embed"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    chunk: int,
) -> Float[Array, ""]:
    """Sum of weights * -log p(target), `chunk` positions of every row at a time.

    The logits of a chunk, (batch, chunk, vocab) float32, are recomputed in the backward pass.
    """
    batch, length, embed = hidden.shape
    chunk = min(chunk, length)
    pad = -length % chunk
    num_chunks = (length + pad) // chunk

    def split(x):  # (batch, length, ...) -> (chunks, batch, chunk, ...)
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, num_chunks, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def body(total, xs):
        h, target, weight = xs
        logits = logits_fn(h).astype(jnp.float32)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - picked
        return total + jnp.sum(weight * losses), None

    start = jnp.zeros((), jnp.float32)
    total, _ = lax.scan(body, start, (split(hidden), split(targets), split(weights)))
    return total


def next_position(x: Shaped[Array, "batch length"]) -> Shaped[Array, "batch length"]:
    """(batch, length) values moved one to the left: entry p is that of position p + 1; last 0."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))


def gather_image_positions(
    weights: Float[Array, "batch length"], num_positions: int
) -> tuple[Int[Array, "batch n"], Float[Array, "batch n"]]:
    """Indices of the weighted positions of each row, in order, padded with weight 0.

    A row must not have more than `num_positions` of them: what is left over would not be trained
    and nobody would notice. `training.pretrain` refuses such a combination before it starts.
    """
    order = jnp.argsort(weights == 0, axis=1, stable=True)[:, :num_positions]
    return order, jnp.take_along_axis(weights, order, axis=1)


def flow_matching_error(
    velocity_fn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    conditions: Float[Array, "batch n embed"],
    tokens: Float[Array, "batch n token"],
    times: Float[Array, "draws batch n"],
    noise: Float[Array, "draws batch n token"],
) -> Float[Array, "batch n"]:
    """Mean over draws and values of |v(x_t, t, condition) - (x - noise)|^2, float32."""
    x = jnp.broadcast_to(tokens.astype(jnp.float32), noise.shape)
    noisy = path.interpolate(x, noise, times)
    conditions = jnp.broadcast_to(conditions, (times.shape[0], *conditions.shape))
    error = velocity_fn(noisy, times, conditions) - path.velocity_target(x, noise)
    return jnp.mean(jnp.square(error.astype(jnp.float32)), axis=(0, -1))


def weighted_mean(total: Float[Array, ""], weights: Float[Array, "..."]) -> Float[Array, ""]:
    """total / sum(weights); 0 where nothing is weighted."""
    count = jnp.sum(weights)
    return total / jnp.where(count > 0, count, 1.0)
