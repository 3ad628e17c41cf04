"""Published model configurations and ours: `config.json` of NextStep-1, NextStep-1.1 and Qwen2.5.

The released models (arXiv 2508.10711) are described by two generations of names: those of
NextStep-1's configuration class (latent_channels, fm_head_dim, im_loss_weight) and the older names
of the training code in NextStep-1.1 (num_channels, genloss_width, image_loss_weight). Both are
read, key by key, so that a file may mix them; the first generation is written. Whatever a file asks
for and our networks do not compute is refused by name, and whatever it leaves out becomes a note.
The image tokenizer's configurations are in `published_vae_config.py`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from nextstep_jax.interop.config_reader import MAX_LAYERS, ConfigReader
from nextstep_jax.models.config import DecoderConfig, FlowHeadConfig, NextStepConfig

_RELEASED = NextStepConfig()

# The positions that the published shape was made for. Our decoder has no limit of its own: the
# rotary embedding extends as far as is asked.
_MAX_POSITION_EMBEDDINGS = 131_072

# Side of the latent of a 512x512 image, as in the pretrained checkpoint; nothing depends on it.
_LATENT_SIZE = 64

_DISTINCT_IDS = ("pad_id", "image_area_id", "boi_id", "eoi_id", "image_placeholder_id")

# The same value under the name of NextStep-1 and under the name of the training code.
_LATENT_SIZES = ("latent_size", "image_size")
_PATCH_SIZE = ("latent_patch_size", "patch_size")
_LATENT_CHANNELS = ("latent_channels", "num_channels")
_HEAD_WIDTH = ("fm_head_dim", "genloss_width")
_HEAD_LAYERS = ("fm_head_layers", "genloss_depth")
_HEAD_DRAWS = ("fm_head_batch_mul", "genloss_batch_mul")
_IMAGE_LOSS = ("im_loss_weight", "image_loss_weight")
_PAIRS = (
    _LATENT_SIZES,
    _PATCH_SIZE,
    _LATENT_CHANNELS,
    _HEAD_WIDTH,
    _HEAD_LAYERS,
    _HEAD_DRAWS,
    _IMAGE_LOSS,
)
_OLDER_NAMES = {older for _, older in _PAIRS} | {"genloss_net_arch", "genloss_type"}
_IMAGE_KEYS = _OLDER_NAMES | {newer for newer, _ in _PAIRS} | {"boi", "eoi", "image_placeholder_id"}


@dataclasses.dataclass(frozen=True)
class PublishedModel:
    """A published NextStep configuration, read.

    Attributes:
        config: Ours.
        generation: "nextstep-1.1" where the file has names of the training code, else "nextstep-1".
        loss_weights: Weights of the text and of the image loss.
        notes: A line for each value that the file leaves out, with what was taken instead.
    """

    config: NextStepConfig
    generation: str
    loss_weights: tuple[float, float]
    notes: tuple[str, ...]


def is_qwen(values: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a plain Qwen2 or Qwen2.5 model, without image parts."""
    return values.get("model_type") == "qwen2" and not _IMAGE_KEYS & set(values)


def model_from_published(
    values: Mapping[str, Any],
    *,
    image_area_id: int | None = None,
    downsampling: int = 8,
    gen_pos_embed_positions: int | None = None,
) -> PublishedModel:
    """Translates the `config.json` of a published NextStep model.

    Args:
        values: Its content.
        image_area_id: Id of the area token, which published files do not give. By default the key
            `image_area_id` or `image_area`, else the id before boi, as in the published order.
        downsampling: Pixels along one side of a latent pixel, known from the VAE.
        gen_pos_embed_positions: Positions of the `gen_pos_embed` buffer in the weights, if there is
            one; it decides about `base_image_grid_size`.

    Raises:
        ValueError: Keys are missing, malformed, contradictory or ask for what we do not compute;
            all of them are named.
    """
    if not _IMAGE_KEYS & set(values):
        raise ValueError(
            "this is no NextStep configuration: it has no key of the image part, such as "
            f"latent_channels, num_channels or boi (model_type={values.get('model_type')!r})"
        )
    reader = ConfigReader(values)
    decoder = _read_decoder(reader)
    decoder |= _read_biases(reader)
    for name, accepted in (
        ("genloss_net_arch", "mlp"),
        ("genloss_type", "transport"),
        ("use_mlp_before_lm_head", False),
    ):
        reader.accept(name, accepted)
    head = {
        "width": reader.integer(*_HEAD_WIDTH, default=_RELEASED.flow_head.width),
        "num_layers": reader.integer(
            *_HEAD_LAYERS, default=_RELEASED.flow_head.num_layers, most=MAX_LAYERS
        ),
        "draws_per_token": reader.integer(
            *_HEAD_DRAWS, default=_RELEASED.flow_head.draws_per_token
        ),
    }
    # Only the newest training code has the key; without it the ratio is fixed, so no note.
    if reader.get("fm_head_mlp_ratio") is not None:
        head["mlp_ratio"] = reader.number("fm_head_mlp_ratio", above=0.0)
    image = {
        "latent_channels": reader.integer(*_LATENT_CHANNELS, default=_RELEASED.latent_channels),
        "patch_size": reader.integer(*_PATCH_SIZE, default=_RELEASED.patch_size),
        "use_gen_pos_embed": reader.flag("use_gen_pos_embed", _RELEASED.use_gen_pos_embed),
        "base_image_grid_size": _read_grid_size(reader, gen_pos_embed_positions),
    }
    ids = _read_ids(reader, decoder["vocab_size"], image_area_id)
    text_weight = reader.number("lm_loss_weight", default=0.01, least=0.0)
    image_weight = reader.number(*_IMAGE_LOSS, default=1.0, least=0.0)
    if reader.get("noise_strength") and reader.number("noise_strength", least=0.0):
        reader.notes.append(
            f"noise_strength={reader.get('noise_strength')}: noise on the image tokens of training "
            "inputs; not taken over, as sampling does not have it"
        )
    reader.finish("the model's configuration")
    config = NextStepConfig(
        decoder=DecoderConfig(**decoder),
        flow_head=FlowHeadConfig(**head),
        downsampling=downsampling,
        **image,
        **ids,
    )
    older = any(values.get(name) is not None for name in _OLDER_NAMES)
    return PublishedModel(
        config=config,
        generation="nextstep-1.1" if older else "nextstep-1",
        loss_weights=(text_weight, image_weight),
        notes=tuple(reader.notes),
    )


def decoder_from_qwen(values: Mapping[str, Any]) -> tuple[DecoderConfig, tuple[str, ...]]:
    """Translates the `config.json` of a Qwen2 or Qwen2.5 model.

    Returns:
        The decoder's configuration, and a line for each value that the file leaves out.

    Raises:
        ValueError: As for `model_from_published`, or the model is not a Qwen2.
    """
    reader = ConfigReader(values)
    if values.get("model_type") != "qwen2":
        reader.problems.append(f"model_type={values.get('model_type')!r} is not 'qwen2'")
    decoder = _read_decoder(reader)
    reader.finish("the base model's configuration")
    # The architecture fixes its biases, whatever keys a file may carry.
    decoder |= {"qkv_bias": True, "out_bias": False, "mlp_bias": False}
    return DecoderConfig(**decoder), tuple(reader.notes)


def model_to_published(
    config: NextStepConfig,
    *,
    loss_weights: tuple[float, float] = (0.01, 1.0),
    torch_dtype: str = "float32",
) -> dict[str, Any]:
    """The `config.json` of a model under the names of NextStep-1's configuration class.

    Args:
        config: Ours. `downsampling` is a property of the VAE and not written; `image_area_id` is
            written only where it is not the id before boi, as published files do not have it.
        loss_weights: Weights of the text and of the image loss.
        torch_dtype: Dtype of the weights beside the file.

    Raises:
        ValueError: The flow head differs from the original in what that class cannot express, or
            the dtype is unknown.
    """
    d, head = config.decoder, config.flow_head
    problems = [
        f"flow_head.{name}={getattr(head, name)!r} must be {getattr(_RELEASED.flow_head, name)!r}"
        for name in ("frequency_dim", "max_period", "norm_eps")
        if getattr(head, name) != getattr(_RELEASED.flow_head, name)
    ]
    if torch_dtype not in ("float32", "bfloat16", "float16"):
        problems.append(f"torch_dtype={torch_dtype!r} must be float32, bfloat16 or float16")
    if problems:
        raise ValueError(f"not a published configuration: {'; '.join(problems)}")
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "nextstep",
        "vocab_size": d.vocab_size,
        "max_position_embeddings": _MAX_POSITION_EMBEDDINGS,
        "hidden_size": d.embed_dim,
        "intermediate_size": d.mlp_dim,
        "num_hidden_layers": d.num_layers,
        "num_attention_heads": d.num_heads,
        "num_key_value_heads": d.num_kv_heads,
        "head_dim": d.head_dim,
        "hidden_act": "silu",
        "initializer_range": d.initializer_range,
        "rms_norm_eps": d.rms_norm_eps,
        "rope_theta": d.rope_theta,
        "rope_scaling": None,
        "attention_bias": d.qkv_bias,
        "o_attention_bias": d.out_bias,
        "mlp_bias": d.mlp_bias,
        "attention_dropout": 0.0,
        "tie_word_embeddings": d.tie_embeddings,
        "use_cache": True,
        "torch_dtype": torch_dtype,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "vae_name_or_path": "vae/",
        "latent_size": _LATENT_SIZE,
        "latent_patch_size": config.patch_size,
        "latent_channels": config.latent_channels,
        "boi": config.boi_id,
        "eoi": config.eoi_id,
        "image_placeholder_id": config.image_placeholder_id,
        "pad_token_id_added": config.pad_id,
        "lm_loss_weight": loss_weights[0],
        "im_loss_weight": loss_weights[1],
        "fm_head_dim": head.width,
        "fm_head_layers": head.num_layers,
        "fm_head_batch_mul": head.draws_per_token,
        "use_gen_pos_embed": config.use_gen_pos_embed,
        "base_image_grid_size": config.base_image_grid_size,
    }
    # Neither is a key of the published files, so neither is written where it says nothing new. The
    # code of NextStep-1 has a ratio of 1 only; the later training code reads the key.
    if head.mlp_ratio != 1.0:
        values["fm_head_mlp_ratio"] = head.mlp_ratio
    if config.image_area_id != config.boi_id - 1:
        values["image_area_id"] = config.image_area_id
    return values


def _read_decoder(reader: ConfigReader) -> dict[str, Any]:
    """Fields of a `DecoderConfig` except the biases, which families decide differently."""
    embed = reader.integer("hidden_size")
    heads = reader.integer("num_attention_heads")
    kv_heads = reader.integer("num_key_value_heads", default=heads, why="num_attention_heads")
    head_dim = reader.integer(
        "head_dim",
        default=embed // max(heads, 1),
        why="hidden_size / num_attention_heads",
    )
    if reader.get("head_dim") is None and heads and embed % heads:
        reader.problems.append(
            f"hidden_size={embed} must be a multiple of num_attention_heads={heads} as long as "
            "head_dim is not given"
        )
    elif head_dim % 2:
        reader.problems.append(f"head_dim={head_dim} must be even")
    if kv_heads and heads % kv_heads:
        reader.problems.append(
            f"num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}"
        )
    _refuse_other_attention(reader)
    return {
        "vocab_size": reader.integer("vocab_size"),
        "embed_dim": embed,
        "num_layers": reader.integer("num_hidden_layers", most=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "mlp_dim": reader.integer("intermediate_size"),
        # These two have no safe default: unlike a wrong size, a wrong base or epsilon fits the
        # weights. Newer files of transformers nest the base.
        "rope_theta": reader.number(
            "rope_theta", "rope_parameters.rope_theta", "rope_scaling.rope_theta", above=0.0
        ),
        "rms_norm_eps": reader.number("rms_norm_eps", least=0.0),
        "tie_embeddings": reader.flag("tie_word_embeddings", False),
        "initializer_range": reader.number("initializer_range", default=0.02, least=0.0),
    }


def _refuse_other_attention(reader: ConfigReader) -> None:
    """Refuses keys of the transformer that would change what is computed."""
    reader.accept("hidden_act", "silu")
    reader.accept("use_sliding_window", False)
    for name in ("qk_norm", "use_qk_norm", "attention_use_qk_norm"):
        reader.accept(name, False)
    kinds = reader.get("layer_types")
    if kinds and (not isinstance(kinds, list) or set(map(str, kinds)) != {"full_attention"}):
        reader.problems.append(f"layer_types={kinds!r} is not supported, only 'full_attention'")
    for name in ("rope_scaling", "rope_parameters"):
        rope = reader.get(name)
        if rope is None:
            continue
        # Older files say "type". Sections of the rotary embedding come with the type "default".
        kind = None
        if isinstance(rope, Mapping) and not rope.get("mrope_section"):
            kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind != "default":
            reader.problems.append(f"{name}={rope!r} is not supported, only null or type 'default'")
    for name in ("partial_rotary_factor", "rope_parameters.partial_rotary_factor"):
        reader.accept(name, 1.0)


def _read_biases(reader: ConfigReader) -> dict[str, bool]:
    """The biases of a NextStep decoder."""
    qkv = reader.flag("attention_bias", _RELEASED.decoder.qkv_bias)
    if "o_attention_bias" in reader.values and reader.get("o_attention_bias") is None:
        # The published class reads an explicit null so.
        reader.notes.append(f"o_attention_bias: null, taken as {qkv} (attention_bias)")
        out = qkv
    else:
        out = reader.flag("o_attention_bias", _RELEASED.decoder.out_bias)
    mlp = reader.flag("mlp_bias", _RELEASED.decoder.mlp_bias)
    return {"qkv_bias": qkv, "out_bias": out, "mlp_bias": mlp}


def _read_grid_size(reader: ConfigReader, positions: int | None) -> int:
    """Side of the grid of the optional 2D sincos; the buffer in the weights has the last word."""
    name = "base_image_grid_size"
    if positions is None:
        return reader.integer(name, default=_RELEASED.base_image_grid_size)
    side = math.isqrt(max(positions, 0))
    if side < 1 or side**2 != positions:
        reader.problems.append(f"gen_pos_embed has {positions} positions, which is no square")
    given = reader.integer(name, default=side, why=f"gen_pos_embed has {positions} positions")
    if given and given != side:
        reader.notes.append(
            f"{name}={given}: {side} is taken, as gen_pos_embed has {positions} positions"
        )
    return side


def _check_id(reader: ConfigReader, name: str, value: Any, vocab_size: int) -> int:
    """An id of the vocabulary, as far as its size is known; -1 where it is none."""
    if type(value) is int and 0 <= value < (vocab_size or math.inf):
        return value
    size = vocab_size or "vocab_size"
    reader.problems.append(f"{name}={value!r} must be an id in [0, vocab_size={size})")
    return -1


def _read_id(reader: ConfigReader, name: str, published: int, vocab_size: int) -> int:
    """A special id; left out, it takes its published value where the vocabulary has that.

    Files of transformers may list several ends of text. Ours is one id: a list of one is that one,
    and a longer list is refused, as its order means nothing.
    """
    value = reader.get(name)
    if isinstance(value, list | tuple):
        if len(value) != 1:
            reader.problems.append(f"{name}={value!r} must be a single id")
            return -1
        value = value[0]
    if value is not None:
        return _check_id(reader, name, value, vocab_size)
    if vocab_size and published >= vocab_size:
        reader.problems.append(
            f"{name} is missing, and the published {published} is outside vocab_size={vocab_size}"
        )
        return -1
    reader.left_out(name, published, "as published")
    return published


def _read_ids(reader: ConfigReader, vocab_size: int, image_area_id: int | None) -> dict[str, int]:
    """The special ids of a `NextStepConfig`."""
    eos = _read_id(reader, "eos_token_id", _RELEASED.eos_id, vocab_size)
    ids = {"eos_id": eos}
    for field, name, published in (
        ("bos_id", "bos_token_id", eos),  # One id for both in the published tokenizer.
        ("pad_id", "pad_token_id_added", _RELEASED.pad_id),
        ("boi_id", "boi", _RELEASED.boi_id),
        ("eoi_id", "eoi", _RELEASED.eoi_id),
        ("image_placeholder_id", "image_placeholder_id", _RELEASED.image_placeholder_id),
    ):
        ids[field] = _read_id(reader, name, published, vocab_size)
    name, area = reader.find("image_area_id", "image_area")
    if image_area_id is not None:
        name, area = "image_area_id", image_area_id
    if area is not None:
        ids["image_area_id"] = _check_id(reader, name, area, vocab_size)
    _check_distinct(reader, {name: ids[name] for name in _DISTINCT_IDS if name in ids})
    if area is None:
        # The published order is padding, area, boi.
        free = (i for i in (ids["boi_id"] - 1, *range(vocab_size)) if i not in ids.values())
        ids["image_area_id"] = next((i for i in free if 0 <= i < vocab_size), 0)
        why = "the id before boi" if ids["image_area_id"] == ids["boi_id"] - 1 else "a free id"
        reader.left_out("image_area_id", ids["image_area_id"], why)
    return ids


def _check_distinct(reader: ConfigReader, ids: Mapping[str, int]) -> None:
    """What opens, fills and closes an image cannot be one token."""
    by_id: dict[int, list[str]] = {}
    for name, value in ids.items():
        by_id.setdefault(value, []).append(name)
    for value, names in by_id.items():
        if len(names) > 1 and value >= 0:  # Below zero a problem is recorded already.
            reader.problems.append(f"{' and '.join(names)} are both {value}")
