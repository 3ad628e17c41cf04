"""What a trainer calls between steps: sample grids, reconstructions, and scores.

The loop knows none of this; a program hands the hooks in. Each writes to `samples/` in the
workdir and to TensorBoard; scores also go to `scores.jsonl`, one line a call.

On several processes all of them call a hook at the same step. Each takes a copy of the parameters
onto its own devices, samples its share of the prompts there, and process 0 writes.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import UInt8
from PIL import Image

from nextstep_jax.data.shapes import heldout_prompts
from nextstep_jax.evaluation.pictures import captioned_grid, pairs_grid
from nextstep_jax.evaluation.scoring import Report, score
from nextstep_jax.models.decoder import LAYERS
from nextstep_jax.models.nextstep import NextStep, init_params
from nextstep_jax.models.vae import VAE, from_uint8, to_uint8
from nextstep_jax.parallel import sharding
from nextstep_jax.parallel.mesh import make_mesh
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


def sampling_params(model: NextStep, params: Any) -> tuple[Any, Mesh | None]:
    """The parameters of a run, wherever they lie, as a pipeline of this process takes them.

    Where they lie on several devices, the result is unrolled, in the model's dtype, and split over
    the devices of each process: 28 GB of a 14B model in bfloat16 over the 4 or 8 devices of a host.
    It is gathered layer by layer; meanwhile a device holds one whole layer, or embedding table,
    more. Every process must call.

    Args:
        model: Whose dtype the result has.
        params: Layers stacked, unboxed, on a mesh.

    Returns:
        The parameters, and the mesh of this process's devices; or, on a single device, the same
        and None.
    """
    source = jax.tree.leaves(params)[0].sharding
    if len(source.device_set) == 1:
        return params, None
    mesh = make_mesh({"fsdp": -1}, jax.local_devices())
    model = model.clone(scan_layers=False)
    boxed = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    targets = sharding.tree_shardings(boxed, mesh)
    to_everyone = sharding.replicated(source.mesh)

    @functools.partial(jax.jit, out_shardings=to_everyone)
    def whole(tree):
        return jax.tree.map(lambda x: x.astype(model.dtype), tree)

    @functools.partial(jax.jit, out_shardings=to_everyone)
    def layer(tree, number):
        return whole(jax.tree.map(lambda x: x[number], tree))

    def split(tree, target):
        return jax.tree.map(lambda x, t: jax.device_put(_local(x, mesh), t), tree, target)

    parts = {name: part for name, part in params.items() if name != "decoder"}
    result = {name: split(whole(part), targets[name]) for name, part in parts.items()}
    stacked, targets = params["decoder"], targets["decoder"]
    decoder = {k: split(whole(part), targets[k]) for k, part in stacked.items() if k != LAYERS}
    for number in range(model.config.decoder.num_layers):
        one = layer(stacked[LAYERS], np.int32(number))
        decoder[f"{LAYERS}_{number}"] = split(one, targets[f"{LAYERS}_{number}"])
    return {**result, "decoder": decoder}, mesh


def _local(x: Any, mesh: Mesh) -> Any:
    """An array that every device of all processes holds whole, as one of this process alone."""
    copies = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, sharding.replicated(mesh), copies)


def sample_together(
    pipe: NextStepPipeline, prompts: Sequence[str], **settings: Any
) -> list[Image.Image]:
    """One image a prompt, number i with seed i; each process samples its share of them.

    Every process must call, and gets all images.

    Args:
        pipe: On this process's devices.
        prompts: The same on every process.
        **settings: Arguments of the pipeline.
    """
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        return pipe(prompts, seed=list(range(len(prompts))), **settings).images
    each = -(-len(prompts) // count)
    # Shares of one size, for gathering: the last prompt fills them up.
    mine = [min(index + count * i, len(prompts) - 1) for i in range(each)]
    images = pipe([prompts[i] for i in mine], seed=mine, **settings).images
    shares = multihost_utils.process_allgather(np.stack([np.asarray(image) for image in images]))
    return [Image.fromarray(shares[i % count, i // count]) for i in range(len(prompts))]


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
            settings = {"batch_size": _BATCH_SIZE, "guidance_scale": scale}
            images = sample_together(pipe, prompts, **settings)
            if jax.process_index():
                continue
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

    def __init__(
        self, workdir: pathlib.Path, vae: VAE, pixels: UInt8[np.ndarray, "n height width 3"]
    ):
        """Shows these pixels."""
        self._folder = pathlib.Path(workdir) / "samples"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._pixels = pixels
        self._reconstruct = jax.jit(lambda params, x: to_uint8(vae.apply({"params": params}, x)))

    def __call__(self, step: int, state: Any, writer: Any) -> None:
        """Writes the grid."""
        params = state.params if state.ema is None else state.ema
        if jax.process_count() > 1:
            whole = sharding.replicated(jax.tree.leaves(params)[0].sharding.mesh)
            params = jax.jit(lambda tree: tree, out_shardings=whole)(params)
            params = jax.tree.map(lambda x: x.addressable_data(0), params)
        if jax.process_index():
            return
        decoded = np.asarray(self._reconstruct(params, from_uint8(self._pixels)))
        picture = pairs_grid(self._pixels, decoded)
        picture.save(self._folder / f"step-{step:07d}.png")
        writer.image(step, "reconstructions", np.asarray(picture))
