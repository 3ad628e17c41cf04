"""The model in bfloat16 beside the same model in float32, with weights of order one.

bfloat16 has 8 bits of precision, so a value is off by up to 2^-9 = 0.002 of itself at every
rounding; over two layers and a few tokens this grows to a few hundredths of the scale at most.
"""

import jax
import jax.numpy as jnp
import numpy as np

from nextstep_jax.models.nextstep import NextStep
from nextstep_jax.sampling.generate import SamplerConfig, generate, pad_prompts
from nextstep_jax.training.pretrain import nextstep_losses
from tests import tiny_model

CONFIG = tiny_model.CONFIG
DTYPES = (jnp.float32, jnp.bfloat16)
# Root mean square of the difference over that of the values; measured: 0.7 to 1.3e-2.
BOUND = 3e-2


def relative_error(actual, expected):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return np.sqrt(np.mean(np.square(actual - expected)) / np.mean(np.square(expected)))


def rows_of():
    """Two packed rows: text with image tokens in the middle."""
    rng = np.random.default_rng([9])
    ids = rng.integers(6, tiny_model.VOCAB_SIZE, (2, 16)).astype(np.int32)
    ids[:, 5:11] = CONFIG.image_placeholder_id
    is_image = ids == CONFIG.image_placeholder_id
    latents = rng.standard_normal((2, 16, CONFIG.token_dim)).astype(np.float32)
    return {
        "token_ids": jnp.asarray(ids),
        "latents": jnp.asarray(latents * is_image[..., None]),
        "positions": jnp.tile(jnp.arange(16, dtype=jnp.int32), (2, 1)),
        "segment_ids": jnp.ones((2, 16), jnp.int32),
        "text_weights": jnp.asarray(~is_image, jnp.float32).at[:, 0].set(0.0),
        "image_weights": jnp.asarray(is_image, jnp.float32),
    }


def in_dtype(params, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def test_forward_passes():
    batch, rng = rows_of(), np.random.default_rng([10])
    noisy = jnp.asarray(rng.standard_normal((2, 16, CONFIG.token_dim)), jnp.float32)
    time = jnp.asarray(rng.random((2, 16)), jnp.float32)
    rows = tuple(batch[name] for name in ("token_ids", "latents", "positions", "segment_ids"))
    results = {}

    def forward(model, params):
        variables = {"params": params}
        hidden = model.apply(variables, *rows, method="hidden")
        condition = model.apply(variables, hidden, method="condition")
        velocity = model.apply(variables, noisy, time, condition, method="velocity")
        return hidden, model.apply(variables, hidden, method="text_logits"), velocity

    for dtype in DTYPES:
        model = NextStep(CONFIG, dtype=dtype)
        results[dtype] = jax.jit(forward, static_argnums=0)(model, tiny_model.params())
    hidden, logits, velocity = results[jnp.bfloat16]
    assert (hidden.dtype, logits.dtype, velocity.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    pairs = zip(results[jnp.bfloat16], results[jnp.float32], strict=True)
    errors = [relative_error(*pair) for pair in pairs]
    assert max(errors) < BOUND
    assert min(errors) > 1e-4  # bfloat16 was indeed used.


def test_losses_of_training():
    rng = np.random.default_rng([11])
    times = jnp.asarray(rng.random((1, 2, 8)), jnp.float32)
    noise = jnp.asarray(rng.standard_normal((1, 2, 8, CONFIG.token_dim)), jnp.float32)
    args = (tiny_model.params(), rows_of(), times, noise, 8)
    losses = [
        jax.jit(nextstep_losses, static_argnums=(0, 5))(NextStep(CONFIG, dtype=dtype), *args)
        for dtype in DTYPES
    ]
    errors = [relative_error(low, high) for high, low in zip(*losses, strict=True)]
    assert {loss.dtype for loss in losses[1]} == {jnp.dtype("float32")}
    assert min(errors) > 0 and max(errors) < BOUND


def test_sampled_tokens():
    """Parameters in bfloat16 too, as `from_pretrained` has them."""
    prompts = pad_prompts(tiny_model.prompt_rows(("a", "green")), 1, CONFIG.token_dim)
    keys = jax.random.key(3)[None]
    guidance, config = np.array([2.0, 1.0], np.float32), SamplerConfig("ode", num_steps=2)
    tokens = [
        generate(
            NextStep(CONFIG, dtype=dtype, scan_layers=False),
            in_dtype(tiny_model.unrolled_params(), dtype),
            prompts,
            keys,
            guidance,
            config,
            3,
        )
        for dtype in DTYPES
    ]
    assert tokens[1].dtype == jnp.float32
    error = relative_error(tokens[1], tokens[0])
    assert 1e-4 < error < BOUND
