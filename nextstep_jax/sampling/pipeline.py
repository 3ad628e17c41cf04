"""What users hold: prompts in, pictures out.

    pipe = NextStepPipeline.from_pretrained("runs/shapes")
    pipe("a red circle", seed=1).images[0].save("circle.png")

Arguments follow the habits of diffusers. An image is a function of its prompt, its seed and the
settings: image j of a prompt has the seed `seed + j`, and neither the other prompts of the call
nor the batch size nor the devices change it.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float, UInt8
from PIL import Image

from nextstep_jax.data.text_tokenizer import TextTokenizer
from nextstep_jax.models.nextstep import NextStep, init_params, unrolled
from nextstep_jax.models.vae import VAE, from_uint8, to_uint8
from nextstep_jax.parallel import sharding
from nextstep_jax.parallel.mesh import make_mesh
from nextstep_jax.sampling.generate import (
    Prompts,
    pad_prompts,
    prefill_jit,
    sample_chunk,
)
from nextstep_jax.sampling.presets import (
    Preset,
    get_preset,
    preset_from_settings,
    replace_fields,
)
from nextstep_jax.sampling.requests import (
    InputImage,
    Request,
    first_seeds,
    fit_inputs,
    guidance_branches,
    input_images,
    output_grid,
)

# Prompts are padded to a multiple of this, so that few lengths are compiled.
_PROMPT_MULTIPLE = 32
# (tokens done, tokens in all) of a call; the images of a batch count once.
Callback = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class PipelineOutput:
    """Result of a call.

    Attributes:
        images: PIL pictures, prompt by prompt, `num_images_per_prompt` each.
        tokens: float32 (images, n, token), the sampled image tokens.
        settings: For each image the prompt, seed and settings that made it.
    """

    images: list[Image.Image]
    tokens: np.ndarray
    settings: list[dict[str, Any]]


class NextStepPipeline:
    """A model with its tokenizers, ready to sample.

    Attributes:
        model: The model, layers unrolled.
        params: Its parameters, one subtree a layer.
        vae: The image tokenizer.
        vae_params: Its parameters.
        tokenizer: The text tokenizer.
        preset: Default settings.
        image_size: Default (height, width) in pixels.
        mesh: Devices over which the images of a batch are spread, and the parameters where its
            fsdp and tensor axes are larger than 1; or None for one device.
        max_prompt_length: Longest prompt in text tokens, with the size strings; the tokens of
            input images do not count.
        step: The training step of the parameters, if known.
    """

    def __init__(
        self,
        model: NextStep,
        params: Any,
        vae: VAE,
        vae_params: Any,
        tokenizer: TextTokenizer,
        *,
        preset: Preset | None = None,
        image_size: tuple[int, int] = (512, 512),
        mesh: jax.sharding.Mesh | None = None,
        max_prompt_length: int = 512,
        step: int | None = None,
    ):
        """Takes stacked or unrolled parameters and places them on the mesh."""
        self.model = model.clone(scan_layers=False)
        self.params = unrolled(params) if "layers" in params["decoder"] else params
        self.vae, self.vae_params = vae, vae_params
        self.tokenizer = tokenizer
        self.preset = preset or get_preset("nextstep-1")
        self.image_size, self.mesh = tuple(image_size), mesh
        self.max_prompt_length, self.step = max_prompt_length, step
        if mesh is not None:
            init = functools.partial(init_params, self.model)
            boxed = jax.eval_shape(init, jax.random.key(0))
            self.params = jax.device_put(self.params, sharding.tree_shardings(boxed, mesh))
            self.vae_params = jax.device_put(self.vae_params, sharding.replicated(mesh))

    @classmethod
    def from_pretrained(
        cls,
        directory: str | pathlib.Path,
        *,
        vae: str | pathlib.Path | None = None,
        dtype: Any = jnp.float32,
        mesh: jax.sharding.Mesh | None = None,
        preset: str | None = None,
    ) -> "NextStepPipeline":
        """Reads a model directory, such as the workdir of a training run, or a published model.

        Args:
            directory: See `interop.model_directory`; or the folder of a published NextStep-1 or
                1.1 as it is: config.json, safetensors, tokenizer.json.
            vae: The folder of a published model's image tokenizer, if not `directory/vae`.
            dtype: Dtype of the parameters and of the computation.
            mesh: Devices to spread images over, and the parameters as the sharding rules say.
            preset: Name of the settings to sample with; by default the directory's own, or those
                of the published model's generation.

        Raises:
            FileNotFoundError: Something is missing in the directory.
            ValueError: The directory is of another format, its tensors or ids are not those of its
                config, or it has unknown sampling settings.
        """
        # Here alone sampling reaches up: what users hold has to read what is on disk.
        from nextstep_jax.interop.pretrained import read_pretrained

        chosen = None if preset is None else get_preset(preset)
        folder = None if vae is None else pathlib.Path(vae)
        read = read_pretrained(pathlib.Path(directory), vae=folder, dtype=dtype, mesh=mesh)
        if read.tokenizer is None:
            raise FileNotFoundError(f"{directory} has no tokenizer.json: it cannot be prompted")
        settings = dict(read.sampling)
        image_size = tuple(settings.pop("image_size", (512, 512)))
        return cls(
            NextStep(read.config, dtype=dtype),
            read.params,
            VAE(read.vae_config, dtype=dtype),
            read.vae_params,
            read.tokenizer,
            preset=chosen or preset_from_settings(settings),
            image_size=image_size,
            mesh=mesh,
            step=read.step,
        )

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | None = None,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        callback: Callback | None = None,
        *,
        positive_prompt: str | None = None,
        shared_noise: bool = False,
        batch_size: int = 16,
        chunk_tokens: int = 64,
        **sampler: Any,
    ) -> PipelineOutput:
        """Samples images.

        Args:
            prompt: One caption or several. For edits the place of each input image is marked by
                `<image>`; without any mark they stand first.
            negative_prompt: Text of the unconditional branch, where it stands alone, without the
                input images (as published).
            image: Input image or images of every prompt (PIL of any mode, or uint8 arrays), for
                edits. Each is fitted to its nearest aspect grid at the base of the output.
            height: Pixels; with the width on one of the 17 aspect grids at some base, as every
                square of whole tokens is. By default that of `image_size`; but where there are
                input images and neither side is given, the output takes the aspect of the first.
            width: Pixels.
            num_inference_steps: Steps of the solver for every token.
            guidance_scale: Text guidance; 1 leaves the unconditional branch out.
            image_guidance_scale: Guidance towards the input images; 1 leaves its branch out.
            num_images_per_prompt: Images of every prompt.
            seed: Seed of the first image of every prompt, or one seed a prompt; image j of a
                prompt has the seed `seed + j`.
            callback: Called with (tokens done, tokens in all) of the call, where the images of a
                batch count once.
            positive_prompt: Appended to every prompt after one space.
            shared_noise: All prompts take the seeds of the first: one noise for all captions,
                another for each image of a caption, as the released code draws it.
            batch_size: Images sampled together.
            chunk_tokens: Tokens between two calls of the callback.
            **sampler: Fields of `SamplerConfig`.

        Raises:
            ValueError: A size off the aspect grids, a prompt that is too long, tags and input
                images that differ in number, a guidance scale that is not finite, a seed out of
                range, unknown settings; before anything runs on the device.
        """
        if num_inference_steps is not None:
            sampler["num_steps"] = num_inference_steps
        given = {
            "guidance_scale": guidance_scale,
            "image_guidance_scale": image_guidance_scale,
            "positive_prompt": positive_prompt,
            "negative_prompt": negative_prompt,
        }
        preset = dataclasses.replace(
            self.preset,
            sampler=replace_fields(self.preset.sampler, sampler),
            **{name: value for name, value in given.items() if value is not None},
        )
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        sizes = {"batch_size": batch_size, "chunk_tokens": chunk_tokens, "prompts": len(prompts)}
        for name, number in {**sizes, "num_images_per_prompt": num_images_per_prompt}.items():
            if number < 1:
                raise ValueError(f"{name}={number} must be at least 1")
        seeds = first_seeds(seed, len(prompts), num_images_per_prompt, shared_noise=shared_noise)
        stride = self.model.config.pixels_per_token
        inputs = input_images(image)
        grid = output_grid(height, width, self.image_size, inputs, stride)
        inputs = fit_inputs(inputs, grid, stride)
        plan = (prompts, preset, grid, inputs, seeds, num_images_per_prompt)
        requests, settings = self._requests(*plan, shared_noise=shared_noise)
        scales = np.array([preset.guidance_scale, preset.image_guidance_scale], np.float32)
        batch_size = self._whole_batch(min(batch_size, len(requests)))
        run = (preset.sampler, grid, batch_size, chunk_tokens, callback)
        tokens = self._run(requests, self._encode(inputs), scales, *run)
        pixels = self.decode(tokens, grid, batch_size)
        return PipelineOutput([Image.fromarray(p) for p in pixels], tokens, settings)

    def decode(
        self,
        tokens: Float[np.ndarray, "images n token"],
        grid: tuple[int, int],
        batch_size: int = 16,
    ) -> UInt8[np.ndarray, "images height width 3"]:
        """Image tokens on a grid of (rows, columns) to pixels."""
        batch_size = self._whole_batch(min(batch_size, len(tokens)))
        pixels = []
        for start in range(0, len(tokens), batch_size):
            part = self._spread(_fill(tokens[start : start + batch_size], batch_size))
            decoded = _decode(self.vae, self.vae_params, part, grid, self.model.config.patch_size)
            pixels.append(np.asarray(decoded)[: len(tokens) - start])
        return np.concatenate(pixels)

    def _requests(
        self, prompts, preset, grid, inputs, seeds, num_images, **also
    ) -> tuple[list[Request], list[dict[str, Any]]]:
        """What is to be made, image by image, and the settings that make each."""
        stride = self.model.config.pixels_per_token
        input_grids = [(p.shape[0] // stride, p.shape[1] // stride) for p in inputs]
        limit = self.max_prompt_length
        requests, settings = [], []
        for text, first_seed in zip(prompts, seeds, strict=True):
            branches = guidance_branches(text, preset, grid, input_grids, self.tokenizer, limit)
            for one_seed in range(first_seed, first_seed + num_images):
                requests.append(Request(*branches, one_seed))
                settings.append(
                    {
                        "prompt": text,
                        "positive_prompt": preset.positive_prompt,
                        "negative_prompt": preset.negative_prompt,
                        "seed": one_seed,
                        "height": grid[0] * stride,
                        "width": grid[1] * stride,
                        "guidance_scale": preset.guidance_scale,
                        "image_guidance_scale": preset.image_guidance_scale,
                        **also,
                        **dataclasses.asdict(preset.sampler),
                    }
                )
        return requests, settings

    def _encode(self, inputs: list[InputImage]) -> np.ndarray | None:
        """The tokens of all input images, one after another; None without any."""
        patch_size = self.model.config.patch_size
        tokens = [_encode(self.vae, self.vae_params, p[None], patch_size)[0] for p in inputs]
        return np.concatenate([np.asarray(t) for t in tokens]) if tokens else None

    def _run(
        self, requests, input_tokens, guidance, config, grid, batch_size, chunk_tokens, callback
    ):
        """Batches of requests to tokens; the last batch is filled up and cut."""
        longest = max(len(ids) for request in requests for ids in request.branches)
        length = -(-longest // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE
        num_tokens, tokens = grid[0] * grid[1], []
        total = num_tokens * -(-len(requests) // batch_size)
        for start in range(0, len(requests), batch_size):
            part = requests[start : start + batch_size]
            filled = part + [part[-1]] * (batch_size - len(part))
            prompts, keys = self._place(filled, length, input_tokens)
            with self._scope():
                state = prefill_jit(self.model, self.params, prompts, keys, num_tokens)
                for done in range(0, num_tokens, chunk_tokens):
                    steps = min(chunk_tokens, num_tokens - done)
                    state = sample_chunk(self.model, self.params, state, guidance, config, steps)
                    if callback is not None:
                        jax.block_until_ready(state.index)
                        callback(start // batch_size * num_tokens + done + steps, total)
            tokens.append(np.asarray(state.tokens)[: len(part)])
        return np.concatenate(tokens)

    def _place(self, requests, length, input_tokens) -> tuple[Prompts, Any]:
        """Prompts and keys of a batch on the devices; the branches of an image are neighbours."""
        config = self.model.config
        prompts = pad_prompts(
            [ids for request in requests for ids in request.branches],
            config.pad_id,
            config.token_dim,
            length,
            [input_tokens if sees else None for r in requests for sees in r.sees_inputs],
            config.image_placeholder_id,
        )
        seeds = np.array([request.seed for request in requests], np.uint32)
        return self._spread((prompts, jax.vmap(jax.random.key)(seeds)))

    def _whole_batch(self, size: int) -> int:
        """The size rounded up to a multiple of the devices that share a batch."""
        if self.mesh is None:
            return size
        ways = math.prod(self.mesh.shape[axis] for axis in sharding.BATCH_AXES)
        return -(-size // ways) * ways

    def _spread(self, batch: Any) -> Any:
        """Puts the rows of a batch on the devices of the mesh."""
        if self.mesh is None:
            return batch
        return jax.device_put(batch, sharding.batch_sharding(self.mesh))

    def _scope(self):
        """The mesh and the sharding rules, where there is a mesh."""
        stack = contextlib.ExitStack()
        if self.mesh is not None:
            stack.enter_context(jax.set_mesh(self.mesh))
            stack.enter_context(nn.logical_axis_rules(sharding.RULES))
        return stack


@functools.partial(jax.jit, static_argnames=("vae", "grid", "patch_size"))
def _decode(vae, params, tokens, grid, patch_size):
    images = vae.apply({"params": params}, tokens, grid, patch_size, method="decode_tokens")
    return to_uint8(images)


@functools.partial(jax.jit, static_argnames=("vae", "patch_size"))
def _encode(vae, params, pixels, patch_size):
    images = from_uint8(pixels)
    return vae.apply({"params": params}, images, patch_size, method="encode_tokens")


def data_parallel_mesh() -> jax.sharding.Mesh:
    """A mesh that spreads images over all devices."""
    return make_mesh({"data": -1})


def _fill(x: np.ndarray, size: int) -> np.ndarray:
    """Repeats the last row until there are `size`, so that one program serves all batches."""
    return np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)]) if len(x) < size else x
