"""The checker of the built-in world: right on true pictures, and able to say no."""

import copy
import io
import math

import numpy as np
import PIL.Image
import pytest
from scipy import ndimage, stats

from nextstep_jax.data import shapes
from nextstep_jax.evaluation import scoring
from nextstep_jax.evaluation.shapes_checker import (
    DetectedObject,
    check_claim,
    read_scene,
    relative_position,
)

FULL = shapes.LEVELS["full"]


def jpeg(picture, quality=90):
    buffer = io.BytesIO()
    PIL.Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    return np.array(PIL.Image.open(buffer))


def looks(objects):
    return sorted((item.shape, item.color) for item in objects)


def is_right(picture, scene):
    """Every object's shape, colour and place is read, nothing else is, and the claim holds."""
    found = read_scene(picture)
    if looks(found) != looks(scene.objects) or not check_claim(found, scene.claim):
        return False
    return all(
        any(
            (a.shape, a.color) == (b.shape, b.color)
            and math.hypot(a.x - b.x, a.y - b.y) < 0.03
            and abs(a.radius - b.radius) < 0.15 * b.radius
            for a in found
        )
        for b in scene.objects
    )


def thing(shape, color, x, y, radius=0.1):
    return DetectedObject(shape, color, x, y, radius, 0.02, 1.0)


@pytest.fixture(scope="module")
def full_scenes():
    scenes = [shapes.make_scene(11, index, FULL, "heldout") for index in range(1000)]
    return scenes, [shapes.render(scene, 64) for scene in scenes]


def test_full_scenes_are_read_right_plain_and_after_jpeg(full_scenes):
    scenes, pictures = full_scenes
    plain = np.mean([is_right(p, s) for p, s in zip(pictures, scenes, strict=True)])
    assert plain >= 0.995
    packed = np.mean([is_right(jpeg(p), s) for p, s in zip(pictures, scenes, strict=True)])
    assert packed >= 0.99


@pytest.mark.parametrize(
    ("level", "size", "number"),
    [
        ("easy", 32, 250),
        ("easy", 64, 200),
        ("pairs", 64, 200),
        ("full", 128, 100),
        ("full", 256, 40),
    ],
)
def test_other_levels_and_sizes_are_read_right(level, size, number):
    scenes = [shapes.make_scene(12, i, shapes.LEVELS[level], "heldout") for i in range(number)]
    pictures = [shapes.render(scene, size) for scene in scenes]
    plain = [is_right(p, s) for p, s in zip(pictures, scenes, strict=True)]
    packed = [is_right(jpeg(p), s) for p, s in zip(pictures, scenes, strict=True)]
    assert np.mean(plain) >= 0.995
    assert np.mean(packed) >= 0.99


def test_blurry_and_noisy_pictures_are_read(full_scenes):
    rng = np.random.default_rng(0)
    right = []
    for picture, scene in zip(full_scenes[1][:200], full_scenes[0], strict=False):
        soft = ndimage.gaussian_filter(picture.astype(float), (1, 1, 0))
        soft += 8 * rng.normal(size=soft.shape)
        right.append(looks(read_scene(soft.clip(0, 255).astype(np.uint8))) == looks(scene.objects))
    assert np.mean(right) >= 0.98


def wrong_claims(scene):
    """Claims that are false of the scene by construction, each with what was made wrong."""
    objects, claim = scene.objects, scene.claim
    absent = [shape for shape in shapes.SHAPES if shape not in {o.shape for o in objects}]
    for place, entry in enumerate(claim["include"]):
        wrong = copy.deepcopy(claim)
        wrong["include"][place]["class"] = absent[0]
        yield "shape", wrong
        if "color" in entry:
            wrong = copy.deepcopy(claim)
            present = {o.color for o in objects if o.shape == entry["class"]}
            wrong["include"][place]["color"] = next(c for c in shapes.PALETTE if c not in present)
            yield "color", wrong
        if claim["tag"] == "counting":
            for change in (-1, 1):
                wrong = copy.deepcopy(claim)
                wrong.pop("exclude")
                wrong["include"][place]["count"] += change
                if wrong["include"][place]["count"] > 0:
                    yield "count", wrong
        if "position" in entry:
            for relation in shapes.RELATIONS:
                wrong = copy.deepcopy(claim)
                wrong["include"][place]["position"][0] = relation
                if relation != entry["position"][0]:
                    yield "position", wrong
            wrong = copy.deepcopy(claim)
            a, b = wrong["include"]
            a["class"], b["class"] = b["class"], a["class"]
            yield "swapped position", wrong
    if claim["tag"] == "color_attr":
        wrong = copy.deepcopy(claim)
        a, b = wrong["include"][:2]
        a["color"], b["color"] = b["color"], a["color"]
        yield "swapped colors", wrong


def test_wrong_claims_are_refused(full_scenes):
    refused = {}
    for scene, picture in zip(full_scenes[0][:500], full_scenes[1], strict=False):
        objects = read_scene(jpeg(picture))
        for kind, claim in wrong_claims(scene):
            refused.setdefault(kind, []).append(not check_claim(objects, claim))
    assert set(refused) == {
        "shape", "color", "count", "position", "swapped position", "swapped colors"
    }  # fmt: skip
    for kind, flags in refused.items():
        assert len(flags) > 50 and np.mean(flags) >= 0.99, (kind, len(flags), np.mean(flags))


def test_chance_on_the_easy_level_is_one_in_24():
    level = shapes.LEVELS["easy"]
    chosen, counts = [], {}
    for index in range(600):
        scene = shapes.make_scene(13, index, level, "heldout")
        key = (scene.objects[0].color, scene.objects[0].shape)
        if counts.get(key, 0) < 5:
            counts[key] = counts.get(key, 0) + 1
            chosen.append(scene)
    assert list(counts.values()) == [5] * 24
    found = [read_scene(shapes.render(scene, 32)) for scene in chosen]
    holds = np.array([[check_claim(objects, s.claim) for s in chosen] for objects in found])
    assert holds.diagonal().all()
    rng = np.random.default_rng(0)
    means = [holds[np.arange(120), rng.permutation(120)].mean() for _ in range(400)]
    # One permutation deviates by 0.018, the mean of 400 by 0.0009.
    assert np.mean(means) == pytest.approx(1 / 24, abs=0.003)


def test_pictures_without_objects_hold_no_claim():
    rng = np.random.default_rng(1)
    claims = shapes.heldout_prompts("easy", 24, seed=0)
    blank = [np.full((32, 32, 3), 200, np.uint8)] * 24
    noise = rng.integers(0, 256, (24, 32, 32, 3)).astype(np.uint8)
    assert read_scene(blank[0]) == []
    assert scoring.score(blank, claims).accuracy == 0
    assert scoring.score(noise, claims).accuracy == 0


def test_shapes_beyond_the_world_are_unknown():
    y, x = np.mgrid[0:64, 0:64]
    picture = np.full((64, 64, 3), 230, np.uint8)
    picture[(abs(x - 32) < 28) & (abs(y - 32) < 4)] = shapes.PALETTE["red"]  # A bar.
    assert [(o.shape, o.color) for o in read_scene(picture)] == [("unknown", "red")]
    picture = np.full((64, 64, 3), 230, np.uint8)
    picture[np.hypot(x - 32, y - 32) < 14] = (120, 130, 90)  # Olive is not in the palette.
    assert [(o.shape, o.color) for o in read_scene(picture)] == [("circle", "unknown")]


def test_touching_objects_of_two_colors_are_two():
    picture = np.full((64, 64, 3), 220, np.uint8)
    picture[20:44, 8:32] = shapes.PALETTE["red"]
    picture[20:44, 32:56] = shapes.PALETTE["blue"]
    found = read_scene(picture)
    assert sorted((o.shape, o.color) for o in found) == [("square", "blue"), ("square", "red")]
    left = next(o for o in found if o.color == "red")
    assert left.x == pytest.approx(20 / 64, abs=0.01) and left.y == pytest.approx(0.5, abs=0.01)
    assert left.area == pytest.approx((24 / 64) ** 2, rel=0.05)
    assert left.radius == pytest.approx(12 * math.sqrt(2) / 64, rel=0.05)


def test_genevals_semantics_by_hand():
    red, blue = thing("circle", "red", 0.2, 0.5), thing("square", "blue", 0.8, 0.5)
    other = thing("circle", "blue", 0.5, 0.9)

    def holds(tag, include, objects, **more):
        return check_claim(objects, {"tag": tag, "include": include, **more})

    one = {"class": "circle", "count": 1}
    assert holds("single_object", [one], [red, blue])
    assert holds("single_object", [one], [red, other])  # More than asked for is no fault,
    assert not holds("counting", [one], [red, other])  # unless the claim counts.
    assert holds("counting", [{"class": "circle", "count": 2}], [red, other, blue])
    assert not holds("single_object", [one], [red], exclude=[{"class": "circle", "count": 1}])
    assert holds("colors", [{**one, "color": "blue"}], [red, other])
    assert not holds("colors", [{**one, "color": "blue"}], [red, blue])
    # One object cannot serve two entries; two circles of different colours can.
    both = [{**one, "color": "red"}, {**one, "color": "blue"}]
    assert holds("color_attr", both, [other, red]) and not holds("color_attr", both, [red, blue])
    square = {"class": "square", "count": 1}
    for relation, expected in (("left of", True), ("right of", False), ("above", False)):
        include = [square, {**one, "position": [relation, 0]}]
        assert holds("position", include, [red, blue]) is expected
    # Offset (0.3, 0.3) less 0.1 * (0.2 + 0.2) is 0.26, over half of 0.424: both relations hold.
    assert relative_position(thing("heart", "red", 0.5, 0.5), thing("star", "red", 0.2, 0.2)) == {
        "right of",
        "below",
    }
    # Offset 0.07 less 0.04 is 0.03, under half of 0.07: GenEval sees no relation.
    assert relative_position(thing("heart", "red", 0.27, 0.2), red.__class__(
        "star", "red", 0.2, 0.2, 0.1, 0.02, 1.0
    )) == set()  # fmt: skip


@pytest.mark.parametrize("kind", ["edit", "interleaved"])
def test_edits_and_stories_hold_their_claims(kind):
    held = moved = 0
    total = 0
    source = shapes.ShapesSource(kind, "full", "heldout", image_size=64)
    for index in range(120):
        document = source[index]
        claims = document.metadata["claims"]
        found = [read_scene(image.pixels) for image in document.images]
        held += sum(check_claim(f, c) for f, c in zip(found, claims, strict=True))
        total += len(claims)
        # The picture before a change does not hold the claim after it, except for moves that are
        # told by a direction alone.
        for before, claim in zip(found, claims[1:], strict=False):
            further = any(word in claim["prompt"] for word in ("further", "higher up", "lower"))
            moved += further
            assert further or not check_claim(before, claim), (document.id, claim)
    assert held / total >= 0.995
    assert moved > 5


def test_wilson_intervals_are_scipys():
    for correct, total in ((0, 10), (1, 24), (60, 100), (299, 300), (7, 7)):
        expected = stats.binomtest(correct, total).proportion_ci(0.95, method="wilson")
        np.testing.assert_allclose(
            scoring.wilson_interval(correct, total), (expected.low, expected.high), atol=1e-12
        )
    assert scoring.wilson_interval(0, 0) == (0.0, 1.0)


def test_report_by_hand():
    tags = ["counting"] * 4 + ["colors"] * 2
    report = scoring.make_report(
        [True, False, False, False, True, True], tags, [True, True, False, False, False, False]
    )
    assert report.overall == pytest.approx((0.25 + 1.0) / 2)
    assert report.accuracy == pytest.approx(0.5)
    assert list(report.per_category) == ["counting", "colors"]
    assert report.per_category["counting"][:3] == (1, 4, 0.25)
    assert report.unseen[:3] == (1, 2, 0.5) and report.seen[:3] == (2, 4, 0.5)
    values = report.as_dict()
    assert values["per_category"]["colors"]["correct"] == 2
    assert values["unseen"]["total"] == 2 and values["overall"] == report.overall
    lines = str(report).splitlines()
    assert lines[1].split()[:3] == ["counting", "1/4", "25.0"]
    assert lines[-1].split()[:2] == ["overall", "62.5"]
    with pytest.raises(ValueError, match="tag"):
        scoring.make_report([True], ["size"])
    with pytest.raises(ValueError, match="score"):
        scoring.make_report([], [])


def test_score_of_true_pictures_is_one():
    scenes = [shapes.make_scene(14, index, FULL, "heldout") for index in range(120)]
    pictures = np.stack([shapes.render(scene, 64) for scene in scenes])
    claims = [scene.claim for scene in scenes]
    unseen = [shapes.claim_is_unseen(claim) for claim in claims]
    report = scoring.score(pictures, claims, unseen)
    assert set(report.per_category) == set(shapes.CATEGORIES)
    assert report.overall == report.accuracy == 1.0
    assert report.seen.total + report.unseen.total == 120 and report.unseen.total > 10
