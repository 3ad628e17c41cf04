"""Solvers on Gaussian data with its exact velocity, and against float64 loops.

With data N(MEAN, STD^2) the exact velocity is affine in x, so a solver's result is an affine
function of the start and the noises. Solving once for each unit vector gives its coefficients,
hence the exact mean and variance of the result, free of sampling error.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextstep_jax.flow.guidance import guide
from nextstep_jax.flow.solvers import SOLVERS, get_solver

MEAN, STD = 1.5, 0.6
STOCHASTIC = ["euler_maruyama", "euler_maruyama_full", "flow_sde", "flow_cps"]


def gaussian_slope(t):
    return (t * STD**2 - (1 - t)) / (t**2 * STD**2 + (1 - t) ** 2)


def run_gaussian(name, start, noise, num_steps, shift=1.0, noise_level=0.8):
    """Solves with the exact velocity. start (rows,), noise (steps, rows)."""
    solver = SOLVERS[name]
    times = jnp.asarray(solver.times(num_steps, shift))

    @jax.jit
    def solve(start, noise):
        def velocity(x, i):
            return MEAN + gaussian_slope(times[i]) * (x - times[i] * MEAN)

        settings = dict(num_steps=num_steps, shift=shift, noise_level=noise_level)
        return solver.solve(velocity, start, noise, **settings)

    start, noise = (jnp.asarray(a, jnp.float32)[..., None] for a in (start, noise))
    return np.asarray(solve(start, noise), np.float64)[:, 0]


def exact_moments(name, num_steps, **settings):
    """Mean and variance of the result for N(0, 1) start and noises."""
    num_noises = SOLVERS[name].num_noises(num_steps)
    unit = np.eye(num_noises + 2, dtype=np.float32)[1:]  # row 0 of the batch is all zeros
    out = run_gaussian(name, unit[0], unit[1:], num_steps, **settings)
    return out[0], np.sum((out[1:] - out[0]) ** 2)


def result_moments(name, shift=1.0, noise_level=0.8):
    """Closed form of the limit of many steps."""
    if name == "euler_maruyama":
        # Exact marginal at the end of the stochastic steps, then one Euler step of 0.04.
        t = 0.96 / (shift - (shift - 1) * 0.96)
        variance = t**2 * STD**2 + (1 - t) ** 2
        return (t + 0.04) * MEAN, variance * (1 + 0.04 * gaussian_slope(t)) ** 2
    if name == "flow_cps":
        # Exchanging a predicted noise, which varies less than a drawn one, loses variance.
        return MEAN, STD**2 * (1 + np.cos(noise_level * np.pi / 2)) / 2
    return MEAN, STD**2


@pytest.mark.parametrize(
    ("name", "shift", "noise_level", "tolerance"),
    [
        ("euler_maruyama", 1.0, 0.8, 0.005),
        ("euler_maruyama", 3.2, 0.8, 0.005),
        ("euler_maruyama_full", 1.0, 0.8, 0.005),
        ("euler_maruyama_full", 3.2, 0.8, 0.005),
        ("flow_sde", 1.0, 0.3, 0.005),
        ("flow_sde", 1.0, 0.8, 0.005),
        ("flow_cps", 1.0, 0.4, 0.015),
        ("flow_cps", 1.0, 0.8, 0.015),
        ("ode", 1.0, 0.8, 0.005),
        ("ode", 3.2, 0.8, 0.010),
        ("heun", 1.0, 0.8, 1e-4),
        ("heun", 3.2, 0.8, 1e-4),
    ],
)
def test_mean_and_variance_against_the_closed_form(name, shift, noise_level, tolerance):
    # The tolerances cover the bias of 800 steps, a few parts in 800 for a first-order solver; what
    # doubling the steps does to it is tested below.
    mean, variance = exact_moments(name, 800, shift=shift, noise_level=noise_level)
    expected_mean, expected_variance = result_moments(name, shift, noise_level)
    assert mean == pytest.approx(expected_mean, rel=1e-5)
    assert variance == pytest.approx(expected_variance, rel=tolerance)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_samples_against_the_closed_form(name):
    num_samples, num_steps = 10_000, 800
    rng = np.random.default_rng([4, STOCHASTIC.index(name)])
    noise = rng.standard_normal((SOLVERS[name].num_noises(num_steps), num_samples), np.float32)
    out = run_gaussian(name, rng.standard_normal(num_samples), noise, num_steps)
    mean, variance = result_moments(name)
    # Three standard errors; the bias of 800 steps is below one.
    assert abs(out.mean() - mean) < 3 * np.sqrt(variance / num_samples)
    assert abs(out.var() - variance) < 3 * variance * np.sqrt(2 / num_samples)


@pytest.mark.parametrize(("name", "order"), [("ode", 1), ("heun", 2), ("euler_maruyama_full", 1)])
def test_order_of_convergence(name, order):
    # Errors of the variance: strong order for the ODE solvers (the map is affine), weak order for
    # the stochastic one.
    errors = [abs(exact_moments(name, n)[1] - STD**2) for n in (16, 32, 64, 128)]
    ratios = np.array(errors[:-1]) / errors[1:]
    assert np.all(np.abs(ratios[1:] / 2**order - 1) < 0.15), ratios


@pytest.mark.parametrize(("name", "order"), [("ode", 1), ("heun", 2)])
def test_order_of_convergence_of_a_path(name, order):
    # The exact flow takes x_0 to MEAN + STD x_0.
    start = np.linspace(-2.0, 2.0, 9)
    errors = []
    for num_steps in (16, 32, 64):
        out = run_gaussian(name, start, np.zeros((0, 9)), num_steps)
        errors.append(np.abs(out - (MEAN + STD * start)).max())
    ratios = np.array(errors[:-1]) / errors[1:]
    assert np.all(np.abs(ratios / 2**order - 1) < 0.15), ratios


@pytest.mark.parametrize("name", ["flow_sde", "flow_cps"])
def test_level_zero_is_the_ode(name):
    # x0 (1 - t') + x1 t' = x + (t' - t) v, so they are equal but for rounding.
    rng = np.random.default_rng([5])
    start, noise = rng.normal(size=6), rng.normal(size=(12, 6))
    got = run_gaussian(name, start, noise, 12, shift=2.5, noise_level=0.0)
    expected = run_gaussian("ode", start, noise[:0], 12, shift=2.5)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


def reference_loop(name, velocity, x, noise, num_steps, shift, noise_level):
    """Each solver as a plain float64 loop, from the published update rules."""
    points = np.linspace(0, 0.96, num_steps) if name == "euler_maruyama" else None
    points = np.linspace(0, 1, num_steps + 1) if points is None else points
    grid = points / (shift - (shift - 1) * points)
    for i in range(num_steps):
        t = grid[i]
        v = velocity(x, t)
        if name == "euler_maruyama" and i == num_steps - 1:
            x = x + 0.04 * v
            continue
        dt = grid[i + 1] - t
        x0, x1, sigma = x - v * t, x + v * (1 - t), 1 - t
        if name.startswith("euler_maruyama"):
            score = (t * v - x) / (1 - t)
            x = x + (v + (1 - t) * score) * dt + np.sqrt(2 * (1 - t)) * np.sqrt(dt) * noise[i]
        elif name == "flow_sde":
            denominator = 1 - (grid[-2] if i == 0 else sigma)
            std = np.sqrt(sigma / denominator) * noise_level
            mean = x0 * (1 - t - dt) + x1 * (t + dt) - std**2 * dt / (2 * sigma) * x0
            x = mean + std * np.sqrt(dt) * noise[i]
        elif name == "flow_cps":
            std = (1 - t - dt) * np.sin(noise_level * np.pi / 2)
            kept = np.sqrt((1 - t - dt) ** 2 - std**2)
            x = x0 * kept + x1 * (t + dt) + std * noise[i]
        elif name == "heun":
            x = x + dt / 2 * (v + velocity(x + dt * v, t + dt))
        else:
            x = x + dt * v
    return x


@pytest.mark.parametrize("shift", [1.0, 2.5])
@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_against_a_float64_loop(name, branches, shift):
    rng = np.random.default_rng([6, branches])
    num_steps, dim = 7, 6
    solver = SOLVERS[name]
    weight = rng.normal(size=(dim, dim)) / np.sqrt(dim)
    conditions = rng.normal(size=(branches, 3, dim))
    start = rng.normal(size=(3, dim))
    noise = rng.normal(size=(solver.num_noises(num_steps), 3, dim))

    def branch_velocities(np_, x, t, conditions):
        return np_.tanh(x @ weight + conditions) * (1.0 + t) - 0.5 * x

    def velocity_np(x, t):
        v = branch_velocities(np, x, t, conditions)
        if branches == 1:
            return v[0]
        if branches == 2:
            return v[1] + 3.0 * (v[0] - v[1])
        return v[2] + 2.0 * (v[1] - v[2]) + 3.0 * (v[0] - v[1])

    times = jnp.asarray(solver.times(num_steps, shift))

    @functools.partial(jax.jit, static_argnames="solver")
    def solve(solver, start, noise, conditions, scale, noise_level):
        def velocity_fn(x, i):
            assert i.dtype == jnp.int32 and x.dtype == jnp.float32
            return guide(branch_velocities(jnp, x, times[i], conditions), scale, 2.0)

        settings = dict(num_steps=num_steps, shift=shift, noise_level=noise_level)
        return solver.solve(velocity_fn, start, noise, **settings)

    arrays = (jnp.asarray(a, jnp.float32) for a in (start, noise, conditions, 3.0, 0.8))
    got = solve(solver, *arrays)
    expected = reference_loop(name, velocity_np, start, noise, num_steps, shift, 0.8)
    assert got.dtype == jnp.float32
    assert np.abs(got - expected).max() / np.abs(expected).max() < 3e-6


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_the_step_is_traced_once_whatever_the_number_of_steps(name):
    solver = SOLVERS[name]
    calls = []

    def velocity(x, i):
        calls.append(i)
        return -x

    noise = jnp.zeros((solver.num_noises(9), 2, 3))
    solver.solve(velocity, jnp.ones((2, 3)), noise, num_steps=9, shift=1.0)
    assert len(calls) == (2 if name == "heun" else 1)


def test_bad_input_is_refused():
    def solve(name, rows, **settings):
        arrays = jnp.zeros((2, 3)), jnp.zeros((rows, 2, 3))
        settings = dict(num_steps=4, shift=1.0) | settings
        return get_solver(name).solve(lambda x, i: x, *arrays, **settings)

    with pytest.raises(ValueError, match=r"noise: euler_maruyama .* takes 3 rows, got 4"):
        solve("euler_maruyama", 4)
    with pytest.raises(ValueError, match="takes 0 rows, got 4"):
        solve("ode", 4)
    with pytest.raises(ValueError, match="noise_level of flow_cps must be in"):
        solve("flow_cps", 4, noise_level=1.2)
    with pytest.raises(ValueError, match="noise_level of flow_sde must be in"):
        solve("flow_sde", 4, noise_level=-0.1)
    with pytest.raises(ValueError, match="shift"):
        solve("heun", 0, shift=0.0)
    with pytest.raises(ValueError, match="euler_maruyama, euler_maruyama_full, flow_sde"):
        get_solver("dpm")
