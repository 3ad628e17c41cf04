"""Traces of the steps that were asked for, and of no others."""

import os
import signal

import jax
import pytest

from nextstep_jax.training import loop, profiling
from nextstep_jax.training.loop import LoopConfig
from tests.training.test_loop import OPTIMIZER, Toy


class Asking(Toy):
    """Asks for a trace by signal after its sixth step."""

    def num_samples(self, batch):
        number = int(batch["x"][0, 0]) // 8
        if number == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().num_samples(batch)


def traced_steps(folder):
    """The numbers of the steps that the annotations of a trace name."""
    (path,) = folder.rglob("*.xplane.pb")
    events = (
        event
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "toy"
    )
    return sorted({dict(event.stats)["step_num"] for event in events})


def test_by_config_and_by_signal(tmp_path, caplog):
    """Steps 2 and 3 by config; the signal in step 6 asks for 7 and 8."""
    previous = signal.getsignal(signal.SIGUSR1)
    config = LoopConfig(
        num_steps=9, log_every=4, profile_from=2, profile_steps=2, optimizer=OPTIMIZER
    )
    loop.run(Asking(), config, tmp_path)
    assert signal.getsignal(signal.SIGUSR1) is previous
    folders = {path.name: path for path in (tmp_path / "profile").iterdir()}
    assert {name: traced_steps(path) for name, path in folders.items()} == {
        "step-0000002-process-0": [2, 3],
        "step-0000007-process-0": [7, 8],
    }


class Traces:
    """Stands in for jax's profiler; refuses a second trace."""

    def __init__(self, monkeypatch):
        self.calls, self.open = [], False
        monkeypatch.setattr(jax.profiler, "start_trace", self.start)
        monkeypatch.setattr(jax.profiler, "stop_trace", self.stop)

    def start(self, folder):
        if self.open:
            raise RuntimeError("only one profile may be run at a time")
        self.open = True
        self.calls.append(folder.name)

    def stop(self):
        self.open = False
        self.calls.append("stop")


def run_steps(profiler, last):
    """The steps at which the profiler wanted to be turned."""
    due = []
    with profiler:
        for step in range(1, last + 1):
            if profiler.due(step):
                due.append(step)
                profiler.turn(step)
    return due


def test_what_is_asked_is_traced_once(tmp_path, monkeypatch):
    traces = Traces(monkeypatch)
    assert run_steps(profiling.Profiler(tmp_path, 0, 3), 9) == []
    assert traces.calls == []
    assert run_steps(profiling.Profiler(tmp_path, 4, 3), 9) == [4, 7]
    assert traces.calls == ["step-0000004-process-0", "stop"]
    # The run ends, or fails, in the middle of a trace.
    assert run_steps(profiling.Profiler(tmp_path, 8, 3), 9) == [8]
    assert traces.calls[2:] == ["step-0000008-process-0", "stop"]


def test_process_0_traces_by_config_and_every_process_by_signal(tmp_path, monkeypatch):
    traces = Traces(monkeypatch)
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    profiler = profiling.Profiler(tmp_path, 2, 1)
    with profiler:
        assert not profiler.due(2)
        signal.raise_signal(signal.SIGUSR1)
        assert profiler.due(3)
        profiler.turn(3)
        assert not profiler.due(3) and profiler.due(4)
    assert traces.calls == ["step-0000003-process-3", "stop"]


def test_a_trace_of_somebody_else_is_left_alone(tmp_path, monkeypatch, caplog):
    traces = Traces(monkeypatch)
    traces.open = True
    assert run_steps(profiling.Profiler(tmp_path, 2, 3), 5) == [2]
    assert traces.calls == []
    assert "no trace of step 2: only one profile" in caplog.text


@pytest.mark.parametrize(("name", "value"), [("profile_from", -1), ("profile_steps", 0)])
def test_ranges(name, value):
    with pytest.raises(ValueError, match=rf"{name}={value} must be at least"):
        LoopConfig(**{name: value})
