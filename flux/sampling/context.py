"""Keys and values of context tokens, computed in some steps of a sampling and used in the others too."""

from dataclasses import replace

from flux.intervention import Intervention, Recorded
from flux.math import KeysValues
from flux.sampling.conditioning import Conditioning


class ContextReuse:
    """The context tokens' keys and values from every n-th step of one sampling, for the steps until the next.

    Context tokens attend to noise tokens and know the noise level, so that their keys and values differ from
    step to step. Where those of an earlier step serve, no context token is computed: with a context image of
    the size of the noise, a step then computes about half the tokens.

    Each pass of a step has its own: the prompt's pass and that of the negative prompt.

    Args:
        every: Number of steps from one computation to the next. At 1, each step computes its own.
    """

    def __init__(self, every: int):
        self.every, self._steps = every, 0
        self._known: dict[int, dict[int, KeysValues]] = {}

    @classmethod
    def of(cls, cond: Conditioning) -> "ContextReuse | None":
        """A new one for a sampling with this conditioning, if it asks for it."""
        has_context = cond.condition.context is not None
        return cls(cond.context_every) if has_context and cond.context_every > 1 else None

    def begin_step(self) -> None:
        """Forget all keys and values if the step that begins computes its own."""
        if self._steps % self.every == 0:
            # Before the new ones are computed: both together may not fit into memory.
            self._known.clear()
        self._steps += 1

    def applied(self, intervention: Intervention, number: int, rows: int) -> Intervention:
        """The intervention that uses what is known in a pass of the step, or keeps what the pass computes.

        Args:
            intervention: The pass's own. What it injects in the context comes before what is known.
            number: Number of the pass in its step.
            rows: Number of its rows.
        """
        known = self._known.get(number, {})
        # The rows change where true CFG begins in a later step.
        if not known or any(len(k) != rows for k, _ in known.values()):
            return replace(intervention, keep_context=True)
        return replace(intervention, inject_context=known | dict(intervention.inject_context))

    def store(self, recorded: Recorded, number: int) -> None:
        """Remember what a pass of the step computed."""
        if recorded.context:
            self._known[number] = recorded.context
