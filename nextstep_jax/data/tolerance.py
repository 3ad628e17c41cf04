"""Going on without bad documents, up to a limit.

Whoever reads many documents skips those that cannot be used (`data/faults.py`), counts them by
source and logs each; where too large a share of a source is bad, something else is wrong, and
reading stops.
"""

import logging
from collections.abc import Iterator

from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.schema import Document
from nextstep_jax.data.sources import DocumentSource

LEAST_READ = 1000
"""Below so many documents read, a share of bad ones says little: as many may be bad as would be
allowed of so many. Ours."""


def check_share(source: str, read: int, bad: int, max_bad_fraction: float, last: str = "") -> None:
    """Judges the bad documents of a source.

    Args:
        source: Its name.
        read: Documents read, bad ones included.
        bad: Bad ones.
        max_bad_fraction: The largest share that may be bad, of at least `LEAST_READ`.
        last: What is said of the last one.

    Raises:
        ValueError: There are too many.
    """
    if bad > max_bad_fraction * max(read, LEAST_READ):
        raise ValueError(
            f"source {source!r}: {bad} of the first {read} documents are bad, more than"
            f" max_bad_fraction={max_bad_fraction} allows (of at least {LEAST_READ})"
            + (f"; the last one {last}" if last else "")
        )


class Tally:
    """Documents of one source, read and skipped, and the judgement on their share."""

    def __init__(self, source: str, max_bad_fraction: float):
        """Begins at zero.

        Args:
            source: The name of the source, for messages.
            max_bad_fraction: The share of its documents that may be bad.
        """
        self._source, self._max_bad_fraction = source, max_bad_fraction
        self._read = self._bad = 0

    def read(self, error: DocumentError | None = None) -> None:
        """Counts a document; with an error, as one that is skipped, which is logged.

        Raises:
            ValueError: Too many of the source's documents are bad.
        """
        self._read += 1
        if error is None:
            return
        logging.warning("skipped (%s): %s", error.reason, error)
        self._bad += 1
        last = f"({error.reason}): {error}"
        check_share(self._source, self._read, self._bad, self._max_bad_fraction, last)


def good_documents(source: DocumentSource, most: int | None = None) -> Iterator[Document]:
    """The first documents of a source, at most so many, without the bad ones."""
    for index in range(len(source) if most is None else min(most, len(source))):
        try:
            yield source[index]
        except DocumentError as error:
            logging.info("passed over: %s", error)
