import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nextstep_jax.models.nextstep import NextStep, init_params
from nextstep_jax.training import experiment, optimizer
from nextstep_jax.training.optimizer import OptimizerConfig


def test_published_values_are_the_defaults():
    c = OptimizerConfig()
    assert (c.beta1, c.beta2, c.eps, c.weight_decay, c.clip_norm) == (0.9, 0.95, 1e-8, 0.1, 1.0)
    assert (c.schedule, c.ema_decay) == ("constant", 0.0)


def _problem(steps=5, seed=0):
    """Parameters under the names that decide the decay, and gradients of several steps."""
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (2, 3, 4), "bias": (2, 4), "scale": (3,), "embed_tokens": (5, 2)}
    params = {"block": {k: rng.standard_normal(s) for k, s in shapes.items()}}
    # Norms from below to above the clip.
    grads = [
        jax.tree.map(lambda p, i=i: rng.standard_normal(p.shape) * 0.02 * 3.0**i, params)
        for i in range(steps)
    ]
    return jax.tree.map(jnp.float32, params), jax.tree.map(jnp.float32, grads)


def _updates(transformation, params, grads):
    @jax.jit
    def run(params, grads):
        opt_state = transformation.init(params)
        for grad in grads:
            updates, opt_state = transformation.update(grad, opt_state, params)
            params = optax.apply_updates(params, updates)
        return params

    return run(params, grads)


CONFIG = OptimizerConfig(learning_rate=0.01, warmup_steps=3, schedule="cosine", num_steps=7)


def test_adamw_is_a_numpy_loop(relative_error):
    params, grads = _problem()
    actual = _updates(optimizer.make_optimizer(CONFIG), params, grads)
    p = {k: np.asarray(v, np.float64) for k, v in params["block"].items()}
    m, v = ({k: np.zeros_like(a) for k, a in p.items()} for _ in range(2))
    clipped = []
    for i, grad in enumerate(grads):
        g = {k: np.asarray(a, np.float64) for k, a in grad["block"].items()}
        norm = np.sqrt(sum((a**2).sum() for a in g.values()))
        clipped.append(norm > 1)
        rate = 0.01 * min(1, (i + 1) / 3)
        rate *= 0.5 * (1 + np.cos(np.pi * max(0, (i - 3) / 4)))
        for k in p:
            g[k] /= max(norm, 1.0)
            m[k] = 0.9 * m[k] + 0.1 * g[k]
            v[k] = 0.95 * v[k] + 0.05 * g[k] ** 2
            step = (m[k] / (1 - 0.9 ** (i + 1))) / (np.sqrt(v[k] / (1 - 0.95 ** (i + 1))) + 1e-8)
            p[k] -= rate * (step + (0.1 * p[k] if k in ("kernel", "embed_tokens") else 0))
    assert set(clipped) == {True, False}
    assert relative_error(actual["block"], p) < 1e-6


def test_adamw_is_that_of_optax(relative_error):
    params, grads = _problem(seed=1)
    reference = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            optimizer.learning_rate_schedule(CONFIG),
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            mask={"block": {"kernel": True, "bias": False, "scale": False, "embed_tokens": True}},
        ),
    )
    actual = _updates(optimizer.make_optimizer(CONFIG), params, grads)
    assert relative_error(actual, _updates(reference, params, grads)) < 1e-7


def test_decay_falls_on_matrices_only(make_config, vae):
    """Of all leaves of both networks, boxed or not; stacked biases have two axes as well."""
    model = NextStep(experiment.build_model_config(make_config()["model"]))
    boxed = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    decayed, kept = {}, {}
    for tree in (boxed, vae.params):
        mask = optimizer.decay_mask(tree)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            chosen = decayed if _at(mask, path) else kept
            chosen[jax.tree_util.keystr(path, simple=True, separator="/")] = leaf.shape
    names = {name.removesuffix("/value").rsplit("/", 1)[-1] for name in decayed}
    assert names == {"kernel", "embed_tokens"}
    assert {n.removesuffix("/value").rsplit("/", 1)[-1] for n in kept} == {"bias", "scale"}
    stacked = "decoder/layers/attn/q_proj"
    assert decayed[f"{stacked}/kernel/value"] == (2, 32, 32)
    assert kept[f"{stacked}/bias/value"] == (2, 32)
    convolutions = [name for name, shape in decayed.items() if len(shape) == 4]
    assert len(convolutions) > 20
    # Every leaf of three axes or more is a matrix or a stack of them, and decays.
    assert max(len(shape) for shape in kept.values()) == 2


def _at(tree, path):
    for entry in path:
        tree = getattr(tree, "value", tree) if not hasattr(entry, "key") else tree[entry.key]
    return tree


def test_decay_without_gradient_is_a_geometric_series():
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full((2,), 3.0)}
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=0)
    zeros = [jax.tree.map(jnp.zeros_like, params)] * 4
    after = _updates(optimizer.make_optimizer(config), params, zeros)
    np.testing.assert_allclose(after["kernel"], 3.0 * (1 - 0.5 * 0.1) ** 4, rtol=1e-6)
    np.testing.assert_array_equal(after["bias"], 3.0)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("constant", 0, 2e-4 / 10),
        ("constant", 4, 2e-4 / 2),
        ("constant", 9, 2e-4),
        ("constant", 10**6, 2e-4),
        ("cosine", 0, 2e-4 / 10),
        ("cosine", 9, 2e-4),
        ("cosine", 10, 2e-4),
        ("cosine", 35, 2e-4 * (0.9 * (2 + 2**0.5) / 4 + 0.1)),  # a quarter: cos(pi/4)
        ("cosine", 60, 2e-4 * 0.55),  # half way between 1 and the floor
        ("cosine", 110, 2e-4 * 0.1),
        ("cosine", 10**6, 2e-4 * 0.1),
    ],
)
def test_schedules(schedule, step, expected):
    config = OptimizerConfig(
        learning_rate=2e-4, schedule=schedule, warmup_steps=10, num_steps=110, floor=0.1
    )
    rate = optimizer.learning_rate_schedule(config)
    assert float(rate(step)) == pytest.approx(expected, rel=1e-6)
    assert float(rate(jnp.int32(step))) == pytest.approx(expected, rel=1e-6)


def test_unknown_schedule():
    with pytest.raises(ValueError, match=r"schedule='linear' is unknown; .*'constant', 'cosine'"):
        OptimizerConfig(schedule="linear")


def test_moving_average():
    """Of a constant stream it is p + (e - p) * product of the decays, with the early ramp."""
    ema, params = {"w": jnp.asarray([5.0, -1.0])}, {"w": jnp.asarray([1.0, 1.0])}
    product = 1.0
    for step in range(200):
        ema = optimizer.update_ema(ema, params, jnp.int32(step), 0.9)
        product *= min(0.9, (1 + step) / (10 + step))
        if step in (0, 5, 30):
            expected = 1.0 + np.asarray([4.0, -2.0]) * product
            np.testing.assert_allclose(ema["w"], expected, rtol=1e-5)
    np.testing.assert_allclose(ema["w"], 1.0, rtol=1e-6)


def _first_update(config, params, grads):
    transformation = optimizer.make_optimizer(config)
    return transformation.update(grads, transformation.init(params), params)[0]


def test_muon_makes_convolutions_orthogonal_and_the_rest_adam():
    """Kernels move by an orthogonal matrix of the size of Adam's updates, biases as Adam says."""
    config = OptimizerConfig(name="muon", learning_rate=0.01, warmup_steps=0, weight_decay=0.0)
    rng = np.random.default_rng(0)
    params = {
        "kernel": jnp.asarray(rng.standard_normal((3, 3, 4, 8)), jnp.float32),
        "bias": jnp.asarray(rng.standard_normal(8), jnp.float32),
    }
    # One direction a hundred times stronger than the others: plain Adam would follow it.
    grads = {
        "kernel": 0.01 * rng.standard_normal((3, 3, 4, 8)) + 1.0,
        "bias": rng.standard_normal(8),
    }
    grads = jax.tree.map(lambda g: jnp.asarray(1e-3 * g, jnp.float32), grads)
    updates = _first_update(config, params, grads)
    matrix = np.asarray(updates["kernel"]).reshape(36, 8)
    # 0.2 * sqrt(max(in, out)) as scale; five Newton-Schulz steps bring singular values near 1.
    values = np.linalg.svd(matrix, compute_uv=False) / (0.01 * 0.2 * np.sqrt(36))
    assert values.min() > 0.3
    assert values.max() < 1.3
    assert np.sqrt((matrix**2).mean()) == pytest.approx(0.002, rel=0.35)
    # Adam in Nesterov's form: at the first step (1 + b1 / (1 + b1)) times the sign.
    expected = -0.01 * (1 + 0.9 / 1.9) * np.sign(grads["bias"])
    np.testing.assert_allclose(updates["bias"], expected, rtol=1e-3)
    with pytest.raises(ValueError, match=r"name='sgd' is unknown; choose from \['adamw', 'muon'\]"):
        OptimizerConfig(name="sgd")


def test_groups_have_rates_of_their_own(relative_error):
    """The change of every leaf is its factor times the change without groups; frozen is apart."""
    params, grads = _problem(steps=1)
    plain = _updates(optimizer.make_optimizer(CONFIG), params, grads)
    factors = {"kernel": 0.1, "bias": 0.0, "scale": 0.5, "embed_tokens": 1.0}
    config = dataclasses.replace(
        CONFIG, rate_factors=("block/kernel=0.1", "*/bias=0", "block/s*=0.5", "*/scale=9")
    )
    grouped = _updates(optimizer.make_optimizer(config), params, grads)
    for name, factor in factors.items():
        change = plain["block"][name] - params["block"][name]
        actual = grouped["block"][name] - params["block"][name]
        np.testing.assert_allclose(actual, factor * change, atol=3e-7)
    assert float(jnp.abs(plain["block"]["scale"] - params["block"]["scale"]).max()) > 1e-3


@pytest.mark.parametrize(
    ("factors", "match"),
    [
        (("decoder",), "'decoder' must read like"),
        (("decoder/*=fast",), "must read like"),
        (("decoder/*=-1",), "must read like"),
        (("=1",), "must read like"),
    ],
)
def test_rate_factors_that_are_none_are_refused(factors, match):
    with pytest.raises(ValueError, match=match):
        OptimizerConfig(rate_factors=factors)


def test_a_group_that_is_not_there_is_refused():
    params, _ = _problem()
    with pytest.raises(ValueError, match=r"rate_factors: 'decoder/\*' matches no.*\['block'\]"):
        optimizer.rate_factors(params, ("decoder/*=0.1",))


def test_first_moment_in_bfloat16(relative_error):
    """Half the bytes, and updates that differ by the rounding of the moment."""
    params, grads = _problem()
    config = dataclasses.replace(CONFIG, first_moment_dtype="bfloat16")
    (adam,) = (s for s in optimizer.make_optimizer(config).init(params) if hasattr(s, "mu"))
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.mu)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}
    plain = _updates(optimizer.make_optimizer(CONFIG), params, grads)
    rounded = _updates(optimizer.make_optimizer(config), params, grads)
    moved = jax.tree.map(lambda a, b: a - b, plain, params)
    error = relative_error(jax.tree.map(lambda a, b: a - b, rounded, params), moved)
    assert 1e-5 < error < 2e-2
    with pytest.raises(ValueError, match="first_moment_dtype='int8'"):
        OptimizerConfig(first_moment_dtype="int8")
    with pytest.raises(ValueError, match="are for name='adamw'"):
        OptimizerConfig(name="muon", first_moment_dtype="bfloat16")
