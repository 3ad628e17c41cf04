"""Scorers: what rates documents so that thresholds can choose among them.

The training images of NextStep-1 (arXiv 2508.10711, section 3) were filtered by aesthetics,
watermarks, clarity, text in the image and agreement of image and caption. Every such judge is a
`Scorer` here: it gets whole documents and returns numbers by name, so that one interface rates
captioned images, edits (source, instruction, result) and preferences (prompt, chosen, rejected).

A user's own judge is a class with the members of `Scorer`, named "module:Class" in the config:

    # my_scorers.py
    from nextstep_jax.curation.scorers import pixels_in

    class Brightness:
        name, fields, batch_size, accelerator = "brightness", ("mean",), 16, False

        def __init__(self, gain=1.0):
            self.gain = gain

        def score(self, documents):
            images = [pixels_in(document, -1) for document in documents]
            return [{"mean": self.gain * float(pixels.mean())} for pixels in images]

    # in the config
    {"scorer": "my_scorers:Brightness", "gain": 0.5}

Words: a score is named "name/field", such as "clip_aesthetic/aesthetic".
"""

import importlib
import inspect
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.images import pixels_of, resize_cover
from nextstep_jax.data.schema import Document, Text

Pixels = UInt8[np.ndarray, "_ _ 3"]

SCORERS: Mapping[str, str] = types.MappingProxyType(
    {
        "clip": "nextstep_jax.curation.clip_scorers:Clip",
        "clip_aesthetic": "nextstep_jax.curation.clip_scorers:ClipAesthetic",
        "clip_alignment": "nextstep_jax.curation.clip_scorers:ClipAlignment",
        "clip_edit": "nextstep_jax.curation.clip_scorers:ClipEdit",
        "clip_preference": "nextstep_jax.curation.clip_scorers:ClipPreference",
        "edit_change": "nextstep_jax.curation.scorers:EditChange",
    }
)
"""The scorers that come with the package, by the name a config gives."""


@runtime_checkable
class Scorer(Protocol):
    """Rates documents.

    Building one is cheap: it checks its settings and files, so that the program that plans a run
    can build it too. Weights are read by the first `score`, on the worker.

    Attributes:
        name: Stands in front of the names of its scores; unlike that of every other scorer.
        fields: The names of the scores of a document, the same for every one.
        batch_size: How many documents `score` is best given at a time; it is never given more.
        accelerator: Whether it wants a worker with a GPU or TPU.
    """

    name: str
    fields: tuple[str, ...]
    batch_size: int
    accelerator: bool

    def score(self, documents: Sequence[Document]) -> list[dict[str, float]]:
        """The scores of each document by field, in the order of the documents.

        Args:
            documents: From one to `batch_size`.

        Raises:
            DocumentError: One of them cannot be rated. `rate` finds out which.
        """
        ...


class Edit(NamedTuple):
    """An edit as a judge sees it.

    Attributes:
        source: The image before.
        instruction: What was asked for.
        result: The image after.
    """

    source: Pixels
    instruction: str
    result: Pixels


class Preference(NamedTuple):
    """A preference as a judge sees it.

    Attributes:
        prompt: What was asked for.
        chosen: The image that was preferred.
        rejected: The other.
    """

    prompt: str
    chosen: Pixels
    rejected: Pixels


def build_scorer(values: Mapping[str, Any]) -> Scorer:
    """Builds a scorer from plain values.

    Args:
        values: "scorer" is one of `SCORERS` or "module:Class" of a user's own; all else are the
            keyword arguments of that class.

    Raises:
        ValueError: There is no such scorer, it takes other arguments, it lacks a member of
            `Scorer`, or what it was given is wrong.
        FileNotFoundError: A file that it was given is not there.
    """
    arguments = dict(values)
    kind = arguments.pop("scorer", None)
    known = f"one of {sorted(SCORERS)} or 'module:Class'"
    if not isinstance(kind, str) or not (kind in SCORERS or ":" in kind):
        raise ValueError(f"scorer={kind!r} must be {known}")
    module, _, name = SCORERS.get(kind, kind).partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"scorer={kind!r}: cannot import it: {error}") from error
    try:
        inspect.signature(make).bind(**arguments)
    except TypeError as error:
        takes = list(inspect.signature(make).parameters)
        raise ValueError(f"scorer={kind!r}: {error}; it takes {takes}") from error
    scorer = make(**arguments)
    _check(scorer, kind)
    return scorer


def rate(scorer: Scorer, documents: Sequence[Document]) -> list[dict[str, float] | DocumentError]:
    """Rates any number of documents, and checks what the scorer says.

    Args:
        scorer: The judge.
        documents: What it judges.

    Returns:
        For each document its scores by "name/field", or why it could not be rated.

    Raises:
        ValueError: A score is missing, unexpected or not finite; names scorer and document.
    """
    rated: list[dict[str, float] | DocumentError] = []
    for start in range(0, len(documents), scorer.batch_size):
        batch = documents[start : start + scorer.batch_size]
        try:
            rated += _checked(scorer, batch)
        except DocumentError as error:
            # Which one it was shows when each stands alone.
            single = len(batch) == 1
            rated += [error] if single else [rate(scorer, [one])[0] for one in batch]
    return rated


def describe(document: Document) -> str:
    """How errors name a document."""
    return f"document {document.id!r} of {document.source!r}"


def text_in(document: Document) -> str:
    """All text of a document, a line a part.

    Raises:
        DocumentError: There is none.
    """
    text = "\n".join(part.text for part in document.parts if isinstance(part, Text)).strip()
    if not text:
        raise DocumentError("empty_text", f"{describe(document)} has no text to rate")
    return text


def pixels_in(document: Document, index: int) -> Pixels:
    """The pixels of one of a document's images; -1 is the last.

    Raises:
        DocumentError: There is no such image, or it cannot be decoded.
        ValueError: It is given as latents.
    """
    images = document.images
    if not -len(images) <= index < len(images):
        found = f"has {len(images)} images, none of index {index}"
        raise DocumentError("bad_document", f"{describe(document)} {found}")
    try:
        return pixels_of(images[index])
    except DocumentError as error:
        raise error.within(describe(document)) from error
    except ValueError as error:
        raise ValueError(f"{describe(document)}: {error}") from error


def edit_of(document: Document) -> Edit:
    """Source, instruction and result of an edit: its first image, its text, its last image.

    Raises:
        DocumentError: It has fewer than two images or no text, or one cannot be decoded.
    """
    if len(document.images) < 2:
        found = f"is no edit: it has {len(document.images)} images, not two or more"
        raise DocumentError("bad_document", f"{describe(document)} {found}")
    return Edit(pixels_in(document, 0), text_in(document), pixels_in(document, -1))


def preference_of(document: Document) -> Preference:
    """Prompt and images of a preference: a document of text and two images, the better one first.

    Raises:
        DocumentError: It has not two images, or no text, or one cannot be decoded.
    """
    if len(document.images) != 2:
        found = f"is no preference: it has {len(document.images)} images, not two"
        raise DocumentError("bad_document", f"{describe(document)} {found}")
    return Preference(text_in(document), pixels_in(document, 0), pixels_in(document, 1))


class EditChange:
    """How much an edit changed: a rating that needs no model.

    `change` is the mean absolute difference of source and result over pixels and channels, of
    white to black 1; 0 means that nothing was done. A source of another size is first fitted to
    the result.
    """

    fields = ("change",)
    accelerator = False

    def __init__(self, name: str = "edit_change", batch_size: int = 32):
        """Takes the settings of `Scorer`."""
        self.name, self.batch_size = name, batch_size

    def score(self, documents: Sequence[Document]) -> list[dict[str, float]]:
        """See `Scorer`."""
        return [{"change": _change(edit_of(document))} for document in documents]


def _change(edit: Edit) -> float:
    source = resize_cover(edit.source, *edit.result.shape[:2])
    return float(np.abs(source.astype(np.int16) - edit.result).mean() / 255)


def _check(scorer: Any, kind: str) -> None:
    """Refuses what is no scorer."""
    lacking = [m for m in (*Scorer.__annotations__, "score") if not hasattr(scorer, m)]
    if lacking:
        raise ValueError(f"scorer={kind!r} is no Scorer: it lacks {lacking}")
    fields, batch_size = scorer.fields, scorer.batch_size
    for fault, message in (
        (not isinstance(scorer.name, str) or not scorer.name, f"name={scorer.name!r} must be text"),
        (
            not isinstance(fields, tuple)
            or not fields
            or len(set(fields)) < len(fields)
            or not all(isinstance(field, str) and field for field in fields),
            f"fields={fields!r} must be a tuple of different names",
        ),
        (
            type(batch_size) is not int or batch_size < 1,
            f"batch_size={batch_size!r} must be an integer of at least 1",
        ),
    ):
        if fault:
            raise ValueError(f"scorer={kind!r}: {message}")


def _checked(scorer: Scorer, documents: Sequence[Document]) -> list[dict[str, float]]:
    """One batch, its scores by their whole names."""
    scores = scorer.score(documents)
    if len(scores) != len(documents):
        raise ValueError(f"{scorer.name}: {len(scores)} ratings of {len(documents)} documents")
    rated = []
    for document, values in zip(documents, scores, strict=True):
        where = f"{scorer.name}: {describe(document)}"
        if set(values) != set(scorer.fields):
            raise ValueError(f"{where} has {sorted(values)}, expected {list(scorer.fields)}")
        wrong = {k: v for k, v in values.items() if not math.isfinite(v)}
        if wrong:
            raise ValueError(f"{where} has scores that are not finite: {wrong}")
        rated.append({f"{scorer.name}/{field}": float(values[field]) for field in scorer.fields})
    return rated
