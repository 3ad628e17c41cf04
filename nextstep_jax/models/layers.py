"""The small layers that the decoder and the flow head share.

Mathematics as free functions on arrays; the modules below only declare parameters, their logical
axes and their dtypes. Parameters are float32; `dtype` is the dtype of the computation.

Logical axes of weights: embed, heads, kv_heads, mlp, vocab, layers, norm (decoder); token, flow,
flow_mlp (flow head). Of activations: act_batch, act_len, act_embed, act_heads, act_mlp.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import spmd
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

Initializer = Callable[..., jax.Array]


def constrain(x: Shaped[Array, "..."], *axes: str | None) -> Shaped[Array, "..."]:
    """Asks the compiler to lay an activation out by its logical axes.

    Without sharding rules in scope it does nothing, so that a model runs on one device without
    any ceremony. A name that the rules do not know raises, where Flax would by default leave the
    axis unsharded without a word.
    """
    if not nn.get_logical_axis_rules():
        return x
    return nn.with_logical_constraint(x, axes, fallback=spmd.RulesFallback.RAISE_ERROR)


def dense(
    x: Float[Array, "... inputs"],
    kernel: Float[Array, "inputs outputs"],
    bias: Float[Array, " outputs"] | None = None,
) -> Float[Array, "... outputs"]:
    """Linear map x @ kernel + bias, as one dot_general (adapters and quantisers intercept it)."""
    y = lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
    return y if bias is None else y + bias


def rms_norm(
    x: Float[Array, "... embed"], scale: Float[Array, " embed"], eps: float
) -> Float[Array, "... embed"]:
    """RMSNorm: x / sqrt(mean(x^2) + eps) * scale, in float32, returned in the dtype of x."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)


def layer_norm(
    x: Float[Array, "... width"],
    scale: Float[Array, " width"] | None = None,
    bias: Float[Array, " width"] | None = None,
    eps: float = 1e-6,
) -> Float[Array, "... width"]:
    """(x - mean) / sqrt(variance + eps), then the affine if given; float32 inside."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    y = y if scale is None else y * scale
    y = y if bias is None else y + bias
    return y.astype(x.dtype)


def rope(
    x: Float[Array, "batch length heads head_dim"],
    positions: Int[Array, "batch length"],
    theta: float,
) -> Float[Array, "batch length heads head_dim"]:
    """Rotary position embedding on halves (rotate-half), inverse frequency theta^(-2i/head_dim).

    Element i is rotated against element i + head_dim/2 by the angle position * frequency_i, in
    radians, in float32.
    """
    half = x.shape[-1] // 2
    inverse_frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * inverse_frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def gated_mlp(
    gate: Float[Array, "... mlp"], up: Float[Array, "... mlp"]
) -> Float[Array, "... mlp"]:
    """SiLU(gate) * up, the inside of the gated MLP."""
    return jax.nn.silu(gate) * up


class Dense(nn.Module):
    """A linear layer with a two-dimensional kernel.

    Attributes:
        features: Width of the output.
        axes: Logical names of the kernel's two axes.
        use_bias: Whether there is a bias.
        kernel_init: Initialiser of the kernel.
        dtype: Dtype of the computation.
    """

    features: int
    axes: tuple[str, str]
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.normal(0.02)
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        """Applies the layer."""
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(self.kernel_init, self.axes),
            (x.shape[-1], self.features),
        ).astype(self.dtype)
        bias = None
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            bias = self.param("bias", init, (self.features,)).astype(self.dtype)
        return dense(x.astype(self.dtype), kernel, bias)


class RMSNorm(nn.Module):
    """`rms_norm` with its learned scale."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... embed"]) -> Float[Array, "... embed"]:
        """Applies the normalisation."""
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        return rms_norm(x, self.param("scale", init, (x.shape[-1],)), self.eps)


class LayerNorm(nn.Module):
    """`layer_norm` with its learned scale and bias."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """Applies the normalisation."""
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
        scale = self.param("scale", ones, (x.shape[-1],))
        return layer_norm(x, scale, self.param("bias", zeros, (x.shape[-1],)), self.eps)
