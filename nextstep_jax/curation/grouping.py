"""Near-duplicates over the whole set, on Ray: shuffles that bring together what may be near.

    hashes of all shards -> (key, hash) rows -> shuffled by key: edges
    edges -> on the driver: components, that is the root of every hash with a near one
    (root, document) rows -> shuffled by root: first and best document of every group

What is done to arrays is in `curation/duplicates.py`. The documents stay where they are: some 10
numbers of each are moved. The driver holds 16 bytes for each hash that has a near one and 24 for
each group, and sends these to every machine. Rows are shuffled in buckets of keys, as keys are far
more than tasks should be.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt64

from nextstep_jax.curation import duplicates
from nextstep_jax.curation.cluster import Shared, collect_columns
from nextstep_jax.curation.config import Duplicates
from nextstep_jax.curation.facts import read_facts
from nextstep_jax.curation.stages import Plan

# Rows of a bucket, about: some 100 MB while it is sorted.
_ROWS_PER_BUCKET = 2_000_000

Columns = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Groups:
    """The near-duplicates of a set.

    Attributes:
        members: The hashes that have a near one, ascending.
        roots: The root of each.
        groups: Root, first document and best document of every group, ascending by root.
    """

    members: UInt64[np.ndarray, " n"]
    roots: UInt64[np.ndarray, " n"]
    groups: tuple[UInt64[np.ndarray, " g"], Int64[np.ndarray, " g"], Int64[np.ndarray, " g"]]

    def of(
        self, hashes: UInt64[np.ndarray, " m"], indices: Int64[np.ndarray, " m"]
    ) -> dict[int, tuple[int, bool]]:
        """Of every document its group, named by the group's first, and whether it is the best."""
        roots = duplicates.roots_of(hashes, self.members, self.roots)
        first, best = duplicates.look_up(roots, indices, self.groups)
        return {
            int(index): (int(group), bool(is_best))
            for index, group, is_best in zip(indices, first, best, strict=True)
        }


def find_groups(ray: Any, plan: Plan) -> Groups:
    """The groups of near-duplicates among the hashes in the facts of all shards.

    Raises:
        ValueError: The plan has no stage for them.
    """
    if plan.duplicates is None:
        raise ValueError("the plan has no stage of type 'duplicates'")
    stage = plan.duplicates
    masks = duplicates.band_masks(stage.max_distance, stage.matching_bands)
    buckets = max(1, plan.num_documents * len(masks) // _ROWS_PER_BUCKET)
    # The types of Ray's buckets are signed: a uint64 would become a float on the way.
    hashes = ray.data.range(plan.num_shards).map_batches(
        functools.partial(_hash_rows, plan=plan), batch_format="numpy", batch_size=None
    )
    edges = collect_columns(
        hashes.map_batches(functools.partial(_keyed, masks=masks, buckets=buckets), **_NUMPY)
        .groupby("bucket")
        .map_groups(functools.partial(_edges, stage=stage), batch_format="numpy")
    )
    ends = (edges.get(name, np.empty(0, np.int64)) for name in ("root", "member"))
    members, roots = duplicates.components(np.stack([_unsigned(end) for end in ends], axis=1))
    shared = Shared(ray, (members, roots))
    buckets = max(1, plan.num_documents // _ROWS_PER_BUCKET)
    found = collect_columns(
        hashes.map_batches(functools.partial(_rooted, components=shared, buckets=buckets), **_NUMPY)
        .groupby("bucket")
        .map_groups(_best, batch_format="numpy")
    )
    empty = np.empty(0, np.int64)
    root, first, best = (found.get(name, empty) for name in ("root", "first", "best"))
    order = np.argsort(_unsigned(root))
    return Groups(members, roots, (_unsigned(root)[order], first[order], best[order]))


_NUMPY = {"batch_format": "numpy", "batch_size": None}


def _signed(values: np.ndarray) -> np.ndarray:
    return values.view(np.int64)


def _unsigned(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint64)


def hashes_of(
    plan: Plan, shard: int
) -> tuple[Int64[np.ndarray, " n"], UInt64[np.ndarray, " n"], Any]:
    """Index, hash and quality of the documents of a shard that have a hash."""
    facts = read_facts(plan.out, shard)
    rows = [
        (index, int(number, 16), -np.inf if quality is None else quality)
        for index, number, quality in zip(
            facts["indices"], facts["hashes"], facts["qualities"], strict=True
        )
        if number is not None
    ]
    indices, numbers, qualities = zip(*rows, strict=True) if rows else ((), (), ())
    return (
        np.array(indices, np.int64),
        np.array(numbers, np.uint64),
        np.array(qualities, np.float64),
    )


def _hash_rows(batch: Columns, *, plan: Plan) -> Columns:
    parts = [hashes_of(plan, int(shard)) for shard in batch["id"]]
    index, numbers, quality = (np.concatenate(column) for column in zip(*parts, strict=True))
    return {"index": index, "hash": _signed(numbers), "quality": quality}


def _keyed(batch: Columns, *, masks: np.ndarray, buckets: int) -> Columns:
    """Each hash once for each of its keys."""
    numbers = np.unique(_unsigned(batch["hash"]))
    keys = duplicates.band_keys(numbers, masks).reshape(-1)
    return {
        "bucket": _signed(keys % np.uint64(buckets)),
        "key": _signed(keys),
        "hash": _signed(np.repeat(numbers, len(masks))),
    }


def _edges(batch: Columns, *, stage: Duplicates) -> Columns:
    keys, numbers = _unsigned(batch["key"]), _unsigned(batch["hash"])
    edges = duplicates.near_edges(keys, numbers, stage.max_distance)
    return {"root": _signed(edges[:, 0].copy()), "member": _signed(edges[:, 1].copy())}


def _rooted(batch: Columns, *, components: Shared, buckets: int) -> Columns:
    roots = duplicates.roots_of(_unsigned(batch["hash"]), *components.value)
    return {
        "bucket": _signed(roots % np.uint64(buckets)),
        "root": _signed(roots),
        "index": batch["index"],
        "quality": batch["quality"],
    }


def _best(batch: Columns) -> Columns:
    root, first, best = duplicates.best_of_groups(
        _unsigned(batch["root"]), batch["index"], batch["quality"]
    )
    return {"root": _signed(root), "first": first, "best": best}
