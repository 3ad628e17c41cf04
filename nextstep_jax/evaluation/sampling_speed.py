"""How fast image tokens are sampled, and where the time goes.

Three compiled programs of the same length are timed in turn: sampling as it is, the decoder's
part of it, and the flow head's part of it. What sampling takes beyond the two (drawing noise,
writing tokens, what the compiler cannot overlap) is the rest.

Axes: as in `sampling/generate.py`; n = tokens of an image.
"""

import dataclasses
import functools
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from nextstep_jax.evaluation import timing
from nextstep_jax.models.nextstep import NextStep, init_params
from nextstep_jax.sampling.generate import (
    Prompts,
    SamplerConfig,
    SamplerState,
    embed_times,
    prefill_jit,
    sample_chunk,
    sample_token,
)

_WEIGHT_SCALE = 0.02


def random_params(model: NextStep, dtype: DTypeLike) -> dict[str, Any]:
    """Uniform weights of deviation 0.02, drawn on the device leaf by leaf; no LM head.

    Nothing larger than a leaf is held besides the result, and a program a shape is compiled
    rather than one for the whole tree. Zeros, as published for the head, might be folded away.
    """
    shapes = nn.unbox(jax.eval_shape(functools.partial(init_params, model), jax.random.key(0)))
    shapes.pop("lm_head", None)
    # The device's own generator: the default one costs more than all that is measured.
    key, bound = jax.random.key(0, impl="rbg"), _WEIGHT_SCALE * math.sqrt(3)
    draw = jax.jit(
        lambda key, i, shape: jax.random.uniform(
            jax.random.fold_in(key, i), shape, dtype, -bound, bound
        ),
        static_argnums=2,
    )
    leaves, treedef = jax.tree.flatten(shapes)
    return treedef.unflatten([draw(key, i, leaf.shape) for i, leaf in enumerate(leaves)])


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def decoder_only(model: NextStep, params: Any, state: SamplerState) -> SamplerState:
    """The decoder's part of an image: every token of `state.tokens` is fed, none is sampled."""
    batch, num_tokens, _ = state.tokens.shape
    variables, branches = {"params": params}, state.hidden.shape[0] // batch

    def body(state, _):
        token = lax.dynamic_index_in_dim(state.tokens, state.index, axis=1)
        x = jnp.repeat(token, branches, axis=0)
        x = model.apply(variables, x, method="embed_image_tokens")
        hidden, cache = model.apply(variables, x, state.cache, method="decode")
        return state.replace(cache=cache, hidden=hidden[:, -1], index=state.index + 1), None

    return lax.scan(body, state, length=num_tokens)[0]


@functools.partial(jax.jit, static_argnames=("model", "config"))
def head_only(
    model: NextStep,
    params: Any,
    hidden: Float[Array, "n rows embed"],
    noise: Float[Array, "noises batch token"],
    guidance: Float[Array, "2"],
    config: SamplerConfig,
) -> Float[Array, "n batch token"]:
    """The flow head's part of an image, from given hidden states and noise."""
    time_embedding = embed_times(model, params, config)
    scales = (guidance[0], guidance[1])

    def body(start, hidden):
        # Each token starts from the last one: the loop cannot be reordered or hoisted.
        inputs = noise.at[0].set(start)
        token = sample_token(model, params, hidden, time_embedding, inputs, scales, config)
        return token, token

    return lax.scan(body, noise[0], hidden)[1]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is sampled.

    Attributes:
        batch: Images at once.
        branches: Guidance branches, 1 to 3.
        num_tokens: Tokens of an image.
        prompt_length: Tokens of a prompt, without padding.
        sampler: How a token is made.
    """

    batch: int
    branches: int
    num_tokens: int
    prompt_length: int
    sampler: SamplerConfig

    @property
    def rows(self) -> int:
        """Rows of the decoder."""
        return self.batch * self.branches


def measure(model: NextStep, params: Any, setting: Setting, repeats: int) -> dict[str, Any]:
    """Compiles and times sampling and its parts.

    Args:
        model: With scan_layers=False.
        params: Of `random_params`.
        setting: What is sampled.
        repeats: Timed rounds.

    Returns:
        "compile_s" and "times_s" (seconds for whole images, a list for each round) of whole,
        decoder and head; the same of the prefill.
    """
    rows, num_tokens = setting.rows, setting.num_tokens
    draw = np.random.default_rng([3]).standard_normal
    prompts = Prompts(
        token_ids=np.full((rows, setting.prompt_length), model.config.boi_id, np.int32),
        latents=np.zeros((rows, setting.prompt_length, model.config.token_dim), np.float32),
        starts=np.zeros(rows, np.int32),
    )
    keys = jax.random.split(jax.random.key(0), setting.batch)
    guidance = jnp.array([3.0, 1.5], jnp.float32)
    noise = draw((setting.sampler.num_noises, setting.batch, model.config.token_dim))
    hidden = draw((num_tokens, rows, model.config.decoder.embed_dim))
    noise, hidden = jnp.asarray(noise, jnp.float32), jnp.asarray(hidden, model.dtype)

    def compiled(function, *args):
        start = time.perf_counter()
        return function.lower(*args).compile(), time.perf_counter() - start

    prefill, prefill_s = compiled(prefill_jit, model, params, prompts, keys, num_tokens)
    state = prefill(params, prompts, keys)
    whole, whole_s = compiled(
        sample_chunk, model, params, state, guidance, setting.sampler, num_tokens
    )
    decoder, decoder_s = compiled(decoder_only, model, params, state)
    head, head_s = compiled(head_only, model, params, hidden, noise, guidance, setting.sampler)

    # One state for all rounds: it is donated and comes back, and starts over in its place.
    held = [state]

    def run_whole():
        held[0] = whole(params, _rewound(held[0], setting.prompt_length), guidance)
        return held[0].index

    def run_decoder():
        held[0] = decoder(params, _rewound(held[0], setting.prompt_length))
        return held[0].index

    functions = {
        "whole": run_whole,
        "decoder": run_decoder,
        "head": lambda: head(params, hidden, noise, guidance),
        "prefill": lambda: prefill(params, prompts, keys).hidden,
    }
    seconds = timing.time_interleaved(functions, repeats)
    compile_s = dict(zip(functions, (whole_s, decoder_s, head_s, prefill_s), strict=True))
    return {"compile_s": compile_s, "times_s": seconds}


def _rewound(state: SamplerState, prompt_length: int) -> SamplerState:
    """The state in front of token 0 again, in the same buffers."""
    cache = state.cache.replace(index=jnp.int32(prompt_length))
    return state.replace(cache=cache, index=jnp.int32(0))


def summarise(times_s: dict[str, list[float]], batch: int, num_tokens: int) -> dict[str, Any]:
    """Medians of `measure`: tokens a second, milliseconds a token by part.

    A "token" of the milliseconds is one token of every image of the batch; tokens per second
    count the tokens of all images.
    """
    ms = {name: 1e3 * statistics.median(times_s[name]) / num_tokens for name in times_s}
    rest = 1e3 * statistics.median(
        (whole - decoder - head) / num_tokens
        for whole, decoder, head in zip(
            times_s["whole"], times_s["decoder"], times_s["head"], strict=True
        )
    )
    return {
        "tokens_per_s": batch * 1e3 / ms["whole"],
        "ms_per_token": {name: ms[name] for name in ("whole", "decoder", "head")} | {"rest": rest},
        "prefill_ms": 1e3 * statistics.median(times_s["prefill"]),
    }
