"""A user's CLIP, in the folder that transformers writes, and aesthetic heads for it.

    config.json                 `CLIPModel`'s
    model.safetensors           its weights, in one file or in shards, or pytorch_model.bin
    preprocessor_config.json    how images are fitted, see `interop.clip_inputs`
    tokenizer.json              the text tokenizer, see there too

Heads are the two published ones for the embeddings of ViT-L/14, `linear` and `mlp` (see
`models.clip`), out of a .pth or .safetensors file. Such scores chose the training images of
NextStep-1 (arXiv 2508.10711, section 3).
"""

import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nextstep_jax.interop import streaming
from nextstep_jax.interop.config_reader import MAX_LAYERS, ConfigReader
from nextstep_jax.interop.huggingface import translate_config
from nextstep_jax.interop.model_directory import read_json
from nextstep_jax.interop.tensor_files import open_tensors
from nextstep_jax.interop.tensor_map import (
    CONV,
    LINEAR,
    SAME,
    Path,
    Slot,
    leaves_of,
    published_shape,
)
from nextstep_jax.interop.tensors import TensorFiles
from nextstep_jax.models.clip import (
    ACTIVATIONS,
    AestheticHead,
    Clip,
    ClipConfig,
    TowerConfig,
)

# The old name of the weights, which some folders have instead of safetensors.
_TORCH_WEIGHTS = "pytorch_model.bin"
# Learnt in training and of no use to a cosine; a buffer of old exports that counts positions.
_UNUSED = ("logit_scale", ".position_ids")
# An end token of 2 in a config is a mistake of early exports, kept by transformers as a mark of
# texts that are read at their largest id.
_LEGACY_END = 2

# Where transformers' class and the published files leave a value out.
_TEXT_DEFAULTS = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
_VISION_DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}

# Our module -> the published one; `*` is the number of a layer.
_TOWER = {
    **{f"layers_*/{p}_proj": f"encoder.layers.*.self_attn.{p}_proj" for p in ("q", "k", "v")},
    "layers_*/out_proj": "encoder.layers.*.self_attn.out_proj",
    "layers_*/norm_1": "encoder.layers.*.layer_norm1",
    "layers_*/norm_2": "encoder.layers.*.layer_norm2",
    "layers_*/mlp_in": "encoder.layers.*.mlp.fc1",
    "layers_*/mlp_out": "encoder.layers.*.mlp.fc2",
}
_MODULES = {
    "vision_proj": "visual_projection",
    "text_proj": "text_projection",
    "vision/class_embed": "vision_model.embeddings.class_embedding",
    "vision/patch_embed": "vision_model.embeddings.patch_embedding",
    "vision/position_embed": "vision_model.embeddings.position_embedding",
    # The published spelling.
    "vision/pre_norm": "vision_model.pre_layrnorm",
    "vision/post_norm": "vision_model.post_layernorm",
    "text/token_embed": "text_model.embeddings.token_embedding",
    "text/position_embed": "text_model.embeddings.position_embedding",
    "text/final_norm": "text_model.final_layer_norm",
    **{f"vision/{ours}": f"vision_model.{theirs}" for ours, theirs in _TOWER.items()},
    **{f"text/{ours}": f"text_model.{theirs}" for ours, theirs in _TOWER.items()},
}
# The dropouts between the layers have numbers too.
_MLP_LAYERS = (0, 2, 4, 6, 7)


def read_clip_config(directory: pathlib.Path) -> ClipConfig:
    """The shape of the CLIP in a folder.

    Raises:
        FileNotFoundError: There is no config.json.
        ValueError: It is damaged, of another model, or asks for what we do not compute; all
            faults are listed.
    """
    values = read_json(pathlib.Path(directory) / "config.json")
    return translate_config(directory, values, _clip_from_published)


def open_clip(directory: pathlib.Path) -> tuple[ClipConfig, TensorFiles]:
    """The shape and the weights of a CLIP, everything checked but the values.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: See `read_clip_config`; or the files are damaged or hold other tensors than the
            config needs, which are all listed.
    """
    directory = pathlib.Path(directory)
    config = read_clip_config(directory)
    safe = any(directory.glob("model.safetensors*"))
    old = directory / _TORCH_WEIGHTS
    files = open_tensors(old if old.is_file() and not safe else directory)
    ignored = [name for name in files.infos if name.endswith(_UNUSED)]
    streaming.check_tensors(files, clip_slots(_abstract(config)), ignored, what=str(directory))
    return config, files


def read_clip(directory: pathlib.Path) -> tuple[ClipConfig, dict[str, Any]]:
    """The shape of a CLIP, and its parameters in float32 on the first device.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: See `open_clip`.
    """
    config, files = open_clip(directory)
    abstract = _abstract(config)
    slots = clip_slots(abstract)
    return config, streaming.load_params(files, slots, abstract, dtype=jnp.float32)


def open_aesthetic_head(path: pathlib.Path, embed_dim: int) -> tuple[AestheticHead, TensorFiles]:
    """A published aesthetic head, everything checked but the values.

    Args:
        path: A .pth or .safetensors file with the tensors "weight" and "bias" (`linear`) or
            "layers.0.weight", ..., "layers.7.bias" (`mlp`).
        embed_dim: Width of the embeddings of the CLIP.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or holds other tensors, which are all listed.
    """
    files = open_tensors(path)
    head = AestheticHead("linear" if "weight" in files.infos else "mlp")
    slots = aesthetic_slots(_abstract_head(head, embed_dim))
    streaming.check_tensors(files, slots, what=f"{path}, a head of form {head.form!r}")
    return head, files


def read_aesthetic_head(path: pathlib.Path, embed_dim: int) -> tuple[AestheticHead, dict[str, Any]]:
    """A published aesthetic head and its parameters, float32; see `open_aesthetic_head`."""
    head, files = open_aesthetic_head(path, embed_dim)
    abstract = _abstract_head(head, embed_dim)
    slots = aesthetic_slots(abstract)
    return head, streaming.load_params(files, slots, abstract, dtype=jnp.float32)


def clip_slots(abstract: Any) -> list[Slot]:
    """The slots of a CLIP.

    Args:
        abstract: Its parameters, or anything with their paths and shapes.
    """
    slots = []
    for path, leaf in leaves_of(abstract).items():
        is_module = path[-1] in ("kernel", "bias", "scale")
        module = "/".join(path[:-1] if is_module else path)
        number = re.search(r"layers_(\d+)", module)
        name = _MODULES[re.sub(r"layers_\d+", "layers_*", module)]
        name = name.replace("*", number[1]) if number else name
        # The class token is a parameter by itself, where all others belong to a layer.
        if len(leaf.shape) > 1 or is_module:
            name += ".bias" if path[-1] == "bias" else ".weight"
        slots.append(_slot(name, path, leaf.shape))
    return slots


def aesthetic_slots(abstract: Any) -> list[Slot]:
    """The slots of an aesthetic head of either form."""
    slots = []
    for path, leaf in leaves_of(abstract).items():
        kind = "weight" if path[-1] == "kernel" else "bias"
        number = _MLP_LAYERS[int(path[0].removeprefix("layers_"))]
        name = kind if len(abstract) == 1 else f"layers.{number}.{kind}"
        slots.append(_slot(name, path, leaf.shape))
    return slots


def _slot(name: str, path: Path, shape: tuple[int, ...]) -> Slot:
    layout = {2: LINEAR, 4: CONV}[len(shape)] if path[-1] == "kernel" else SAME
    return Slot(name, path, None, layout, published_shape(shape, layout))


@functools.lru_cache(maxsize=8)  # Tracing a large one takes a second.
def _abstract(config: ClipConfig) -> Any:
    """Shapes of a CLIP's parameters."""
    side = config.image_size
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    token_ids = jax.ShapeDtypeStruct((1, config.context_length), jnp.int32)
    return jax.eval_shape(Clip(config).init, jax.random.key(0), images, token_ids)["params"]


def _abstract_head(head: AestheticHead, embed_dim: int) -> Any:
    embeddings = jax.ShapeDtypeStruct((1, embed_dim), jnp.float32)
    return jax.eval_shape(head.init, jax.random.key(0), embeddings)["params"]


def _clip_from_published(values: Mapping[str, Any]) -> tuple[ClipConfig, Sequence[str]]:
    """The config of a `CLIPModel`, and what it left out."""
    reader = ConfigReader(values)
    reader.accept("model_type", "clip")
    reader.accept("vision_config.num_channels", 3)
    text = _tower(reader, "text_config", _TEXT_DEFAULTS)
    vision = _tower(reader, "vision_config", _VISION_DEFAULTS)
    end = reader.get("text_config.eos_token_id")
    if end is not None and (type(end) is not int or end < 0):
        reader.problems.append(f"text_config.eos_token_id={end!r} must be an integer")
    fields = {
        "embed_dim": reader.integer("projection_dim", default=512),
        "image_size": reader.integer(*_names("vision_config", "image_size"), default=224),
        "patch_size": reader.integer(*_names("vision_config", "patch_size"), default=32),
        "vocab_size": reader.integer(*_names("text_config", "vocab_size"), default=49408),
        "context_length": reader.integer(
            *_names("text_config", "max_position_embeddings"), default=77
        ),
        # Left out, it is the published one.
        "end_id": None if end == _LEGACY_END else 49407 if end is None else end,
    }
    reader.finish("the configuration of the CLIP")
    return ClipConfig(TowerConfig(**vision), TowerConfig(**text), **fields), reader.notes


def _tower(reader: ConfigReader, section: str, defaults: Mapping[str, int]) -> dict[str, Any]:
    """The fields of one transformer."""
    names = {
        "width": "hidden_size",
        "mlp_dim": "intermediate_size",
        "num_heads": "num_attention_heads",
    }
    fields: dict[str, Any] = {
        ours: reader.integer(*_names(section, theirs), default=defaults[theirs])
        for ours, theirs in names.items()
    }
    layers = _names(section, "num_hidden_layers")
    fields["num_layers"] = reader.integer(*layers, default=12, most=MAX_LAYERS)
    fields["eps"] = reader.number(*_names(section, "layer_norm_eps"), default=1e-5, above=0.0)
    name, activation = reader.find(*_names(section, "hidden_act"))
    if activation is not None and activation not in ACTIVATIONS:
        accepted = " or ".join(repr(a) for a in ACTIVATIONS)
        reader.problems.append(f"{name}={activation!r} is not supported, only {accepted}")
    fields["activation"] = activation or "quick_gelu"
    return fields


def _names(section: str, field: str) -> tuple[str, str]:
    """Where a field of a tower stands: some exports have a second copy, which must agree."""
    return f"{section}.{field}", f"{section}_dict.{field}"
