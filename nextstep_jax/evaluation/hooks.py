"""What a trainer calls between steps: sample grids, reconstructions, and scores.

The loop knows none of this; a program hands the hooks in. Each writes to `samples/` in the
workdir and to TensorBoard; scores also go to `scores.jsonl`, one line a call.
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from nextstep_jax.data.shapes import heldout_prompts
from nextstep_jax.evaluation.pictures import captioned_grid, pairs_grid
from nextstep_jax.evaluation.scoring import Report, score
from nextstep_jax.models.vae import VAE, from_uint8, to_uint8
from nextstep_jax.sampling.pipeline import NextStepPipeline

SCORES = "scores.jsonl"
_BATCH_SIZE = 50


def score_alignment(
    pipe: NextStepPipeline,
    claims: Sequence[dict[str, Any]],
    batch_size: int = _BATCH_SIZE,
    **settings: Any,
) -> tuple[Report, list]:
    """Samples one image for each claim's prompt and reads it back.

    Args:
        pipe: The model.
        claims: Of `data.shapes.heldout_prompts`; claim i is drawn with seed i.
        batch_size: Images sampled together.
        **settings: Arguments of the pipeline.

    Returns:
        The report and the images.
    """
    prompts = [claim["prompt"] for claim in claims]
    seeds = list(range(len(claims)))
    output = pipe(prompts, seed=seeds, batch_size=batch_size, **settings)
    return score([np.asarray(image) for image in output.images], claims), output.images


class SampleHook:
    """Draws fixed captions and, on the built-in world, scores held-out ones."""

    def __init__(
        self,
        workdir: pathlib.Path,
        make_pipeline: Callable[[Any], NextStepPipeline],
        level: str | None = None,
        prompts: Sequence[str] = (),
        num_pictures: int = 16,
        num_scored: int = 0,
        guidance_scales: Sequence[float] = (2.0,),
    ):
        """`make_pipeline` takes parameters; `level` names the world's captions, else `prompts`.

        Raises:
            ValueError: Neither is given, or scores are wanted of prompts that nobody can check.
        """
        if level is None and (not prompts or num_scored):
            raise ValueError("score: give a level of the world, or prompts and num_scored=0")
        self._folder = pathlib.Path(workdir) / "samples"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._make = make_pipeline
        self._claims = [{"prompt": prompt} for prompt in prompts]
        if level is not None:
            self._claims = heldout_prompts(level, max(num_pictures, num_scored), seed=0)
        self._num_pictures, self._num_scored = num_pictures, num_scored
        self._scales = tuple(guidance_scales)

    def __call__(self, step: int, state: Any, writer: Any) -> None:
        """Samples from the moving average where there is one."""
        params = state.params if state.ema is None else state.ema
        pipe = self._make(params)
        claims = self._claims[: max(self._num_scored, self._num_pictures)]
        scores = []
        for scale in self._scales:
            prompts = [claim["prompt"] for claim in claims]
            seeds = list(range(len(claims)))
            images = pipe(prompts, seed=seeds, batch_size=_BATCH_SIZE, guidance_scale=scale).images
            captions = prompts[: self._num_pictures]
            picture = captioned_grid(images[: self._num_pictures], captions)
            name = f"step-{step:07d}-guidance-{scale:g}.png"
            picture.save(self._folder / name)
            writer.image(step, f"samples/guidance-{scale:g}", np.asarray(picture))
            if self._num_scored:
                report = score([np.asarray(image) for image in images], claims)
                scores.append({"step": step, "guidance_scale": scale, **report.as_dict()})
        if scores:
            self._write(step, scores)

    def _write(self, step: int, scores: list[dict[str, Any]]) -> None:
        """Adds the lines of a step; those of steps that a restart repeats are cut."""
        path = self._folder.parent / SCORES
        old = path.read_text().splitlines() if path.exists() else []
        lines = [line for line in old if json.loads(line)["step"] < step]
        fresh = path.with_suffix(".tmp")
        fresh.write_text("\n".join([*lines, *(json.dumps(line) for line in scores)]) + "\n")
        fresh.rename(path)


class ReconstructionHook:
    """Held-out images beside what the tokenizer makes of them."""

    def __init__(self, workdir: pathlib.Path, vae: VAE, pixels: np.ndarray):
        """`pixels` is uint8 (n, height, width, 3)."""
        self._folder = pathlib.Path(workdir) / "samples"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._pixels = pixels
        self._reconstruct = jax.jit(lambda params, x: to_uint8(vae.apply({"params": params}, x)))

    def __call__(self, step: int, state: Any, writer: Any) -> None:
        """Writes the grid."""
        params = state.params if state.ema is None else state.ema
        decoded = np.asarray(self._reconstruct(params, from_uint8(self._pixels)))
        picture = pairs_grid(self._pixels, decoded)
        picture.save(self._folder / f"step-{step:07d}.png")
        writer.image(step, "reconstructions", np.asarray(picture))
