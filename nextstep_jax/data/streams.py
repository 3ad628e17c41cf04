"""One virtual stream of a data set: documents in, packed rows out, in an order that nothing moves.

The data of a run are cut into a fixed number of streams. Stream v takes the documents v, v + V,
v + 2V ... of each source's endless shuffled order, mixes them, lays them out and packs them on
its own. A process owns some of the streams. So the rows of a stream are a function of the seed
and of how many were taken before, whichever process takes them, in whatever company, and with
however many threads it reads.

A document that cannot be used (`data/faults.py`) is skipped, counted by source and reason, and
logged with its key; where too many of a source are bad, the run stops with an
error (`data/tolerance.py`).
"""

import collections
import concurrent.futures
import functools
import hashlib
import logging
from collections.abc import Callable, Mapping
from collections.abc import Sequence as ListLike
from typing import Any

import grain
import numpy as np

from nextstep_jax.data.arrangement import LayoutConfig
from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.layout import Draft, Fitted, assemble, draft, fit_images
from nextstep_jax.data.mixture import Mixture
from nextstep_jax.data.packing import (
    Packer,
    PackingConfig,
    Piece,
    Reference,
    Row,
    check_fits,
    references_of,
    row_of,
)
from nextstep_jax.data.schema import Sequence
from nextstep_jax.data.sources import DocumentSource
from nextstep_jax.data.statistics import JUDGED, JUDGED_BAD, SKIPPED, Counts
from nextstep_jax.data.text_tokenizer import TextTokenizer
from nextstep_jax.data.tolerance import LEAST_READ

_Answer = Callable[[], list[Sequence | DocumentError]]

# Documents that are read in one go, see `read_together`; ours, hardly faster beyond.
_READ_TOGETHER = 8


class Reader:
    """Documents of one source by their number in its endless order, laid out.

    The order is shuffled anew every epoch; the choices of the layout are a function of (seed,
    epoch, name, document id).
    """

    def __init__(
        self,
        name: str,
        source: DocumentSource,
        tokenizer: TextTokenizer,
        layout: LayoutConfig,
        packing: PackingConfig,
        seed: int,
        shuffle: bool,
    ):
        """Prepares for a source; nothing is read."""
        order = grain.MapDataset.range(len(source))
        if shuffle:
            order = order.shuffle(seed=digest(f"{seed}/{name}"))
        self._order = order.repeat()
        self._name, self._source, self._seed = name, source, seed
        self._digest = digest(name)
        self._tokenizer, self._layout, self._packing = tokenizer, layout, packing

    def read(self, number: int) -> Sequence | DocumentError:
        """The sequence of a document that fits into a row, or what is wrong with it."""
        return read_together([(self, number)])[0]

    def _draft(self, number: int) -> Draft:
        index = int(self._order[number])
        document = self._source[index]
        key = [self._seed, self.epoch(number), self._digest, digest(document.id)]
        return draft(document, self._tokenizer, self._layout, np.random.default_rng(key))

    def epoch(self, number: int) -> int:
        """How often the source has been gone through before a document."""
        return number // len(self._source)

    def _fit(self, drafted: Draft) -> tuple[Draft, list[Fitted]]:
        return drafted, fit_images(drafted, self._layout)

    def _assemble(self, fitted: tuple[Draft, list[Fitted]]) -> Sequence:
        sequence = assemble(*fitted, self._tokenizer)
        check_fits(sequence, self._packing)
        return sequence

    def _try(self, step: Callable[["Reader", Any], Any], number: int, value: Any) -> Any:
        """The result of a step, or what is wrong with the document."""
        if isinstance(value, DocumentError):
            return value
        try:
            return step(self, value)
        except DocumentError as error:
            return error.within(self._place(number))
        except OSError as error:  # Of a file that has gone, or a disk that fails.
            return DocumentError("unreadable", f"{self._place(number)}: {error}")

    def _place(self, number: int) -> str:
        return f"source {self._name!r}, document {int(self._order[number])}"


def read_together(asked: ListLike[tuple[Reader, int]]) -> list[Sequence | DocumentError]:
    """What `Reader.read` gives for each of several documents.

    Each step is taken for all of them before the next. The steps around the images are short, but
    after the milliseconds that an image takes the processor has forgotten their code; so they run
    several times faster in a row.
    """
    values: list[Any] = [number for _, number in asked]
    for step in (Reader._draft, Reader._fit, Reader._assemble):
        values = [
            reader._try(step, number, value)
            for (reader, number), value in zip(asked, values, strict=True)
        ]
    return values


class Stream:
    """The rows of one virtual stream.

    Its state is a mixture's position and references to the documents that are held in open rows
    and closed ones not yet taken; to restore it those documents are read again.
    """

    def __init__(
        self,
        index: int,
        num_streams: int,
        readers: Mapping[str, Reader],
        weights: Mapping[str, float],
        packing: PackingConfig,
        judge: Callable[[str, DocumentError], None],
        pool: concurrent.futures.Executor | None,
        read_ahead: int,
    ):
        """Begins at the first document.

        Args:
            index: This stream, from 0.
            num_streams: All of them.
            readers: Of every source, by name.
            weights: Of every source, by name.
            packing: The shape of a row.
            judge: Called with a source and its last bad document, in the first epoch.
            pool: Threads that read; None reads in the caller's.
            read_ahead: Documents asked for ahead of the packer.
        """
        self._index, self._num_streams = index, num_streams
        self._readers = readers
        self._judge, self._pool = judge, pool
        self._read_ahead = read_ahead if pool is not None else 0
        # With threads, few enough that there is work for several.
        most = _READ_TOGETHER if pool is None else read_ahead // 2
        self._together = max(1, min(_READ_TOGETHER, most))
        self._packing = packing
        # Streams begin between the turns of others, lest all draw a rare source at once.
        phase = (index + 0.5) / num_streams
        self._mixture, self._ahead = Mixture(weights, phase), Mixture(weights, phase)
        # Groups of documents asked for, the documents of a group that was answered, and how many
        # there are in both.
        self._asked: collections.deque[_Answer] = collections.deque()
        self._answered: collections.deque[Sequence | DocumentError] = collections.deque()
        self._num_asked = 0
        self._packer = Packer(packing)
        self._closed: collections.deque[Row] = collections.deque()
        self._counts: Counts = {}
        self._bad_in_a_row = 0

    def next_row(self) -> Row:
        """The next row.

        Raises:
            ValueError: Too many documents are bad.
        """
        while not self._closed:
            self._closed.extend(self._add_document())
        row = self._closed.popleft()
        self._count_row(row)
        return row

    def _add_document(self) -> list[Row]:
        """Reads a document and packs it; returns the rows that it closed."""
        sequence = self._next_sequence()
        # In step with what was asked: the state is that of the documents packed.
        source, position = self._mixture.draw()
        self._count("read", source)
        # Later epochs bring the same documents again; they are counted, but not judged anew.
        is_first = self._readers[source].epoch(self._number(position)) == 0
        self._count(JUDGED, source, int(is_first))
        if isinstance(sequence, DocumentError):
            self._skip(source, sequence, is_first)
            return []
        self._bad_in_a_row = 0
        return self._packer.add(Piece.whole(sequence, source, position))

    def _number(self, position: int) -> int:
        """A document's place among those of all streams."""
        return position * self._num_streams + self._index

    def _skip(self, source: str, error: DocumentError, is_first: bool) -> None:
        """Counts, logs and judges a bad document."""
        self._count(SKIPPED + source, error.reason)
        logging.log(
            logging.WARNING if is_first else logging.DEBUG, "skipped (%s): %s", error.reason, error
        )
        self._bad_in_a_row += 1
        if self._bad_in_a_row >= LEAST_READ:
            raise ValueError(
                f"the last {LEAST_READ} documents of stream {self._index} were all bad; the last"
                f" one ({error.reason}): {error}"
            )
        if is_first:
            self._count(JUDGED_BAD, source)
            self._judge(source, error)

    def _next_sequence(self) -> Sequence | DocumentError:
        while self._num_asked <= self._read_ahead:
            self._asked.append(self._ask([self._ahead.draw() for _ in range(self._together)]))
            self._num_asked += self._together
        if not self._answered:
            self._answered.extend(self._asked.popleft()())
        self._num_asked -= 1
        return self._answered.popleft()

    def _ask(self, draws: ListLike[tuple[str, int]]) -> "_Answer":
        """Begins to read documents; the result is called for them."""
        asked = [(self._readers[source], self._number(position)) for source, position in draws]
        read = functools.partial(read_together, asked)
        return read if self._pool is None else self._pool.submit(read).result

    def _count(self, topic: str, name: str, number: int = 1) -> None:
        counts = self._counts.setdefault(topic, {})
        counts[name] = counts.get(name, 0) + number

    def _count_row(self, row: Row) -> None:
        for piece in row.pieces:
            kind = piece.sequence.kind
            # A text that is cut counts where it begins.
            self._count("documents", kind, int(piece.start == 0))
            self._count("tokens", kind, len(piece))
        self._count("rows", "all")
        self._count("rows", "tokens", row.num_tokens)
        self._count("rows", "padding", self._packing.row_length - row.num_tokens)

    @property
    def counts(self) -> Counts:
        """What has been read and given so far."""
        return {topic: dict(values) for topic, values in self._counts.items()}

    def get_state(self) -> dict[str, Any]:
        """All that the rest of the stream depends on, as values for JSON."""
        return {
            "mixture": self._mixture.get_state(),
            "packer": self._packer.get_state(),
            "closed": [[piece.reference for piece in row.pieces] for row in self._closed],
            "counts": self.counts,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where `get_state` stood; reads the documents that are held.

        Raises:
            ValueError: A source is not there any more, or a document that could be read then
                cannot now.
        """
        self._asked.clear()
        self._answered.clear()
        self._num_asked = 0
        self._mixture.set_state(state["mixture"])
        self._ahead.set_state(state["mixture"])
        held = [*references_of(state["packer"])]
        held += [tuple(piece) for row in state["closed"] for piece in row]
        # All are asked for before the first is waited for.
        documents = dict.fromkeys((source, position) for source, position, _, _ in held)
        missing = {source for source, _ in documents} - set(self._readers)
        if missing:
            raise ValueError(
                f"sources {sorted(missing)} are gone, but rows hold documents of them: keep a"
                " source with weight 0 to draw no more of it"
            )
        asked = {key: self._ask([key]) for key in documents}
        sequences = {key: answer()[0] for key, answer in asked.items()}
        for sequence in sequences.values():
            if isinstance(sequence, DocumentError):
                raise ValueError(f"a document that was good before is not any more: {sequence}")

        def resolve(reference: Reference) -> Piece:
            source, position, start, end = reference
            return Piece(sequences[source, position], source, position, start, end)

        self._packer.set_state(state["packer"], resolve)
        self._closed = collections.deque(row_of(row, resolve) for row in state["closed"])
        self._counts = {topic: dict(values) for topic, values in state["counts"].items()}


def digest(text: str) -> int:
    """32 bits of a text; unlike `hash`, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
