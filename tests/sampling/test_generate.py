import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextstep_jax.data.layout import prompt_prefix
from nextstep_jax.models.nextstep import NextStep
from nextstep_jax.sampling.generate import (
    SamplerConfig,
    draw_noise,
    generate,
    pad_prompts,
    prefill_jit,
    sample_chunk,
)
from tests import tiny_model

BATCH, NUM_TOKENS, NUM_STEPS = 2, 6, 3
# Rows of three branches for two images; the first n branches of each serve for fewer.
ROWS = tiny_model.prompt_rows(
    ["a red circle", "a", "", "two blue squares left of a star", "green", "a large red triangle"]
)
GUIDANCE = np.array([2.5, 1.7], np.float32)
KEYS = jax.vmap(jax.random.key)(np.arange(10, 10 + BATCH, dtype=np.uint32))
MODEL = NextStep(tiny_model.CONFIG, scan_layers=False)
# Where the settings do not matter: compiled once for several tests.
CONFIG = SamplerConfig("ode", NUM_STEPS, schedule="rising", renorm=True)


def prompts_of(branches, length=32):
    rows = [ROWS[3 * i + j] for i in range(BATCH) for j in range(branches)]
    return pad_prompts(rows, tiny_model.CONFIG.pad_id, tiny_model.CONFIG.token_dim, length)


def tokens_of(config, prompts, keys=KEYS, model=MODEL, guidance=GUIDANCE, num_tokens=NUM_TOKENS):
    params = tiny_model.unrolled_params()
    return np.asarray(generate(model, params, prompts, keys, guidance, config, num_tokens))


@functools.cache
def naive_functions(model):
    """The uncached forward of whole right-padded rows, and the head in its plain form."""
    scanned = model.clone(scan_layers=True)
    variables = {"params": tiny_model.params()}

    def hidden(ids, latents, lengths):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        segments = (positions < lengths[:, None]).astype(jnp.int32)
        out = scanned.apply(variables, ids, latents, positions, segments, method="hidden")
        return jnp.take_along_axis(out, (lengths - 1)[:, None, None], axis=1)[:, 0]

    def velocity(x, time, hidden, position):
        condition = scanned.apply(variables, hidden, position, method="condition")
        times = jnp.full(x.shape[:1], time)
        return scanned.apply(variables, x, times, condition, method="velocity")

    return jax.jit(hidden), jax.jit(velocity)


def naive_scale(schedule, scale, n, num_tokens):
    if schedule == "falling":
        return 1 + (scale - 1) * (num_tokens - n) / num_tokens
    if schedule == "rising":
        return max(scale / 2, 1 + (scale - 1) * n / num_tokens)
    return scale


def naive_guide(velocity, scale, image_scale, renorm):
    """(branches, dim) float64 to (dim,)."""
    if len(velocity) == 1:
        return velocity[0]
    if len(velocity) == 2:
        guided = velocity[1] + scale * (velocity[0] - velocity[1])
    else:
        full, image, negative = velocity
        guided = negative + image_scale * (image - negative) + scale * (full - image)
    if renorm:
        guided = guided * min(1.0, np.linalg.norm(velocity[0]) / np.linalg.norm(guided))
    return guided


def naive_tokens(config, branches, noise, guidance=GUIDANCE, model=MODEL, positions=None):
    """A python loop over images' tokens and steps; noise (tokens, noises, batch, dim)."""
    hidden_fn, velocity_fn = naive_functions(model)
    dim, placeholder = tiny_model.CONFIG.token_dim, tiny_model.CONFIG.image_placeholder_id
    length = max(len(row) for row in ROWS) + NUM_TOKENS
    tokens = np.zeros((BATCH, NUM_TOKENS, dim))
    stochastic = config.solver != "ode"
    for n in range(NUM_TOKENS):
        ids = np.zeros((len(ROWS), length), np.int32)
        latents = np.zeros((len(ROWS), length, dim), np.float32)
        lengths = np.array([len(row) + n for row in ROWS], np.int32)
        for r, row in enumerate(ROWS):
            ids[r, : lengths[r]] = row + [placeholder] * n
            latents[r, len(row) : lengths[r]] = tokens[r // 3, :n]
        hidden = hidden_fn(ids, latents, lengths)
        scale, image_scale = (naive_scale(config.schedule, s, n, NUM_TOKENS) for s in guidance)
        position = None if positions is None else jnp.asarray(positions[n], jnp.float32)
        x = noise[n, 0].astype(np.float64)
        for i in range(config.num_steps):
            t, dt = i / config.num_steps, 1 / config.num_steps
            repeated = np.repeat(x, 3, axis=0).astype(np.float32)
            v = np.asarray(velocity_fn(repeated, np.float32(t), hidden, position), np.float64)
            v = v.reshape(BATCH, 3, dim)[:, :branches]
            v = np.stack([naive_guide(one, scale, image_scale, config.renorm) for one in v])
            if stochastic:  # dx = (v + (1 - t) score) dt + sqrt(2 (1 - t)) dW
                score = (t * v - x) / (1 - t)
                x = x + dt * (v + (1 - t) * score) + np.sqrt(2 * (1 - t) * dt) * noise[n, i + 1]
            else:
                x = x + dt * v
        if config.token_norm:
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        tokens[:, n] = x
    return tokens


def recorded_noise(config, keys=KEYS):
    draw = jax.jit(draw_noise, static_argnums=(2, 3))
    dim = tiny_model.CONFIG.token_dim
    return np.stack([draw(keys, jnp.int32(n), config.num_noises, dim) for n in range(NUM_TOKENS)])


@pytest.mark.parametrize(
    ("branches", "config"),
    [
        (1, SamplerConfig("ode", num_steps=NUM_STEPS)),
        (2, SamplerConfig("euler_maruyama_full", NUM_STEPS, schedule="falling", token_norm=True)),
        (2, CONFIG),
        (3, SamplerConfig("euler_maruyama_full", NUM_STEPS, renorm=True)),
        (3, SamplerConfig("ode", NUM_STEPS, schedule="falling")),
        (3, CONFIG),
    ],
    ids=["1", "2-falling-norm", "2-rising-renorm", "3-renorm", "3-falling", "3-rising-renorm"],
)
def test_generate_is_a_plain_loop(branches, config):
    prompts = prompts_of(branches)
    expected = naive_tokens(config, branches, recorded_noise(config))
    tokens = tokens_of(config, prompts)
    assert tokens.shape == (BATCH, NUM_TOKENS, tiny_model.CONFIG.token_dim)
    error = np.abs(tokens - expected).max() / np.abs(expected).max()
    assert error < 2e-5


def test_prefill_with_input_images_is_the_plain_forward():
    """Input images of unequal grids in the rows of one batch; left-padded against right-padded."""
    tokenizer, placeholder = tiny_model.tokenizer(), tiny_model.CONFIG.image_placeholder_id
    grids = [[(1, 4), (2, 2)], [(4, 1)], [(2, 3)], []]
    texts = ["a red <image> like <image>", "<image>green", "two blue squares <image>", "a"]
    rows = [
        prompt_prefix(text, tiny_model.GRID, tokenizer, row_grids)
        for text, row_grids in zip(texts, grids, strict=True)
    ]
    counts = [row.count(placeholder) for row in rows]
    assert counts == [8, 4, 6, 0]
    rng, dim = np.random.default_rng([9]), tiny_model.CONFIG.token_dim
    inputs = [rng.standard_normal((n, dim)).astype(np.float32) if n else None for n in counts]
    keys = jax.vmap(jax.random.key)(np.arange(4, dtype=np.uint32))
    prompts = pad_prompts(rows, tiny_model.CONFIG.pad_id, dim, 64, inputs, placeholder)
    params = tiny_model.unrolled_params()
    hidden = np.asarray(prefill_jit(MODEL, params, prompts, keys, 2).hidden)

    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.zeros((4, lengths.max()), np.int32)
    latents = np.zeros((*ids.shape, dim), np.float32)
    for i, row in enumerate(rows):
        ids[i, : lengths[i]] = row
        if inputs[i] is not None:
            latents[i, : lengths[i]][np.array(row) == placeholder] = inputs[i]
    plain, _ = naive_functions(MODEL)
    expected = np.asarray(plain(ids, latents, lengths))
    assert np.abs(hidden - expected).max() / np.abs(expected).max() < 1e-5
    # What the comparison could not see if the images were not read: each row has its own.
    inputs[0] = inputs[0][::-1]
    swapped = pad_prompts(rows, tiny_model.CONFIG.pad_id, dim, 64, inputs, placeholder)
    other = np.asarray(prefill_jit(MODEL, params, swapped, keys, 2).hidden)
    assert np.abs(other[0] - hidden[0]).max() > 1e-2
    np.testing.assert_array_equal(other[1:], hidden[1:])


def test_generate_is_prefill_and_chunks():
    prompts = prompts_of(2)
    tokens = tokens_of(CONFIG, prompts)
    params = tiny_model.unrolled_params()
    state = prefill_jit(MODEL, params, prompts, KEYS, NUM_TOKENS)
    for _ in range(3):
        state = sample_chunk(MODEL, params, state, GUIDANCE, CONFIG, NUM_TOKENS // 3)
    assert int(state.index) == NUM_TOKENS
    assert int(state.cache.index) == prompts.token_ids.shape[1] + NUM_TOKENS
    # Another program may fuse differently, but the cut does not enter the formulas.
    assert np.abs(state.tokens - tokens).max() / np.abs(tokens).max() < 1e-5


def test_every_condition_moves_the_result():
    """What the comparison above could not see if the weights hid it."""
    base = tokens_of(CONFIG, prompts_of(2))
    assert np.abs(base[0] - base[1]).max() > 0.1
    prompts = prompts_of(2)
    other = np.array(prompts.token_ids)
    other[0, -8] += 1  # a letter of the first image's caption
    moved = tokens_of(CONFIG, prompts.replace(token_ids=other))
    assert np.abs(moved[0] - base[0]).max() > 1e-2
    np.testing.assert_allclose(moved[1], base[1], atol=1e-6)
    scale = tokens_of(CONFIG, prompts_of(2), guidance=np.array([1.5, 1.7], np.float32))
    assert np.abs(scale - base).max() > 1e-2


def test_padding_does_not_matter():
    short, long = (tokens_of(CONFIG, prompts_of(2, length)) for length in (32, 40))
    np.testing.assert_allclose(short, long, atol=2e-5 * np.abs(short).max())


def test_gen_position_is_added_to_the_hidden_states():
    config = SamplerConfig("ode", num_steps=NUM_STEPS)
    with_table = dataclasses.replace(tiny_model.CONFIG, use_gen_pos_embed=True)
    model = NextStep(with_table, scan_layers=False)
    tokens = tokens_of(config, prompts_of(1), model=model)
    # Token i of a grid of side 4 is at row i // 4 and column i % 4; the column comes first.
    frequency = 10_000.0 ** (-np.arange(8) / 8)
    angles = [[i % 4 * frequency, i // 4 * frequency] for i in range(NUM_TOKENS)]
    table = [np.concatenate([f(a) for a in pair for f in (np.sin, np.cos)]) for pair in angles]
    expected = naive_tokens(config, 1, recorded_noise(config), positions=table)
    assert np.abs(tokens - expected).max() / np.abs(expected).max() < 2e-5
    plain = naive_tokens(config, 1, recorded_noise(config))
    assert np.abs(plain - expected).max() > 1e-2

    with pytest.raises(ValueError, match="17 tokens is too large: base_image_grid_size=4"):
        prefill_jit(model, tiny_model.unrolled_params(), prompts_of(1), KEYS, 17)


def test_noise_is_a_function_of_key_and_index():
    draw = jax.jit(draw_noise, static_argnums=(2, 3))
    keys = jax.vmap(jax.random.key)(np.arange(5, dtype=np.uint32))
    together = np.asarray(draw(keys, jnp.int32(3), 4, 16))
    for i in range(5):
        alone = np.asarray(draw(keys[i : i + 1], jnp.int32(3), 4, 16))
        np.testing.assert_array_equal(alone[:, 0], together[:, i])
        by_hand = jax.random.normal(jax.random.fold_in(jax.random.key(i), 3), (4, 16))
        np.testing.assert_array_equal(by_hand, together[:, i])
    other = np.asarray(draw(keys, jnp.int32(4), 4, 16))
    assert np.unique(np.concatenate([together, other])).size == 2 * 5 * 4 * 16


def test_state_is_donated():
    params = tiny_model.unrolled_params()
    state = prefill_jit(MODEL, params, prompts_of(2), KEYS, NUM_TOKENS)
    compiled = sample_chunk.lower(MODEL, params, state, GUIDANCE, CONFIG, 2).compile()
    cache_bytes = sum(leaf.nbytes for leaf in (*state.cache.k, *state.cache.v))
    assert compiled.memory_analysis().alias_size_in_bytes >= cache_bytes + state.tokens.nbytes
    pointers = [leaf.unsafe_buffer_pointer() for leaf in state.cache.k]
    after = sample_chunk(MODEL, params, state, GUIDANCE, CONFIG, 2)
    assert all(leaf.is_deleted() for leaf in (*state.cache.k, *state.cache.v, state.tokens))
    assert [leaf.unsafe_buffer_pointer() for leaf in after.cache.k] == pointers


def vocab_shapes(text):
    """Shapes in a StableHLO text that have an axis as long as the vocabulary."""
    shapes = set(re.findall(r"tensor<([\dx]+)x[a-z]\w*>", text))
    return {s for s in shapes if str(tiny_model.VOCAB_SIZE) in s.split("x")}


def test_no_logits():
    params = tiny_model.unrolled_params()
    args = (MODEL, params, prompts_of(2), KEYS, GUIDANCE, CONFIG, NUM_TOKENS)
    table = f"{tiny_model.VOCAB_SIZE}x{tiny_model.CONFIG.decoder.embed_dim}"
    # The embedding is read; neither the LM head nor anything (rows, vocab) is there.
    assert vocab_shapes(generate.lower(*args).as_text()) == {table}

    def logits(params, hidden):
        return MODEL.apply({"params": params}, hidden, method="text_logits")

    text = jax.jit(logits).lower(params, jnp.zeros((4, 32))).as_text()
    assert vocab_shapes(text) == {"4x331", "32x331"}


def test_pad_prompts():
    ids = [[7, 8], [9, 5, 5, 6]]
    tokens = np.arange(8, dtype=np.float32).reshape(2, 4)
    prompts = pad_prompts(ids, 1, 4, 5, [None, tokens], placeholder_id=5)
    np.testing.assert_array_equal(prompts.token_ids, [[1, 1, 1, 7, 8], [1, 9, 5, 5, 6]])
    np.testing.assert_array_equal(prompts.starts, [3, 1])
    expected = np.zeros((2, 5, 4), np.float32)
    expected[1, 2:4] = tokens
    np.testing.assert_array_equal(prompts.latents, expected)
    assert pad_prompts(ids, 1, 4).token_ids.shape == (2, 4)
    with pytest.raises(ValueError, match="a prompt of 4 tokens is longer than the limit of 3"):
        pad_prompts(ids, 1, 4, 3)
    with pytest.raises(ValueError, match="prompt 1 has 2 image placeholders for 1 image tokens"):
        pad_prompts(ids, 1, 4, None, [None, tokens[:1]], placeholder_id=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": "rk4"}, "unknown solver 'rk4'; known solvers: euler_maruyama,"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"shift": -1.0}, "shift must be a positive number"),
        ({"schedule": "linear"}, "unknown schedule 'linear'; known schedules: constant"),
        ({"interval": (0.6, 0.2)}, "interval must be shares"),
        ({"solver": "flow_cps", "noise_level": 1.5}, r"noise_level of flow_cps must be in \[0, 1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**changes)


@pytest.mark.parametrize(
    ("solver", "num_noises"), [("ode", 1), ("euler_maruyama", 6), ("euler_maruyama_full", 7)]
)
def test_num_noises(solver, num_noises):
    assert SamplerConfig(solver, num_steps=6).num_noises == num_noises
