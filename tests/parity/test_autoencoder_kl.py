"""Our image tokenizer beside diffusers' AutoencoderKL with the same random weights.

The first shape is Flux's with a quarter of its channels, the second has a level, a block a level
and groups of another size less. Images are not square. Errors are largest difference over largest
value.
"""

import copy
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from nextstep_jax.interop import tensor_map
from nextstep_jax.interop.tensor_views import MemoryTensors
from nextstep_jax.models.config import VAEConfig
from nextstep_jax.models.vae import VAE, AttentionBlock, group_norm
from tests.parity import bridge

pytestmark = pytest.mark.parity

SHAPES = {
    "Flux, channels 32": VAEConfig(channels=32),
    "3 levels, 1 block, 16 groups": VAEConfig(
        channels=32, channel_multipliers=(1, 2, 2), num_res_blocks=1, num_groups=16
    ),
}
IMAGE_SIZE = (48, 80)

# Float32 against diffusers in float64 and in float32, which is itself up to 1e-5 off its float64.
BOUND = 5e-6
FLOAT32_BOUND = 3e-5
# bfloat16 keeps 8 bits, so every rounding costs up to 2^-9 = 2e-3 of a value.
BFLOAT16_BOUND = 3e-2
# Measured: 1.08 to 1.15. We round after the bias of a convolution and inside SiLU, torch does not.
BFLOAT16_RATIO = 1.1


def autoencoder_kl(config, seed):
    """A live AutoencoderKL of our configuration, float32."""
    from diffusers import AutoencoderKL

    levels = len(config.channel_multipliers)
    live = AutoencoderKL(
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.channels * m for m in config.channel_multipliers),
        layers_per_block=config.num_res_blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=config.num_groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=True,
    )
    return bridge.randomise(live, seed)


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, torch):
    """A live autoencoder and ours with its weights; images and latents as (torch, ours)."""
    config = SHAPES[request.param]
    live = autoencoder_kl(config, seed=list(SHAPES).index(request.param))
    images = np.zeros((1, *IMAGE_SIZE, 3), np.float32)
    init = functools.partial(VAE(config).init, jax.random.key(0))
    abstract = nn.unbox(jax.eval_shape(init, images))["params"]
    slots = tensor_map.vae_slots(abstract, diffusers=True)
    files = MemoryTensors(bridge.arrays_of(live))

    def run(params, dtype, method, values):
        return VAE(config, dtype).apply({"params": params}, values, method=method)

    rng = np.random.default_rng([23])
    latent = (*(side // config.downsampling for side in IMAGE_SIZE), config.latent_channels)
    inputs = {
        "encode_moments": rng.uniform(-1, 1, (2, *IMAGE_SIZE, 3)).astype(np.float32),
        "decode": rng.standard_normal((2, *latent)).astype(np.float32),
    }
    return types.SimpleNamespace(
        config=config,
        live=live,
        live_float64=copy.deepcopy(live).double(),
        abstract=abstract,
        slots=slots,
        params=bridge.load(files, slots, abstract),
        load=functools.partial(bridge.load, files, slots, abstract),
        run=jax.jit(run, static_argnums=(1, 2)),
        inputs=inputs,
    )


def live_run(live, method, values):
    """The encoder's moments or the decoder's image, channels last."""
    import torch

    tensor = torch.from_numpy(values).permute(0, 3, 1, 2).to(live.dtype)
    with torch.no_grad():
        out = live.encode(tensor).latent_dist.parameters if "enc" in method else live.decode(tensor)
        out = out if "enc" in method else out.sample
    return out.permute(0, 2, 3, 1)


@pytest.mark.parametrize("method", ["encode_moments", "decode"])
def test_float32(pair, method):
    values = pair.inputs[method]
    ours = pair.run(pair.params, jnp.float32, method, values)
    exact = live_run(pair.live_float64, method, values)
    theirs = live_run(pair.live, method, values)
    print(f"{method}, diffusers' float32 to its float64: {bridge.max_error(theirs, exact):.1e}")
    bridge.check(f"{method}, to diffusers' float64", ours, exact, BOUND)
    bridge.check(f"{method}, to diffusers' float32", ours, theirs, FLOAT32_BOUND)


def test_epsilon_of_the_norms(pair):
    """Faint images leave the first norms a variance of 1e-4, where an epsilon of 1e-6 counts."""
    values = 0.01 * pair.inputs["encode_moments"]
    ours = pair.run(pair.params, jnp.float32, "encode_moments", values)
    exact = live_run(pair.live_float64, "encode_moments", values)
    bridge.check("encode_moments of faint images", ours, exact, FLOAT32_BOUND)


@pytest.mark.parametrize("pair", ["Flux, channels 32"], indirect=True)
@pytest.mark.parametrize("method", ["encode_moments", "decode"])
def test_bfloat16(pair, method, torch):
    # Rounded first, so that only the computation differs from float32.
    values = np.asarray(jnp.asarray(pair.inputs[method], jnp.bfloat16), np.float32)
    reference = live_run(pair.live, method, values)
    theirs = live_run(copy.deepcopy(pair.live).to(torch.bfloat16), method, values)
    ours = pair.run(pair.load(dtype=jnp.bfloat16), jnp.bfloat16, method, values)
    bridge.check_bfloat16(
        f"{method} in bfloat16", ours, theirs, reference, BFLOAT16_BOUND, BFLOAT16_RATIO
    )


def middle(pair, torch):
    """Features as they reach the middle of the encoder: bfloat16 values, with a mean."""
    width = pair.config.channels * pair.config.channel_multipliers[-1]
    values = np.random.default_rng([24]).standard_normal((2, 6, 10, width)) + 3
    features = jnp.asarray(values, jnp.bfloat16)
    return features, torch.from_numpy(np.array(features, np.float32)).permute(0, 3, 1, 2)


def part_in_both(module, tensor, torch):
    """A part of the live model in float32 and in bfloat16, channels last."""
    with torch.no_grad():
        half = copy.deepcopy(module).to(torch.bfloat16)(tensor.to(torch.bfloat16))
        return [out.permute(0, 2, 3, 1) for out in (module(tensor), half)]


def test_group_norm_in_bfloat16(pair, torch):
    features, tensor = middle(pair, torch)
    reference, theirs = part_in_both(pair.live.encoder.conv_norm_out, tensor, torch)
    params = pair.load(dtype=jnp.bfloat16)["encoder"]["norm_out"]
    more = (pair.config.num_groups, pair.config.norm_eps)
    ours = jax.jit(group_norm, static_argnums=(3, 4))(
        features, params["scale"], params["bias"], *more
    )
    assert ours.dtype == jnp.bfloat16
    bridge.check_bfloat16("group norm in bfloat16", ours, theirs, reference, 3e-3, 1.05)


def test_attention_in_bfloat16(pair, torch):
    features, tensor = middle(pair, torch)
    reference, theirs = part_in_both(pair.live.encoder.mid_block.attentions[0], tensor, torch)
    variables = {"params": pair.load(dtype=jnp.bfloat16)["encoder"]["mid_attn_1"]}
    ours = jax.jit(AttentionBlock(pair.config, jnp.bfloat16).apply)(variables, features)
    assert ours.dtype == jnp.bfloat16
    bridge.check_bfloat16("attention in bfloat16", ours, theirs, reference, 5e-3, 1.15)


def test_original_names_are_those_that_diffusers_converts(pair, torch):
    """Our original names go through diffusers' own converter and arrive under its names."""
    from diffusers.loaders import single_file_utils

    originals = tensor_map.vae_slots(pair.abstract)
    leaves = tensor_map.leaves_of(pair.params)
    checkpoint = {
        slot.name: torch.from_numpy(
            tensor_map.to_published(np.array(leaves[slot.path]), slot.layout).copy()
        )
        for slot in originals
    }
    assert {slot.name: slot.shape for slot in originals} == {
        name: tuple(tensor.shape) for name, tensor in checkpoint.items()
    }
    converted = single_file_utils.convert_ldm_vae_checkpoint(checkpoint, pair.live.config)
    expected = pair.live.state_dict()
    assert sorted(converted) == sorted(expected)
    for name, tensor in converted.items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name].numpy(), err_msg=name)


def test_both_name_lists_cover_the_same_parameters(pair):
    """diffusers -> ours -> original names -> ours gives the same bits, name by name."""
    originals = tensor_map.vae_slots(pair.abstract)
    assert [slot.path for slot in originals] == [slot.path for slot in pair.slots]
    for slots in (originals, pair.slots):
        assert len({slot.name for slot in slots}) == len(slots)
    pattern = re.compile(r"(en|de)coder\.(conv_in|conv_out|norm_out|mid|down|up)\.")
    assert all(pattern.match(slot.name) for slot in originals)

    leaves = tensor_map.leaves_of(pair.params)
    arrays = {
        s.name: tensor_map.to_published(np.array(leaves[s.path]), s.layout) for s in originals
    }
    back = bridge.load(MemoryTensors(arrays), originals, pair.abstract)
    jax.tree.map(np.testing.assert_array_equal, back, pair.params)
    published = bridge.arrays_of(pair.live)
    for slot in pair.slots:
        array = tensor_map.to_published(
            np.array(tensor_map.leaves_of(back)[slot.path]), slot.layout
        )
        np.testing.assert_array_equal(array, published[slot.name], err_msg=slot.name)
