import contextlib
import json
import logging
import resource
import shutil
import types
import weakref

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nextstep_jax.parallel.mesh import make_mesh
from nextstep_jax.training import checkpoint
from nextstep_jax.training.checkpoint import Checkpoint, CheckpointStore, Clock
from nextstep_jax.training.state import TrainState

FINGERPRINT = {"row_length": 8, "sources": [["s", 3, 0.5]], "process_count": 1}


def make_state(mesh, spec, ema=True, scale=1.0):
    """A state whose matrix is sharded, with values that tell the leaves apart."""
    matrix = scale * jnp.arange(64.0).reshape(8, 8)
    sharded, whole = NamedSharding(mesh, spec), NamedSharding(mesh, PartitionSpec())
    return TrainState(
        step=jax.device_put(jnp.int32(5), whole),
        params={"a": jax.device_put(matrix, sharded), "b": jax.device_put(jnp.ones(3), whole)},
        opt_state=({"a": jax.device_put(-matrix, sharded)},),
        ema={"a": jax.device_put(2 * matrix, sharded), "b": jax.device_put(jnp.zeros(3), whole)}
        if ema
        else None,
        key=jax.device_put(jax.random.key(9), whole),
    )


def abstract_of(state):
    def abstract(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(abstract, state)


def numbers(start=0):
    """An iterator over 0, 1, 2 ... that has given `start` elements."""
    iterator = iter(grain.MapDataset.range(10_000).to_iter_dataset())
    for _ in range(start):
        next(iterator)
    return iterator


def make(state, iterator, **changes):
    clock, config = Clock(12.5, 340), {"loop": {"num_steps": 7}, "name": "run"}
    return Checkpoint(
        **{
            "state": state,
            "dataset": iterator,
            "clock": clock,
            "config": config,
            "fingerprint": FINGERPRINT,
            **changes,
        }
    )


def equal(a, b):
    def compare(x, y):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)

    jax.tree.map(compare, a, b)
    return True


@pytest.fixture
def meshes(devices):
    return types.SimpleNamespace(
        first=make_mesh({"fsdp": 4, "tensor": 2}, devices),
        second=make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, devices),
        rows=PartitionSpec("fsdp", "tensor"),
        columns=PartitionSpec("tensor", "fsdp"),
    )


@pytest.fixture
def saved(tmp_path, meshes):
    """A store with one checkpoint at step 5, after three elements of the data."""
    state = make_state(meshes.first, meshes.rows)
    store = CheckpointStore(tmp_path)
    store.save(5, make(state, numbers(3)))
    store.close()
    return types.SimpleNamespace(directory=tmp_path, state=state)


def restore(directory, state, **changes):
    store = CheckpointStore(directory)
    try:
        return store.restore(
            make(abstract_of(state), changes.pop("iterator", None) or numbers(), **changes)
        )
    finally:
        store.close()


def test_everything_comes_back_on_another_mesh(saved, meshes, caplog):
    target, iterator = make_state(meshes.second, meshes.columns, scale=0), numbers()
    with caplog.at_level(logging.WARNING):
        restored = restore(saved.directory, target, iterator=iterator, clock=Clock())
    assert equal(restored.state, saved.state)
    assert restored.state.params["a"].sharding == target.params["a"].sharding
    assert {s.data.shape for s in restored.state.params["a"].addressable_shards} == {(4, 4)}
    assert restored.state.key.dtype == saved.state.key.dtype
    assert restored.clock == Clock(12.5, 340)
    assert next(iterator) == 3
    assert not caplog.records


def test_config_is_stored(saved):
    text = (saved.directory / "5" / checkpoint._METADATA_FILE).read_text()
    assert json.loads(text)["custom_metadata"]["config"] == {
        "loop": {"num_steps": 7},
        "name": "run",
    }


def test_nothing_to_restore(tmp_path, meshes):
    assert restore(tmp_path, make_state(meshes.first, meshes.rows)) is None
    store = CheckpointStore(tmp_path)
    assert store.latest_step() is None
    store.close()


def test_what_happens_after_save_is_not_saved(tmp_path, meshes):
    """The state may be donated and the iterator moved on as soon as `save` returns.

    (On a CPU the pending write holds the buffers themselves, and jax then copies instead.)
    """
    state, iterator = make_state(meshes.first, meshes.rows), numbers(2)
    expected = jax.tree.map(jnp.copy, state)
    store = CheckpointStore(tmp_path)
    store.save(1, make(state, iterator))
    donate = jax.jit(
        lambda s: s.replace(params=jax.tree.map(lambda x: x * 0 - 7, s.params)),
        donate_argnums=0,
    )
    after = donate(donate(state))
    for _ in range(50):
        next(iterator)
    store.close()
    fresh = numbers()
    restored = restore(tmp_path, after, iterator=fresh)
    assert equal(restored.state, expected)
    assert next(fresh) == 2


def test_the_newest_stay(tmp_path, meshes):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 5, 9):
        state = make_state(meshes.first, meshes.rows, scale=step)
        store.save(step, make(state, numbers(step)))
    store.wait()
    assert store.latest_step() == 9
    store.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["5", "9"]
    iterator = numbers()
    restored = restore(tmp_path, state, iterator=iterator)
    assert float(restored.state.params["a"][0, 1]) == 9.0
    assert next(iterator) == 9


def test_half_written_checkpoints_are_ignored(saved, meshes):
    """A temporary folder that a kill left, and a folder of which a copy broke off."""
    good, directory = saved.directory / "5", saved.directory
    shutil.copytree(good, directory / "8.orbax-checkpoint-tmp")
    shutil.copytree(good / "state", directory / "9" / "state")
    restored = restore(directory, saved.state)
    assert equal(restored.state, saved.state)
    assert checkpoint.load_params(directory)[1] == 5
    store = CheckpointStore(directory)
    assert store.latest_step() == 5
    # The run goes on and comes past the broken ones.
    for step in (7, 9):
        state = make_state(meshes.first, meshes.rows, scale=step)
        store.save(step, make(state, numbers(step)))
    store.close()
    assert not list(directory.glob("*tmp*"))
    assert float(restore(directory, state).state.params["a"][0, 1]) == 9.0


def test_other_data_is_refused(saved):
    other = {**FINGERPRINT, "row_length": 16, "seed": 1}
    with pytest.raises(ValueError, match="row_length: saved 8, now 16; seed: saved None, now 1"):
        restore(saved.directory, saved.state, fingerprint=other)
    # Tuples are lists in JSON.
    assert restore(
        saved.directory, saved.state, fingerprint={**FINGERPRINT, "sources": [("s", 3, 0.5)]}
    )


@pytest.mark.parametrize(
    ("params", "ema", "match"),
    [
        ({"a": (8, 4), "b": (3,)}, True, r"params/a: saved \(8, 8\), now \(8, 4\)$"),
        ({"a": (8, 8)}, True, r"params/b: saved \(3,\), now nothing$"),
        ({"a": (8, 8), "b": (3,), "c": (1,)}, True, r"params/c: saved nothing, now \(1,\)$"),
        ({"a": (8, 8), "b": (3,)}, False, r"ema/a: saved \(8, 8\), now nothing; ema/b"),
    ],
)
def test_other_shapes_are_refused(saved, params, ema, match):
    params = {name: jnp.zeros(shape) for name, shape in params.items()}
    state = saved.state.replace(params=params, ema=saved.state.ema if ema else None)
    with pytest.raises(ValueError, match="does not fit the configuration: " + match):
        restore(saved.directory, state)


def test_load_params(saved, tmp_path_factory, meshes, caplog):
    """The average where there is one; on one device; without a warning."""
    with caplog.at_level(logging.WARNING):
        average, step = checkpoint.load_params(saved.directory)
    assert not caplog.records
    assert step == 5
    assert equal(average, saved.state.ema)
    assert average["a"].sharding.device_set == {jax.devices()[0]}
    params, _ = checkpoint.load_params(saved.directory, ema=False)
    assert equal(params, saved.state.params)
    without = tmp_path_factory.mktemp("without")
    store = CheckpointStore(without)
    state = make_state(meshes.first, meshes.rows, ema=False)
    store.save(1, make(state, numbers()))
    store.close()
    assert equal(checkpoint.load_params(without)[0], state.params)


@pytest.mark.parametrize("name", ["", "missing"])
def test_load_params_without_a_checkpoint(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="no finished checkpoint in"):
        checkpoint.load_params(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_trees(tmp_path):
    tree = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.ones((), jnp.bfloat16)}
    checkpoint.save_tree(tmp_path / "tree", {"old": jnp.zeros(2)})
    checkpoint.save_tree(tmp_path / "tree", tree)
    loaded = checkpoint.load_tree(tmp_path / "tree")
    assert equal(loaded, tree)
    assert loaded["b"].dtype == jnp.bfloat16


def make_tree(mesh):
    """Two branches that come in parts, one of them sharded."""
    place = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    return {
        "a": {"x": jax.device_put(jnp.arange(64.0).reshape(8, 8), place), "y": jnp.ones(3)},
        "b": jnp.full((2,), 1.5, jnp.bfloat16),
    }


def test_a_tree_in_parts(tmp_path, meshes, caplog):
    """What `save_tree` writes; not there before it is whole; never more than a part at a time."""
    tree, alive = make_tree(meshes.first), []

    def parts():
        for keys in (("a", "x"), ("a", "y"), ("b",)):
            assert not (tmp_path / "tree").exists()
            # Of the part before, nobody holds the container any more.
            assert [ref() for ref in alive] == [None] * len(alive)
            part = tree[keys[0]] if keys == ("b",) else Part({keys[1]: tree["a"][keys[1]]})
            part = Part({keys[0]: part})
            alive.append(weakref.ref(part))
            yield part
            del part

    with caplog.at_level(logging.WARNING):
        checkpoint.save_tree_in_parts(tmp_path / "tree", parts())
    assert not caplog.records
    assert len(alive) == 3
    checkpoint.save_tree(tmp_path / "whole", tree)
    loaded, whole = (checkpoint.load_tree(tmp_path / name) for name in ("tree", "whole"))
    assert jax.tree.structure(loaded) == jax.tree.structure(whole)
    assert equal(loaded, tree)
    assert equal(whole, tree)
    assert loaded["b"].dtype == jnp.bfloat16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tree", "whole"]
    with pytest.raises(FileExistsError):
        checkpoint.save_tree_in_parts(tmp_path / "tree", [{"c": jnp.ones(1)}])
    assert equal(checkpoint.load_tree(tmp_path / "tree"), tree)


class Part(dict):
    """A dict that can be watched; to jax it is a tree like any other."""


jax.tree_util.register_pytree_with_keys(
    Part,
    lambda part: ([(jax.tree_util.DictKey(k), part[k]) for k in sorted(part)], sorted(part)),
    lambda keys, leaves: Part(zip(keys, leaves, strict=True)),
)


def test_a_tree_whose_parts_stop(tmp_path):
    """It is not there; and what it left does not get into the next attempt."""

    def broken():
        yield {"old": jnp.ones(2)}
        raise OSError("the file is cut off")

    with pytest.raises(OSError, match="cut off"):
        checkpoint.save_tree_in_parts(tmp_path / "tree", broken())
    assert not (tmp_path / "tree").exists()
    checkpoint.save_tree_in_parts(tmp_path / "tree", [{"new": jnp.ones(3)}])
    assert equal(checkpoint.load_tree(tmp_path / "tree"), {"new": jnp.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_stored_params_in_parts(tmp_path, meshes):
    """A part of a tree, in a dtype and on a mesh of one's own."""
    tree = make_tree(meshes.first)
    checkpoint.save_tree(tmp_path / "tree", tree)
    stored = checkpoint.StoredParams(tmp_path / "tree")
    assert stored.step is None
    assert stored.abstract["a"]["x"] == jax.ShapeDtypeStruct((8, 8), jnp.float32)
    assert stored.abstract["b"].dtype == jnp.bfloat16
    part = stored.load({"a": {"y": stored.abstract["a"]["y"]}})
    assert list(part) == ["a"]
    assert equal(part, {"a": {"y": tree["a"]["y"]}})
    assert part["a"]["y"].sharding.device_set == {jax.devices()[0]}
    place = NamedSharding(meshes.second, meshes.columns)
    leaf = jax.ShapeDtypeStruct((8, 8), jnp.bfloat16, sharding=place)
    loaded = stored.load({"a": {"x": leaf}})["a"]["x"]
    assert (loaded.dtype, loaded.sharding) == (jnp.bfloat16, place)
    np.testing.assert_array_equal(loaded, tree["a"]["x"].astype(jnp.bfloat16))


def test_stored_params_of_a_run(saved):
    """Of the average where there is one; other leaves of the state are not touched."""
    stored = checkpoint.stored_params(saved.directory)
    assert stored.step == 5
    assert set(stored.abstract) == {"a", "b"}
    part = stored.load({"b": stored.abstract["b"]})
    assert equal(part, {"b": saved.state.ema["b"]})
    params = checkpoint.stored_params(saved.directory, ema=False)
    assert equal(params.load({"b": params.abstract["b"]}), {"b": saved.state.params["b"]})


def big_state(mesh, spec):
    """A state of half a megabyte that does not compress."""
    noise = jax.random.normal(jax.random.key(3), (256, 256))
    state = make_state(mesh, spec)
    return state.replace(opt_state=({"a": jax.device_put(noise, NamedSharding(mesh, spec))},))


@contextlib.contextmanager
def full_disk(num_bytes=20_000):
    """The kernel refuses files to grow beyond that, as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_fails_the_save_alone(tmp_path, meshes, caplog):
    """The one before stays, what was half written goes, and the next is written as ever."""
    store, state = CheckpointStore(tmp_path), big_state(meshes.first, meshes.rows)
    store.save(2, make(state, numbers(2)))
    store.finish()
    assert (store.num_failed, store.last_save[0]) == (0, 2)
    assert 0 < store.last_save[1] < 60
    with full_disk():
        store.save(4, make(state, numbers(4)))
        store.wait()
    assert store.num_failed == 1
    said = "the checkpoint of step 4 could not be written (the newest is of step 2)"
    assert said in caplog.text
    assert (store.latest_step(), store.last_save[0]) == (2, 2)
    store.save(6, make(state, numbers(6)))
    store.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "6"]
    assert (store.num_failed, store.latest_step(), store.last_save[0]) == (1, 6, 6)
    with full_disk():
        store.save(8, make(state, numbers(8)))
        with pytest.raises(checkpoint.SaveError, match="of step 8 could not be written"):
            store.finish()
    store.close()
    iterator = numbers()
    assert equal(restore(tmp_path, state, iterator=iterator).state, state)
    assert next(iterator) == 6


def test_closing_does_not_hide_an_error(tmp_path, meshes, caplog):
    """A run that ends by an error says that, and only logs what became of the save."""
    store = CheckpointStore(tmp_path)
    with full_disk():
        store.save(4, make(big_state(meshes.first, meshes.rows), numbers(4)))
        store.close()
    assert "checkpoint of step 4 not written" in caplog.text
