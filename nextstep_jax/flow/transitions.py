"""What one step of a solver does: the Gaussian transition from a state to the next.

A transition takes the state and its velocity at the start of a step and gives the mean and the
standard deviation of the state at its end; drawing the next state is mean + std * noise. The
forms are those of NextStep-1 (arXiv 2508.10711), Flow-GRPO (arXiv 2505.05470) and Flow-CPS
(arXiv 2509.05952), all in float32.

Axes: `*batch` any leading axes (tokens), `dim` the values of a token.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float32

from nextstep_jax.flow.path import score_from_velocity

State = Float32[Array, "*batch dim"]
Scalar = Float32[Array, ""]


def sde_transition(
    x: State, velocity: State, t: Scalar, t_next: Scalar, diffusion: Scalar
) -> tuple[State, Scalar]:
    """One Euler-Maruyama step of dx = (v + g^2 / 2 score) dt + g dW.

    The score term cancels what the noise does to the marginals, so for every diffusion g they are
    those of the ODE dx = v dt.

    Args:
        x: State at t.
        velocity: v(x, t).
        t: Start of the step, below 1.
        t_next: End of the step.
        diffusion: g, per square root of time.

    Returns:
        Mean and standard deviation of the state at t_next.
    """
    dt = t_next - t
    drift = velocity + 0.5 * diffusion**2 * score_from_velocity(velocity, x, t)
    return x + dt * drift, diffusion * jnp.sqrt(dt)


def cps_transition(
    x: State, velocity: State, t: Scalar, t_next: Scalar, noise_level: Scalar
) -> tuple[State, Scalar]:
    """One Flow-CPS step: part of the predicted noise is exchanged for fresh noise.

    Predicted and fresh noise keep the share 1 - t_next that the path prescribes: the squares of
    their weights add up to its square. At level 0 this is the Euler step. A predicted noise varies
    less than a drawn one, so results are less varied than the data, with any number of steps: on
    Gaussian data the variance tends to the data's times (1 + cos(noise_level pi / 2)) / 2.

    Args:
        x: State at t.
        velocity: v(x, t).
        t: Start of the step.
        t_next: End of the step.
        noise_level: From 0 (nothing exchanged) to 1 (all of it).

    Returns:
        Mean and standard deviation of the state at t_next.
    """
    noise_prediction = x - t * velocity
    data_prediction = x + (1.0 - t) * velocity
    angle = 0.5 * jnp.pi * noise_level
    # sqrt((1 - t')^2 - std^2) of the published form, written as what it is: a cosine.
    kept, fresh = (1.0 - t_next) * jnp.cos(angle), (1.0 - t_next) * jnp.sin(angle)
    return kept * noise_prediction + t_next * data_prediction, fresh


def ode_transition(
    x: State, velocity: State, t: Scalar, t_next: Scalar, level: Scalar
) -> tuple[State, Scalar]:
    """One Euler step of dx = v dt; the level (0) is its standard deviation."""
    return x + (t_next - t) * velocity, level
