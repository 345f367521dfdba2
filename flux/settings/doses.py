"""How much of the reference an edit takes over: which of the vital layers, how strongly, in which steps, and
where.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flux.settings.demos import Turn


@dataclass(frozen=True)
class Dose:
    """A named choice of numbers, all of which the settings can say on their own too.

    Attributes:
        weight: what the taken keys and values count beside the edit's own, 0..1; of each layer, if a mapping.
        inject_from, inject_until: for which part of the steps, in fractions of them.
        falling: the weight falls in a straight line from the first step of that part to zero after its last.
        top: of how many vital layers, the most vital ones; None: all.
        mask: "auto": what an edit may change is found on the way, see `flux.editing.automask`. An edit may also put
            a picture's file here, or "none".
        all_over_until: where a mask so found leaves nothing as it is, as for another place, the subject that
            both prompts name is held so long, all else until `inject_until`.
    """

    weight: float | Mapping[int, float] = 1.0
    inject_from: float = 0.0
    inject_until: float = 1.0
    falling: bool = False
    top: int | None = None
    mask: str | None = None
    all_over_until: float | None = None

    def of_layer(self, layer: int) -> float:
        """The weight of a layer where nothing has fallen yet; one that a mapping does not name has 1."""
        return self.weight.get(layer, 1.0) if isinstance(self.weight, Mapping) else self.weight

    def shares(self, steps: range) -> list[float]:
        """What is left of the weight in each step of the window."""
        return [1 - place / len(steps) if self.falling else 1.0 for place in range(len(steps))]


# The only place with these numbers: to tune them, change them here.
DOSES: dict[str, Dose] = {
    "auto": Dose(inject_until=0.25, mask="auto", all_over_until=1.0),
    "balanced": Dose(inject_until=0.5, falling=True),
    "replace": Dose(inject_until=0.4),
    "add": Dose(inject_until=0.3, falling=True),
    "scene": Dose(weight=0.7, inject_until=0.8),
    "paper": Dose(),
}
DEFAULT_DOSE = "auto"


def dose_of(entry: "Turn") -> Dose:
    """The named dose of an edit, with the numbers put over it that the edit gives itself."""
    given = {each.name: getattr(entry, each.name, None) for each in fields(Dose)}
    dose = replace(DOSES[entry.dose], **{name: value for name, value in given.items() if value is not None})
    return dose if entry.inject_until is None else replace(dose, all_over_until=None)
