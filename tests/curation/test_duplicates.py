"""The banded search against all pairs."""

import numpy as np
import pytest

from nextstep_jax.curation import duplicates


def hashes_with_neighbours(seed, number=300):
    """Random hashes, some copied, some with up to nine bits changed, in chains too."""
    rng = np.random.default_rng(seed)
    hashes = [int(h) for h in rng.integers(0, 2**64, number, dtype=np.uint64)]
    for changed in [*range(10)] * 8:
        near = hashes[rng.integers(len(hashes))]
        for bit in rng.permutation(64)[:changed]:
            near ^= 1 << int(bit)
        hashes.append(near)
    return np.array(hashes, np.uint64)[rng.permutation(len(hashes))]


def all_pairs_roots(hashes, max_distance):
    """The smallest hash that each can reach in steps of near ones, by comparing all."""
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    roots = hashes.copy()
    while True:
        lower = np.array([roots[row].min() for row in distance <= max_distance])
        if (lower == roots).all():
            return roots
        roots = lower


def banded_roots(hashes, max_distance, matching):
    masks = duplicates.band_masks(max_distance, matching)
    keys = duplicates.band_keys(hashes, masks)
    edges = duplicates.near_edges(keys.reshape(-1), np.repeat(hashes, len(masks)), max_distance)
    return duplicates.roots_of(hashes, *duplicates.components(edges)), len(edges)


@pytest.mark.parametrize(
    ("max_distance", "matching"), [(0, 1), (3, 1), (7, 1), (3, 2), (5, 3), (20, 1)]
)
def test_the_same_groups_as_all_pairs(max_distance, matching):
    hashes = hashes_with_neighbours(seed=max_distance)
    expected = all_pairs_roots(hashes, max_distance)
    found, num_edges = banded_roots(hashes, max_distance, matching)
    np.testing.assert_array_equal(found, expected)
    assert num_edges > 0 or max_distance == 0


def test_a_distance_is_met_exactly():
    base = 0x0123456789ABCDEF
    for seed in range(20):
        bits = np.random.default_rng(seed).permutation(64)
        for changed, near in ((5, True), (6, False)):
            other = base
            for bit in bits[:changed]:
                other ^= 1 << int(bit)
            hashes = np.array([base, other], np.uint64)
            found, _ = banded_roots(hashes, max_distance=5, matching=1)
            assert (len(np.unique(found)) == 1) == near


def test_masks_cover_every_bit_equally_often():
    masks = duplicates.band_masks(3, 2)
    assert len(masks) == 10
    counts = [sum(int(mask) >> bit & 1 for mask in masks) for bit in range(64)]
    assert counts == [4] * 64


def test_best_of_groups():
    roots = np.array([7, 5, 7, 7, 9], np.uint64)
    indices = np.array([4, 0, 2, 8, 1])
    qualities = np.array([1.0, 9.0, 3.0, 3.0, 2.0])
    groups = duplicates.best_of_groups(roots, indices, qualities)
    # 7 has the documents 4, 2 and 8; 2 and 8 are equally good.
    assert [list(map(int, column)) for column in groups] == [[7], [2], [2]]
    first, best = duplicates.look_up(roots, indices, groups)
    assert list(first) == [2, 0, 2, 2, 1]
    assert list(best) == [False, True, True, False, True]


@pytest.mark.parametrize(("max_distance", "matching"), [(-1, 1), (32, 1), (3, 0), (30, 4)])
def test_bands_that_cannot_be(max_distance, matching):
    with pytest.raises(ValueError, match=r"duplicates\.(max_distance|matching_bands)="):
        duplicates.check_bands(max_distance, matching)
