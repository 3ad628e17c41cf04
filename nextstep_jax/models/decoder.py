"""The causal decoder of Qwen2.5 shape (NextStep-1, arXiv 2508.10711, section 2).

Pre-norm blocks: x += attention(norm(x)), x += mlp(norm(x)), and a final norm. The same modules
run scanned over stacked weights (training: one compiled block) or unrolled over one set of
weights a layer (decoding: nothing is copied); `stack_layers` and `unstack_layers` go between the
two parameter trees.

Axes: batch, length, embed; see `layers.py` for the logical names.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nextstep_jax.models import attention
from nextstep_jax.models.attention import KVCache, LayerCache, Segments
from nextstep_jax.models.config import DecoderConfig
from nextstep_jax.models.layers import Dense, RMSNorm, constrain, gated_mlp, rope

LAYERS = "layers"  # key of the stacked parameters
# What a policy may name: results inside a block that the backward pass reads.
REMAT_SITES = (
    *("block_input", "q_proj", "k_proj", "v_proj", "attention"),
    *("gate_proj", "up_proj", "mlp"),
)
# Besides these, `remat_policy` reads "save:SITE,..." and "offload:SITE,...".
REMAT_POLICIES = ("none", "nothing_saveable", "dots_with_no_batch_dims_saveable")


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32
    implementation: str = "xla"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        positions: Int[Array, "batch length"],
        segments: Segments,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "batch length embed"], LayerCache | None]:
        """Attends inside the row, or over the cache after writing the new keys into it."""
        c = self.config

        def project(name, num_heads, axis):
            width = num_heads * c.head_dim
            layer = Dense(width, ("embed", axis), c.qkv_bias, _normal(c), self.dtype, name=name)
            y = checkpoint_name(layer(x), name)
            return y.reshape(*x.shape[:2], num_heads, c.head_dim)

        q = rope(project("q_proj", c.num_heads, "heads"), positions, c.rope_theta)
        k = rope(project("k_proj", c.num_kv_heads, "kv_heads"), positions, c.rope_theta)
        v = project("v_proj", c.num_kv_heads, "kv_heads")
        if cache is not None:
            k, v = cache = attention.extend(cache, k, v, segments.q_offset)
        out = attention.attend(q, k, v, segments, self.implementation)
        out = out.reshape(*x.shape[:2], c.num_heads * c.head_dim)
        out = constrain(out, "act_batch", "act_len", "act_heads")
        out_proj = Dense(
            c.embed_dim, ("heads", "embed"), c.out_bias, _normal(c), self.dtype, name="o_proj"
        )
        return out_proj(out), cache


class MLP(nn.Module):
    """down(SiLU(gate(x)) * up(x))."""

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length embed"]:
        """Applies the gated MLP."""
        c = self.config

        def layer(name, features, axes):
            return Dense(features, axes, c.mlp_bias, _normal(c), self.dtype, name=name)

        def hidden(name):
            return checkpoint_name(layer(name, c.mlp_dim, ("embed", "mlp"))(x), name)

        gate, up = hidden("gate_proj"), hidden("up_proj")
        h = checkpoint_name(gated_mlp(gate, up), "mlp")
        h = constrain(h, "act_batch", "act_len", "act_mlp")
        return layer("down_proj", c.embed_dim, ("mlp", "embed"))(h)


class Block(nn.Module):
    """One pre-norm layer; its result is (x, cache) so that it can be scanned."""

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32
    implementation: str = "xla"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        positions: Int[Array, "batch length"],
        segments: Segments,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "batch length embed"], LayerCache | None]:
        """Adds attention and MLP to the residual stream."""
        c = self.config
        x = constrain(x, "act_batch", "act_len", "act_embed")
        x = checkpoint_name(x, "block_input")
        attn = Attention(c, self.dtype, self.implementation, name="attn")
        y, cache = attn(RMSNorm(c.rms_norm_eps, name="input_norm")(x), positions, segments, cache)
        x = x + y
        mlp = MLP(c, self.dtype, name="mlp")
        x = x + mlp(RMSNorm(c.rms_norm_eps, name="post_attention_norm")(x))
        return constrain(x, "act_batch", "act_len", "act_embed"), cache


class Decoder(nn.Module):
    """The stack of blocks and the final norm.

    Attributes:
        config: Shapes.
        dtype: Dtype of the computation.
        implementation: Attention kernel, see `attention.attend`.
        scan_layers: Parameters stacked on a leading axis `layers` and one scanned block; or one
            set of parameters a layer (`layers_0`, ...) and unrolled code, which a cache needs.
        remat: What the backward pass keeps; see `remat_policy`.
    """

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32
    implementation: str = "xla"
    scan_layers: bool = True
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        positions: Int[Array, "batch length"],
        segments: Segments,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "batch length embed"], KVCache | None]:
        """Embeddings to the normed hidden states, which both heads read.

        Raises:
            ValueError: A cache with scanned layers, or an unknown remat policy.
        """
        if cache is not None and self.scan_layers:
            raise ValueError("cached decoding runs unrolled: scan_layers=False, unstack_layers()")
        fields = (self.config, self.dtype, self.implementation)
        block_cls = _remat(Block, self.remat, self.scan_layers)
        x = x.astype(self.dtype)
        if self.scan_layers:
            stack = nn.scan(
                block_cls,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast),
                length=self.config.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, _ = stack(*fields, name=LAYERS)(x, positions, segments)
        else:
            layers = []
            for i in range(self.config.num_layers):
                layer = None if cache is None else (cache.k[i], cache.v[i])
                block = block_cls(*fields, name=f"{LAYERS}_{i}")
                x, layer = block(x, positions, segments, layer)
                layers.append(layer)
            if cache is not None:
                k, v = zip(*layers, strict=True)
                cache = cache.replace(k=k, v=v, index=cache.index + x.shape[1])
        return RMSNorm(self.config.rms_norm_eps, name="final_norm")(x), cache


def _normal(config: DecoderConfig):
    return nn.initializers.normal(config.initializer_range)


def remat_policy(text: str) -> Callable[..., Any] | None:
    """What the backward pass of a block keeps of the forward pass; the rest is computed again.

    Args:
        text: "none" keeps everything; another of `REMAT_POLICIES` is jax's of that name; or parts
            like "save:attention,q_proj" and "offload:block_input", joined by a space: what is kept
            on the device, and in the host's memory, by `REMAT_SITES`.

    Returns:
        A policy of `jax.checkpoint`, or None for "none".

    Raises:
        ValueError: Something else is written.
    """
    if text in REMAT_POLICIES:
        return None if text == "none" else getattr(jax.checkpoint_policies, text)
    sites = {"save": [], "offload": []}
    for part in text.split() or [""]:
        verb, _, names = part.partition(":")
        if verb not in sites or not names or set(names.split(",")) - set(REMAT_SITES):
            raise ValueError(
                f"remat={text!r} is unknown; choose from {list(REMAT_POLICIES)}, or name sites as"
                f" in 'save:attention,q_proj offload:block_input'; sites are {list(REMAT_SITES)}"
            )
        sites[verb] += names.split(",")
    if not sites["offload"]:
        return jax.checkpoint_policies.save_only_these_names(*sites["save"])
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=sites["save"],
        names_which_can_be_offloaded=sites["offload"],
        offload_src="device",
        offload_dst="pinned_host",
    )


def _remat(block_cls: type[nn.Module], text: str, scanned: bool) -> type[nn.Module]:
    policy = remat_policy(text)
    if policy is None:
        return block_cls
    # Inside a scan the loop itself keeps the compiler from undoing the rematerialisation.
    return nn.remat(block_cls, policy=policy, prevent_cse=not scanned)


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's stacked parameters as one subtree a layer (`layers_0`, ...)."""
    rest = {name: value for name, value in params.items() if name != LAYERS}
    stacked = params[LAYERS]
    for i in range(jax.tree.leaves(stacked)[0].shape[0]):
        rest[f"{LAYERS}_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
    return rest


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `unstack_layers`."""
    names = sorted(
        (name for name in params if name.startswith(f"{LAYERS}_")),
        key=lambda name: int(name.rsplit("_", 1)[1]),
    )
    rest = {name: value for name, value in params.items() if name not in names}
    rest[LAYERS] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[n] for n in names))
    return rest
