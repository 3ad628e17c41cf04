"""A model small enough to compile in a second, with random weights in every place.

The published initialisation has zeros where the conditions come in; here no parameter is zero, so
that prompts, times, noise and branches all move the result.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from nextstep_jax.data.text_tokenizer import SPECIAL_TOKENS, train_bpe
from nextstep_jax.models.config import DecoderConfig, FlowHeadConfig, NextStepConfig, VAEConfig
from nextstep_jax.models.nextstep import NextStep, init_params, unrolled
from nextstep_jax.models.vae import VAE
from nextstep_jax.sampling.generate import SamplerConfig
from nextstep_jax.sampling.pipeline import NextStepPipeline
from nextstep_jax.sampling.presets import Preset

# A prime, so that no other axis of a program has this length by chance.
VOCAB_SIZE = 331
PROMPTS = ("a red circle", "two blue squares left of a star", "a", "green", "a large red triangle")
# Not square, and one of the 17 aspect grids: 8x32 at a quarter of its base.
IMAGE_SIZE = (8, 32)
GRID = (2, 8)

CONFIG = NextStepConfig(
    decoder=DecoderConfig(
        vocab_size=VOCAB_SIZE,
        embed_dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=48,
    ),
    flow_head=FlowHeadConfig(width=24, num_layers=2, frequency_dim=16),
    latent_channels=4,
    downsampling=2,
    base_image_grid_size=4,
    **dict(
        bos_id=0, eos_id=0, pad_id=1, image_area_id=2, boi_id=3, eoi_id=4, image_placeholder_id=5
    ),
)
VAE_CONFIG = VAEConfig(
    channels=8, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=4, num_groups=4
)


def random_tree(shapes, seed: int):
    """Kernels of order one over the root of their inputs, scales around 1, other vectors small."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)

    def draw(i, path, leaf):
        values = np.random.default_rng([seed, i]).standard_normal(leaf.shape).astype(np.float32)
        if leaf.ndim > 1 and path[-1].key != "scale":
            inputs = leaf.shape[-2] if leaf.ndim < 4 else np.prod(leaf.shape[:-1])
            return jnp.asarray(values / np.sqrt(inputs))
        return jnp.asarray(float(path[-1].key == "scale") + 0.2 * values)

    return treedef.unflatten([draw(i, path, leaf) for i, (path, leaf) in enumerate(leaves)])


@functools.cache
def params():
    """Parameters of `CONFIG`, layers stacked."""
    shapes = jax.eval_shape(functools.partial(init_params, NextStep(CONFIG)), jax.random.key(0))
    tree = random_tree(nn.unbox(shapes), 1)
    # Text of order one as well: embeddings are not summed over.
    tree["embed_tokens"] = tree["embed_tokens"] * np.sqrt(VOCAB_SIZE)
    return tree


@functools.cache
def unrolled_params():
    """The same, one subtree a layer."""
    return unrolled(params())


@functools.cache
def vae_params():
    """Parameters of `VAE_CONFIG`."""
    images = jnp.zeros((1, *IMAGE_SIZE, 3))
    shapes = jax.eval_shape(VAE(VAE_CONFIG).init, jax.random.key(0), images)["params"]
    return random_tree(nn.unbox(shapes), 2)


@functools.cache
def tokenizer():
    """Trained on the prompts."""
    return train_bpe(PROMPTS, len(SPECIAL_TOKENS) + 256 + 8)


PRESET = Preset(
    SamplerConfig("euler_maruyama_full", num_steps=3), guidance_scale=2.5, negative_prompt="blurry"
)


def pipeline(**changes) -> NextStepPipeline:
    """A pipeline around all that."""
    arguments = dict(params=unrolled_params(), preset=PRESET, image_size=IMAGE_SIZE)
    arguments |= dict(vae_params=vae_params(), tokenizer=tokenizer())
    return NextStepPipeline(NextStep(CONFIG), vae=VAE(VAE_CONFIG), **arguments | changes)


def prompt_rows(prompts=PROMPTS, grid=GRID) -> list[list[int]]:
    """Ids in front of an image, as the layout of training has them."""
    from nextstep_jax.data.layout import prompt_prefix

    return [prompt_prefix(prompt, grid, tokenizer()) for prompt in prompts]
