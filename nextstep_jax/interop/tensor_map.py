"""Which published tensor is which slice of which parameter.

The published names are those of the NextStep-1 checkpoints (arXiv 2508.10711): a Qwen2 decoder
without the "model." prefix, `image_head.net` for the flow head, and LDM/Flux names for the image
tokenizer, whose diffusers names are known too. The map is read off our own parameter tree, so that
every parameter has a name or raises; that the names are all of the published ones is a test.

PyTorch keeps a linear weight as (out, in) and a convolution as (out, in, height, width); ours are
(in, out) and (height, width, in, out).
"""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from nextstep_jax.models.decoder import LAYERS

Path = tuple[str, ...]
"""Keys from the root of a parameter tree to a leaf."""

# Published axis order -> ours; a linear weight can also stand for a 1x1 convolution.
SAME, LINEAR, CONV, LINEAR_AS_CONV = "same", "linear", "conv", "linear as conv"

# Our module -> the published one. `*` is the number of a layer or block.
_DECODER = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    **{f"attn/{p}_proj": f"self_attn.{p}_proj" for p in "qkvo"},
    **{f"mlp/{p}_proj": f"mlp.{p}_proj" for p in ("gate", "up", "down")},
}
_FLOW_HEAD = {
    "time_in": "time_embed.mlp.0",
    "time_out": "time_embed.mlp.2",
    "cond_embed": "cond_embed",
    "input_proj": "input_proj",
    "blocks_*/norm": "res_blocks.*.in_ln",
    "blocks_*/mlp_in": "res_blocks.*.mlp.0",
    "blocks_*/mlp_out": "res_blocks.*.mlp.2",
    "blocks_*/modulation": "res_blocks.*.adaLN_modulation.1",
    "final_modulation": "final_layer.adaLN_modulation.1",
    "final_proj": "final_layer.linear",
}
_NEXTSTEP = {
    "embed_tokens": "embed_tokens",
    "lm_head": "lm_head",
    "image_in_proj": "image_in_projector",
    "image_out_proj": "image_out_projector",
    "decoder/final_norm": "norm",
    **{f"decoder/{LAYERS}_*/{ours}": f"layers.*.{theirs}" for ours, theirs in _DECODER.items()},
    **{f"flow_head/{ours}": f"image_head.net.{theirs}" for ours, theirs in _FLOW_HEAD.items()},
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "embed_tokens": "weight"}


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of one published tensor among our parameters.

    Attributes:
        name: The published name.
        path: The parameter.
        layer: Index on the parameter's leading axis of layers; None where the whole parameter is
            the tensor.
        layout: How the axes differ, see the constants above.
        shape: The published shape.
    """

    name: str
    path: Path
    layer: int | None
    layout: str
    shape: tuple[int, ...]


def leaves_of(tree: Any) -> dict[Path, Any]:
    """The leaves of a tree of dicts by their paths."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tuple(key.key for key in path): leaf for path, leaf in flat}


def tree_of(leaves: dict[Path, Any]) -> dict[str, Any]:
    """The inverse of `leaves_of`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def nextstep_slots(abstract: Any) -> list[Slot]:
    """The slots of a model.

    Args:
        abstract: Its parameters, stacked or unrolled, or anything with their paths and shapes.

    Raises:
        ValueError: A parameter has no published name.
    """
    slots = []
    for path, leaf in leaves_of(abstract).items():
        module, layout = "/".join(path[:-1]) or path[0], LINEAR if path[-1] == "kernel" else SAME
        if path[:2] != ("decoder", LAYERS):
            name = _published_name(module, path[-1])
            slots.append(Slot(name, path, None, layout, published_shape(leaf.shape, layout)))
            continue
        shape = published_shape(leaf.shape[1:], layout)
        for layer in range(leaf.shape[0]):
            unrolled = module.replace(f"/{LAYERS}/", f"/{LAYERS}_{layer}/")
            name = _published_name(unrolled, path[-1])
            slots.append(Slot(name, path, layer, layout, shape))
    return slots


def vae_slots(abstract: Any, *, diffusers: bool = False) -> list[Slot]:
    """The slots of an image tokenizer, under the original names or those of diffusers."""
    slots = []
    num_levels = 1 + max(
        int(found[1]) for key in abstract["encoder"] if (found := re.match(r"down_(\d+)_", key))
    )
    for path, leaf in leaves_of(abstract).items():
        module, layout = ".".join(path[:-1]), CONV if path[-1] == "kernel" else SAME
        module = re.sub(r"(down|up)_(\d+)_block_(\d+)", r"\1.\2.block.\3", module)
        module = re.sub(r"(down|up)_(\d+)_(down|up)sample", r"\1.\2.\3sample", module)
        module = re.sub(r"mid_(block|attn)_(\d)", r"mid.\1_\2", module)
        if diffusers:
            if layout == CONV and re.search(r"\.(q|k|v|proj_out)$", module):
                layout = LINEAR_AS_CONV
            module = _diffusers_module(module, num_levels)
        shape = published_shape(leaf.shape, layout)
        slots.append(Slot(f"{module}.{_LEAVES[path[-1]]}", path, None, layout, shape))
    return slots


def _published_name(module: str, leaf: str) -> str:
    pattern = re.sub(r"_(\d+)(?=/)", "_*", module)
    if pattern not in _NEXTSTEP or leaf not in _LEAVES:
        raise ValueError(f"parameter {leaf!r} of {module!r} has no published name")
    number = re.search(r"_(\d+)/", module)
    return f"{_NEXTSTEP[pattern].replace('*', number[1] if number else '')}.{_LEAVES[leaf]}"


# Inside a block of the image tokenizer, original -> diffusers.
_DIFFUSERS_PARTS = {
    "nin_shortcut": "conv_shortcut",
    "norm_out": "conv_norm_out",
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
    "mid.attn_1.q": "mid_block.attentions.0.to_q",
    "mid.attn_1.k": "mid_block.attentions.0.to_k",
    "mid.attn_1.v": "mid_block.attentions.0.to_v",
    "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
}


def _diffusers_module(module: str, num_levels: int) -> str:
    """The name of a module in diffusers' AutoencoderKL, whose decoder counts its levels upwards."""

    def rename(found):
        side, level, part = found[1], int(found[2]), found[3]
        level = level if side == "down" else num_levels - 1 - level
        part = re.sub(r"^block\.(\d+)", r"resnets.\1", part)
        part = re.sub(r"^(down|up)sample\.", r"\1samplers.0.", part)
        return f"{side}_blocks.{level}.{part}"

    module = re.sub(r"\b(down|up)\.(\d+)\.(.*)", rename, module)
    for original, theirs in _DIFFUSERS_PARTS.items():
        module = re.sub(rf"(^|\.){re.escape(original)}(?=\.|$)", rf"\1{theirs}", module)
    return module


def published_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The shape that a parameter (a layer of it) has in a published file."""
    match layout:
        case "linear":
            return shape[::-1]
        case "conv":
            return (shape[3], shape[2], shape[0], shape[1])
        case "linear as conv":
            return (shape[3], shape[2])
    return tuple(shape)


def to_ours(tensor: Shaped[np.ndarray, "..."], layout: str) -> Shaped[np.ndarray, "..."]:
    """A published tensor with our order of axes; a view."""
    match layout:
        case "linear":
            return tensor.T
        case "conv":
            return tensor.transpose(2, 3, 1, 0)
        case "linear as conv":
            return tensor.T[None, None]
    return tensor


def to_published(array: Shaped[np.ndarray, "..."], layout: str) -> Shaped[np.ndarray, "..."]:
    """The inverse of `to_ours`; a view."""
    match layout:
        case "linear":
            return array.T
        case "conv":
            return array.transpose(3, 2, 0, 1)
        case "linear as conv":
            return array[0, 0].T
    return array
