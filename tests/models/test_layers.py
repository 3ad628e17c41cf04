import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from nextstep_jax.models.layers import (
    Dense,
    LayerNorm,
    RMSNorm,
    constrain,
    dense,
    gated_mlp,
    layer_norm,
    rms_norm,
    rope,
)


def normal(*shape, seed=0):
    values = np.random.default_rng([3, seed]).standard_normal(shape)
    return jnp.asarray(values, jnp.float32)


def float64(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


def test_rms_norm(reference, relative_error):
    # An epsilon that matters: the first row is about as small as its root.
    x = normal(3, 4, 17) * jnp.array([5e-3, 1.0, 5.0])[:, None, None]
    scale = normal(17, seed=1)
    actual, expected = rms_norm(x, scale, 1e-5), reference.rms_norm(*float64(x, scale), 1e-5)
    assert relative_error(list(actual), list(expected)) < 1e-6


def test_rms_norm_by_hand():
    # mean square of (3, 4) is 12.5; with eps 12.5 the divisor is 5.
    y = rms_norm(jnp.array([3.0, 4.0]), jnp.array([1.0, 10.0]), 12.5)
    np.testing.assert_allclose(y, [0.6, 8.0], rtol=1e-6)


def test_norms_compute_in_float32_and_keep_the_dtype():
    x, scale = 3 + normal(6, 33), normal(33, seed=1)
    low = x.astype(jnp.bfloat16)
    for function in (lambda x: rms_norm(x, scale, 1e-5), lambda x: layer_norm(x, scale, scale)):
        function = jax.jit(function)
        assert function(low).dtype == jnp.bfloat16
        # Only the result is rounded, not what lies between.
        np.testing.assert_array_equal(
            function(low), function(low.astype(jnp.float32)).astype(jnp.bfloat16)
        )


@pytest.mark.parametrize("affine", [False, True])
def test_layer_norm(affine, reference, relative_error):
    x, scale, bias = 2 + 3 * normal(4, 19), normal(19, seed=1), normal(19, seed=2)
    arguments = (scale, bias) if affine else ()
    expected = reference.layer_norm(*float64(x), 1e-2, *float64(*arguments))
    assert relative_error(layer_norm(x, *arguments, eps=1e-2), expected) < 1e-6


def test_norm_modules_start_as_the_plain_norm_and_use_their_parameters(randomise, relative_error):
    x = normal(2, 9)
    for module, plain in (
        (RMSNorm(1e-5), lambda x: rms_norm(x, jnp.ones(9), 1e-5)),
        (LayerNorm(1e-6), layer_norm),
    ):
        variables = module.init(jax.random.key(0), x)
        assert nn.get_partition_spec(variables)["params"]["scale"] == PartitionSpec("norm")
        np.testing.assert_allclose(module.apply(nn.unbox(variables), x), plain(x), atol=1e-6)
        params = randomise(variables["params"], seed=2)
        expected = plain(x) * params["scale"] + params.get("bias", 0.0)
        assert relative_error(module.apply({"params": params}, x), expected) < 1e-6


def test_rope_turns_complex_numbers(reference, relative_error):
    x = normal(2, 5, 3, 8)
    positions = np.array([[0, 1, 2, 3, 4], [0, 0, 7, 30, 2]], np.int32)
    actual = rope(x, jnp.asarray(positions), 100.0)
    rows = zip(*float64(x, positions), strict=True)
    expected = [reference.rope(row, at, 100.0) for row, at in rows]
    assert relative_error(actual, np.stack(expected)) < 2e-6
    np.testing.assert_array_equal(actual[:, 0], x[:, 0])  # position 0 does not turn


def test_rope_by_hand():
    # head_dim 4, theta 16: frequencies 1 and 1/4; at position 2 angles 2 and 0.5.
    x = jnp.array([1.0, 1.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    y = rope(x, jnp.array([[2]]), 16.0)
    expected = [np.cos(2.0), np.cos(0.5), np.sin(2.0), np.sin(0.5)]
    np.testing.assert_allclose(y.reshape(4), expected, atol=1e-6)


def test_rope_makes_products_depend_on_distance_alone(relative_error):
    q, k = (jnp.tile(normal(1, 1, 2, 10, seed=i), (1, 6, 1, 1)) for i in (1, 2))
    at = jnp.array([[0, 1, 5, 9, 14, 20]], jnp.int32)

    def products(distance):
        return jnp.sum(rope(q, at + distance, 1e4) * rope(k, at, 1e4), axis=-1)

    near, far = products(3), products(11)
    assert relative_error(near, np.broadcast_to(near[:, :1], near.shape)) < 1e-5
    assert relative_error(far, near) > 0.01  # and it does depend on the distance


def test_gated_mlp(relative_error):
    gate, up = normal(3, 7), normal(3, 7, seed=1)
    g, u = float64(gate, up)
    assert relative_error(gated_mlp(gate, up), g / (1 + np.exp(-g)) * u) < 1e-6


@pytest.mark.parametrize("use_bias", [False, True])
def test_dense_layer(use_bias, randomise, relative_error):
    x = normal(2, 3, 5)
    layer = Dense(4, ("embed", "mlp"), use_bias)
    variables = layer.init(jax.random.key(0), x)
    specs = nn.get_partition_spec(variables)["params"]
    assert specs["kernel"] == PartitionSpec("embed", "mlp")
    assert set(specs) == ({"kernel", "bias"} if use_bias else {"kernel"})
    if use_bias:
        assert specs["bias"] == PartitionSpec("mlp")
    params = randomise(variables["params"], seed=0)
    expected = float64(x)[0] @ params["kernel"] + params.get("bias", 0.0)
    assert relative_error(layer.apply({"params": params}, x), expected) < 1e-6


def test_dense_computes_in_its_dtype_and_keeps_float32_parameters():
    x = normal(2, 5)
    layer = Dense(4, ("embed", "mlp"), dtype=jnp.bfloat16)
    variables = nn.unbox(layer.init(jax.random.key(0), x))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    program = jax.make_jaxpr(layer.apply)(variables, x)
    products = [e for e in program.jaxpr.eqns if e.primitive.name == "dot_general"]
    assert [p.outvars[0].aval.dtype for p in products] == [jnp.bfloat16]


def test_dense_is_one_dot_general():
    program = jax.make_jaxpr(dense)(jnp.ones((2, 3, 5)), jnp.ones((5, 4)))
    assert [e.primitive.name for e in program.jaxpr.eqns] == ["dot_general"]


def test_constrain_lays_out_by_the_rules(devices):
    x = jnp.ones((4, 3, 8))
    assert constrain(x, "act_batch", "act_len", "anything") is x  # no rules in scope
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = [("act_batch", "data"), ("act_len", None), ("act_embed", "tensor")]
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        y = jax.jit(lambda x: constrain(x, "act_batch", "act_len", "act_embed"))(x)
        assert y.sharding.spec == PartitionSpec("data", None, "tensor")
        with pytest.raises(ValueError, match="act_embde"):
            constrain(x, "act_batch", "act_len", "act_embde")
