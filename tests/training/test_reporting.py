"""What a run shows: when the device is read, means, rates, losses by kind and by time."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextstep_jax.data.schema import KINDS
from nextstep_jax.models.nextstep import NextStep
from nextstep_jax.parallel.mesh import make_mesh
from nextstep_jax.training import loop, pretrain, reporting
from nextstep_jax.training.checkpoint import load_params
from nextstep_jax.training.loop import LoopConfig
from nextstep_jax.training.metrics import MetricsWriter, NonFiniteError, read_metrics
from nextstep_jax.training.optimizer import OptimizerConfig
from nextstep_jax.training.pretrain import LossConfig, NextStepObjective, PositionLosses
from nextstep_jax.training.reporting import RunReport, Yardstick
from nextstep_jax.training.state import init_state, make_train_step
from tests import tiny_model
from tests.training.test_loop import OPTIMIZER, Toy

GIB = 2**30


# ----- When the device is read -----


class Device:
    """Steps of `seconds` each, one after another, on a clock of its own that waiting moves."""

    def __init__(self, monkeypatch, seconds=2.0):
        self.now, self.seconds, self.free_at = 100.0, seconds, 100.0
        self.waited, self.read = [], []
        monkeypatch.setattr(reporting.time, "monotonic", lambda: self.now)

    def send(self, step, **values):
        """The metrics of a step that starts when the device is free."""
        self.free_at = max(self.free_at, self.now) + self.seconds
        return {name: Scalar(self, step, value, self.free_at) for name, value in values.items()}


class Scalar:
    """A value that is there once its step is done."""

    def __init__(self, device, step, value, ready_at):
        self.device, self.step, self.value, self.ready_at = device, step, value, ready_at

    def _wait(self, seen):
        self.device.now = max(self.device.now, self.ready_at)
        seen.append(self.step)

    def block_until_ready(self):
        self._wait(self.device.waited)
        return self

    def __array__(self, dtype=None, copy=None):
        self._wait(self.device.read)
        return np.asarray(self.value, dtype)


class Writer(MetricsWriter):
    """Keeps what is written."""

    def __init__(self):
        self.lines, self.shown = [], []

    def write(self, step, values):
        self.lines.append({"step": step, **values})

    def move(self, step):
        pass

    def progress(self, step, shown):
        self.shown.append((step, shown))


def every(number):
    return lambda step: step % number == 0


def test_nothing_is_read_between_lines(monkeypatch):
    """Lines after steps 4 and 8, read when 5 and 9 were sent; else the host stays 2 ahead."""
    device, writer = Device(monkeypatch), Writer()
    report = RunReport(every(4), writer, 9)
    read, waited = {}, {}
    for step in range(1, 10):
        report.push(step, device.send(step, loss=1.0), {"samples": step, "seconds": 0.0})
        read[step], waited[step] = device.read, device.waited
        device.read, device.waited = [], []
    assert {step: found for step, found in read.items() if found} == {
        5: [1, 2, 3, 4],
        9: [5, 6, 7, 8],
    }
    # Where a line has just been read there is nothing left to wait for.
    assert {step: found for step, found in waited.items() if found} == {
        3: [1],
        4: [2],
        7: [5],
        8: [6],
    }


@pytest.mark.parametrize("log_every", [1, 4, 1000])
def test_the_device_is_never_idle(monkeypatch, log_every):
    """1.5 of its 2 seconds the host is busy with each step: 300 steps take 600 seconds."""
    device = Device(monkeypatch)
    report = RunReport(every(log_every), Writer(), 300)
    for step in range(1, 301):
        device.now += 1.5
        report.push(step, device.send(step, loss=1.0), {"samples": step, "seconds": 0.0})
        # The host does not run away either: what waits for the device fills its memory.
        assert device.free_at - device.now <= 2 * device.seconds
    assert device.free_at == 100 + 1.5 + 300 * device.seconds


def test_unread_steps_do_not_pile_up(monkeypatch):
    """Without any line they are read in passing, when they are long done."""
    device = Device(monkeypatch)
    report = RunReport(lambda step: False, Writer(), 1000)
    for step in range(1, 1001):
        report.push(step, device.send(step, loss=1.0), {"samples": step, "seconds": 0.0})
        assert len(report._unread) <= reporting._MOST_UNREAD + 1
        assert device.now <= 100 + max(step - 2, 0) * device.seconds
    assert device.read == list(range(1, device.read[-1] + 1)) and device.read[-1] > 800


def test_the_loop_reads_arrays_at_lines_alone(tmp_path, monkeypatch):
    """Every reading of a jax array by the host is counted, step by step."""
    reads, per_step = [], []
    array = type(jnp.zeros(()))
    value = array._value
    monkeypatch.setattr(array, "_value", property(lambda x: reads.append(1) or value.fget(x)))

    class Counting(Toy):
        def num_samples(self, batch):
            per_step.append(len(reads))
            return super().num_samples(batch)

    changes = {"num_steps": 13, "checkpoint_every": 100, "optimizer": OPTIMIZER}
    loop.run(Counting(), LoopConfig(log_every=5, **changes), tmp_path / "rare")
    # Called once a step, before its push: a difference belongs to the push of the step before.
    # Lines are due after steps 1, 5, 10 (and 13), and read when the next one was sent.
    assert (np.flatnonzero(np.diff(per_step)) + 1).tolist() == [2, 6, 11]
    per_step.clear()
    loop.run(Counting(), LoopConfig(log_every=1, **changes), tmp_path / "always")
    assert (np.diff(per_step) > 0).tolist() == [False] + [True] * 11


def test_nan_between_lines_is_named_and_never_saved(tmp_path):
    """Step 6 is bad, lines come after steps 1 and 10, a checkpoint was due after step 8."""
    config = LoopConfig(num_steps=20, checkpoint_every=4, log_every=10, optimizer=OPTIMIZER)
    with pytest.raises(NonFiniteError, match=r"step 6: .*'loss': nan"):
        loop.run(Toy(nan_at=5), config, tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0]
    params, step = load_params(tmp_path / "checkpoints", ema=False)
    assert step == 4 and np.isfinite(params["kernel"]).all()


# ----- What a line says -----


def push_all(report, device, values, samples=3, tokens=10):
    for step, (loss, rare) in enumerate(values, 1):
        metrics = device.send(step, loss=loss, rare=rare, learning_rate=0.1 * step, padding=0.25)
        extra = {"samples": samples * step, "seconds": 0.0}
        report.push(step, metrics, extra, tokens)


def test_lines_are_means_over_their_steps(monkeypatch):
    device, writer = Device(monkeypatch), Writer()
    values = [(1.0, math.nan), (2.0, 4.0), (6.0, 8.0), (4.0, math.nan), (4.0, math.nan), (7.0, 1.0)]
    values += [(5.0, math.nan)] * 3
    report = RunReport(every(3), writer, 9)
    push_all(report, device, values)
    report.flush()
    assert [line["step"] for line in writer.lines] == [2, 5, 8]
    assert [line["loss"] for line in writer.lines] == [3.0, 5.0, 5.0]
    # Steps without a rare kind do not count for it.
    assert [line.get("rare") for line in writer.lines] == [6.0, 1.0, None]
    assert [line["learning_rate"] for line in writer.lines] == pytest.approx([0.3, 0.6, 0.9])


def test_a_checkpoint_begins_a_new_mean(tmp_path):
    """A run killed after step 7 and continued from step 4 writes the lines of one that was not."""
    changes = {"checkpoint_every": 4, "log_every": 3, "optimizer": OPTIMIZER}
    loop.run(Toy(), LoopConfig(num_steps=10, **changes), tmp_path / "whole")

    class Crash(Toy):
        def num_samples(self, batch):
            if int(batch["x"][0, 0]) // 8 == 6:
                raise OSError("crash")
            return super().num_samples(batch)

    with pytest.raises(OSError, match="crash"):
        loop.run(Crash(), LoopConfig(num_steps=10, **changes), tmp_path / "cut")
    loop.run(Toy(), LoopConfig(num_steps=10, **changes), tmp_path / "cut")
    curves = [
        [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(tmp_path / name)]
        for name in ("whole", "cut")
    ]
    assert [step for step, *_ in curves[0]] == [0, 2, 5, 8, 9]
    assert curves[0] == curves[1]


class Store:
    """Takes 5 seconds of the host's time, and 30 until all is on disk."""

    def __init__(self, device):
        self.device, self.last_save = device, None

    def save(self, step, checkpoint):
        self.device.now += 5.0
        self.last_save = (step, 30.0)


def test_rates(monkeypatch):
    """Steps of 2 seconds with 3 samples and 10 tokens each; saves and hooks do not count.

    The batches are not alike: every third needs twice the FLOPs, 24 TFLOP a line.
    """
    device, writer = Device(monkeypatch), Writer()
    yardstick = Yardstick(peak_flops_per_device=1e12)
    report, store = RunReport(every(3), writer, 12, yardstick), Store(device)
    device.now += 40.0  # compiling
    report.begin(0, compile_seconds=40.0)
    for step in range(1, 13):
        metrics = device.send(step, loss=1.0, padding=0.25)
        flops = 12e12 if step % 3 == 1 else 6e12
        report.push(step, metrics, {"samples": 3 * step, "seconds": 0.0}, tokens=10, flops=flops)
        if step in (4, 6):
            report.save(store, step, None)
        if step == 6:
            with report.pause():
                device.now += 7.0
    report.flush()
    count = jax.device_count()
    assert [line["step"] for line in writer.lines] == [2, 5, 8, 11]
    for line in writer.lines:
        assert line["seconds_per_step"] == pytest.approx(2.0)
        assert line["samples_per_second"] == pytest.approx(1.5)
        assert line["tokens_per_second"] == pytest.approx(5.0)
        assert line["tokens_per_second_without_padding"] == pytest.approx(3.75)
        assert line["tflops_per_device"] == pytest.approx(4.0 / count)
        assert line["mfu"] == pytest.approx(4.0 / count)
    names = ("compile_seconds", "checkpoint_blocking_seconds", "checkpoint_seconds")
    assert [[line.get(name) for name in names] for line in writer.lines] == [
        [40.0, None, None],
        [None, 5.0, 30.0],
        [None, 5.0, 30.0],
        [None, None, None],
    ]
    # From the line at 3 to that at 6 pass 6 seconds of steps and 5 of a save.
    assert writer.shown[0][1].get("ETA") is None
    assert writer.shown[1] == (6, writer.shown[1][1] | {"ETA": "0:00:22"})
    assert writer.shown[1][1]["tokens/s"] == "5" and writer.shown[1][1]["step"] == "2s"


def test_no_flops_without_a_peak(monkeypatch):
    device, writer = Device(monkeypatch), Writer()
    for yardstick, flops, names in (
        (Yardstick(1e12), 0.0, set()),
        (None, 1e12, {"tflops_per_device"}),
        (Yardstick(None), 1e12, {"tflops_per_device"}),
        (Yardstick(1e12), 1e12, {"tflops_per_device", "mfu"}),
    ):
        report = RunReport(every(1), writer, 12, yardstick)
        report.push(1, device.send(1, loss=1.0), {"samples": 3, "seconds": 0.0}, 10, flops)
        report.flush()
        assert {"tflops_per_device", "mfu"} & set(writer.lines[-1]) == names


def test_flops_are_those_of_the_batches_since_the_last_line(monkeypatch):
    device, writer = Device(monkeypatch), Writer()
    report = RunReport(every(2), writer, 6, Yardstick(1e12))
    for step, flops in enumerate((1e12, 2e12, 0.0, 8e12, 5e12, 5e12), 1):
        report.push(step, device.send(step, loss=1.0), {"samples": step}, 10, flops)
    report.flush()
    expected = [3 / 4, 8 / 4, 10 / 4]  # TFLOP over two steps of 2 seconds
    for line, value in zip(writer.lines, expected, strict=True):
        assert line["mfu"] * jax.device_count() == pytest.approx(value)


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    assert reporting.device_memory() == {}  # a CPU does not count

    def device(used, peak):
        stats = {"bytes_in_use": used * GIB, "peak_bytes_in_use": peak * GIB, "largest_alloc": 7}
        return types.SimpleNamespace(memory_stats=lambda: stats | {"bytes_limit": 80 * GIB})

    monkeypatch.setattr(jax, "local_devices", lambda: [device(9, 10), device(3, 20), device(1, 2)])
    assert reporting.device_memory() == {
        "device_memory_gib": 3.0,
        "device_memory_peak_gib": 20.0,
        "device_memory_limit_gib": 80.0,
    }


def test_the_progress_line():
    values = {"loss": 1.23456, "text_loss": 7.0, "tokens_per_second": 123_456.0, "mfu": 0.4123}
    values |= {"seconds_per_step": 2.5, "data_wait_share": 0.003, "samples_per_second": 3.0}
    shown = reporting.progress_of({**values, "device_memory_peak_gib": 61.26}, 4000.2)
    assert shown == {
        "loss": "1.235",
        "text_loss": "7",
        "tokens/s": "123k",
        "step": "2.5s",
        "MFU": "41.2%",
        "data wait": "0.3%",
        "memory": "61.3GiB",
        "ETA": "1:06:40",
    }


def test_a_run_has_it_all(tmp_path):
    class Tokens(Toy):
        def num_tokens(self, batch):
            return 160

        def num_flops(self, batch):
            return 8e9

    config = LoopConfig(num_steps=4, log_every=2, checkpoint_every=2, optimizer=OPTIMIZER)
    loop.run(Tokens(), config, tmp_path, yardstick=Yardstick(None))
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [0, 1, 3]
    for line in lines:
        assert line["tokens_per_second"] == pytest.approx(160 / line["seconds_per_step"])
        assert line["samples_per_second"] == pytest.approx(8 / line["seconds_per_step"])
        achieved = 8e-3 / line["seconds_per_step"] / jax.device_count()
        assert line["tflops_per_device"] == pytest.approx(achieved) and "mfu" not in line
    assert lines[0]["compile_seconds"] > 0 and lines[0]["planned_memory_gib"] > 0
    assert "compile_seconds" not in lines[1]
    assert lines[2]["checkpoint_blocking_seconds"] > 0


# ----- Losses by kind and by time -----

ROWS, LENGTH, PLACES, DRAWS = 4, 12, 5, 3


def random_parts(seed):
    """Losses and weights of rows of several documents; kinds 1 and 4 occur, 3 without images."""
    rng = np.random.default_rng([seed])
    kinds = np.repeat(rng.choice([1, 3, 4], (ROWS, 4)), 3, axis=1).astype(np.int8)
    kinds[:, -3:] = [[4], [1], [0], [0]]
    text_weights = rng.uniform(0.1, 1, (ROWS, LENGTH)) * (kinds > 0)
    text_weights[:, ::3] = 0  # nothing predicts the first position of a document
    order = np.argsort(rng.uniform(size=(ROWS, LENGTH)))[:, :PLACES]
    at_image = np.take_along_axis(kinds, order, axis=1)
    batch = {
        "kinds": kinds,
        "text": rng.uniform(1, 9, (ROWS, LENGTH)),
        "text_weights": text_weights,
        "image": rng.uniform(1, 9, (ROWS, DRAWS, PLACES)),
        "image_weights": rng.uniform(0.1, 1, order.shape) * ((at_image > 0) & (at_image != 3)),
        "order": order.astype(np.int32),
        "times": rng.uniform(size=(ROWS, DRAWS, PLACES)),
    }
    return {k: np.float32(v) if v.dtype == np.float64 else v for k, v in batch.items()}


def metrics_of(batch, scale=1.0):
    """As the model's loss calls them."""
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    image, times = (jnp.moveaxis(batch[name], 1, 0) for name in ("image", "times"))
    weights = pretrain.next_position(batch["text_weights"])
    parts = PositionLosses(
        batch["text"] * scale, weights, image * scale, batch["image_weights"], batch["order"]
    )
    return {
        **pretrain.losses_by_kind(parts, batch["kinds"]),
        **pretrain.loss_by_time(parts, times),
    }


def expected_of(batch):
    """The same, position by position, without a sum that is not one of numbers in a list."""
    found = {}

    def count(name, value, weight):
        if weight:
            total, sum_of_weights = found.get(name, (0.0, 0.0))
            found[name] = (total + float(value) * weight, sum_of_weights + weight)

    for row in range(ROWS):
        for column in range(LENGTH - 1):
            kind = KINDS[batch["kinds"][row, column + 1] - 1]
            weight = float(batch["text_weights"][row, column + 1])
            count(f"text_loss/{kind}", batch["text"][row, column], weight)
        for place, column in enumerate(batch["order"][row]):
            weight = float(batch["image_weights"][row, place])
            kind = KINDS[batch["kinds"][row, column] - 1]
            for draw in range(DRAWS):
                error = batch["image"][row, draw, place]
                tenth = int(float(batch["times"][row, draw, place]) * 10)
                count(f"image_loss/t0.{tenth}", error, weight)
                count(f"image_loss/{kind}", error, weight / DRAWS)
    return {name: total / weight for name, (total, weight) in found.items()}


def test_losses_by_kind_and_time_are_those_of_numpy():
    batch = random_parts(1)
    found = {name: float(mean.value()) for name, mean in metrics_of(batch).items()}
    assert len(found) == 2 * len(KINDS) + 10
    expected = expected_of(batch)
    present = {name: value for name, value in found.items() if not math.isnan(value)}
    assert set(present) == set(expected)
    assert {"text_loss/text", "text_loss/edit", "image_loss/interleaved"} < set(present)
    assert "image_loss/edit" not in present and "text_loss/pair" not in present
    for name, value in expected.items():
        assert present[name] == pytest.approx(value, rel=1e-6), name


def test_kinds_and_times_add_up_to_the_whole():
    batch = random_parts(2)
    means = metrics_of(batch)
    weights = batch["text_weights"][:, 1:]
    text = np.average(batch["text"][:, :-1], weights=weights)
    image = np.average(np.mean(batch["image"], axis=1), weights=batch["image_weights"])
    names = {
        "text": [f"text_loss/{kind}" for kind in KINDS],
        "image": [f"image_loss/{kind}" for kind in KINDS],
        "times": [f"image_loss/t0.{i}" for i in range(10)],
    }
    for name, whole in (("text", text), ("image", image), ("times", image)):
        total = sum(float(means[one].total) for one in names[name])
        assert total / sum(float(means[one].weight) for one in names[name]) == pytest.approx(
            whole, rel=1e-6
        )


def test_times_at_the_ends_belong_to_the_outer_tenths():
    ones = jnp.ones((1, 4))
    parts = PositionLosses(ones, ones, jnp.float32([[[1, 2, 3, 4]]]), ones, jnp.arange(4)[None])
    times = jnp.float32([[[0.0, 0.0999, 0.9, 1.0]]])
    found = {
        name: float(mean.value()) for name, mean in pretrain.loss_by_time(parts, times).items()
    }
    assert found["image_loss/t0.0"] == 1.5 and found["image_loss/t0.9"] == 3.5


def test_parts_of_a_batch_give_the_means_of_the_whole():
    """accumulate=2 is accumulate=1, through the step that adds the parts up."""
    batch = random_parts(3)

    def loss(params, batch, key):
        metrics = metrics_of(batch, params["scale"])
        return jnp.sum(batch["text"]) * params["scale"], metrics

    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=0)
    params = {"scale": jnp.float32(1.0)}
    results = []
    for accumulate in (1, 2):
        step = make_train_step(loss, config, draw_fn=lambda b, _: b, accumulate=accumulate)
        state = init_state(params, config, jax.random.key(0))
        results.append(jax.jit(step)(state, batch)[1])
    expected = expected_of(batch)
    for name, value in results[0].items():
        if "/" not in name:
            continue
        np.testing.assert_allclose(results[1][name], value, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(value, expected.get(name, np.nan), rtol=1e-6, err_msg=name)


def test_the_model_logs_every_kind_and_time():
    objective = NextStepObjective(NextStep(tiny_model.CONFIG), LossConfig(), 32, 16)
    batch = objective.abstract_batch(make_mesh({"fsdp": 1}, jax.devices()[:1]), 2, 32)
    params = jax.eval_shape(tiny_model.params)
    _, metrics = jax.eval_shape(objective.loss, params, batch, jax.random.key(0))
    kinds = {f"{name}_loss/{kind}" for name in ("text", "image") for kind in KINDS}
    times = {f"image_loss/t0.{i}" for i in range(10)}
    assert set(metrics) == {"text_loss", "image_loss", "padding"} | kinds | times
    assert {leaf.shape for leaf in jax.tree.leaves(metrics)} == {()}
