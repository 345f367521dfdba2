"""Keys and values of context tokens, computed in some steps of a sampling and used in the others too."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from flux.inputs import Inputs, Streams
from flux.intervention import Intervention, Recorded
from flux.math import KeysValues
from flux.model import VelocityModel
from flux.sampling.conditioning import Conditioning


class ContextReuse:
    """The context tokens' keys and values from every n-th step of one sampling, for the steps until the next.

    Context tokens attend to noise tokens and know the noise level, so that their keys and values differ from
    step to step. Where those of an earlier step serve, no context token is computed. With a context image as
    large as the image to make, such a step computes about half the tokens.

    The prompt's pass and that of the negative prompt have keys and values of their own.

    Args:
        every: Number of steps from one computation to the next. At 1, each step computes its own.
    """

    def __init__(self, every: int):
        self.every, self._steps = every, 0
        self._known: dict[int, dict[int, KeysValues]] = {}

    @classmethod
    def of(cls, cond: Conditioning) -> "ContextReuse | None":
        """A new one for a sampling with this conditioning. None if each step computes its own context."""
        has_context = cond.condition.context is not None
        return cls(cond.context_every) if has_context and cond.context_every > 1 else None

    def begin_step(self) -> None:
        """Forget all keys and values if the step that begins computes its own."""
        if self._steps % self.every == 0:
            # Before the new ones are computed: both together may not fit into memory.
            self._known.clear()
        self._steps += 1

    def observe(
        self,
        model: VelocityModel,
        inputs: Inputs,
        intervention: Intervention,
        number: int,
        *,
        start: Streams | None,
        mods: Sequence[Tensor] | None,
    ) -> tuple[Tensor, Recorded]:
        """Take a pass of the step that uses known keys and values, or remember those that it computes.

        Args:
            model: The transformer.
            inputs: The inputs of the pass.
            intervention: The pass's own. What it injects in the context comes before what is known.
            number: Number of the pass in its step.
            start: See `flux.model.Flux.observe`.
            mods: Likewise.

        Returns:
            The velocity, "B I 64", and what the intervention asks for.
        """
        changed = self._applied(intervention, number, len(inputs.img))
        velocity, found = model.observe(inputs, changed, start=start, mods=mods)
        self.store(found, number)
        # A step may outlive those that are reused, which are large.
        return velocity, found if intervention.keep_context else replace(found, context={})

    def _applied(self, intervention: Intervention, number: int, rows: int) -> Intervention:
        """The intervention that injects what is known, or keeps what the pass computes."""
        known = self._known.get(number, {})
        # The rows change where true CFG begins in a later step.
        if not known or any(len(k) != rows for k, _ in known.values()):
            return replace(intervention, keep_context=True)
        return replace(intervention, inject_context=known | dict(intervention.inject_context))

    def store(self, recorded: Recorded, number: int) -> None:
        """Remember what a pass of the step computed."""
        if recorded.context:
            self._known[number] = recorded.context
