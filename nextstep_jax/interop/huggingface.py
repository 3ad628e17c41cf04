"""Published checkpoints, opened and checked: NextStep-1 and 1.1, their image tokenizers.

    model/config.json, *.safetensors    the model (arXiv 2508.10711) in either generation of names
    model/tokenizer.json                the text tokenizer
    model/vae/ or another folder        the image tokenizer: config.json and its weights

Opening reads configurations and the names and shapes of tensors, and finds all that is wrong
before any of them is read.
"""

import dataclasses
import functools
import logging
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jax.typing import DTypeLike

from nextstep_jax.data.text_tokenizer import TextTokenizer
from nextstep_jax.interop import published_config, published_vae_config, streaming
from nextstep_jax.interop.model_directory import read_json
from nextstep_jax.interop.tensor_files import open_tensors
from nextstep_jax.interop.tensor_map import Path, Slot, nextstep_slots, vae_slots
from nextstep_jax.interop.tensor_views import RenamedTensors
from nextstep_jax.interop.tensors import TensorFiles
from nextstep_jax.models.config import NextStepConfig, VAEConfig
from nextstep_jax.models.nextstep import NextStep, gen_position_table, init_params
from nextstep_jax.models.vae import VAE
from nextstep_jax.parallel.sharding import tree_shardings

Config = TypeVar("Config")

# The 2D sincos that some files carry, whether or not the model uses it.
GEN_POS_EMBED = "gen_pos_embed"
# What our formula may differ from that buffer by when the model uses it; more in bfloat16.
_GEN_POS_TOLERANCE = 1e-5
# Buffers of old exports that hold nothing but constants of the config.
_CONSTANT_BUFFER = "rotary_emb.inv_freq"
_HEAD = "lm_head.weight"
_EMBEDDING = "embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class VAEFiles:
    """An image tokenizer in published files.

    Attributes:
        config: Its configuration.
        files: Its tensors.
        slots: Where they go.
        values: The content of its config.json.
    """

    config: VAEConfig
    files: TensorFiles
    slots: Sequence[Slot]
    values: dict[str, Any]

    def load(self, dtype: DTypeLike | None = None) -> dict[str, Any]:
        """The parameters on the default device, by default in the dtype of the files."""
        return streaming.load_params(self.files, self.slots, abstract_vae(self.config), None, dtype)


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model in published files.

    Attributes:
        config: Its configuration.
        files: Its tensors, without a prefix.
        values: The content of its config.json; None for a model that is only beginning.
        generation: "nextstep-1" or "nextstep-1.1"; names the preset too.
        loss_weights: Of the text and the image loss, as configured.
        tokenizer: The text tokenizer, if there is one.
        ignored: Tensors in the files that are no parameters.
    """

    config: NextStepConfig
    files: TensorFiles
    values: dict[str, Any] | None
    generation: str
    loss_weights: tuple[float, float]
    tokenizer: TextTokenizer | None
    ignored: tuple[str, ...] = ()

    def slots(self, *, scan_layers: bool = True) -> list[Slot]:
        """Where the tensors go."""
        return nextstep_slots(nn.unbox(abstract_model(self.config, scan_layers=scan_layers)))

    def stream(
        self,
        *,
        scan_layers: bool = True,
        dtype: DTypeLike | None = None,
        mesh: Mesh | None = None,
    ) -> Iterator[dict[Path, jax.Array]]:
        """The parameters in groups, see `streaming.stream_params`.

        Args:
            scan_layers: Layers stacked, or one subtree a layer.
            dtype: By default that of the files.
            mesh: Where the sharding rules lay them out; by default on the first device.
        """
        abstract = abstract_model(self.config, scan_layers=scan_layers)
        shardings = None if mesh is None else tree_shardings(abstract, mesh)
        slots = self.slots(scan_layers=scan_layers)
        return streaming.stream_params(self.files, slots, nn.unbox(abstract), shardings, dtype)


def open_model(
    directory: pathlib.Path,
    *,
    tokenizer: pathlib.Path | None = None,
    downsampling: int = 8,
) -> ModelFiles:
    """Opens a published NextStep model.

    Args:
        directory: Holds config.json and the weights.
        tokenizer: The tokenizer.json; by default that of the directory, if it has one.
        downsampling: Pixels along one side of a latent pixel of its image tokenizer.

    Raises:
        FileNotFoundError: The config or the weights are not there.
        ValueError: The config asks for what we do not compute, tensors are missing, unexpected or
            of another shape (all of them are listed), files are damaged, or the ids of the
            tokenizer are not the config's.
    """
    directory = pathlib.Path(directory)
    values = read_json(directory / "config.json")
    files = without_prefix(open_tensors(directory))
    text = open_tokenizer(directory, tokenizer)
    # What a config states is compared with the tokenizer below.
    states_area = not {"image_area_id", "image_area"}.isdisjoint(values)

    def translate(values):
        published = published_config.model_from_published(
            values,
            image_area_id=None if text is None or states_area else text.image_area_id,
            downsampling=downsampling,
            gen_pos_embed_positions=_num_positions(files),
        )
        return published, published.notes

    published = translate_config(directory, values, translate)
    config = published.config
    if text is not None:
        text.check(config)
    slots = nextstep_slots(nn.unbox(abstract_model(config)))
    ignored = ignored_tensors(files, config)
    streaming.check_tensors(files, slots, ignored, str(directory))
    _check_gen_pos_embed(files, config, directory)
    fields = (published.generation, published.loss_weights, text, ignored)
    return ModelFiles(config, files, values, *fields)


def open_vae(directory: pathlib.Path) -> VAEFiles:
    """Opens a published image tokenizer, under the original names or those of diffusers.

    Raises:
        FileNotFoundError: The config or the weights are not there.
        ValueError: See `open_model`.
    """
    directory = pathlib.Path(directory)
    values = read_json(directory / "config.json")
    config = translate_config(directory, values, published_vae_config.vae_from_published)
    files = open_tensors(directory)
    diffusers = any(".down_blocks." in name for name in files.infos)
    slots = vae_slots(abstract_vae(config), diffusers=diffusers)
    streaming.check_tensors(files, slots, (), str(directory))
    return VAEFiles(config, files, slots, values)


def translate_config(
    directory: pathlib.Path,
    values: Mapping[str, Any],
    translate: Callable[[Mapping[str, Any]], tuple[Config, Iterable[str]]],
) -> Config:
    """A translated config.json: its notes are logged, and what is wrong in it names the file."""
    path = directory / "config.json"
    try:
        config, notes = translate(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for note in notes:
        logging.info("%s: %s", path, note)
    return config


def find_vae(model: pathlib.Path, values: dict[str, Any]) -> pathlib.Path:
    """The folder of a model's image tokenizer: `vae/`, or the one that its config names.

    Raises:
        FileNotFoundError: There is neither.
    """
    named = values.get("vae_name_or_path")
    candidates = [model / "vae"]
    if isinstance(named, str) and named:
        candidates += [model / named, pathlib.Path(named)]
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    listed = ", ".join(str(candidate) for candidate in candidates)
    raise FileNotFoundError(f"no image tokenizer (a folder with config.json) in {listed}")


def open_tokenizer(directory: pathlib.Path, path: pathlib.Path | None) -> TextTokenizer | None:
    """The text tokenizer of a published model, or None where there is none.

    Raises:
        ValueError: It cannot be used, or is asked for by its path and not there.
    """
    if path is None and not (directory / "tokenizer.json").is_file():
        return None
    return TextTokenizer.from_file(path or directory / "tokenizer.json")


def check_pair(config: NextStepConfig, vae: VAEConfig) -> None:
    """Checks that the model's image tokens are those of the image tokenizer.

    Raises:
        ValueError: They differ.
    """
    for ours, theirs in (
        (config.latent_channels, "latent_channels"),
        (config.downsampling, "downsampling"),
    ):
        if ours != getattr(vae, theirs):
            raise ValueError(
                f"{theirs}: the model has {ours}, its image tokenizer {getattr(vae, theirs)}"
            )


@functools.lru_cache(maxsize=8)  # Tracing all of a model takes a second, and it is asked for often.
def abstract_model(config: NextStepConfig, *, scan_layers: bool = True) -> Any:
    """Shapes of a model's parameters, in the boxes that name their axes."""
    model = NextStep(config, scan_layers=scan_layers)
    return jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))


@functools.lru_cache(maxsize=8)
def abstract_vae(config: VAEConfig) -> Any:
    """Shapes of an image tokenizer's parameters."""
    side = config.downsampling * (config.norm_patch_size or 1)
    images = jnp.zeros((1, side, side, config.in_channels))
    init = jax.eval_shape(lambda key: VAE(config).init(key, images), jax.random.key(0))
    return init["params"]


def without_prefix(files: TensorFiles) -> TensorFiles:
    """The tensors as NextStep names them: Qwen2.5 has "model." in front of its decoder."""
    prefixed = any(name.startswith("model.") for name in files.infos)
    return RenamedTensors(files, "model.") if prefixed else files


def ignored_tensors(files: TensorFiles, config: NextStepConfig) -> tuple[str, ...]:
    """Tensors that may be in a checkpoint without being parameters."""
    names = [n for n in files.infos if n == GEN_POS_EMBED or n.endswith(_CONSTANT_BUFFER)]
    if config.decoder.tie_embeddings and {_HEAD, _EMBEDDING} <= set(files.infos):
        if not np.array_equal(files.read(_HEAD), files.read(_EMBEDDING)):
            raise ValueError(
                f"{files.where(_HEAD)}: tie_word_embeddings is true, but {_HEAD} differs from"
                f" {_EMBEDDING}"
            )
        names.append(_HEAD)
    return tuple(names)


def _num_positions(files: TensorFiles) -> int | None:
    """Positions of the 2D sincos, where the files have one for a square of them."""
    if GEN_POS_EMBED not in files.infos:
        return None
    shape = files.infos[GEN_POS_EMBED].shape
    return (
        shape[1] if len(shape) == 3 and shape[1] and math.isqrt(shape[1]) ** 2 == shape[1] else None
    )


def _check_gen_pos_embed(
    files: TensorFiles, config: NextStepConfig, directory: pathlib.Path
) -> None:
    """Where it is used, the buffer must be the formula that we compute."""
    if not config.use_gen_pos_embed or GEN_POS_EMBED not in files.infos:
        return
    found, ours = files.read(GEN_POS_EMBED), gen_position_table(config)[None]
    # Sines are at most 1, and rounding moves them by half of this.
    tolerance = max(_GEN_POS_TOLERANCE, float(jnp.finfo(found.dtype).eps))
    if found.shape != ours.shape or np.abs(found.astype(np.float32) - ours).max() > tolerance:
        raise ValueError(
            f"{directory}: {GEN_POS_EMBED} is not the 2D sincos of {ours.shape[1]} positions and"
            f" width {ours.shape[2]} that the model would add"
        )
