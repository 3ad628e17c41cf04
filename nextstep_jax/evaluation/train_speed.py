"""How fast a training step is: the one that the trainer runs, beside the same in PyTorch.

Both sides train NextStep-1 (arXiv 2508.10711) on the same packed rows of text and image tokens
from the same weights, with the same losses, clipping and AdamW, in turn in one process. The first
step of both takes the same times and noises, so that its loss and its gradient's norm say whether
they compute the same; the timed ones draw their own. Tokens count padding and image tokens; MFU is
of the FLOPs that these rows need (`models/flops.py`), the same number for both.

Axes: rows, length; token = values of an image token.
"""

import contextlib
import dataclasses
import functools
import math
import os
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from nextstep_jax.data.schema import KINDS, Batch
from nextstep_jax.evaluation import timing, torch_train
from nextstep_jax.models import flops
from nextstep_jax.models.config import NextStepConfig
from nextstep_jax.models.nextstep import NextStep
from nextstep_jax.training import loop
from nextstep_jax.training.optimizer import OptimizerConfig
from nextstep_jax.training.pretrain import LossConfig, NextStepObjective, batch_flops
from nextstep_jax.training.state import TrainState

AGAINST = ("torch",)
# Warm-up would leave the weights where they are for the whole measurement.
_OPTIMIZER = OptimizerConfig(warmup_steps=0)
_LONGEST_TEXT = 128
_LONGEST_SIDE = 16  # 256 pixels at 16 pixels a token


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        model: Shapes.
        rows: Packed rows of a step, over all devices.
        length: Positions of a row.
        dtype: Of the computation; parameters are float32.
        attention: Our attention kernel.
        remat: What the backward pass keeps; but for "none" PyTorch checkpoints every layer.
        accumulate: Micro-batches of a step.
        mesh: (axis, size) pairs.
        repeats: Timed rounds.
        against: "torch", or None for our step alone.
        torch_attention: One of `torch_train.TORCH_ATTENTION`.
        seed: Of the rows and of everything drawn.
    """

    model: NextStepConfig
    rows: int = 4
    length: int = 512
    dtype: str = "float32"
    attention: str = "xla"
    remat: str = "none"
    accumulate: int = 1
    mesh: tuple[tuple[str, int], ...] = (("fsdp", 1),)
    repeats: int = 5
    against: str | None = None
    torch_attention: str = "sdpa"
    seed: int = 0

    def __post_init__(self):
        """Checks what no device is needed for."""
        for name in ("rows", "accumulate", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.length < 32:
            raise ValueError(f"length={self.length} must be at least 32 to hold an image")
        if self.rows % self.accumulate:
            raise ValueError(f"rows={self.rows} must be a multiple of accumulate={self.accumulate}")
        if any(size < 1 for _, size in self.mesh):
            raise ValueError(f"mesh={dict(self.mesh)}: every size must be given")
        if self.against is None:
            return
        if self.against not in AGAINST:
            raise ValueError(f"against={self.against!r} is unknown; choose from {list(AGAINST)}")
        torch_train.check_supported(self.model, _OPTIMIZER, self.torch_attention)
        if self.num_devices != 1 or self.accumulate != 1:
            raise ValueError(
                f"against={self.against} runs on one device and does not accumulate; not with"
                f" mesh={dict(self.mesh)}, accumulate={self.accumulate}"
            )

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(size for _, size in self.mesh)


def packed_rows(config: NextStepConfig, rows: int, length: int, seed: int = 0) -> Batch:
    """Random rows as the pipeline packs them: captions with images, then a text that fills up.

    Each document is a segment: text, begin of image, a square of image tokens, end of image. Text
    counts but for the first of a segment; every image token counts. No position is padding but
    for a last one too few for a document.

    Args:
        config: Ids and widths.
        rows: Rows of the batch.
        length: Positions of a row; at least 32.
        seed: Of everything.

    Returns:
        token_ids, segment_ids, positions, text_weights, image_weights, kinds and latents.
    """
    rng = np.random.default_rng([26, seed])
    side = min(_LONGEST_SIDE, 2 ** int(math.log2(length / 8) / 2))
    special = [getattr(config, name) for name in ("pad_id", "boi_id", "eoi_id")]
    special += [config.bos_id, config.eos_id, config.image_area_id, config.image_placeholder_id]
    text_ids = np.setdiff1d(np.arange(config.decoder.vocab_size), special)
    names = {"token_ids": np.int32, "segment_ids": np.int32, "positions": np.int32}
    names |= {"text_weights": np.float32, "image_weights": np.float32, "kinds": np.int8}
    batch = {name: np.zeros((rows, length), dtype) for name, dtype in names.items()}
    batch["token_ids"][:] = config.pad_id
    for row in range(rows):
        start = segment = 0
        while length - start > 1:
            num_text = int(rng.integers(8, min(_LONGEST_TEXT, length // 4) + 1))
            image = [config.boi_id, *[config.image_placeholder_id] * side**2, config.eoi_id]
            if start + num_text + len(image) > length:
                num_text, image = length - start, []
            ids = np.array([*rng.choice(text_ids, num_text), *image], np.int32)
            segment, here = segment + 1, (row, slice(start, start + len(ids)))
            is_image = ids == config.image_placeholder_id
            batch["token_ids"][here] = ids
            batch["segment_ids"][here] = segment
            batch["positions"][here] = np.arange(len(ids))
            batch["text_weights"][here] = ~is_image & (np.arange(len(ids)) > 0)
            batch["image_weights"][here] = is_image
            batch["kinds"][here] = 1 + KINDS.index("pair" if len(image) else "text")
            start += len(ids)
    latents = rng.standard_normal((rows, length, config.token_dim), np.float32)
    return {**batch, "latents": latents * batch["image_weights"][..., None]}


def num_image_positions(batch: Mapping[str, Any]) -> int:
    """The most weighted image tokens that a row has."""
    return int(np.count_nonzero(batch["image_weights"], axis=1).max())


def draws_of_step(
    objective: NextStepObjective, batch: Mapping[str, Any], key: Key[Array, ""], step: int
) -> torch_train.Draws:
    """Times and noises of one of our steps, at the weighted image positions alone.

    Args:
        objective: What draws.
        batch: The rows.
        key: The state's.
        step: From 0.
    """
    names = ("token_ids", "text_weights", "image_weights")
    rows = {name: np.asarray(batch[name]) for name in names}
    drawn = objective.draw(rows, jax.random.fold_in(key, step))
    row, _ = np.nonzero(rows["image_weights"])
    # Gathered positions stand in order, and a row with fewer of them is filled up at its end.
    counts = np.count_nonzero(rows["image_weights"], axis=1)
    rank = np.concatenate([np.arange(count) for count in counts])
    times, noise = (np.asarray(drawn[name])[row, :, rank] for name in ("times", "noise"))
    return np.swapaxes(times, 0, 1), np.swapaxes(noise, 0, 1)


class Trainer:
    """The trainer's step with its state and one batch.

    Attributes:
        objective: The loss.
        state: The train state; every step replaces it.
        compile_s: Seconds of tracing and compiling.
        planned_bytes: What a device needs by the compiler's plan; None where nobody knows.
    """

    objective: NextStepObjective
    state: TrainState
    compile_s: float
    planned_bytes: dict[str, int] | None

    def __init__(self, setting: Setting, batch: Mapping[str, Any]):
        """Initialises, compiles, and places the batch; no step is taken.

        Raises:
            ValueError: More devices than there are, or rows that do not divide over them.
        """
        devices = first_devices(setting.num_devices)
        model = NextStep(
            setting.model, jnp.dtype(setting.dtype), setting.attention, remat=setting.remat
        )
        most = num_image_positions(batch)
        self.objective = NextStepObjective(model, LossConfig(), setting.length, most)
        config = loop.LoopConfig(
            seed=setting.seed,
            optimizer=_OPTIMIZER,
            mesh=setting.mesh,
            accumulate=setting.accumulate,
        )
        setup = loop.set_up(self.objective, config, devices)
        self._mesh = setup.mesh
        self._batch = loop.to_device(setup.mesh, dict(batch), has_length=True)
        with jax.set_mesh(setup.mesh):
            self.state = setup.init()
            began = time.perf_counter()
            self._step = setup.step.lower(self.state, self._batch).compile()
            self.compile_s = time.perf_counter() - began
        self.planned_bytes = _planned(self._step)

    def step(self) -> dict[str, float]:
        """One update; waits for it and returns the metrics that are single numbers."""
        with jax.set_mesh(self._mesh):
            self.state, metrics = self._step(self.state, self._batch)
        jax.block_until_ready(self.state)
        return {name: float(value) for name, value in metrics.items() if value.ndim == 0}


def first_devices(count: int) -> list[Any]:
    """So many devices; on a CPU fake ones where no flag says otherwise and nothing has run yet.

    Raises:
        ValueError: There are fewer.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # A backend that runs already keeps what it has, and says so.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if len(devices) < count:
        raise ValueError(f"a mesh of {count} devices, but there are {len(devices)}")
    return devices[:count]


def _planned(compiled: Any) -> dict[str, int] | None:
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    return {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
    }


def run(setting: Setting) -> dict[str, Any]:
    """Times the step, and PyTorch's beside it if asked to.

    Returns:
        Settings and figures as plain values: seconds, tokens/s, FLOPs, MFU where the device's peak
        is known, bytes, and the ratio of PyTorch's time to ours as the median over the rounds: by
        the clock, and of the seconds that processors spent on it.
    """
    # Both sides have to fit: neither may take the whole device at its start.
    if setting.against is not None:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    batch = packed_rows(setting.model, setting.rows, setting.length, setting.seed)
    ours = Trainer(setting, batch)
    sides: dict[str, Any] = {"jax": ours}
    draws = draws_of_step(ours.objective, batch, ours.state.key, 0)
    if setting.against is not None:
        sides["torch"] = _torch_side(setting, ours.state.params, batch)
    first = {"jax": ours.step()}
    if "torch" in sides:
        first["torch"] = sides["torch"].step(draws)
    processor: dict[str, list[float]] = {name: [] for name in sides}

    def step(name: str) -> None:
        began = time.process_time()
        sides[name].step()
        processor[name].append(time.process_time() - began)

    calls = {name: functools.partial(step, name) for name in sides}
    seconds = timing.time_interleaved(calls, setting.repeats)
    num_tokens = setting.rows * setting.length
    count = batch_flops(setting.model, batch)
    peak = _peak(setting)
    figures = {
        name: {
            **_figures(seconds[name], first[name], num_tokens, count.total, peak),
            # Without the warm-up. On a busy machine, and with one thread, what to go by on a CPU.
            "processor_s": processor[name][-setting.repeats :],
        }
        for name in sides
    }
    figures["jax"] |= {
        "compile_s": ours.compile_s,
        "planned_bytes": ours.planned_bytes,
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }
    report = {
        "settings": _settings(setting, ours, batch),
        "tokens_per_step": num_tokens,
        "flops_per_step": {**dataclasses.asdict(count), "total": count.total},
        "peak_flops": peak,
        **figures,
    }
    if "torch" in sides:
        report["torch"] |= {"peak_bytes": sides["torch"].memory_bytes(), **_torch_environment()}
        report["ratio"] = timing.median_ratio(seconds["torch"], seconds["jax"])
        spent = [figures[name]["processor_s"] for name in ("torch", "jax")]
        report["processor_ratio"] = timing.median_ratio(*spent)
        report["first_step_difference"] = {
            name: abs(first["jax"][name] / first["torch"][name] - 1)
            for name in ("loss", "grad_norm")
        }
    return report


def _torch_side(setting: Setting, params: Any, batch: Batch) -> torch_train.TorchTrainer:
    import torch

    if hasattr(os, "sched_getaffinity"):
        # As many threads as XLA takes.
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    # What XLA does by default with float32 products on a GPU; nothing on a CPU.
    torch.set_float32_matmul_precision("high" if jax.default_backend() == "gpu" else "highest")
    return torch_train.TorchTrainer(
        setting.model,
        params,
        batch,
        loss=LossConfig(),
        optimizer=_OPTIMIZER,
        dtype=setting.dtype,
        checkpointing=setting.remat != "none",
        attention=setting.torch_attention,
        device="cpu" if jax.default_backend() == "cpu" else "cuda",
    )


def _figures(
    seconds: list[float], first: Mapping[str, float], tokens: int, count: float, peak: float | None
) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "median_s": median,
        "times_s": seconds,
        "tokens_per_s": tokens / median,
        "flops_per_s": count / median,
        "mfu": None if peak is None else count / median / peak,
        "first_step": {name: first[name] for name in ("loss", "grad_norm")},
    }


def _peak(setting: Setting) -> float | None:
    """FLOP/s of all devices of the mesh, where known."""
    device = jax.devices()[0]
    # On NVIDIA GPUs float32 products are taken in this by default.
    short = setting.dtype == "float32" and device.platform == "gpu"
    peak = flops.peak_flops(device.device_kind, "tensorfloat32" if short else setting.dtype)
    return None if peak is None else peak * setting.num_devices


def _settings(setting: Setting, ours: Trainer, batch: Batch) -> dict[str, Any]:
    values = dataclasses.asdict(setting)
    return {
        **values,
        "mesh": dict(setting.mesh),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(ours.state.params)),
        "image_tokens": int(np.count_nonzero(batch["image_weights"])),
        "text_tokens": int(np.count_nonzero(batch["text_weights"])),
        "segments": int(batch["segment_ids"].max(axis=1).sum()),
        "load_average": os.getloadavg()[0],
    }


def _torch_environment() -> dict[str, Any]:
    import torch
    import transformers

    return {
        "version": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
