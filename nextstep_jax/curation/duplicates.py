"""Near-duplicates: all pairs of 64-bit hashes within a Hamming distance, and their groups.

Comparing everything with everything is out of the question for half a billion images. Two hashes
within distance d agree on at least m of any d + m bands that the 64 bits are cut into (each of
the d bits that differ spoils one band at most). So hashes that agree on no choice of m bands need
no comparison, and those that do are brought together by that choice's bits as a key: nothing
within d is missed, and what is further is thrown out by comparing. m = 1 is the plain pigeonhole
of d + 1 bands; a larger m makes more keys with more bits, hence smaller groups, which pays for
large sets and distances.

The functions work on arrays; `curation/grouping.py` runs them on Ray, where a key's hashes meet
on one worker.

Words: n hashes, k keys of a hash, e edges (pairs known to be near). A root is the smallest hash of
a group; the hashes of a group are connected by edges, not necessarily all near one another.
"""

import itertools
import math

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
from jaxtyping import Bool, Float64, Int64, UInt64

BITS = 64
# Each key is a copy of the hash in the shuffle; ours.
_MAX_KEYS = 1000

# Odd constants of the finaliser of SplitMix64 (Steele, Lea, Flood 2014).
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def check_bands(max_distance: int, matching_bands: int) -> None:
    """Refuses distances and bands that 64 bits cannot be cut into.

    Raises:
        ValueError: Names the field.
    """
    if not 0 <= max_distance < BITS // 2:
        raise ValueError(f"duplicates.max_distance={max_distance} must be in [0, {BITS // 2})")
    if not 1 <= matching_bands <= BITS - max_distance:
        most = BITS - max_distance
        raise ValueError(f"duplicates.matching_bands={matching_bands} must be in [1, {most}]")
    keys = math.comb(max_distance + matching_bands, matching_bands)
    if keys > _MAX_KEYS:
        raise ValueError(
            f"duplicates.matching_bands={matching_bands} with max_distance={max_distance} makes"
            f" {keys} keys of every hash; at most {_MAX_KEYS} are taken"
        )


def band_masks(max_distance: int, matching_bands: int = 1) -> UInt64[np.ndarray, " k"]:
    """The bits of each choice of `matching_bands` of the max_distance + matching_bands bands."""
    bands = np.array_split(np.arange(BITS), max_distance + matching_bands)
    choices = itertools.combinations(bands, matching_bands)
    masks = [sum(1 << int(bit) for band in choice for bit in band) for choice in choices]
    return np.array(masks, np.uint64)


def band_keys(
    hashes: UInt64[np.ndarray, " n"], masks: UInt64[np.ndarray, " k"]
) -> UInt64[np.ndarray, "n k"]:
    """The keys under which each hash meets others; another mask gives other keys.

    Keys are scrambled, so that any of their bits spread them evenly. Two keys may collide; that
    costs a comparison and changes no result.
    """
    numbers = np.arange(1, len(masks) + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return _scrambled((hashes[:, None] & masks) ^ numbers)


def _scrambled(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, a bijection of the 64-bit numbers."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MIX[0])
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MIX[1])
    return values ^ (values >> np.uint64(31))


def near_edges(
    keys: UInt64[np.ndarray, " n"], hashes: UInt64[np.ndarray, " n"], max_distance: int
) -> UInt64[np.ndarray, "e 2"]:
    """Edges that connect all that is near among the hashes of each key.

    Args:
        keys: One key of each hash; a hash may occur under several and more than once.
        hashes: The hashes.
        max_distance: The largest Hamming distance that counts as near.

    Returns:
        (root, other hash) rows: every hash that has a neighbour under one of its keys is connected
        to it. These are far fewer than the pairs, of which a popular picture has a great many.
    """
    if not len(keys):
        return np.empty((0, 2), np.uint64)
    order = np.lexsort((hashes, keys))
    keys, hashes = keys[order], hashes[order]
    # Of the same hash under the same key one is enough.
    new = np.r_[True, (keys[1:] != keys[:-1]) | (hashes[1:] != hashes[:-1])]
    keys, hashes = keys[new], hashes[new]
    ends = np.searchsorted(keys, keys, side="right")
    first = np.arange(len(keys))
    found = []
    for offset in range(1, len(keys)):
        # Those that still have somebody with their key so far to the right.
        first = first[first + offset < ends[first]]
        if not len(first):
            break
        distance = np.bitwise_count(hashes[first] ^ hashes[first + offset])
        near = first[distance <= max_distance]
        found.append(np.stack([hashes[near], hashes[near + offset]], axis=1))
    edges = np.concatenate(found) if found else np.empty((0, 2), np.uint64)
    members, roots = components(edges)
    return np.stack([roots, members], axis=1)[members != roots]


def components(
    edges: UInt64[np.ndarray, "e 2"],
) -> tuple[UInt64[np.ndarray, " n"], UInt64[np.ndarray, " n"]]:
    """The connected components of the hashes that edges name.

    Returns:
        The hashes, ascending, and the root of each: the smallest hash of its component.
    """
    if not len(edges):
        return np.empty(0, np.uint64), np.empty(0, np.uint64)
    hashes, ends = np.unique(edges, return_inverse=True)
    ends = ends.reshape(-1, 2)
    ones = np.ones(len(ends), bool)
    graph = scipy.sparse.coo_matrix((ones, (ends[:, 0], ends[:, 1])), (len(hashes), len(hashes)))
    _, labels = scipy.sparse.csgraph.connected_components(graph, directed=False)
    # The first place of a label is the smallest hash of its component, as hashes ascend.
    _, first = np.unique(labels, return_index=True)
    return hashes, hashes[first[labels]]


def roots_of(
    hashes: UInt64[np.ndarray, " n"],
    members: UInt64[np.ndarray, " m"],
    roots: UInt64[np.ndarray, " m"],
) -> UInt64[np.ndarray, " n"]:
    """The root of each hash, by the result of `components`; of one without neighbours, itself."""
    if not len(members):
        return hashes
    place = np.minimum(np.searchsorted(members, hashes), len(members) - 1)
    return np.where(members[place] == hashes, roots[place], hashes)


def best_of_groups(
    roots: UInt64[np.ndarray, " n"],
    indices: Int64[np.ndarray, " n"],
    qualities: Float64[np.ndarray, " n"],
) -> tuple[UInt64[np.ndarray, " g"], Int64[np.ndarray, " g"], Int64[np.ndarray, " g"]]:
    """Of every group of at least two documents its root, first document and best document.

    The best has the highest quality, and among equals the lowest index.
    """
    order = np.lexsort((indices, -qualities, roots))
    sorted_roots, starts, counts = np.unique(roots[order], return_index=True, return_counts=True)
    best = indices[order][starts]
    first = np.minimum.reduceat(indices[order], starts) if len(starts) else best
    several = counts > 1
    return sorted_roots[several], first[several], best[several]


def look_up(
    roots: UInt64[np.ndarray, " n"],
    indices: Int64[np.ndarray, " n"],
    groups: tuple[UInt64[np.ndarray, " g"], Int64[np.ndarray, " g"], Int64[np.ndarray, " g"]],
) -> tuple[Int64[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """The group of every document, named by its first one, and whether the document is its best.

    Args:
        roots: The root of each document's hash.
        indices: The documents.
        groups: The result of `best_of_groups`, in the order of the roots.
    """
    known, first, best = groups
    if not len(known):
        return indices, np.ones(len(indices), bool)
    place = np.minimum(np.searchsorted(known, roots), len(known) - 1)
    grouped = known[place] == roots
    return (
        np.where(grouped, first[place], indices),
        np.where(grouped, best[place] == indices, True),
    )
