import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from nextstep_jax.models.config import FlowHeadConfig
from nextstep_jax.models.flow_head import FlowHead, modulate, timestep_sinusoid

CONFIG = FlowHeadConfig(width=24, num_layers=3, mlp_ratio=1.5, frequency_dim=10, max_period=50.0)
TOKEN_DIM, COND_DIM, ROWS, STEPS = 8, 14, 5, 4


def normal(*shape, seed=0):
    values = np.random.default_rng([6, seed]).standard_normal(shape)
    return jnp.asarray(values, jnp.float32)


@pytest.fixture(scope="module")
def head():
    return FlowHead(CONFIG, TOKEN_DIM)


@pytest.fixture(scope="module")
def initial(head):
    arguments = jnp.ones((1, TOKEN_DIM)), jnp.ones(1), jnp.ones((1, COND_DIM))
    key = jax.random.key(0, impl="rbg")  # compiles faster than the default
    return jax.jit(head.init)(key, *arguments)["params"]


@pytest.fixture(scope="module")
def params(initial, randomise):
    return randomise(initial, seed=4)


@pytest.fixture(scope="module")
def velocity(head):
    return jax.jit(lambda params, x, time, c: head.apply({"params": params}, x, time, c))


def test_sinusoid_by_hand():
    # Four wide: frequencies 1 and 1/100; cosines stand first, and the time is not scaled.
    actual = timestep_sinusoid(jnp.array([0.0, 0.5, 1.0]), 4, 10_000.0)
    expected = [
        [1.0, 1.0, 0.0, 0.0],
        [0.87758256, 0.9999875, 0.47942554, 0.00499998],
        [0.54030231, 0.99995, 0.84147098, 0.00999983],
    ]
    np.testing.assert_allclose(actual, expected, atol=1e-7)


def test_sinusoid_of_the_published_width():
    actual = np.asarray(timestep_sinusoid(jnp.float32(0.3), 256, 10_000.0))
    angle = [0.3 * np.exp(-np.log(10_000.0) * i / 128) for i in range(128)]
    np.testing.assert_allclose(actual, [*np.cos(angle), *np.sin(angle)], atol=2e-7)


def test_modulate_by_hand():
    x, shift, scale = jnp.array([2.0, 3.0]), jnp.array([10.0, 20.0]), jnp.array([0.0, 1.0])
    np.testing.assert_array_equal(modulate(x, shift, scale), [12.0, 26.0])


def test_velocity_is_the_numpy_velocity(params, velocity, reference, relative_error):
    x, c = normal(ROWS, TOKEN_DIM), normal(ROWS, COND_DIM, seed=1)
    time = jnp.array([0.0, 0.1, 0.5, 0.97, 1.0])
    expected = reference.flow_head(params, CONFIG, x, time, c)
    assert relative_error(velocity(params, x, time, c), expected) < 1e-5


def test_leading_axes_are_free(params, velocity, relative_error):
    x, c = normal(2, 3, TOKEN_DIM), normal(2, 3, COND_DIM, seed=1)
    time = jnp.linspace(0, 1, 6).reshape(2, 3)
    flat = velocity(params, x.reshape(6, -1), time.reshape(6), c.reshape(6, -1))
    assert relative_error(velocity(params, x, time, c).reshape(6, -1), flat) < 1e-6


def test_modulations_of_all_steps_equal_the_plain_form(
    head, params, velocity, reference, relative_error
):
    x, c = normal(STEPS, ROWS, TOKEN_DIM), normal(ROWS, COND_DIM, seed=1)
    times = jnp.array([0.0, 0.25, 0.7, 1.0])

    def all_steps(head, times, condition):
        y = head.embed_time(times)[:, None] + head.embed_condition(condition)[None]
        return head.modulations(y)

    bound = {"params": params}
    modulations = jax.jit(lambda t, c: nn.apply(all_steps, head)(bound, t, c))(times, c)
    shapes = {leaf.shape for leaf in modulations.blocks}
    assert len(modulations.blocks) == 3
    assert shapes == {(STEPS, ROWS, 3 * 24)}
    assert modulations.final.shape == (STEPS, ROWS, 2 * 24)
    one_step = jax.jit(lambda x, m: head.apply(bound, x, m, method="velocity"))
    for i in range(STEPS):
        actual = one_step(x[i], jax.tree.map(lambda m, i=i: m[i], modulations))
        rows_of_time = jnp.full(ROWS, times[i])
        assert relative_error(actual, velocity(params, x[i], rows_of_time, c)) < 1e-5
        expected = reference.flow_head(params, CONFIG, x[i], rows_of_time, c)
        assert relative_error(actual, expected) < 1e-5


def test_bfloat16_head_rounds_the_time_and_returns_float32(params):
    low = FlowHead(CONFIG, TOKEN_DIM, dtype=jnp.bfloat16)
    embed = jax.jit(lambda t: low.apply({"params": params}, t, method="embed_time"))
    exact, rounded = embed(jnp.float32(0.3)), embed(jnp.float32(0.30078125))
    np.testing.assert_array_equal(exact, rounded)
    assert exact.dtype == jnp.bfloat16
    out = jax.eval_shape(
        lambda x, t, c: low.apply({"params": params}, x, t, c),
        normal(ROWS, TOKEN_DIM),
        jnp.ones(ROWS),
        normal(ROWS, COND_DIM),
    )
    assert out.dtype == jnp.float32


def test_a_new_head_gives_zero_velocity(initial, velocity):
    x, c = normal(ROWS, TOKEN_DIM), normal(ROWS, COND_DIM, seed=1)
    np.testing.assert_array_equal(velocity(nn.unbox(initial), x, jnp.full(ROWS, 0.4), c), 0.0)


def test_initial_values_as_published(initial):
    xavier, normals, zeros = set(), set(), set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(nn.unbox(initial)):
        name = "/".join(key.key for key in path)
        layer = name.split("/")[-2]
        if name.endswith("scale"):
            np.testing.assert_array_equal(leaf, 1.0)
        elif name.endswith("bias") or "modulation" in layer or layer == "final_proj":
            np.testing.assert_array_equal(leaf, 0.0)
            zeros.add(layer)
        elif layer.startswith("time_"):
            assert abs(np.std(leaf) / 0.02 - 1) < 5 / np.sqrt(2 * leaf.size)
            assert np.abs(leaf).max() > 0.04  # a normal has tails, a uniform of this deviation not
            normals.add(layer)
        else:
            bound = np.sqrt(6 / sum(leaf.shape))
            assert 0.97 * bound < np.abs(leaf).max() <= bound
            # The square of a uniform has mean b^2/3 and standard deviation b^2 sqrt(4/45).
            error = 5 * np.sqrt(4 / 45 / leaf.size)
            assert abs(np.mean(np.square(leaf)) / bound**2 - 1 / 3) < error
            xavier.add(layer)
    assert xavier == {"cond_embed", "input_proj", "mlp_in", "mlp_out"}
    assert normals == {"time_in", "time_out"}
    assert {"modulation", "final_modulation", "final_proj"} < zeros


def test_shapes_and_logical_axes(initial):
    specs = nn.get_partition_spec(initial)
    assert specs["input_proj"]["kernel"] == PartitionSpec("token", "flow")
    assert specs["cond_embed"]["kernel"] == PartitionSpec("embed", "flow")
    assert specs["final_proj"]["kernel"] == PartitionSpec("flow", "token")
    block = nn.unbox(initial)["blocks_2"]
    assert block["mlp_in"]["kernel"].shape == (24, 36)  # mlp_ratio 1.5
    assert block["mlp_out"]["kernel"].shape == (36, 24)
    assert block["modulation"]["kernel"].shape == (24, 72)
