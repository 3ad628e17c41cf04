"""The built-in world, its changes: what edits (one change) and stories (several) are made of.

A change takes one picture's objects to the next one's and carries the words that tell it; it
serves as an instruction for an edit pair and as an event of an interleaved story, the two kinds of
data of NextStep-1 (arXiv 2508.10711, section 3) with more than one image. In every picture colour
and shape together name each object uniquely, so that the words can only mean one thing.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from nextstep_jax.data import shapes_text
from nextstep_jax.data.shapes_scene import (
    GAP,
    MAX_TRIES,
    RELATIONS,
    Combination,
    Level,
    SceneObject,
    choice,
    combinations,
    draw_objects,
    relations,
    uniform,
)
from nextstep_jax.data.shapes_text import Claim, reference, where, with_article

CHANGES: tuple[str, ...] = ("recolor", "replace", "move", "remove", "add")
_MIN_MOVE = 0.2  # Least distance of a move in one direction; ours.


@dataclasses.dataclass(frozen=True)
class Change:
    """One change of a picture.

    Attributes:
        kind: One of `CHANGES`.
        objects: The objects after it.
        words: What `shapes_text.instruction` and `shapes_text.event` fill into their sentences.
        position: (relation, index of the object, index of its landmark), where one is told.
    """

    kind: str
    objects: tuple[SceneObject, ...]
    words: dict[str, str]
    position: tuple[str, int, int] | None = None


def clearly(relation: str, a: SceneObject, b: SceneObject) -> bool:
    """Whether a lies in that relation to b, within 34 degrees of the relation's axis."""
    along, across = abs(a.x - b.x), abs(a.y - b.y)
    if relation in ("above", "below"):
        along, across = across, along
    return relation in relations(a, b) and along >= 1.5 * across


def _alter(
    rng: np.random.Generator, level: Level, objects: tuple[SceneObject, ...], index: int, kind: str
) -> Change | None:
    """Gives one object another colour or another shape."""
    field, values = {"recolor": ("color", level.colors), "replace": ("shape", level.shapes)}[kind]
    item, value = objects[index], choice(rng, values)
    if value == getattr(item, field):
        return None
    words = {"it": reference(rng, item, objects)}
    item = dataclasses.replace(item, **{field: value})
    words |= {"color": item.color, "new": with_article(f"{item.color} {item.shape}")}
    return Change(kind, (*objects[:index], item, *objects[index + 1 :]), words)


def _remove(
    rng: np.random.Generator, objects: tuple[SceneObject, ...], index: int
) -> Change | None:
    """Takes one object away, unless it is the last."""
    words = {"it": reference(rng, objects[index], objects)}
    after = objects[:index] + objects[index + 1 :]
    return Change("remove", after, words) if after else None


def _add(
    rng: np.random.Generator, level: Level, objects: tuple[SceneObject, ...], index: int
) -> Change | None:
    """Adds an object, in half of the cases at a place told by the landmark `index`."""
    look = (choice(rng, level.colors), choice(rng, level.shapes))
    drawn = draw_objects(rng, level, [look], objects)
    if drawn is None or len(objects) >= level.max_objects:
        return None
    after = (*objects, *drawn)
    words = {"new": with_article(" ".join(look)), "where": ""}
    if rng.random() < 0.5:
        return Change("add", after, words)
    relation = choice(rng, RELATIONS)
    if not clearly(relation, after[-1], objects[index]):
        return None
    # The landmark's name must be clear in both pictures, so it is chosen among the later ones.
    words["where"] = " " + where(rng, relation, reference(rng, objects[index], after))
    return Change("add", after, words, (relation, len(objects), index))


def _move(
    rng: np.random.Generator, level: Level, objects: tuple[SceneObject, ...], index: int
) -> Change | None:
    """Moves an object further along one direction, or to a place told by a landmark."""
    item = objects[index]
    low, high = item.radius + GAP, 1 - item.radius - GAP
    if level.spread < 0.5:
        return None  # Objects of such a level have their place in the middle.
    x, y = uniform(rng, low, high), uniform(rng, low, high)
    landmark = int(rng.integers(len(objects)))
    relation = choice(rng, RELATIONS)
    if landmark == index:
        x, y = (x, item.y) if relation in ("left of", "right of") else (item.x, y)
    moved = dataclasses.replace(item, x=x, y=y)
    after = (*objects[:index], moved, *objects[index + 1 :])
    if any(
        math.hypot(x - other.x, y - other.y) < item.radius + other.radius + GAP
        for other in after
        if other is not moved
    ):
        return None
    words = {"it": reference(rng, item, objects)}
    if landmark == index:
        words["where"] = where(rng, relation, None)
        far = abs(x - item.x) + abs(y - item.y) >= _MIN_MOVE
        return Change("move", after, words) if far and clearly(relation, moved, item) else None
    there = relation in relations(item, objects[landmark])
    if there or not clearly(relation, moved, objects[landmark]):
        return None
    words["where"] = where(rng, relation, reference(rng, objects[landmark], objects))
    return Change("move", after, words, (relation, index, landmark))


def _draw_change(
    rng: np.random.Generator, level: Level, objects: tuple[SceneObject, ...], kind: str
) -> Change | None:
    """A random change of that kind, or None where the draw is impossible."""
    index = int(rng.integers(len(objects)))
    if kind in ("recolor", "replace"):
        return _alter(rng, level, objects, index, kind)
    if kind == "remove":
        return _remove(rng, objects, index)
    return {"add": _add, "move": _move}[kind](rng, level, objects, index)


def _distinct(objects: Sequence[SceneObject]) -> bool:
    """Whether colour and shape name every object uniquely."""
    return len({(item.color, item.shape) for item in objects}) == len(objects)


def _draw_start(
    rng: np.random.Generator, level: Level, forbidden: frozenset[Combination]
) -> tuple[SceneObject, ...]:
    """One to three distinct objects to begin with."""
    for _ in range(MAX_TRIES):
        number = int(rng.integers(level.min_objects, min(level.max_objects, 3) + 1))
        looks = [(choice(rng, level.colors), choice(rng, level.shapes)) for _ in range(number)]
        objects = draw_objects(rng, level, looks)
        if objects and _distinct(objects) and forbidden.isdisjoint(combinations(objects)):
            return objects
    raise RuntimeError(f"no start for level {level.name} in {MAX_TRIES} draws")


def _next_change(
    rng: np.random.Generator,
    level: Level,
    forbidden: frozenset[Combination],
    objects: tuple[SceneObject, ...],
) -> Change | None:
    """An allowed change, of kinds as evenly as the picture permits; None where none was found."""
    kinds = [kind for kind in CHANGES if kind != "move" or level.spread >= 0.5]
    kinds = [kind for kind in kinds if kind != "remove" or len(objects) > 1]
    kinds = [kind for kind in kinds if kind != "add" or len(objects) < level.max_objects]
    for kind in (kinds[i] for i in rng.permutation(len(kinds))):
        for _ in range(60):
            change = _draw_change(rng, level, objects, kind)
            if (
                change is not None
                and _distinct(change.objects)
                and forbidden.isdisjoint(combinations(change.objects))
            ):
                return change
    return None


def draw_history(
    rng: np.random.Generator, level: Level, forbidden: frozenset[Combination], num_changes: int
) -> tuple[tuple[SceneObject, ...], list[Change]]:
    """A start and so many changes, each from the picture before it.

    Args:
        rng: The random stream.
        level: The level.
        forbidden: Combinations that no picture may contain.
        num_changes: Number of changes, at least 1.
    """
    for _ in range(MAX_TRIES):
        start = _draw_start(rng, level, forbidden)
        changes: list[Change] = []
        while len(changes) < num_changes:
            objects = changes[-1].objects if changes else start
            change = _next_change(rng, level, forbidden, objects)
            if change is None:
                break
            changes.append(change)
        else:
            return start, changes
    raise RuntimeError(f"no history of {num_changes} changes for level {level.name}")


def state_claim(
    objects: Sequence[SceneObject],
    prompt: str,
    change: Change | None = None,
    before: Sequence[SceneObject] = (),
) -> Claim:
    """The claim that a picture shows exactly these objects, and those it had before no longer.

    Args:
        objects: What the picture shows.
        prompt: The words that led to it.
        change: The change that led to it, whose told position enters the claim.
        before: The objects of the picture before it.
    """
    include = [{"class": o.shape, "count": 1, "color": o.color} for o in objects]
    tag = "colors" if len(objects) == 1 else "color_attr"
    if change is not None and change.kind in ("add", "remove"):
        tag = "counting"
    if change is not None and change.position is not None:
        relation, moved, landmark = change.position
        # An entry may refer to earlier ones only, so the moved object goes last.
        order = [i for i in range(len(include)) if i != moved] + [moved]
        include[moved]["position"] = [relation, order.index(landmark)]
        include = [include[i] for i in order]
        tag = "position"
    shapes = [item.shape for item in objects]
    names = dict.fromkeys(shapes + [item.shape for item in before])
    exclude = [{"class": name, "count": shapes.count(name) + 1} for name in names]
    return shapes_text.make_claim(tag, include, prompt, exclude)
