"""The flow-matching head: the velocity of a noisy image token (arXiv 2508.10711, Tables 6 and 7).

y = embed(time) + embed(condition) modulates a stack of AdaLN blocks over the noisy token:

    h = LN(x) * (1 + scale(y)) + shift(y);   x <- x + gate(y) * mlp(h)

Shift, scale and gate depend on the time and the condition, not on x. A sampler that knows its
times computes those of all its steps in one matmul a block (`modulations` with a leading step
axis) and then runs `velocity` step by step: the same numbers, and more than half of the head's
weights are read once a token instead of once a step.

Axes: token = values of an image token, cond = width of the condition, width = width of the head.
"""

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from nextstep_jax.models.config import FlowHeadConfig
from nextstep_jax.models.layers import Dense, LayerNorm, constrain, layer_norm

_XAVIER = nn.initializers.xavier_uniform()
_ZEROS = nn.initializers.zeros


@flax.struct.dataclass
class Modulations:
    """What the blocks need to know of time and condition.

    Attributes:
        blocks: For each block (..., 3 * width): shift, scale, gate.
        final: (..., 2 * width): shift, scale.
    """

    blocks: tuple
    final: jax.Array


def timestep_sinusoid(
    time: Float[Array, "..."], dim: int, max_period: float
) -> Float[Array, "... dim"]:
    """[cos(t f_i), sin(t f_i)] with f_i = max_period^(-i / (dim/2)); t in [0, 1], not scaled."""
    half = dim // 2
    frequency = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = time.astype(jnp.float32)[..., None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def modulate(
    x: Float[Array, "... width"],
    shift: Float[Array, "... width"],
    scale: Float[Array, "... width"],
) -> Float[Array, "... width"]:
    """The AdaLN modulation: x * (1 + scale) + shift."""
    return x * (1 + scale) + shift


def _on_rows(x, last=None):
    """Lays values at positions of rows, (..., batch, length, values), out like the rows.

    Times and noise are drawn inside the step and have no layout of their own: without this the
    compiler lets every device compute the head for all rows.
    """
    if x.ndim < 3:  # a sampler's: steps or rows, and nothing to lay out
        return x
    return constrain(x, *(None,) * (x.ndim - 3), "act_batch", "act_len", last)


class Block(nn.Module):
    """An AdaLN residual block whose modulation is computed apart from its MLP."""

    config: FlowHeadConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Declares the parameters."""
        width = self.config.width
        hidden = int(width * self.config.mlp_ratio)
        self.norm = LayerNorm(self.config.norm_eps)
        self.mlp_in = Dense(hidden, ("flow", "flow_mlp"), True, _XAVIER, self.dtype)
        self.mlp_out = Dense(width, ("flow_mlp", "flow"), True, _XAVIER, self.dtype)
        self.modulation = Dense(3 * width, ("flow", "flow_mlp"), True, _ZEROS, self.dtype)

    def __call__(
        self, x: Float[Array, "... width"], modulation: Float[Array, "... three_widths"]
    ) -> Float[Array, "... width"]:
        """Adds the gated MLP of the modulated x."""
        shift, scale, gate = jnp.split(modulation, 3, axis=-1)
        h = modulate(self.norm(x), shift, scale)
        return _on_rows(x + gate * self.mlp_out(jax.nn.silu(_on_rows(self.mlp_in(h), "act_mlp"))))


class FlowHead(nn.Module):
    """Noisy token, time and condition to velocity.

    Attributes:
        config: Shapes.
        token_dim: Values of an image token.
        dtype: Dtype of the computation; the velocity comes back in float32.
    """

    config: FlowHeadConfig
    token_dim: int
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Declares the parameters."""
        width = self.config.width
        normal = nn.initializers.normal(0.02)
        self.time_in = Dense(width, ("token", "flow"), True, normal, self.dtype)
        self.time_out = Dense(width, ("flow", "flow_mlp"), True, normal, self.dtype)
        self.cond_embed = Dense(width, ("embed", "flow"), True, _XAVIER, self.dtype)
        self.input_proj = Dense(width, ("token", "flow"), True, _XAVIER, self.dtype)
        self.blocks = [Block(self.config, self.dtype) for _ in range(self.config.num_layers)]
        self.final_modulation = Dense(2 * width, ("flow", "flow_mlp"), True, _ZEROS, self.dtype)
        self.final_proj = Dense(self.token_dim, ("flow", "token"), True, _ZEROS, self.dtype)

    def embed_time(self, time: Float[Array, "..."]) -> Float[Array, "... width"]:
        """Times in [0, 1] to their embedding; the time is rounded to the compute dtype first."""
        c = self.config
        sinusoid = timestep_sinusoid(time.astype(self.dtype), c.frequency_dim, c.max_period)
        hidden = _on_rows(self.time_in(_on_rows(sinusoid)))
        return _on_rows(self.time_out(jax.nn.silu(hidden)))

    def embed_condition(self, condition: Float[Array, "... cond"]) -> Float[Array, "... width"]:
        """The projected hidden state to its embedding; once a token."""
        return _on_rows(self.cond_embed(_on_rows(condition)))

    def modulations(self, y: Float[Array, "... width"]) -> Modulations:
        """All modulations of y = embed_time + embed_condition, for any leading axes."""
        y = jax.nn.silu(y)
        blocks = tuple(block.modulation(y) for block in self.blocks)
        return Modulations(blocks=blocks, final=self.final_modulation(y))

    def velocity(
        self, x: Float[Array, "... token"], modulations: Modulations
    ) -> Float[Array, "... token"]:
        """The velocity at noisy tokens x (float32, leading axes as the modulations')."""
        h = self.input_proj(x)
        for block, modulation in zip(self.blocks, modulations.blocks, strict=True):
            h = block(h, modulation)
        shift, scale = jnp.split(modulations.final, 2, axis=-1)
        h = modulate(layer_norm(h, eps=self.config.norm_eps), shift, scale)
        return self.final_proj(h).astype(jnp.float32)

    def velocity_given(
        self,
        x: Float[Array, "... token"],
        time: Float[Array, "..."],
        embedded: Float[Array, "... width"],
    ) -> Float[Array, "... token"]:
        """The velocity at (x, time) under a condition that is embedded already."""
        y = self.embed_time(time) + embedded
        return _on_rows(self.velocity(_on_rows(x), self.modulations(y)))

    def __call__(
        self,
        x: Float[Array, "... token"],
        time: Float[Array, "..."],
        condition: Float[Array, "... cond"],
    ) -> Float[Array, "... token"]:
        """The plain form: velocity at (x, time) under a condition."""
        return self.velocity_given(x, time, self.embed_condition(condition))
