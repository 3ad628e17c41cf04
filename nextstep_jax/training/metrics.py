"""Where the numbers of a run go: JSON lines, TensorBoard, Weights & Biases, a progress line.

What the numbers are, and when they are read, is in `reporting.py`.
"""

import json
import logging
import math
import pathlib
import sys
import time
import uuid
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from tensorboardX import SummaryWriter
from tqdm import tqdm

JSONL = "metrics.jsonl"
# The name of a run at Weights & Biases, by which a restart finds it again.
WANDB_ID = "wandb_id"
# A log file wants a line now and then, a terminal one that moves. Ours.
_SECONDS_BETWEEN_LINES = 30.0


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


def open_wandb(
    workdir: pathlib.Path, project: str, description: str, config: Mapping[str, Any] | None
) -> Any:
    """A run at Weights & Biases, the same one after a restart in the same workdir.

    Steps that come again after a restart keep their first values there, which are the same.
    """
    import wandb

    path = pathlib.Path(workdir) / WANDB_ID
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12] + "\n")
    return wandb.init(
        project=project,
        id=path.read_text().strip(),
        resume="allow",
        name=f"{pathlib.Path(workdir).name} ({description})",
        config=dict(config or {}),
        dir=str(workdir),
    )


def check_wandb(project: str) -> None:
    """Refuses a project where the package is missing; every process asks before it starts.

    Raises:
        ValueError: `loop.wandb_project` is set and wandb is not installed.
    """
    if not project:
        return
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"loop.wandb_project={project!r} needs Weights & Biases:"
            ' pip install "nextstep_jax[wandb]", or leave it empty'
        ) from error


class MetricsWriter:
    """Writes on process 0 and does nothing elsewhere."""

    def __init__(
        self,
        workdir: pathlib.Path,
        start_step: int,
        num_steps: int,
        description: str,
        wandb_project: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        """Opens the files; lines of steps from `start_step` on are cut, they will come again.

        Args:
            workdir: Where they are.
            start_step: Updates made so far.
            num_steps: Updates of the whole run.
            description: Stands in front of the progress line.
            wandb_project: Of Weights & Biases; empty for none.
            config: The experiment as plain values, for Weights & Biases.
        """
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
        self._wandb = None
        if wandb_project:
            self._wandb = open_wandb(workdir, wandb_project, description, config)
        self._description, self._num_steps = description, num_steps
        self._last_shown, self._bar = -math.inf, None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=num_steps,
                initial=start_step,
                desc=description,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}% |{bar:10}| {n_fmt}/{total_fmt}{postfix}",
                mininterval=1.0,
            )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line for a step."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def move(self, step: int) -> None:
        """Moves a terminal's bar to a step; nothing is printed to a log file."""
        if self._active and self._bar is not None:
            self._bar.update(step - self._bar.n)

    def progress(self, step: int, shown: Mapping[str, str]) -> None:
        """One progress line: a terminal's moves, a log file gets one each half a minute at most.

        Args:
            step: Updates made; the last of the run is always shown.
            shown: Name -> text, in the order of the line.
        """
        if not self._active:
            return
        text = ", ".join(f"{name} {value}" for name, value in shown.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self.move(step)
            return
        now = time.monotonic()
        if now - self._last_shown >= _SECONDS_BETWEEN_LINES or step == self._num_steps:
            self._last_shown = now
            logging.info("%s %d/%d: %s", self._description, step, self._num_steps, text)

    def image(self, step: int, name: str, pixels: UInt8[np.ndarray, "height width 3"]) -> None:
        """A picture for TensorBoard and Weights & Biases."""
        if not self._active:
            return
        self._board.add_image(name, pixels, step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        """Closes the files."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
