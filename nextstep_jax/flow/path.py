"""The probability path of flow matching: NextStep-1 (arXiv 2508.10711), flow-matching head.

Time runs from noise to data: at t = 0 a token is pure noise, at t = 1 it is data. Between them
x_t = t x + (1 - t) n lies on a straight line whose velocity x - n is what the head learns. The
score of the marginal at time t is a linear function of that velocity, which is what lets a
network trained on velocities drive stochastic solvers too. Everything is computed in float32.

Axes: `*batch` any leading axes (tokens, draws), `dim` the values of a token.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Key


def times_from_normal(u: Float[Array, "*batch"]) -> Float32[Array, "*batch"]:
    """Maps standard normal draws to logit-normal times.

    Args:
        u: Draws of N(0, 1).

    Returns:
        t = sigmoid(u), in (0, 1).
    """
    return jax.nn.sigmoid(u.astype(jnp.float32))


def logit_normal_times(key: Key[Array, ""], shape: tuple[int, ...]) -> Float32[Array, "..."]:
    """Draws the times at which the head is trained.

    Args:
        key: A typed key.
        shape: Shape of the result.

    Returns:
        Times t = sigmoid(u), u ~ N(0, 1). No shift: that belongs to sampling alone.
    """
    return times_from_normal(jax.random.normal(key, shape, jnp.float32))


def interpolate(
    x: Float[Array, "*batch dim"],
    noise: Float[Array, "*batch dim"],
    t: Float[Array, "*#batch"],
) -> Float32[Array, "*batch dim"]:
    """The noisy token x_t = t x + (1 - t) noise.

    Args:
        x: Data.
        noise: Draws of N(0, 1).
        t: Times in [0, 1], one a token or one for all.

    Returns:
        x_t.
    """
    x, noise, t = (a.astype(jnp.float32) for a in (x, noise, t[..., None]))
    return t * x + (1.0 - t) * noise


def velocity_target(
    x: Float[Array, "*batch dim"], noise: Float[Array, "*batch dim"]
) -> Float32[Array, "*batch dim"]:
    """The velocity d x_t / dt = x - noise, the same at every time.

    Args:
        x: Data.
        noise: Draws of N(0, 1).

    Returns:
        The regression target of the flow-matching loss.
    """
    return x.astype(jnp.float32) - noise.astype(jnp.float32)


def score_from_velocity(
    velocity: Float[Array, "*batch dim"],
    x: Float[Array, "*batch dim"],
    t: Float[Array, "*#batch"],
) -> Float32[Array, "*batch dim"]:
    """The score grad log p_t(x) that belongs to a velocity field.

    With n the expected noise given x_t = x, x - t v = n and the score is -n / (1 - t).

    Args:
        velocity: v(x, t), the expectation of data minus noise.
        x: The noisy token x_t.
        t: Times in [0, 1), one a token or one for all.

    Returns:
        (t v - x) / ((1 - t)^2 + t (1 - t)).
    """
    velocity, x, t = (a.astype(jnp.float32) for a in (velocity, x, t[..., None]))
    # The published form: variance of the noise part plus a term from the path's slope. Their sum
    # is 1 - t.
    variance = (1.0 - t) ** 2 + t * (1.0 - t)
    return (t * velocity - x) / variance
