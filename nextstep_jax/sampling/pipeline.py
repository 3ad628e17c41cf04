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
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from PIL import Image

from nextstep_jax.data.buckets import grid_of
from nextstep_jax.data.images import resize_cover
from nextstep_jax.data.layout import prompt_prefix
from nextstep_jax.data.text_tokenizer import TextTokenizer
from nextstep_jax.models.nextstep import NextStep, unrolled
from nextstep_jax.models.vae import VAE, from_uint8, to_uint8
from nextstep_jax.parallel import sharding
from nextstep_jax.parallel.mesh import make_mesh
from nextstep_jax.sampling.generate import (
    Prompts,
    SamplerConfig,
    pad_prompts,
    prefill_jit,
    sample_chunk,
)
from nextstep_jax.sampling.presets import Preset, get_preset

# Prompts are padded to a multiple of this, so that few lengths are compiled.
_PROMPT_MULTIPLE = 32
# (tokens done, tokens in all) of the running batch.
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


@dataclasses.dataclass(frozen=True)
class _Request:
    """One image to be made: ids of its branches, its input images' tokens, its seed."""

    branches: tuple[tuple[int, ...], ...]
    image_tokens: tuple[Any, ...]
    seed: int


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
        mesh: Devices over which the images of a batch are spread, or None for one device.
        max_prompt_length: Longest prompt in tokens, with the size string.
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
    ):
        """Takes stacked or unrolled parameters and places them on the mesh."""
        self.model = model.clone(scan_layers=False)
        self.params = unrolled(params) if "layers" in params["decoder"] else params
        self.vae, self.vae_params = vae, vae_params
        self.tokenizer = tokenizer
        self.preset = preset or get_preset("nextstep-1")
        self.image_size, self.mesh = tuple(image_size), mesh
        self.max_prompt_length = max_prompt_length
        if mesh is not None:
            everywhere = sharding.replicated(mesh)
            self.params = jax.device_put(self.params, everywhere)
            self.vae_params = jax.device_put(self.vae_params, everywhere)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | pathlib.Path,
        *,
        dtype: Any = jnp.float32,
        mesh: jax.sharding.Mesh | None = None,
    ) -> "NextStepPipeline":
        """Reads a model directory, such as the workdir of a training run.

        Args:
            directory: See `interop.model_directory`.
            dtype: Dtype of the parameters and of the computation.
            mesh: Devices to spread images over.

        Raises:
            FileNotFoundError: Something is missing in the directory.
            ValueError: The directory is of another format.
        """
        # Here alone sampling reaches up: what users hold has to read what is on disk.
        from nextstep_jax.interop.model_directory import read_model_directory

        read = read_model_directory(pathlib.Path(directory))
        settings = dict(read.sampling)
        preset = get_preset(settings.pop("preset", "nextstep-1"))
        image_size = tuple(settings.pop("image_size", (512, 512)))
        sampler = dataclasses.replace(preset.sampler, **settings.pop("sampler", {}))
        preset = dataclasses.replace(preset, sampler=sampler, **settings)
        cast = functools.partial(jnp.asarray, dtype=dtype)
        return cls(
            NextStep(read.config, dtype=dtype),
            jax.tree.map(cast, read.params),
            VAE(read.vae_config, dtype=dtype),
            read.vae_params,
            read.tokenizer,
            preset=preset,
            image_size=image_size,
            mesh=mesh,
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
        batch_size: int = 16,
        chunk_tokens: int = 64,
        **sampler: Any,
    ) -> PipelineOutput:
        """Samples images.

        Args:
            prompt: One caption or several. For edits the place of an input image may be marked
                by `<image>`.
            negative_prompt: Text of the unconditional branch.
            image: Input image or images of every prompt (PIL or uint8 arrays), for edits.
            height: Pixels; a multiple of the pixels of a token.
            width: Pixels.
            num_inference_steps: Steps of the solver for every token.
            guidance_scale: Text guidance; 1 leaves the unconditional branch out.
            image_guidance_scale: Guidance towards the input image; 1 leaves its branch out.
            num_images_per_prompt: Images of every prompt.
            seed: Seed of the first image of every prompt, or one seed a prompt.
            callback: Called with (tokens done, tokens in all) of the running batch.
            positive_prompt: Appended to every prompt after one space.
            batch_size: Images sampled together.
            chunk_tokens: Tokens between two calls of the callback.
            **sampler: Fields of `SamplerConfig`.

        Raises:
            ValueError: A size off the grid, a prompt that is too long, unknown settings; before
                anything runs on the device.
        """
        preset = self.preset
        if num_inference_steps is not None:
            sampler["num_steps"] = num_inference_steps
        config = _replace(preset.sampler, sampler)
        scale = _or(guidance_scale, preset.guidance_scale)
        image_scale = _or(image_guidance_scale, preset.image_guidance_scale)
        size = (_or(height, self.image_size[0]), _or(width, self.image_size[1]))
        grid = grid_of(*size, self.model.config.pixels_per_token)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise ValueError(f"seed: {len(seeds)} seeds for {len(prompts)} prompts")
        if batch_size < 1 or num_images_per_prompt < 1 or not prompts:
            raise ValueError("prompt, num_images_per_prompt and batch_size must not be empty or 0")
        positive = _or(positive_prompt, preset.positive_prompt)
        negative = _or(negative_prompt, preset.negative_prompt)
        inputs = self._encode_inputs(image, size)

        requests, settings = [], []
        for text, first_seed in zip(prompts, seeds, strict=True):
            full = f"{text} {positive}" if positive else text
            branches, image_tokens = self._branches(
                full, negative, grid, inputs, scale, image_scale
            )
            for j in range(num_images_per_prompt):
                requests.append(_Request(branches, image_tokens, first_seed + j))
                settings.append(
                    {
                        "prompt": text,
                        "positive_prompt": positive,
                        "negative_prompt": negative,
                        "seed": first_seed + j,
                        "height": size[0],
                        "width": size[1],
                        "guidance_scale": scale,
                        "image_guidance_scale": image_scale,
                        **dataclasses.asdict(config),
                    }
                )
        guidance = np.array([scale, image_scale], np.float32)
        tokens = self._run(requests, guidance, config, grid, batch_size, chunk_tokens, callback)
        pixels = self.decode(tokens, grid, batch_size)
        return PipelineOutput([Image.fromarray(p) for p in pixels], tokens, settings)

    def decode(self, tokens: np.ndarray, grid: tuple[int, int], batch_size: int = 16) -> np.ndarray:
        """Image tokens (images, n, token) to uint8 pixels (images, height, width, 3)."""
        pixels = []
        for start in range(0, len(tokens), batch_size):
            part = _fill(tokens[start : start + batch_size], batch_size)
            decoded = _decode(self.vae, self.vae_params, part, grid, self.model.config.patch_size)
            pixels.append(np.asarray(decoded)[: len(tokens) - start])
        return np.concatenate(pixels)

    def _encode_inputs(self, image: Any, size: tuple[int, int]) -> list[tuple]:
        """Input images to (grid, tokens), cropped to the size of the output."""
        if image is None:
            return []
        inputs = []
        for one in image if isinstance(image, list | tuple) else [image]:
            pixels = np.asarray(one.convert("RGB") if isinstance(one, Image.Image) else one)
            pixels = resize_cover(pixels, *size)[None]
            tokens = _encode(self.vae, self.vae_params, pixels, self.model.config.patch_size)
            grid = grid_of(*size, self.model.config.pixels_per_token)
            inputs.append((grid, np.asarray(tokens)[0]))
        return inputs

    def _branches(self, prompt, negative, grid, inputs, scale, image_scale) -> tuple:
        """Ids and input tokens of the guidance branches: 1 to 3 (arXiv 2508.10711, eq 4).

        Order: everything; the input images with the negative prompt; the negative prompt alone.
        """
        input_grids = [one[0] for one in inputs]
        tokens = np.concatenate([one[1] for one in inputs]) if inputs else None
        with_inputs = functools.partial(
            prompt_prefix, grid=grid, tokenizer=self.tokenizer, input_grids=input_grids
        )
        branches, image_tokens = [with_inputs(prompt)], [tokens]
        three = bool(inputs) and image_scale != 1.0
        # At an image scale of 1 the last two branches of three cancel but for the images.
        if three or (inputs and scale != 1.0):
            branches.append(with_inputs(negative))
            image_tokens.append(tokens)
        if three or (not inputs and scale != 1.0):
            branches.append(prompt_prefix(negative, grid, self.tokenizer))
            image_tokens.append(None)
        for ids in branches:
            if len(ids) > self.max_prompt_length:
                raise ValueError(
                    f"prompt {prompt!r} has {len(ids)} tokens with its size string;"
                    f" the limit is {self.max_prompt_length}"
                )
        return tuple(tuple(ids) for ids in branches), tuple(image_tokens)

    def _run(self, requests, guidance, config, grid, batch_size, chunk_tokens, callback):
        """Batches of requests to tokens; the last batch is filled up and cut."""
        longest = max(len(ids) for request in requests for ids in request.branches)
        length = -(-longest // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE
        if self.mesh is not None:
            ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
            batch_size = -(-batch_size // ways) * ways
        batch_size = batch_size if len(requests) > batch_size or self.mesh else len(requests)
        num_tokens, tokens = grid[0] * grid[1], []
        for start in range(0, len(requests), batch_size):
            part = requests[start : start + batch_size]
            filled = part + [part[-1]] * (batch_size - len(part))
            prompts, keys = self._place(filled, length)
            with self._scope():
                state = prefill_jit(self.model, self.params, prompts, keys, num_tokens)
                for done in range(0, num_tokens, chunk_tokens):
                    steps = min(chunk_tokens, num_tokens - done)
                    state = sample_chunk(self.model, self.params, state, guidance, config, steps)
                    if callback is not None:
                        jax.block_until_ready(state.index)
                        callback(done + steps, num_tokens)
            tokens.append(np.asarray(state.tokens)[: len(part)])
        return np.concatenate(tokens)

    def _place(self, requests: list[_Request], length: int) -> tuple[Prompts, Any]:
        """Prompts and keys of a batch on the devices; the branches of an image are neighbours."""
        config = self.model.config
        prompts = pad_prompts(
            [ids for request in requests for ids in request.branches],
            config.pad_id,
            config.token_dim,
            length,
            [tokens for request in requests for tokens in request.image_tokens],
            config.image_placeholder_id,
        )
        seeds = np.array([request.seed for request in requests], np.uint32)
        keys = jax.vmap(jax.random.key)(seeds)
        if self.mesh is not None:
            place = sharding.batch_sharding(self.mesh)
            prompts, keys = jax.device_put((prompts, keys), place)
        return prompts, keys

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


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _replace(config: SamplerConfig, changes: dict[str, Any]) -> SamplerConfig:
    known = {field.name for field in dataclasses.fields(SamplerConfig)}
    unknown = sorted(changes.keys() - known)
    if unknown:
        raise ValueError(f"settings {unknown} are unknown; the sampler knows {sorted(known)}")
    return dataclasses.replace(config, **changes)
