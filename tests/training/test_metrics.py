import json
import logging
import math
import sys
import types

import jax
import numpy as np
import pytest

from nextstep_jax.training import metrics


def write_steps(workdir, start, stop, **more):
    writer = metrics.MetricsWriter(workdir, start, 10, "test")
    for step in range(start, stop):
        writer.write(step, {"loss": 1.0 / (step + 3), **more})
        writer.progress(step + 1, {"loss": "0.5"})
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
    writer.move(1)
    writer.progress(1, {"loss": "1"})
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


def test_a_log_file_gets_a_progress_line_now_and_then(tmp_path, monkeypatch, caplog):
    """At once, then half a minute apart, and at the end; nothing for steps without a line."""
    now = [1000.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    writer = metrics.MetricsWriter(tmp_path, 0, 10, "model")
    with caplog.at_level(logging.INFO):
        for step in range(1, 11):
            writer.move(step)
            writer.progress(step, {"loss": f"{step / 4:g}", "ETA": "0:00:07"})
            now[0] += 11.0
    writer.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"model {step}/10: loss {step / 4:g}, ETA 0:00:07" for step in (1, 4, 7, 10)
    ]


def test_a_terminal_gets_one_line_that_moves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    writer = metrics.MetricsWriter(tmp_path, 3, 10, "model")
    writer.move(5)
    writer.progress(6, {"loss": "2.5", "ETA": "0:00:07"})
    writer.close()
    shown = capsys.readouterr().err
    assert "model  30%" in shown and " 3/10" in shown
    assert shown.rstrip().endswith("6/10, loss 2.5, ETA 0:00:07")


class Wandb(types.ModuleType):
    """Notes what is asked of Weights & Biases."""

    def __init__(self):
        super().__init__("wandb")
        self.calls, self.logged, self.finished = [], [], 0
        self.Image = lambda pixels: ("picture", pixels.shape)

    def init(self, **settings):
        self.calls.append(settings)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_weights_and_biases(tmp_path, monkeypatch):
    """Opened once a start, under the same id; steps as in the lines; ended with the run."""
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    metrics.check_wandb("project")
    for start in (0, 2):
        writer = metrics.MetricsWriter(tmp_path, start, 4, "model", "project", {"seed": 3})
        for step in (start, start + 1):
            writer.write(step, {"loss": 0.5 * step})
        writer.image(start + 2, "samples", np.zeros((4, 5, 3), np.uint8))
        writer.close()
    first, second = wandb.calls
    assert first == second
    assert (first["project"], first["resume"], first["config"]) == ("project", "allow", {"seed": 3})
    assert first["id"] == (tmp_path / metrics.WANDB_ID).read_text().strip() and first["id"]
    assert wandb.logged == [
        (0, {"loss": 0.0}),
        (1, {"loss": 0.5}),
        (2, {"samples": ("picture", (4, 5, 3))}),
        (2, {"loss": 1.0}),
        (3, {"loss": 1.5}),
        (4, {"samples": ("picture", (4, 5, 3))}),
    ]
    assert wandb.finished == 2
    other = tmp_path / "other"
    other.mkdir()
    metrics.MetricsWriter(other, 0, 4, "model", "project").close()
    assert wandb.calls[2]["id"] != first["id"]


def test_weights_and_biases_on_process_0_alone(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = metrics.MetricsWriter(tmp_path, 0, 4, "model", "project")
    writer.write(0, {"loss": 1.0})
    writer.close()
    assert (wandb.calls, wandb.logged, list(tmp_path.iterdir())) == ([], [], [])


def test_weights_and_biases_that_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    metrics.check_wandb("")
    with pytest.raises(ValueError, match=r"loop.wandb_project='p' .*nextstep_jax\[wandb\]"):
        metrics.check_wandb("p")
