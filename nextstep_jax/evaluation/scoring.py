"""Scores of a set of pictures against their claims, in GenEval's six categories.

As in GenEval (arXiv 2310.11513) the overall score is the mean of the categories' accuracies, so
that no category outweighs another; every share carries its 95% Wilson interval.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from nextstep_jax.data.shapes_scene import CATEGORIES
from nextstep_jax.evaluation.shapes_checker import check_claim

_Z = 1.959963984540054  # The 97.5% quantile of the normal distribution.


class Share(NamedTuple):
    """A share of right answers and its 95% Wilson interval."""

    correct: int
    total: int
    accuracy: float
    low: float
    high: float


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95% interval of a binomial share by Wilson's score; (0, 1) where nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    center = (share + _Z**2 / (2 * total)) / (1 + _Z**2 / total)
    spread = share * (1 - share) / total + _Z**2 / (4 * total**2)
    half = _Z * math.sqrt(spread) / (1 + _Z**2 / total)
    # At 0 and 1 the formula ends there exactly; rounding must not push it past.
    return max(0.0, center - half), min(1.0, center + half)


def share_of(flags: Sequence[bool]) -> Share:
    """The share of true flags with its interval; an accuracy of 0 where there are none."""
    correct, total = sum(flags), len(flags)
    return Share(correct, total, correct / max(total, 1), *wilson_interval(correct, total))


@dataclasses.dataclass(frozen=True)
class Report:
    """The scores of one evaluation.

    Attributes:
        overall: Mean of the accuracies of the categories present, as GenEval's overall score.
        micro: All pictures together, whatever their category.
        per_category: Each category present, in GenEval's order.
        seen: Pictures whose claims name only trained combinations, or None where not known.
        unseen: Pictures whose claims name a combination never trained, or None where not known.
    """

    overall: float
    micro: Share
    per_category: dict[str, Share]
    seen: Share | None = None
    unseen: Share | None = None

    @property
    def accuracy(self) -> float:
        """The share of all pictures that are right (the micro average)."""
        return self.micro.accuracy

    def as_dict(self) -> dict[str, Any]:
        """All scores as plain values, ready for JSON."""
        values: dict[str, Any] = {"overall": self.overall, "accuracy": self.accuracy}
        values["all"] = self.micro._asdict()
        values["per_category"] = {k: v._asdict() for k, v in self.per_category.items()}
        for name, share in (("seen", self.seen), ("unseen", self.unseen)):
            if share is not None:
                values[name] = share._asdict()
        return values

    def table(self) -> str:
        """The scores as a table of text: one line a category, in per cent."""
        lines = [f"{'':<15}{'right':>11}{'%':>8}   95% interval"]
        rows: dict[str, Share | None] = {**self.per_category, "all": self.micro}
        rows |= {"seen": self.seen, "unseen": self.unseen}
        for name, row in rows.items():
            if row is not None:
                counts = f"{row.correct}/{row.total}"
                interval = f"{100 * row.low:.1f} to {100 * row.high:.1f}"
                lines.append(f"{name:<15}{counts:>11}{100 * row.accuracy:>8.1f}   {interval}")
        lines.append(f"{'overall':<15}{'':>11}{100 * self.overall:>8.1f}   mean of the categories")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def make_report(
    correct: Sequence[bool], tags: Sequence[str], unseen: Sequence[bool] | None = None
) -> Report:
    """Gathers right and wrong answers into a report.

    Args:
        correct: Whether each picture holds its claim.
        tags: The category of each claim.
        unseen: Whether each claim names a combination never trained.

    Raises:
        ValueError: Lengths differ, a category is unknown, or there is nothing to score.
    """
    lengths = {len(correct), len(tags), len(correct if unseen is None else unseen)}
    if len(lengths) != 1 or not len(correct):
        raise ValueError(f"score: need equally many pictures, claims and flags, got {lengths}")
    unknown = set(tags) - set(CATEGORIES)
    if unknown:
        raise ValueError(f"tag: {sorted(unknown)} not among {', '.join(CATEGORIES)}")
    per_category = {
        name: share_of([bool(c) for c, tag in zip(correct, tags, strict=True) if tag == name])
        for name in CATEGORIES
        if name in tags
    }
    split: list[Share | None] = [None, None]
    if unseen is not None:
        split = [
            share_of([bool(c) for c, u in zip(correct, unseen, strict=True) if bool(u) == flag])
            for flag in (False, True)
        ]
    overall = sum(share.accuracy for share in per_category.values()) / len(per_category)
    return Report(overall, share_of([bool(c) for c in correct]), per_category, *split)


def score(
    images: Sequence[UInt8[np.ndarray, "height width 3"]] | UInt8[np.ndarray, "n height width 3"],
    claims: Sequence[Mapping[str, Any]],
    unseen: Sequence[bool] | None = None,
) -> Report:
    """Checks every picture against its claim.

    Args:
        images: Pictures, in the order of `claims`.
        claims: GenEval's metadata, as `data.shapes.heldout_prompts` makes it.
        unseen: Flags for scores apart; by default the claims' own "unseen", where all have it.

    Raises:
        ValueError: Lengths differ, a category is unknown, or there is nothing to score.
    """
    if len(images) != len(claims):
        raise ValueError(f"score: {len(images)} images for {len(claims)} claims")
    if unseen is None and claims and all("unseen" in claim for claim in claims):
        unseen = [bool(claim["unseen"]) for claim in claims]
    correct = [check_claim(image, claim) for image, claim in zip(images, claims, strict=True)]
    return make_report(correct, [claim["tag"] for claim in claims], unseen)
