"""The built-in world: scenes by index, held-out prompts and a source of all four document kinds.

Everything here is a pure function of (seed, index, level, split, kind), so the world is infinite,
needs no download and resumes anywhere. It offers the four categories of data that NextStep-1 is
trained on (arXiv 2508.10711, section 3): text, captioned images, edits and interleaved stories.
The training split never shows or names a combination of `shapes_scene.UNSEEN`; the held-out split
draws from everything, in random streams of its own.
"""

import dataclasses
import operator
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, SupportsIndex

import numpy as np
from jaxtyping import UInt8

from nextstep_jax.data import shapes_text
from nextstep_jax.data.schema import KINDS, Document, Image, Kind, Text
from nextstep_jax.data.shapes_edits import draw_history, state_claim
from nextstep_jax.data.shapes_scene import (
    CATEGORIES,
    LEVELS,
    MAX_TRIES,
    PALETTE,
    RELATIONS,
    SHAPES,
    UNSEEN,
    Background,
    Combination,
    Level,
    SceneObject,
    choice,
    combinations,
    draw_background,
    draw_objects,
    get_level,
    render_objects,
    signed_distance,
)
from nextstep_jax.data.shapes_text import Claim

__all__ = [
    "CATEGORIES",
    "LEVELS",
    "PALETTE",
    "RELATIONS",
    "SHAPES",
    "SPLITS",
    "UNSEEN",
    "Background",
    "Claim",
    "Level",
    "Scene",
    "SceneObject",
    "ShapesSource",
    "claim_is_unseen",
    "combinations",
    "get_level",
    "heldout_prompts",
    "make_scene",
    "render",
    "scene_is_unseen",
    "signed_distance",
]

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects on a ground, with a caption and what the caption claims.

    Attributes:
        objects: The objects, the caption's first ones first.
        background: The ground.
        prompt: The caption.
        claim: GenEval's metadata: {"tag", "include", "prompt"} and, where something must be
            absent, "exclude".
    """

    objects: tuple[SceneObject, ...]
    background: Background
    prompt: str
    claim: Claim


def render(scene: Scene, image_size: int) -> UInt8[np.ndarray, "height width 3"]:
    """Draws a scene as a square picture.

    Raises:
        ValueError: The size is not a multiple of 16 of at least 32.
    """
    return render_objects(scene.objects, scene.background, image_size)


def scene_is_unseen(scene: Scene) -> bool:
    """Whether the picture contains a combination that the training split never shows."""
    return not UNSEEN.isdisjoint(combinations(scene.objects))


def claim_is_unseen(claim: Mapping[str, Any]) -> bool:
    """Whether the words of a claim name a combination that the training split never names."""
    return not UNSEEN.isdisjoint(shapes_text.claim_combinations(claim))


def _stream(name: str, seed: int, index: int, level: Level, split: str) -> np.random.Generator:
    """The random stream of one document; different names, levels and splits never share one."""
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    label = zlib.crc32(f"{name}/{level.name}/{split}".encode())
    return np.random.default_rng([label, seed, index])


def _forbidden(split: str) -> frozenset[Combination]:
    return UNSEEN if split == "train" else frozenset()


# Scenes


def _draw_include(rng: np.random.Generator, level: Level, tag: str) -> list[dict[str, Any]]:
    """What a caption of this category names; colours are still open where it names none."""
    shapes = [level.shapes[i] for i in rng.permutation(len(level.shapes))]
    colors = [level.colors[i] for i in rng.permutation(len(level.colors))]
    if tag == "single_object":
        return [{"class": shapes[0], "count": 1}]
    if tag == "colors":
        return [{"class": shapes[0], "count": 1, "color": colors[0]}]
    if tag == "two_object":
        return [{"class": shape, "count": 1} for shape in shapes[:2]]
    if tag == "position":
        relation = choice(rng, RELATIONS)
        return [
            {"class": shapes[0], "count": 1},
            {"class": shapes[1], "count": 1, "position": [relation, 0]},
        ]
    if tag == "counting":
        number = int(rng.integers(2, level.max_objects + 1))
        include: list[dict[str, Any]] = [{"class": shapes[0], "count": number}]
        if rng.random() < 0.3:
            include[0]["color"] = colors[0]
        if number < level.max_objects and rng.random() < 0.25:
            include.append({"class": shapes[1], "count": 1})
        return include
    number = 3 if level.max_objects > 2 and rng.random() < 0.25 else 2
    return [
        {"class": shape, "count": 1, "color": color}
        for shape, color in zip(shapes[:number], colors[:number], strict=True)
    ]


def _turn_to(
    objects: tuple[SceneObject, ...], relation: str, a: int, b: int
) -> tuple[SceneObject, ...] | None:
    """Mirrors or transposes the picture until a is clearly `relation` b; None if it is oblique."""
    dx, dy = objects[a].x - objects[b].x, objects[a].y - objects[b].y
    # 1.5: within 34 degrees of the axis, so that nobody would doubt the word; ours.
    if max(abs(dx), abs(dy)) < 1.5 * min(abs(dx), abs(dy)):
        return None
    horizontal = relation in ("left of", "right of")
    if horizontal != (abs(dx) > abs(dy)):
        objects = tuple(dataclasses.replace(item, x=item.y, y=item.x) for item in objects)
    axis = "x" if horizontal else "y"
    offset = getattr(objects[a], axis) - getattr(objects[b], axis)
    if (offset < 0) != (relation in ("left of", "above")):
        objects = tuple(
            dataclasses.replace(item, **{axis: 1 - getattr(item, axis)}) for item in objects
        )
    return objects


def _draw_scene(rng: np.random.Generator, level: Level, split: str, tag: str) -> Scene:
    """A scene of one category; redraws whole scenes, so that what is allowed stays uniform."""
    forbidden = _forbidden(split)
    for _ in range(MAX_TRIES):
        include = _draw_include(rng, level, tag)
        looks = []
        for entry in include:
            # Objects of a counted kind share a colour in half of the cases.
            same = choice(rng, level.colors)
            mixed = rng.random() < 0.5
            for _ in range(entry["count"]):
                color = choice(rng, level.colors) if mixed else same
                looks.append((entry.get("color", color), entry["class"]))
        if any(("color_shape", *look) in forbidden for look in looks):
            continue
        objects = draw_objects(rng, level, looks)
        if objects is not None and tag == "position":
            objects = _turn_to(objects, include[1]["position"][0], 1, 0)
        if objects is not None and forbidden.isdisjoint(combinations(objects)):
            break
    else:
        raise RuntimeError(f"no {tag} scene of level {level.name} in {MAX_TRIES} draws")
    background = draw_background(rng, level)
    prompt = shapes_text.caption(rng, tag, include, background.kind)
    exclude = [{"class": e["class"], "count": e["count"] + 1} for e in include]
    claim = shapes_text.make_claim(tag, include, prompt, exclude if tag == "counting" else ())
    return Scene(objects, background, prompt, claim)


def make_scene(seed: int, index: int, level: Level, split: Split) -> Scene:
    """The scene of that seed and index: a pure function of its arguments.

    Raises:
        ValueError: The split is unknown.
    """
    rng = _stream("scene", seed, index, level, split)
    return _draw_scene(rng, level, split, choice(rng, level.categories))


# Sides of the pictures in the experiments, if they name none: one object needs no more.
_IMAGE_SIZES = {"easy": 32, "pairs": 64, "full": 64}


def level_and_size(argument: str) -> tuple[str, int]:
    """The level and the side of the pictures of "full-32"; the side may be left out.

    Raises:
        ValueError: An unknown level, or a side that is no number.
    """
    name, _, size = argument.partition("-")
    get_level(name)
    if size and not size.isdigit():
        raise ValueError(f"image size {size!r} of {argument!r} is not a number of pixels")
    return name, int(size or _IMAGE_SIZES[name])


def heldout_prompts(level: Level | str, num: int, seed: int) -> list[Claim]:
    """Claims for an evaluation, from a stream of their own, evenly over the level's categories.

    Each carries its caption as "prompt" and "unseen": whether its words name a combination that
    was never trained.
    """
    level = get_level(level)
    claims = []
    for index in range(num):
        rng = _stream("prompts", seed, index, level, "heldout")
        tag = level.categories[index % len(level.categories)]
        claim = _draw_scene(rng, level, "heldout", tag).claim
        claims.append({**claim, "unseen": claim_is_unseen(claim)})
    return claims


# The source


@dataclasses.dataclass(frozen=True)
class ShapesSource:
    """A random-access source of documents of one kind, as Grain wants it.

    Attributes:
        kind: One of "text", "pair", "edit" and "interleaved".
        level: Key in `LEVELS`.
        split: "train" or "heldout".
        seed: Another seed is another world of the same laws.
        image_size: Side of the pictures, a multiple of 16 of at least 32.
        num_documents: Length; every index has its own document, so this costs nothing.

    A document's metadata holds "category", "unseen" (whether one of its pictures or facts contains
    a combination never trained), "claims" (one for each picture) and "scenes" (for each picture,
    its objects as dicts).
    """

    kind: Kind
    level: str = "full"
    split: Split = "train"
    seed: int = 0
    image_size: int = 64
    num_documents: int = 1_000_000

    def __post_init__(self):
        """Checks every field before any work."""
        get_level(self.level)
        for field, value, accepted in (("kind", self.kind, KINDS), ("split", self.split, SPLITS)):
            if value not in accepted:
                raise ValueError(f"{field}: {value!r} is not one of {', '.join(accepted)}")
        if self.image_size < 32 or self.image_size % 16:
            raise ValueError(
                f"image_size: {self.image_size} is not a multiple of 16 of at least 32"
            )
        if self.num_documents < 1:
            raise ValueError(f"num_documents: {self.num_documents} is not at least 1")

    def __len__(self) -> int:
        return self.num_documents

    def __getitem__(self, index: SupportsIndex) -> Document:
        """The document of that index, a pure function of the fields and the index.

        Raises:
            IndexError: The index is outside [0, num_documents).
        """
        index = operator.index(index)
        if not 0 <= index < self.num_documents:
            raise IndexError(f"index {index} of a source of {self.num_documents} documents")
        level = get_level(self.level)
        if self.kind == "pair":
            return self._pair(index, make_scene(self.seed, index, level, self.split))
        rng = _stream(self.kind, self.seed, index, level, self.split)
        if self.kind == "text":
            text, mentions = shapes_text.paragraph(rng, level, _forbidden(self.split))
            return self._document(index, [Text(text)], "text", [], [], mentions)
        return (
            self._edit(index, rng, level) if self.kind == "edit" else self._story(index, rng, level)
        )

    def _pair(self, index: int, scene: Scene) -> Document:
        parts = [Text(scene.prompt), Image(pixels=render(scene, self.image_size))]
        tag = scene.claim["tag"]
        return self._document(index, parts, tag, [scene.claim], [scene.objects], set())

    def _edit(self, index: int, rng: np.random.Generator, level: Level) -> Document:
        start, (change,) = draw_history(rng, level, _forbidden(self.split), 1)
        ground = draw_background(rng, level)
        order = shapes_text.instruction(rng, change.kind, change.words)
        source, target = (
            render_objects(objects, ground, self.image_size) for objects in (start, change.objects)
        )
        parts = [Image(pixels=source, loss=False), Text(order), Image(pixels=target)]
        claims = [
            state_claim(start, shapes_text.opening(rng, start), None),
            state_claim(change.objects, order, change, start),
        ]
        return self._document(index, parts, change.kind, claims, [start, change.objects], set())

    def _story(self, index: int, rng: np.random.Generator, level: Level) -> Document:
        number = int(rng.integers(1, 4))
        start, changes = draw_history(rng, level, _forbidden(self.split), number)
        ground = draw_background(rng, level)
        text = shapes_text.opening(rng, start)
        parts: list[Text | Image] = [Text(text)]
        parts.append(Image(pixels=render_objects(start, ground, self.image_size)))
        scenes, claims = [start], [state_claim(start, text, None)]
        for change in changes:
            text = shapes_text.event(rng, change.kind, change.words, change is changes[-1])
            parts.append(Text(text))
            parts.append(Image(pixels=render_objects(change.objects, ground, self.image_size)))
            claims.append(state_claim(change.objects, text, change, scenes[-1]))
            scenes.append(change.objects)
        return self._document(index, parts, "interleaved", claims, scenes, set())

    def _document(
        self,
        index: int,
        parts: Sequence[Text | Image],
        category: str,
        claims: list[Claim],
        scenes: Sequence[tuple[SceneObject, ...]],
        mentions: set[Combination],
    ) -> Document:
        found = mentions.union(*(combinations(objects) for objects in scenes))
        metadata = {
            "category": category,
            "unseen": not UNSEEN.isdisjoint(found),
            "claims": claims,
            "scenes": [[dataclasses.asdict(item) for item in objects] for objects in scenes],
        }
        return Document(
            parts=tuple(parts),
            id=f"shapes/{self.kind}/{self.split}/{index}",
            source=f"shapes/{self.level}",
            kind=self.kind,
            metadata=metadata,
        )
