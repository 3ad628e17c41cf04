"""The loop around a task that compiles in a moment; real runs are in test_loop_restart.py."""

import json
import logging
import math
import os
import signal
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from nextstep_jax.training import loop, reporting
from nextstep_jax.training.checkpoint import load_params
from nextstep_jax.training.loop import LoopConfig
from nextstep_jax.training.metrics import JSONL, NonFiniteError, read_metrics
from nextstep_jax.training.optimizer import OptimizerConfig

OPTIMIZER = OptimizerConfig(learning_rate=0.1, warmup_steps=0, ema_decay=0.9)


class Toy:
    """Fits a matrix to numbers; can be told to fail, or to ask for an end, at a batch."""

    name = "toy"

    def __init__(self, nan_at=None, term_at=None):
        self.config = {"toy": True, "loop": {"num_steps": "as the experiment says"}}
        self.fingerprint = {"format": 1}
        self.nan_at, self.term_at = nan_at, term_at
        self.seen, self.iterators = [], []

    def init_params(self, key):
        init = nn.with_logical_partitioning(nn.initializers.normal(), ("embed", "mlp"))
        return {"kernel": init(key, (16, 8))}

    def loss(self, params, batch, key):
        x = batch["x"][:, 0]
        error = jnp.mean((params["kernel"].sum() - jnp.sin(x)) ** 2)
        noise = 0.1 * jax.random.normal(key)
        loss = error + noise * params["kernel"][0, 0]
        if self.nan_at is not None:
            loss = jnp.where(x[0] == 8 * self.nan_at, jnp.nan, loss)
        return loss, {"first": x[0]}

    def dataset(self, process_index, process_count):
        dataset = grain.MapDataset.range(10_000).map(_ToBatch())
        task = self

        class Dataset:
            def __iter__(self):
                task.iterators.append(iter(dataset.to_iter_dataset().batch(8)))
                return task.iterators[-1]

        return Dataset()

    def place(self, mesh, local):
        return loop.to_device(mesh, local)

    def num_samples(self, batch):
        number = int(batch["x"][0, 0]) // 8
        self.seen.append(number)
        if number == self.term_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return len(batch["x"])


class _ToBatch(grain.transforms.Map):
    def map(self, element):
        return {"x": np.full(1, element, np.float32)}


def config(**changes):
    fields = {"num_steps": 10, "checkpoint_every": 4, "log_every": 1, "optimizer": OPTIMIZER}
    return LoopConfig(**{**fields, **changes})


def steps_on_disk(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def curve(workdir):
    names = ("step", "loss", "first", "grad_norm", "learning_rate", "samples")
    return [tuple(line[name] for name in names) for line in read_metrics(workdir)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Task, workdir and last state of an uninterrupted run."""
    task, workdir = Toy(), tmp_path_factory.mktemp("whole")
    return task, workdir, loop.run(task, config(), workdir)


def test_workdir(whole):
    task, workdir, state = whole
    assert int(state.step) == 10
    assert task.seen == list(range(10))
    assert steps_on_disk(workdir) == [8, 10]
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines] == list(range(10))
    assert [line["first"] for line in lines] == [8.0 * i for i in range(10)]
    assert [line["samples"] for line in lines] == [8 * (i + 1) for i in range(10)]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert all(0 <= line["data_wait_share"] <= 1 for line in lines)
    assert list((workdir / "tensorboard").iterdir())
    stored = json.loads((workdir / "config.json").read_text())
    assert stored["toy"]
    # The loop with all its defaults, not the experiment's part of it.
    assert stored["loop"]["optimizer"]["beta2"] == 0.95
    assert stored["loop"]["checkpoint_every"] == 4


def test_the_iterator_is_closed(whole):
    with pytest.raises(ValueError, match="closed"):
        next(whole[0].iterators[0])


def test_report_of_the_memory_comes_before_step_0(tmp_path, caplog):
    task = Toy()
    seen_at_report = []

    class Handler(logging.Handler):
        def emit(self, record):
            if "compiled the step" in record.getMessage():
                seen_at_report.append((list(task.seen), record.getMessage()))

    handler = Handler()
    logging.getLogger().addHandler(handler)
    try:
        with caplog.at_level(logging.INFO):
            loop.run(task, config(num_steps=3), tmp_path)
    finally:
        logging.getLogger().removeHandler(handler)
    ((seen, message),) = seen_at_report
    assert seen == []
    assert "donated" in message
    assert not [r for r in caplog.records if "bytes of the state are donated" in r.getMessage()]


def test_same_run_twice_is_the_same(whole, tmp_path):
    state = loop.run(Toy(), config(), tmp_path)
    assert curve(tmp_path) == curve(whole[1])
    np.testing.assert_array_equal(state.params["kernel"], whole[2].params["kernel"])


def test_initial_values_do_not_depend_on_the_mesh(devices):
    kernels = []
    for mesh in ((("data", 1),), (("fsdp", 2), ("tensor", 4)), (("data", 8),)):
        number = math.prod(size for _, size in mesh)
        setup = loop.set_up(Toy(), config(mesh=mesh), devices[:number])
        with jax.set_mesh(setup.mesh):
            state = setup.init()
        assert state.params["kernel"].sharding == setup.shardings.params["kernel"]
        assert not isinstance(state.params["kernel"], nn.Partitioned)
        kernels.append(np.asarray(state.params["kernel"]))
    np.testing.assert_array_equal(kernels[0], kernels[1])
    np.testing.assert_array_equal(kernels[0], kernels[2])


def test_seed(devices):
    first, second = (
        loop.set_up(Toy(), config(seed=seed), devices[:1]).init().params["kernel"]
        for seed in (0, 1)
    )
    assert not np.array_equal(first, second)


def test_sigterm_saves_and_the_next_start_continues(whole, tmp_path, caplog):
    """At the end of the step in flight, whether or not a checkpoint is due there."""
    previous = signal.getsignal(signal.SIGTERM)
    task = Toy(term_at=5)
    with caplog.at_level(logging.WARNING):
        state = loop.run(task, config(), tmp_path)
    assert int(state.step) == 6
    assert steps_on_disk(tmp_path) == [4, 6]
    assert "stopped at step 6" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is previous
    again = Toy()
    loop.run(again, config(), tmp_path)
    assert again.seen == list(range(6, 10))
    assert curve(tmp_path) == curve(whole[1])
    seconds = [line["seconds"] for line in read_metrics(tmp_path)]
    assert seconds == sorted(seconds)  # the clock goes on


def test_lines_of_lost_steps_are_cut(whole, tmp_path):
    """A crash after step 7 loses three steps, which come again, once."""

    class Crash(Toy):
        def num_samples(self, batch):
            if int(batch["x"][0, 0]) // 8 == 7:
                raise OSError("crash")
            return super().num_samples(batch)

    crashing = Crash()
    with pytest.raises(OSError, match="crash"):
        loop.run(crashing, config(), tmp_path)
    assert steps_on_disk(tmp_path) == [4]
    assert len(read_metrics(tmp_path)) == 6  # metrics are handed on one step late
    with pytest.raises(ValueError, match="closed"):
        next(crashing.iterators[0])
    again = Toy()
    loop.run(again, config(), tmp_path)
    assert again.seen == [4, 5, 6, 7, 8, 9]
    assert curve(tmp_path) == curve(whole[1])


def test_a_finished_run_does_nothing_more(tmp_path):
    loop.run(Toy(), config(num_steps=4), tmp_path)
    before = (tmp_path / JSONL).read_bytes()
    task, called = Toy(), []
    state = loop.run(task, config(num_steps=4, hook_every=1), tmp_path, [called.append])
    assert (int(state.step), task.seen, called) == (4, [], [])
    assert (tmp_path / JSONL).read_bytes() == before


def test_a_longer_run_continues(whole, tmp_path):
    loop.run(Toy(), config(num_steps=5), tmp_path)
    loop.run(Toy(), config(), tmp_path)
    assert curve(tmp_path) == curve(whole[1])


@pytest.mark.parametrize(
    ("nan_at", "kept"),
    [
        (0, []),  # nothing was saved, and nothing is
        (3, []),  # the batch right before the save of step 4: known only a step later
        (4, [4]),  # the first one after it
        (7, [4]),  # right before the save of step 8
        (9, [4, 8]),  # the last step: right before the final save
    ],
)
def test_nan_stops_and_is_never_saved(tmp_path, nan_at, kept):
    task = Toy(nan_at=nan_at)
    match = rf"step {nan_at + 1}: .*'loss': nan.*last good checkpoint is kept"
    with pytest.raises(NonFiniteError, match=match):
        loop.run(task, config(), tmp_path)
    assert steps_on_disk(tmp_path) == kept
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(nan_at))
    assert len(task.seen) <= nan_at + 2  # at most one step has run after it
    if kept:
        params, step = load_params(tmp_path / "checkpoints", ema=False)
        assert step == kept[-1]
        assert np.isfinite(np.asarray(params["kernel"])).all()


def test_nan_and_sigterm_together(tmp_path):
    """SIGTERM during the bad step must not save it either."""
    with pytest.raises(NonFiniteError, match="step 6"):
        loop.run(Toy(nan_at=5, term_at=5), config(), tmp_path)
    assert steps_on_disk(tmp_path) == [4]


def test_parameters_that_overflow_stop_too(tmp_path):
    """The gradient is clipped and finite, the loss was computed before the update."""
    rate = OptimizerConfig(learning_rate=1e38, warmup_steps=0, eps=1e-8, weight_decay=1e3)
    with pytest.raises(NonFiniteError, match=r"step \d: .*'(param|update)_norm': (inf|nan)"):
        loop.run(Toy(), config(optimizer=rate, checkpoint_every=1), tmp_path)
    if steps_on_disk(tmp_path):
        params, _ = load_params(tmp_path / "checkpoints", ema=False)
        assert np.isfinite(np.asarray(params["kernel"])).all()


def test_hooks(tmp_path):
    """At intervals and at the end, with the state of that step, between steps."""
    task, calls = Toy(), []

    def hook(step, state, writer):
        lines = len(read_metrics(tmp_path))
        calls.append((step, int(state.step), len(task.seen), lines))
        writer.write(step, {"hooked": 1.0})

    loop.run(task, config(hook_every=4), tmp_path, [hook])
    # The lines of all steps before are on disk, plus what earlier calls wrote.
    assert calls == [(4, 4, 4, 4), (8, 8, 8, 9), (10, 10, 10, 12)]
    never = []
    loop.run(Toy(), config(num_steps=12, hook_every=0), tmp_path, [lambda *a: never.append(a)])
    assert never == []


def test_lines_at_intervals(tmp_path):
    loop.run(Toy(), config(log_every=4), tmp_path)
    # After updates 1, 4, 8 and the last.
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 3, 7, 9]


def test_other_data_is_refused(tmp_path):
    loop.run(Toy(), config(num_steps=2), tmp_path)
    task = Toy()
    task.fingerprint = {"format": 2}
    with pytest.raises(ValueError, match="format: saved 1, now 2"):
        loop.run(task, config(), tmp_path)
    with pytest.raises(ValueError, match=r"ema/kernel: saved \(16, 8\), now nothing"):
        loop.run(Toy(), config(optimizer=OptimizerConfig()), tmp_path)
    assert steps_on_disk(tmp_path) == [2]


def test_rows_that_do_not_divide(tmp_path):
    mesh = (("data", 8),)

    class Odd(Toy):
        def dataset(self, process_index, process_count):
            return grain.MapDataset.range(100).map(_ToBatch()).to_iter_dataset().batch(6)

    with pytest.raises(ValueError, match="batch of 6 rows does not divide over mesh"):
        loop.run(Odd(), config(mesh=mesh), tmp_path)


def test_the_share_of_time_that_data_are_waited_for():
    """A dataset that takes 30 ms between steps of 10 ms; then one that is quick."""

    def slow():
        for number in range(8):
            time.sleep(0.03 if number < 4 else 0.0)
            yield number

    watch = reporting.DataWatch(slow())
    shares = []
    for _ in range(2):
        for _ in range(4):
            watch.next()
            time.sleep(0.01)
        shares.append(watch.report()["data_wait_share"])
    assert 0.5 < shares[0] < 0.85 and shares[1] < 0.1
