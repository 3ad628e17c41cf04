"""Published files, small and random, by the published rules of names and shapes alone.

The rules are written out here a second time, with torch's order of axes, so that the package's own
map can be held against them.
"""

import json
import pathlib

import ml_dtypes
import numpy as np
import safetensors.numpy

from tests import published_tokenizer

CASE = pathlib.Path(__file__).resolve().parent / "recorded" / "case-a"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# Fits `published_tokenizer.build()`: 400 ordinary tokens, then the added ones from 400 on.
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "nextstep",
    "vocab_size": 448,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "attention_bias": True,
    "o_attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 400,
    "eos_token_id": 400,
    "vae_name_or_path": "vae/",
    "latent_size": 32,
    "latent_patch_size": 2,
    "latent_channels": 4,
    "boi": 424,
    "eoi": 425,
    "image_placeholder_id": 426,
    "pad_token_id_added": 422,
    "lm_loss_weight": 0.01,
    "im_loss_weight": 1.0,
    "fm_head_dim": 24,
    "fm_head_layers": 2,
    "fm_head_batch_mul": 4,
    "use_gen_pos_embed": False,
    "base_image_grid_size": 4,
}
# The released one has no key for the 32 groups of its norms.
VAE = {
    "resolution": 64,
    "in_channels": 3,
    "ch": 32,
    "out_ch": 3,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "z_channels": 4,
    "scaling_factor": 1.5,
    "shift_factor": 0.25,
    "deterministic": True,
    "encoder_norm": True,
    "psz": 2,
}
# The same in the words of diffusers' AutoencoderKL.
DIFFUSERS_VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "out_channels": 3,
    "scaling_factor": 1.5,
    "shift_factor": 0.25,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 448,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 400,
    "eos_token_id": 400,
}


def _linear(name, inputs, outputs, bias=True):
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def text_shapes(values):
    """The tensors of the language model, tied or untied."""
    embed, mlp = values["hidden_size"], values["intermediate_size"]
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    width = values.get("head_dim", embed // heads)
    qkv, out = values.get("attention_bias", True), values.get("o_attention_bias", False)
    mlp_bias = values.get("mlp_bias", False)
    yield "embed_tokens.weight", (values["vocab_size"], embed)
    for i in range(values["num_hidden_layers"]):
        layer = f"layers.{i}"
        yield from _linear(f"{layer}.self_attn.q_proj", embed, heads * width, qkv)
        yield from _linear(f"{layer}.self_attn.k_proj", embed, kv_heads * width, qkv)
        yield from _linear(f"{layer}.self_attn.v_proj", embed, kv_heads * width, qkv)
        yield from _linear(f"{layer}.self_attn.o_proj", heads * width, embed, out)
        yield from _linear(f"{layer}.mlp.gate_proj", embed, mlp, mlp_bias)
        yield from _linear(f"{layer}.mlp.up_proj", embed, mlp, mlp_bias)
        yield from _linear(f"{layer}.mlp.down_proj", mlp, embed, mlp_bias)
        yield f"{layer}.input_layernorm.weight", (embed,)
        yield f"{layer}.post_attention_layernorm.weight", (embed,)
    yield "norm.weight", (embed,)
    if not values["tie_word_embeddings"]:
        yield "lm_head.weight", (values["vocab_size"], embed)


def image_shapes(values):
    """The projectors and the flow head."""
    embed, width = values["hidden_size"], values["fm_head_dim"]
    token = values["latent_channels"] * values["latent_patch_size"] ** 2
    yield from _linear("image_in_projector", token, embed)
    yield from _linear("image_out_projector", embed, embed)
    head = "image_head.net"
    yield from _linear(f"{head}.time_embed.mlp.0", 256, width)
    yield from _linear(f"{head}.time_embed.mlp.2", width, width)
    yield from _linear(f"{head}.cond_embed", embed, width)
    yield from _linear(f"{head}.input_proj", token, width)
    for i in range(values["fm_head_layers"]):
        block = f"{head}.res_blocks.{i}"
        yield f"{block}.in_ln.weight", (width,)
        yield f"{block}.in_ln.bias", (width,)
        yield from _linear(f"{block}.mlp.0", width, width)
        yield from _linear(f"{block}.mlp.2", width, width)
        yield from _linear(f"{block}.adaLN_modulation.1", width, 3 * width)
    yield from _linear(f"{head}.final_layer.adaLN_modulation.1", width, 2 * width)
    yield from _linear(f"{head}.final_layer.linear", width, token)


def model_shapes(values=MODEL):
    """Name -> shape of every tensor of a NextStep model."""
    return dict([*text_shapes(values), *image_shapes(values)])


def vae_shapes(values=VAE, *, diffusers=False):
    """Name -> shape of every tensor of an image tokenizer, by original names or diffusers'."""
    width, mult, blocks = values["ch"], values["ch_mult"], values["num_res_blocks"]
    latent, channels = values["z_channels"], values["in_channels"]
    last, names = len(mult) - 1, _DIFFUSERS if diffusers else _ORIGINAL
    shapes = {}

    def conv(name, inputs, outputs, size=3):
        shapes[f"{name}.weight"] = (outputs, inputs, size, size)
        shapes[f"{name}.bias"] = (outputs,)

    def norm(name, size):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    def block(name, inputs, outputs):
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.{names['shortcut']}", inputs, outputs, 1)

    def middle(side, size):
        block(f"{side}.{names['mid1']}", size, size)
        block(f"{side}.{names['mid2']}", size, size)
        norm(f"{side}.{names['attn']}.{names['attn_norm']}", size)
        for part in ("q", "k", "v", "out"):
            name = f"{side}.{names['attn']}.{names[part]}"
            conv(name, size, size, 1)
            if diffusers:  # Linear there.
                shapes[f"{name}.weight"] = (size, size)

    conv("encoder.conv_in", channels, width)
    size = width
    for i in range(last + 1):
        for j in range(blocks):
            block(
                f"encoder.{names['down'].format(i)}.{names['block'].format(j)}",
                size,
                width * mult[i],
            )
            size = width * mult[i]
        if i < last:
            conv(f"encoder.{names['down'].format(i)}.{names['downsample']}", size, size)
    middle("encoder", size)
    norm(f"encoder.{names['norm_out']}", size)
    conv("encoder.conv_out", size, 2 * latent)
    conv("decoder.conv_in", latent, size)
    middle("decoder", size)
    for i in range(last, -1, -1):
        up = names["up"].format(last - i if diffusers else i)
        for j in range(blocks + 1):
            block(f"decoder.{up}.{names['block'].format(j)}", size, width * mult[i])
            size = width * mult[i]
        if i > 0:
            conv(f"decoder.{up}.{names['upsample']}", size, size)
    norm(f"decoder.{names['norm_out']}", size)
    conv("decoder.conv_out", size, channels)
    return shapes


_ORIGINAL = {
    **{"down": "down.{}", "up": "up.{}", "block": "block.{}", "shortcut": "nin_shortcut"},
    **{"downsample": "downsample.conv", "upsample": "upsample.conv", "norm_out": "norm_out"},
    **{"mid1": "mid.block_1", "mid2": "mid.block_2", "attn": "mid.attn_1", "attn_norm": "norm"},
    **{"q": "q", "k": "k", "v": "v", "out": "proj_out"},
}
_DIFFUSERS = {
    **{"down": "down_blocks.{}", "up": "up_blocks.{}", "block": "resnets.{}"},
    **{"shortcut": "conv_shortcut", "norm_out": "conv_norm_out"},
    **{"downsample": "downsamplers.0.conv", "upsample": "upsamplers.0.conv"},
    **{"mid1": "mid_block.resnets.0", "mid2": "mid_block.resnets.1"},
    **{"attn": "mid_block.attentions.0", "attn_norm": "group_norm"},
    **{"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"},
}


def random_tensors(shapes, seed=0, dtype=np.float32):
    """Standard normal values, other ones in every tensor."""
    return {
        name: np.random.default_rng([seed, i]).standard_normal(shape, np.float32).astype(dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }


def position_table(side, width):
    """The 2D sincos, (1, side^2, width): value by value, from its formula."""
    table = np.zeros((1, side * side, width))
    quarter = width // 4
    for i in range(side * side):
        for half, place in enumerate((i % side, i // side)):
            for j in range(quarter):
                angle = place / 10000.0 ** (j / quarter)
                table[0, i, half * 2 * quarter + j] = np.sin(angle)
                table[0, i, half * 2 * quarter + quarter + j] = np.cos(angle)
    return table.astype(np.float32)


def write(folder, values, tensors, *, stem="model"):
    """A folder with config.json and one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    safetensors.numpy.save_file(tensors, folder / f"{stem}.safetensors")
    return folder


def write_model(folder, values=MODEL, tensors=None, *, tokenizer=False):
    """A NextStep model with its image tokenizer beside it, in `vae/`."""
    tensors = random_tensors(model_shapes(values)) if tensors is None else tensors
    write(folder, values, tensors)
    write(folder / "vae", VAE, random_tensors(vae_shapes(), seed=1))
    if tokenizer:
        (folder / "tokenizer.json").write_text(published_tokenizer.build(), encoding="utf-8")
    return folder


def read(folder):
    """All tensors in the safetensors files of a folder."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(path)
    return tensors


def assert_same(found, expected):
    """The same names, dtypes, shapes and bytes."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert found[name].tobytes() == tensor.tobytes(), name
