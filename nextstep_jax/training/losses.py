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
from nextstep_jax.models.layers import constrain


def chunked_cross_entropy(
    logits_fn: Callable[[jax.Array], jax.Array],
    hidden: Float[Array, "batch length embed"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    chunk: int,
) -> Float[Array, "batch length"]:
    """-log p(target) where a position is weighted and 0 elsewhere, float32.

    Weighted positions go first, `chunk` of every row at a time; chunks in which no row has one are
    left out when the program runs. The logits of a chunk, (batch, chunk, vocab) float32, are
    recomputed in the backward pass.
    """
    batch, length, embed = hidden.shape
    chunk = min(chunk, length)
    pad = -length % chunk
    order = jnp.argsort(weights == 0, axis=1, stable=True)

    def split(x):  # (batch, length, ...) -> (chunks, batch, chunk, ...)
        index = order.reshape(*order.shape, *(1,) * (x.ndim - 2))
        x = jnp.take_along_axis(x, index, axis=1)
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    def errors(h, target):
        logits = logits_fn(constrain(h, "act_batch", "act_len", "act_embed")).astype(jnp.float32)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    def nothing(h, target):
        return jnp.zeros(target.shape, jnp.float32)

    @jax.checkpoint
    def body(_, xs):
        h, target, weight = xs
        found = lax.cond(jnp.any(weight != 0), errors, nothing, h, target)
        return None, jnp.where(weight != 0, found, 0.0)

    _, found = lax.scan(body, None, (split(hidden), split(targets), split(weights)))
    found = jnp.moveaxis(found, 0, 1).reshape(batch, length + pad)
    return jnp.take_along_axis(found, jnp.argsort(order, axis=1), axis=1)


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
    conditions: Float[Array, "batch n width"],
    tokens: Float[Array, "batch n token"],
    times: Float[Array, "draws batch n"],
    noise: Float[Array, "draws batch n token"],
    *,
    one_by_one: bool = False,
) -> Float[Array, "draws batch n"]:
    """Mean over values of |v(x_t, t, condition) - (x - noise)|^2 for every draw, float32.

    Args:
        velocity_fn: (noisy tokens, times, conditions) -> velocities.
        conditions: Of each position, for all its draws.
        tokens: Image tokens.
        times: In [0, 1].
        noise: What they are mixed with.
        one_by_one: One draw after another, each recomputed in the backward pass: the same numbers
            from a fraction of the memory.
    """
    tokens = tokens.astype(jnp.float32)

    def of_draws(times, noise, conditions):
        x = jnp.broadcast_to(tokens, noise.shape)
        error = velocity_fn(path.interpolate(x, noise, times), times, conditions)
        error = error - path.velocity_target(x, noise)
        return jnp.mean(jnp.square(error.astype(jnp.float32)), axis=-1)

    if one_by_one:
        of_draw = jax.checkpoint(lambda draw: of_draws(*draw, conditions))
        return lax.map(of_draw, (times, noise))
    return of_draws(times, noise, jnp.broadcast_to(conditions, (len(times), *conditions.shape)))


def weighted_mean(total: Float[Array, ""], weights: Float[Array, "..."]) -> Float[Array, ""]:
    """total / sum(weights); 0 where nothing is weighted."""
    count = jnp.sum(weights)
    return total / jnp.where(count > 0, count, 1.0)
