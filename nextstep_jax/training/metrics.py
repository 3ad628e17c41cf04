"""Where the numbers of a run go: one JSON line a step, TensorBoard, and a progress line.

Reading a metric waits for the device, so the loop hands metrics over one step late: by then the
next step is already running.
"""

import json
import math
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from tensorboardX import SummaryWriter
from tqdm import tqdm

JSONL = "metrics.jsonl"


class NonFiniteError(RuntimeError):
    """Loss, gradient or parameters are NaN or infinite."""


def check_finite(step: int, values: dict[str, float]) -> None:
    """Raises NonFiniteError, naming the step, if the loss or one of the norms is not finite."""
    bad = {
        name: values[name]
        for name in ("loss", "grad_norm", "param_norm", "update_norm")
        if name in values and not math.isfinite(values[name])
    }
    if bad:
        raise NonFiniteError(f"step {step}: {bad}; the last good checkpoint is kept")


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics file, in order.

    A last line without its end belongs to a run that was killed while writing it; it is left out.
    """
    path = pathlib.Path(workdir) / JSONL
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


class MetricsWriter:
    """Writes on process 0 and does nothing elsewhere."""

    def __init__(self, workdir: pathlib.Path, start_step: int, num_steps: int, description: str):
        """Opens the files; lines of steps from `start_step` on are cut, they will come again."""
        self._active = jax.process_index() == 0
        if not self._active:
            return
        workdir = pathlib.Path(workdir)
        kept = [line for line in read_metrics(workdir) if line["step"] < start_step]
        path = workdir / JSONL
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(line) + "\n" for line in kept))
        fresh.rename(path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step)
        self._bar = tqdm(
            total=num_steps,
            initial=start_step,
            desc=description,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.05,
            # A log file wants a line now and then, a terminal one that moves.
            mininterval=1.0 if sys.stderr.isatty() else 30.0,
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line for a step."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Moves the progress line to a step."""
        if not self._active:
            return
        shown = {name: f"{value:.4g}" for name, value in values.items()}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def image(self, step: int, name: str, pixels: UInt8[np.ndarray, "height width 3"]) -> None:
        """A picture for TensorBoard."""
        if self._active:
            self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Closes the files."""
        if self._active:
            self._bar.close()
            self._file.close()
            self._board.close()
