"""Published sampling settings (arXiv 2508.10711 and the releases; sources disagree, see below).

`nextstep-1` and `nextstep-1-edit` are the code of August 2025, `nextstep-1.1` that of December.
The model card of NextStep-1 shows 28 steps without the token norm; pass those to override.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from nextstep_jax.sampling.generate import SamplerConfig


@dataclasses.dataclass(frozen=True)
class Preset:
    """Settings of a call of the pipeline.

    Attributes:
        sampler: How a token is made.
        guidance_scale: Text guidance.
        image_guidance_scale: Guidance towards the input image; only edits have one.
        positive_prompt: Appended to a caption after one space.
        negative_prompt: The text of the unconditional branch.
    """

    sampler: SamplerConfig
    guidance_scale: float = 7.5
    image_guidance_scale: float = 1.0
    positive_prompt: str = ""
    negative_prompt: str = ""

    def __post_init__(self):
        """Refuses scales that would make every velocity infinite."""
        for name in ("guidance_scale", "image_guidance_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number")


_NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits,"
    " cropped, worst quality, low quality, normal quality, jpeg artifacts, signature, watermark,"
    " username, blurry"
)
_POSITIVE = "masterpiece, film grained, best quality"

PRESETS: dict[str, Preset] = {
    "nextstep-1": Preset(
        SamplerConfig("euler_maruyama", num_steps=50, token_norm=True),
        positive_prompt=_POSITIVE,
        negative_prompt=_NEGATIVE,
    ),
    "nextstep-1-edit": Preset(
        SamplerConfig("euler_maruyama", num_steps=50, shift=3.2, token_norm=True),
        image_guidance_scale=2.0,
        negative_prompt="Copy original image.",
    ),
    "nextstep-1.1": Preset(
        SamplerConfig("euler_maruyama_full", num_steps=28),
        positive_prompt=_POSITIVE,
        negative_prompt=_NEGATIVE,
    ),
    # Ours: models trained here have not seen those prompts.
    "plain": Preset(SamplerConfig("ode", num_steps=20), guidance_scale=3.0),
}


def preset_from_settings(settings: Mapping[str, Any]) -> Preset:
    """A named preset with some settings replaced, from plain values.

    Args:
        settings: `preset`, a name (default "nextstep-1"); `sampler`, a mapping of fields of
            `SamplerConfig`; any field of `Preset`.

    Raises:
        ValueError: An unknown name or field; the message lists the known ones.
    """
    settings = dict(settings)
    preset = get_preset(settings.pop("preset", "nextstep-1"))
    sampler = replace_fields(preset.sampler, dict(settings.pop("sampler", {})))
    return replace_fields(preset, {**settings, "sampler": sampler})


def replace_fields(config: Any, changes: Mapping[str, Any]) -> Any:
    """`dataclasses.replace` that refuses an unknown field with a ValueError listing the known."""
    known = sorted(field.name for field in dataclasses.fields(config))
    unknown = sorted(changes.keys() - set(known))
    if unknown:
        raise ValueError(f"settings {unknown} are unknown; known are {known}")
    return dataclasses.replace(config, **changes)


def get_preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: An unknown name; the message lists the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; choose from {list(PRESETS)}")
    return PRESETS[name]
