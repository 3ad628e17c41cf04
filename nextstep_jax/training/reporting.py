"""What a run says of itself between steps: the data's own report, and metrics one step late.

Reading a metric waits for the device. The numbers of a step are read when the next step has been
sent, so that the device never waits for the host.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int64

from nextstep_jax.data.statistics import DataReport
from nextstep_jax.training.metrics import MetricsWriter, check_finite
from nextstep_jax.training.state import Metrics


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


class Pending:
    """Metrics of the step that is still running; handed on when the next one has been sent."""

    def __init__(self, is_logged: Callable[[int], bool], writer: MetricsWriter):
        """`is_logged` says after which steps a line is written."""
        self._is_logged, self._writer, self._entry = is_logged, writer, None

    def push(self, step: int, metrics: Metrics, extra: dict[str, float]) -> None:
        """Takes the metrics of a step that was just sent, and hands on those before."""
        entry, self._entry = self._entry, (step, metrics, extra)
        self._hand_on(entry)

    def flush(self) -> None:
        """Hands on what is left; waits for the device."""
        entry, self._entry = self._entry, None
        self._hand_on(entry)

    def _hand_on(self, entry) -> None:
        if entry is None:
            return
        step, metrics, extra = entry
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        check_finite(step, values)
        # What the batch had nothing of, such as a kind of document.
        values = {name: value for name, value in values.items() if not math.isnan(value)}
        if self._is_logged(step):
            # Lines count updates from 0, as the state did when the step began.
            self._writer.write(step - 1, {**values, **extra})
        shown = {k: v for k, v in values.items() if k == "loss" or k.endswith("_loss")}
        rate = extra["samples"] / max(extra["seconds"], 1e-9)
        self._writer.progress(step, {**shown, "samples/s": rate})
