import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from nextstep_jax.models.attention import KVCache
from nextstep_jax.models.config import FlowHeadConfig, NextStepConfig, nextstep_config
from nextstep_jax.models.nextstep import NextStep, gen_position_table, init_params, unrolled

PLACEHOLDER = 5
# One row with text, an image of four tokens and text; one of two documents and padding.
TOKEN_IDS = np.array(
    [[0, 7, 9, 2, 3, 5, 5, 5, 5, 4, 8, 0], [0, 11, 3, 5, 5, 4, 0, 12, 13, 22, 1, 1]], np.int32
)
SEGMENT_IDS = np.array([[1] * 12, [1] * 6 + [2] * 4 + [0] * 2], np.int32)
POSITIONS = np.array([[*range(12)], [*range(6), *range(4), 0, 0]], np.int32)


def normal(*shape, seed=0):
    values = np.random.default_rng([7, seed]).standard_normal(shape)
    return jnp.asarray(values, jnp.float32)


@pytest.fixture(scope="module")
def models(tiny_decoder_config, randomise):
    """Makes and keeps models: (tie_embeddings) -> model and random parameters."""

    @functools.cache
    def make(tie_embeddings):
        config = NextStepConfig(
            decoder=dataclasses.replace(tiny_decoder_config, tie_embeddings=tie_embeddings),
            flow_head=FlowHeadConfig(width=12, num_layers=2, frequency_dim=6),
            latent_channels=3,
            patch_size=2,
            bos_id=0,
            eos_id=0,
            pad_id=1,
            image_area_id=2,
            boi_id=3,
            eoi_id=4,
            image_placeholder_id=PLACEHOLDER,
        )
        model = NextStep(config)
        shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
        params = randomise(shapes, seed=9)
        return types.SimpleNamespace(config=config, model=model, params=params)

    return make


@pytest.fixture(scope="module")
def batch():
    arrays = (TOKEN_IDS, normal(2, 12, 12), POSITIONS, SEGMENT_IDS)
    return tuple(map(jnp.asarray, arrays))


def call(m, method, *arguments, params=None):
    """Runs a method of the model, compiled as a whole."""
    variables = {"params": m.params if params is None else params}
    return jax.jit(functools.partial(m.model.apply, method=method))(variables, *arguments)


def numpy_embed(params, token_ids, latents):
    text = np.asarray(params["embed_tokens"], np.float64)[token_ids]
    projector = {k: np.asarray(v, np.float64) for k, v in params["image_in_proj"].items()}
    image = np.asarray(latents, np.float64) @ projector["kernel"] + projector["bias"]
    return np.where(np.equal(token_ids, PLACEHOLDER)[..., None], image, text)


def numpy_hidden(m, reference, batch):
    token_ids, latents, positions, segment_ids = (np.asarray(a) for a in batch)
    layers = unrolled(m.params)["decoder"]
    rows = zip(numpy_embed(m.params, token_ids, latents), positions, segment_ids, strict=True)
    return np.stack([reference.decoder(layers, m.config.decoder, *row) for row in rows])


def test_embed_puts_projected_tokens_exactly_at_the_placeholders(models, batch):
    m = models(False)
    token_ids, latents = batch[:2]
    embedded = np.asarray(call(m, "embed", token_ids, latents))
    is_image = TOKEN_IDS == PLACEHOLDER
    projected = np.asarray(call(m, "embed_image_tokens", latents))
    np.testing.assert_array_equal(embedded[is_image], projected[is_image])
    table = np.asarray(m.params["embed_tokens"])
    np.testing.assert_array_equal(embedded[~is_image], table[TOKEN_IDS[~is_image]])
    expected = numpy_embed(m.params, TOKEN_IDS, latents)
    np.testing.assert_allclose(embedded, expected, atol=1e-5)


def test_latents_at_text_positions_are_not_read(models, batch):
    m = models(False)
    token_ids, latents = batch[:2]
    is_image = np.equal(TOKEN_IDS, PLACEHOLDER)[..., None]
    other = jnp.where(is_image, latents, 1e6)
    before, after = (call(m, "embed", token_ids, a) for a in (latents, other))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_logits_are_the_numpy_logits(tie_embeddings, models, batch, reference, relative_error):
    m = models(tie_embeddings)
    assert ("lm_head" in m.params) != tie_embeddings
    if tie_embeddings:
        weights = np.asarray(m.params["embed_tokens"], np.float64).T
    else:
        assert set(m.params["lm_head"]) == {"kernel"}  # no bias
        weights = np.asarray(m.params["lm_head"]["kernel"], np.float64)
    hidden = numpy_hidden(m, reference, batch)

    def logits_of(model, *batch):
        hidden = model.hidden(*batch)
        return hidden, model.text_logits(hidden)

    actual = jax.jit(lambda p, *b: nn.apply(logits_of, m.model)({"params": p}, *b))
    actual_hidden, logits = actual(m.params, *batch)
    assert relative_error(actual_hidden, hidden) < 1e-5
    assert relative_error(logits, hidden @ weights) < 1e-5


def test_velocity_is_the_numpy_velocity(models, reference, relative_error):
    m = models(False)
    x, time = normal(3, 12, seed=1), jnp.array([0.0, 0.4, 1.0])
    hidden, place = normal(3, 20, seed=2), normal(3, 20, seed=3)
    projector = {k: np.asarray(v, np.float64) for k, v in m.params["image_out_proj"].items()}

    def velocity_of(model, x, time, hidden, place):
        return model.velocity(x, time, model.condition(hidden, place))

    for added in (None, place):
        told = np.asarray(hidden, np.float64) + (0 if added is None else np.asarray(added))
        condition = told @ projector["kernel"] + projector["bias"]
        expected = reference.flow_head(
            m.params["flow_head"], m.config.flow_head, x, time, condition
        )
        actual = call(m, velocity_of, x, time, hidden, added)
        assert relative_error(actual, expected) < 1e-5


def test_modulations_of_all_steps_give_the_plain_velocity(models, relative_error):
    m = models(False)
    x, condition = normal(3, 12, seed=1), normal(3, 20, seed=2)
    times = jnp.array([0.0, 0.1, 0.5, 0.9, 1.0])

    def both(model, times, x, condition):
        modulations = model.flow_modulations(model.embed_times(times), condition)
        steps, plain = [], []
        for i in range(times.shape[0]):
            step = jax.tree.map(lambda leaf, i=i: leaf[i], modulations)
            steps.append(model.modulated_velocity(x, step))
            plain.append(model.velocity(x, jnp.full(x.shape[0], times[i]), condition))
        return modulations.final, jnp.stack(steps), jnp.stack(plain)

    final, steps, plain = call(m, both, times, x, condition)
    assert final.shape == (5, 3, 2 * 12)
    assert relative_error(steps, plain) < 1e-5


def test_call_is_made_of_the_named_methods(models, batch, relative_error):
    m = models(False)

    def parts(model, *batch):
        hidden = model.hidden(*batch)
        time = jnp.zeros(batch[0].shape, jnp.float32)
        return model.text_logits(hidden), model.velocity(batch[1], time, model.condition(hidden))

    assert relative_error(call(m, "__call__", *batch), call(m, parts, *batch)) < 1e-6


def test_decode_with_a_cache_agrees_with_hidden(models, batch, reference, relative_error):
    m = models(False)
    decoder = NextStep(m.config, scan_layers=False)
    variables = {"params": unrolled(m.params)}
    embed = jax.jit(functools.partial(decoder.apply, method="embed"))
    decode = jax.jit(functools.partial(decoder.apply, method="decode"))
    # The second row's first document, left-padded to the length of the first row.
    token_ids = np.stack([TOKEN_IDS[0], np.concatenate([[1] * 6, TOKEN_IDS[1, :6]])])
    latents = np.array(batch[1])
    latents[1, 6:] = latents[1, :6].copy()
    embeddings = embed(variables, jnp.asarray(token_ids), jnp.asarray(latents))
    starts = jnp.array([0, 6], jnp.int32)
    cache = KVCache.empty(m.config.decoder, 2, 12, starts, jnp.float32)
    outputs = []
    for piece in jnp.split(embeddings, [8, 9, 10, 11], axis=1):
        hidden, cache = decode(variables, piece, cache)
        outputs.append(hidden)
    outputs = np.concatenate(outputs, axis=1)
    expected = numpy_hidden(m, reference, batch)
    assert relative_error(outputs[0], expected[0]) < 1e-5
    assert relative_error(outputs[1, 6:], expected[1, :6]) < 1e-5


def _sizes(model):
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    return shapes, jax.tree.map(lambda leaf: math.prod(leaf.shape), nn.unbox(shapes))


def total(tree):
    return sum(jax.tree.leaves(tree))


def test_parameter_counts_of_the_14b_model():
    _, sizes = _sizes(NextStep(nextstep_config("14b")))
    assert total(sizes) == 14_953_814_080
    assert total(sizes["decoder"]) == 13_212_898_304
    assert total(sizes["decoder"]["layers"]) == 48 * 275_268_608
    assert sizes["embed_tokens"] == total(sizes["lm_head"]) == 778_567_680
    assert total(sizes["image_in_proj"]) == 332_800
    assert total(sizes["image_out_proj"]) == 26_219_520


@pytest.mark.parametrize(
    ("head", "expected"), [("s", 40_288_320), ("b", 157_228_096), ("l", 527_528_000)]
)
def test_parameter_counts_of_the_flow_heads(head, expected):
    _, sizes = _sizes(NextStep(nextstep_config("14b", head)))
    assert total(sizes["flow_head"]) == expected


def test_scanned_and_unrolled_models_have_the_same_parameters():
    config = nextstep_config("tiny")
    scanned, sizes = _sizes(NextStep(config))
    expected, _ = _sizes(NextStep(config, scan_layers=False))
    actual = jax.eval_shape(lambda p: unrolled(nn.unbox(p)), scanned)
    assert set(actual["decoder"]) == {*(f"layers_{i}" for i in range(4)), "final_norm"}
    same = jax.tree.map(lambda a, b: a.shape == b.shape, actual, nn.unbox(expected))
    assert all(jax.tree.leaves(same))
    assert total(sizes) == total(jax.tree.map(lambda leaf: leaf.size, nn.unbox(expected)))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_parameter_names_its_logical_axes(scan_layers):
    shapes, _ = _sizes(NextStep(nextstep_config("14b"), scan_layers=scan_layers))
    known = {"embed", "heads", "kv_heads", "mlp", "vocab", "norm", "token", "flow", "flow_mlp"}
    boxes = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert len(boxes) > 100
    for box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned)
        assert len(box.names) == box.value.ndim
        assert len(set(box.names)) == len(box.names)  # a mesh axis may appear once in a spec
        assert set(box.names) - {"layers"} <= known
        assert box.value.dtype == jnp.float32
    specs = nn.get_partition_spec(shapes)
    assert specs["embed_tokens"] == PartitionSpec("vocab", "embed")
    assert specs["lm_head"]["kernel"] == PartitionSpec("embed", "vocab")
    if scan_layers:
        for leaf in jax.tree.leaves(
            specs["decoder"]["layers"], is_leaf=lambda x: isinstance(x, PartitionSpec)
        ):
            assert leaf[0] == "layers"


def test_position_table_against_loops():
    config = dataclasses.replace(nextstep_config("tiny"), base_image_grid_size=5)
    embed = config.decoder.embed_dim  # 192
    quarter = embed // 4
    expected = np.zeros((25, embed))
    for row in range(5):
        for column in range(5):
            for i in range(quarter):
                frequency = 1 / 10_000 ** (i / quarter)
                entry = expected[row * 5 + column]
                entry[i] = math.sin(column * frequency)
                entry[quarter + i] = math.cos(column * frequency)
                entry[2 * quarter + i] = math.sin(row * frequency)
                entry[3 * quarter + i] = math.cos(row * frequency)
    actual = gen_position_table(config)
    assert actual.dtype == np.float32
    assert actual.shape == (25, embed)
    np.testing.assert_allclose(actual, expected, atol=1e-7)


def test_position_table_of_the_released_grid():
    table = gen_position_table(nextstep_config("14b"))
    assert table.shape == (1024, 5120)
    # Row 33 is the second of the second grid row: one column and one row from the corner.
    np.testing.assert_array_equal(table[33, :2560], table[33, 2560:])
    np.testing.assert_array_equal(table[32, :2560], table[0, :2560])


def test_initial_values(models):
    m = models(False)
    config = dataclasses.replace(
        m.config, decoder=dataclasses.replace(m.config.decoder, vocab_size=300, embed_dim=60)
    )

    @jax.jit
    def init(key):
        params = nn.unbox(init_params(NextStep(config), key))
        return {name: params[name] for name in ("embed_tokens", "lm_head", *projectors)}

    projectors = ("image_in_proj", "image_out_proj")
    params = init(jax.random.key(1, impl="rbg"))  # compiles faster than the default
    kernels = [params[name]["kernel"] for name in ("lm_head", *projectors)]
    for leaf in (params["embed_tokens"], *kernels):
        assert abs(np.std(leaf) / 0.02 - 1) < 5 / np.sqrt(2 * leaf.size)
    for name in projectors:
        np.testing.assert_array_equal(params[name]["bias"], 0.0)


def test_an_id_outside_the_vocabulary_is_an_error(models):
    with pytest.raises(ValueError, match=r"image_placeholder_id=23 must lie in \[0, vocab_size=23"):
        dataclasses.replace(models(False).config, image_placeholder_id=23)
