import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nextstep_jax.training import losses

BATCH, LENGTH, EMBED, VOCAB = 2, 13, 8, 11


@pytest.fixture(scope="module")
def text():
    """Hidden states, an LM head, targets and uneven weights."""
    rng = np.random.default_rng(0)
    weights = rng.uniform(size=(BATCH, LENGTH)) * (rng.uniform(size=(BATCH, LENGTH)) < 0.7)
    return {
        "hidden": jnp.asarray(rng.standard_normal((BATCH, LENGTH, EMBED)), jnp.float32),
        "kernel": jnp.asarray(rng.standard_normal((EMBED, VOCAB)), jnp.float32),
        "targets": jnp.asarray(rng.integers(0, VOCAB, (BATCH, LENGTH)), jnp.int32),
        "weights": jnp.asarray(weights, jnp.float32),
    }


def chunked(hidden, kernel, text, chunk):
    errors = losses.chunked_cross_entropy(
        lambda h: h @ kernel, hidden, text["targets"], text["weights"], chunk
    )
    return jnp.sum(text["weights"] * errors)


def plain(hidden, kernel, text):
    nll = optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, text["targets"])
    return jnp.sum(text["weights"] * nll)


@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 64])
def test_chunked_cross_entropy_is_cross_entropy(text, chunk, relative_error):
    args = (text["hidden"], text["kernel"])
    value, grads = jax.value_and_grad(chunked, (0, 1))(*args, text, chunk)
    _, plain_grads = jax.value_and_grad(plain, (0, 1))(*args, text)
    logits = np.asarray(text["hidden"], np.float64) @ np.asarray(text["kernel"], np.float64)
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    picked = np.take_along_axis(probability, np.asarray(text["targets"])[..., None], -1)[..., 0]
    expected = (np.asarray(text["weights"]) * -np.log(picked)).sum()
    assert float(value) == pytest.approx(expected, rel=2e-7 * LENGTH)
    assert relative_error(grads, plain_grads) < 1e-6


def test_chunked_cross_entropy_never_holds_all_logits(text):
    """Forward and backward: no array has the length of a row and the width of the vocabulary."""

    def shapes(chunk):
        grad = jax.grad(lambda h, k: chunked(h, k, text, chunk), (0, 1))
        return str(jax.make_jaxpr(grad)(text["hidden"], text["kernel"]))

    assert f"[{BATCH},4,{VOCAB}]" in shapes(4)
    assert f",{VOCAB}]" in shapes(4)
    for length in range(LENGTH, 17):  # 16 with the padding
        assert f"{length},{VOCAB}]" not in shapes(4)
    # Four stacked chunks of logits would be kept for the backward pass without jax.checkpoint.
    assert f"[4,{BATCH},4,{VOCAB}]" not in shapes(4)


def test_chunked_cross_entropy_survives_large_logits():
    hidden = jnp.full((1, 3, 1), 1e4)
    kernel = jnp.asarray([[1.0, 0.0]])
    text = {"targets": jnp.zeros((1, 3), jnp.int32), "weights": jnp.ones((1, 3))}
    assert float(chunked(hidden, kernel, text, 2)) == 0.0
    text["targets"] = jnp.ones((1, 3), jnp.int32)
    assert float(chunked(hidden, kernel, text, 2)) == 3e4


def test_chunks_without_weights_are_left_out(text):
    """The weighted 2 and 5 of 13 positions need two chunks of three; the rest is not computed."""
    calls = []

    def logits(h):
        jax.debug.callback(lambda _: calls.append(1), h[0, 0, 0])
        return h @ text["kernel"]

    weights = np.zeros((BATCH, LENGTH), np.float32)
    weights[0, [3, 9]], weights[1, [0, 2, 5, 11, 12]] = 0.5, 2.0
    args = (text["hidden"], text["targets"], jnp.asarray(weights), 3)
    errors = jax.jit(lambda *a: losses.chunked_cross_entropy(logits, *a, 3))(*args[:3])
    jax.effects_barrier()
    assert len(calls) == 2
    nll = optax.softmax_cross_entropy_with_integer_labels(
        text["hidden"] @ text["kernel"], text["targets"]
    )
    np.testing.assert_allclose(errors, np.where(weights > 0, nll, 0), rtol=1e-5)
    nobody = losses.chunked_cross_entropy(logits, *args[:2], jnp.zeros((BATCH, LENGTH)), 3)
    np.testing.assert_array_equal(nobody, np.zeros((BATCH, LENGTH)))


def test_next_position():
    x = jnp.asarray([[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(losses.next_position(x), [[2, 3, 0], [5, 6, 0]])


def test_gather_image_positions_keeps_the_order():
    weights = np.zeros((2, 8), np.float32)
    weights[0, [2, 3, 6]] = [0.5, 1.0, 2.0]
    weights[1, 7] = 3.0
    order, gathered = losses.gather_image_positions(jnp.asarray(weights), 4)
    # Row 0 has three weighted positions; what fills up the fourth place has weight 0.
    np.testing.assert_array_equal(order[0, :3], [2, 3, 6])
    assert int(order[1, 0]) == 7
    np.testing.assert_array_equal(gathered, [[0.5, 1.0, 2.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    whole, _ = losses.gather_image_positions(jnp.asarray(weights), 8)
    np.testing.assert_array_equal(np.sort(whole, axis=1), np.tile(np.arange(8), (2, 1)))
    np.testing.assert_array_equal(whole[:, :4], order)


def test_flow_matching_error_is_the_formula(relative_error):
    rng = np.random.default_rng(1)
    draws, batch, n, token, embed = 3, 2, 5, 4, 6
    tokens, noise = rng.standard_normal((batch, n, token)), rng.standard_normal((3, 2, 5, 4))
    times, conditions = rng.uniform(size=(draws, batch, n)), rng.standard_normal((batch, n, embed))
    matrix, of_time = rng.standard_normal((embed, token)), rng.standard_normal(token)

    def velocity(x, t, c):  # any function of all three will do
        return jnp.tanh(x) + t[..., None] * of_time + c @ matrix

    args = [jnp.asarray(a, jnp.float32) for a in (conditions, tokens, times, noise)]
    error = losses.flow_matching_error(velocity, *args)
    expected = np.zeros((draws, batch, n))
    for d in range(draws):
        for b in range(batch):
            for i in range(n):
                t, x, e = times[d, b, i], tokens[b, i], noise[d, b, i]
                v = np.tanh(t * x + (1 - t) * e) + t * of_time + conditions[b, i] @ matrix
                expected[d, b, i] = ((v - (x - e)) ** 2).mean()
    assert np.abs(error / expected - 1).max() < 2e-6

    def total(one_by_one):
        def of(conditions):
            args[0] = conditions
            return jnp.sum(losses.flow_matching_error(velocity, *args, one_by_one=one_by_one))

        return jax.value_and_grad(of)(jnp.asarray(conditions, jnp.float32))

    (whole, grads), (parts, part_grads) = total(False), total(True)
    assert float(parts) == pytest.approx(float(whole), rel=1e-6)
    assert relative_error(part_grads, grads) < 1e-6


def test_a_perfect_velocity_has_no_error():
    x, noise = jnp.ones((1, 2, 3)), jnp.zeros((2, 1, 2, 3))
    error = losses.flow_matching_error(
        lambda x, t, c: jnp.ones_like(x), jnp.zeros((1, 2, 5)), x, jnp.zeros((2, 1, 2)), noise
    )
    np.testing.assert_array_equal(error, np.zeros((2, 1, 2)))


def test_weighted_mean():
    weights = jnp.asarray([[0.5, 0.0], [1.5, 2.0]])
    assert float(losses.weighted_mean(jnp.float32(6.0), weights)) == 1.5
    nothing = jnp.zeros((2, 2))
    value, grad = jax.value_and_grad(losses.weighted_mean)(jnp.float32(0.0), nothing)
    assert (float(value), float(grad)) == (0.0, 1.0)  # finite, no 0/0
