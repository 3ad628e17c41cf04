import collections
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn

from nextstep_jax.interop import streaming
from nextstep_jax.interop.huggingface import abstract_model
from nextstep_jax.interop.published_config import model_from_published
from nextstep_jax.interop.streaming import check_tensors, load_params, stream_params, write_params
from nextstep_jax.interop.tensor_map import leaves_of, nextstep_slots, tree_of
from nextstep_jax.interop.tensor_views import MemoryTensors, MergedTensors, RenamedTensors
from nextstep_jax.interop.tensor_writer import SafetensorsWriter
from nextstep_jax.interop.tensors import TensorInfo
from nextstep_jax.models.decoder import unstack_layers
from nextstep_jax.parallel.mesh import make_mesh
from nextstep_jax.parallel.sharding import tree_shardings
from tests import published_files
from tests.published_files import BFLOAT16

CONFIG = model_from_published(published_files.MODEL).config
SHAPES = published_files.model_shapes()


class CountedTensors(MemoryTensors):
    """Keeps the names in the order in which they are read."""

    def __init__(self, arrays):
        super().__init__(arrays)
        self.names = []

    def read(self, name):
        self.names.append(name)
        return super().read(name)


def slots_and_shapes(stacked=True):
    abstract = abstract_model(CONFIG, scan_layers=stacked)
    return nextstep_slots(nn.unbox(abstract)), abstract


@pytest.fixture(scope="module")
def tensors():
    return published_files.random_tensors(SHAPES)


@pytest.fixture(scope="module")
def params(tensors):
    """On one device, layers stacked."""
    slots, abstract = slots_and_shapes()
    return load_params(MemoryTensors(tensors), slots, nn.unbox(abstract))


def test_values_are_in_their_places(params, tensors):
    """Each kind of slice, and both matrices that are square."""
    layers = params["decoder"]["layers"]
    for i in range(3):
        for ours, theirs in (
            (layers["attn"]["q_proj"]["kernel"], f"layers.{i}.self_attn.q_proj.weight"),
            (layers["attn"]["o_proj"]["kernel"], f"layers.{i}.self_attn.o_proj.weight"),
            (layers["mlp"]["down_proj"]["kernel"], f"layers.{i}.mlp.down_proj.weight"),
        ):
            np.testing.assert_array_equal(ours[i], tensors[theirs].T)
        norm = tensors[f"layers.{i}.post_attention_layernorm.weight"]
        np.testing.assert_array_equal(layers["post_attention_norm"]["scale"][i], norm)
    np.testing.assert_array_equal(params["embed_tokens"], tensors["embed_tokens.weight"])
    np.testing.assert_array_equal(params["lm_head"]["kernel"], tensors["lm_head.weight"].T)
    head = params["flow_head"]["blocks_1"]
    modulation = tensors["image_head.net.res_blocks.1.adaLN_modulation.1.weight"]
    np.testing.assert_array_equal(head["modulation"]["kernel"], modulation.T)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(params)} == {1}


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "unrolled"])
@pytest.mark.parametrize(
    "axes",
    [{"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}],
    ids=["fsdp4-tensor2", "data2-fsdp2-tensor2", "fsdp8"],
)
def test_sharded_equals_one_device(params, tensors, devices, axes, stacked):
    slots, abstract = slots_and_shapes(stacked)
    shardings = tree_shardings(abstract, make_mesh(axes, devices))
    files = CountedTensors(tensors)
    sharded = load_params(files, slots, nn.unbox(abstract), shardings)
    expected = params if stacked else {**params, "decoder": unstack_layers(params["decoder"])}
    assert jax.tree.structure(sharded) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, sharded, expected)
    # Shard by shard: gathering alone would hide a wrong place that was wrong twice.
    for leaf, whole, sharding in zip(
        *(jax.tree.leaves(tree) for tree in (sharded, expected, shardings)), strict=True
    ):
        assert leaf.sharding == sharding
        assert len(leaf.addressable_shards) == 8
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(whole)[shard.index])
    spread = [leaf for leaf in jax.tree.leaves(sharded) if not leaf.is_fully_replicated]
    assert len(spread) > len(jax.tree.leaves(sharded)) / 3
    # Once for all devices.
    assert collections.Counter(files.names) == dict.fromkeys(SHAPES, 1)


def test_layers_may_be_sharded_too(tensors, params, devices):
    """The places of a stack that is cut along its layers."""
    slots, abstract = slots_and_shapes()
    path = ("decoder", "layers", "mlp", "up_proj", "kernel")
    mine = [slot for slot in slots if slot.path == path]
    mesh = make_mesh({"data": 2, "fsdp": 1, "tensor": 3}, devices[:6])
    spec = jax.sharding.PartitionSpec("tensor", None, "data")
    shardings = tree_of({path: jax.sharding.NamedSharding(mesh, spec)})
    abstract = tree_of({path: leaves_of(nn.unbox(abstract))[path]})
    loaded = leaves_of(load_params(MemoryTensors(tensors), mine, abstract, shardings))[path]
    assert loaded.addressable_shards[0].data.shape == (1, 32, 24)
    np.testing.assert_array_equal(loaded, leaves_of(params)[path])


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (np.float32, BFLOAT16),
        (np.float32, np.float16),
        (BFLOAT16, np.float32),
        (np.float16, BFLOAT16),
    ],
    ids=str,
)
def test_dtypes_round_as_numpy_does(source, target):
    slots, abstract = slots_and_shapes()
    tensors = published_files.random_tensors(SHAPES, dtype=source)
    # Two ties between neighbours of bfloat16.
    tensors["norm.weight"][:2] = np.array([1 + 2**-8, 1 + 3 * 2**-8], source)
    loaded = leaves_of(load_params(MemoryTensors(tensors), slots, nn.unbox(abstract), None, target))
    assert {leaf.dtype for leaf in loaded.values()} == {np.dtype(target)}
    for slot in slots:
        ours = np.asarray(loaded[slot.path])
        ours = ours if slot.layer is None else ours[slot.layer]
        theirs = tensors[slot.name].astype(target)
        theirs = theirs.T if slot.layout == "linear" else theirs
        np.testing.assert_array_equal(ours, theirs)


def test_rounding_to_nearest_even_is_exact():
    """The bits of bfloat16 from those of float32, by hand."""
    values = np.random.default_rng([4]).standard_normal(32).astype(np.float32)
    values[:4] = 1 + np.array([1, 3, 1 + 2**-15, 0], np.float32) * 2**-8
    slots, abstract = slots_and_shapes()
    path = ("decoder", "final_norm", "scale")
    slots = [slot for slot in slots if slot.path == path]
    abstract = tree_of({path: leaves_of(nn.unbox(abstract))[path]})
    files = MemoryTensors({"norm.weight": values})
    loaded = leaves_of(load_params(files, slots, abstract, None, jnp.bfloat16))[path]
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    np.testing.assert_array_equal(np.asarray(loaded).view(np.uint16), rounded.astype(np.uint16))
    np.testing.assert_array_equal(np.asarray(loaded[:4], np.float32), [1, 1 + 2**-6, 1 + 2**-7, 1])


@pytest.mark.parametrize(
    ("odd", "rest", "expected"),
    [
        (BFLOAT16, np.float32, np.float32),
        (np.float32, BFLOAT16, np.float32),
        (BFLOAT16, np.float16, np.float32),
        (np.float16, np.float32, np.float32),
        (BFLOAT16, BFLOAT16, BFLOAT16),
        (np.float16, np.float16, np.float16),
    ],
    ids=str,
)
def test_a_stack_takes_the_widest_dtype(odd, rest, expected):
    slots, abstract = slots_and_shapes()
    tensors = published_files.random_tensors(SHAPES, dtype=rest)
    name = "layers.1.mlp.gate_proj.weight"
    tensors[name] = tensors[name].astype(odd)
    files = MemoryTensors(tensors)
    loaded = load_params(files, slots, nn.unbox(abstract))
    layers = loaded["decoder"]["layers"]
    kernel = layers["mlp"]["gate_proj"]["kernel"]
    assert kernel.dtype == expected
    for i in range(3):
        values = tensors[f"layers.{i}.mlp.gate_proj.weight"].astype(np.float32)
        np.testing.assert_array_equal(np.asarray(kernel[i], np.float32), values.T)
    # Only where it is needed.
    assert layers["mlp"]["up_proj"]["kernel"].dtype == rest
    mine = [slot for slot in slots if slot.name.endswith("mlp.gate_proj.weight")]
    assert streaming.dtype_of(files, mine) == np.dtype(expected)


def test_groups_are_read_when_they_are_asked_for(tensors, monkeypatch):
    """A consumer of one group has caused the reading of its tensors alone."""
    slots, abstract = slots_and_shapes()
    monkeypatch.setattr(streaming, "_GROUP_BYTES", 4 * 32 * 48 * 3)  # An MLP's projection.
    files = CountedTensors(tensors)
    groups = stream_params(files, slots, nn.unbox(abstract))
    assert files.names == []
    done, sizes = set(), []
    for group in groups:
        done |= set(group)
        assert collections.Counter(files.names) == {s.name: 1 for s in slots if s.path in done}
        sizes.append([array.nbytes for array in group.values()])
    assert done == {slot.path for slot in slots}
    assert len(sizes) > 5
    # A group is full with its last parameter, and not before.
    assert all(sum(group) >= 4 * 32 * 48 * 3 > sum(group[:-1]) for group in sizes[:-1])


def test_writing_is_the_inverse(params, tensors, tmp_path):
    """From one group or many, in any order; under the dtypes that are asked for."""
    slots, _ = slots_and_shapes()
    infos = {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    narrow = "layers.2.self_attn.k_proj.weight"
    infos[narrow] = TensorInfo(infos[narrow].shape, BFLOAT16)
    groups = [{path: leaf} for path, leaf in reversed(leaves_of(params).items())]
    for name, parts in (("many", groups), ("one", [leaves_of(params)])):
        with SafetensorsWriter(tmp_path / name, infos) as writer:
            write_params(parts, slots, writer, infos)
        expected = {**tensors, narrow: tensors[narrow].astype(ml_dtypes.bfloat16)}
        published_files.assert_same(published_files.read(tmp_path / name), expected)


def test_all_that_is_wrong_stands_in_one_message(tensors):
    slots, _ = slots_and_shapes()
    wrong = dict(tensors)
    for name in ("norm.weight", "layers.2.mlp.up_proj.weight"):
        del wrong[name]
    wrong["layers.0.self_attn.q_norm.weight"] = wrong["extra"] = wrong["gen_pos_embed"] = np.ones(3)
    wrong["lm_head.weight"] = wrong["lm_head.weight"].T
    wrong["layers.1.mlp.up_proj.weight"] = np.zeros((48, 32), np.int8)
    expected = (
        "folder: the tensors are not those of the config; "
        "2 missing: norm.weight, layers.2.mlp.up_proj.weight; "
        "2 unexpected: layers.0.self_attn.q_norm.weight, extra; "
        "1 of another shape: lm_head.weight is [32, 448], expected [448, 32]; "
        "1 not of floating point: layers.1.mlp.up_proj.weight (int8)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        # A generator can be gone through once only.
        check_tensors(MemoryTensors(wrong), slots, (n for n in ["gen_pos_embed"]), "folder")
    check_tensors(MemoryTensors(tensors), slots)


def test_long_lists_are_not_cut(tensors):
    slots, _ = slots_and_shapes()
    files = MemoryTensors({name: tensors[name] for name in list(tensors)[:10]})
    with pytest.raises(ValueError) as caught:
        check_tensors(files, slots)
    missing = [slot.name for slot in slots if slot.name not in files.infos]
    assert len(missing) == len(tensors) - 10 == 61
    assert str(caught.value).endswith(f"; 61 missing: {', '.join(missing)}")


def test_names_without_a_prefix(tensors):
    prefixed = {f"model.{n}" if n != "lm_head.weight" else n: t for n, t in tensors.items()}
    files = RenamedTensors(MemoryTensors(prefixed), "model.")
    assert {n: i.shape for n, i in files.infos.items()} == SHAPES
    for name, tensor in tensors.items():
        assert files.read(name) is tensor
    double = MemoryTensors({**prefixed, "norm.weight": tensors["norm.weight"]})
    with pytest.raises(ValueError, match=r"with and without 'model.' in front: norm.weight"):
        RenamedTensors(double, "model.")


def test_the_first_source_wins():
    one, two = np.ones(1), np.ones(2)
    files = MergedTensors([MemoryTensors({"a": one}), MemoryTensors({"a": two, "b": two})])
    assert {n: i.shape for n, i in files.infos.items()} == {"a": (1,), "b": (2,)}
    assert files.read("a") is one
    assert files.read("b") is two
    assert str(files.where("b")) == "memory"
