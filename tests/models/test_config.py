import dataclasses
import json

import pytest

from nextstep_jax.models.config import (
    DECODERS,
    FLOW_HEADS,
    DecoderConfig,
    NextStepConfig,
    VAEConfig,
    nextstep_config,
    nextstep_from_dict,
    to_dict,
    vae_from_dict,
)


def test_published_values_of_the_14b_model():
    config = nextstep_config("14b")
    d, h = config.decoder, config.flow_head
    assert (d.embed_dim, d.num_layers, d.mlp_dim, d.vocab_size) == (5120, 48, 13824, 152064)
    assert (d.num_heads, d.num_kv_heads, d.head_dim) == (40, 8, 128)
    assert (d.rms_norm_eps, d.rope_theta, d.initializer_range) == (1e-5, 1e6, 0.02)
    assert (d.qkv_bias, d.out_bias, d.mlp_bias, d.tie_embeddings) == (True, False, False, False)
    assert (h.width, h.num_layers, h.mlp_ratio, h.draws_per_token) == (1536, 12, 1.0, 4)
    assert (h.frequency_dim, h.max_period, h.norm_eps) == (256, 10_000.0, 1e-6)
    assert (config.boi_id, config.eoi_id, config.image_placeholder_id) == (151667, 151668, 151669)
    assert config.bos_id == config.eos_id == 151643
    assert (config.base_image_grid_size, config.use_gen_pos_embed) == (32, False)
    assert config == NextStepConfig()  # the defaults are the released model


def test_derived_values():
    config = NextStepConfig()
    assert config.token_dim == 64
    assert config.pixels_per_token == 16
    assert VAEConfig().downsampling == 8
    assert VAEConfig(channel_multipliers=(1, 2)).downsampling == 2


@pytest.mark.parametrize(
    ("size", "head"),
    [("tiny", "tiny"), ("0.5b", "s"), ("1.5b", "s"), ("3b", "s"), ("7b", "b"), ("14b", "b")],
)
def test_a_size_pairs_a_decoder_with_a_head(size, head):
    config = nextstep_config(size)
    assert config.decoder is DECODERS[size]
    assert config.flow_head is FLOW_HEADS[head]
    assert nextstep_config(size, "l").flow_head.width == 2048


def test_configs_are_hashable_values():
    assert hash(nextstep_config("tiny")) == hash(nextstep_config("tiny"))
    assert hash(vae_from_dict(json.loads(json.dumps(to_dict(VAEConfig()))))) == hash(VAEConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        nextstep_config("tiny").patch_size = 4


def test_round_trip_through_json():
    config = dataclasses.replace(nextstep_config("tiny"), use_gen_pos_embed=True)
    assert nextstep_from_dict(json.loads(json.dumps(to_dict(config)))) == config
    vae = VAEConfig(channels=64, channel_multipliers=(1, 4), norm_patch_size=None)
    assert vae_from_dict(json.loads(json.dumps(to_dict(vae)))) == vae


def test_unknown_keys_are_errors():
    values = to_dict(nextstep_config("tiny"))
    with pytest.raises(TypeError, match="colour"):
        nextstep_from_dict({**values, "colour": 1})
    with pytest.raises(TypeError, match="colour"):
        nextstep_from_dict({**values, "decoder": {**values["decoder"], "colour": 1}})
    with pytest.raises(TypeError, match="colour"):
        vae_from_dict({**to_dict(VAEConfig()), "colour": 1})


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"size='13b' is unknown.*'0\.5b'.*'14b'"):
        nextstep_config("13b")
    with pytest.raises(ValueError, match=r"head='xl' is unknown.*'s', 'b', 'l'"):
        nextstep_config("tiny", "xl")


def test_shapes_that_attention_cannot_use():
    with pytest.raises(ValueError, match="num_heads=6 must be a multiple of num_kv_heads=4"):
        DecoderConfig(num_heads=6, num_kv_heads=4)
    with pytest.raises(ValueError, match="head_dim=7 must be even"):
        DecoderConfig(head_dim=7)


def test_vae_width_that_groups_do_not_divide():
    with pytest.raises(ValueError, match="channels=48 must be a multiple of num_groups=32"):
        VAEConfig(channels=48)


@pytest.mark.parametrize(
    "name",
    ["bos_id", "eos_id", "pad_id", "image_area_id", "boi_id", "eoi_id", "image_placeholder_id"],
)
@pytest.mark.parametrize("value", [-1, 512])
def test_an_id_without_a_row_in_the_embedding_is_an_error(name, value):
    config = nextstep_config("tiny")
    message = rf"{name}={value} must lie in \[0, vocab_size=512\)"
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **{name: value})
    assert getattr(dataclasses.replace(config, **{name: 511}), name) == 511
