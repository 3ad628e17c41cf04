"""Trains a tiny NextStep on the built-in world, samples from it, and scores it.

Example:
    python launch/quickstart.py --minutes=9 --workdir=runs/quickstart

Measures the machine, plans as many steps as fit into the minutes, trains an image tokenizer and a
model, draws 16 held-out captions into one picture, and has the checker read 300 held-out captions
back. Started again with the same workdir, it goes on where it stopped.
"""

import importlib.util
import json
import os
import pathlib
import sys
import time

import jax
import numpy as np
from absl import flags

from nextstep_jax import runs
from nextstep_jax.data.shapes import heldout_prompts
from nextstep_jax.evaluation.hooks import score_alignment
from nextstep_jax.evaluation.pictures import captioned_grid
from nextstep_jax.evaluation.shapes_checker import check_claim
from nextstep_jax.sampling.pipeline import NextStepPipeline
from nextstep_jax.training import experiment
from nextstep_jax.training.logs import run_program

_MINUTES = flags.DEFINE_float("minutes", 9.0, "Minutes of training, both trainings together.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where everything goes (default: runs/quickstart, or runs/smoke)."
)
_SMOKE = flags.DEFINE_bool("smoke", False, "Show only that every part works, in about a minute.")

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_LEVEL = "easy"
# Share of the minutes that the image tokenizer gets; ours, see docs/quickstart.md.
_TOKENIZER_SHARE = 0.35
_NUM_PICTURES, _NUM_SCORED, _NUM_SCORED_SMOKE = 16, 300, 24
_SMOKE_STEPS = 20


def load_config(name: str):
    """The experiment `configs/NAME.py` at the quickstart's level."""
    spec = importlib.util.spec_from_file_location(name, _ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(_LEVEL)


def open_plan(path: pathlib.Path) -> dict:
    """The plan of a run that is continued, or a new one.

    Raises:
        ValueError: The run was begun with other flags.
    """
    flags_now = {"minutes": _MINUTES.value, "smoke": _SMOKE.value}
    plan = json.loads(path.read_text()) if path.exists() else flags_now
    differing = {name: plan[name] for name in flags_now if plan[name] != flags_now[name]}
    if differing:
        raise ValueError(
            f"{path.parent} was begun with {differing}; give the same flags, or another --workdir"
        )
    return plan


def plan_steps(path: pathlib.Path, name: str, measure, seconds: float) -> int:
    """Steps that fit into the seconds; written down, so that a second start keeps them."""
    plan = open_plan(path)
    if name not in plan:
        per_step = 0.0 if _SMOKE.value else measure()
        plan[name] = _SMOKE_STEPS if _SMOKE.value else max(100, int(seconds / per_step))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plan, indent=2) + "\n")
        if per_step:
            print(f"{name}: {per_step * 1e3:.0f} ms a step here, {plan[name]} steps")
    return plan[name]


def with_steps(config, num_steps: int):
    """The config with that many steps, warm-up and pauses in proportion."""
    config.loop.num_steps = num_steps
    config.loop.checkpoint_every = max(50, num_steps // 5)
    config.loop.hook_every = -(-num_steps // 3)
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, num_steps // 10 + 1)
    return config


def train(workdir: pathlib.Path, seconds: float) -> None:
    """Both trainings."""
    plan = workdir / "plan.json"
    config = load_config("shapes_tokenizer")
    steps = plan_steps(
        plan,
        "tokenizer",
        lambda: runs.seconds_per_step(*experiment.build_tokenizer_task(experiment.plain(config))),
        seconds * _TOKENIZER_SHARE,
    )
    headline("1/4 image tokenizer", "learns to turn an image into a few continuous tokens")
    runs.train_tokenizer(with_steps(config, steps), workdir / "tokenizer")

    config = load_config("shapes")
    # A row for each device at the least.
    config.data.rows_per_batch = max(config.data.rows_per_batch, jax.device_count())
    if _SMOKE.value:
        config.score.num_scored = _NUM_PICTURES
    model_dir, tokenizer_dir = workdir / "model", workdir / "tokenizer"
    steps = plan_steps(
        plan,
        "model",
        lambda: measure_model(config, model_dir, tokenizer_dir),
        seconds * (1 - _TOKENIZER_SHARE),
    )
    headline("2/4 model", "learns to write captions and image tokens as one sequence")
    runs.train_model(with_steps(config, steps), model_dir, tokenizer_dir)


def measure_model(config, model_dir: pathlib.Path, tokenizer_dir: pathlib.Path) -> float:
    """Seconds of a step of the model's training on this machine."""
    run = runs.prepare_model(config, model_dir, tokenizer_dir)
    return runs.seconds_per_step(run.task, run.loop_config)


def sample_and_score(workdir: pathlib.Path) -> None:
    """The picture and the score."""
    headline("3/4 sampling", f"{_NUM_PICTURES} held-out captions")
    pipe = NextStepPipeline.from_pretrained(workdir / "model")
    claims = heldout_prompts(_LEVEL, _NUM_SCORED_SMOKE if _SMOKE.value else _NUM_SCORED, seed=1)
    shown = claims[:_NUM_PICTURES]
    captions = [claim["prompt"] for claim in shown]
    images = pipe(captions, seed=list(range(len(shown)))).images
    marks = [
        check_claim(np.asarray(image), claim) for image, claim in zip(images, shown, strict=True)
    ]
    captioned_grid(images, captions, marks=marks).save(workdir / "samples.png")

    headline("4/4 scoring", f"{len(claims)} held-out captions, read back from the pixels")
    report, _ = score_alignment(pipe, claims)
    (workdir / "score.json").write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    print(report.table())


def headline(title: str, text: str) -> None:
    """One line between the stages."""
    print(f"\n== {title}: {text}", flush=True)


def main(argv: list[str]) -> None:
    """Runs the four stages and says where everything is."""
    del argv
    if not _MINUTES.value > 0:
        raise ValueError(f"--minutes={_MINUTES.value} must be positive")
    began = time.monotonic()
    runs.use_compilation_cache(_ROOT / ".cache" / "jax")
    workdir = pathlib.Path(_WORKDIR.value or f"runs/{'smoke' if _SMOKE.value else 'quickstart'}")
    open_plan(workdir / "plan.json")
    print(f"nextstep_jax quickstart on {jax.devices()[0].device_kind}, jax {jax.__version__}")
    train(workdir, 60 * _MINUTES.value)
    sample_and_score(workdir)
    python = os.path.relpath(sys.executable)
    print(
        f"""
Done in {(time.monotonic() - began) / 60:.1f} minutes.
  picture      {workdir / "samples.png"} (green: the checker finds what the caption says)
  score        {workdir / "score.json"}
  curves       {workdir}/*/metrics.jsonl, and for TensorBoard {workdir}/*/tensorboard
  draw more    {python} launch/sample.py --checkpoint={workdir / "model"} --prompt="a red circle"
  longer       ./launch/quickstart.sh --minutes=60 --workdir=runs/longer"""
    )


if __name__ == "__main__":
    run_program(main)
