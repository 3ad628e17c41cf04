"""A new NextStep from a language model: the starting point of pretraining.

NextStep-1 (arXiv 2508.10711) begins with the weights of Qwen2.5-14B; its flow head and its two
projectors begin with their published initialisers. The special tokens of images are new to the
language model, so that their rows of the embedding and of the LM head are drawn anew.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Float

from nextstep_jax.data.text_tokenizer import TextTokenizer, extend_for_images
from nextstep_jax.interop import huggingface, published_config, streaming
from nextstep_jax.interop.huggingface import ModelFiles, abstract_model
from nextstep_jax.interop.model_directory import read_json
from nextstep_jax.interop.tensor_files import open_tensors
from nextstep_jax.interop.tensor_map import leaves_of, nextstep_slots, to_published, tree_of
from nextstep_jax.interop.tensor_views import MemoryTensors, MergedTensors
from nextstep_jax.interop.tensors import TensorFiles, TensorInfo
from nextstep_jax.models.config import FLOW_HEADS, NextStepConfig, VAEConfig
from nextstep_jax.models.nextstep import NextStep, init_params

NEW_ROWS = ("mean", "normal", "keep")
_IMAGE_PARTS = ("flow_head", "image_in_proj", "image_out_proj")
_TABLES = ("embed_tokens.weight", "lm_head.weight")
# The embedding grows to a multiple of this where the new ids do not fit, so that it still divides
# over devices. Ours.
_ROW_MULTIPLE = 64
_PUBLISHED_LOSS_WEIGHTS = (0.01, 1.0)


@dataclasses.dataclass(frozen=True)
class NewModelConfig:
    """What a new model has that its language model has not.

    Attributes:
        flow_head: A key of `FLOW_HEADS`.
        new_rows: How the rows of the added tokens begin: "normal" draws them like the rest of a
            fresh embedding, "mean" (ours, the default: no new token stands out at first) takes
            the mean of the rows in use, plus such a draw scaled down to a tenth, "keep" leaves
            what the language model has there.
        patch_size: Latent pixels along one side of an image token.
        seed: Of all draws.
    """

    flow_head: str = "b"
    new_rows: str = "mean"
    patch_size: int = 2
    seed: int = 0

    def __post_init__(self):
        """Checks the names."""
        if self.flow_head not in FLOW_HEADS:
            raise ValueError(
                f"flow_head={self.flow_head!r} is unknown; choose from {list(FLOW_HEADS)}"
            )
        if self.new_rows not in NEW_ROWS:
            raise ValueError(f"new_rows={self.new_rows!r} is unknown; choose from {NEW_ROWS}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be in [0, 2**32)")


def open_language_model(
    directory: pathlib.Path,
    vae: VAEConfig,
    new: NewModelConfig,
    *,
    tokenizer: pathlib.Path | None = None,
) -> ModelFiles:
    """A Qwen2.5 base model as the files of a new NextStep; only small tensors are made here.

    Args:
        directory: Holds config.json, tokenizer.json and the weights, its head tied or untied.
        vae: The image tokenizer that the model is to work with.
        new: What is added.
        tokenizer: The tokenizer.json, if not that of the directory.

    Raises:
        FileNotFoundError: Something is not there.
        ValueError: See `huggingface.open_model`.
    """
    directory = pathlib.Path(directory)
    values = read_json(directory / "config.json")
    decoder = huggingface.translate_config(directory, values, published_config.decoder_from_qwen)
    path = tokenizer or directory / "tokenizer.json"
    try:
        before = path.read_text(encoding="utf-8")
        definition, ids = extend_for_images(before)
    except OSError as error:
        raise FileNotFoundError(f"cannot read the tokenizer {path}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    text = TextTokenizer(definition)
    num_rows = max(decoder.vocab_size, text.vocab_size)
    if num_rows > decoder.vocab_size:
        num_rows = -(-num_rows // _ROW_MULTIPLE) * _ROW_MULTIPLE
    config = NextStepConfig(
        decoder=dataclasses.replace(decoder, vocab_size=num_rows),
        flow_head=FLOW_HEADS[new.flow_head],
        latent_channels=vae.latent_channels,
        patch_size=new.patch_size,
        downsampling=vae.downsampling,
        bos_id=text.eos_id,
        **ids,
    )
    files = huggingface.without_prefix(open_tensors(directory))
    # As the file has it, where the new ids may have no rows yet.
    old_ids = dict.fromkeys(("bos_id", *ids), 0)
    _check_text(files, dataclasses.replace(config, decoder=decoder, **old_ids), directory)
    added = _num_ids(before)
    if new.new_rows == "keep" or added == text.vocab_size:
        added = decoder.vocab_size
    rows = _NewRows(files, num_rows, added, new, decoder.initializer_range)
    merged = MergedTensors([rows, MemoryTensors(_image_parts(config, new.seed)), files])
    ignored = huggingface.ignored_tensors(files, config)
    weights = _PUBLISHED_LOSS_WEIGHTS
    return ModelFiles(config, merged, None, "nextstep-1", weights, text, ignored)


class _NewRows:
    """The embedding (and the head) of a language model with fresh rows from `first` on."""

    def __init__(
        self, files: TensorFiles, num_rows: int, first: int, new: NewModelConfig, stddev: float
    ):
        self._files, self._first, self._new, self._stddev = files, first, new, stddev
        infos = {name: files.infos[name] for name in _TABLES if name in files.infos}
        self.infos = {n: TensorInfo((num_rows, i.shape[1]), i.dtype) for n, i in infos.items()}

    def read(self, name: str) -> Float[np.ndarray, "rows embed"]:
        """The table with its new rows."""
        old = self._files.read(name)
        num_rows, width = self.infos[name].shape
        first = min(self._first, len(old))
        rng = np.random.default_rng([self._new.seed, _TABLES.index(name)])
        fresh = rng.normal(scale=self._stddev, size=(num_rows - first, width))
        if self._new.new_rows == "mean":
            fresh = old[:first].mean(axis=0, dtype=np.float64) + fresh / 10
        return np.concatenate([old[:first], fresh.astype(old.dtype)])

    def where(self, name: str) -> pathlib.Path:
        """The file of the old rows."""
        return self._files.where(name)


def _num_ids(definition: str) -> int:
    """One more than the largest id of a `tokenizer.json`: the first that can be added."""
    fields = json.loads(definition)
    return 1 + max(*fields["model"]["vocab"].values(), *(t["id"] for t in fields["added_tokens"]))


def _image_parts(config: NextStepConfig, seed: int) -> dict[str, Any]:
    """Fresh flow head and projectors, under their published names."""
    model = NextStep(config)

    def init(key):
        params = nn.unbox(init_params(model, key))
        return {name: params[name] for name in _IMAGE_PARTS}

    # Under jit what is not returned is not computed.
    params = jax.jit(init)(jax.random.key(seed))
    leaves = leaves_of(params)
    slots = nextstep_slots(tree_of(leaves))
    return {s.name: to_published(np.asarray(leaves[s.path]), s.layout) for s in slots}


def _check_text(files: TensorFiles, config: NextStepConfig, directory: pathlib.Path) -> None:
    """The language model's tensors against its config."""
    slots = nextstep_slots(nn.unbox(abstract_model(config)))
    text = [slot for slot in slots if slot.path[0] not in _IMAGE_PARTS]
    streaming.check_tensors(files, text, huggingface.ignored_tensors(files, config), str(directory))
