"""Guidance against numpy, its identities and hand-computed schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextstep_jax.flow.guidance import guidance_scale_at, guide


def velocities(branches, seed=0):
    rng = np.random.default_rng([2, branches, seed])
    return rng.normal(size=(branches, 5, 8)).astype(np.float32)


def guide_np(v, scale, image_scale, renorm):
    """Float64 loop over tokens, written from the formulas."""
    v = v.astype(np.float64)
    out = np.empty(v.shape[1:])
    for token in range(v.shape[1]):
        c, *rest = v[:, token]
        if len(rest) == 0:
            out[token] = c
            continue
        if len(rest) == 1:
            g = (1 - scale) * rest[0] + scale * c
        else:
            u1, u2 = rest
            g = u2 + image_scale * (u1 - u2) + scale * (c - u1)
        if renorm:
            g = g * min(1.0, np.sqrt((c**2).sum()) / (np.sqrt((g**2).sum()) + 1e-6))
        out[token] = g
    return out


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("branches", [1, 2, 3])
def test_against_numpy(branches, renorm):
    v = velocities(branches)
    got = guide(jnp.asarray(v), 7.5, 2.0, renorm=renorm)
    expected = guide_np(v, 7.5, 2.0, renorm)
    assert np.abs(got - expected).max() / np.abs(expected).max() < 1e-6


def test_identities():
    v = velocities(3)
    two, three = jnp.asarray(v[:2]), jnp.asarray(v)
    np.testing.assert_array_equal(guide(two[:1], 7.5), v[0])
    np.testing.assert_allclose(guide(two, 1.0), v[0], atol=1e-6)
    np.testing.assert_allclose(guide(two, 0.0), v[1], atol=1e-6)
    np.testing.assert_allclose(guide(three, 1.0, 1.0), v[0], atol=1e-6)
    np.testing.assert_allclose(guide(three, 0.0, 0.0), v[2], atol=1e-6)
    # Without a difference between the image and the negative branch, three branches are two.
    same = jnp.asarray(v[[0, 1, 1]])
    np.testing.assert_allclose(guide(same, 4.0, 9.0), guide(two, 4.0), atol=1e-5)


def test_renorm_only_shortens():
    # Opposed branches: guidance at 0.6 gives 0.6 - 0.4 = 0.2 of the length, which stays as it is
    # (the upper clamp); at 3 it gives 3 + 2 = 5 times the length, which is brought back.
    c = np.array([[3.0, 4.0]], np.float32)
    v = jnp.asarray(np.stack([c, -c]))
    np.testing.assert_allclose(guide(v, 0.6, renorm=True), 0.2 * c, rtol=1e-6)
    np.testing.assert_allclose(guide(v, 3.0, renorm=False), 5.0 * c, rtol=1e-6)
    np.testing.assert_allclose(guide(v, 3.0, renorm=True), c, rtol=1e-6)


def test_scale_may_differ_by_token_and_be_traced():
    v = velocities(2)
    scales = np.array([1.0, 2.0, 3.0, 4.0, 7.5], np.float32)
    got = jax.jit(guide)(jnp.asarray(v), jnp.asarray(scales))
    expected = np.stack([guide_np(v[:, [i]], s, 1.0, False)[0] for i, s in enumerate(scales)])
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_low_precision_velocities_are_mixed_in_float32():
    v = jnp.asarray(velocities(2)).astype(jnp.bfloat16)
    got = guide(v, 7.5)
    assert got.dtype == jnp.float32
    expected = guide_np(np.asarray(v.astype(jnp.float32)), 7.5, 1.0, False)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_wrong_number_of_branches():
    with pytest.raises(ValueError, match="1, 2 or 3 branches, got 4"):
        guide(jnp.zeros((4, 2, 3)), 2.0)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [5.0, 5.0, 5.0, 5.0]),
        # 1 + 4 (4 - n) / 4
        ("falling", [5.0, 4.0, 3.0, 2.0]),
        # max(2.5, 1 + 4 n / 4)
        ("rising", [2.5, 2.5, 3.0, 4.0]),
    ],
)
def test_schedules_by_hand(schedule, expected):
    at = jax.jit(lambda n: guidance_scale_at(schedule, 5.0, n, 4))
    np.testing.assert_allclose([at(jnp.int32(n)) for n in range(4)], expected, rtol=1e-6)
    np.testing.assert_allclose(guidance_scale_at(schedule, 5.0, jnp.arange(4), 4), expected)
    assert float(guidance_scale_at(schedule, 5.0, 2, 4)) == pytest.approx(expected[2])


@pytest.mark.parametrize(
    ("interval", "inside"),
    [
        ((0.0, 1.0), range(10)),
        ((0.3, 0.7), [3, 4, 5, 6]),
        ((0.25, 0.61), [3, 4, 5, 6]),
        ((0.0, 0.1), [0]),
        ((0.9, 1.0), [9]),
        ((0.5, 0.5), []),
    ],
)
def test_interval_by_hand(interval, inside):
    got = guidance_scale_at("constant", 6.0, jnp.arange(10), 10, interval=interval)
    np.testing.assert_array_equal(got, [6.0 if n in inside else 1.0 for n in range(10)])


def test_interval_edges_do_not_depend_on_rounding():
    assert 0.07 * 100 > 7 and 0.29 * 100 < 29  # in float64
    got = guidance_scale_at("constant", 6.0, jnp.arange(100), 100, interval=(0.07, 0.29))
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(got) == 6.0), np.arange(7, 29))


@pytest.mark.parametrize("interval", [(-0.1, 0.5), (0.6, 0.5), (0.0, 1.1)])
def test_bad_interval(interval):
    with pytest.raises(ValueError, match="interval"):
        guidance_scale_at("constant", 6.0, 0, 10, interval=interval)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="constant, falling, rising"):
        guidance_scale_at("linear", 6.0, 0, 10)
