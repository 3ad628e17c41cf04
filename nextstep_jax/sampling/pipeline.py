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

# Prompts are padded to a multiple of this, so that few lengths are compiled.
_PROMPT_MULTIPLE = 32
# Seeds are the 32-bit words that typed keys are made of.
_NUM_SEEDS = 2**32
# Characters of a prompt that an error message repeats.
_QUOTED_PROMPT = 60
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


@dataclasses.dataclass(frozen=True)
class _Request:
    """One image to be made: ids of its branches, which of them see the input images, its seed."""

    branches: tuple[tuple[int, ...], ...]
    sees_inputs: tuple[bool, ...]
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
            ValueError: The directory is of another format, or has unknown sampling settings.
        """
        # Here alone sampling reaches up: what users hold has to read what is on disk.
        from nextstep_jax.interop.model_directory import read_model_directory

        read = read_model_directory(pathlib.Path(directory))
        settings = dict(read.sampling)
        image_size = tuple(settings.pop("image_size", (512, 512)))
        preset = preset_from_settings(settings)
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
            seed: Seed of the first image of every prompt, or one seed a prompt; image j of a
                prompt has the seed `seed + j`.
            callback: Called with (tokens done, tokens in all) of the call, where the images of a
                batch count once.
            positive_prompt: Appended to every prompt after one space.
            batch_size: Images sampled together.
            chunk_tokens: Tokens between two calls of the callback.
            **sampler: Fields of `SamplerConfig`.

        Raises:
            ValueError: A size off the grid, a prompt that is too long, a guidance scale that is
                not finite, a seed out of range, unknown settings; before anything runs on the
                device.
        """
        preset = self.preset
        if num_inference_steps is not None:
            sampler["num_steps"] = num_inference_steps
        config = replace_fields(preset.sampler, sampler)
        scale = _or(guidance_scale, preset.guidance_scale)
        image_scale = _or(image_guidance_scale, preset.image_guidance_scale)
        for name, number in {"guidance_scale": scale, "image_guidance_scale": image_scale}.items():
            if not math.isfinite(number):
                raise ValueError(f"{name}={number} must be a finite number")
        size = (_or(height, self.image_size[0]), _or(width, self.image_size[1]))
        grid = grid_of(*size, self.model.config.pixels_per_token)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        sizes = {"batch_size": batch_size, "chunk_tokens": chunk_tokens, "prompts": len(prompts)}
        for name, number in {**sizes, "num_images_per_prompt": num_images_per_prompt}.items():
            if number < 1:
                raise ValueError(f"{name}={number} must be at least 1")
        seeds = _seeds(seed, len(prompts), num_images_per_prompt)
        positive = _or(positive_prompt, preset.positive_prompt)
        negative = _or(negative_prompt, preset.negative_prompt)
        inputs = _fit_inputs(image, size)

        requests, settings = [], []
        for text, first_seed in zip(prompts, seeds, strict=True):
            full = f"{text} {positive}" if positive else text
            branches, sees_inputs = self._branches(
                full, negative, grid, len(inputs), scale, image_scale
            )
            for j in range(num_images_per_prompt):
                requests.append(_Request(branches, sees_inputs, first_seed + j))
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
        batch_size = self._whole_batch(min(batch_size, len(requests)))
        input_tokens = self._encode(inputs)
        tokens = self._run(
            requests, input_tokens, guidance, config, grid, batch_size, chunk_tokens, callback
        )
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

    def _encode(self, inputs: list[np.ndarray]) -> np.ndarray | None:
        """The tokens of all input images, one after another; None without any."""
        patch_size = self.model.config.patch_size
        tokens = [_encode(self.vae, self.vae_params, p[None], patch_size)[0] for p in inputs]
        return np.concatenate([np.asarray(t) for t in tokens]) if tokens else None

    def _branches(self, prompt, negative, grid, num_inputs, scale, image_scale) -> tuple:
        """Ids of the 1 to 3 guidance branches (arXiv 2508.10711, eq 4), and which see the inputs.

        Order: everything; the input images with the negative prompt; the negative prompt alone.
        """
        with_inputs = functools.partial(
            prompt_prefix, grid=grid, tokenizer=self.tokenizer, input_grids=[grid] * num_inputs
        )
        branches, sees_inputs = [with_inputs(prompt)], [num_inputs > 0]
        names = ["prompt", "negative prompt", "negative prompt"]
        three = num_inputs > 0 and image_scale != 1.0
        # At an image scale of 1 the last branch of three cancels; without inputs the middle one.
        if three or (num_inputs and scale != 1.0):
            branches.append(with_inputs(negative))
            sees_inputs.append(True)
        if three or (not num_inputs and scale != 1.0):
            branches.append(prompt_prefix(negative, grid, self.tokenizer))
            sees_inputs.append(False)
        # The tokens of an input image follow from its size, which nobody can shorten as a text.
        placeholder = self.model.config.image_placeholder_id
        for name, ids in zip(names, branches, strict=False):
            num_text = len(ids) - ids.count(placeholder)
            if num_text > self.max_prompt_length:
                text = prompt if name == "prompt" else negative
                cut = text if len(text) <= _QUOTED_PROMPT else text[:_QUOTED_PROMPT] + "..."
                raise ValueError(
                    f"the {name} {cut!r} has {num_text} text tokens with its size string;"
                    f" the limit is {self.max_prompt_length}"
                )
        return tuple(tuple(ids) for ids in branches), tuple(sees_inputs)

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


def _fit_inputs(image: Any, size: tuple[int, int]) -> list[np.ndarray]:
    """Input images, PIL or uint8 arrays, as uint8 arrays of the size of the output."""
    images = [] if image is None else image if isinstance(image, list | tuple) else [image]
    fitted = []
    for one in images:
        pixels = np.asarray(one.convert("RGB") if isinstance(one, Image.Image) else one)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
            raise ValueError(
                f"image must be a PIL image or uint8 (height, width, 3),"
                f" got {pixels.dtype} {pixels.shape}"
            )
        fitted.append(resize_cover(pixels, *size))
    return fitted


def _seeds(seed: int | Sequence[int], num_prompts: int, num_images: int) -> list[int]:
    """The seed of the first image of every prompt."""
    one = isinstance(seed, int | np.integer)
    seeds = [int(seed)] * num_prompts if one else [int(value) for value in seed]
    if len(seeds) != num_prompts:
        raise ValueError(f"seed: {len(seeds)} seeds for {num_prompts} prompts")
    if min(seeds) < 0 or max(seeds) + num_images > _NUM_SEEDS:
        raise ValueError(f"seeds of images must lie in [0, {_NUM_SEEDS}), got {seed}")
    return seeds


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
