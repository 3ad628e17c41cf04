import dataclasses
import json

import pytest

from nextstep_jax.interop.published_vae_config import vae_from_published, vae_to_published
from nextstep_jax.models.config import VAEConfig

# A small VAE that the published code saved: the defaults of its class, which are Flux's.
RECORDED = {
    "resolution": 64,
    "in_channels": 3,
    "ch": 32,
    "out_ch": 3,
    "ch_mult": [1, 1, 1, 2],
    "num_res_blocks": 1,
    "z_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "deterministic": False,
    "encoder_norm": False,
    "psz": None,
}
RECORDED_CONFIG = VAEConfig(
    in_channels=3,
    channels=32,
    channel_multipliers=(1, 1, 1, 2),
    num_res_blocks=1,
    latent_channels=16,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    deterministic=False,
    norm_patch_size=None,
)

# Flux's VAE as diffusers stores it.
FLUX = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.30.0.dev0",
    "_name_or_path": "../checkpoints/flux-dev",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
FLUX_CONFIG = VAEConfig(
    scaling_factor=0.3611, shift_factor=0.1159, deterministic=False, norm_patch_size=None
)

# A port of the released tokenizer under diffusers' names.
PORT = {
    **FLUX,
    "sample_size": 512,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "deterministic": True,
    "encoder_norm": True,
    "psz": 2,
}


def without(values, *names):
    return {name: value for name, value in values.items() if name not in names}


def message(values):
    with pytest.raises(ValueError) as caught:
        vae_from_published(values)
    return str(caught.value)


def test_a_recorded_configuration():
    assert vae_from_published(RECORDED) == (RECORDED_CONFIG, ())


def test_what_is_left_out_takes_the_released_tokenizers_values():
    config, notes = vae_from_published({"resolution": 512})
    assert config == VAEConfig(
        in_channels=3,
        channels=128,
        channel_multipliers=(1, 2, 4, 4),
        num_res_blocks=2,
        latent_channels=16,
        num_groups=32,
        scaling_factor=1.0,
        shift_factor=0.0,
        deterministic=True,
        norm_patch_size=2,
    )
    assert sorted(notes) == [
        "ch: not given, taken as 128 (as published)",
        "ch_mult: not given, taken as [1, 2, 4, 4] (as published)",
        "deterministic: not given, taken as True (as published)",
        "encoder_norm: not given, taken as True (as published)",
        "in_channels: not given, taken as 3 (as published)",
        "num_res_blocks: not given, taken as 2 (as published)",
        "out_ch: not given, taken as 3 (in_channels)",
        "psz: not given, taken as 2 (as published)",
        "scaling_factor: not given, taken as 1.0 (as published)",
        "shift_factor: not given, taken as 0.0 (as published)",
        "z_channels: not given, taken as 16 (as published)",
    ]


@pytest.mark.parametrize("name", sorted(set(RECORDED) - {"resolution"}))
def test_a_single_value_left_out(name):
    """What the file says wins, and only what it leaves out is filled in."""
    config, notes = vae_from_published(without(RECORDED, name))
    field, value = {
        "in_channels": ("in_channels", 3),
        "ch": ("channels", 128),
        "out_ch": ("in_channels", 3),
        "ch_mult": ("channel_multipliers", (1, 2, 4, 4)),
        "num_res_blocks": ("num_res_blocks", 2),
        "z_channels": ("latent_channels", 16),
        "scaling_factor": ("scaling_factor", 1.0),
        "shift_factor": ("shift_factor", 0.0),
        "deterministic": ("deterministic", True),
        # psz is null in the file: the channels of each latent pixel.
        "encoder_norm": ("norm_patch_size", 1),
        "psz": ("norm_patch_size", None),
    }[name]
    assert config == dataclasses.replace(RECORDED_CONFIG, **{field: value})
    assert [note.split(":")[0] for note in notes] == ([] if name == "psz" else [name])


@pytest.mark.parametrize("values", [RECORDED, PORT])
@pytest.mark.parametrize(
    ("given", "side"),
    [
        ({"encoder_norm": True, "psz": 2}, 2),
        ({"encoder_norm": True, "psz": 4}, 4),
        ({"encoder_norm": True, "psz": None}, 1),
        ({"encoder_norm": True}, 2),
        ({"encoder_norm": False, "psz": 2}, None),
        ({"encoder_norm": False, "psz": None}, None),
        ({"encoder_norm": False}, None),
        ({"psz": 4}, 4),
        ({"psz": None}, 1),
    ],
)
def test_which_values_are_normalised_together(values, given, side):
    config, _ = vae_from_published({**without(values, "encoder_norm", "psz"), **given})
    assert config.norm_patch_size == side


def test_null_scale_and_shift_are_the_identity():
    for values in (RECORDED, FLUX, PORT):
        config, notes = vae_from_published({**values, "scaling_factor": None, "shift_factor": None})
        assert (config.scaling_factor, config.shift_factor) == (1.0, 0.0)
        assert [note.split(":")[0] for note in notes] == ["scaling_factor", "shift_factor"]


def test_another_depth():
    config, _ = vae_from_published({**RECORDED, "ch_mult": [1, 3]})
    assert (config.channel_multipliers, config.downsampling) == ((1, 3), 2)
    assert hash(config) == hash(dataclasses.replace(RECORDED_CONFIG, channel_multipliers=(1, 3)))


def test_flux():
    assert vae_from_published(FLUX) == (FLUX_CONFIG, ())


def test_a_port_of_the_released_tokenizer():
    assert vae_from_published(PORT) == (VAEConfig(), ())
    # Its class need not have the keys of diffusers' own.
    short = without(PORT, "use_quant_conv", "use_post_quant_conv", "scaling_factor", "psz")
    config, notes = vae_from_published(short)
    assert config == VAEConfig()
    assert [note.split(":")[0] for note in notes] == [
        "use_quant_conv",
        "use_post_quant_conv",
        "scaling_factor",
        "psz",
    ]


def test_a_plain_autoencoder_is_completed_with_diffusers_defaults():
    left_out = ("layers_per_block", "latent_channels", "scaling_factor", "shift_factor")
    config, notes = vae_from_published(
        {**without(FLUX, *left_out, "norm_num_groups"), "deterministic": True}
    )
    assert config == VAEConfig(
        num_res_blocks=1,
        latent_channels=4,
        scaling_factor=0.18215,
        shift_factor=0.0,
        deterministic=True,
        norm_patch_size=None,
    )
    assert "scaling_factor: not given, taken as 0.18215 (the default of diffusers)" in notes
    assert len(notes) == 5


def test_a_shrunk_flux():
    config, _ = vae_from_published(
        {
            **FLUX,
            "block_out_channels": [8, 24],
            "norm_num_groups": 4,
            "layers_per_block": 3,
            "latent_channels": 5,
            "in_channels": 1,
            "out_channels": 1,
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
        }
    )
    assert config == dataclasses.replace(
        FLUX_CONFIG,
        channels=8,
        channel_multipliers=(1, 3),
        num_groups=4,
        num_res_blocks=3,
        latent_channels=5,
        in_channels=1,
    )


@pytest.mark.parametrize(
    ("values", "changed", "expected"),
    [
        (RECORDED, {"out_ch": 4}, "out_ch=4 must equal in_channels=3"),
        (RECORDED, {"attn_resolutions": [16]}, "attn_resolutions=[16] is not supported, only []"),
        (RECORDED, {"double_z": False}, "double_z=False is not supported, only True"),
        (RECORDED, {"use_quant_conv": True}, "use_quant_conv=True is not supported, only False"),
        (RECORDED, {"tanh_out": True}, "tanh_out=True is not supported, only False"),
        (RECORDED, {"ch": 48}, "ch=48 must be a multiple of num_groups=32"),
        (RECORDED, {"ch": "32"}, "ch='32' must be an integer of at least 1"),
        (RECORDED, {"ch_mult": []}, "ch_mult=[] must be a list of positive integers"),
        (RECORDED, {"ch_mult": [1, 0]}, "ch_mult=[1, 0] must be a list of positive integers"),
        (RECORDED, {"ch_mult": [1, True]}, "ch_mult=[1, True] must be a list of positive integers"),
        (RECORDED, {"ch_mult": 4}, "ch_mult=4 must be a list of positive integers"),
        (RECORDED, {"encoder_norm": 1}, "encoder_norm=1 must be true or false"),
        (RECORDED, {"encoder_norm": True, "psz": 0}, "psz=0 must be an integer of at least 1"),
        (RECORDED, {"encoder_norm": True, "psz": 2**40}, "psz=1099511627776 must be an integer"),
        (RECORDED, {"scaling_factor": 0}, "scaling_factor=0 must be a number above 0"),
        (RECORDED, {"shift_factor": "0"}, "shift_factor='0' must be a finite number"),
        (FLUX, {"out_channels": 4}, "out_channels=4 must equal in_channels=3"),
        (
            FLUX,
            {"block_out_channels": [128, 192, 512, 512]},
            "block_out_channels=[128, 192, 512, 512] must be multiples of the first",
        ),
        (FLUX, {"block_out_channels": None}, "block_out_channels is missing"),
        (
            FLUX,
            {"norm_num_groups": 24},
            "block_out_channels[0]=128 must be a multiple of norm_num_groups=24",
        ),
        (FLUX, {"act_fn": "gelu"}, "act_fn='gelu' is not supported, only 'silu' or 'swish'"),
        (
            FLUX,
            {"mid_block_add_attention": False},
            "mid_block_add_attention=False is not supported, only True",
        ),
        (
            FLUX,
            {"down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]},
            "'AttnDownEncoderBlock2D'] is not supported, only ['DownEncoderBlock2D',",
        ),
        (
            FLUX,
            {"up_block_types": ["UpDecoderBlock2D"]},
            "up_block_types=['UpDecoderBlock2D'] is not supported",
        ),
        (FLUX, {"use_quant_conv": True}, "use_quant_conv=True is not supported, only False"),
        (FLUX, {"use_post_quant_conv": True}, "use_post_quant_conv=True is not supported"),
        (PORT, {"use_quant_conv": True}, "use_quant_conv=True is not supported, only False"),
        (FLUX, {"latents_mean": [0.1]}, "latents_mean=[0.1] is not supported, only None"),
        (FLUX, {"deterministic": 1}, "deterministic=1 must be true or false"),
    ],
)
def test_what_we_cannot_compute_is_refused_by_name(values, changed, expected):
    found = message({**values, **changed})
    assert expected in found
    assert found.startswith("the VAE's configuration cannot be used: ")
    assert ";" not in found  # Nothing else is wrong.


def test_quant_convolutions_are_on_where_diffusers_leaves_them_out():
    found = message(without(FLUX, "use_quant_conv", "use_post_quant_conv"))
    for name in ("use_quant_conv", "use_post_quant_conv"):
        assert f"{name}=True (not given, the default of diffusers) is not supported" in found


def test_several_faults_come_in_one_message():
    found = message({**RECORDED, "ch": 33, "out_ch": 1, "psz": "2", "encoder_norm": True})
    assert "ch=33 must be a multiple" in found
    assert "out_ch=1 must equal in_channels=3" in found
    assert "psz='2' must be an integer" in found


def test_files_of_another_kind():
    assert "neither ch, ch_mult, z_channels nor block_out_channels (_class_name='VQModel')" in (
        message({"_class_name": "VQModel", "scaling_factor": 1.0})
    )
    assert message({**RECORDED, "norm_num_groups": 32}).startswith(
        "the VAE's configuration mixes original names (ch, ch_mult, num_res_blocks, out_ch, "
        "resolution, z_channels) with names of diffusers (norm_num_groups)"
    )


def test_the_released_tokenizer_as_it_is_written():
    assert vae_to_published(VAEConfig()) == {
        "resolution": 512,
        "in_channels": 3,
        "ch": 128,
        "out_ch": 3,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "z_channels": 16,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
        "deterministic": True,
        "encoder_norm": True,
        "psz": 2,
    }
    assert vae_to_published(RECORDED_CONFIG, resolution=64) == RECORDED


@pytest.mark.parametrize(
    "config",
    [
        VAEConfig(),
        RECORDED_CONFIG,
        FLUX_CONFIG,
        VAEConfig(norm_patch_size=1),
        VAEConfig(
            in_channels=1,
            channels=96,
            channel_multipliers=(2, 1, 5),
            num_res_blocks=3,
            latent_channels=7,
            scaling_factor=2.5,
            shift_factor=-0.5,
            norm_patch_size=4,
        ),
    ],
)
def test_round_trip(config):
    written = json.loads(json.dumps(vae_to_published(config)))
    assert vae_from_published(written) == (config, ())


def test_what_the_original_cannot_express():
    config = VAEConfig(channels=8, num_groups=4, norm_eps=1e-5, latent_norm_eps=1e-4)
    with pytest.raises(ValueError) as caught:
        vae_to_published(config)
    assert str(caught.value) == (
        "the original VAE has no key for it: num_groups=4 must be 32, norm_eps=1e-05 must be "
        "1e-06, latent_norm_eps=0.0001 must be 1e-06"
    )
