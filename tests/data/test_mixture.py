import itertools
import json

import numpy as np
import pytest

from nextstep_jax.data.mixture import STAGE_RATIOS, Mixture


def draw(mixture, n):
    return [mixture.draw() for _ in range(n)]


@pytest.mark.parametrize("stage", sorted(STAGE_RATIOS))
def test_shares_are_met_at_any_time(stage):
    ratios = STAGE_RATIOS[stage]
    assert abs(sum(ratios.values()) - 1) < 1e-12
    counts = dict.fromkeys(ratios, 0)
    for turn, (name, position) in enumerate(draw(Mixture(ratios), 997), 1):
        assert position == counts[name]  # Every source in its own order, nothing left out.
        counts[name] += 1
        for other, ratio in ratios.items():
            assert abs(counts[other] - ratio * turn) < len(ratios)
    np.testing.assert_allclose(
        [counts[name] / 997 for name in ratios], list(ratios.values()), atol=2e-3
    )


def test_a_source_of_weight_zero_is_never_drawn():
    assert {name for name, _ in draw(Mixture({"a": 0.0, "b": 2.0}), 50)} == {"b"}


def test_a_state_continues():
    whole = draw(Mixture({"a": 0.3, "b": 0.5, "c": 0.2}), 60)
    first, second = Mixture({"a": 0.3, "b": 0.5, "c": 0.2}), Mixture({"a": 0.3, "b": 0.5, "c": 0.2})
    assert draw(first, 23) == whole[:23]
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert draw(second, 37) == whole[23:]


def test_weights_change_and_every_source_goes_on():
    first = Mixture({"a": 1.0, "b": 1.0})
    before = draw(first, 40)
    changed = Mixture({"a": 9.0, "b": 1.0, "new": 10.0})
    changed.set_state(first.get_state())
    after = draw(changed, 100)
    counts = {name: sum(n == name for n, _ in after) for name in ("a", "b", "new")}
    assert (
        counts["a"] in (44, 45, 46) and counts["b"] in (4, 5, 6) and counts["new"] in (49, 50, 51)
    )
    for name in ("a", "b", "new"):
        positions = [p for n, p in itertools.chain(before, after) if n == name]
        assert positions == list(range(len(positions)))


def test_bad_weights_are_refused():
    for weights, message in (
        ({"a": -1.0}, "'a': weight=-1.0 must be finite and not negative"),
        ({"a": float("inf")}, "'a': weight=inf"),
        ({"a": 0.0, "b": 0.0}, "at least one with a weight above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Mixture(weights)


def test_streams_side_by_side_spread_a_rare_source():
    """64 streams, a document in a hundred: not all at once, nor none for a hundred turns."""
    ratios = {"often": 0.95, "rare": 0.01, "some": 0.04}
    streams = [Mixture(ratios, (v + 0.5) / 64) for v in range(64)]
    counts = dict.fromkeys(ratios, 0)
    for turn in range(1, 301):
        drawn = [stream.draw()[0] for stream in streams]
        assert drawn.count("rare") <= 4
        for name in drawn:
            counts[name] += 1
        for name, ratio in ratios.items():
            assert abs(counts[name] - 64 * turn * ratio) < 12
    for name, ratio in ratios.items():
        np.testing.assert_allclose(counts[name] / (64 * 300), ratio, atol=1e-3)


def test_a_source_that_is_taken_up_later_is_spread_too():
    """Of weight 0 at first, then one document in a hundred, over 64 streams."""
    counts = []
    for v in range(64):
        phase = (v + 0.5) / 64
        first, second = Mixture({"a": 1.0, "b": 0.0}, phase), Mixture({"a": 0.99, "b": 0.01}, phase)
        draw(first, 10)
        second.set_state(json.loads(json.dumps(first.get_state())))
        names = [name for name, _ in draw(second, 200)]
        counts.append([names[:50].count("b"), names.count("b")])
    early, whole = np.sum(counts, axis=0)
    assert 24 <= early <= 40 and 120 <= whole <= 136  # 32 and 128, a few streams at the edge.
