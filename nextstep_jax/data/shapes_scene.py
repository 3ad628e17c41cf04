"""The built-in world, its physics: levels, objects, forbidden combinations, placement, rendering.

A scene is a handful of coloured shapes on a plain or softly shaded ground. It stands in for the
data categories of NextStep-1 (arXiv 2508.10711, section 3) on any machine without a download, and
its captions ask the questions of GenEval (arXiv 2310.11513). Some combinations of attributes
(`UNSEEN`) never occur in the training split, so that composition can be measured apart from recall.
The words live in `shapes_text.py`, the documents in `shapes.py`.

Units: coordinates and radii are shares of the image side; x grows to the right and y downwards;
angles are in degrees, clockwise. `radius` is that of the circle around the shape.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float, UInt8

_T = TypeVar("_T")

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "heart")
# At least 100 apart from each other in RGB and 80 from every ground, so that JPEG and blur keep
# them apart; all are colour words of GenEval.
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (208, 18, 34),
    "green": (24, 150, 56),
    "blue": (32, 70, 220),
    "yellow": (248, 224, 32),
    "purple": (124, 28, 168),
    "orange": (246, 126, 12),
    "pink": (250, 112, 190),
    "black": (16, 16, 20),
}
CATEGORIES: tuple[str, ...] = (
    "single_object",
    "two_object",
    "counting",
    "colors",
    "position",
    "color_attr",
)
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
MAX_TRIES = 10_000  # Redraws before giving up; the hardest draws need some tens.
GAP = 0.04  # Least distance between two objects' circles and to the border; ours.

# A combination is a tuple of strings: ("color_shape", color, shape), ("count", "3", shape),
# ("shapes", a, b) and ("colors", a, b) in alphabetical order for two things in one picture, and
# ("relation", a, "left of" or "above", b).
Combination = tuple[str, ...]
UNSEEN: frozenset[Combination] = frozenset(
    [
        ("color_shape", "green", "square"),
        ("color_shape", "purple", "circle"),
        ("color_shape", "yellow", "triangle"),
        ("color_shape", "red", "star"),
        ("color_shape", "blue", "cross"),
        ("color_shape", "orange", "heart"),
        ("color_shape", "pink", "heart"),
        ("color_shape", "black", "circle"),
        ("count", "2", "star"),
        ("count", "3", "circle"),
        ("count", "3", "heart"),
        ("count", "4", "square"),
        ("shapes", "square", "triangle"),
        ("shapes", "cross", "heart"),
        ("colors", "blue", "orange"),
        ("colors", "green", "purple"),
        ("colors", "black", "pink"),
        ("relation", "circle", "left of", "star"),
        ("relation", "star", "above", "square"),
        ("relation", "triangle", "left of", "circle"),
        ("relation", "heart", "above", "circle"),
        ("relation", "cross", "left of", "square"),
        ("relation", "star", "left of", "heart"),
    ]
)


@dataclasses.dataclass(frozen=True)
class Level:
    """How hard the world is. Every number here is ours.

    Attributes:
        name: Key in `LEVELS`; part of the random stream.
        shapes: Shapes that occur.
        colors: Colours that occur, keys of `PALETTE`.
        min_objects: Fewest objects of a scene.
        max_objects: Most objects of a scene.
        sizes: (name, least radius, greatest radius) of each size.
        backgrounds: Kinds of ground, of "plain" and "shaded".
        categories: Caption categories, of `CATEGORIES`, drawn with equal probability.
        spread: Greatest distance of an object's centre from the middle, along each axis.
        tilt: Greatest rotation, in degrees.
    """

    name: str
    shapes: tuple[str, ...]
    colors: tuple[str, ...]
    min_objects: int
    max_objects: int
    sizes: tuple[tuple[str, float, float], ...]
    backgrounds: tuple[str, ...]
    categories: tuple[str, ...]
    spread: float = 0.5
    tilt: float = 0.0


_EASY_COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
LEVELS: dict[str, Level] = {
    "easy": Level(
        name="easy",
        shapes=SHAPES[:4],
        colors=_EASY_COLORS,
        min_objects=1,
        max_objects=1,
        sizes=(("large", 0.28, 0.34),),
        backgrounds=("plain",),
        categories=("colors",),
        spread=0.1,
    ),
    "pairs": Level(
        name="pairs",
        shapes=SHAPES[:4],
        colors=_EASY_COLORS,
        min_objects=1,
        max_objects=2,
        sizes=(("large", 0.18, 0.22),),
        backgrounds=("plain",),
        categories=("single_object", "two_object", "colors", "position", "color_attr"),
    ),
    "full": Level(
        name="full",
        shapes=SHAPES,
        colors=tuple(PALETTE),
        min_objects=1,
        max_objects=4,
        sizes=(("small", 0.13, 0.15), ("large", 0.19, 0.22)),
        backgrounds=("plain", "shaded"),
        categories=CATEGORIES,
        tilt=10.0,
    ),
}


def get_level(level: Level | str) -> Level:
    """The level of that name, or the level itself.

    Raises:
        ValueError: The name is not in `LEVELS`.
    """
    if isinstance(level, Level):
        return level
    if level not in LEVELS:
        raise ValueError(f"level: {level!r} is not one of {', '.join(LEVELS)}")
    return LEVELS[level]


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One coloured shape; units at the head of this file."""

    shape: str
    color: str
    size_name: str
    x: float
    y: float
    radius: float
    angle: float


@dataclasses.dataclass(frozen=True)
class Background:
    """A ground that runs linearly from `start` to `end` (equal when plain) along `angle`."""

    kind: str
    start: tuple[int, int, int]
    end: tuple[int, int, int]
    angle: float


# Combinations and relations


def relations(a: SceneObject, b: SceneObject) -> tuple[str, ...]:
    """Where `a` lies as seen from `b`: every relation within 60 degrees of the offset.

    GenEval accepts an offset whose share along the axis exceeds one half, after it takes off a
    tenth of both boxes; without that reduction this is a superset of what GenEval accepts.
    """
    dx, dy = a.x - b.x, a.y - b.y
    half = 0.5 * math.hypot(dx, dy)
    holds = (dx < -half, dx > half, dy < -half, dy > half)
    return tuple(name for name, true in zip(RELATIONS, holds, strict=True) if true)


def relation_combination(a: str, relation: str, b: str) -> Combination:
    """The combination of "shape a is `relation` shape b", in its one canonical direction."""
    if relation in ("right of", "below"):
        a, b, relation = b, a, {"right of": "left of", "below": "above"}[relation]
    return ("relation", a, relation, b)


def pair_combination(name: str, a: str, b: str) -> Combination:
    """The combination ("shapes" or "colors") of two words in one picture, in one order."""
    return (name, *sorted((a, b)))


def combinations(objects: Sequence[SceneObject]) -> set[Combination]:
    """Every combination that a picture of these objects contains."""
    found: set[Combination] = {("color_shape", item.color, item.shape) for item in objects}
    shapes = [item.shape for item in objects]
    found |= {("count", str(shapes.count(s)), s) for s in set(shapes) if shapes.count(s) > 1}
    for a, b in itertools.combinations(objects, 2):
        if a.color != b.color:
            found.add(pair_combination("colors", a.color, b.color))
        if a.shape != b.shape:
            found.add(pair_combination("shapes", a.shape, b.shape))
            found |= {relation_combination(a.shape, r, b.shape) for r in relations(a, b)}
    return found


# Drawing at random


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A python float, uniform in [low, high)."""
    return low + (high - low) * float(rng.random())


def choice(rng: np.random.Generator, items: Sequence[_T]) -> _T:
    """One item, uniformly; several times faster than `Generator.choice`."""
    return items[int(rng.integers(len(items)))]


def draw_background(rng: np.random.Generator, level: Level) -> Background:
    """A light or grey ground, nearly neutral, far from every colour of the palette."""
    kind = choice(rng, level.backgrounds)
    tint = rng.integers(-6, 7, size=3)
    gray = int(rng.integers(176, 245))
    # The far end of a shaded ground differs by 25 to 60 grey levels, back into the allowed range.
    step = int(rng.integers(25, 61)) if kind == "shaded" else 0
    other = gray + step if gray + step <= 244 else gray - step
    start, end = (tuple(int(v) for v in np.clip(g + tint, 0, 255)) for g in (gray, other))
    return Background(kind, start, end, uniform(rng, 0.0, 360.0) if step else 0.0)


def place(
    rng: np.random.Generator,
    level: Level,
    radii: Sequence[float],
    taken: Sequence[SceneObject] = (),
) -> list[tuple[float, float]] | None:
    """Centres for new circles, clear of `taken`, of each other and of the border.

    Returns:
        One (x, y) for each radius, or None where 30 tries an object were not enough.
    """
    circles = [(item.x, item.y, item.radius) for item in taken]
    for radius in radii:
        margin = radius + GAP
        low = max(margin, 0.5 - level.spread)
        width = min(1.0 - margin, 0.5 + level.spread) - low
        for u, v in rng.random((30, 2)).tolist():
            x, y = low + width * u, low + width * v
            if all(math.hypot(x - a, y - b) >= radius + r + GAP for a, b, r in circles):
                circles.append((x, y, radius))
                break
        else:
            return None
    return [(x, y) for x, y, _ in circles[len(taken) :]]


def draw_objects(
    rng: np.random.Generator,
    level: Level,
    looks: Sequence[tuple[str, str]],
    taken: Sequence[SceneObject] = (),
) -> tuple[SceneObject, ...] | None:
    """Objects of the given (color, shape) with random sizes, tilts and free places, or None."""
    sizes = [choice(rng, level.sizes) for _ in looks]
    radii = [uniform(rng, low, high) for _, low, high in sizes]
    centers = place(rng, level, radii, taken)
    if centers is None:
        return None
    return tuple(
        SceneObject(shape, color, size[0], x, y, radius, uniform(rng, -level.tilt, level.tilt))
        for (color, shape), size, radius, (x, y) in zip(looks, sizes, radii, centers, strict=True)
    )


# Rendering

# Star: the line from an outer point (1, 0) to the next inner one, at ratio 0.45 and 36 degrees.
_STAR = (0.45 * math.cos(math.pi / 5) - 1.0, 0.45 * math.sin(math.pi / 5))
_STAR_NORMAL = (_STAR[1] / math.hypot(*_STAR), -_STAR[0] / math.hypot(*_STAR))
_CROSS_WIDTH = 0.32  # Half the width of an arm.
# Half the side of the heart's square, which lets its lower tip touch the unit circle, and the drop
# (in these units) that puts its centroid at the origin: the discs pull it up by 0.295.
_HEART, _HEART_DROP = 0.539, 0.441


def signed_distance(
    shape: str, u: Float[np.ndarray, "height width"], v: Float[np.ndarray, "height width"]
) -> Float[np.ndarray, "height width"]:
    """Signed distance (negative inside) to a shape of circumscribed radius 1 at the origin.

    Exact along edges and a lower bound beyond convex corners, which is all anti-aliasing needs.

    Args:
        shape: One of `SHAPES`.
        u: Coordinates to the right, in radii.
        v: Coordinates downwards, in radii.

    Raises:
        ValueError: The shape is unknown.
    """
    if shape == "circle":
        return np.hypot(u, v) - 0.88  # Smaller than the others' circle, to balance areas.
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - math.sqrt(0.5)
    if shape == "triangle":
        return np.maximum(v, math.sqrt(0.75) * np.abs(u) - 0.5 * v) - 0.5
    if shape == "star":
        # Fold the plane into one tenth; there the outline is a single line.
        sector = math.pi / 5
        angle = np.abs((np.arctan2(u, -v) + sector) % (2 * sector) - sector)
        r = np.hypot(u, v)
        return (r * np.cos(angle) - 1) * _STAR_NORMAL[0] + r * np.sin(angle) * _STAR_NORMAL[1]
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        length = math.sqrt(1 - _CROSS_WIDTH**2)
        upright = np.maximum(a - _CROSS_WIDTH, b - length)
        return np.minimum(upright, np.maximum(a - length, b - _CROSS_WIDTH))
    if shape == "heart":
        # A square on its corner with a disc on each of its two upper sides.
        a, b = np.abs(u), v - _HEART_DROP * _HEART
        square = (a + np.abs(b)) / math.sqrt(2) - _HEART
        shift = _HEART / math.sqrt(2)
        return np.minimum(square, np.hypot(a - shift, b + shift) - _HEART)
    raise ValueError(f"shape: {shape!r} is not one of {', '.join(SHAPES)}")


def render_objects(
    objects: Sequence[SceneObject], background: Background, image_size: int
) -> UInt8[np.ndarray, "height width 3"]:
    """Draws objects on a ground with anti-aliased edges one pixel wide.

    Raises:
        ValueError: The size is not a multiple of 16 of at least 32.
    """
    if image_size < 32 or image_size % 16:
        raise ValueError(f"image_size: {image_size} is not a multiple of 16 of at least 32")
    axis = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size
    canvas = np.empty((image_size, image_size, 3), np.float32)
    canvas[:] = background.start
    if background.start != background.end:
        c, s = (f(math.radians(background.angle)) for f in (math.cos, math.sin))
        ramp = ((axis - 0.5) * c + (axis[:, None] - 0.5) * s) / (abs(c) + abs(s)) + 0.5
        canvas += ramp[..., None] * np.subtract(background.end, background.start, dtype=np.float32)
    for item in objects:
        # Only the pixels around the object: 0.02 covers the blurred edge at every size.
        reach = item.radius + 0.02 + 1 / image_size
        rows, cols = (
            slice(max(0, int((at - reach) * image_size)), int((at + reach) * image_size) + 1)
            for at in (item.y, item.x)
        )
        dx, dy = (axis[cols] - item.x) / item.radius, (axis[rows] - item.y)[:, None] / item.radius
        c, s = (f(math.radians(item.angle)) for f in (math.cos, math.sin))
        distance = signed_distance(item.shape, c * dx + s * dy, c * dy - s * dx)
        coverage = np.clip(0.5 - distance * (item.radius * image_size), 0, 1)[..., None]
        patch = canvas[rows, cols]
        patch += coverage * (np.asarray(PALETTE[item.color], np.float32) - patch)
    return (canvas + 0.5).astype(np.uint8)
