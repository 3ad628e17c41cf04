import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextstep_jax.evaluation import checkpoint_speed
from nextstep_jax.models.config import DecoderConfig, FlowHeadConfig, NextStepConfig

SETTING = checkpoint_speed.Setting(
    gigabytes=1.5e-3,
    mesh=(("fsdp", 4),),
    other_mesh=(("fsdp", 2), ("tensor", 2)),
    repeats=2,
    decoder=DecoderConfig(
        vocab_size=64, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64
    ),
    flow_head=FlowHeadConfig(width=32, num_layers=1, frequency_dim=16),
)


@pytest.fixture(scope="module")
def state():
    abstract = checkpoint_speed.abstract_state(checkpoint_speed.sized_config(SETTING), SETTING.mesh)
    return checkpoint_speed.random_state(abstract)


def num_floats(tree):
    return sum(x.size for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating))


def test_the_state_is_as_large_as_asked_for_and_no_larger(state):
    assert 4 * num_floats(state) >= 1.5e6
    layer = sum(leaf[0].size for leaf in jax.tree.leaves(state.params["decoder"]["layers"]))
    assert 4 * num_floats(state) - 12 * layer < 1.5e6
    # Parameters and both moments.
    assert num_floats(state) == 3 * num_floats(state.params)


def test_the_default_state_has_three_gigabytes():
    config = checkpoint_speed.sized_config(checkpoint_speed.Setting())
    d, width = config.decoder, config.flow_head.width
    assert isinstance(config, NextStepConfig)
    layer = d.embed_dim * (2 * d.embed_dim + 2 * d.num_kv_heads * d.head_dim + 3 * d.mlp_dim)
    head = config.flow_head.num_layers * 5 * width**2
    least = 12 * (d.num_layers * layer + 2 * d.vocab_size * d.embed_dim + head)
    assert 2.9e9 < least < 3.2e9


def test_values_are_random_and_laid_out(state):
    kernel = state.params["decoder"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {
        (kernel.shape[0], kernel.shape[1] // 4, kernel.shape[2])
    }
    values = np.asarray(kernel)
    assert abs(values.std() - 1) < 0.02 and abs(values.mean()) < 0.02
    assert np.unique(values).size > 0.99 * values.size
    assert int(state.step) == 0


def test_same_sees_one_bit(state):
    copy = jax.tree.map(lambda leaf: leaf, state)
    assert checkpoint_speed.same(state, copy)
    scale = state.params["decoder"]["final_norm"]["scale"]
    copy.params["decoder"]["final_norm"]["scale"] = scale.at[-1].set(
        jnp.nextafter(scale[-1], jnp.float32(9))
    )
    assert not checkpoint_speed.same(state, copy)


def test_plain_files_hold_every_value_once(state, tmp_path):
    folder = tmp_path / "plain"
    checkpoint_speed.write_plainly(folder, state)
    files = sorted(folder.glob("*.npy"), key=lambda path: int(path.stem))
    leaves = jax.tree.leaves(state)
    assert len(files) == len(leaves)
    for file, leaf in zip(files, leaves, strict=True):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        stream, parts = io.BytesIO(file.read_bytes()), []
        while stream.tell() < len(stream.getvalue()):
            parts.append(np.load(stream))
        values = np.concatenate([part.ravel() for part in parts])
        np.testing.assert_array_equal(np.sort(values), np.sort(np.asarray(leaf).ravel()))
    keys = 8
    assert checkpoint_speed.read_plainly(folder) == 4 * num_floats(state) + keys + sum(
        leaf.nbytes for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.integer)
    )


def test_run(tmp_path):
    report = checkpoint_speed.run(dataclasses.replace(SETTING, directory=str(tmp_path)))
    assert json.loads(json.dumps(report)) == report
    assert list(tmp_path.iterdir()) == []
    assert len(report["rounds"]) == 2
    assert 1.5e6 <= report["state_bytes"] < report["peak_memory_bytes"]
    for one in report["rounds"]:
        assert 0 < one["save_blocking_s"] < one["save_s"]
        # Normal values lose less than a tenth to compression.
        assert one["file_bytes"] > 0.9 * report["state_bytes"]
    for name in ("save", "restore", "restore_other_mesh", "numpy_save", "numpy_load"):
        seconds = np.median([one[f"{name}_s"] for one in report["rounds"]])
        assert report["medians"][f"{name}_s"] == pytest.approx(seconds)
        rate = report["state_bytes"] / 1e9 / seconds
        assert report["gigabytes_per_s"][name] == pytest.approx(rate)


def test_other_values_than_were_saved_are_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint_speed, "same", lambda *_: False)
    with pytest.raises(RuntimeError, match="restore: other values than were saved"):
        checkpoint_speed.run(dataclasses.replace(SETTING, directory=str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gigabytes": 0.0}, "gigabytes=0.0 must be positive"),
        ({"repeats": 0}, "repeats=0 must be at least 1"),
        ({"directory": "/no/such/folder"}, "dir='/no/such/folder' is not a folder"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTING, **changes)
