"""How much of the reference an edit injects: which vital layers, how strongly, in which steps, and where."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

InjectedParts = Literal["kv", "k", "v", "q", "qk", "qv", "qkv"]
"""Which of a layer's image queries, keys and values are injected."""

PUBLISHED_GUIDANCE = 3.0
"""Guidance of the edits of a photograph in Stable Flow's public code."""


@dataclass(frozen=True)
class Dose:
    """A named choice of numbers, each of which the settings can give on its own too.

    Attributes:
        weight: How much the injected kv count beside the edit's own, 0..1; a mapping gives it by layer.
        inject_from: Fraction of the steps where injection starts.
        inject_until: Fraction of the steps where injection ends.
        noised_until: The same beside a photograph that noise is added to, whose every step begins at another
            noise. If None, `inject_until`.
        falling: Whether the weight falls in a straight line, from the first step of that window to zero after
            its last.
        top: Number of vital layers, the most vital first. If None, all of them.
        mask: With "auto", the area that an edit may change is found while it runs, see
            `flux.editing.automask`. An edit may also put an image file here, or "none".
        hold_subject_until: For edits whose automatic mask covers the whole image, such as another place:
            until when the subject that both prompts name is held. Everything else is held until
            `inject_until`.
    """

    weight: float | Mapping[int, float] = 1.0
    inject_from: float = 0.0
    inject_until: float = 1.0
    noised_until: float | None = None
    falling: bool = False
    top: int | None = None
    mask: str | None = None
    hold_subject_until: float | None = None

    def until(self, is_noised: bool) -> float:
        """Return the fraction of the steps where injection ends.

        Args:
            is_noised: Whether the reference is a photograph that noise is added to.
        """
        return self.noised_until if is_noised and self.noised_until is not None else self.inject_until

    def of_layer(self, layer: int) -> float:
        """Return a layer's weight before any fall; 1 for a layer that a mapping does not name."""
        return self.weight.get(layer, 1.0) if isinstance(self.weight, Mapping) else self.weight

    def shares(self, steps: range) -> list[float]:
        """Return what is left of the weight in each step of the window."""
        return [1 - place / len(steps) if self.falling else 1.0 for place in range(len(steps))]


DoseName = Literal["auto", "balanced", "replace", "add", "scene", "paper"]

# These numbers stand nowhere else: to tune them, change them here.
DOSES: dict[DoseName, Dose] = {
    "auto": Dose(inject_until=0.25, noised_until=0.35, mask="auto", hold_subject_until=1.0),
    "balanced": Dose(inject_until=0.5, falling=True),
    "replace": Dose(inject_until=0.4),
    "add": Dose(inject_until=0.3, falling=True),
    "scene": Dose(weight=0.7, inject_until=0.8),
    "paper": Dose(),
}
DEFAULT_DOSE: DoseName = "auto"
