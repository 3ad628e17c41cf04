"""What a run logs of its data: shares of the kinds of documents, and what was skipped and why.

Streams count (`data/streams.py`); here the counts of all processes become the numbers of a line
of metrics. Shares are of what was given since the line before, so that a change of weights shows
at once; what was skipped is counted from the beginning of the run.
"""

from collections.abc import Callable, Collection

import numpy as np

from nextstep_jax.data.faults import REASONS
from nextstep_jax.data.schema import KINDS
from nextstep_jax.data.tolerance import check_share

Counts = dict[str, dict[str, int]]
"""Topic -> name -> number: "read" by source, "skipped/SOURCE" by reason, "first_epoch" and
"first_epoch_bad" by source, "documents" and "tokens" by kind, "rows" {"all", "tokens",
"padding"}."""

SKIPPED = "skipped/"
"""In front of the source, the topic of what was skipped of it."""
JUDGED, JUDGED_BAD = "first_epoch", "first_epoch_bad"
"""The topics of what is judged: documents of the first epoch, and bad ones among them."""


def add_counts(counts: Collection[Counts]) -> Counts:
    """The sum."""
    total: Counts = {}
    for one in counts:
        for topic, values in one.items():
            sums = total.setdefault(topic, {})
            for name, number in values.items():
                sums[name] = sums.get(name, 0) + number
    return total


def no_counts(sources: Collection[str]) -> Counts:
    """Zeros for everything that can be counted, the same names in every process."""
    return {
        "read": dict.fromkeys(sources, 0),
        **{SKIPPED + source: dict.fromkeys(REASONS, 0) for source in sources},
        JUDGED: dict.fromkeys(sources, 0),
        JUDGED_BAD: dict.fromkeys(sources, 0),
        "documents": dict.fromkeys(KINDS, 0),
        "tokens": dict.fromkeys(KINDS, 0),
        "rows": dict.fromkeys(("all", "tokens", "padding"), 0),
    }


def counts_metrics(counts: Counts, before: Counts) -> dict[str, float]:
    """The numbers of a line of metrics.

    Args:
        counts: So far.
        before: At the line before.

    Returns:
        documents/KIND and tokens/KIND, shares of what was given in between, for the kinds that
        the run has; padding_share of the same rows; skipped and skipped/REASON, from the
        beginning, where there are any.
    """
    metrics: dict[str, float] = {}
    for topic in ("documents", "tokens"):
        given = {k: n - before[topic].get(k, 0) for k, n in counts[topic].items()}
        total = sum(given.values())
        for kind, number in given.items():
            if total and counts[topic][kind]:
                metrics[f"{topic}/{kind}"] = number / total
    rows = {k: n - before["rows"].get(k, 0) for k, n in counts["rows"].items()}
    if positions := rows["tokens"] + rows["padding"]:
        metrics["padding_share"] = rows["padding"] / positions
    skipped = add_counts([{"all": v} for k, v in counts.items() if k.startswith(SKIPPED)])
    if total := sum(skipped.get("all", {}).values()):
        metrics["skipped"] = float(total)
        metrics |= {f"skipped/{reason}": float(n) for reason, n in skipped["all"].items() if n}
    return metrics


class DataReport:
    """Lines of metrics, each since the one before."""

    def __init__(
        self,
        counts: Callable[[], Counts],
        add_up: Callable[[np.ndarray], np.ndarray] | None = None,
        max_bad_fraction: float = 1.0,
    ):
        """Begins now.

        Args:
            counts: What this process has counted, with the same names as in every process.
            add_up: The sum over all processes of an int64 vector; None if there is one process.
            max_bad_fraction: The share of a source's documents that may be bad; judged here, on
                all processes together and by all of them, so that they stop at the same line.
        """
        self._counts, self._add_up = counts, add_up
        self._max_bad_fraction = max_bad_fraction
        self._before = self._sum()

    def _sum(self) -> Counts:
        counts = self._counts()
        if self._add_up is None:
            return counts
        numbers = [number for values in counts.values() for number in values.values()]
        summed = iter(self._add_up(np.array(numbers, np.int64)).tolist())
        return {topic: {k: next(summed) for k in values} for topic, values in counts.items()}

    def __call__(self) -> dict[str, float]:
        """The metrics of `counts_metrics` since the last call; every process must call.

        Raises:
            ValueError: Too many documents of a source are bad.
        """
        counts, before = self._sum(), self._before
        for source, read in counts.get(JUDGED, {}).items():
            check_share(source, read, counts[JUDGED_BAD][source], self._max_bad_fraction)
        self._before = counts
        return counts_metrics(counts, before)
