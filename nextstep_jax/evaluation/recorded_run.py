"""Recorded runs of the original code, recomputed here and compared number by number.

A recording is a folder with a model in the published format, the inputs and outputs of the
original PyTorch modules in float32 (`golden.npz`), and of its later samplers (`samplers.npz`).
Each stage is compared on its own recorded inputs, so that an error shows where it arises; the
generation alone runs from prompt to pixels.

Relative error is max |ours - recorded| / max |recorded|. Arrays on disk are in PyTorch's order of
axes: (batch, channels, height, width).
"""

import functools
import math
import pathlib
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Shaped

from nextstep_jax.evaluation.comparison import (
    NORMALISED_LATENT,
    SAMPLED,
    Comparison,
    compare,
)
from nextstep_jax.flow.solvers import get_solver
from nextstep_jax.interop.huggingface import find_vae, open_model, open_vae
from nextstep_jax.interop.model_directory import read_json
from nextstep_jax.interop.streaming import tree_of_groups
from nextstep_jax.interop.tensor_map import leaves_of, nextstep_slots, to_published
from nextstep_jax.models.config import NextStepConfig
from nextstep_jax.models.decoder import stack_layers
from nextstep_jax.models.latents import depth_to_space, space_to_depth
from nextstep_jax.models.nextstep import NextStep
from nextstep_jax.models.vae import VAE
from nextstep_jax.sampling.generate import (
    Prompts,
    SamplerConfig,
    embed_times,
    integrate_token,
    prefill,
    sample_step,
)
from nextstep_jax.training.pretrain import nextstep_losses

# Names of the recordings -> ours.
_SCHEDULES = {"constant": "constant", "linear": "falling"}
_SOLVERS = {"ode": "ode", "sde": "flow_sde", "cps": "flow_cps"}
# The image guidance of the recorded single tokens with three branches.
_IMAGE_SCALE = 2.0
_IGNORED_LABEL = -100
_META = {
    **dict.fromkeys(("cfg", "cfg_img", "shift", "lm_w", "im_w"), "number"),
    **{"steps": "count", "use_norm": "flag", "sched": "schedule", "latent_hw": "grid"},
}
_SAMPLER_META = {
    **dict.fromkeys(("shift", "noise_level", "cfg", "cfg_img"), "number"),
    "steps": "count",
}
_NEEDED = (
    *(f"vae_{name}" for name in ("in", "moments", "mean", "logvar", "dec")),
    *(f"train_{name}" for name in ("ids", "labels", "latents", "lm_loss")),
    *(f"{p}_{name}" for p in ("train", "trainp") for name in ("noise", "u", "im_loss", "loss")),
    *("hidden", "logits", "head_x", "head_t", "head_c", "head_v"),
    *(f"sample_{b}/{name}" for b in ("nocfg", "cfg", "cfg2") for name in ("c", "noise", "out")),
    *(f"gen_{name}" for name in ("ids", "mask", "noise", "tokens", "latents", "image")),
)
# Arrays of a recording that are given, not compared.
_INPUT = re.compile(
    r"vae_in|train_(ids|labels|latents)|trainp?_(noise|u)|head_[xtc]|gen_(ids|mask|noise)"
    r"|[^/]+/(c|x0|noise)"
)


class RecordedRun:
    """A recording and the model that it was made with, read by the importer.

    Attributes:
        config: The model's configuration.
        model: The model, layers unrolled.
        params: Its parameters, float32.
        vae: The image tokenizer.
        golden: The arrays of golden.npz.
        samplers: The arrays of samplers.npz, none if the file is not there.
        meta: Settings of the generation.
        sampler_meta: Settings of the later samplers.
    """

    def __init__(self, directory: pathlib.Path):
        """Reads a recording.

        Raises:
            FileNotFoundError: Something is not there.
            ValueError: Arrays or settings are missing or malformed; see also
                `interop.huggingface`.
        """
        self._directory = directory = pathlib.Path(directory)
        folder, beside = directory / "model", directory / "vae"
        values = read_json(folder / "config.json")
        self.golden = _arrays(directory / "golden.npz")
        later = directory / "samplers.npz"
        self.samplers = _arrays(later) if later.is_file() else {}
        self.meta = _settings(directory / "meta.json", _META)
        path = directory / "samplers.json"
        self.sampler_meta = _settings(path, _SAMPLER_META) if self.samplers else {}
        _check_arrays(directory / "golden.npz", self.golden, self.meta)
        vae = open_vae(beside if beside.is_dir() else find_vae(folder, values))
        opened = open_model(folder, downsampling=vae.config.downsampling)
        self.config: NextStepConfig = opened.config
        self.model = NextStep(self.config, scan_layers=False)
        groups = opened.stream(scan_layers=False, dtype=jnp.float32)
        self.params: dict[str, Any] = tree_of_groups(groups)
        self.vae, self._vae_params = VAE(vae.config), vae.load(jnp.float32)
        # Compiled once for both kinds of losses.
        self._loss_and_grads = jax.jit(jax.value_and_grad(self._loss, has_aux=True))

    def compare_all(self, *, august_loss: bool = True) -> Iterator[Comparison]:
        """Every recorded quantity.

        Args:
            august_loss: Also the losses of the code of August 2025, which feeds hidden states to
                the flow head without the output projector. The model never does.
        """
        stages = {
            "image tokenizer": self.compare_vae,
            "decoder": self.compare_decoder,
            "flow head": self.compare_head,
            "losses": functools.partial(self.compare_losses, "trainp", "gradp"),
        }
        if august_loss:
            august = functools.partial(self.compare_losses, without_projector=True)
            stages["losses of August 2025"] = functools.partial(august, "train", "grad")
        stages["sampler of August 2025"] = self.compare_august_sampler
        stages["later samplers"] = self.compare_later_samplers
        stages["generation"] = self.compare_generation
        for name, stage in stages.items():
            try:
                yield from stage()
            # What arrays that do not go together raise, from numpy, jax or us.
            except (ValueError, TypeError, IndexError) as error:
                first = str(error).splitlines()[0]
                raise ValueError(f"{self._directory}, {name}: {first}") from error

    def compare_vae(self) -> Iterator[Comparison]:
        """Encoder moments, normalised mean, log-variance; the decoder on the recorded mean."""
        golden, images = self.golden, _channels_last(self.golden["vae_in"])
        moments = _channels_first(self._run_vae("encode_moments", images))
        yield compare("vae_moments", moments, golden["vae_moments"])
        mean = _channels_first(self._run_vae("encode", images))
        yield compare("vae_mean", mean, golden["vae_mean"], NORMALISED_LATENT)
        log_variance = np.split(moments, 2, axis=1)[1]
        yield compare("vae_logvar", log_variance, golden["vae_logvar"])
        decoded = self._run_vae("decode", _channels_last(golden["vae_mean"]))
        yield compare("vae_dec", _channels_first(decoded), golden["vae_dec"])

    def compare_decoder(self) -> Iterator[Comparison]:
        """Hidden states and logits of the training rows."""
        batch = self._training_batch()
        rows = [batch[n] for n in ("token_ids", "latents", "positions", "segment_ids")]
        hidden = self._run("hidden", *rows)
        yield compare("hidden", hidden, self.golden["hidden"])
        yield compare("logits", self._run("text_logits", hidden), self.golden["logits"])

    def compare_head(self) -> Iterator[Comparison]:
        """The flow head's velocity."""
        golden = self.golden
        inputs = [jnp.asarray(golden[f"head_{n}"]) for n in ("x", "t", "c")]
        yield compare("head_v", self._run("velocity", *inputs), golden["head_v"])

    def compare_losses(
        self, prefix: str, gradients: str, *, without_projector: bool = False
    ) -> Iterator[Comparison]:
        """Training losses and gradients with recorded noise and times, layers scanned.

        Args:
            prefix: Of the losses and draws in the recording.
            gradients: Of the gradients in the recording.
            without_projector: Feeds the flow head the hidden states themselves, by a projector
                that is the identity.
        """
        golden, batch = self.golden, self._training_batch()
        params = {**self.params, "decoder": stack_layers(self.params["decoder"])}
        if without_projector:
            embed_dim = self.config.decoder.embed_dim
            identity = {"kernel": jnp.eye(embed_dim), "bias": jnp.zeros(embed_dim)}
            # Placed like what it replaces, for the same program to serve.
            place = jax.tree.leaves(params)[0].sharding
            params["image_out_proj"] = jax.device_put(identity, place)
        draws = golden[f"{prefix}_u"], golden[f"{prefix}_noise"]
        u, noise = draws_by_row(*draws, np.asarray(batch["image_weights"]) > 0)
        (loss, (text, image)), grads = self._loss_and_grads(params, batch, u, noise)
        if not without_projector:  # The text loss is the same in both.
            yield compare("train_lm_loss", text, golden["train_lm_loss"])
        yield compare(f"{prefix}_im_loss", image, golden[f"{prefix}_im_loss"])
        yield compare(f"{prefix}_loss", loss, golden[f"{prefix}_loss"])
        slots = {slot.name: slot for slot in nextstep_slots(grads)}
        leaves = leaves_of(grads)
        for key in (key for key in golden if key.startswith(f"{gradients}/")):
            place = _look_up(slots, key.removeprefix(f"{gradients}/"), "the gradient of")
            leaf = np.asarray(leaves[place.path])
            part = leaf if place.layer is None else leaf[place.layer]
            yield compare(key, to_published(part, place.layout), golden[key])

    def compare_august_sampler(self) -> Iterator[Comparison]:
        """Single tokens of the sampler of August 2025, with 1, 2 and 3 branches."""
        for name in ("sample_nocfg", "sample_cfg", "sample_cfg2"):
            recorded = {k: self.golden[f"{name}/{k}"] for k in ("c", "noise", "out")}
            config = SamplerConfig(
                "euler_maruyama", num_steps=len(recorded["noise"]), shift=self.meta["shift"]
            )
            scales = (self.meta["cfg"], _IMAGE_SCALE)
            ours = self._token(recorded["c"], recorded["noise"], scales, config)
            yield compare(f"{name}/out", ours, recorded["out"], SAMPLED)

    def compare_later_samplers(self) -> Iterator[Comparison]:
        """Single tokens of the samplers of February 2026, with and without renormalisation."""
        meta = self.sampler_meta
        for name in sorted({key.split("/")[0] for key in self.samplers}):
            recorded = {k: self.samplers[f"{name}/{k}"] for k in ("c", "x0", "noise", "out")}
            solver, *_, renorm = name.split("_")
            config = SamplerConfig(
                _look_up(_SOLVERS, solver, "a solver of samplers.npz:"),
                num_steps=meta["steps"],
                shift=meta["shift"],
                noise_level=meta["noise_level"],
                renorm=renorm == "renorm",
            )
            noise = np.concatenate([recorded["x0"][None], recorded["noise"]])
            scales = (meta["cfg"], meta["cfg_img"])
            ours = self._token(recorded["c"], noise, scales, config)
            yield compare(f"{name}/out", ours, recorded["out"], SAMPLED)

    def compare_generation(self) -> Iterator[Comparison]:
        """Whole images from prompts: tokens, latents, pixels."""
        golden, meta = self.golden, self.meta
        tokens = self._generate()
        yield compare("gen_tokens", tokens, golden["gen_tokens"], SAMPLED)
        grid = tuple(meta["latent_hw"])
        patch_size, channels = self.config.patch_size, self.config.latent_channels
        latents = depth_to_space(tokens, grid, patch_size, channels)
        yield compare("gen_latents", _channels_first(latents), golden["gen_latents"], SAMPLED)
        image = self._run_vae("decode_tokens", tokens, grid=grid, patch_size=patch_size)
        yield compare("gen_image", _channels_first(image), golden["gen_image"], SAMPLED)

    def _run(self, method: str, *inputs: Any) -> jax.Array:
        apply = jax.jit(functools.partial(self.model.apply, method=method))
        return apply({"params": self.params}, *inputs)

    def _run_vae(self, method: str, *inputs: Any, **static: Any) -> jax.Array:
        apply = jax.jit(functools.partial(self.vae.apply, method=method, **static))
        return apply({"params": self._vae_params}, *inputs)

    def _loss(self, params: Any, batch: Any, u: jax.Array, noise: jax.Array) -> Any:
        """The weighted sum of the losses, and each of them."""
        model, length = NextStep(self.config), batch["token_ids"].shape[1]
        text, image = nextstep_losses(model, params, batch, jax.nn.sigmoid(u), noise, length)
        return self.meta["lm_w"] * text + self.meta["im_w"] * image, (text, image)

    def _training_batch(self) -> dict[str, jax.Array]:
        """The recorded rows as a batch of ours; a weight belongs to the token it predicts."""
        ids, labels = self.golden["train_ids"], self.golden["train_labels"]
        is_image = ids == self.config.image_placeholder_id
        num_tokens = self.golden["train_latents"][0, 0].size // self.config.patch_size**2
        if is_image.sum() != num_tokens * len(self.golden["train_latents"]):
            raise ValueError(
                f"train_ids has {is_image.sum()} placeholders for"
                f" {len(self.golden['train_latents'])} images of {num_tokens} tokens"
            )
        images = _channels_last(self.golden["train_latents"])
        tokens = space_to_depth(images, self.config.patch_size)
        latents = np.zeros((*ids.shape, tokens.shape[-1]), np.float32)
        latents[is_image] = np.asarray(tokens).reshape(-1, tokens.shape[-1])
        is_text = (labels != _IGNORED_LABEL) & (labels != self.config.image_placeholder_id)
        is_text[:, 0] = False  # Nothing stands before it.
        if not np.array_equal(ids[is_text], labels[is_text]):
            raise ValueError("train_labels differ from train_ids where they count")
        positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        return {
            "token_ids": jnp.asarray(ids, jnp.int32),
            "latents": jnp.asarray(latents),
            "positions": jnp.asarray(positions, jnp.int32),
            "segment_ids": jnp.ones(ids.shape, jnp.int32),
            "text_weights": jnp.asarray(is_text, jnp.float32),
            "image_weights": jnp.asarray(is_image, jnp.float32),
        }

    def _token(
        self,
        conditions: Float[np.ndarray, "rows embed"],
        noise: Float[np.ndarray, "noises batch token"],
        scales: tuple[float, float],
        config: SamplerConfig,
    ) -> jax.Array:
        """A token from projected conditions, whose branches are stacked."""
        rows = jnp.asarray(_interleave(conditions, noise.shape[1]))

        @jax.jit
        def token(params, rows, noise):
            times = embed_times(self.model, params, config)
            return integrate_token(self.model, params, rows, times, noise, scales, config)

        return token(self.params, rows, jnp.asarray(noise[: config.num_noises]))

    def _generate(self) -> jax.Array:
        """The tokens of the recorded prompts from the recorded noise."""
        golden, meta = self.golden, self.meta
        num_images, num_tokens, token_dim = golden["gen_tokens"].shape
        config = SamplerConfig(
            "euler_maruyama",
            num_steps=meta["steps"],
            shift=meta["shift"],
            schedule=_look_up(_SCHEDULES, meta["sched"], "sched of meta.json:"),
            token_norm=meta["use_norm"],
        )
        ids = _interleave(golden["gen_ids"], num_images)
        mask = _interleave(golden["gen_mask"], num_images)
        prompts = Prompts(
            token_ids=jnp.asarray(ids, jnp.int32),
            latents=jnp.zeros((*ids.shape, token_dim), jnp.float32),
            starts=jnp.asarray((mask == 0).sum(axis=1), jnp.int32),
        )
        keys = jax.vmap(jax.random.key)(jnp.zeros(num_images, jnp.uint32))  # Not drawn from.
        noise = golden["gen_noise"][:, : get_solver(config.solver).num_noises(meta["steps"]) + 1]
        noise = jnp.asarray(np.broadcast_to(noise, (*noise.shape[:2], num_images, token_dim)))
        guidance = jnp.asarray([meta["cfg"], meta["cfg_img"]], jnp.float32)

        @jax.jit
        def generate(params):
            state = prefill(self.model, params, prompts, keys, num_tokens)
            times = embed_times(self.model, params, config)

            def body(state, noise):
                args = (self.model, params, state, times, guidance, config)
                return sample_step(*args, noise=noise), None

            return lax.scan(body, state, noise)[0].tokens

        return generate(self.params)

    def uncompared(self, names: Iterable[str]) -> list[str]:
        """Recorded arrays that are neither inputs nor among the names compared."""
        outputs = {n for n in (*self.golden, *self.samplers) if not _INPUT.fullmatch(n)}
        return sorted(outputs - set(names))


def draws_by_row(
    u: Float[np.ndarray, " times"],
    noise: Float[np.ndarray, "noises token"],
    is_image: Bool[np.ndarray, "batch length"],
) -> tuple[Float[np.ndarray, "draws batch n"], Float[np.ndarray, "draws batch n token"]]:
    """Draws for all image tokens of a batch, in order and as whole blocks, row by row.

    Rows with fewer image tokens than the fullest are filled with draws that have no weight.

    Raises:
        ValueError: There is not a whole number of blocks.
    """
    per_row = is_image.sum(axis=1)
    num_tokens = int(per_row.sum())
    if not num_tokens or u.size % num_tokens or len(noise) != u.size:
        raise ValueError(
            f"{u.size} times and {len(noise)} noises are not whole blocks for {num_tokens} tokens"
        )
    first = np.cumsum(per_row) - per_row
    order = np.minimum(first[:, None] + np.arange(per_row.max()), num_tokens - 1)
    blocks = noise.reshape(-1, num_tokens, noise.shape[-1])
    return u.reshape(-1, num_tokens)[:, order], blocks[:, order]


def _settings(path: pathlib.Path, kinds: Mapping[str, str]) -> dict[str, Any]:
    """A JSON file of settings, each of the kind that it has to be; all that is wrong is named."""
    values = read_json(path)
    problems = []
    for name, kind in kinds.items():
        value = values.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        right = {
            "number": number and math.isfinite(value),
            "count": type(value) is int and value > 0,
            "flag": isinstance(value, bool),
            "schedule": isinstance(value, str) and value in _SCHEDULES,
            "grid": isinstance(value, list)
            and len(value) == 2
            and all(type(side) is int and side > 0 for side in value),
        }
        if not right[kind]:
            problems.append(f"{name}={value!r} is no {kind}" if name in values else f"no {name}")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    return values


def _check_arrays(
    path: pathlib.Path, arrays: Mapping[str, Shaped[np.ndarray, "..."]], meta: Mapping[str, Any]
) -> None:
    """Names every array that a comparison will ask for and that is not there."""
    missing = [name for name in _NEEDED if name not in arrays]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    rows, columns = meta["latent_hw"]
    found = arrays["gen_tokens"].shape[1]
    if found != rows * columns:
        raise ValueError(f"{path}: gen_tokens has {found} tokens, latent_hw is {rows}x{columns}")


def _arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    # The last two where it is a single array.
    except (zipfile.BadZipFile, ValueError, EOFError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no .npz file, or is cut off or damaged: {error}") from error


def _look_up(table: Mapping[str, Any], key: str, what: str) -> Any:
    if key not in table:
        raise ValueError(f"{what} {key!r} is unknown; known are {list(table)}")
    return table[key]


def _interleave(rows: Shaped[np.ndarray, "rows ..."], batch: int) -> Shaped[np.ndarray, "rows ..."]:
    """Rows stacked branch by branch -> the branches of an image next to each other."""
    return rows.reshape(-1, batch, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)


def _channels_last(x: Float[np.ndarray, "n c h w"]) -> jax.Array:
    return jnp.asarray(x.transpose(0, 2, 3, 1))


def _channels_first(x: Float[Any, "n h w c"]) -> np.ndarray:
    return np.asarray(x).transpose(0, 3, 1, 2)
