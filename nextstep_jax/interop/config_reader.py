"""Typed reading of a published `config.json`, with all that is wrong in it in one error."""

import math
from collections.abc import Mapping
from typing import Any

_REQUIRED: Any = object()
# What a damaged file asks for beyond these is refused before memory is asked for it.
MAX_SIZE, MAX_LAYERS = 2**20, 2**10


class ConfigReader:
    """Typed reading of one `config.json`, which collects faults instead of stopping at the first.

    A null counts as left out, as the original classes write null for a default. A read that fails
    yields 0, so that reading can go on; `finish` then raises.

    Attributes:
        values: Content of the file.
        problems: What makes the file unusable.
        notes: What the file leaves out, and what was taken instead.
    """

    def __init__(self, values: Mapping[str, Any]):
        self.values = values
        self.problems: list[str] = []
        self.notes: list[str] = []

    def get(self, name: str) -> Any:
        """The value of a key, or None; a dot leads into a nested mapping."""
        value: Any = self.values
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def find(self, *names: str) -> tuple[str, Any]:
        """The first of the synonymous keys that is given, and its value, or None.

        Keys that are given but differ are a problem.
        """
        given = [(name, self.get(name)) for name in names if self.get(name) is not None]
        if any(value != given[0][1] for _, value in given):
            contradiction = " but ".join(f"{name}={value!r}" for name, value in given)
            self.problems.append(f"{contradiction}: the two name the same value")
        return given[0] if given else (" or ".join(names), None)

    def left_out(self, name: str, taken: Any, why: str) -> None:
        """Notes that a value was not given."""
        self.notes.append(f"{name}: not given, taken as {taken!r} ({why})")

    def _read(self, names: tuple[str, ...], default: Any, why: str) -> tuple[str, Any, bool]:
        """Name and value of the first key given, or the default, and whether it was given."""
        name, value = self.find(*names)
        if value is not None:
            return name, value, True
        if default is _REQUIRED:
            self.problems.append(f"{name} is missing")
            return name, 0, False
        self.left_out(name, default, why)
        return name, default, False

    def integer(
        self,
        *names: str,
        default: Any = _REQUIRED,
        why: str = "as published",
        most: int = MAX_SIZE,
    ) -> int:
        """A whole number of at least 1 and at most `most`."""
        name, value, given = self._read(names, default, why)
        if given and (type(value) is not int or not 1 <= value <= most):
            fault = f"must be an integer of at least 1, at most {most}"
            self.problems.append(f"{name}={value!r} {fault}")
            return 0
        return value

    def number(
        self,
        *names: str,
        default: Any = _REQUIRED,
        why: str = "as published",
        above: float = -math.inf,
        least: float = -math.inf,
    ) -> float:
        """A finite number above `above` and of at least `least`."""
        name, value, given = self._read(names, default, why)
        if given and (type(value) not in (int, float) or not math.isfinite(value)):
            self.problems.append(f"{name}={value!r} must be a finite number")
            return 0.0
        if given and (value <= above or value < least):
            bound = f"above {above:g}" if value <= above else f"of at least {least:g}"
            self.problems.append(f"{name}={value!r} must be a number {bound}")
            return 0.0
        return float(value)

    def flag(self, name: str, default: bool, why: str = "as published") -> bool:
        """True or false."""
        _, value, _ = self._read((name,), default, why)
        if not isinstance(value, bool):
            self.problems.append(f"{name}={value!r} must be true or false")
        return value is True

    def accept(self, name: str, *accepted: Any) -> None:
        """Refuses a key whose value is given and none of `accepted`: we do not compute it."""
        value = self.get(name)
        if value is not None and value not in accepted:
            choice = " or ".join(repr(a) for a in accepted)
            self.problems.append(f"{name}={value!r} is not supported, only {choice}")

    def finish(self, what: str) -> None:
        """Raises one ValueError with all problems, if there are any."""
        if self.problems:
            raise ValueError(f"{what} cannot be used: {'; '.join(self.problems)}")
