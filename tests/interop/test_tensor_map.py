import math

import jax
import numpy as np
import pytest
from flax import linen as nn

from nextstep_jax.interop import tensor_map
from nextstep_jax.interop.huggingface import abstract_model, abstract_vae
from nextstep_jax.models.config import DecoderConfig, NextStepConfig, VAEConfig
from nextstep_jax.models.nextstep import unrolled
from tests import published_files

# Of the released model.
RELEASED = {
    **{"vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 13824},
    **{"num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8},
    **{"head_dim": 128, "attention_bias": True, "o_attention_bias": False, "mlp_bias": False},
    **{"tie_word_embeddings": False, "latent_channels": 16, "latent_patch_size": 2},
    **{"fm_head_dim": 1536, "fm_head_layers": 12},
}
RELEASED_VAE = {
    **{"in_channels": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2},
    **{"z_channels": 16},
}


def assert_covered(slots, abstract, published):
    """Slots and published tensors are the same; each parameter is covered exactly once."""
    assert len(slots) == len(published)
    assert {slot.name: slot.shape for slot in slots} == published
    leaves = tensor_map.leaves_of(abstract)
    layers = {path: [] for path in leaves}
    for slot in slots:
        layers[slot.path].append(slot)
    for path, mine in layers.items():
        shape = leaves[path].shape
        if mine[0].layer is None:
            assert len(mine) == 1, path
            assert sorted(mine[0].shape + (1,) * (len(shape) - len(mine[0].shape))) == sorted(shape)
        else:
            assert sorted(slot.layer for slot in mine) == list(range(shape[0])), path
            assert all(sorted(slot.shape) == sorted(shape[1:]) for slot in mine), path
        assert sum(math.prod(slot.shape) for slot in mine) == math.prod(shape), path


@pytest.fixture(scope="module")
def released():
    """Shapes of the 14B model, layers stacked."""
    return nn.unbox(abstract_model(NextStepConfig()))


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "unrolled"])
def test_every_tensor_of_the_14b_model_has_its_slice(released, stacked):
    published = published_files.model_shapes(RELEASED)
    abstract = released if stacked else jax.eval_shape(unrolled, released)
    slots = tensor_map.nextstep_slots(abstract)
    assert_covered(slots, abstract, published)
    # 48 layers of 12; table, norm and head; 4 of projectors; 12 blocks of 8 and 12 more.
    assert len(slots) == 48 * 12 + 3 + 4 + 12 * 8 + 12 == 691
    assert sum(math.prod(shape) for shape in published.values()) == 14_953_814_080
    assert len(tensor_map.leaves_of(abstract)) == (127 if stacked else 691)


def test_unrolled_is_the_unrolled_model():
    """What stands for the unrolled 14B model above has the shapes of the model itself."""
    config = NextStepConfig(DecoderConfig(num_layers=2))
    one = nn.unbox(abstract_model(config, scan_layers=False))
    other = jax.eval_shape(unrolled, nn.unbox(abstract_model(config)))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert jax.tree.map(lambda x: x.shape, one) == jax.tree.map(lambda x: x.shape, other)


def test_variants_of_the_decoder():
    """All biases, and a tied head, which has no parameter of its own."""
    values = {**RELEASED, "o_attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    values |= {"num_hidden_layers": 12, "hidden_size": 40, "intermediate_size": 24}
    decoder = DecoderConfig(
        embed_dim=40, mlp_dim=24, num_layers=12, out_bias=True, mlp_bias=True, tie_embeddings=True
    )
    abstract = nn.unbox(abstract_model(NextStepConfig(decoder)))
    published = published_files.model_shapes(values)
    assert "lm_head.weight" not in published
    assert "layers.11.mlp.down_proj.bias" in published
    assert_covered(tensor_map.nextstep_slots(abstract), abstract, published)


@pytest.mark.parametrize("diffusers", [False, True], ids=["original", "diffusers"])
@pytest.mark.parametrize(
    ("values", "config", "count"),
    [
        (RELEASED_VAE, VAEConfig(), 83_819_683),
        (
            published_files.VAE,
            VAEConfig(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=4),
            None,
        ),
    ],
    ids=["released", "small"],
)
def test_every_tensor_of_the_image_tokenizer(values, config, count, diffusers):
    abstract = abstract_vae(config)
    published = published_files.vae_shapes(values, diffusers=diffusers)
    assert_covered(tensor_map.vae_slots(abstract, diffusers=diffusers), abstract, published)
    if count:
        assert sum(math.prod(shape) for shape in published.values()) == count
        assert len(published) == 244


def test_known_places():
    """A few entries spelled out, the reversed levels of diffusers among them."""
    abstract = abstract_vae(VAEConfig())
    original = {slot.path: slot for slot in tensor_map.vae_slots(abstract)}
    renamed = {slot.path: slot for slot in tensor_map.vae_slots(abstract, diffusers=True)}
    for path, name, other, layout in (
        (
            ("decoder", "up_0_block_2", "conv1", "kernel"),
            "decoder.up.0.block.2.conv1.weight",
            "decoder.up_blocks.3.resnets.2.conv1.weight",
            "conv",
        ),
        (
            ("decoder", "up_3_upsample", "conv", "bias"),
            "decoder.up.3.upsample.conv.bias",
            "decoder.up_blocks.0.upsamplers.0.conv.bias",
            "same",
        ),
        (
            ("encoder", "mid_attn_1", "proj_out", "kernel"),
            "encoder.mid.attn_1.proj_out.weight",
            "encoder.mid_block.attentions.0.to_out.0.weight",
            "linear as conv",
        ),
    ):
        assert original[path].name == name
        assert renamed[path].name == other
        assert renamed[path].layout == layout


@pytest.mark.parametrize(
    ("layout", "shape", "index"),
    [
        ("same", (3, 4), lambda a, b: (a, b)),
        ("linear", (3, 4), lambda a, b: (b, a)),
        ("conv", (2, 3, 4, 5), lambda o, i, h, w: (h, w, i, o)),
        ("linear as conv", (3, 4), lambda o, i: (0, 0, i, o)),
    ],
)
def test_layouts(layout, shape, index):
    """Value by value, there and back, as views."""
    tensor = np.arange(math.prod(shape)).reshape(shape)
    ours = tensor_map.to_ours(tensor, layout)
    assert ours.size == tensor.size
    for place in np.ndindex(shape):
        assert ours[index(*place)] == tensor[place]
    assert tensor_map.published_shape(ours.shape, layout) == shape
    back = tensor_map.to_published(ours, layout)
    np.testing.assert_array_equal(back, tensor)
    assert np.shares_memory(ours, tensor)
    assert np.shares_memory(back, tensor)


def test_trees_and_leaves():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    leaves = {("a", "b"): 1, ("a", "c", "d"): 2, ("e",): 3}
    assert tensor_map.leaves_of(tree) == leaves
    assert tensor_map.tree_of(leaves) == tree


@pytest.mark.parametrize(
    "path",
    [
        ("decoder", "layers", "adapter", "kernel"),
        ("flow_head", "gate", "kernel"),
        ("flow_head", "cond_embed", "alpha"),
        ("adapter", "kernel"),
    ],
)
def test_a_parameter_without_a_published_name_is_refused(path):
    tree = tensor_map.tree_of({path: jax.ShapeDtypeStruct((2, 3, 4), np.float32)})
    with pytest.raises(ValueError, match=rf"'{path[-1]}' of '.*{path[-2]}' has no published name"):
        tensor_map.nextstep_slots(tree)
