"""Time grids against values worked out by hand."""

import numpy as np
import pytest

from nextstep_jax.flow.grids import shift_times, time_grid
from nextstep_jax.flow.solvers import SOLVERS

FULL = ["euler_maruyama_full", "flow_sde", "flow_cps", "ode", "heun"]


def test_shift_by_hand():
    t = np.array([0.0, 0.25, 0.5, 1.0])
    # s = 2: 1/4 -> (1/4) / (2 - 1/4) = 1/7, 1/2 -> (1/2) / (3/2) = 1/3.
    np.testing.assert_allclose(shift_times(t, 2.0), [0.0, 1 / 7, 1 / 3, 1.0], rtol=1e-15)
    np.testing.assert_array_equal(shift_times(t, 1.0), t)
    np.testing.assert_allclose(shift_times(shift_times(t, 3.2), 1 / 3.2), t, rtol=1e-14)


@pytest.mark.parametrize("solver", FULL)
def test_full_grid_by_hand(solver):
    np.testing.assert_array_equal(time_grid(solver, 4, 1.0), [0.0, 0.25, 0.5, 0.75, 1.0])
    got = time_grid(solver, 4, 2.0)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [0.0, 1 / 7, 1 / 3, 3 / 5, 1.0], rtol=1e-7)
    np.testing.assert_array_equal(time_grid(solver, 1, 3.2), [0.0, 1.0])


def test_august_grid_by_hand():
    got = time_grid("euler_maruyama", 5, 1.0)
    np.testing.assert_allclose(got, [0.0, 0.24, 0.48, 0.72, 0.96, 1.0], rtol=2e-7)


def test_august_grid_keeps_its_last_step_under_a_shift():
    got = time_grid("euler_maruyama", 50, 3.2)
    assert got.shape == (51,)
    # 0.96 / (3.2 - 2.2 * 0.96) = 0.96 / 1.088 = 15 / 17.
    np.testing.assert_allclose(got[-2], 15 / 17, rtol=1e-7)
    np.testing.assert_allclose(got[-1], 15 / 17 + 0.04, rtol=1e-7)
    assert round(float(got[-2]), 3) == 0.882 and round(float(got[-1]), 3) == 0.922


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_evaluation_times_and_noise_counts(solver):
    grid = time_grid(solver, 7, 2.5)
    times = SOLVERS[solver].times(7, 2.5)
    np.testing.assert_array_equal(times, grid if solver == "heun" else grid[:-1])
    expected = {"euler_maruyama": 6, "ode": 0, "heun": 0}.get(solver, 7)
    assert SOLVERS[solver].num_noises(7) == expected


@pytest.mark.parametrize(
    ("solver", "num_steps", "shift", "message"),
    [
        ("rk4", 4, 1.0, "euler_maruyama, euler_maruyama_full, flow_sde, flow_cps, ode, heun"),
        ("ode", 0, 1.0, "num_steps"),
        ("euler_maruyama", 1, 1.0, "num_steps must be at least 2"),
        ("ode", 4, 0.0, "shift"),
        ("ode", 4, -1.0, "shift"),
        ("ode", 4, float("nan"), "shift"),
        ("ode", 4, float("inf"), "shift"),
        ("ode", 4, 1e-9, "coincide"),
    ],
)
def test_bad_settings_are_refused(solver, num_steps, shift, message):
    with pytest.raises(ValueError, match=message):
        time_grid(solver, num_steps, shift)
