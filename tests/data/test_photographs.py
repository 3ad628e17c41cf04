"""The photographs: crops that are where they say, splits that share nothing, errors."""

import importlib.util

import numpy as np
import pytest

from nextstep_jax.data.photographs import PHOTOGRAPHS, PhotographSource, photograph


def test_the_splits_share_no_photograph():
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["heldout"])
    for split, names in PHOTOGRAPHS.items():
        source = PhotographSource(image_size=16, split=split, num_documents=40)
        seen = [source[i].metadata["photograph"] for i in range(len(source))]
        assert seen == [list(names)[i % len(names)] for i in range(40)]
        captions = {document.parts[0].text for document in map(source.__getitem__, range(40))}
        assert captions == {f"a photograph of {words}" for words in names.values()}


def test_crops_at_full_resolution_are_cut_from_the_photograph():
    """With a largest scale of 1 nothing is resized, so that the crop is found pixel by pixel."""
    source = PhotographSource(image_size=24, split="heldout", largest_scale=1.0)
    mirrored = []
    for i in range(8):
        document = source[i]
        crop, whole = document.parts[1].pixels, photograph(document.metadata["photograph"])
        assert crop.shape == (24, 24, 3)
        found = [_contains(whole, crop), _contains(whole, crop[:, ::-1])]
        assert sum(found) >= 1
        mirrored.append(found[1] and not found[0])
    assert 0 < sum(mirrored) < 8


def _contains(whole, crop):
    """Whether a crop occurs: candidates by its first row, then all of it."""
    windows = np.lib.stride_tricks.sliding_window_view(whole, (1, 24, 3))[:, :, 0, 0]
    places = np.argwhere((windows == crop[0]).all(axis=(2, 3)))
    return any(np.array_equal(whole[y : y + 24, x : x + 24], crop) for y, x in places)


def test_larger_boxes_are_reduced():
    """A box of four times the side has less detail for its size than one at full resolution."""
    near = PhotographSource(image_size=32, split="heldout", largest_scale=1.0)
    far = PhotographSource(image_size=32, split="heldout", largest_scale=4.0)

    def roughness(source):
        pixels = np.stack([source[i].parts[1].pixels for i in range(0, 160, 4)]).astype(float)
        return np.abs(np.diff(pixels, axis=2)).mean()

    assert roughness(far) > 1.2 * roughness(near)


def test_the_same_index_gives_the_same_crop():
    first, second = (PhotographSource(image_size=16, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first[7].parts[1].pixels, second[7].parts[1].pixels)
    other = PhotographSource(image_size=16, seed=4)
    assert not np.array_equal(first[7].parts[1].pixels, other[7].parts[1].pixels)
    with pytest.raises(IndexError, match="index 3 is not in"):
        PhotographSource(num_documents=3)[3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "test"}, r"split='test' is unknown.*train.*heldout"),
        ({"image_size": 0}, "image_size=0"),
        ({"largest_scale": 0.5}, "largest_scale=0.5"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        PhotographSource(**changes)
    with pytest.raises(ValueError, match="photograph 'dog' is unknown"):
        photograph("dog")


def test_without_scikit_image_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install nextstep_jax\[photographs\]"):
        PhotographSource()
