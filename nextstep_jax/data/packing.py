"""Packing: sequences of different lengths side by side in rows of one length.

NextStep-1 (arXiv 2508.10711) packs its samples to the maximum length. Two rules, as in the
released trainer: a document with images is never split, plain text is concatenated and cut. Here
a row of documents with images is filled by best fit among a bounded number of open rows; the
oldest is closed when there would be too many. What a closed row has left is filled with plain
text, and plain text that has gathered for a whole row makes one.

A piece is all of a sequence or, of plain text, a part of it. A piece says where its document came
from (source and position), so that a packer's state is a list of such references, and a packer
can be rebuilt from documents that are read again.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.schema import Sequence

Reference = tuple[str, int, int, int]
"""(source, position in the source's stream, first token, end) of a piece."""


@dataclasses.dataclass(frozen=True)
class PackingConfig:
    """The shape of a row.

    Attributes:
        row_length: Tokens of a row.
        max_image_tokens: Most image tokens of a row; None for as many as fit. The train step's
            flow head runs on as many positions.
        num_open_rows: Rows that are open at the same time. More rows, less padding, more memory,
            and more documents read again after a restart.
        least_text_piece: Plain text is not cut to fill a gap of fewer tokens: a piece begins
            without what came before it. Ours.
    """

    row_length: int
    max_image_tokens: int | None = None
    num_open_rows: int = 16
    least_text_piece: int = 64

    def __post_init__(self):
        """Checks the ranges."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ValueError(f"{field.name}={value} must be at least 1")


@dataclasses.dataclass(frozen=True)
class Piece:
    """The tokens from `start` to `end` of a sequence; all of them where it has images.

    Attributes:
        sequence: The sequence.
        source: The name of its source in the mixture.
        position: Its place in the stream of that source.
        start: First token.
        end: Behind the last token.
    """

    sequence: Sequence
    source: str
    position: int
    start: int
    end: int

    @classmethod
    def whole(cls, sequence: Sequence, source: str, position: int) -> "Piece":
        """All of a sequence."""
        return cls(sequence, source, position, 0, len(sequence))

    def __len__(self) -> int:
        """The number of tokens."""
        return self.end - self.start

    @property
    def reference(self) -> Reference:
        """Where the piece comes from."""
        return (self.source, self.position, self.start, self.end)

    def cut(self, length: int) -> tuple["Piece", "Piece"]:
        """The first so many tokens, and the rest."""
        middle = self.start + length
        return dataclasses.replace(self, end=middle), dataclasses.replace(self, start=middle)


def check_fits(sequence: Sequence, config: PackingConfig) -> None:
    """Checks that a sequence fits into an empty row.

    Raises:
        DocumentError: It has images and more tokens than a row, or more image tokens.
    """
    if not sequence.images:
        return
    if len(sequence) > config.row_length:
        raise DocumentError(
            "too_long",
            f"document {sequence.document_id}: {len(sequence)} tokens do not fit into"
            f" row_length={config.row_length}; documents with images are not split",
        )
    num_image_tokens = _num_image_tokens(sequence)
    if config.max_image_tokens is not None and num_image_tokens > config.max_image_tokens:
        raise DocumentError(
            "too_long",
            f"document {sequence.document_id}: {num_image_tokens} image tokens do not fit into"
            f" a row of max_image_tokens={config.max_image_tokens}",
        )


def _num_image_tokens(sequence: Sequence) -> int:
    return sum(rows * columns for rows, columns in sequence.grids)


@dataclasses.dataclass
class Row:
    """Pieces side by side.

    Attributes:
        pieces: In order.
        num_tokens: Tokens so far.
        num_image_tokens: Image tokens so far.
    """

    pieces: list[Piece] = dataclasses.field(default_factory=list)
    num_tokens: int = 0
    num_image_tokens: int = 0

    def add(self, piece: Piece) -> None:
        """Appends a piece."""
        self.pieces.append(piece)
        self.num_tokens += len(piece)
        self.num_image_tokens += _num_image_tokens(piece.sequence)

    def takes(self, piece: Piece, config: PackingConfig) -> bool:
        """Whether a piece fits behind those that are there."""
        if self.num_tokens + len(piece) > config.row_length:
            return False
        most = config.max_image_tokens
        image_tokens = self.num_image_tokens + _num_image_tokens(piece.sequence)
        return most is None or image_tokens <= most


class Packer:
    """Takes sequences one by one and gives rows as they are closed."""

    def __init__(self, config: PackingConfig):
        """Begins with no open row."""
        self._config = config
        self._open: list[Row] = []
        self._texts: collections.deque[Piece] = collections.deque()
        self._num_text_tokens = 0

    def add(self, piece: Piece) -> list[Row]:
        """Places a sequence; returns the rows that were closed for it, most often none.

        The sequence must have passed `check_fits`.
        """
        if piece.sequence.images:
            fitting = [row for row in self._open if row.takes(piece, self._config)]
            if fitting:
                max(fitting, key=lambda row: row.num_tokens).add(piece)  # The oldest of equals.
                return []
            row = Row()
            row.add(piece)
            return self._open_row(row)
        closed = []
        self._push_text(piece)
        while self._num_text_tokens >= self._config.row_length:
            row = Row()
            self._fill(row, least_piece=1)
            # Full, but it waits for its turn: rows come in the order in which they were begun.
            closed += self._open_row(row)
        return closed

    def _open_row(self, row: Row) -> list[Row]:
        """Adds a row, and closes the oldest if there are too many."""
        self._open.append(row)
        if len(self._open) <= self._config.num_open_rows:
            return []
        oldest = self._open.pop(0)
        self._fill(oldest, self._config.least_text_piece)
        return [oldest]

    def _push_text(self, piece: Piece) -> None:
        self._texts.append(piece)
        self._num_text_tokens += len(piece)

    def _fill(self, row: Row, least_piece: int) -> None:
        """Fills what a row has left with the oldest plain text, cut where need be."""
        while self._texts and row.num_tokens < self._config.row_length:
            gap, text = self._config.row_length - row.num_tokens, self._texts[0]
            if len(text) > gap:
                if gap < least_piece:
                    return
                text, self._texts[0] = text.cut(gap)
            else:
                self._texts.popleft()
            row.add(text)
            self._num_text_tokens -= len(text)

    def get_state(self) -> dict[str, Any]:
        """References to all pieces that are held."""
        return {
            "open": [[piece.reference for piece in row.pieces] for row in self._open],
            "texts": [piece.reference for piece in self._texts],
        }

    def set_state(self, state: Mapping[str, Any], resolve: Callable[[Reference], Piece]) -> None:
        """Rebuilds what `get_state` described; `resolve` gives the piece of a reference."""
        self._open = [row_of(references, resolve) for references in state["open"]]
        self._texts, self._num_text_tokens = collections.deque(), 0
        for reference in state["texts"]:
            self._push_text(resolve(tuple(reference)))


def row_of(references: Any, resolve: Callable[[Reference], Piece]) -> Row:
    """The row of a list of references."""
    row = Row()
    for reference in references:
        row.add(resolve(tuple(reference)))
    return row


def references_of(state: Mapping[str, Any]) -> Iterator[Reference]:
    """All references of a packer's state."""
    for references in (*state["open"], state["texts"]):
        yield from map(tuple, references)


def padding_share(batch: Mapping[str, Any]) -> float:
    """The share of a batch's positions that hold no document."""
    return float(np.mean(np.asarray(batch["segment_ids"]) == 0))
