"""The built-in world, its words: captions, claims, edit instructions, stories and facts.

Captions belong to GenEval's six categories (arXiv 2310.11513) and each comes with its claim in the
form of GenEval's metadata: what must hold of a picture for the caption to be obeyed. Every sentence
made here is true of the picture (or, for text documents, of the world) that it stands beside.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nextstep_jax.data import shapes_scene
from nextstep_jax.data.shapes_scene import Combination, Level, SceneObject, choice

Claim = dict[str, Any]
NUMBERS: tuple[str, ...] = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


# Words


def with_article(noun: str) -> str:
    """The noun with "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """The noun's plural."""
    return noun + ("es" if noun.endswith("s") else "s")


def quantity(number: int, noun: str) -> str:
    """E.g. "one star", "three red crosses"."""
    return f"{NUMBERS[number]} {noun if number == 1 else plural(noun)}"


def listing(items: Sequence[str]) -> str:
    """E.g. "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def noun_of(entry: Mapping[str, Any]) -> str:
    """The noun of an entry of a claim, with its colour where the claim states one."""
    return f"{entry['color']} {entry['class']}" if "color" in entry else entry["class"]


# Captions

_FRAMES = (
    "{x}",
    "{x}",
    "{x}",
    "a picture of {x}",
    "an image of {x}",
    "a drawing of {x}",
    "an illustration of {x}",
    "a simple picture of {x}",
    "a picture showing {x}",
    "an image that shows {x}",
    "a scene with {x}",
    "a picture with {x} in it",
    "an image containing {x}",
)
_SENTENCES = (
    "here is {x}",
    "the picture shows {x}",
    "this picture shows {x}",
    "the image contains {x}",
    "you can see {x}",
    "we see {x}",
)
_GROUNDS = {
    "plain": ("on a plain background", "against a plain background"),
    "shaded": ("on a shaded background", "against a softly shaded background"),
}
_SINGLE = ("{a}", "{a}", "one {n}", "a single {n}", "just one {n}")
_COLOR = (
    "{a}",
    "{a}",
    "one {n}",
    "a single {n}",
    "a {s} that is {c}",
    "a {s} in {c}",
    "a {s} coloured {c}",
    "{c_article}-coloured {s}",
)
_COUNT = ("{x}", "{x}", "exactly {x}", "a group of {x}", "a set of {x}")
_COUNT_MIXED = ("{x}", "{x}", "exactly {x}")
_TOGETHER = (
    "{x}",
    "{x}",
    "both {x}",
    "{a} with {b}",
    "{a} together with {b}",
    "{a} along with {b}",
)
_ATTRIBUTES = (*_TOGETHER, "{a_long} and {b_long}", "{a_in} and {b_in}")
_POSITIONS = {
    "left of": (
        "{a} left of {b}",
        "{a} to the left of {b}",
        "{a} on the left side of {b}",
        "{b} with {a} to its left",
        "{b} with {a} on its left",
    ),
    "right of": (
        "{a} right of {b}",
        "{a} to the right of {b}",
        "{a} on the right side of {b}",
        "{b} with {a} to its right",
        "{b} with {a} on its right",
    ),
    "above": (
        "{a} above {b}",
        "{a} over {b}",
        "{a} higher up than {b}",
        "{b} with {a} above it",
        "{b} with {a} over it",
    ),
    "below": (
        "{a} below {b}",
        "{a} under {b}",
        "{a} beneath {b}",
        "{a} underneath {b}",
        "{b} with {a} below it",
    ),
}


def _core(rng: np.random.Generator, tag: str, include: Sequence[Mapping[str, Any]]) -> str:
    """The noun phrase of a caption, without its frame."""
    nouns = [noun_of(entry) for entry in include]
    first = include[0]
    if tag == "single_object":
        return choice(rng, _SINGLE).format(a=with_article(nouns[0]), n=nouns[0])
    if tag == "colors":
        color, shape = first["color"], first["class"]
        words = {"c": color, "s": shape, "c_article": with_article(color)}
        return choice(rng, _COLOR).format(a=with_article(nouns[0]), n=nouns[0], **words)
    if tag == "counting":
        amounts = [quantity(e["count"], n) for e, n in zip(include, nouns, strict=True)]
        frames = _COUNT if len(amounts) == 1 else _COUNT_MIXED
        return choice(rng, frames).format(x=listing(amounts))
    named = [with_article(noun) for noun in nouns]
    if tag == "position":
        # GenEval's order: the entry that carries the position is named first in the caption.
        relation, target = include[1]["position"]
        return choice(rng, _POSITIONS[relation]).format(a=named[1], b=named[target])
    if len(named) > 2:
        return listing(named)
    words = {"x": listing(named), "a": named[0], "b": named[1]}
    if tag == "two_object":
        return choice(rng, _TOGETHER).format(**words)
    for key, entry in zip("ab", include, strict=True):
        words[f"{key}_long"] = f"a {entry['class']} that is {entry['color']}"
        words[f"{key}_in"] = f"a {entry['class']} in {entry['color']}"
    return choice(rng, _ATTRIBUTES).format(**words)


def caption(
    rng: np.random.Generator, tag: str, include: Sequence[Mapping[str, Any]], ground: str
) -> str:
    """A caption for a claim: a phrase (mostly) or a sentence, at times with the ground."""
    core = _core(rng, tag, include)
    kind = float(rng.random())
    if kind < 0.25:
        core = choice(rng, _SENTENCES).format(x=core)
    else:
        core = choice(rng, _FRAMES).format(x=core)
    if rng.random() < 0.1:
        core = f"{core} {choice(rng, _GROUNDS[ground])}"
    return sentence(core) if kind < 0.25 else core


def make_claim(
    tag: str,
    include: Sequence[Mapping[str, Any]],
    prompt: str,
    exclude: Sequence[Mapping[str, Any]] = (),
) -> Claim:
    """A claim in the form of GenEval's metadata; `exclude` is left out where empty."""
    claim: Claim = {"tag": tag, "include": [dict(entry) for entry in include], "prompt": prompt}
    if exclude:
        claim["exclude"] = [dict(entry) for entry in exclude]
    return claim


def claim_combinations(claim: Mapping[str, Any]) -> set[Combination]:
    """Every combination that the words of a claim name, a subset of its pictures' ones."""
    entries = claim["include"]
    found: set[Combination] = set()
    for entry in entries:
        if "color" in entry:
            found.add(("color_shape", entry["color"], entry["class"]))
        if "position" in entry:
            relation, target = entry["position"]
            a, b = entry["class"], entries[target]["class"]
            found.add(shapes_scene.relation_combination(a, relation, b))
    counts: dict[str, int] = {}
    for entry in entries:
        counts[entry["class"]] = counts.get(entry["class"], 0) + entry["count"]
    found |= {("count", str(n), shape) for shape, n in counts.items() if n > 1}
    for key, name in (("class", "shapes"), ("color", "colors")):
        words = sorted({entry[key] for entry in entries if key in entry})
        found |= {(name, a, b) for i, a in enumerate(words) for b in words[i + 1 :]}
    return found


# Edits and stories: the same five changes, as an instruction or as an event

_INSTRUCTIONS = {
    "recolor": (
        "recolour {it} to {color}",
        "make {it} {color}",
        "turn {it} {color}",
        "change the colour of {it} to {color}",
        "paint {it} {color}",
    ),
    "replace": (
        "replace {it} with {new}",
        "change {it} into {new}",
        "turn {it} into {new}",
        "swap {it} for {new}",
    ),
    "move": (
        "move {it} {where}",
        "shift {it} {where}",
        "put {it} {where}",
    ),
    "remove": ("remove {it}", "delete {it}", "take {it} away", "erase {it}"),
    "add": ("add {new}{where}", "draw {new}{where}", "put {new} into the picture{where}"),
}
_EVENTS = {
    "recolor": ("{it} turns {color}", "{it} becomes {color}", "{it} changes its colour to {color}"),
    "replace": ("{it} turns into {new}", "{it} becomes {new}", "{it} is replaced by {new}"),
    "move": ("{it} moves {where}", "{it} goes {where}", "{it} is moved {where}"),
    "remove": ("{it} disappears", "{it} goes away", "{it} leaves the picture"),
    "add": ("{new} appears{where}", "{new} comes in{where}", "{new} is added{where}"),
}
_DIRECTIONS = {
    "left of": ("further to the left", "further left"),
    "right of": ("further to the right", "further right"),
    "above": ("further up", "higher up"),
    "below": ("further down", "lower down"),
}
_RELATIVE = {
    "left of": ("to the left of {b}", "left of {b}"),
    "right of": ("to the right of {b}", "right of {b}"),
    "above": ("above {b}", "over {b}"),
    "below": ("below {b}", "under {b}"),
}
_OPENINGS = (
    "first there is {x}",
    "at first we see {x}",
    "the story starts with {x}",
    "here is {x}",
)
_LINKS = ("then ", "next, ", "after that, ", "now ")


def reference(rng: np.random.Generator, item: SceneObject, objects: Sequence[SceneObject]) -> str:
    """A name for `item` that fits no other of the objects, with its colour where needed."""
    unique = sum(other.shape == item.shape for other in objects) == 1
    if unique and rng.random() < 0.5:
        return f"the {item.shape}"
    return f"the {item.color} {item.shape}"


def where(rng: np.random.Generator, relation: str, target: str | None) -> str:
    """A place relative to `target`, or a direction where there is none."""
    if target is None:
        return choice(rng, _DIRECTIONS[relation])
    return choice(rng, _RELATIVE[relation]).format(b=target)


def instruction(rng: np.random.Generator, change: str, words: Mapping[str, str]) -> str:
    """An order to make a change; in a third of the cases as a sentence."""
    text = choice(rng, _INSTRUCTIONS[change]).format(**words)
    return sentence(text) if rng.random() < 1 / 3 else text


def event(rng: np.random.Generator, change: str, words: Mapping[str, str], last: bool) -> str:
    """The sentence of a story in which a change happens."""
    link = "finally, " if last and rng.random() < 0.5 else choice(rng, _LINKS)
    return sentence(link + choice(rng, _EVENTS[change]).format(**words))


def opening(rng: np.random.Generator, objects: Sequence[SceneObject]) -> str:
    """The first sentence of a story, which names every object."""
    names = [with_article(f"{item.color} {item.shape}") for item in objects]
    return sentence(choice(rng, _OPENINGS).format(x=listing(names)))


# Facts for text documents. Each returns a sentence and the combinations that it mentions.

Fact = tuple[str, set[Combination]]
_CORNERS = {"square": 4, "triangle": 3}
_PROPERTIES = {
    "circle": ("a circle is round", "a circle has no corners", "a circle has no straight sides"),
    "square": ("a square has four equal sides", "a square has four corners"),
    "triangle": ("a triangle has three sides", "a triangle has three corners"),
    "star": ("a star has five points", "a star points in five directions"),
    "cross": ("a cross has four arms", "the arms of a cross meet in the middle"),
    "heart": ("a heart is round at the top", "a heart comes to a point at the bottom"),
}


def _property_fact(rng: np.random.Generator, level: Level) -> Fact:
    return choice(rng, _PROPERTIES[choice(rng, level.shapes)]), set()


def _color_fact(rng: np.random.Generator, level: Level) -> Fact:
    color, shape = choice(rng, level.colors), choice(rng, level.shapes)
    article = with_article(f"{color} {shape}")
    text = choice(
        rng,
        (
            f"{article} is a {shape} whose colour is {color}",
            f"a {shape} that is {color} is called {article}",
            f"if a picture shows {article}, then it shows a {shape}",
            f"if a picture shows {article}, then something in it is {color}",
        ),
    )
    return text, {("color_shape", color, shape)}


def _recolor_fact(rng: np.random.Generator, level: Level) -> Fact:
    old, new = (level.colors[i] for i in rng.permutation(len(level.colors))[:2])
    shape = choice(rng, level.shapes)
    text = f"{with_article(f'{old} {shape}')} that is painted {new} becomes "
    text += with_article(f"{new} {shape}")
    mentions = {("color_shape", c, shape) for c in (old, new)}
    return text, mentions | {shapes_scene.pair_combination("colors", old, new)}


def _relation_fact(rng: np.random.Generator, level: Level) -> Fact:
    a, b = (level.shapes[i] for i in rng.permutation(len(level.shapes))[:2])
    relation = choice(rng, shapes_scene.RELATIONS)
    there, back = relation, _OPPOSITE[relation]
    text = choice(
        rng,
        (
            f"if a {a} is {there} a {b}, then the {b} is {back} the {a}",
            f"when a {a} lies {there} a {b}, the {b} lies {back} the {a}",
        ),
    )
    pair = shapes_scene.pair_combination("shapes", a, b)
    return text, {pair, shapes_scene.relation_combination(a, relation, b)}


def _sum_fact(rng: np.random.Generator, level: Level) -> Fact:
    a, b = (level.shapes[i] for i in rng.permutation(len(level.shapes))[:2])
    m, n = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    text = f"{quantity(m, a)} and {quantity(n, b)} make {quantity(m + n, 'shape')}"
    counts = {("count", str(k), shape) for k, shape in ((m, a), (n, b)) if k > 1}
    return text, counts | {shapes_scene.pair_combination("shapes", a, b)}


def _corner_fact(rng: np.random.Generator, level: Level) -> Fact:
    del level
    shape, number = choice(rng, tuple(_CORNERS)), int(rng.integers(1, 3))
    verb = "has" if number == 1 else "have"
    text = f"{quantity(number, shape)} {verb} {quantity(number * _CORNERS[shape], 'corner')}"
    return text, ({("count", str(number), shape)} if number > 1 else set())


def _more_fact(rng: np.random.Generator, level: Level) -> Fact:
    shape, number = choice(rng, level.shapes), int(rng.integers(1, 4))
    more, fewer = quantity(number + 1, shape), quantity(number, shape)
    text = choice(rng, (f"{more} are more than {fewer}", f"{fewer} and one more make {more}"))
    return text, {("count", str(k), shape) for k in (number, number + 1) if k > 1}


_FACTS = (
    _property_fact,
    _color_fact,
    _recolor_fact,
    _relation_fact,
    _sum_fact,
    _corner_fact,
    _more_fact,
)


def paragraph(
    rng: np.random.Generator, level: Level, forbidden: frozenset[Combination]
) -> tuple[str, set[Combination]]:
    """Three to six facts in plain English, none of which mentions a forbidden combination.

    Returns:
        The text, and all combinations that it mentions.
    """
    texts: list[str] = []
    mentions: set[Combination] = set()
    number = int(rng.integers(3, 7))
    while len(texts) < number:
        text, found = choice(rng, _FACTS)(rng, level)
        if forbidden.isdisjoint(found) and sentence(text) not in texts:
            texts.append(sentence(text))
            mentions |= found
    return " ".join(texts), mentions
