import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from nextstep_jax.models.layers import constrain
from nextstep_jax.parallel import sharding
from nextstep_jax.parallel.mesh import make_mesh


def leaf(names, shape):
    return nn.Partitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


@pytest.fixture
def mesh(devices):
    return make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, devices)


@pytest.mark.parametrize(
    ("names", "shape", "spec"),
    [
        (("vocab", "embed"), (16, 8), P("tensor", "fsdp")),
        (("embed", "mlp"), (8, 16), P("fsdp", "tensor")),
        (("layers", "embed", "heads"), (3, 8, 16), P(None, "fsdp", "tensor")),
        (("layers", "norm"), (3, 8), P(None, None)),
        (("token", "embed"), (64, 8), P(None, "fsdp")),
        (("flow_mlp", "flow"), (8, 8), P("tensor", "fsdp")),
        ((None, "embed"), (5, 8), P(None, "fsdp")),
        # Dimensions that do not divide stay whole.
        (("vocab", "embed"), (15, 8), P(None, "fsdp")),
        (("embed",), (7,), P(None)),
    ],
)
def test_weights(mesh, names, shape, spec):
    placed = sharding.tree_shardings({"w": leaf(names, shape)}, mesh)["w"]
    assert tuple(placed.spec) == tuple(spec)
    assert placed.mesh == mesh


def test_leaves_without_names_are_replicated(mesh):
    tree = {"step": jax.ShapeDtypeStruct((), jnp.int32), "none": None}
    placed = sharding.tree_shardings(tree, mesh)
    assert placed == {"step": sharding.replicated(mesh), "none": None}


def test_unknown_axis_of_a_weight_raises(mesh):
    with pytest.raises(ValueError, match=r"\['embde'\] are not in the sharding table \['act_batch"):
        sharding.tree_shardings({"w": leaf(("vocab", "embde"), (16, 8))}, mesh)


def test_unknown_axis_of_an_activation_raises(mesh):
    with jax.set_mesh(mesh), sharding.rules(), pytest.raises(ValueError, match="act_lenght"):
        jax.jit(lambda x: constrain(x, "act_batch", "act_lenght")).lower(jnp.ones((4, 4)))


def test_constraint_of_an_activation(mesh):
    """It reaches the compiler under a mesh with rules, and there alone."""

    def double(x):
        return constrain(2 * x, "act_batch", "act_len", "act_mlp")

    x = jnp.arange(8 * 3 * 6.0).reshape(8, 3, 6)

    def count(function):
        return jax.jit(function).lower(x).as_text().count("sharding_constraint")

    def double_with_rules(x):
        with sharding.rules():
            return double(x)

    assert count(double) == 0
    with jax.set_mesh(mesh):
        assert count(double) == 0
        assert count(double_with_rules) == 1
        y = jax.jit(double_with_rules)(x)
    # 8 rows over data and fsdp, 6 columns over tensor.
    assert {shard.data.shape for shard in y.addressable_shards} == {(2, 3, 3)}
    np.testing.assert_array_equal(y, 2 * x)


def test_batch_lies_on_data_and_fsdp(mesh):
    x = jax.device_put(np.arange(8.0).reshape(8, 1), sharding.batch_sharding(mesh))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 1)}
    assert {tuple(s.data[:, 0].tolist()) for s in x.addressable_shards} == {
        (0, 1),
        (2, 3),
        (4, 5),
        (6, 7),
    }
    whole = jax.device_put(np.arange(8.0), sharding.replicated(mesh))
    assert {shard.data.shape for shard in whole.addressable_shards} == {(8,)}


def test_abstract_with_shardings(mesh):
    boxed = {"w": leaf(("embed", "mlp"), (8, 16))}
    shardings = sharding.tree_shardings(boxed, mesh)
    abstract = sharding.abstract_with_shardings(boxed, shardings)["w"]
    assert (abstract.shape, abstract.dtype) == ((8, 16), jnp.float32)
    assert abstract.sharding.shard_shape(abstract.shape) == (4, 8)


def test_every_logical_name_of_the_model_is_in_the_table():
    """And no other: a rule for a name that nothing carries would be a misspelling."""
    from nextstep_jax.models import config
    from nextstep_jax.models.nextstep import NextStep, init_params

    model = NextStep(config.nextstep_config("tiny"))
    boxed = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
    boxes = jax.tree.leaves(boxed, is_leaf=is_box)
    assert all(is_box(box) for box in boxes)
    carried = {name for box in boxes for name in box.names}
    known = {name for name, _ in sharding.RULES if not name.startswith("act_")}
    assert carried == known
