import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextstep_jax.models import attention
from nextstep_jax.models.attention import (
    KVCache,
    Segments,
    attend,
    attention_mask,
    chosen_kernel,
    extend,
)
from nextstep_jax.models.config import DecoderConfig

# Packed rows with padding at the end, at the start, and nowhere.
SEGMENT_IDS = np.array(
    [[1, 1, 1, 2, 2, 3, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]], np.int32
)

run_attend = jax.jit(attend, static_argnames="implementation")


def normal(*shape, seed=0):
    return np.random.default_rng([4, seed]).standard_normal(shape).astype(np.float32)


def expected_attention(reference, q, k, v, q_ids, kv_ids, offset=0):
    rows = []
    for row in range(len(q)):

        def sees(i, j, row=row):
            return j <= i + offset and q_ids[row][i] == kv_ids[row][j]

        arrays = (a[row].astype(np.float64) for a in (q, k, v))
        rows.append(reference.attention(*arrays, sees))
    return np.stack(rows)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attend_reads_the_kv_head_of_its_group(kv_heads, reference, relative_error):
    q = normal(3, 8, 4, 6)
    k, v = normal(3, 8, kv_heads, 6, seed=1), normal(3, 8, kv_heads, 6, seed=2)
    actual = run_attend(q, k, v, Segments.of_row(jnp.asarray(SEGMENT_IDS)))
    expected = expected_attention(reference, q, k, v, SEGMENT_IDS, SEGMENT_IDS)
    assert np.isfinite(actual).all()  # padding rows too
    assert relative_error(actual, expected) < 1e-6


def test_attend_with_queries_in_the_middle_of_the_keys(reference, relative_error):
    q, k, v = normal(3, 2, 4, 6), normal(3, 8, 2, 6, seed=1), normal(3, 8, 2, 6, seed=2)
    for offset in (0, 3, 6):
        q_ids = SEGMENT_IDS[:, offset : offset + 2]
        segments = Segments(jnp.asarray(q_ids), jnp.asarray(SEGMENT_IDS), jnp.int32(offset))
        expected = expected_attention(reference, q, k, v, q_ids, SEGMENT_IDS, offset)
        assert relative_error(run_attend(q, k, v, segments), expected) < 1e-6


def test_nothing_reads_padding_or_another_segment():
    q, k, v = normal(3, 8, 4, 6), normal(3, 8, 2, 6, seed=1), normal(3, 8, 2, 6, seed=2)
    segments = Segments.of_row(jnp.asarray(SEGMENT_IDS))
    before = np.asarray(run_attend(q, k, v, segments))
    for segment in (0, 1, 2):
        changed = np.equal(SEGMENT_IDS, segment)
        k_new = np.where(changed[..., None, None], 9.0, k).astype(np.float32)
        v_new = np.where(changed[..., None, None], -9.0, v).astype(np.float32)
        after = np.asarray(run_attend(q, k_new, v_new, segments))
        np.testing.assert_array_equal(after[~changed], before[~changed])
        assert np.abs(after[changed] - before[changed]).min() > 0


def test_left_padding_changes_nothing(relative_error):
    q, k, v = normal(1, 5, 4, 6), normal(1, 5, 2, 6, seed=1), normal(1, 5, 2, 6, seed=2)
    alone = run_attend(q, k, v, Segments.of_row(jnp.ones((1, 5), jnp.int32)))
    padded = [np.concatenate([normal(1, 3, *a.shape[2:], seed=7), a], axis=1) for a in (q, k, v)]
    row = jnp.asarray(SEGMENT_IDS[1:2])
    assert relative_error(run_attend(*padded, Segments.of_row(row))[:, 3:], alone) < 1e-6


def test_mask_by_hand():
    mask = attention_mask(Segments.of_row(jnp.array([[1, 1, 2, 0]])))
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(mask[0], np.array(expected, bool))
    # Two queries at places 1 and 2 of a row whose first place is padding.
    segments = Segments(jnp.array([[1, 1]]), jnp.array([[0, 1, 1, 1]]), jnp.int32(1))
    expected = [[0, 1, 0, 0], [0, 1, 1, 0]]
    np.testing.assert_array_equal(attention_mask(segments)[0], np.array(expected, bool))


def test_softmax_is_float32_under_low_precision(relative_error):
    # 256 equal scores: each weight 1/256. Summed in bfloat16, 256 ones would stall before the end.
    q = jnp.zeros((1, 256, 1, 2), jnp.bfloat16)
    v = jnp.ones((1, 256, 1, 2), jnp.bfloat16)
    out = run_attend(q, q, v, Segments.of_row(jnp.ones((1, 256), jnp.int32)))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1.0, atol=2**-8)


def test_unknown_implementation_lists_the_known_ones():
    q = jnp.zeros((1, 2, 2, 4))
    with pytest.raises(ValueError, match=r"'flash9' is unknown; choose from \['xla'"):
        attend(q, q, q, Segments.of_row(jnp.ones((1, 2), jnp.int32)), "flash9")


def test_extend_writes_at_the_index_and_nowhere_else():
    old = (jnp.asarray(normal(2, 6, 1, 4)), jnp.asarray(normal(2, 6, 1, 4, seed=1)))
    k, v = (jnp.asarray(normal(2, 2, 1, 4, seed=seed)) for seed in (2, 3))
    for after, before, new in zip(extend(old, k, v, jnp.int32(3)), old, (k, v), strict=True):
        np.testing.assert_array_equal(after[:, 3:5], new)
        np.testing.assert_array_equal(after[:, [0, 1, 2, 5]], before[:, [0, 1, 2, 5]])


def test_cache_counts_positions_from_the_start_of_each_row():
    config = DecoderConfig(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6)
    cache = KVCache.empty(config, 3, 7, jnp.array([0, 2, 5], jnp.int32), jnp.bfloat16)
    assert len(cache.k) == len(cache.v) == 3
    assert {(a.shape, str(a.dtype)) for a in cache.k + cache.v} == {((3, 7, 2, 6), "bfloat16")}
    assert int(cache.index) == 0
    cache = cache.replace(index=jnp.int32(3))
    expected = [[3, 4, 5], [1, 2, 3], [0, 0, 0]]
    np.testing.assert_array_equal(cache.positions(3), expected)
    segments = cache.segments(3)
    np.testing.assert_array_equal(segments.q, [[1, 1, 1], [1, 1, 1], [0, 0, 1]])
    slots = [[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]]
    np.testing.assert_array_equal(segments.kv, slots)
    assert int(segments.q_offset) == 3


@pytest.mark.parametrize(
    ("case", "kernel"),
    [
        (("tpu", jnp.bfloat16, 4096, 128), "splash"),
        (("tpu", jnp.float32, 128, 128), "splash"),
        (("tpu", jnp.bfloat16, 4096, 64), "chunked"),
        (("tpu", jnp.bfloat16, 96, 128), "xla"),
        (("tpu", jnp.bfloat16, 4224, 128, 2), "chunked"),
        (("tpu", jnp.bfloat16, 4096, 128, 2), "splash"),
        (("tpu", jnp.bfloat16, 4096, 128, 1, False), "chunked"),
        (("gpu", jnp.bfloat16, 96, 128), "cudnn"),
        (("gpu", jnp.bfloat16, 4096, 128, 2), "chunked"),
        (("gpu", jnp.bfloat16, 4096, 128, 1, False), "chunked"),
        (("cuda", jnp.float16, 4096, 64), "cudnn"),
        (("cuda", jnp.float32, 4096, 128), "chunked"),
        (("cpu", jnp.float32, 2048, 128), "chunked"),
        (("cpu", jnp.float32, 2047, 128), "xla"),
    ],
)
def test_the_kernel_that_suits(case, kernel, monkeypatch):
    monkeypatch.setattr(attention, "_is_hopper", lambda: True)
    assert chosen_kernel(*case) == kernel
    if kernel == "cudnn":
        monkeypatch.setattr(attention, "_is_hopper", lambda: False)
        assert chosen_kernel(*case) in ("xla", "chunked")
