"""Ours against recorded numbers: errors, tolerances, and the table of them."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Num, Shaped

# Relative errors that float32 arithmetic in another order explains. The normalised latent divides
# by standard deviations down to 0.06, and a generation feeds its errors back.
SINGLE_PASS, NORMALISED_LATENT, SAMPLED = 1e-5, 5e-5, 1e-4


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One recorded quantity and ours.

    Attributes:
        name: As in the recording.
        shape: Of the array.
        absolute: Largest absolute error.
        relative: Largest absolute error over the largest recorded magnitude.
        tolerance: Of the relative error.
    """

    name: str
    shape: tuple[int, ...]
    absolute: float
    relative: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.relative <= self.tolerance


def compare(
    name: str,
    ours: Num[Any, "..."],
    recorded: Shaped[np.ndarray, "..."],
    tolerance: float = SINGLE_PASS,
) -> Comparison:
    """Compares two arrays of one shape.

    Raises:
        ValueError: The shapes differ.
    """
    ours = np.asarray(ours, np.float64)
    if ours.shape != recorded.shape:
        raise ValueError(f"{name}: ours is {ours.shape}, recorded {recorded.shape}")
    absolute = float(np.abs(ours - recorded).max())
    scale = float(np.abs(recorded).max())
    # Zeros have to be met exactly.
    relative = absolute / scale if scale > 0 else (0.0 if absolute == 0 else float("inf"))
    return Comparison(name, recorded.shape, absolute, relative, tolerance)


def table(comparisons: Sequence[Comparison]) -> str:
    """A line for each comparison, and a head."""
    lines = [("quantity", "shape", "max abs", "max rel", "tolerance", "")]
    for one in comparisons:
        shape = "x".join(map(str, one.shape)) or "scalar"
        errors = (f"{one.absolute:.1e}", f"{one.relative:.1e}", f"{one.tolerance:.0e}")
        lines.append((one.name, shape, *errors, "pass" if one.passed else "FAIL"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def with_tolerance(
    comparisons: Iterator[Comparison], tolerance: float | None
) -> Iterator[Comparison]:
    """The comparisons, with one tolerance for all if there is one."""
    for one in comparisons:
        yield one if tolerance is None else dataclasses.replace(one, tolerance=tolerance)


def summary(comparisons: Sequence[Comparison]) -> str:
    """PASS n/n, or FAIL and how many of how many failed."""
    failed = sum(not one.passed for one in comparisons)
    total = len(comparisons)
    return f"FAIL {failed}/{total}" if failed else f"PASS {total}/{total}"
