import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextstep_jax.training import optimizer
from nextstep_jax.training.optimizer import OptimizerConfig
from nextstep_jax.training.state import init_state, make_train_step

CONFIG = OptimizerConfig(learning_rate=0.1, warmup_steps=2, ema_decay=0.5)


def loss_fn(params, batch, key):
    """A line through points, with noise on the targets that only the key decides."""
    noise = jax.random.normal(key, batch["y"].shape)
    error = batch["x"] @ params["kernel"] + params["bias"] - batch["y"] - 0.1 * noise
    return jnp.mean(error**2), {"noise": noise[0]}


@pytest.fixture(scope="module")
def run():
    """Initial state, batch, and [(state, metrics)] of three steps."""
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.standard_normal(3), jnp.float32), "bias": jnp.zeros(())}
    batch = {"x": rng.standard_normal((8, 3)), "y": rng.standard_normal(8)}
    batch = jax.tree.map(jnp.float32, batch)
    state = init_state(params, CONFIG, jax.random.key(3))
    step = jax.jit(make_train_step(loss_fn, CONFIG))
    results, current = [], state
    for _ in range(3):
        results.append(step(current, batch))
        current = results[-1][0]
    return state, batch, step, results


def test_init_state(run):
    state = run[0]
    assert (state.step.dtype, int(state.step)) == (jnp.int32, 0)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, state.ema, state.params))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    without = init_state(state.params, OptimizerConfig(), jax.random.key(0))
    assert without.ema is None


def test_average_is_not_the_parameters_themselves(run):
    """Two names for one buffer could not both be donated."""
    state = run[0]
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((state.params, state.ema))]
    assert len(set(pointers)) == len(pointers)


def test_step_draws_from_the_key_of_the_step(run):
    state, batch, _, results = run
    for i, (after, metrics) in enumerate(results):
        key = jax.random.fold_in(jax.random.key(3), i)
        # Fused into another program a normal number is rounded differently.
        noise = float(jax.random.normal(key, (8,))[0])
        assert float(metrics["noise"]) == pytest.approx(noise, rel=1e-6)
        assert int(after.step) == i + 1
        np.testing.assert_array_equal(
            jax.random.key_data(after.key), jax.random.key_data(state.key)
        )


def test_step_is_a_function_of_state_and_batch(run):
    _, batch, step, results = run
    again, metrics = step(results[0][0], batch)
    for a, b in zip(
        jax.tree.leaves((again.replace(key=None), metrics)),
        jax.tree.leaves((results[1][0].replace(key=None), results[1][1])),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_step_is_gradient_and_optimizer(run, relative_error):
    """Loss and norms in the metrics, parameters and average in the state, computed apart."""
    state, batch, _, results = run
    rule = optimizer.make_optimizer(CONFIG)
    params, ema, opt_state = state.params, state.ema, rule.init(state.params)
    for i, (after, metrics) in enumerate(results):
        key = jax.random.fold_in(state.key, i)
        loss, grads = jax.value_and_grad(lambda p, key=key: loss_fn(p, batch, key)[0])(params)
        updates, opt_state = rule.update(grads, opt_state, params)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
        decay = min(0.5, (1 + i) / (10 + i))
        ema = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, ema, params)
        norms = {"grad_norm": grads, "update_norm": updates, "param_norm": params}
        assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-6)
        for name, tree in norms.items():
            leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
            norm = np.linalg.norm(np.concatenate(leaves))
            assert float(metrics[name]) == pytest.approx(norm, rel=1e-5)
        assert float(metrics["learning_rate"]) == pytest.approx(0.1 * min(1, (i + 1) / 2))
        assert relative_error((after.params, after.ema), (params, ema)) < 1e-6
