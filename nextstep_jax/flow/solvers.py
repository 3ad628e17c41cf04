"""Solvers that carry a token from noise to data, by name.

Published ones: "euler_maruyama" (NextStep-1, arXiv 2508.10711, code of August 2025),
"euler_maruyama_full" (NextStep-1.1), "flow_sde" (the form of Flow-GRPO), "flow_cps" (Flow-CPS) and
"ode" (Euler); "heun" is the second-order trapezoid rule on the same grid. All share one loop: a
step turns the velocity at its start into a Gaussian for the next state (`transitions.py`) and
draws from it with noise that the caller brings. A velocity is asked for by the index of its
evaluation time, so the network's time-dependent parts can be computed for all times beforehand.

Axes: `steps` the steps that take noise, `*batch` any leading axes, `dim` the values of a token.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from nextstep_jax.flow.grids import time_grid
from nextstep_jax.flow.transitions import cps_transition, ode_transition, sde_transition

NOISE_LEVEL = 0.8  # published default of flow_sde and flow_cps

VelocityFn = Callable[[Float[Array, "..."], Int[Array, ""]], Float[Array, "..."]]


def _zero_levels(grid: np.ndarray) -> np.ndarray:
    """No noise."""
    return np.zeros(len(grid) - 1)


def _full_diffusion(grid: np.ndarray) -> np.ndarray:
    """Diffusion g = sqrt(2 (1 - t)): the score enters the drift with weight 1 - t."""
    return np.sqrt(2.0 * (1.0 - grid[:-1]))


def _august_diffusion(grid: np.ndarray) -> np.ndarray:
    """The same, but the last step follows the velocity alone."""
    return np.append(_full_diffusion(grid)[:-1], 0.0)


def _flow_sde_diffusion(grid: np.ndarray) -> np.ndarray:
    """sqrt(sigma / (1 - sigma)) with sigma = 1 - t, to be scaled by the noise level.

    It is infinite at sigma = 1. As published, the denominator takes the start of the last step in
    place of sigma there; at shift 1 the first step then adds noise of the size of the noise level.
    """
    sigma = 1.0 - grid[:-1]
    return np.sqrt(sigma / (1.0 - np.where(sigma == 1.0, grid[-2], sigma)))


def _unit_levels(grid: np.ndarray) -> np.ndarray:
    """The noise level itself, the same in every step."""
    return np.ones(len(grid) - 1)


@dataclasses.dataclass(frozen=True)
class Solver:
    """A named way from noise to data. Hashable, so it can be a static argument of jit.

    Attributes:
        name: Its name, which also selects its time grid.
        transition: (x, velocity, t, t_next, level) -> (mean, standard deviation) of the next state.
        levels: float64 grid (num_steps + 1,) -> the level each step passes to its transition.
        uses_noise_level: Whether the levels are multiplied by the caller's noise level.
        max_noise_level: Largest accepted noise level.
        stochastic: Whether steps take noise.
        quiet_last_step: Whether the last step takes none although the others do.
        second_order: Whether a step averages the velocities at its start and its predicted end.
    """

    name: str
    transition: Callable[..., tuple[Array, Array]]
    levels: Callable[[np.ndarray], np.ndarray]
    uses_noise_level: bool = False
    max_noise_level: float = float("inf")
    stochastic: bool = True
    quiet_last_step: bool = False
    second_order: bool = False

    def times(self, num_steps: int, shift: float) -> Float32[np.ndarray, " evals"]:
        """The evaluation times in order; `solve` refers to them by index.

        Args:
            num_steps: Number of steps.
            shift: The timestep shift.

        Returns:
            Starts of the steps, and for a second-order solver the end of the last one too.

        Raises:
            ValueError: If a setting is out of range.
        """
        grid = time_grid(self.name, num_steps, shift)
        return grid if self.second_order else grid[:-1]

    def num_noises(self, num_steps: int) -> int:
        """Number of noise arrays that `solve` takes beyond the start."""
        return num_steps - self.quiet_last_step if self.stochastic else 0

    def solve(
        self,
        velocity_fn: VelocityFn,
        start: Float[Array, "*batch dim"],
        noise: Float[Array, "steps *batch dim"],
        *,
        num_steps: int,
        shift: float,
        noise_level: float | Float[Array, ""] = NOISE_LEVEL,
    ) -> Float32[Array, "*batch dim"]:
        """Runs all steps in one scan, whose body is traced once.

        Args:
            velocity_fn: (x, index) -> the guided velocity of the float32 state x at evaluation
                time `times(num_steps, shift)[index]`; the index is a traced int32.
            start: Draws of N(0, 1), the state at t = 0.
            noise: Draws of N(0, 1), row i for step i; `num_noises(num_steps)` rows.
            num_steps: Number of steps.
            shift: The timestep shift.
            noise_level: Strength of the noise in "flow_sde" and "flow_cps"; others ignore it.

        Returns:
            The state at the end of the grid.

        Raises:
            ValueError: If a setting is out of range or the noise has another number of rows.
        """
        grid = time_grid(self.name, num_steps, shift)
        num_noises = self.num_noises(num_steps)
        if noise.shape[0] != num_noises:
            raise ValueError(
                f"noise: {self.name} with num_steps {num_steps} takes {num_noises} rows, "
                f"got {noise.shape[0]}"
            )
        self.check_noise_level(noise_level)
        levels = jnp.asarray(self.levels(grid.astype(np.float64)), jnp.float32)
        if self.uses_noise_level:
            levels = levels * noise_level
        # Steps without noise get a row of zeros, so that all steps share one body.
        quiet = jnp.zeros((num_steps - num_noises, *start.shape), jnp.float32)
        noise = jnp.concatenate([noise.astype(jnp.float32), quiet])

        def step(x, inputs):
            index, t, t_next, level, eps = inputs
            velocity = velocity_fn(x, index).astype(jnp.float32)
            if self.second_order:
                predicted = x + (t_next - t) * velocity
                velocity_end = velocity_fn(predicted, index + 1).astype(jnp.float32)
                velocity = 0.5 * (velocity + velocity_end)
            mean, std = self.transition(x, velocity, t, t_next, level)
            return mean + std * eps, None

        indices = jnp.arange(num_steps, dtype=jnp.int32)
        inputs = (indices, jnp.asarray(grid[:-1]), jnp.asarray(grid[1:]), levels, noise)
        return jax.lax.scan(step, start.astype(jnp.float32), inputs)[0]

    def check_noise_level(self, noise_level: float | Float[Array, ""]) -> None:
        """Refuses a noise level out of range, where it matters and its value is known.

        Raises:
            ValueError: It is not between 0 and `max_noise_level`.
        """
        if not self.uses_noise_level or isinstance(noise_level, jax.Array):
            return
        if not 0.0 <= noise_level <= self.max_noise_level:
            raise ValueError(
                f"noise_level of {self.name} must be in [0, {self.max_noise_level}], "
                f"got {noise_level}"
            )


SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver("euler_maruyama", sde_transition, _august_diffusion, quiet_last_step=True),
        Solver("euler_maruyama_full", sde_transition, _full_diffusion),
        Solver("flow_sde", sde_transition, _flow_sde_diffusion, uses_noise_level=True),
        Solver(
            "flow_cps", cps_transition, _unit_levels, uses_noise_level=True, max_noise_level=1.0
        ),
        Solver("ode", ode_transition, _zero_levels, stochastic=False),
        Solver("heun", ode_transition, _zero_levels, stochastic=False, second_order=True),
    )
}


def get_solver(name: str) -> Solver:
    """The solver of a name.

    Args:
        name: A key of `SOLVERS`.

    Returns:
        The solver.

    Raises:
        ValueError: If there is none; the message lists the names.
    """
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}; known solvers: {', '.join(SOLVERS)}")
    return SOLVERS[name]
