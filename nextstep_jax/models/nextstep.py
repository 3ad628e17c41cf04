"""The unified model: text and image tokens as one sequence (arXiv 2508.10711, section 2).

A mixed sequence is embedded (text ids by the table, image tokens by a linear projector), run
through the causal decoder, and each position's hidden state predicts what stands next: the LM
head where that is text, the flow head where it is an image token.

Axes: batch, length; embed = decoder width; token = values of an image token; vocab.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from nextstep_jax.models.attention import KVCache, Segments
from nextstep_jax.models.config import NextStepConfig
from nextstep_jax.models.decoder import Decoder, unstack_layers
from nextstep_jax.models.flow_head import FlowHead, Modulations
from nextstep_jax.models.layers import Dense, constrain


class NextStep(nn.Module):
    """Decoder, flow head and the projectors between them.

    Methods are called through `model.apply(variables, ..., method="name")`.

    Attributes:
        config: Shapes and special ids.
        dtype: Dtype of the computation; parameters are float32.
        attention: Attention kernel.
        scan_layers: See `Decoder`; False for decoding with a cache.
        remat: See `Decoder`.
    """

    config: NextStepConfig
    dtype: DTypeLike = jnp.float32
    attention: str = "xla"
    scan_layers: bool = True
    remat: str = "none"

    def setup(self):
        """Declares the parameters."""
        c, d = self.config, self.config.decoder
        normal = nn.initializers.normal(d.initializer_range)
        table = nn.with_logical_partitioning(normal, ("vocab", "embed"))
        self.embed_tokens = self.param("embed_tokens", table, (d.vocab_size, d.embed_dim))
        self.decoder = Decoder(d, self.dtype, self.attention, self.scan_layers, self.remat)
        if not d.tie_embeddings:
            self.lm_head = Dense(d.vocab_size, ("embed", "vocab"), False, normal, self.dtype)
        self.image_in_proj = Dense(d.embed_dim, ("token", "embed"), True, normal, self.dtype)
        # Square, and a mesh axis may appear once in a spec: only the inputs carry "embed".
        self.image_out_proj = Dense(d.embed_dim, ("embed", "mlp"), True, normal, self.dtype)
        self.flow_head = FlowHead(c.flow_head, c.token_dim, self.dtype)

    def embed(
        self, token_ids: Int[Array, "batch length"], latents: Float[Array, "batch length token"]
    ) -> Float[Array, "batch length embed"]:
        """Text rows from the table; image tokens projected where the placeholder id stands."""
        # Cast before the lookup: a sharded table then travels in the dtype of the computation.
        text = jnp.take(self.embed_tokens.astype(self.dtype), token_ids, axis=0)
        image = self.image_in_proj(latents)
        is_image = token_ids == self.config.image_placeholder_id
        return jnp.where(is_image[..., None], image, text)

    def embed_image_tokens(
        self, tokens: Float[Array, "batch length token"]
    ) -> Float[Array, "batch length embed"]:
        """Image tokens alone, as the sampler feeds them back."""
        return self.image_in_proj(tokens)

    def hidden(
        self,
        token_ids: Int[Array, "batch length"],
        latents: Float[Array, "batch length token"],
        positions: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"],
    ) -> Float[Array, "batch length embed"]:
        """Packed rows to normed hidden states; attention stays inside a segment."""
        x = self.embed(token_ids, latents)
        x, _ = self.decoder(x, positions, Segments.of_row(segment_ids))
        return constrain(x, "act_batch", "act_len", "act_embed")

    def decode(
        self, embeddings: Float[Array, "batch length embed"], cache: KVCache
    ) -> tuple[Float[Array, "batch length embed"], KVCache]:
        """The next positions of rows whose past is in the cache (needs scan_layers=False)."""
        length = embeddings.shape[1]
        return self.decoder(embeddings, cache.positions(length), cache.segments(length), cache)

    def text_logits(self, hidden: Float[Array, "... embed"]) -> Float[Array, "... vocab"]:
        """Float32 logits of the next text token."""
        if self.config.decoder.tie_embeddings:
            table = self.embed_tokens.astype(self.dtype)
            axes = (((hidden.ndim - 1,), (1,)), ((), ()))
            logits = jax.lax.dot_general(hidden.astype(self.dtype), table, axes)
        else:
            logits = self.lm_head(hidden)
        return logits.astype(jnp.float32)

    def condition(
        self, hidden: Float[Array, "... embed"], gen_pos_embed: Any = None
    ) -> Float[Array, "... embed"]:
        """What the flow head is told: the hidden state before the token, projected.

        Args:
            hidden: The normed hidden states before the image tokens.
            gen_pos_embed: (..., embed), added first where the config asks for it.
        """
        if gen_pos_embed is not None:
            hidden = hidden + gen_pos_embed.astype(hidden.dtype)
        return self.image_out_proj(hidden)

    def velocity(
        self,
        x: Float[Array, "... token"],
        time: Float[Array, "..."],
        condition: Float[Array, "... embed"],
    ) -> Float[Array, "... token"]:
        """The flow head at noisy tokens, float32."""
        return self.flow_head(x, time, condition)

    def embed_condition(self, condition: Float[Array, "... embed"]) -> Float[Array, "... width"]:
        """What the flow head makes of a condition; once a token."""
        return self.flow_head.embed_condition(condition)

    def velocity_given(
        self,
        x: Float[Array, "... token"],
        time: Float[Array, "..."],
        embedded: Float[Array, "... width"],
    ) -> Float[Array, "... token"]:
        """`velocity` where the condition is embedded already (`embed_condition`)."""
        return self.flow_head.velocity_given(x, time, embedded)

    def embed_times(self, times: Float[Array, " steps"]) -> Float[Array, "steps width"]:
        """The flow head's embedding of the sampler's times; once a call."""
        return self.flow_head.embed_time(times)

    def flow_modulations(
        self, time_embedding: Float[Array, "steps width"], condition: Float[Array, "rows embed"]
    ) -> Modulations:
        """The modulations of all steps of one token: leading axes (steps, rows)."""
        y = self.flow_head.embed_condition(condition)
        return self.flow_head.modulations(time_embedding[:, None] + y[None])

    def modulated_velocity(
        self, x: Float[Array, "rows token"], modulations: Modulations
    ) -> Float[Array, "rows token"]:
        """The flow head with one step's modulations, float32."""
        return self.flow_head.velocity(x, modulations)

    def __call__(
        self,
        token_ids: Int[Array, "batch length"],
        latents: Float[Array, "batch length token"],
        positions: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"],
    ) -> tuple[Float[Array, "batch length vocab"], Float[Array, "batch length token"]]:
        """Touches every parameter (for `init`): logits, and velocities at the clean tokens."""
        hidden = self.hidden(token_ids, latents, positions, segment_ids)
        time = jnp.zeros(token_ids.shape, jnp.float32)
        return self.text_logits(hidden), self.velocity(latents, time, self.condition(hidden))


def init_params(model: NextStep, key: Key[Array, ""]) -> dict[str, Any]:
    """Boxed parameters (with their logical axes) of a model; shapes do not depend on the batch."""
    # Nor on the kernel, of which some refuse so short a row.
    model = model.clone(attention="xla")
    ids = jnp.zeros((1, 2), jnp.int32)
    latents = jnp.zeros((1, 2, model.config.token_dim), jnp.float32)
    return model.init(key, ids, latents, ids, jnp.ones_like(ids))["params"]


def unrolled(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a scanned model as those of the same model with scan_layers=False."""
    return {**params, "decoder": unstack_layers(params["decoder"])}


def gen_position_table(config: NextStepConfig) -> Float[np.ndarray, "positions embed"]:
    """The optional 2D sincos, float32 (side^2, embed): token i gets row i.

    The first half of the width encodes the column, the second the row; each half is sines, then
    cosines, with frequencies 10000^(-i / (width/4)).
    """
    quarter = config.decoder.embed_dim // 4
    side = config.base_image_grid_size
    frequency = 10_000.0 ** (-np.arange(quarter, dtype=np.float64) / quarter)
    angle = np.arange(side)[:, None] * frequency
    half = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    rows, columns = np.divmod(np.arange(side * side), side)
    return np.concatenate([half[columns], half[rows]], axis=1).astype(np.float32)
