"""The stages of the scoring pass, as functions of one shard's documents.

A shard travels as one table (a Ray block), a row a document: its record (`data/records.py`), and
as columns of their own what the stages found out:

    index    int64, the document's place in the source
    record   its bytes; null for a document that cannot be used
    reason, message    of such a document
    hash     uint64, the perceptual hash; null without one
    and each score, float64, by its name; null where a document has none

Which column a stage adds is fixed by the plan, so that all shards have the same ones.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nextstep_jax.curation import measures
from nextstep_jax.curation.cluster import Table
from nextstep_jax.curation.config import (
    Aspect,
    Clarity,
    CurationConfig,
    Duplicates,
    Rating,
    Recaption,
    Resolution,
    Stage,
)
from nextstep_jax.curation.facts import read_facts, read_records, sample_of, write_facts
from nextstep_jax.curation.findings import Findings, Membership, findings_of
from nextstep_jax.curation.recaption import CaptionCache, Recaptioner
from nextstep_jax.curation.scorers import build_scorer, rate
from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.images import pixels_of
from nextstep_jax.data.record_writer import ShardWriter, shard_name
from nextstep_jax.data.records import decode_document, encode_document
from nextstep_jax.data.schema import Document
from nextstep_jax.data.sources import DocumentSource

SCORED = "scored"
"""The folder of shards that wait for the groups of near-duplicates."""

Measure = Callable[[np.ndarray], dict[str, float]]

# Of several images of a document the worst counts: the largest of these, the smallest of others.
_WORST_IS_LARGEST = frozenset({"aspect"})


@dataclasses.dataclass(frozen=True)
class Plan:
    """A scoring pass, worked out before anything runs.

    Attributes:
        config: What is to be done.
        out: The folder of the result, absolute.
        num_documents: Of the source.
        scores: The names of all scores, in the order of their stages.
    """

    config: CurationConfig
    out: pathlib.Path
    num_documents: int
    scores: tuple[str, ...]

    @property
    def num_shards(self) -> int:
        """One for every `documents_per_shard` documents of the source."""
        return -(-self.num_documents // self.config.documents_per_shard)

    @property
    def duplicates(self) -> Duplicates | None:
        """The stage that groups near-duplicates, if there is one."""
        return next(iter(self.config.of_type(Duplicates).values()), None)

    def indices(self, shard: int) -> range:
        """The documents of a shard."""
        start = shard * self.config.documents_per_shard
        return range(start, min(start + self.config.documents_per_shard, self.num_documents))

    def path(self, shard: int, scored: bool) -> pathlib.Path:
        """Of a shard: the one of the result, or the one that waits for its groups."""
        folder = self.out / SCORED if scored and self.duplicates else self.out
        return folder / shard_name(shard, self.num_shards)


def make_plan(config: CurationConfig, out: pathlib.Path, num_documents: int) -> Plan:
    """Checks that the stages fit together.

    Raises:
        ValueError: Two stages give a score of the same name, near-duplicates are to be chosen by a
            score that no stage gives, or a scorer or the key of an endpoint is wrong.
    """
    scores: dict[str, str] = {}
    for name, stage in config.stages.items():
        for score in _scores_of(stage):
            if score in scores:
                raise ValueError(f"stages {scores[score]} and {name} both give the score {score!r}")
            scores[score] = name
    plan = Plan(config, out, num_documents, tuple(scores))
    if plan.duplicates and plan.duplicates.keep_best_by not in scores:
        raise ValueError(
            f"duplicates.keep_best_by={plan.duplicates.keep_best_by!r} is none of the scores"
            f" {sorted(scores)}"
        )
    return plan


def _scores_of(stage: Stage) -> tuple[str, ...]:
    if isinstance(stage, Rating):
        scorer = build_scorer(stage.scorer)
        return tuple(f"{scorer.name}/{field}" for field in scorer.fields)
    return getattr(stage, "scores", ())


# Reading and measuring


def measured_shard(source: DocumentSource, plan: Plan, shard: int) -> Table:
    """The documents of a shard as a table, decoded and measured.

    Raises:
        ValueError: The documents hold latents instead of pixels.
    """
    rows = []
    for index in plan.indices(shard):
        row: dict[str, Any] = {"index": index}
        try:
            document = source[index]
            pixels = [_pixels(document, image) for image in document.images]
            row.update(measure(pixels, plan.config))
            row["record"] = _record(document)
        except DocumentError as error:
            # Half a surrogate pair of the document may be quoted; Arrow takes none.
            message = str(error).encode("utf-8", "backslashreplace").decode()
            row.update(reason=error.reason, message=message)
        rows.append(row)
    return _table(rows, plan)


def _record(document: Document) -> bytes:
    """The record of a document, which can be read again.

    Raises:
        DocumentError: The document is not what a record can say, in a field that nobody checks
            before.
    """
    record = encode_document(document)
    try:
        decode_document(record)
    except ValueError as error:
        where = f"document {document.source}/{document.id}"
        raise DocumentError("bad_document", f"{where}: {error}") from error
    return record


def _pixels(document: Document, image: Any) -> np.ndarray:
    where = f"document {document.source}/{document.id}"
    try:
        return pixels_of(image)
    except DocumentError as error:
        raise error.within(where) from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def measure(
    pixels: Sequence[measures.Pixels], config: CurationConfig
) -> dict[str, float | int | None]:
    """The scores of a document's images by the stages that look at pixels, and "hash".

    A document without images has none.
    """
    found: dict[str, float | int | None] = {}
    if not pixels:
        return found
    for stage in config.stages.values():
        functions = _measures(stage)
        if isinstance(stage, Duplicates):
            found["hash"] = _hash(pixels, stage)
        for function in functions:
            each = [function(image) for image in pixels]
            for name in each[0]:
                worst = max if name in _WORST_IS_LARGEST else min
                found[name] = worst(one[name] for one in each)
    return found


def _hash(pixels: Sequence[np.ndarray], stage: Duplicates) -> int | None:
    """The hash of one image; None of a document that has too few."""
    if not -len(pixels) <= stage.image < len(pixels):
        return None
    return measures.HASHES[stage.hash](pixels[stage.image])


def _measures(stage: Stage) -> list[Measure]:
    if isinstance(stage, Resolution):
        return [measures.resolution]
    if isinstance(stage, Aspect):
        return [measures.aspect]
    if isinstance(stage, Clarity):
        return [lambda pixels: measures.clarity(pixels, stage.side)]
    return []


def _table(rows: Sequence[Mapping[str, Any]], plan: Plan) -> Table:
    import pyarrow as pa

    columns = {
        "index": pa.int64(),
        # Not `binary`, which ends at 2 GiB.
        "record": pa.large_binary(),
        "reason": pa.string(),
        "message": pa.string(),
        "hash": pa.uint64(),
        **{name: pa.float64() for name in plan.scores},
    }
    # Scores of models come later.
    return pa.table(
        {name: pa.array([row.get(name) for row in rows], kind) for name, kind in columns.items()}
    )


# Models


def _documents(table: Table) -> dict[int, Document]:
    """The usable documents of a table by row."""
    records = table["record"].to_pylist()
    return {i: decode_document(record) for i, record in enumerate(records) if record is not None}


def _replaced(table: Table, name: str, values: Sequence[Any]) -> Table:
    import pyarrow as pa

    place = table.schema.get_field_index(name)
    return table.set_column(place, name, pa.array(values, table.schema.field(name).type))


class RatingActor:
    """A process that holds a scorer."""

    def __init__(self, stage: Rating):
        """Builds the scorer."""
        self._scorer = build_scorer(stage.scorer)

    def __call__(self, table: Table) -> Table:
        """Adds the scores; a document that cannot be rated stays without."""
        documents = _documents(table)
        rated = rate(self._scorer, list(documents.values()))
        for field in self._scorer.fields:
            name = f"{self._scorer.name}/{field}"
            values: list[float | None] = [None] * len(table)
            for row, scores in zip(documents, rated, strict=True):
                values[row] = None if isinstance(scores, DocumentError) else scores[name]
            table = _replaced(table, name, values)
        return table


class RecaptionActor:
    """A process that asks an endpoint."""

    def __init__(self, stage: Recaption, cache: pathlib.Path):
        """Opens the cache."""
        self._recaptioner = Recaptioner(stage, CaptionCache(cache))

    def __call__(self, table: Table) -> Table:
        """Adds the wordings to the documents."""
        documents = _documents(table)
        recaptioned, _ = self._recaptioner.recaption(list(documents.values()))
        records = table["record"].to_pylist()
        for row, document in zip(documents, recaptioned, strict=True):
            try:
                records[row] = _record(document)
            except DocumentError as error:
                # It stays as it was, and counts as one without a new caption.
                logging.warning("recaption: %s", error)
        return _replaced(table, "record", records)


# Writing


def write_shard(table: Table, *, plan: Plan) -> Table:
    """Writes a shard and its facts; returns one row that says how many documents it holds.

    Raises:
        RuntimeError: The table is not exactly one shard: Ray has cut or joined blocks.
    """
    import pyarrow as pa

    indices = table["index"].to_pylist()
    shard = indices[0] // plan.config.documents_per_shard
    if indices != list(plan.indices(shard)):
        raise RuntimeError(f"a block of documents {indices[0]} to {indices[-1]} is no shard")
    path = plan.path(shard, scored=True)
    written = sum(record is not None for record in table["record"].to_pylist())
    # A task that Ray runs again, as another machine was lost with its answer.
    if not path.is_file():
        write_facts(plan.out, shard, _facts(table, plan))
        with ShardWriter(path) as writer:
            for row, document in _documents(table).items():
                writer.write(_with_scores(document, table, row, plan))
            for reason in filter(None, table["reason"].to_pylist()):
                writer.skip(reason)
    return pa.table({"shard": [shard], "read": [len(indices)], "written": [written]})


def _with_scores(document: Document, table: Table, row: int, plan: Plan) -> Document:
    found = {name: table[name][row].as_py() for name in plan.scores}
    scores = {name: value for name, value in found.items() if value is not None}
    number = table["hash"][row].as_py()
    return Findings(scores, None if number is None else f"{number:016x}").on(document)


def _facts(table: Table, plan: Plan) -> dict[str, Any]:
    """What later passes want to know of a shard without reading its documents."""
    rows = table.drop_columns(["record"]).to_pylist()
    usable = [row for row in rows if row["reason"] is None]
    facts: dict[str, Any] = {
        "documents": len(rows),
        "indices": [row["index"] for row in usable],
        "faults": [
            {name: row[name] for name in ("index", "reason", "message")}
            for row in rows
            if row["reason"] is not None
        ],
        "scores": {name: sample_of([row[name] for row in usable]) for name in plan.scores},
    }
    facts["without_caption"] = _without_caption(table, plan)
    if plan.duplicates:
        hashes = [row["hash"] for row in usable]
        facts["hashes"] = [None if number is None else f"{number:016x}" for number in hashes]
        facts["qualities"] = [row[plan.duplicates.keep_best_by] for row in usable]
    return facts


def _without_caption(table: Table, plan: Plan) -> int:
    """Pairs of the table that recaptioning left as they were."""
    keys = {stage.wording for stage in plan.config.of_type(Recaption).values()}
    if not keys:
        return 0
    pairs = [one for one in _documents(table).values() if one.kind == "pair" and one.images]
    found = [{k for part in pair.parts for k in getattr(part, "wordings", ())} for pair in pairs]
    return sum(not keys <= wordings for wordings in found)


def finish_shard(shard: int, plan: Plan, groups: Mapping[int, tuple[int, bool]]) -> None:
    """Writes a scored shard again with the group of each document, and removes the old one.

    Args:
        shard: Its number.
        plan: What is done.
        groups: Of each document that has a hash, by index, its group and whether it is the best.
    """
    final, scored = plan.path(shard, scored=False), plan.path(shard, scored=True)
    if not final.is_file():
        facts = read_facts(plan.out, shard)
        with ShardWriter(final) as writer:
            rows = zip(facts["indices"], facts["qualities"], read_records(scored), strict=True)
            for index, quality, document in rows:
                if index in groups:
                    member = Membership(*groups[index], -np.inf if quality is None else quality)
                    found = dataclasses.replace(findings_of(document), duplicates=member)
                    document = found.on(document)
                writer.write(document)
            for fault in facts["faults"]:
                writer.skip(fault["reason"])
    scored.unlink(missing_ok=True)
