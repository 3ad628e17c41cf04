"""What the passes of curation write down beside the documents, and add up afterwards.

    curation.json               what the folder is made from and by, written first
    facts/shard-00000.json      what a pass found out about one shard
    scores.json                 the sums: documents, faults by reason, range of each score
    faults.jsonl                every document that could not be used: index, reason, message

All of it is JSON, and a function of the input and the config.
"""

import json
import math
import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from nextstep_jax.data.record_writer import claim_folder, write_json, write_text
from nextstep_jax.data.records import decode_document
from nextstep_jax.data.schema import Document

SETTINGS = "curation.json"
SUMMARY = "scores.json"
FAULTS = "faults.jsonl"
NUM_BINS = 40

_SAMPLE_OF_SHARD = 64
# What edges are chosen by; more would not move them.
_SHARDS_SAMPLED = 1024
# A histogram spans the scores between these quantiles; what is beyond goes into its end bins.
_QUANTILES = (0.005, 0.995)
# Positive scores that span more than this get bins of equal ratio.
_LOG_RATIO = 50.0


def facts_path(out: pathlib.Path, shard: int) -> pathlib.Path:
    """Where the facts of a shard are."""
    return pathlib.Path(out) / "facts" / f"shard-{shard:05d}.json"


def read_facts(out: pathlib.Path, shard: int) -> dict[str, Any]:
    """The facts of a shard."""
    return json.loads(facts_path(out, shard).read_text(encoding="utf-8"))


def write_facts(out: pathlib.Path, shard: int, facts: Mapping[str, Any]) -> None:
    """Writes the facts of a shard, whole or not at all."""
    path = facts_path(out, shard)
    path.parent.mkdir(exist_ok=True)
    # In one line: these are lists of numbers.
    write_text(path, json.dumps(facts, separators=(",", ":")))


def begin_folder(out: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder of a pass, or makes sure that it is of the same pass.

    Raises:
        ValueError: It holds something else, or was begun with other settings.
    """
    # As it would be read back: tuples are lists there.
    claim_folder(out, SETTINGS, json.loads(json.dumps(settings)))


def read_records(path: pathlib.Path) -> Iterator[Document]:
    """The documents of one shard, in order; the folder needs no index."""
    reader = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
    for position in range(reader.num_records()):
        yield decode_document(reader.read([position])[0])
    reader.close()


def sample_of(values: Sequence[float | None]) -> dict[str, Any]:
    """Count, sum, range and a few of the scores of a shard."""
    known = [value for value in values if value is not None]
    step = max(1, math.ceil(len(known) / _SAMPLE_OF_SHARD))
    return {
        "count": len(known),
        "sum": math.fsum(known),
        "min": min(known, default=None),
        "max": max(known, default=None),
        "sample": known[::step],
    }


def summarise(out: pathlib.Path, num_shards: int, scores: Sequence[str]) -> dict[str, Any]:
    """Adds up the facts of all shards into `scores.json`, and lists the faults.

    Returns:
        The content of `scores.json`.
    """
    out = pathlib.Path(out)
    total, reasons = Counter(), Counter()
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in scores}
    stride = math.ceil(num_shards / _SHARDS_SAMPLED)
    unfinished = out / f"{FAULTS}.unfinished"
    with unfinished.open("w", encoding="utf-8") as file:
        for shard in range(num_shards):
            facts = read_facts(out, shard)
            total["documents"] += facts["documents"]
            total["written"] += len(facts["indices"])
            total["without_caption"] += facts["without_caption"]
            for fault in facts["faults"]:
                reasons[fault["reason"]] += 1
                file.write(json.dumps(fault) + "\n")
            for name in scores:
                if shard % stride:
                    del facts["scores"][name]["sample"]
                parts[name].append(facts["scores"][name])
    unfinished.rename(out / FAULTS)
    summary = {
        **{name: total[name] for name in ("documents", "written", "without_caption")},
        "faults": dict(sorted(reasons.items())),
        "scores": {name: _joined(parts[name]) for name in scores},
    }
    write_json(out / SUMMARY, summary)
    return summary


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `sample_of` of all shards, with the edges of its histogram for the sample."""
    count = sum(part["count"] for part in parts)
    lowest = min((part["min"] for part in parts if part["count"]), default=None)
    highest = max((part["max"] for part in parts if part["count"]), default=None)
    sample = [value for part in parts for value in part.get("sample", ())]
    mean = math.fsum(part["sum"] for part in parts) / count if count else None
    edges = histogram_edges(sample)
    return {"count": count, "mean": mean, "min": lowest, "max": highest, "edges": edges}


def histogram_edges(values: Sequence[float]) -> list[float]:
    """The `NUM_BINS` + 1 edges of a histogram that shows most of some values.

    Bins are of equal width, or of equal ratio where values are positive and differ by large
    factors. No values make no edges.
    """
    if not len(values):
        return []
    low, high = (float(q) for q in np.quantile(values, _QUANTILES))
    if not high > low:
        low, high = low - 0.5, high + 0.5
    if low > 0 and high / low > _LOG_RATIO:
        return [float(edge) for edge in np.geomspace(low, high, NUM_BINS + 1)]
    return [float(edge) for edge in np.linspace(low, high, NUM_BINS + 1)]


def bin_of(value: float, edges: Sequence[float]) -> int:
    """The bin that a value falls into; the first and the last take what is beyond them."""
    place = int(np.searchsorted(edges, value, side="right")) - 1
    return min(max(place, 0), len(edges) - 2)
