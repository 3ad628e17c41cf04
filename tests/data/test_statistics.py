import json
from contextlib import closing

import numpy as np

from nextstep_jax.data.schema import KINDS
from nextstep_jax.data.statistics import DataReport, counts_metrics, no_counts
from tests.data import host


def shares(batches):
    """What a line of metrics says of some batches, counted from their arrays."""
    kinds = np.concatenate([batch["kinds"].ravel() for batch in batches])
    tokens = np.array([(kinds == 1 + i).sum() for i in range(len(KINDS))])
    found = {f"tokens/{kind}": n / tokens.sum() for kind, n in zip(KINDS, tokens, strict=True)}
    return {**found, "padding_share": (kinds == 0).mean()}


def test_shares_are_those_of_the_batches_since_the_last_report():
    with closing(host.make_iterator(0, 1, 2, 9000)) as iterator:
        first = [next(iterator) for _ in range(8)]
        report = DataReport(iterator.counts)
        second = [next(iterator) for _ in range(5)]
        metrics, end = report(), iterator.counts()
        assert report().keys() <= {"skipped"}  # Nothing was taken in between.
    expected = shares(second)
    assert expected["tokens/text"] > 0.02 and expected != shares(first)
    for name, share in expected.items():
        np.testing.assert_allclose(metrics[name], share, rtol=1e-12, err_msg=name)
    # Documents by their ids. Of a text that was cut, the rest may come before the beginning.
    seen = [documents(batches) for batches in (first, [*first, *second])]
    begun = {kind: len(seen[1][kind] - seen[0][kind]) for kind in KINDS}
    total = sum(begun.values())
    for kind, number in begun.items():
        room = 2 * host.NUM_STREAMS / total if kind == "text" else 0.05 * number / total
        np.testing.assert_allclose(metrics[f"documents/{kind}"], number / total, atol=room)
    counts = end["documents"]
    for kind in ("pair", "edit", "interleaved"):
        assert counts[kind] == len(seen[1][kind])


def documents(batches):
    """Kind -> ids."""
    found = {kind: set() for kind in KINDS}
    for batch in batches:
        for row, names in enumerate(batch["document_ids"]):
            for segment, name in enumerate(names, start=1):
                at = np.argmax(batch["segment_ids"][row] == segment)
                found[KINDS[batch["kinds"][row, at] - 1]].add(name)
    return found


def test_weights_change_on_resume_and_the_shares_follow(monkeypatch):
    with closing(host.make_iterator(0, 1, 0, 400)) as iterator:
        for _ in range(3):
            next(iterator)
        state = json.loads(json.dumps(iterator.get_state()))
        before = iterator.counts()
    monkeypatch.setattr(
        host, "WEIGHTS", {"text": 0.0, "pair": 0.1, "edit": 0.8, "interleaved": 0.1}
    )
    with closing(host.make_iterator(0, 1, 0, 400)) as iterator:
        iterator.set_state(state)
        for _ in range(4):  # The first give what was held in open rows.
            next(iterator)
        report = DataReport(iterator.counts)
        for _ in range(6):
            next(iterator)
        metrics, after = report(), iterator.counts()
        positions = {v: stream["mixture"]["position"] for v, stream in iterator.get_state().items()}
    read = {kind: after["read"][kind] - before["read"][kind] for kind in KINDS}
    total = sum(read.values())
    # What is asked of each of the four streams is met to a document or two.
    for kind, weight in host.WEIGHTS.items():
        assert abs(read[kind] - weight * total) <= 2 * host.NUM_STREAMS
    assert abs(metrics["documents/edit"] - 0.8) < 0.1
    # No document is read twice or left out.
    for kind in KINDS:
        assert sum(position[kind] for position in positions.values()) == after["read"][kind]


def test_processes_add_up():
    """Two processes' counts by one vector, with sums that 32 bits do not hold."""
    counts = [no_counts(["a"]) for _ in range(2)]
    counts[0]["tokens"]["pair"], counts[1]["tokens"]["pair"] = 3 * 2**31, 2**31
    counts[0]["tokens"]["edit"] = 2**31
    counts[1]["skipped/a"]["bad_image"] = 5
    totals = [no_counts(["a"]), counts[1]]

    def add_up(vector):
        flat = [n for values in totals[step].values() for n in values.values()]
        return vector + np.array(flat, np.int64)

    now = iter(range(2))
    step = next(now)
    states = iter([no_counts(["a"]), counts[0]])
    report = DataReport(lambda: next(states), add_up)
    step = next(now)
    metrics = report()
    assert metrics == {
        "tokens/pair": 0.8,
        "tokens/edit": 0.2,
        "skipped": 5.0,
        "skipped/bad_image": 5.0,
    }


def test_nothing_given_gives_no_shares():
    assert counts_metrics(no_counts(["a"]), no_counts(["a"])) == {}
