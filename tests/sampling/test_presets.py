import dataclasses

import pytest

from nextstep_jax.sampling.presets import PRESETS, get_preset, preset_from_settings

TAGS = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, "
    "cropped, worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, "
    "username, blurry"
)
# Columns of the released code: steps, shift, normalised tokens, scales, positive and negative text.
PUBLISHED = {
    "nextstep-1": (50, 1.0, True, 7.5, 1.0, "masterpiece, film grained, best quality", TAGS),
    "nextstep-1-edit": (50, 3.2, True, 7.5, 2.0, "", "Copy original image."),
    "nextstep-1.1": (28, 1.0, False, 7.5, 1.0, "masterpiece, film grained, best quality", TAGS),
}
SOLVERS = {
    "nextstep-1": "euler_maruyama",
    "nextstep-1-edit": "euler_maruyama",
    "nextstep-1.1": "euler_maruyama_full",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    preset = get_preset(name)
    sampler = preset.sampler
    assert PUBLISHED[name] == (
        sampler.num_steps,
        sampler.shift,
        sampler.token_norm,
        preset.guidance_scale,
        preset.image_guidance_scale,
        preset.positive_prompt,
        preset.negative_prompt,
    )
    assert sampler.solver == SOLVERS[name]
    # All use constant guidance over the whole image, and none clips its length.
    assert (sampler.schedule, sampler.interval, sampler.renorm) == ("constant", (0.0, 1.0), False)


def test_presets_are_static_values():
    assert len({hash(preset) for preset in PRESETS.values()}) == len(PRESETS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_preset("plain").guidance_scale = 1.0


def test_scales_must_be_finite():
    with pytest.raises(ValueError, match="image_guidance_scale=inf must be a finite number"):
        dataclasses.replace(get_preset("plain"), image_guidance_scale=float("inf"))
    with pytest.raises(ValueError, match=r"^guidance_scale=nan must be"):
        preset_from_settings({"preset": "nextstep-1.1", "guidance_scale": float("nan")})


def test_unknown_preset():
    message = r"preset 'x' is unknown; choose from \['nextstep-1', 'nextstep-1-edit'"
    with pytest.raises(ValueError, match=message):
        get_preset("x")
