import dataclasses
import json
import pathlib

import pytest

from nextstep_jax.interop.published_config import (
    decoder_from_qwen,
    is_qwen,
    model_from_published,
    model_to_published,
)
from nextstep_jax.models.config import (
    DECODERS,
    DecoderConfig,
    FlowHeadConfig,
    NextStepConfig,
    nextstep_config,
)

DATA = pathlib.Path(__file__).parent / "data"
# What the published code of NextStep-1 saved for a small model, with all that transformers adds.
RECORDED = json.loads((DATA / "nextstep_1_small.json").read_text())
# NextStep-1.1: the language model of the paper, the image part under the older names.
OLDER = json.loads((DATA / "nextstep_1_1.json").read_text())
QWEN_7B = json.loads((DATA / "qwen2_5_7b.json").read_text())
# What of 1.1 is neither of the image part nor of a generation.
LANGUAGE_MODEL = {
    name: OLDER[name]
    for name in (
        *("architectures", "model_type", "hidden_size", "num_hidden_layers", "vocab_size"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"),
        *("hidden_act", "attention_bias", "mlp_bias", "rms_norm_eps", "rope_theta"),
        *("rope_scaling", "tie_word_embeddings", "max_position_embeddings"),
        *("initializer_range", "bos_token_id", "eos_token_id"),
    )
}


def ids(**values):
    return {f"{name}_id": value for name, value in values.items()}


RECORDED_CONFIG = NextStepConfig(
    decoder=DecoderConfig(
        vocab_size=512,
        embed_dim=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=160,
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        qkv_bias=True,
        out_bias=False,
        mlp_bias=False,
        tie_embeddings=False,
        initializer_range=0.02,
    ),
    flow_head=FlowHeadConfig(width=48, num_layers=3, mlp_ratio=1.0, draws_per_token=4),
    **ids(bos=1, eos=2, pad=503, image_area=499, boi=500, eoi=501, image_placeholder=502),
)


def qwen(size, **more):
    """Qwen2.5's config.json of a size; the other sizes differ in this from 7B."""
    width, layers, heads, kv_heads, mlp, vocab, tied, eps = {
        "0.5b": (896, 24, 14, 2, 4864, 151936, True, 1e-6),
        "1.5b": (1536, 28, 12, 2, 8960, 151936, True, 1e-6),
        "3b": (2048, 36, 16, 2, 11008, 151936, True, 1e-6),
        "7b": (3584, 28, 28, 4, 18944, 152064, False, 1e-6),
        "14b": (5120, 48, 40, 8, 13824, 152064, False, 1e-5),
    }[size]
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": kv_heads, "intermediate_size": mlp, "vocab_size": vocab}
    return {**QWEN_7B, **sizes, "tie_word_embeddings": tied, "rms_norm_eps": eps, **more}


def without(values, *names):
    return {name: value for name, value in values.items() if name not in names}


def message(read, values, **more):
    with pytest.raises(ValueError) as caught:
        read(values, **more)
    return str(caught.value)


# Reading.


def test_a_recorded_configuration():
    read = model_from_published(RECORDED)
    assert read.config == RECORDED_CONFIG
    assert read.generation == "nextstep-1"
    assert read.loss_weights == (0.01, 1.0)
    assert read.notes == (
        "base_image_grid_size: not given, taken as 32 (as published)",
        "image_area_id: not given, taken as 499 (the id before boi)",
    )


def test_the_older_names_of_1_1():
    read = model_from_published(OLDER)
    # The defaults are the released model, but for the side of the unused 2D sincos.
    assert read.config == NextStepConfig(base_image_grid_size=64)
    assert read.generation == "nextstep-1.1"
    assert read.notes == (
        "use_gen_pos_embed: not given, taken as False (as published)",
        "image_area_id: not given, taken as 151666 (the id before boi)",
    )


@pytest.mark.parametrize(
    ("newer", "older", "value", "read"),
    [
        ("latent_patch_size", "patch_size", 4, lambda m: m.config.patch_size),
        ("latent_channels", "num_channels", 8, lambda m: m.config.latent_channels),
        ("fm_head_dim", "genloss_width", 1024, lambda m: m.config.flow_head.width),
        ("fm_head_layers", "genloss_depth", 6, lambda m: m.config.flow_head.num_layers),
        ("fm_head_batch_mul", "genloss_batch_mul", 2, lambda m: m.config.flow_head.draws_per_token),
        ("im_loss_weight", "image_loss_weight", 0.5, lambda m: m.loss_weights[1]),
    ],
)
def test_both_names_of_a_value(newer, older, value, read):
    values = without(RECORDED, newer)
    new = model_from_published({**values, newer: value})
    old = model_from_published({**values, older: value})
    both = model_from_published({**values, older: value, newer: value})
    assert read(new) == read(old) == read(both) == value
    assert (new.generation, old.generation) == ("nextstep-1", "nextstep-1.1")
    assert both.generation == "nextstep-1.1"
    assert f"{newer}={value} but {older}={value + 1}: the two name the same value" in message(
        model_from_published, {**values, newer: value, older: value + 1}
    )


def test_what_is_left_out_takes_the_released_values_and_says_so():
    read = model_from_published({**without(LANGUAGE_MODEL, "num_key_value_heads"), "boi": 151667})
    expected = NextStepConfig()
    assert read.config == dataclasses.replace(
        expected, decoder=dataclasses.replace(expected.decoder, num_kv_heads=40)
    )
    assert read.loss_weights == (0.01, 1.0)
    assert sorted(read.notes) == [
        "base_image_grid_size: not given, taken as 32 (as published)",
        "eoi: not given, taken as 151668 (as published)",
        "fm_head_batch_mul or genloss_batch_mul: not given, taken as 4 (as published)",
        "fm_head_dim or genloss_width: not given, taken as 1536 (as published)",
        "fm_head_layers or genloss_depth: not given, taken as 12 (as published)",
        "im_loss_weight or image_loss_weight: not given, taken as 1.0 (as published)",
        "image_area_id: not given, taken as 151666 (the id before boi)",
        "image_placeholder_id: not given, taken as 151669 (as published)",
        "latent_channels or num_channels: not given, taken as 16 (as published)",
        "latent_patch_size or patch_size: not given, taken as 2 (as published)",
        "lm_loss_weight: not given, taken as 0.01 (as published)",
        "num_key_value_heads: not given, taken as 40 (num_attention_heads)",
        "o_attention_bias: not given, taken as False (as published)",
        "pad_token_id_added: not given, taken as 151665 (as published)",
        "use_gen_pos_embed: not given, taken as False (as published)",
    ]


def test_decoder_values_left_out():
    names = ("head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings", "initializer_range")
    read = model_from_published(without({**RECORDED, "hidden_size": 96}, *names))
    d = read.config.decoder
    assert (d.head_dim, d.qkv_bias, d.mlp_bias) == (24, True, False)
    assert (d.tie_embeddings, d.initializer_range) == (False, 0.02)
    assert "head_dim: not given, taken as 24 (hidden_size / num_attention_heads)" in read.notes
    assert sum(note.startswith(names) for note in read.notes) == len(names)


def test_other_values_than_the_released_ones():
    changed = {
        "attention_bias": False,
        "o_attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "head_dim": 6,
        "initializer_range": 0.1,
        "rms_norm_eps": 1e-3,
        "rope_theta": 500,
        "fm_head_mlp_ratio": 2.5,
        "use_gen_pos_embed": True,
        "base_image_grid_size": 9,
        "lm_loss_weight": 0.25,
        "im_loss_weight": 0,
    }
    read = model_from_published({**RECORDED, **changed}, downsampling=4)
    d = read.config.decoder
    assert (d.qkv_bias, d.out_bias, d.mlp_bias, d.tie_embeddings) == (False, True, True, True)
    assert (d.head_dim, d.initializer_range, d.rms_norm_eps, d.rope_theta) == (6, 0.1, 1e-3, 500.0)
    assert type(d.rope_theta) is float
    assert read.config.flow_head.mlp_ratio == 2.5
    assert (read.config.use_gen_pos_embed, read.config.base_image_grid_size) == (True, 9)
    assert read.config.downsampling == 4
    assert read.loss_weights == (0.25, 0.0)


def test_a_null_output_bias_is_that_of_the_other_projections():
    for bias in (True, False):
        values = {**RECORDED, "o_attention_bias": None, "attention_bias": bias}
        read = model_from_published(values)
        assert read.config.decoder.out_bias is bias
        assert f"o_attention_bias: null, taken as {bias} (attention_bias)" in read.notes


def test_where_the_area_id_comes_from():
    def area(values, argument=None):
        return model_from_published(values, image_area_id=argument).config.image_area_id

    assert area(OLDER) == 151666
    assert area({**RECORDED, "boi": 77}) == 76
    assert area({**RECORDED, "image_area_id": 7}) == area({**RECORDED, "image_area": 7}) == 7
    assert area({**RECORDED, "image_area_id": 7}, 8) == 8
    assert len(model_from_published(RECORDED, image_area_id=8).notes) == 1
    # Nothing stands before boi 0, and eos before this one: then any id that is free.
    assert area({**RECORDED, "boi": 0}) == 3
    assert area({**RECORDED, "boi": 3}) == 0
    assert "image_area_id=512 must be an id in [0, vocab_size=512)" in message(
        model_from_published, RECORDED, image_area_id=512
    )
    assert "image_area_id=7 but image_area=8" in message(
        model_from_published, {**RECORDED, "image_area_id": 7, "image_area": 8}
    )


def test_ids():
    read = model_from_published({**without(RECORDED, "bos_token_id"), "eos_token_id": [9]})
    assert (read.config.bos_id, read.config.eos_id) == (9, 9)
    assert "eos_token_id=[9, 2] must be a single id" in message(
        model_from_published, {**RECORDED, "eos_token_id": [9, 2]}
    )
    found = message(model_from_published, {**RECORDED, "eoi": None, "boi": 512, "eos_token_id": -1})
    assert "eoi is missing, and the published 151668 is outside vocab_size=512" in found
    assert "boi=512 must be an id in [0, vocab_size=512)" in found
    assert "eos_token_id=-1 must be an id in [0, vocab_size=512)" in found
    assert found.count(";") == 2
    assert "boi=True must be an id" in message(model_from_published, {**RECORDED, "boi": True})


def test_the_buffer_decides_about_the_grid():
    read = model_from_published(RECORDED, gen_pos_embed_positions=1024)
    assert read.config.base_image_grid_size == 32
    assert read.notes[0] == (
        "base_image_grid_size: not given, taken as 32 (gen_pos_embed has 1024 positions)"
    )
    read = model_from_published(OLDER, gen_pos_embed_positions=1024)
    assert read.config.base_image_grid_size == 32
    assert "base_image_grid_size=64: 32 is taken, as gen_pos_embed has 1024 positions" in read.notes
    agreed = model_from_published(OLDER, gen_pos_embed_positions=4096)
    assert agreed.config.base_image_grid_size == 64
    assert agreed.notes == model_from_published(OLDER).notes
    for positions in (0, 1023):
        assert f"gen_pos_embed has {positions} positions, which is no square" in message(
            model_from_published, RECORDED, gen_pos_embed_positions=positions
        )


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_nested_rope_values(key):
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    read = model_from_published({**without(RECORDED, "rope_theta"), key: rope})
    assert read.config.decoder.rope_theta == 5000.0
    assert f"rope_theta=1000000.0 but {key}.rope_theta=5000.0" in message(
        model_from_published, {**RECORDED, key: rope}
    )
    model_from_published({**RECORDED, key: {"type": "default"}})


def test_noise_of_the_training_inputs_is_noted_only():
    assert not [n for n in model_from_published(OLDER).notes if "noise" in n]
    read = model_from_published({**OLDER, "noise_strength": 0.5})
    assert [n for n in read.notes if n.startswith("noise_strength=0.5")]
    assert read.config == model_from_published(OLDER).config


# Refusals.


def test_all_missing_keys_are_named_at_once():
    found = message(model_from_published, {"boi": 1})
    for name in (
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "num_hidden_layers",
        "vocab_size",
        "rms_norm_eps",
        "rope_theta or rope_parameters.rope_theta or rope_scaling.rope_theta",
    ):
        assert f"{name} is missing" in found
    assert found.count(" is missing") == 7


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("hidden_act", "gelu", "is not supported, only 'silu'"),
        ("use_sliding_window", True, "is not supported, only False"),
        ("layer_types", ["full_attention", "sliding_attention"], "is not supported, only 'full_at"),
        ("layer_types", 3, "is not supported, only 'full_attention'"),
        ("qk_norm", True, "is not supported, only False"),
        ("use_qk_norm", True, "is not supported, only False"),
        ("attention_use_qk_norm", True, "is not supported, only False"),
        ("use_mlp_before_lm_head", True, "is not supported, only False"),
        ("genloss_net_arch", "unet", "is not supported, only 'mlp'"),
        ("genloss_type", "diffusion", "is not supported, only 'transport'"),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}, "is not supported, only null or type"),
        ("rope_scaling", {"type": "default", "mrope_section": [2]}, "is not supported, only null"),
        ("rope_scaling", 2.0, "is not supported, only null or type 'default'"),
        ("rope_parameters", {"rope_type": "llama3"}, "is not supported, only null or type"),
        ("partial_rotary_factor", 0.5, "is not supported, only 1.0"),
        ("hidden_size", "64", "must be an integer of at least 1"),
        ("hidden_size", 64.0, "must be an integer of at least 1"),
        ("num_hidden_layers", -3, "must be an integer of at least 1"),
        ("vocab_size", True, "must be an integer of at least 1"),
        ("fm_head_dim", 0, "must be an integer of at least 1"),
        ("num_hidden_layers", 2**31, "must be an integer of at least 1, at most 1024"),
        ("intermediate_size", 10**30, "must be an integer of at least 1, at most 1048"),
        ("num_key_value_heads", 0, "must be an integer of at least 1"),
        ("head_dim", 15, "must be even"),
        ("rms_norm_eps", "1e-5", "must be a finite number"),
        ("rope_theta", float("inf"), "must be a finite number"),
        ("im_loss_weight", True, "must be a finite number"),
        ("noise_strength", "0.5", "must be a finite number"),
        ("rope_theta", 0, "must be a number above 0"),
        ("fm_head_mlp_ratio", 0.0, "must be a number above 0"),
        ("initializer_range", -0.1, "must be a number of at least 0"),
        ("attention_bias", "true", "must be true or false"),
        ("tie_word_embeddings", 1, "must be true or false"),
    ],
)
def test_what_we_cannot_compute_is_refused_by_name(key, value, fault):
    found = message(model_from_published, {**RECORDED, key: value})
    assert found.startswith(f"the model's configuration cannot be used: {key}={value!r} {fault}")
    assert ";" not in found  # Nothing else is wrong.


def test_heads_that_the_key_value_heads_do_not_divide():
    assert "num_attention_heads=4 must be a multiple of num_key_value_heads=3" in message(
        model_from_published, {**RECORDED, "num_key_value_heads": 3}
    )


def test_width_that_the_heads_do_not_divide():
    values = {**without(RECORDED, "head_dim"), "hidden_size": 65}
    assert "hidden_size=65 must be a multiple of num_attention_heads=4" in message(
        model_from_published, values
    )
    read = model_from_published({**RECORDED, "hidden_size": 65})
    assert (read.config.decoder.embed_dim, read.config.decoder.head_dim) == (65, 16)


def test_several_faults_come_in_one_message():
    bad = {"hidden_act": "gelu", "hidden_size": "64", "boi": 600, "eos_token_id": [1, 2]}
    found = message(model_from_published, {**without(RECORDED, "vocab_size", "eoi"), **bad})
    assert [part.split("=")[0].split()[-1] for part in found.split("; ") if "=" in part] == [
        "hidden_size",
        "hidden_act",
        "eos_token_id",
    ]
    assert "vocab_size is missing" in found


def test_a_file_without_image_keys_is_no_nextstep():
    assert is_qwen(qwen("0.5b"))
    assert not is_qwen({**qwen("0.5b"), "boi": 3})
    assert not is_qwen(RECORDED) and not is_qwen(OLDER) and not is_qwen({})
    assert "no NextStep configuration" in message(model_from_published, qwen("7b"))
    assert "model_type='qwen2'" in message(model_from_published, qwen("7b"))


# Qwen2.5.


@pytest.mark.parametrize("size", ["0.5b", "1.5b", "3b", "7b", "14b"])
def test_qwen_sizes_are_those_of_our_table(size):
    decoder, notes = decoder_from_qwen(qwen(size))
    # The small base models have another epsilon than the 14B one and than our table.
    eps = 1e-5 if size == "14b" else 1e-6
    assert decoder == dataclasses.replace(DECODERS[size], rms_norm_eps=eps)
    assert notes == (
        f"head_dim: not given, taken as {decoder.head_dim} (hidden_size / num_attention_heads)",
    )


def test_qwen_biases_are_fixed():
    decoder, _ = decoder_from_qwen(
        qwen("7b", attention_bias=False, o_attention_bias=True, mlp_bias=True)
    )
    assert (decoder.qkv_bias, decoder.out_bias, decoder.mlp_bias) == (True, False, False)


def test_qwen_of_newer_transformers():
    values = qwen("7b", layer_types=["full_attention"] * 28, sliding_window=None)
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    decoder, _ = decoder_from_qwen({**without(values, "rope_theta"), "rope_parameters": rope})
    assert decoder == decoder_from_qwen(qwen("7b"))[0]


def test_qwen_refusals():
    assert "model_type='qwen3' is not 'qwen2'" in message(
        decoder_from_qwen, qwen("7b", model_type="qwen3")
    )
    found = message(
        decoder_from_qwen,
        {**without(qwen("7b"), "rope_theta", "vocab_size"), "use_sliding_window": True},
    )
    assert found.startswith("the base model's configuration cannot be used: ")
    assert "use_sliding_window=True is not supported, only False" in found
    assert "vocab_size is missing" in found
    assert "rope_theta" in found


# Writing.


def test_the_released_model_is_written_under_the_names_of_nextstep_1():
    assert model_to_published(NextStepConfig(), torch_dtype="bfloat16") == {
        **LANGUAGE_MODEL,
        "o_attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "latent_size": 64,
        "latent_patch_size": 2,
        "latent_channels": 16,
        "fm_head_dim": 1536,
        "fm_head_layers": 12,
        "fm_head_batch_mul": 4,
        "base_image_grid_size": 32,
        "use_gen_pos_embed": False,
        "lm_loss_weight": 0.01,
        "im_loss_weight": 1.0,
        "boi": 151667,
        "eoi": 151668,
        "image_placeholder_id": 151669,
        "pad_token_id_added": 151665,
        "torch_dtype": "bfloat16",
        "vae_name_or_path": "vae/",
    }


def test_a_recorded_configuration_is_written_as_it_came():
    written = model_to_published(RECORDED_CONFIG)
    # Keys whose values are ours to choose: nothing that we read depends on them.
    free = {"architectures", "max_position_embeddings", "latent_size", "torch_dtype"}
    free |= {"vae_name_or_path"}
    shared = (set(written) & set(RECORDED)) - free
    assert len(shared) == 33
    assert {name: written[name] for name in shared} == {name: RECORDED[name] for name in shared}
    assert set(written) - set(RECORDED) == {"base_image_grid_size"}


# No field has its default. Fields of the decoder and of the head stand in their order.
ODD = NextStepConfig(
    decoder=DecoderConfig(
        *(99, 30, 1, 9, 3, 14, 7, 123.5, 3e-4), *(False, True, True, True), initializer_range=0.5
    ),
    flow_head=FlowHeadConfig(width=10, num_layers=1, mlp_ratio=1.5, draws_per_token=3),
    latent_channels=5,
    patch_size=3,
    downsampling=4,
    **ids(bos=1, eos=2, pad=3, image_area=98, boi=5, eoi=6, image_placeholder=7),
    use_gen_pos_embed=True,
    base_image_grid_size=11,
)


@pytest.mark.parametrize("config", [*map(nextstep_config, DECODERS), RECORDED_CONFIG, ODD])
def test_round_trip(config):
    written = json.loads(json.dumps(model_to_published(config, loss_weights=(0.5, 0.25))))
    read = model_from_published(
        written, image_area_id=config.image_area_id, downsampling=config.downsampling
    )
    assert read.config == config
    assert read.loss_weights == (0.5, 0.25)
    assert read.generation == "nextstep-1"
    assert read.notes == ()
    # An area token at its usual place needs no word, and any other one is written.
    again = model_from_published(written, downsampling=config.downsampling)
    assert again.config == config
    assert ("image_area_id" in written) == (config is ODD)


def test_what_the_original_cannot_express():
    head = FlowHeadConfig(frequency_dim=128, max_period=100.0, norm_eps=1e-5)
    with pytest.raises(ValueError) as caught:
        model_to_published(NextStepConfig(flow_head=head), torch_dtype="float8")
    assert str(caught.value) == (
        "not a published configuration: flow_head.frequency_dim=128 must be 256; "
        "flow_head.max_period=100.0 must be 10000.0; flow_head.norm_eps=1e-05 must be 1e-06; "
        "torch_dtype='float8' must be float32, bfloat16 or float16"
    )
