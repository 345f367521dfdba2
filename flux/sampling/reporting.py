"""A transformer that reports its passes."""

from collections.abc import Callable, Sequence

from torch import Tensor

from flux.inputs import Inputs, Streams
from flux.intervention import NOTHING, Intervention, Recorded
from flux.model import VelocityModel
from flux.modules.step_cache import StepCache


class ReportingModel:
    """A transformer that reports the rows of each pass, used like the one that it wraps.

    Args:
        model: The transformer.
        listeners: Called with the number of rows after each pass. An exception from one ends the run.
    """

    def __init__(self, model: VelocityModel, listeners: Sequence[Callable[[int], None]]):
        self.model, self.listeners = model, listeners
        self.streams, self.modulations = model.streams, model.modulations

    def observe(
        self,
        inputs: Inputs,
        intervention: Intervention = NOTHING,
        *,
        start: Streams | None = None,
        mods: Sequence[Tensor] | None = None,
        cache: StepCache | None = None,
    ) -> tuple[Tensor, Recorded]:
        """See `Flux.observe`."""
        velocity, recorded = self.model.observe(inputs, intervention, start=start, mods=mods, cache=cache)
        for on_pass in self.listeners:
            on_pass(len(velocity))
        return velocity, recorded
