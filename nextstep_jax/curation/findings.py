"""What curation found out about a document, in the document's metadata.

    "curation": {
        "scores": {name: number},
        "hash": 16 hexadecimal digits,            of the hash that the config names
        "duplicates": {"group", "best", "quality"},
    }

All of it lies under one key, which the scoring pass replaces wholly. A source may have anything
there, as its metadata are data of strangers: what is not of this form counts as absent.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from nextstep_jax.data.schema import Document

KEY = "curation"


@dataclasses.dataclass(frozen=True)
class Membership:
    """The place of a document among its near-duplicates.

    Attributes:
        group: Index of the first document of the group in the source.
        best: Whether no other of the group is better, whatever the rules say.
        quality: The score that the best has most of; -inf without it.
    """

    group: int
    best: bool
    quality: float

    def as_dict(self) -> dict[str, Any]:
        """As JSON, which has no -inf."""
        quality = self.quality if math.isfinite(self.quality) else None
        return {"group": self.group, "best": self.best, "quality": quality}


@dataclasses.dataclass(frozen=True)
class Findings:
    """What is known of a document.

    Attributes:
        scores: By name.
        hash: The perceptual hash of its image, as hexadecimal digits.
        duplicates: Its place among its near-duplicates.
    """

    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    hash: str | None = None
    duplicates: Membership | None = None

    def on(self, document: Document) -> Document:
        """The document with these findings instead of all that were there."""
        found: dict[str, Any] = {"scores": dict(self.scores)}
        if self.hash is not None:
            found["hash"] = self.hash
        if self.duplicates is not None:
            found["duplicates"] = self.duplicates.as_dict()
        return dataclasses.replace(document, metadata={**document.metadata, KEY: found})


def findings_of(document: Document) -> Findings:
    """What a document says of itself; nothing raises, whatever is there."""
    found = _mapping(document.metadata.get(KEY))
    scores = {
        name: value for name, value in _mapping(found.get("scores")).items() if _is_number(value)
    }
    number = found.get("hash")
    member = _mapping(found.get("duplicates"))
    group, best, quality = (member.get(name) for name in ("group", "best", "quality"))
    duplicates = None
    if type(group) is int and type(best) is bool:
        duplicates = Membership(group, best, float(quality) if _is_number(quality) else -math.inf)
    return Findings(scores, number if isinstance(number, str) else None, duplicates)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
