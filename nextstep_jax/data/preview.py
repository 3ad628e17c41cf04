"""What the model will see, as numbers for a page: packed batches counted and taken apart again.

The batches of the pipeline (`data/pipeline.py`) are counted, checked and read back into documents
(`data/preview_documents.py`; the layouts are those of NextStep-1, arXiv 2508.10711). The result
holds what JSON can say, and `data/preview_page.py` makes a page of it.

Words: a document is a segment of a row; a size is (height, width) in pixels.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from nextstep_jax.data import buckets
from nextstep_jax.data.preview_documents import (
    Span,
    describe,
    find_spans,
    placed_images,
    stated_grid,
)
from nextstep_jax.data.schema import KINDS, Batch
from nextstep_jax.data.statistics import SKIPPED
from nextstep_jax.data.text_tokenizer import TextTokenizer

FORMAT = 1
"""Counts up when the fields change so that a reader of the older ones would err."""

_MAX_BINS = 20
# Rows that are drawn; the numbers are of all.
_MAX_ROWS = 100


@dataclasses.dataclass
class _Totals:
    """What is counted over all batches; a list has an entry for every document, row or image."""

    batches: int = 0
    row_length: int = 0
    kinds: list[str] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)
    image_tokens: list[int] = dataclasses.field(default_factory=list)
    row_tokens: list[int] = dataclasses.field(default_factory=list)
    row_images: list[int] = dataclasses.field(default_factory=list)
    sizes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    trained_text: int = 0
    trained_image: int = 0
    problems: collections.Counter = dataclasses.field(default_factory=collections.Counter)


def read_batches(
    batches: Iterable[Batch],
    tokenizer: TextTokenizer,
    *,
    num_documents: int = 64,
    num_batches: int = 1,
    split_at_eos: bool = False,
) -> dict[str, Any]:
    """Reads batches until there are enough documents, and says what is in them.

    Args:
        batches: May be endless.
        tokenizer: The one that laid the documents out.
        num_documents: How many are shown in full, the first ones.
        num_batches: How many are read at the least. All that are read are counted.
        split_at_eos: Rows are a single segment (`DataConfig.attend_across_documents`), and what
            ends a document is its end of text.

    Returns:
        What JSON can say: totals, kinds, charts, problems, rows and documents.

    Raises:
        ValueError: A number is not positive, or there is no batch.
    """
    for name, value in (("num_documents", num_documents), ("num_batches", num_batches)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    totals, rows, documents = _Totals(), [], []
    for batch in batches:
        spans = find_spans(batch, tokenizer, split_at_eos=split_at_eos)
        first_row = len(totals.row_tokens)
        shown = spans[: num_documents - len(documents)]
        rows += _describe_rows(batch, spans, first_row, len(documents), len(shown))[
            : max(0, _MAX_ROWS - len(rows))
        ]
        _count(totals, batch, spans, tokenizer)
        placed = placed_images(batch)
        documents += [describe(batch, span, placed, tokenizer, first_row) for span in shown]
        if len(documents) >= num_documents and totals.batches >= num_batches:
            break
    if not totals.batches:
        raise ValueError("there is no batch to show")
    for document in documents:
        totals.problems.update(document.pop("problems"))
    return {
        "format": FORMAT,
        "totals": _summary(totals),
        "kinds": _shares(totals),
        "charts": _charts(totals),
        "problems": [f"{count:,} {text}" for text, count in sorted(totals.problems.items())],
        "rows": rows,
        "documents": documents,
    }


def source_table(
    sources: Mapping[str, tuple[Any, float]], counts: Mapping[str, Mapping[str, int]]
) -> list[dict[str, Any]]:
    """Name, weight, share, size and documents read of every source of a mixture.

    Args:
        sources: Name -> (source, weight).
        counts: Of the pipeline's iterator; without a topic "read" it is not said.
    """
    total = sum(weight for _, weight in sources.values())
    return [
        {
            "name": name,
            "weight": weight,
            "share": weight / total,
            "documents": len(source),
            "read": counts["read"].get(name, 0) if "read" in counts else None,
        }
        for name, (source, weight) in sources.items()
    ]


def skipped_documents(counts: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    """Source, reason and number of the documents that a pipeline skipped, most first."""
    skipped = [
        {"source": topic.removeprefix(SKIPPED), "reason": reason, "documents": number}
        for topic, numbers in counts.items()
        if topic.startswith(SKIPPED)
        for reason, number in numbers.items()
        if number
    ]
    return sorted(skipped, key=lambda entry: -entry["documents"])


# Counting


def _count(totals: _Totals, batch: Batch, spans: Sequence[Span], tokenizer: TextTokenizer) -> None:
    """Adds a batch to the totals."""
    num_rows, totals.row_length = batch["token_ids"].shape
    totals.batches += 1
    totals.kinds += [span.kind for span in spans]
    totals.lengths += [span.stop - span.start for span in spans]
    totals.image_tokens += [sum(b - a for a, b in span.runs) for span in spans]
    totals.row_tokens += np.count_nonzero(batch["segment_ids"], axis=1).tolist()
    in_row = collections.Counter[int]()
    for span in spans:
        in_row[span.row] += len(span.runs)
    totals.row_images += [in_row[row] for row in range(num_rows)]
    if "latents" in batch:
        for span in spans:
            grids = [stated_grid(batch, span, a, tokenizer) for a, _ in span.runs]
            totals.sizes.update(grid for grid in grids if grid)
    else:
        for key, images in batch.get("images", {}).items():
            totals.sizes[buckets.parse_image_key(key)] += len(images)
    totals.trained_text += int(np.count_nonzero(batch["text_weights"]))
    totals.trained_image += int(np.count_nonzero(batch["image_weights"]))
    totals.problems.update(_contradictions(batch, tokenizer))


def _contradictions(batch: Batch, tokenizer: TextTokenizer) -> dict[str, int]:
    """What in a batch does not fit together -> how often; nothing, if the pipeline is right."""
    is_image = batch["token_ids"] == tokenizer.image_placeholder_id
    filled = np.zeros(is_image.size, bool)
    for slots in batch.get("image_slots", {}).values():
        filled[slots.reshape(-1)] = True
    if "latents" in batch:
        filled = np.any(batch["latents"] != 0, axis=-1)
    filled = filled.reshape(is_image.shape)
    padding = batch["segment_ids"] == 0
    any_weight = (batch["text_weights"] != 0) | (batch["image_weights"] != 0)
    found = {
        "image positions without an image": is_image & ~filled,
        "tokens of images where the text has no place for them": filled & ~is_image,
        "flow weights off image tokens": (batch["image_weights"] != 0) & ~is_image,
        "weights on padding": any_weight & padding,
        "weights on first tokens, which nothing predicts": (
            any_weight & (batch["positions"] == 0) & ~padding
        ),
    }
    return {text: int(where.sum()) for text, where in found.items() if where.any()}


def _summary(totals: _Totals) -> dict[str, Any]:
    num_rows, tokens = len(totals.row_tokens), sum(totals.row_tokens)
    positions = num_rows * totals.row_length
    return {
        "batches": totals.batches,
        "rows": num_rows,
        "row_length": totals.row_length,
        "documents": len(totals.lengths),
        "images": sum(totals.row_images),
        "tokens": tokens,
        "image_tokens": sum(totals.image_tokens),
        "text_tokens": tokens - sum(totals.image_tokens),
        "trained_text_tokens": totals.trained_text,
        "trained_image_tokens": totals.trained_image,
        "padding": positions - tokens,
        "padding_share": (positions - tokens) / positions,
    }


def _shares(totals: _Totals) -> list[dict[str, Any]]:
    """Documents and tokens of every kind that occurs, and their shares."""
    documents, tokens, image_tokens = (collections.Counter[str]() for _ in range(3))
    for kind, length, of_images in zip(
        totals.kinds, totals.lengths, totals.image_tokens, strict=True
    ):
        documents[kind] += 1
        tokens[kind] += length
        image_tokens[kind] += of_images
    return [
        {
            "kind": kind,
            "documents": documents[kind],
            "document_share": documents[kind] / len(totals.kinds),
            "tokens": tokens[kind],
            "token_share": tokens[kind] / sum(totals.lengths),
            "image_tokens": image_tokens[kind],
        }
        for kind in (*KINDS, "unknown")
        if documents[kind]
    ]


def _charts(totals: _Totals) -> list[dict[str, Any]]:
    fill = [100 * tokens / totals.row_length for tokens in totals.row_tokens]
    # Wide first, then large first.
    sizes = sorted(totals.sizes, key=lambda size: (size[0] / size[1], -size[0]))
    of_sizes = {
        "name": "image_sizes",
        "title": "Image sizes, wide to tall",
        "x": "images",
        "y": "height \u00d7 width",
        "labels": [buckets.image_key(size) for size in sizes],
        "aspects": [round(width / height, 3) for height, width in sizes],
        "counts": [totals.sizes[size] for size in sizes],
    }
    return [
        _histogram("lengths", "Length of documents", "tokens", "documents", totals.lengths),
        of_sizes,
        _histogram("row_images", "Images per row", "images", "rows", totals.row_images),
        _histogram("row_fill", "Fill of rows", "% of the row", "rows", fill, most=100),
    ]


def _histogram(
    name: str, title: str, x: str, y: str, values: Sequence[int | float], most: int | None = None
) -> dict[str, Any]:
    """Counts in at most 20 bins with round edges; `most` is a bound that values can reach."""
    low, high = (min(values), max(values)) if values else (0, 0)
    if most is None:
        # The next whole number lies above all, so that no value falls on the last edge.
        high, smallest = math.floor(high) + 1, 0
    else:
        high, smallest = most, -1
    steps = (factor * 10.0**power for power in range(smallest, 12) for factor in (1, 2, 5))
    step = next(s for s in steps if math.ceil(high / s) - math.floor(low / s) <= _MAX_BINS)
    first, last = math.floor(low / step), math.ceil(high / step)
    edges = [round(step * i, 6) for i in range(min(first, last - 1), last + 1)]
    counts = np.histogram(values, bins=edges)[0].tolist()
    return {"name": name, "title": title, "x": x, "y": y, "edges": edges, "counts": counts}


# Rows and documents


def _describe_rows(
    batch: Batch, spans: Sequence[Span], first_row: int, first_document: int, num_shown: int
) -> list[dict[str, Any]]:
    """Every row with its segments; those of documents that are shown know which one."""
    row_length = batch["token_ids"].shape[1]
    rows: list[list[dict[str, Any]]] = [[] for _ in batch["token_ids"]]
    for number, span in enumerate(spans):
        rows[span.row].append(
            {
                "document": first_document + number if number < num_shown else None,
                "kind": span.kind,
                "start": span.start,
                "length": span.stop - span.start,
                "images": [[a, b - a] for a, b in span.runs],
            }
        )
    return [
        {
            "row": first_row + row,
            "tokens": (tokens := sum(segment["length"] for segment in segments)),
            "fill": tokens / row_length,
            "segments": segments,
        }
        for row, segments in enumerate(rows)
    ]
