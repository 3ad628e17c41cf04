"""Published configurations of the image tokenizer and ours.

The tokenizer of NextStep-1 (arXiv 2508.10711) is a Flux-shaped autoencoder, and its `config.json`
exists in two forms: the original names (ch, ch_mult, z_channels, psz) and those of diffusers'
AutoencoderKL (block_out_channels, latent_channels), in which ports of it and Flux's own weights are
stored. The defaults of the original classes are a trap: one release has Flux's scale and no
normalisation, a later one normalises single latent pixels, and the released weights want neither.
So none of them is used: what a file under the original names leaves out has the value of the
released tokenizer, and a note says so.
"""

from collections.abc import Mapping
from typing import Any

from nextstep_jax.interop.config_reader import MAX_LAYERS, MAX_SIZE, ConfigReader
from nextstep_jax.models.config import VAEConfig

_RELEASED = VAEConfig()

# What tells the two forms apart.
_ORIGINAL_KEYS = {"ch", "ch_mult", "z_channels", "num_res_blocks", "out_ch", "resolution"}
_DIFFUSERS_KEYS = {"block_out_channels", "layers_per_block", "norm_num_groups", "down_block_types"}

# The keys of the latent's normalisation, which no plain AutoencoderKL has.
_NORM_KEYS = ("encoder_norm", "psz")


def is_diffusers(values: Mapping[str, Any]) -> bool:
    """Whether a configuration has the names of diffusers."""
    return bool(_DIFFUSERS_KEYS & set(values))


def vae_from_published(values: Mapping[str, Any]) -> tuple[VAEConfig, tuple[str, ...]]:
    """Translates the `config.json` of an image tokenizer, in either form.

    Returns:
        The configuration, and a line for each value that the file leaves out, with what was taken
        instead.

    Raises:
        ValueError: The file has keys of both forms or of none, or keys that are missing, malformed
            or ask for what we do not compute; all of them are named.
    """
    original = sorted(_ORIGINAL_KEYS & set(values))
    diffusers = sorted(_DIFFUSERS_KEYS & set(values))
    if original and diffusers:
        raise ValueError(
            f"the VAE's configuration mixes original names ({', '.join(original)}) with names of "
            f"diffusers ({', '.join(diffusers)})"
        )
    if not diffusers and not original and not set(_NORM_KEYS) & set(values):
        raise ValueError(
            "this is no VAE configuration: it has neither ch, ch_mult, z_channels nor "
            f"block_out_channels (_class_name={values.get('_class_name')!r})"
        )
    reader = ConfigReader(values)
    fields = _read_diffusers(reader) if diffusers else _read_original(reader)
    reader.finish("the VAE's configuration")
    return VAEConfig(**fields), tuple(reader.notes)


def vae_to_published(config: VAEConfig, *, resolution: int = 512) -> dict[str, Any]:
    """The `config.json` of a VAE under the original names.

    Args:
        config: Ours.
        resolution: Pixels along one side of the images it is meant for; nothing depends on it.

    Raises:
        ValueError: The original has no key for a value that differs from its constant; all such
            values are named.
    """
    problems = [
        f"{name}={getattr(config, name)!r} must be {getattr(_RELEASED, name)!r}"
        for name in ("num_groups", "norm_eps", "latent_norm_eps", "norm_over")
        if getattr(config, name) != getattr(_RELEASED, name)
    ]
    if problems:
        raise ValueError(f"the original VAE has no key for it: {', '.join(problems)}")
    return {
        "resolution": resolution,
        "in_channels": config.in_channels,
        "ch": config.channels,
        "out_ch": config.in_channels,
        "ch_mult": list(config.channel_multipliers),
        "num_res_blocks": config.num_res_blocks,
        "z_channels": config.latent_channels,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
        "deterministic": config.deterministic,
        "encoder_norm": config.norm_patch_size is not None,
        "psz": config.norm_patch_size,
    }


def _read_original(reader: ConfigReader) -> dict[str, Any]:
    """Fields of a `VAEConfig` from the original names."""
    for name in ("tanh_out", "use_linear_attn", "use_quant_conv", "use_post_quant_conv"):
        reader.accept(name, False)
    reader.accept("double_z", True)  # The encoder yields mean and log-variance.
    reader.accept("attn_resolutions", [], ())
    channels = reader.integer("ch", default=_RELEASED.channels)
    # The original has no key for the groups either.
    _check_groups(reader, "ch", channels, "num_groups", _RELEASED.num_groups)
    if reader.get("ch_mult") is None:
        multipliers = _RELEASED.channel_multipliers
        reader.left_out("ch_mult", list(multipliers), "as published")
    else:
        multipliers = tuple(_integers(reader, "ch_mult"))
    return {
        "in_channels": _read_in_channels(reader, "out_ch"),
        "channels": channels,
        "channel_multipliers": multipliers,
        "num_res_blocks": reader.integer(
            "num_res_blocks", default=_RELEASED.num_res_blocks, most=MAX_LAYERS
        ),
        "latent_channels": reader.integer("z_channels", default=_RELEASED.latent_channels),
        "scaling_factor": reader.number(
            "scaling_factor", default=_RELEASED.scaling_factor, above=0.0
        ),
        "shift_factor": reader.number("shift_factor", default=_RELEASED.shift_factor),
        "deterministic": reader.flag("deterministic", _RELEASED.deterministic),
        "norm_patch_size": _read_norm(reader),
    }


def _read_diffusers(reader: ConfigReader) -> dict[str, Any]:
    """Fields of a `VAEConfig` from the names of diffusers' AutoencoderKL.

    A port of the NextStep tokenizer is known by the keys of its normalisation, and is completed
    with the released values; any other file is completed with the defaults of diffusers' class,
    which are what its author relied on.
    """
    is_port = any(name in reader.values for name in _NORM_KEYS)
    why = "as published" if is_port else "the default of diffusers"
    widths = _integers(reader, "block_out_channels")
    if widths and any(width % widths[0] for width in widths):
        reader.problems.append(f"block_out_channels={widths} must be multiples of the first")
    groups = reader.integer("norm_num_groups", default=32, why=why)
    if widths:
        _check_groups(reader, "block_out_channels[0]", widths[0], "norm_num_groups", groups)
    reader.accept("act_fn", "silu", "swish")  # Two names of one function.
    reader.accept("mid_block_add_attention", True)
    for name, kind in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        if widths:
            reader.accept(name, [kind] * len(widths))
    for name in ("use_quant_conv", "use_post_quant_conv"):
        # Left out, it is true in diffusers' class, but a port's class need not have the key.
        if reader.flag(name, not is_port, why=why):
            given = "True" if reader.get(name) else "True (not given, the default of diffusers)"
            reader.problems.append(f"{name}={given} is not supported, only False")
    for name in ("latents_mean", "latents_std"):
        reader.accept(name, None)
    deterministic = False  # A plain AutoencoderKL has no such key: its encoder yields samples.
    if is_port or "deterministic" in reader.values:
        deterministic = reader.flag("deterministic", is_port, why=why)
    scale_default = _RELEASED.scaling_factor if is_port else 0.18215
    if "scaling_factor" in reader.values:
        scale_default = 1.0  # An explicit null.
    return {
        "in_channels": _read_in_channels(reader, "out_channels"),
        "channels": widths[0] if widths else 0,
        "channel_multipliers": tuple(width // widths[0] for width in widths),
        "num_res_blocks": reader.integer(
            "layers_per_block",
            default=_RELEASED.num_res_blocks if is_port else 1,
            why=why,
            most=MAX_LAYERS,
        ),
        "latent_channels": reader.integer(
            "latent_channels", default=_RELEASED.latent_channels if is_port else 4, why=why
        ),
        "num_groups": groups,
        "scaling_factor": reader.number(
            "scaling_factor", default=scale_default, why=why, above=0.0
        ),
        "shift_factor": reader.number("shift_factor", default=0.0, why=why),
        "deterministic": deterministic,
        "norm_patch_size": _read_norm(reader) if is_port else None,
    }


def _read_in_channels(reader: ConfigReader, out_name: str) -> int:
    """Channels of an image, which come out as they went in."""
    channels = reader.integer("in_channels", default=_RELEASED.in_channels)
    out = reader.integer(out_name, default=channels, why="in_channels")
    if channels and out and out != channels:
        reader.problems.append(f"{out_name}={out} must equal in_channels={channels}")
    return channels


def _read_norm(reader: ConfigReader) -> int | None:
    """`norm_patch_size`: an explicit null of psz means 1, and a psz left out the released 2."""
    normalises = reader.flag("encoder_norm", True)
    if not normalises:
        return None
    if "psz" in reader.values and reader.get("psz") is None:
        return 1
    return reader.integer("psz", default=_RELEASED.norm_patch_size)


def _integers(reader: ConfigReader, name: str) -> list[int]:
    """A list of positive whole numbers; empty where it is none, with a problem."""
    value = reader.get(name)
    if value is None:
        reader.problems.append(f"{name} is missing")
    elif (
        not isinstance(value, list | tuple)
        or not value
        or any(type(item) is not int or not 1 <= item <= MAX_SIZE for item in value)
    ):
        reader.problems.append(f"{name}={value!r} must be a list of positive integers")
    else:
        return list(value)
    return []


def _check_groups(
    reader: ConfigReader, name: str, width: int, groups_name: str, groups: int
) -> None:
    """The groups of the GroupNorms have to divide every width, which the first one decides."""
    if width and groups and width % groups:
        reader.problems.append(f"{name}={width} must be a multiple of {groups_name}={groups}")
