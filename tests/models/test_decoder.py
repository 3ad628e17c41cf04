import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from nextstep_jax.models.attention import KVCache, Segments
from nextstep_jax.models.decoder import (
    REMAT_POLICIES,
    Decoder,
    remat_policy,
    stack_layers,
    unstack_layers,
)

# Group sizes 1, 2 and 4, and every choice of biases; tiny_decoder_config is the published choice.
VARIANTS = {
    "group 1, no bias": dict(num_kv_heads=4, head_dim=10, qkv_bias=False),
    "group 2, as published": {},
    "group 4, all biases": dict(num_kv_heads=1, head_dim=8, out_bias=True, mlp_bias=True),
}
# Three documents and padding in one row, a left-padded row, and two documents.
SEGMENT_IDS = np.array(
    [
        [1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2],
    ],
    np.int32,
)


def row_positions(segment_ids):
    """Counts from 0 in each run of one segment; 0 in padding."""
    positions = np.zeros_like(segment_ids)
    for row, ids in enumerate(segment_ids):
        for i in range(1, len(ids)):
            if ids[i] and ids[i] == ids[i - 1]:
                positions[row, i] = positions[row, i - 1] + 1
    return positions


def normal(*shape, seed=0):
    return np.random.default_rng([5, seed]).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def batch(tiny_decoder_config):
    x = normal(*SEGMENT_IDS.shape, tiny_decoder_config.embed_dim)
    return jnp.asarray(x), jnp.asarray(row_positions(SEGMENT_IDS)), jnp.asarray(SEGMENT_IDS)


@pytest.fixture(scope="module")
def tiny(decoders, tiny_decoder_config):
    return decoders(tiny_decoder_config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_is_the_numpy_forward(
    variant, decoders, tiny_decoder_config, batch, reference, relative_error
):
    d = decoders(dataclasses.replace(tiny_decoder_config, **VARIANTS[variant]))
    attn = d.layer_params["layers_0"]["attn"]
    assert ("bias" in attn["q_proj"], "bias" in attn["o_proj"]) == (
        d.config.qkv_bias,
        d.config.out_bias,
    )
    assert ("bias" in d.layer_params["layers_0"]["mlp"]["up_proj"]) == d.config.mlp_bias
    rows = zip(*(np.asarray(a) for a in batch), strict=True)
    expected = np.stack([reference.decoder(d.layer_params, d.config, *row) for row in rows])
    assert relative_error(d.scanned_forward(d.stacked_params, *batch), expected) < 1e-5
    assert relative_error(d.unrolled_forward(d.layer_params, *batch), expected) < 1e-5


def test_stack_and_unstack_are_inverses(tiny, randomise):
    stacked = tiny.stacked_params
    layers = unstack_layers(stacked)
    assert set(layers) == {"layers_0", "layers_1", "final_norm"}
    kernel = ("mlp", "up_proj", "kernel")
    for i in range(2):
        np.testing.assert_array_equal(
            layers[f"layers_{i}"][kernel[0]][kernel[1]][kernel[2]],
            stacked["layers"]["mlp"]["up_proj"]["kernel"][i],
        )
    again = stack_layers(layers)
    assert jax.tree.structure(again) == jax.tree.structure(stacked)
    jax.tree.map(np.testing.assert_array_equal, again, stacked)
    # Layer 10 comes after layer 9, not after layer 1.
    many = {f"layers_{i}": {"scale": jnp.full(2, float(i))} for i in reversed(range(12))}
    np.testing.assert_array_equal(stack_layers(many)["layers"]["scale"][:, 0], np.arange(12.0))


@pytest.fixture(scope="module")
def gradients(tiny, batch):
    """The loss function of a decoder, and its gradients in the layout of unrolled parameters."""
    weights = jnp.asarray(normal(*batch[0].shape, seed=3))

    def loss_of(module):
        def loss(params, x):
            y, _ = module.apply({"params": params}, x, batch[1], Segments.of_row(batch[2]))
            return jnp.sum(y * weights)

        return jax.grad(loss, argnums=(0, 1))

    def run(scan_layers, remat):
        module = Decoder(tiny.config, scan_layers=scan_layers, remat=remat)
        params = tiny.stacked_params if scan_layers else tiny.layer_params
        by_params, by_x = jax.jit(loss_of(module))(params, batch[0])
        return (unstack_layers(by_params) if scan_layers else by_params), by_x

    run.loss_of = loss_of
    run.plain = run(True, "none")
    return run


def test_scanned_and_unrolled_gradients_agree(gradients, relative_error):
    by_params, by_x = gradients(False, "none")
    assert relative_error(by_x, gradients.plain[1]) < 1e-5
    # The gradient of a key's bias is zero (softmax ignores a shift), so errors are taken
    # relative to the largest gradient.
    largest = max(np.abs(g).max() for g in jax.tree.leaves(gradients.plain[0]))
    errors = jax.tree.map(lambda a, b: np.abs(a - b).max(), by_params, gradients.plain[0])
    assert max(jax.tree.leaves(errors)) / largest < 1e-5


def test_gradient_is_the_slope_of_the_numpy_forward(tiny, batch, gradients, reference):
    """Central differences in float64 along one random direction of all parameters and inputs."""
    arrays = [np.asarray(a) for a in batch]
    weights = normal(*arrays[0].shape, seed=3).astype(np.float64)
    start = (tiny.layer_params, arrays[0])
    leaves, treedef = jax.tree.flatten(start)
    leaves = [np.asarray(leaf, np.float64) for leaf in leaves]
    step = [normal(*leaf.shape, seed=100 + i) for i, leaf in enumerate(leaves)]

    def loss(amount):
        moved = [leaf + amount * s for leaf, s in zip(leaves, step, strict=True)]
        params, x = jax.tree.unflatten(treedef, moved)
        rows = zip(x, *arrays[1:], strict=True)
        y = np.stack([reference.decoder(params, tiny.config, *row) for row in rows])
        return (y * weights).sum()

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    grads = [np.asarray(g, np.float64) for g in jax.tree.leaves(gradients.plain)]
    terms = np.array([(g * s).sum() for g, s in zip(grads, step, strict=True)])
    assert abs(terms.sum() - slope) < 1e-5 * np.abs(terms).sum()


@pytest.mark.parametrize("remat", [*REMAT_POLICIES[1:], "save:attention,gate_proj,up_proj"])
def test_remat_gives_the_same_gradients(remat, gradients):
    actual = gradients(True, remat)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(gradients.plain))
    errors = jax.tree.map(lambda a, b: np.abs(a - b).max(), actual, gradients.plain)
    assert max(jax.tree.leaves(errors)) / largest < 1e-5


@pytest.mark.parametrize("scan_layers", [True, False])
def test_remat_recomputes_what_it_says(scan_layers, tiny, batch, gradients):
    params = tiny.stacked_params if scan_layers else tiny.layer_params
    blocks = 1 if scan_layers else tiny.config.num_layers  # in the program
    products = {}
    named = ("save:block_input", "save:attention", "save:q_proj,k_proj,v_proj,gate_proj,up_proj")
    for remat in (*REMAT_POLICIES, *named):
        grad = gradients.loss_of(Decoder(tiny.config, scan_layers=scan_layers, remat=remat))
        text = jax.jit(grad).lower(params, batch[0]).as_text()
        products[remat] = text.count("stablehlo.dot_general") / blocks
    # A block has 7 products with weights and 2 of attention, which have batch dimensions. The
    # last of the 7 is not needed again, nor the last of attention if o_proj's is saved.
    assert products["none"] == 3 * 9
    assert products["dots_with_no_batch_dims_saveable"] == 3 * 9 + 2
    assert products["nothing_saveable"] == 3 * 9 + 8
    # The block's input is kept anyway; without the last product of attention, 7 are left; three
    # and two projections, and the two products of attention behind them.
    assert [products[name] for name in named] == [3 * 9 + 8, 3 * 9 + 7, 3 * 9 + 3]


def test_later_positions_do_not_reach_earlier_ones(tiny, batch):
    x, positions, segment_ids = batch
    before = np.asarray(tiny.scanned_forward(tiny.stacked_params, *batch))
    for place in (0, 3, 6, 11):
        moved = x.at[:, place].add(1.0)
        after = tiny.scanned_forward(tiny.stacked_params, moved, positions, segment_ids)
        differs = np.abs(np.asarray(after) - before).max(-1) > 0
        later = np.arange(x.shape[1]) >= place
        expected = later & np.equal(SEGMENT_IDS, SEGMENT_IDS[:, place : place + 1])
        np.testing.assert_array_equal(differs, expected)


def test_packed_rows_agree_with_separate_rows(tiny, batch, relative_error):
    x = np.asarray(batch[0])
    packed = np.asarray(tiny.scanned_forward(tiny.stacked_params, *batch))
    for row, segment in ((0, 1), (0, 2), (0, 3), (1, 1), (2, 2)):
        at = np.flatnonzero(np.equal(SEGMENT_IDS[row], segment))
        # Alone at the start of a row; the rest and the other rows are padding with other values.
        alone, ids = normal(*x.shape, seed=8), np.zeros_like(SEGMENT_IDS)
        alone[0, : len(at)], ids[0, : len(at)] = x[row, at], 1
        separate = tiny.scanned_forward(
            tiny.stacked_params, *map(jnp.asarray, (alone, row_positions(ids), ids))
        )
        assert relative_error(packed[row, at], separate[0, : len(at)]) < 1e-5


@pytest.fixture(scope="module")
def cached(tiny, reference):
    """Three prompts of unequal length, left-padded to one; their hidden states without a cache."""
    starts, length = (0, 2, 5), SEGMENT_IDS.shape[1]
    x = normal(3, length, tiny.config.embed_dim, seed=5)
    expected = [
        reference.decoder(tiny.layer_params, tiny.config, row[start:])
        for row, start in zip(x, starts, strict=True)
    ]

    @jax.jit
    def run(params, x, cache):
        positions, segments = cache.positions(x.shape[1]), cache.segments(x.shape[1])
        return tiny.unrolled.apply({"params": params}, x, positions, segments, cache)

    # Two slots more than are used.
    cache = KVCache.empty(tiny.config, 3, length + 2, jnp.array(starts, jnp.int32), jnp.float32)
    return run, jnp.asarray(x), cache, starts, expected


@pytest.mark.parametrize("pieces", [(), (4,), (7,), (4, 7)])
def test_cached_decoding_agrees_with_the_full_forward(pieces, tiny, cached, relative_error):
    """Prefill (its own program for each length), then position by position."""
    run, x, cache, starts, expected = cached
    length, done, outputs = x.shape[1], 0, []
    for piece in [*pieces, *[1] * (length - sum(pieces))]:
        y, cache = run(tiny.layer_params, x[:, done : done + piece], cache)
        done += piece
        assert int(cache.index) == done
        outputs.append(np.asarray(y))
    outputs = np.concatenate(outputs, axis=1)
    assert np.isfinite(outputs).all()
    for row, (start, states) in enumerate(zip(starts, expected, strict=True)):
        assert relative_error(outputs[row, start:], states) < 1e-5


def test_left_padded_forward_agrees_with_rows_alone(tiny, cached, relative_error):
    _, x, _, starts, expected = cached
    ids = (np.arange(x.shape[1])[None] >= np.array(starts)[:, None]).astype(np.int32)
    positions = jnp.asarray(row_positions(ids))
    full = tiny.unrolled_forward(tiny.layer_params, x, positions, jnp.asarray(ids))
    for row, (start, states) in enumerate(zip(starts, expected, strict=True)):
        assert relative_error(full[row, start:], states) < 1e-5


def test_a_cache_needs_unrolled_layers(tiny, cached):
    _, x, cache, _, _ = cached
    with pytest.raises(ValueError, match="scan_layers=False"):
        tiny.scanned.apply(
            {"params": tiny.stacked_params}, x, cache.positions(12), cache.segments(12), cache
        )


def test_unknown_remat_policy_lists_the_known_ones(tiny, batch):
    with pytest.raises(ValueError, match="remat='' is unknown"):
        remat_policy("")
    module = Decoder(tiny.config, remat="some")
    with pytest.raises(ValueError, match=r"remat='some' is unknown.*'nothing_saveable'.*sites"):
        module.apply({"params": tiny.stacked_params}, *batch[:2], Segments.of_row(batch[2]))


def test_initial_values_and_logical_axes(tiny_decoder_config):
    config = dataclasses.replace(
        tiny_decoder_config, embed_dim=40, mlp_dim=60, out_bias=True, mlp_bias=True
    )
    x, ids = jnp.ones((1, 2, 40)), jnp.ones((1, 2), jnp.int32)
    init = jax.jit(lambda key: Decoder(config).init(key, x, ids, Segments.of_row(ids)))
    params = init(jax.random.key(0, impl="rbg"))["params"]  # compiles faster than the default
    specs = nn.get_partition_spec(params)["layers"]
    kernels = {
        name: specs[part][name]["kernel"]
        for part, names in (("attn", "qkvo"), ("mlp", ("gate", "up", "down")))
        for name in (f"{n}_proj" for n in names)
    }
    assert kernels == {
        "q_proj": PartitionSpec("layers", "embed", "heads"),
        "k_proj": PartitionSpec("layers", "embed", "kv_heads"),
        "v_proj": PartitionSpec("layers", "embed", "kv_heads"),
        "o_proj": PartitionSpec("layers", "heads", "embed"),
        "gate_proj": PartitionSpec("layers", "embed", "mlp"),
        "up_proj": PartitionSpec("layers", "embed", "mlp"),
        "down_proj": PartitionSpec("layers", "mlp", "embed"),
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(nn.unbox(params)):
        name = path[-1].key
        if name == "kernel":
            # Five standard errors of the deviation of N(0, 0.02), and of its mean.
            assert abs(np.std(leaf) / 0.02 - 1) < 5 / np.sqrt(2 * leaf.size)
            assert abs(np.mean(leaf)) < 5 * 0.02 / np.sqrt(leaf.size)
            layers = np.asarray(leaf)
            assert np.abs(layers[0] - layers[1]).max() > 0.01  # layers differ
        else:
            np.testing.assert_array_equal(leaf, np.full(leaf.shape, name == "scale"))
