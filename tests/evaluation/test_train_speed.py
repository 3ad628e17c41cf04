import dataclasses
import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextstep_jax.data.schema import KINDS
from nextstep_jax.evaluation import train_speed
from nextstep_jax.models import flops
from nextstep_jax.models.config import nextstep_config
from nextstep_jax.training.experiment import build_model_config
from nextstep_jax.training.losses import gather_image_positions

# Of tests/parity/test_train_step.py too, so that the same step is compiled once.
MODEL = build_model_config(
    {
        "size": "tiny",
        "decoder": {
            "embed_dim": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "mlp_dim": 48,
        },
        "flow_head": {"width": 24, "num_layers": 1},
    }
)
SETTING = train_speed.Setting(MODEL, rows=2, length=48, repeats=3)


@pytest.mark.parametrize(("length", "side"), [(48, 2), (512, 8), (4096, 16)])
def test_packed_rows(length, side):
    config = nextstep_config("14b")
    batch = train_speed.packed_rows(config, 2, length, seed=3)
    for row in range(2):
        ids, segments, positions = (
            batch[name][row] for name in ("token_ids", "segment_ids", "positions")
        )
        text, image, kinds = (
            batch[name][row] for name in ("text_weights", "image_weights", "kinds")
        )
        # At most one position is left over, and segments follow each other.
        assert np.count_nonzero(segments == 0) <= 1
        assert set(np.diff(segments[segments > 0])) == {0, 1}
        assert segments.max() >= 3
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            np.testing.assert_array_equal(positions[inside], np.arange(inside.sum()))
            assert text[inside][0] == 0 and np.all((text + image)[inside][1:] == 1)
            ours = ids[inside]
            is_pair = config.boi_id in ours
            assert np.count_nonzero(ours == config.image_placeholder_id) == is_pair * side**2
            assert set(kinds[inside]) == {1 + KINDS.index("pair" if is_pair else "text")}
            if is_pair:
                assert ours[-1] == config.eoi_id
                assert ours[-(side**2) - 2] == config.boi_id
                assert 8 <= len(ours) - side**2 - 2 <= 128
        np.testing.assert_array_equal(image > 0, ids == config.image_placeholder_id)
        assert np.all(batch["latents"][row][image == 0] == 0)
    assert abs(np.std(batch["latents"][batch["image_weights"] > 0]) - 1) < 0.1
    again = train_speed.packed_rows(config, 2, length, seed=3)
    assert all(np.array_equal(batch[name], again[name]) for name in batch)
    other = train_speed.packed_rows(config, 2, length, seed=4)["token_ids"]
    assert not np.array_equal(batch["token_ids"], other)


@pytest.fixture(scope="module")
def trainer():
    batch = train_speed.packed_rows(SETTING.model, SETTING.rows, SETTING.length)
    return train_speed.Trainer(SETTING, batch), batch


def test_first_draws_are_those_of_the_gathered_positions(trainer):
    ours, batch = trainer
    # One image token fewer in the first row, so that its gathered positions are filled up.
    batch = {**batch, "image_weights": batch["image_weights"].copy()}
    batch["image_weights"][0, np.flatnonzero(batch["image_weights"][0])[0]] = 0
    key = ours.state.key
    times, noise = train_speed.draws_of_step(ours.objective, batch, key, 0)
    drawn = jax.tree.map(np.asarray, ours.objective.draw(batch, jax.random.fold_in(key, 0)))
    number = ours.objective.num_positions
    order, weights = gather_image_positions(jnp.asarray(batch["image_weights"]), number)
    order, weights = np.asarray(order), np.asarray(weights)
    count = int(np.count_nonzero(batch["image_weights"]))
    draws = SETTING.model.flow_head.draws_per_token
    assert times.shape == (draws, count)
    assert noise.shape == (draws, count, SETTING.model.token_dim)
    flat = 0
    for row in range(SETTING.rows):
        for slot in range(number):
            if weights[row, slot] == 0:
                continue
            assert batch["image_weights"][row, order[row, slot]] == 1
            np.testing.assert_array_equal(times[:, flat], drawn["times"][row, :, slot])
            np.testing.assert_array_equal(noise[:, flat], drawn["noise"][row, :, slot])
            flat += 1
    assert flat == count


def test_run(trainer, monkeypatch):
    """Figures follow from the times; the step moves the parameters of the trainer's own."""
    ours, batch = trainer
    monkeypatch.setattr(train_speed, "Trainer", lambda *_: ours)
    monkeypatch.setattr(flops, "peak_flops", lambda kind, dtype: 1e12 if dtype == "float32" else 0)
    before = np.asarray(ours.state.params["embed_tokens"])
    report = train_speed.run(SETTING)
    assert json.loads(json.dumps(report)) == report
    # One step to compare and one to warm up, then the timed ones.
    assert int(ours.state.step) == 2 + SETTING.repeats
    moved = np.abs(np.asarray(ours.state.params["embed_tokens"]) - before).max()
    assert 1e-5 < moved < (2 + SETTING.repeats) * 1.2e-4

    figures = report["jax"]
    assert len(figures["times_s"]) == SETTING.repeats
    assert figures["median_s"] == sorted(figures["times_s"])[1] > 0
    assert len(figures["processor_s"]) == SETTING.repeats and min(figures["processor_s"]) > 0
    assert figures["compile_s"] == ours.compile_s > 0
    assert figures["tokens_per_s"] == pytest.approx(2 * 48 / figures["median_s"])
    documents = [np.bincount(row[row > 0]) for row in batch["segment_ids"]]
    sizes = np.concatenate(documents)
    expected = flops.training_flops(
        SETTING.model,
        rows=2,
        length=48,
        positions=int(sizes.sum()),
        attention_pairs=int((sizes * (sizes + 1)).sum()) // 2,
        text_positions=int(batch["text_weights"].sum()),
        image_positions=int(batch["image_weights"].sum()),
    )
    # A bound of whole rows would flatter both sides.
    most = flops.training_flops(SETTING.model, rows=2, length=48, image_positions=2 * 48)
    assert expected.total < 0.8 * most.total
    assert report["flops_per_step"]["total"] == expected.total
    assert figures["flops_per_s"] == pytest.approx(expected.total / figures["median_s"])
    assert figures["mfu"] == pytest.approx(figures["flops_per_s"] / 1e12)
    assert figures["first_step"]["loss"] > 1
    assert report["settings"]["image_tokens"] == np.count_nonzero(batch["image_weights"])
    assert report["settings"]["parameters"] == sum(
        leaf.size for leaf in jax.tree.leaves(ours.state.params)
    )
    assert "torch" not in report and "ratio" not in report


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "rows=0 must be at least 1"),
        ({"length": 31}, "length=31 must be at least 32"),
        ({"rows": 3, "accumulate": 2}, "rows=3 must be a multiple of accumulate=2"),
        ({"mesh": (("fsdp", -1),)}, "every size must be given"),
        ({"against": "tensorflow"}, r"against='tensorflow' is unknown; choose from \['torch'\]"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTING, **changes)


def test_without_pytorch_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"pip install nextstep_jax\[parity\]"):
        dataclasses.replace(SETTING, against="torch")


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs [parity]")
def test_pytorch_runs_on_one_device():
    with pytest.raises(ValueError, match="one device and does not accumulate"):
        dataclasses.replace(SETTING, against="torch", mesh=(("fsdp", 2),))


def test_more_devices_than_there_are():
    with pytest.raises(ValueError, match="a mesh of 999 devices, but there are 8"):
        train_speed.first_devices(999)
    assert train_speed.first_devices(2) == jax.devices()[:2]
