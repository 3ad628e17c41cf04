"""The selecting pass: rules on the scores that documents carry; cheap, so that it can be repeated.

It reads the result of the scoring pass (`curation/scoring.py`) and copies the documents that pass
every rule. No scorer runs and no image is decoded, but for the few that the report shows.

Words: a rule is a score with its limits, or "duplicates". The verdict of a document is the list
of the rules that it fails, in the order of the config, duplicates last; "first" counts a document
at the first of them alone, "failed" at all of them. Of a group of near-duplicates the best that
passes all other rules stays.
"""

import functools
import hashlib
import heapq
import json
import logging
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from jaxtyping import Float64, Int64

from nextstep_jax.curation.cluster import LOCAL, Cluster, Shared, collect_columns, run_rows, session
from nextstep_jax.curation.config import DUPLICATES_RULE, SelectionConfig
from nextstep_jax.curation.facts import (
    NUM_BINS,
    SUMMARY,
    begin_folder,
    bin_of,
    read_facts,
    write_facts,
)
from nextstep_jax.curation.findings import Findings, findings_of
from nextstep_jax.curation.report import write_report
from nextstep_jax.data.record_writer import ShardWriter, shard_name, write_index, write_json
from nextstep_jax.data.records import INDEX, RecordSource
from nextstep_jax.data.schema import Document

KEPT = "kept"
SELECTION = "selection.json"
REPORT = "report.html"

_CANDIDATE = ("group", "index", "quality")


def verdict(
    found: Findings, config: SelectionConfig, index: int, replaced: Mapping[int, int]
) -> list[str]:
    """The rules that a document fails, in order; none if it is kept.

    Args:
        found: Of the document.
        config: The rules.
        index: Of the document, in the scored folder.
        replaced: See `replaced_bests`.
    """
    failed = failed_limits(found, config)
    member = found.duplicates
    if config.drop_duplicates and member is not None:
        stays = index == replaced[member.group] if member.group in replaced else member.best
        if not stays:
            failed.append(DUPLICATES_RULE)
    return failed


def failed_limits(found: Findings, config: SelectionConfig) -> list[str]:
    """The rules about scores that a document fails."""
    failed = []
    for name, (smallest, largest) in config.rules.items():
        value = found.scores.get(name)
        if value is None:
            if config.missing == "drop":
                failed.append(name)
        elif (smallest is not None and value < smallest) or (
            largest is not None and value > largest
        ):
            failed.append(name)
    return failed


def replaced_bests(
    failed: Int64[np.ndarray, " m"],
    group: Int64[np.ndarray, " n"],
    index: Int64[np.ndarray, " n"],
    quality: Float64[np.ndarray, " n"],
) -> dict[int, int]:
    """Of the groups whose best fails a rule, by their names, the document that stays instead.

    It has the highest quality, and among equals the lowest index.

    Args:
        failed: The groups whose best fails.
        group: Of each document that passes and is not the best of its group.
        index: Of each of these, in the scored folder.
        quality: Of each of these.
    """
    concerned = np.isin(group, failed)
    group, index, quality = group[concerned], index[concerned], quality[concerned]
    order = np.lexsort((index, -quality, group))
    names, first = np.unique(group[order], return_index=True)
    return dict(zip(names.tolist(), index[order][first].tolist(), strict=True))


class VerdictCounts:
    """Counts verdicts, draws histograms and picks examples, of one shard."""

    def __init__(self, edges: Mapping[str, Sequence[float]], num_examples: int):
        """Counts nothing yet.

        Args:
            edges: The edges of the histogram of each score.
            num_examples: Examples to keep of the kept and of those dropped by each rule.
        """
        self._edges, self._num_examples = edges, num_examples
        self._sums = Counter()
        self._first, self._failed = Counter(), Counter()
        self._missing = Counter()
        self._histograms = {
            name: {"all": [0] * NUM_BINS, KEPT: [0] * NUM_BINS} for name in edges if edges[name]
        }
        self._examples: dict[str, list[tuple[str, int]]] = {}

    def add(self, index: int, document: Document, found: Findings, failed: Sequence[str]) -> None:
        """Counts a document, by its index in the scored folder."""
        self._sums["documents"] += 1
        self._sums[KEPT] += not failed
        self._first.update(failed[:1])
        self._failed.update(failed)
        scores = found.scores
        for name in self._edges:
            if name not in scores:
                self._missing[name] += 1
            elif name in self._histograms:
                place = bin_of(scores[name], self._edges[name])
                self._histograms[name]["all"][place] += 1
                self._histograms[name][KEPT][place] += not failed
        # The same ones however the documents are cut into shards.
        digest = hashlib.blake2b(document.id.encode(), digest_size=8).hexdigest()
        for name in failed or [KEPT]:
            self._examples.setdefault(name, []).append((digest, index))

    def as_dict(self) -> dict[str, Any]:
        """The counts, as JSON."""
        smallest = functools.partial(heapq.nsmallest, self._num_examples)
        return {
            "documents": self._sums["documents"],
            KEPT: self._sums[KEPT],
            "first": dict(self._first),
            "failed": dict(self._failed),
            "missing": dict(self._missing),
            "histograms": self._histograms,
            "examples": {name: smallest(found) for name, found in self._examples.items()},
        }


def joined(tallies: Sequence[Mapping[str, Any]], num_examples: int) -> dict[str, Any]:
    """The sum of the tallies of all shards."""
    result: dict[str, Any] = {"documents": 0, KEPT: 0, "histograms": {}, "examples": {}}
    counters = {name: Counter() for name in ("first", "failed", "missing")}
    for tally in tallies:
        for name in ("documents", KEPT):
            result[name] += tally[name]
        for name, counter in counters.items():
            counter.update(tally[name])
        for name, parts in tally["histograms"].items():
            sums = result["histograms"].setdefault(name, {"all": 0, KEPT: 0})
            for part, counts in parts.items():
                sums[part] = sums[part] + np.array(counts)
        for name, found in tally["examples"].items():
            have = result["examples"].get(name, [])
            result["examples"][name] = heapq.nsmallest(num_examples, [*have, *map(tuple, found)])
    for parts in result["histograms"].values():
        parts.update({part: [int(n) for n in counts] for part, counts in parts.items()})
    return {**result, **{name: dict(counter) for name, counter in counters.items()}}


def group_shards(sizes: Sequence[int], target: int) -> list[range]:
    """Consecutive shards for each new one: as many as stay within a size, at least one.

    Args:
        sizes: Bytes of each shard.
        target: Bytes of a new one, before the dropping.
    """
    groups, start, size = [], 0, 0
    for i, more in enumerate(sizes):
        if i > start and size + more > target:
            groups.append(range(start, i))
            start, size = i, 0
        size += more
    return [*groups, range(start, len(sizes))] if sizes else []


def select_documents(
    scored: pathlib.Path,
    config: SelectionConfig,
    out: pathlib.Path,
    cluster: Cluster = LOCAL,
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Copies the documents that pass the rules into a new folder of records, with a report.

    Args:
        scored: The result of `scoring.score_source`.
        config: The rules.
        out: The new folder.
        cluster: Where it is done; a session of Ray that runs is used.
        progress: Shows a bar.

    Returns:
        The content of `selection.json`: counts by rule, histograms and examples.

    Raises:
        ValueError: The scored folder is unfinished or not scored, a rule is about a score that it
            has not, or the new folder was begun otherwise.
    """
    scored, out = pathlib.Path(scored).resolve(), pathlib.Path(out).resolve()
    source = RecordSource(scored)
    summary_path = scored / SUMMARY
    if not summary_path.is_file():
        raise ValueError(f"{scored} has no {SUMMARY}: score it first, with launch/curate.py")
    if out == scored:
        raise ValueError(f"{out} is the scored folder itself; take a new folder")
    summary = json.loads(summary_path.read_text(encoding="utf-8"))
    unknown = sorted(set(config.rules) - set(summary["scores"]))
    if unknown:
        raise ValueError(
            f"select.rules: {unknown} are no scores of {scored}; it has {sorted(summary['scores'])}"
        )
    rules = {
        "rules": {name: list(limits) for name, limits in config.rules.items()},
        "drop_duplicates": config.drop_duplicates,
        "missing": config.missing,
        "shard_bytes": config.shard_bytes,
        "num_examples": config.num_examples,
    }
    identity = {"pass": "select", "scored": source.fingerprint, **rules}
    begin_folder(out, identity)
    ends = np.cumsum([0] + [shard["documents"] for shard in source.index["shards"]])
    groups = group_shards([s["bytes"] for s in source.index["shards"]], config.shard_bytes)
    spans = [range(int(ends[g.start]), int(ends[g.stop])) for g in groups]
    if not (out / INDEX).is_file():
        with (
            session(cluster) as ray,
            tqdm.tqdm(total=len(source), unit="doc", disable=not progress) as bar,
        ):
            _select_shards(ray, source, scored, config, summary, out, spans, bar)
    tally = joined([read_facts(out, shard) for shard in range(len(spans))], config.num_examples)
    write_json(out / SELECTION, tally)
    write_report(out / REPORT, scored, source, config, summary, tally)
    write_index(out, len(spans), identity)
    return tally


def _select_shards(
    ray: Any,
    source: RecordSource,
    scored: pathlib.Path,
    config: SelectionConfig,
    summary: Mapping[str, Any],
    out: pathlib.Path,
    spans: Sequence[range],
    bar: Any,
) -> None:
    """Makes the shards that are not there."""
    there = [(out / shard_name(shard, len(spans))).is_file() for shard in range(len(spans))]
    missing = [shard for shard in range(len(spans)) if not there[shard]]
    bar.update(sum(len(spans[shard]) for shard in range(len(spans)) if there[shard]))
    if len(missing) < len(spans):
        logging.info("%d of %d shards are there already", len(spans) - len(missing), len(spans))
    if not missing:
        return
    edges = {name: found["edges"] for name, found in summary["scores"].items()}
    shared = Shared(ray, source)
    replaced: dict[int, int] = {}
    # Without limits every best passes.
    if config.drop_duplicates and config.rules and "hashes" in read_facts(scored, 0):
        logging.info("looking for the best that is left of each group of near-duplicates")
        replaced = _replaced(ray, shared, config, spans)
    select = functools.partial(
        _select,
        source=shared,
        replaced=Shared(ray, replaced),
        config=config,
        edges=edges,
        out=out,
        spans=spans,
        missing=missing,
    )
    dataset = ray.data.range(len(missing), override_num_blocks=len(missing)).map_batches(
        select, batch_size=None, batch_format="numpy"
    )
    run_rows(dataset, lambda row: bar.update(row["documents"]))


def _replaced(
    ray: Any, source: Shared, config: SelectionConfig, spans: Sequence[range]
) -> dict[int, int]:
    """The `replaced_bests` of all documents; the driver holds some numbers of each concerned."""
    look = functools.partial(_look, source=source, config=config, spans=spans)
    dataset = ray.data.range(len(spans), override_num_blocks=len(spans)).map_batches(
        look, batch_size=None, batch_format="numpy"
    )
    rows = collect_columns(dataset)
    if not rows:
        return {}
    best = rows["best"]
    return replaced_bests(rows["group"][best], *(rows[k][~best] for k in _CANDIDATE))


def _look(
    batch: dict[str, Any], *, source: Shared, config: SelectionConfig, spans: Sequence[range]
) -> dict[str, Any]:
    """The bests of groups that fail a limit, and the others that pass all."""
    rows = []
    for shard in batch["id"]:
        for index in spans[shard]:
            found = findings_of(source.value[index])
            member = found.duplicates
            if member is not None and member.best == bool(failed_limits(found, config)):
                rows.append((member.group, index, member.quality, member.best))
    columns = zip(*rows, strict=True) if rows else ((),) * 4
    types = zip((*_CANDIDATE, "best"), (np.int64, np.int64, np.float64, bool), strict=True)
    return {k: np.array(v, t) for (k, t), v in zip(types, columns, strict=True)}


def _select(
    batch: dict[str, Any],
    *,
    source: Shared,
    replaced: Shared,
    config: SelectionConfig,
    edges: Mapping[str, Sequence[float]],
    out: pathlib.Path,
    spans: Sequence[range],
    missing: Sequence[int],
) -> dict[str, Any]:
    counts = []
    for number in batch["id"]:
        shard = missing[number]
        tally = VerdictCounts(edges, config.num_examples)
        with ShardWriter(out / shard_name(shard, len(spans))) as writer:
            for index in spans[shard]:
                document = source.value[index]
                found = findings_of(document)
                failed = verdict(found, config, index, replaced.value)
                tally.add(index, document, found, failed)
                if not failed:
                    writer.write(document)
            # Before the shard has its name, so that a shard is never without.
            write_facts(out, shard, tally.as_dict())
        counts.append(len(spans[shard]))
    return {"documents": np.array(counts)}
