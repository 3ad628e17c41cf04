"""Going on without bad documents, up to a limit.

Whoever reads many documents skips those that cannot be used (`data/faults.py`), counts them by
source and logs each; where too large a share of a source is bad, something else is wrong, and
reading stops.
"""

import collections
import logging
from collections.abc import Iterator

from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.schema import Document
from nextstep_jax.data.sources import DocumentSource

# Below so many documents read, a share of bad ones says little: as many may be bad as would be
# allowed of so many. Ours.
_LEAST_READ = 1000


class Tally:
    """Documents read and skipped, by source, and the judgement on their share."""

    def __init__(self, max_bad_fraction: float):
        """Begins at zero.

        Args:
            max_bad_fraction: The share of a source's documents that may be bad.
        """
        self._max_bad_fraction = max_bad_fraction
        self._read: collections.Counter[str] = collections.Counter()
        self._bad: collections.Counter[str] = collections.Counter()

    def add(self, source: str, read: int, bad: int) -> None:
        """Counts what was read before, without judging it again."""
        self._read[source] += read
        self._bad[source] += bad

    def read(self, source: str, error: DocumentError | None = None) -> None:
        """Counts a document; with an error, as one that is skipped, which is logged.

        Raises:
            ValueError: Too many of the source's documents are bad.
        """
        self._read[source] += 1
        if error is None:
            return
        logging.warning("skipped (%s): %s", error.reason, error)
        self._bad[source] += 1
        read, bad = self._read[source], self._bad[source]
        if bad > self._max_bad_fraction * max(read, _LEAST_READ):
            raise ValueError(
                f"source {source!r}: {bad} of the first {read} documents are bad, more than"
                f" max_bad_fraction={self._max_bad_fraction} allows (of at least {_LEAST_READ});"
                f" the last one ({error.reason}): {error}"
            )


def good_documents(source: DocumentSource, most: int | None = None) -> Iterator[Document]:
    """The first documents of a source, at most so many, without the bad ones."""
    for index in range(len(source) if most is None else min(most, len(source))):
        try:
            yield source[index]
        except DocumentError as error:
            logging.info("passed over: %s", error)
