"""What a curation does: its stages and its rules, as dataclasses that own the defaults.

NextStep-1 (arXiv 2508.10711, section 3) names what its images were filtered and recaptioned by,
and no numbers: all values here are ours.

A config gives stages by name; the type of a stage is its name unless it says otherwise. Their
order is that of `STAGE_TYPES`, and among scorers that of their names:

    "stages": {
        "decode": {},
        "resolution": {},
        "clarity": {"side": 256},
        "taste": {"type": "scorer", "scorer": {"scorer": "my_scorers:Taste"}, "num_gpus": 1.0},
    }
"""

import dataclasses
import math
import urllib.parse
from collections.abc import Mapping
from typing import Any, Literal

from nextstep_jax.curation.duplicates import check_bands
from nextstep_jax.curation.measures import HASHES

DUPLICATES_RULE = "duplicates"


@dataclasses.dataclass(frozen=True)
class Decode:
    """Every image is decoded; a document with one that cannot be is left out, and listed.

    Needed before all other stages, which get pixels from it.
    """


@dataclasses.dataclass(frozen=True)
class Resolution:
    """Scores `min_side` and `pixels`, of a document's smallest image."""

    scores = ("min_side", "pixels")


@dataclasses.dataclass(frozen=True)
class Aspect:
    """Score `aspect`, of a document's most extreme image."""

    scores = ("aspect",)


@dataclasses.dataclass(frozen=True)
class Clarity:
    """Score `clarity`, of a document's least clear image (`measures.clarity`).

    Attributes:
        side: Longer side of the grey copy that is looked at.
    """

    side: int = 256
    scores = ("clarity",)

    def __post_init__(self):
        """Checks the side."""
        _at_least("clarity.side", self.side, 3)


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """Groups of near-duplicates over the whole set, by a perceptual hash of one image.

    Attributes:
        hash: "phash" or "dhash" (`curation/measures.py`).
        max_distance: Bits that two near-duplicates may differ by, of 64.
        matching_bands: 1 compares hashes that agree on one of max_distance + 1 bands; more is
            faster for sets of many millions and gives the same (`curation/duplicates.py`).
        keep_best_by: The score by which one of a group is best; the highest wins.
        image: Which image of a document: 0 the first, -1 the last, as in lists.
    """

    hash: str = "phash"
    max_distance: int = 4
    matching_bands: int = 1
    keep_best_by: str = "pixels"
    image: int = -1
    scores = ()

    def __post_init__(self):
        """Checks every field."""
        if self.hash not in HASHES:
            raise ValueError(f"duplicates.hash={self.hash!r}; choose from {sorted(HASHES)}")
        check_bands(self.max_distance, self.matching_bands)


@dataclasses.dataclass(frozen=True)
class Rating:
    """Scores by a `Scorer`, on actors: each a process that holds the scorer.

    Attributes:
        scorer: What `scorers.build_scorer` takes.
        num_actors: How many at least.
        max_actors: How many at most; None is num_actors.
        num_cpus: Share of a CPU that an actor reserves. Not exactly 1, which is what reading tasks
            reserve: Ray would fuse the two, and they would no longer run side by side.
        num_gpus: Share of a GPU; None is 1 for a scorer that wants an accelerator and 0 otherwise.
        resources: Of Ray's other resources, by name: {"TPU": 4}.
    """

    scorer: Mapping[str, Any]
    num_actors: int = 1
    max_actors: int | None = None
    num_cpus: float = 0.5
    num_gpus: float | None = None
    resources: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        """Checks the pool."""
        _at_least("num_actors", self.num_actors, 1)
        if self.max_actors is not None:
            _at_least("max_actors", self.max_actors, self.num_actors)
        if self.num_cpus <= 0 or self.num_cpus == 1:
            raise ValueError(f"num_cpus={self.num_cpus} must be above 0 and not exactly 1")


@dataclasses.dataclass(frozen=True)
class Recaption:
    """New captions for pairs, by a model behind an OpenAI-compatible endpoint.

    Attributes:
        url: Of the API, up to and without "/chat/completions".
        model: The model's name there.
        prompt: What it is asked; "{caption}" stands for the caption that is there.
        wording: The key in `Text.wordings` under which the new caption is kept.
        max_tokens: Of an answer.
        temperature: Of its sampling.
        max_side: Larger images are sent shrunk to this; None sends the file as it is.
        api_key_variable: The environment variable, on the machines that ask, with the key; None
            sends none. The key itself is written nowhere.
        cache: Folder of answers. None is "captions" in the output folder.
        num_actors: Processes that ask.
        concurrency: Requests in flight of each.
        requests_per_minute: Of all processes on one machine together; None is no limit.
        timeout: Seconds to wait for an answer.
        max_retries: Further attempts after 429, 408, 5xx, time-outs and broken connections.
        backoff: Seconds before the first retry, twice as many before the next and so on, times a
            random number in [0.5, 1.5); a longer Retry-After of the server counts.
        max_failed_fraction: Documents of a shard, at most, that may end without a new caption; more
            stop the run.
    """

    url: str
    model: str
    prompt: str = "Describe this image in one detailed sentence."
    wording: str = "recaption"
    max_tokens: int = 300
    temperature: float = 0.0
    max_side: int | None = 1024
    api_key_variable: str | None = None
    cache: str | None = None
    num_actors: int = 1
    concurrency: int = 8
    requests_per_minute: float | None = None
    timeout: float = 60.0
    max_retries: int = 6
    backoff: float = 1.0
    max_failed_fraction: float = 0.01
    scores = ()

    def __post_init__(self):
        """Checks every field."""
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"recaption.url={self.url!r} must be http://... or https://...")
        for name in ("model", "prompt", "wording"):
            if not getattr(self, name):
                raise ValueError(f"recaption.{name} must not be empty")
        for name in ("max_tokens", "num_actors", "concurrency"):
            _at_least(f"recaption.{name}", getattr(self, name), 1)
        _at_least("recaption.max_retries", self.max_retries, 0)
        if self.max_side is not None:
            _at_least("recaption.max_side", self.max_side, 32)
        for name in ("timeout", "requests_per_minute"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"recaption.{name}={value} must be positive")


Stage = Decode | Resolution | Aspect | Clarity | Duplicates | Rating | Recaption

STAGE_TYPES: dict[str, type] = {
    "decode": Decode,
    "resolution": Resolution,
    "aspect": Aspect,
    "clarity": Clarity,
    "duplicates": Duplicates,
    "scorer": Rating,
    "recaption": Recaption,
}

# How the work is done and where, which the result does not depend on.
_MACHINERY = {
    *("num_actors", "max_actors", "num_cpus", "num_gpus", "resources"),
    *("url", "api_key_variable", "cache", "concurrency", "requests_per_minute", "timeout"),
    *("max_retries", "backoff"),
}


@dataclasses.dataclass(frozen=True)
class CurationConfig:
    """The scoring pass.

    Attributes:
        stages: By name, in the order in which they are done.
        documents_per_shard: Documents of a shard, which is also what moves through the stages at
            a time: memory holds a few of them. The selecting pass makes shards of any size.
    """

    stages: Mapping[str, Stage]
    documents_per_shard: int = 256

    def __post_init__(self):
        """Checks that images are decoded first and that no stage stands twice that may not."""
        _at_least("documents_per_shard", self.documents_per_shard, 1)
        kinds = [type(stage) for stage in self.stages.values()]
        if not kinds or kinds[0] is not Decode:
            raise ValueError("stages: one named decode is needed, which the others build on")
        for kind in set(kinds) - {Rating, Recaption}:
            if kinds.count(kind) > 1:
                raise ValueError(f"stages: {kinds.count(kind)} of type {kind.__name__.lower()}")

    def of_type(self, kind: type) -> dict[str, Any]:
        """The stages of one type, by name."""
        return {name: stage for name, stage in self.stages.items() if isinstance(stage, kind)}

    def identity(self) -> dict[str, Any]:
        """What the result depends on, as JSON: two runs with the same make the same."""
        stages = [
            {
                "type": type(stage).__name__.lower(),
                **{k: v for k, v in dataclasses.asdict(stage).items() if k not in _MACHINERY},
            }
            for stage in self.stages.values()
        ]
        return {"stages": stages, "documents_per_shard": self.documents_per_shard}


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """The selecting pass: what is kept.

    Attributes:
        rules: By score, (smallest, largest) that is kept, both included; None is no limit.
        drop_duplicates: Whether of a group of near-duplicates only the best is kept.
        missing: Whether documents without a score, such as text, "keep" or "drop" by its rule.
        shard_bytes: About the size of the new shards, before the dropping.
        num_examples: Pictures of each kind in the report.
    """

    rules: Mapping[str, tuple[float | None, float | None]] = dataclasses.field(default_factory=dict)
    drop_duplicates: bool = True
    missing: Literal["keep", "drop"] = "keep"
    shard_bytes: int = 512 * 2**20
    num_examples: int = 8

    def __post_init__(self):
        """Checks every field but the limits, which `selection_config` does."""
        if DUPLICATES_RULE in self.rules:
            raise ValueError("select.rules.duplicates: this one is select.drop_duplicates")
        if self.missing not in ("keep", "drop"):
            raise ValueError(f"select.missing={self.missing!r}; choose from ['keep', 'drop']")
        _at_least("select.shard_bytes", self.shard_bytes, 1)
        _at_least("select.num_examples", self.num_examples, 0)


def _limits(name: str, limits: Any) -> tuple[float | None, float | None]:
    """The limits of a rule as numbers, or an error that names it."""
    wrong = f"select.rules.{name}={limits!r} must be (smallest, largest), numbers or None"
    if not isinstance(limits, tuple | list) or len(limits) != 2:
        raise ValueError(wrong)
    numbers = [n for n in limits if n is not None]
    if any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        raise ValueError(wrong)
    if any(math.isnan(n) for n in numbers) or (len(numbers) == 2 and numbers[0] > numbers[1]):
        raise ValueError(f"{wrong}, in this order")
    smallest, largest = (None if n is None else float(n) for n in limits)
    return smallest, largest


def curation_config(stages: Mapping[str, Any], **fields: Any) -> CurationConfig:
    """The scoring pass of plain values: stages by name, each a mapping of options.

    Raises:
        ValueError: Unknown types or options, or values that a stage refuses.
    """
    built, order = {}, list(STAGE_TYPES)
    # A ConfigDict sorts its keys, so that it cannot say an order.
    for name, options in stages.items():
        options = dict(options)
        kind = options.pop("type", name)
        if kind not in STAGE_TYPES:
            raise ValueError(f"stages.{name}: type {kind!r} is none of {sorted(STAGE_TYPES)}")
        built[name] = _build(STAGE_TYPES[kind], options, f"stages.{name}")
    places = {name: (order.index(dict(stages[name]).get("type", name)), name) for name in built}
    built = {name: built[name] for name in sorted(built, key=places.__getitem__)}
    return _build(CurationConfig, {"stages": built, **fields}, "config")


def selection_config(values: Mapping[str, Any]) -> SelectionConfig:
    """The selecting pass of plain values; rules are asked in the order of their names.

    Raises:
        ValueError: Unknown fields, or values out of range.
    """
    rules = dict(values.get("rules", {}))
    rules = {name: _limits(name, rules[name]) for name in sorted(rules)}
    return _build(SelectionConfig, {**values, "rules": rules}, "select")


def _build(cls: type, values: Mapping[str, Any], section: str) -> Any:
    """`cls(**values)` with an error that says what it takes."""
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{section}: unknown {unknown}; known are {known}")
    required = {f.name for f in dataclasses.fields(cls) if _is_required(f)}
    missing = sorted(required - set(values))
    if missing:
        raise ValueError(f"{section}: {missing} must be given")
    return cls(**values)


def _is_required(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _at_least(name: str, value: Any, smallest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
        raise ValueError(f"{name}={value!r} must be an integer of at least {smallest}")
