"""The mixture of sources: which source the next document comes from.

NextStep-1 (arXiv 2508.10711, Table 1) mixes four kinds of documents by weights that differ from
stage to stage. Turns are taken so that the shares are met as closely as whole documents allow, at
any time and without chance: a source earns its share of a turn at every turn, the one with the
most credit is drawn and pays a whole turn. State is a credit and a position for each source, so
that the weights may change while every source goes on where it stood.
"""

from collections.abc import Mapping
from typing import Any

STAGE_RATIOS: dict[str, dict[str, float]] = {
    "stage1": {"text": 0.2, "pair": 0.6, "edit": 0.0, "interleaved": 0.2},
    "stage2": {"text": 0.2, "pair": 0.6, "edit": 0.0, "interleaved": 0.2},
    "annealing": {"text": 0.2, "pair": 0.6, "edit": 0.1, "interleaved": 0.1},
    "sft": {"text": 0.0, "pair": 0.9, "edit": 0.1, "interleaved": 0.0},
}
"""Share of each kind of document in the stages of the paper's Table 1 ("edit" is its
image-to-image); an example of a source's weight."""


def check_weights(weights: Mapping[str, float]) -> None:
    """Checks that weights can be drawn by.

    Raises:
        ValueError: A weight is negative or not finite, or all are zero.
    """
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise ValueError(f"source {name!r}: weight={weight} must be finite and not negative")
    if not sum(weights.values()) > 0:
        raise ValueError(f"sources must name at least one with a weight above 0, not {weights}")


# Of a phase; that of sources rarer than this is only as long. Ours.
_MOST_TURNS = 1000


class Mixture:
    """Draws (source, position): position counts the documents drawn from the source so far."""

    def __init__(self, weights: Mapping[str, float], phase: float = 0.0):
        """Begins at position 0 of every source.

        Args:
            weights: Relative numbers of documents; a source of weight 0 is never drawn.
            phase: In [0, 1): how far the turns have gone when it begins, between two turns of
                the rarest source. Mixtures side by side take phases of their own, lest all draw
                a rare source at the same time.

        Raises:
            ValueError: See `check_weights`.
        """
        check_weights(weights)
        total = sum(weights.values())
        self._shares = {name: weight / total for name, weight in weights.items()}
        self._credit = dict.fromkeys(weights, 0.0)
        rarest = min(share for share in self._shares.values() if share)
        # Credits as they would stand after a part of the rarest source's period.
        for _ in range(int(phase * min(1 / rarest, _MOST_TURNS))):
            self._turn()
        self._position = dict.fromkeys(weights, 0)

    def draw(self) -> tuple[str, int]:
        """The next turn."""
        name = self._turn()
        position = self._position[name]
        self._position[name] += 1
        return name, position

    def _turn(self) -> str:
        """Gives every source its share of a turn; the one that has most pays for it."""
        for name, share in self._shares.items():
            self._credit[name] += share
        drawn = [name for name, share in self._shares.items() if share]
        name = max(drawn, key=self._credit.__getitem__)  # The first of equals.
        self._credit[name] -= 1.0
        return name

    def get_state(self) -> dict[str, Any]:
        """Credits and positions, as values that JSON keeps exactly.

        Only what is drawn has credit.
        """
        credit = {name: self._credit[name] for name, share in self._shares.items() if share}
        return {"credit": credit, "position": dict(self._position)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from `get_state`, also of a mixture with other weights or sources.

        A source that was not drawn before begins with the credit of the phase.
        """
        for name in self._shares:
            self._credit[name] = float(state["credit"].get(name, self._credit[name]))
            self._position[name] = int(state["position"].get(name, 0))
