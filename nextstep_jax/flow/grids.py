"""Time grids of the solvers: where the velocity is evaluated and where each step ends.

NextStep-1 (arXiv 2508.10711) and its later releases walk from t = 0 (noise) towards t = 1 (data)
on uniform points that a shift may crowd towards the noise end. A grid of `num_steps` steps has
num_steps + 1 points; step i goes from point i to point i + 1. Grids depend on settings only, so
they are numpy constants: computed in float64, rounded once to the float32 in which times reach
the network and the solvers.
"""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Float, Float32, Float64

# NextStep-1's August 2025 sampler stops its stochastic steps here and takes the rest in one step.
AUGUST_LAST_TIME = 0.96
AUGUST_LAST_STEP = 0.04

Times = Float[np.ndarray, "*times"] | Float[Array, "*times"]


def shift_times(t: Times, shift: float) -> Times:
    """Moves times towards the noise end: t' = t / (s - (s - 1) t).

    Args:
        t: Times in [0, 1].
        shift: s > 0. 1 leaves the times as they are, larger values spend more steps near t = 0.

    Returns:
        The shifted times; 0 and 1 stay in place.

    Raises:
        ValueError: If the shift is not a positive number.
    """
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift must be a positive number, got {shift}")
    return t / (shift - (shift - 1.0) * t)


def _full_grid(num_steps: int, shift: float) -> Float64[np.ndarray, " points"]:
    """From 0 to 1. NextStep-1.1 appends 1.0 unshifted, which is where the shift leaves it."""
    return shift_times(np.linspace(0.0, 1.0, num_steps + 1), shift)


def _august_grid(num_steps: int, shift: float) -> Float64[np.ndarray, " points"]:
    """From 0 to the shifted 0.96 in num_steps - 1 steps, then one step of 0.04.

    The last step keeps its length under a shift, as published: at shift 3.2 the points end at
    0.882 and sampling stops at 0.922, short of the data end.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps must be at least 2 for euler_maruyama, got {num_steps}")
    points = shift_times(np.linspace(0.0, AUGUST_LAST_TIME, num_steps), shift)
    return np.append(points, points[-1] + AUGUST_LAST_STEP)


_GRIDS: dict[str, Callable[[int, float], np.ndarray]] = {
    "euler_maruyama": _august_grid,
    "euler_maruyama_full": _full_grid,
    "flow_sde": _full_grid,
    "flow_cps": _full_grid,
    "ode": _full_grid,
    "heun": _full_grid,
}


def time_grid(solver: str, num_steps: int, shift: float) -> Float32[np.ndarray, " points"]:
    """The grid of a solver.

    Args:
        solver: A name of `nextstep_jax.flow.solvers.SOLVERS`.
        num_steps: Number of steps, at least 1 (2 for "euler_maruyama").
        shift: The timestep shift, positive; 1 is uniform.

    Returns:
        num_steps + 1 increasing times: step i starts at entry i and ends at entry i + 1.

    Raises:
        ValueError: If the solver is unknown, a value is out of range, or the shift is so extreme
            that points coincide in float32.
    """
    if solver not in _GRIDS:
        raise ValueError(f"unknown solver {solver!r}; known solvers: {', '.join(_GRIDS)}")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    grid = _GRIDS[solver](num_steps, shift).astype(np.float32)
    if np.any(np.diff(grid) <= 0):
        raise ValueError(f"shift {shift} with num_steps {num_steps} makes grid points coincide")
    return grid
