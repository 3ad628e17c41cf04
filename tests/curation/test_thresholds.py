"""Verdicts on what documents say of themselves, whatever that is."""

import numpy as np
import pytest

from nextstep_jax.curation.config import selection_config
from nextstep_jax.curation.findings import Findings, Membership, findings_of
from nextstep_jax.curation.thresholds import replaced_bests, verdict
from nextstep_jax.data.schema import Document, Text

CONFIG = selection_config({"rules": {"a": (1.0, 2.0)}})


def document(**metadata):
    return Document((Text("x"),), "i", "s", "text", metadata)


@pytest.mark.parametrize(
    "found",
    [
        3,
        None,
        [1, 2],
        {"scores": 3, "duplicates": 3, "hash": 3},
        {"scores": {"a": "tall", "b": True, "c": float("nan")}, "duplicates": {"group": 1}},
        {"duplicates": {"group": "1", "best": False}},
    ],
)
def test_what_is_not_ours_is_absent(found):
    assert findings_of(document(curation=found)) == Findings()
    assert verdict(findings_of(document(scores=found, duplicates=found)), CONFIG, 0, {}) == []


def test_findings_are_read_as_they_were_written():
    found = Findings({"a": 1.5}, "0f", Membership(4, False, -np.inf))
    written = found.on(document(curation={"scores": {"old": 1.0}}, mine=1))
    assert findings_of(written) == found
    assert written.metadata["mine"] == 1
    assert written.metadata["curation"]["duplicates"]["quality"] is None


def test_verdicts():
    for score, failed in ((0.9, ["a"]), (1.0, []), (2.0, []), (2.1, ["a"])):
        assert verdict(Findings({"a": score}), CONFIG, 0, {}) == failed
    first, second = (Findings({"a": 1.0}, None, Membership(5, best, 0.0)) for best in (True, False))
    assert verdict(first, CONFIG, 8, {}) == []
    assert verdict(second, CONFIG, 9, {}) == ["duplicates"]
    assert verdict(first, CONFIG, 8, {5: 9}) == ["duplicates"]
    assert verdict(second, CONFIG, 9, {5: 9}) == []


def test_the_best_that_is_left_by_quality_then_index():
    group = np.array([5, 7, 5, 7, 5, 9])
    index = np.array([8, 1, 3, 2, 6, 4])
    quality = np.array([2.0, 1.0, 4.0, -np.inf, 4.0, 9.0])
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(6)
        failed = np.array([7, 5, 11])
        found = replaced_bests(failed, group[order], index[order], quality[order])
        assert found == {5: 3, 7: 1}
