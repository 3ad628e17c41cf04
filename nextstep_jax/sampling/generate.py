"""Sampling image tokens: prefill, one step, and the scan over an image, all pure functions.

A step turns the last hidden state into an image token (the flow head integrated by a solver under
guidance), feeds the token back and runs the decoder over its cache. LM logits are never computed
here, and nothing leaves the device between tokens.

Every image owns a key, and token i draws its noise from fold_in(key, i): an image does not depend
on what else is in the batch, on padding, on the mesh or on where a run was cut.

Axes: batch = images; branches of guidance; rows = batch * branches, the branches of an image next
to each other; n = tokens of an image; token = values of one; steps of the solver.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

from nextstep_jax.flow.guidance import check_schedule, guidance_scale_at, guide
from nextstep_jax.flow.solvers import NOISE_LEVEL, get_solver
from nextstep_jax.models.attention import KVCache
from nextstep_jax.models.latents import normalize_tokens
from nextstep_jax.models.nextstep import NextStep, gen_position_table

_TOKEN_NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How a token is made; hashable, a static value of the jitted functions.

    Attributes:
        solver: A name in `flow.solvers.SOLVERS`.
        num_steps: Steps of the solver.
        shift: Shift of its times; 1 is none.
        noise_level: Strength of the noise in flow_sde and flow_cps.
        schedule: How guidance moves over the tokens, a name in `flow.guidance.SCHEDULES`.
        interval: Share of the tokens, from and to, that are guided at all.
        renorm: Never lengthen a velocity by guidance.
        token_norm: Normalise a sampled token before it is fed back and decoded.
    """

    solver: str = "euler_maruyama_full"
    num_steps: int = 28
    shift: float = 1.0
    noise_level: float = NOISE_LEVEL
    schedule: str = "constant"
    interval: tuple[float, float] = (0.0, 1.0)
    renorm: bool = False
    token_norm: bool = False

    def __post_init__(self):
        """Refuses settings that no solver takes, before anything is compiled."""
        object.__setattr__(self, "interval", tuple(self.interval))
        solver = get_solver(self.solver)
        solver.times(self.num_steps, self.shift)
        solver.check_noise_level(self.noise_level)
        check_schedule(self.schedule, self.interval)

    @property
    def num_noises(self) -> int:
        """Noise arrays a token takes: the start, and what the solver adds."""
        return 1 + get_solver(self.solver).num_noises(self.num_steps)


@flax.struct.dataclass
class Prompts:
    """Prompts of a batch, left-padded to one length.

    Attributes:
        token_ids: int32 (rows, length).
        latents: float32 (rows, length, token), image tokens at placeholders, zero elsewhere.
        starts: int32 (rows,), first position that is not padding.
    """

    token_ids: Any
    latents: Any
    starts: Any


@flax.struct.dataclass
class SamplerState:
    """Everything the loop carries; donated from chunk to chunk.

    Attributes:
        cache: Keys and values of every row.
        hidden: (rows, embed), the hidden state that the next token is sampled from.
        tokens: float32 (batch, n, token); filled up to `index`.
        index: int32 (), the next token.
        keys: typed keys (batch,), one for each image.
    """

    cache: KVCache
    hidden: Any
    tokens: Any
    index: Any
    keys: Any


def pad_prompts(
    rows: Sequence[Sequence[int]],
    pad_id: int,
    token_dim: int,
    length: int | None = None,
    image_tokens: Sequence[Float[np.ndarray, "_ token"] | None] | None = None,
    placeholder_id: int | None = None,
) -> Prompts:
    """Left-pads prompts of unequal lengths (host arrays).

    Args:
        rows: Token ids of every row.
        pad_id: Fills the left.
        token_dim: Values of an image token.
        length: Common length; by default that of the longest row.
        image_tokens: For each row the tokens (k, token) of its input images, in the order of
            the row's placeholders, or None.
        placeholder_id: Where those tokens go.

    Raises:
        ValueError: A row is longer than `length`, or its placeholders do not match its tokens.
    """
    longest = max(len(row) for row in rows)
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"a prompt of {longest} tokens is longer than the limit of {length}")
    ids = np.full((len(rows), length), pad_id, np.int32)
    latents = np.zeros((len(rows), length, token_dim), np.float32)
    starts = np.array([length - len(row) for row in rows], np.int32)
    for i, row in enumerate(rows):
        ids[i, starts[i] :] = row
        tokens = None if image_tokens is None else image_tokens[i]
        places = np.flatnonzero(ids[i] == placeholder_id) if placeholder_id is not None else []
        if len(places) != (0 if tokens is None else len(tokens)):
            raise ValueError(
                f"prompt {i} has {len(places)} image placeholders for"
                f" {0 if tokens is None else len(tokens)} image tokens"
            )
        if tokens is not None:
            latents[i, places] = tokens
    return Prompts(token_ids=ids, latents=latents, starts=starts)


def draw_noise(
    keys: Key[Array, " batch"], index: Int[Array, ""], num_noises: int, token_dim: int
) -> Float[Array, "noises batch token"]:
    """N(0, 1) for one token of every image, from fold_in(image key, token index) alone."""

    def draw(key):
        return jax.random.normal(jax.random.fold_in(key, index), (num_noises, token_dim))

    return jnp.moveaxis(jax.vmap(draw)(keys), 0, 1)


def prefill(
    model: NextStep, params: Any, prompts: Prompts, keys: Key[Array, " batch"], num_tokens: int
) -> SamplerState:
    """Runs the prompts through the decoder and makes room for an image.

    Args:
        model: With scan_layers=False.
        params: Its parameters, one subtree a layer.
        prompts: rows = images * branches.
        keys: (images,), one typed key an image.
        num_tokens: Tokens of an image.

    Returns:
        The state in front of token 0.

    Raises:
        ValueError: The model adds positions to its hidden states, and has not that many.
    """
    num_positions = model.config.base_image_grid_size**2
    if model.config.use_gen_pos_embed and num_tokens > num_positions:
        raise ValueError(
            f"an image of {num_tokens} tokens is too large: base_image_grid_size="
            f"{model.config.base_image_grid_size} has positions for {num_positions}"
        )
    rows, length = prompts.token_ids.shape
    config = model.config
    cache = KVCache.empty(config.decoder, rows, length + num_tokens, prompts.starts, model.dtype)
    variables = {"params": params}
    x = model.apply(variables, prompts.token_ids, prompts.latents, method="embed")
    hidden, cache = model.apply(variables, x, cache, method="decode")
    tokens = jnp.zeros((keys.shape[0], num_tokens, config.token_dim), jnp.float32)
    index = jnp.zeros((), jnp.int32)
    return SamplerState(cache=cache, hidden=hidden[:, -1], tokens=tokens, index=index, keys=keys)


def embed_times(
    model: NextStep, params: Any, config: SamplerConfig
) -> Float[Array, "evaluations width"]:
    """The flow head's embedding of the solver's times, (evaluations, width); once a call."""
    times = jnp.asarray(get_solver(config.solver).times(config.num_steps, config.shift))
    return model.apply({"params": params}, times, method="embed_times")


def sample_token(
    model: NextStep,
    params: Any,
    hidden: Float[Array, "rows embed"],
    time_embedding: Float[Array, "evaluations width"],
    noise: Float[Array, "noises batch token"],
    scales: tuple[Any, Any],
    config: SamplerConfig,
    position: Float[Array, " embed"] | None = None,
) -> Float[Array, "batch token"]:
    """One image token of every image from the hidden states before it.

    Args:
        model: The model.
        params: Its parameters.
        hidden: The branches of an image are neighbours.
        time_embedding: Of `embed_times`.
        noise: Row 0 is the start, the others the solver's.
        scales: Guidance scale and image guidance scale of this token.
        config: The sampler.
        position: (embed,) added to the hidden states where the model wants it.

    Returns:
        float32 tokens, normalised if the config says so.
    """
    condition = model.apply({"params": params}, hidden, position, method="condition")
    return integrate_token(model, params, condition, time_embedding, noise, scales, config)


def integrate_token(
    model: NextStep,
    params: Any,
    condition: Float[Array, "rows embed"],
    time_embedding: Float[Array, "evaluations width"],
    noise: Float[Array, "noises batch token"],
    scales: tuple[Any, Any],
    config: SamplerConfig,
) -> Float[Array, "batch token"]:
    """`sample_token` from the conditions of the flow head: the flow integrated under guidance."""
    variables, batch = {"params": params}, noise.shape[1]
    branches = condition.shape[0] // batch
    # All steps at once: the modulations' weights are read once a token, not once a step.
    modulations = model.apply(variables, time_embedding, condition, method="flow_modulations")

    def velocity_fn(x, i):
        at_step = jax.tree.map(
            lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False), modulations
        )
        rows = jnp.repeat(x, branches, axis=0)
        velocity = model.apply(variables, rows, at_step, method="modulated_velocity")
        velocity = jnp.moveaxis(velocity.reshape(batch, branches, -1), 1, 0)
        return guide(velocity, *scales, renorm=config.renorm)

    tokens = get_solver(config.solver).solve(
        velocity_fn,
        noise[0],
        noise[1:],
        num_steps=config.num_steps,
        shift=config.shift,
        noise_level=config.noise_level,
    )
    return normalize_tokens(tokens, _TOKEN_NORM_EPS) if config.token_norm else tokens


def sample_step(
    model: NextStep,
    params: Any,
    state: SamplerState,
    time_embedding: Float[Array, "evaluations width"],
    guidance: Float[Array, "2"],
    config: SamplerConfig,
    noise: Float[Array, "noises batch token"] | None = None,
) -> SamplerState:
    """Samples token `state.index` of every image and moves the decoder past it.

    Args:
        model: With scan_layers=False.
        params: Its parameters.
        state: In front of the token.
        time_embedding: Of `embed_times`.
        guidance: Guidance scale and image guidance scale.
        config: The sampler.
        noise: (noises, batch, token) recorded noise; by default drawn from the images' keys.

    Returns:
        The state in front of the next token.
    """
    batch, num_tokens, token_dim = state.tokens.shape
    rows = state.hidden.shape[0]
    if noise is None:
        noise = draw_noise(state.keys, state.index, config.num_noises, token_dim)
    # The released code schedules both scales alike.
    at = (state.index, num_tokens)
    scales = tuple(
        guidance_scale_at(config.schedule, scale, *at, interval=config.interval)
        for scale in (guidance[0], guidance[1])
    )
    position = None
    if model.config.use_gen_pos_embed:
        position = jnp.asarray(gen_position_table(model.config))[state.index]
    args = (state.hidden, time_embedding, noise, scales, config, position)
    token = sample_token(model, params, *args)
    x = jnp.repeat(token, rows // batch, axis=0)[:, None]
    variables = {"params": params}
    x = model.apply(variables, x, method="embed_image_tokens")
    hidden, cache = model.apply(variables, x, state.cache, method="decode")
    tokens = lax.dynamic_update_index_in_dim(state.tokens, token, state.index, axis=1)
    return state.replace(cache=cache, hidden=hidden[:, -1], tokens=tokens, index=state.index + 1)


@functools.partial(jax.jit, static_argnames=("model", "num_tokens"))
def prefill_jit(
    model: NextStep, params: Any, prompts: Prompts, keys: Key[Array, " batch"], num_tokens: int
) -> SamplerState:
    """`prefill`, compiled."""
    return prefill(model, params, prompts, keys, num_tokens)


@functools.partial(
    jax.jit, static_argnames=("model", "config", "num_steps"), donate_argnames=("state",)
)
def sample_chunk(
    model: NextStep,
    params: Any,
    state: SamplerState,
    guidance: Float[Array, "2"],
    config: SamplerConfig,
    num_steps: int,
) -> SamplerState:
    """`num_steps` tokens in one compiled scan; the state is donated, so the cache stays in place.

    Between chunks the host may report progress; the numbers do not depend on the cut.
    """
    time_embedding = embed_times(model, params, config)

    def body(state, _):
        return sample_step(model, params, state, time_embedding, guidance, config), None

    return lax.scan(body, state, length=num_steps)[0]


@functools.partial(jax.jit, static_argnames=("model", "config", "num_tokens"))
def generate(
    model: NextStep,
    params: Any,
    prompts: Prompts,
    keys: Key[Array, " batch"],
    guidance: Float[Array, "2"],
    config: SamplerConfig,
    num_tokens: int,
) -> Float[Array, "batch n token"]:
    """Prompts to image tokens in one compiled program.

    Args:
        model: With scan_layers=False.
        params: Its parameters, one subtree a layer.
        prompts: rows = images * branches, 1 to 3 branches.
        keys: (images,) typed keys.
        guidance: Guidance scale and image guidance scale; traced, so they do not recompile.
        config: The sampler; static.
        num_tokens: Tokens of an image; static.

    Returns:
        float32 tokens, row-major on the image's grid.
    """
    state = prefill(model, params, prompts, keys, num_tokens)
    time_embedding = embed_times(model, params, config)

    def body(state, _):
        return sample_step(model, params, state, time_embedding, guidance, config), None

    return lax.scan(body, state, length=num_tokens)[0].tokens
