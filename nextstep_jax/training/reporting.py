"""What a run says of itself between steps, without ever making the device wait.

The numbers of a step stay on the device, unread, until a line is due; that is written when the
next step has been sent, so that the device works while the host writes. In between nothing is
transferred. The host only stays `_AHEAD` steps ahead at most: it waits for a step that came two
before the newest, when another is still queued behind the running one. Without a bound the batches
of all the steps ahead would lie in the device's memory, and a request to stop would come late.

A line of metrics holds means over the steps since the last line or checkpoint (learning_rate: the
step's own value; a step without any of a kind does not count for that kind). A checkpoint begins
a new mean so that a run continued from it writes the same lines. Loss and norms of every step are
checked before a line is written and before anything is saved.
"""

import contextlib
import dataclasses
import datetime
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int64

from nextstep_jax.data.statistics import DataReport
from nextstep_jax.training.metrics import MetricsWriter, check_finite

# Steps that the host may be ahead of the one it has seen finished: one runs, one is queued. Ours.
_AHEAD = 2
# Steps whose metrics stay unread before they are read in passing, for runs with rare lines. Ours.
_MOST_UNREAD = 128
# Of these a mean over steps says nothing.
_LAST_VALUE = ("learning_rate",)
# What a device calls it -> what a line of metrics does.
_MEMORY = {
    "bytes_in_use": "device_memory_gib",
    "peak_bytes_in_use": "device_memory_peak_gib",
    "bytes_limit": "device_memory_limit_gib",
}


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """What the speed of a run is measured against.

    Attributes:
        peak_flops_per_device: Dense peak in FLOP/s, or None where nobody knows it.
    """

    peak_flops_per_device: float | None


class DataWatch:
    """Takes batches, and says how long they were waited for and what they held."""

    def __init__(self, dataset: Any):
        self._dataset, self._began, self._waited = dataset, time.monotonic(), 0.0
        self._report = lambda: {}
        if hasattr(dataset, "counts"):
            add_up = sum_over_processes if jax.process_count() > 1 else None
            self._report = DataReport(dataset.counts, add_up, dataset.max_bad_fraction)

    def next(self) -> Any:
        """The next batch."""
        began = time.monotonic()
        batch = next(self._dataset)
        self._waited += time.monotonic() - began
        return batch

    def report(self) -> dict[str, float]:
        """Of the time since the last report, the share spent waiting; and the data's own."""
        now = time.monotonic()
        share = self._waited / max(now - self._began, 1e-9)
        self._began, self._waited = now, 0.0
        return {"data_wait_share": share, **self._report()}


def sum_over_processes(numbers: Int64[np.ndarray, " counts"]) -> Int64[np.ndarray, " counts"]:
    """The sum of the vectors of all processes."""
    # As halves, which devices without 64 bits keep whole.
    gathered = multihost_utils.process_allgather(numbers.view(np.int32))
    return np.ascontiguousarray(gathered).view(np.int64).sum(axis=0)


def device_memory() -> dict[str, float]:
    """GiB in use, at most so far, and in all, on the fullest device of this process.

    Nothing on platforms that do not count, such as CPUs. Asks the allocator, not the device.
    """
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    fullest = max(stats, key=lambda one: one.get("peak_bytes_in_use", 0), default={})
    return {name: fullest[key] / 2**30 for key, name in _MEMORY.items() if key in fullest}


class _Means:
    """Means of the values of steps, name by name."""

    def __init__(self):
        self._total, self._count = {}, {}

    def add(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if math.isnan(value):  # What the batch had nothing of, such as a kind of document.
                continue
            if name in _LAST_VALUE:
                self._total[name], self._count[name] = value, 1
                continue
            self._total[name] = self._total.get(name, 0.0) + value
            self._count[name] = self._count.get(name, 0) + 1

    def values(self) -> dict[str, float]:
        return {name: total / self._count[name] for name, total in self._total.items()}


@dataclasses.dataclass
class _Sent:
    """A step that was sent to the devices; the counts are of the run up to it."""

    step: int
    metrics: Mapping[str, Any]
    extra: Mapping[str, Any]
    tokens: int
    flops: float


class RunReport:
    """Takes what each step returns; checks it, and writes lines and progress."""

    def __init__(
        self,
        is_logged: Callable[[int], bool],
        writer: MetricsWriter,
        num_steps: int,
        yardstick: Yardstick | None = None,
    ):
        """Reports to a writer.

        Args:
            is_logged: After which steps a line is written.
            writer: Where it goes.
            num_steps: Of the whole run, for the time that is left.
            yardstick: See `Yardstick`; without it lines have no MFU.
        """
        self._is_logged, self._writer, self._num_steps = is_logged, writer, num_steps
        self._yardstick = yardstick
        self._unread: list[_Sent] = []
        self._means, self._once, self._tokens = _Means(), {}, 0
        self._flops = 0.0
        self._store, self._last_save = None, None
        self._first_line: tuple[int, float] | None = None
        self.begin(0)

    def begin(self, step: int, samples: int = 0, **once: float) -> None:
        """Starts the clock of the steps.

        Args:
            step: Updates made before.
            samples: Samples trained on before.
            **once: Further values for the next line, such as the time of compiling.
        """
        self._mark, self._paused = time.monotonic(), 0.0
        self._before = _Sent(step, {}, {"samples": samples}, self._tokens, self._flops)
        self._once |= once

    def push(
        self,
        step: int,
        metrics: Mapping[str, Any],
        extra: Mapping[str, Any],
        tokens: int = 0,
        flops: float = 0.0,
    ) -> None:
        """Takes the metrics of a step that was just sent, and writes the line before, if due.

        Args:
            step: Its number, counted from 1.
            metrics: Scalars on the device; left there.
            extra: For its line: samples and seconds of the run so far, and what else is known.
            tokens: Positions of the rows of its global batch, padding included.
            flops: What its global batch needs; 0 where nobody knows.

        Raises:
            NonFiniteError: An earlier step's loss or one of its norms is not finite.
        """
        self._tokens += tokens
        self._flops += flops
        if self._unread and self._is_logged(self._unread[-1].step):
            self._read(len(self._unread))
        self._unread.append(_Sent(step, metrics, extra, self._tokens, self._flops))
        self._writer.move(step)
        if len(self._unread) > _AHEAD:
            jax.block_until_ready(self._unread[-1 - _AHEAD].metrics)
        if len(self._unread) > _MOST_UNREAD:
            self._read(len(self._unread) - _AHEAD)

    def flush(self) -> None:
        """Reads and checks every step so far, and writes the line of the last, if due.

        Waits for the device.

        Raises:
            NonFiniteError: See `push`.
        """
        self._read(len(self._unread))

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Flushes; what is then done inside is not counted as time of the steps."""
        self.flush()
        began = time.monotonic()
        yield
        self._paused += time.monotonic() - began

    def save(self, store: Any, step: int, checkpoint: Any) -> None:
        """`store.save`, timed, once it is clear that the state is good.

        Raises:
            NonFiniteError: See `push`; then nothing is saved.
        """
        with self.pause():
            began = time.monotonic()
            store.save(step, checkpoint)
            self._once["checkpoint_blocking_seconds"] = time.monotonic() - began
        self._store, self._means = store, _Means()

    def _read(self, count: int) -> None:
        """Takes the oldest steps off the device."""
        sent, self._unread = self._unread[:count], self._unread[count:]
        for one, metrics in zip(sent, jax.device_get([one.metrics for one in sent]), strict=True):
            values = {name: float(value) for name, value in metrics.items()}
            check_finite(one.step, values)
            self._means.add(values)
            if self._is_logged(one.step):
                self._line(one)

    def _line(self, sent: _Sent) -> None:
        """Writes the line of a step that has just finished."""
        now, values = time.monotonic(), self._means.values()
        values |= {**sent.extra, **self._speed(sent, now, values), **device_memory()}
        values |= {**self._once, **self._saved()}
        self._means, self._once = _Means(), {}
        self._mark, self._paused, self._before = now, 0.0, sent
        # Lines count updates from 0, as the state did when the step began.
        self._writer.write(sent.step - 1, values)
        self._writer.progress(sent.step, progress_of(values, self._seconds_left(sent.step, now)))

    def _speed(self, sent: _Sent, now: float, means: Mapping[str, float]) -> dict[str, float]:
        """Rates since the last line, without saves and hooks."""
        before, num_steps = self._before, max(sent.step - self._before.step, 1)
        seconds = max(now - self._mark - self._paused, 1e-9)
        samples = sent.extra.get("samples", 0) - before.extra.get("samples", 0)
        speed = {"seconds_per_step": seconds / num_steps, "samples_per_second": samples / seconds}
        if sent.tokens > before.tokens:
            speed["tokens_per_second"] = (sent.tokens - before.tokens) / seconds
            if "padding" in means:
                real = (1 - means["padding"]) * speed["tokens_per_second"]
                speed["tokens_per_second_without_padding"] = real
        if sent.flops > before.flops:
            achieved = (sent.flops - before.flops) / seconds / jax.device_count()
            speed["tflops_per_device"] = achieved / 1e12
            if self._yardstick is not None and self._yardstick.peak_flops_per_device:
                speed["mfu"] = achieved / self._yardstick.peak_flops_per_device
        return speed

    def _saved(self) -> dict[str, float]:
        """Seconds of the last save until it was on disk, in the first line after that."""
        last = self._store and self._store.last_save
        if last is None or last == self._last_save:
            return {}
        self._last_save = last
        return {"checkpoint_seconds": last[1]}

    def _seconds_left(self, step: int, now: float) -> float | None:
        """At the pace since the first line of this start, saves and hooks included."""
        if self._first_line is None:
            self._first_line = (step, now)
            return None
        first_step, first = self._first_line
        return (now - first) / max(step - first_step, 1) * (self._num_steps - step)


def progress_of(values: Mapping[str, Any], seconds_left: float | None) -> dict[str, str]:
    """What the progress line shows of a line of metrics, name -> text."""
    shown = {
        name: f"{values[name]:.4g}"
        for name in ("loss", "text_loss", "image_loss", "psnr")
        if name in values
    }
    rate = "tokens" if "tokens_per_second" in values else "samples"
    shown[f"{rate}/s"] = _short(values[f"{rate}_per_second"])
    shown["step"] = f"{values['seconds_per_step']:.3g}s"
    for name, key in (("MFU", "mfu"), ("data wait", "data_wait_share")):
        if key in values:
            shown[name] = f"{values[key]:.1%}"
    if "device_memory_peak_gib" in values:
        shown["memory"] = f"{values['device_memory_peak_gib']:.1f}GiB"
    if seconds_left is not None:
        shown["ETA"] = str(datetime.timedelta(seconds=round(seconds_left)))
    return shown


def _short(number: float) -> str:
    """Three digits: 950, 12.3k, 4.56M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
