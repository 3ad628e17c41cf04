import json
import math

import jax
import numpy as np
import pytest

from nextstep_jax.training import metrics


def write_steps(workdir, start, stop, **more):
    writer = metrics.MetricsWriter(workdir, start, 10, "test")
    for step in range(start, stop):
        writer.write(step, {"loss": 1.0 / (step + 3), **more})
        writer.progress(step + 1, {"loss": 0.5})
    writer.close()


def test_lines_are_exact(tmp_path):
    write_steps(tmp_path, 0, 3)
    lines = metrics.read_metrics(tmp_path)
    # Bit for bit: JSON keeps every digit of a double.
    assert lines == [{"step": i, "loss": 1.0 / (i + 3)} for i in range(3)]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_no_file_is_no_lines(tmp_path):
    assert metrics.read_metrics(tmp_path) == []


def test_steps_that_come_again_are_cut(tmp_path):
    write_steps(tmp_path, 0, 6, run=1)
    write_steps(tmp_path, 4, 8, run=2)
    lines = metrics.read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(8))
    assert [line["run"] for line in lines] == [1] * 4 + [2] * 4


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_torn_by_a_kill_is_left_out(tmp_path, cut):
    write_steps(tmp_path, 0, 6)
    path = tmp_path / metrics.JSONL
    path.write_text(path.read_text()[:-cut])
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == list(range(5))
    write_steps(tmp_path, 4, 6)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(6))


def test_lines_are_on_disk_at_once(tmp_path):
    """A kill after a checkpoint must not take lines from before it."""
    writer = metrics.MetricsWriter(tmp_path, 0, 10, "test")
    writer.write(0, {"loss": 1.0})
    assert metrics.read_metrics(tmp_path) == [{"step": 0, "loss": 1.0}]
    writer.close()


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = metrics.MetricsWriter(tmp_path, 0, 10, "test")
    writer.write(0, {"loss": 1.0})
    writer.progress(1, {"loss": 1.0})
    writer.image(0, "picture", np.zeros((2, 2, 3), np.uint8))
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_pictures_go_to_tensorboard(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, 0, 10, "test")
    writer.image(3, "picture", np.full((4, 5, 3), 200, np.uint8))
    writer.close()
    (events,) = (tmp_path / "tensorboard").glob("events*")
    assert b"picture" in events.read_bytes()
    assert b"PNG" in events.read_bytes()


@pytest.mark.parametrize("name", ["loss", "grad_norm", "param_norm", "update_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_check_finite(name, value):
    values = {"loss": 1.0, "grad_norm": 2.0, "other": math.nan}
    metrics.check_finite(7, values)
    with pytest.raises(metrics.NonFiniteError, match=rf"step 7: .*'{name}'.*last good checkpoint"):
        metrics.check_finite(7, {**values, name: value})
