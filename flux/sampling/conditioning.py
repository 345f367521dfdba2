"""The prompts and guidance that steer the rows of a batch, and the modulations that follow from them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flux.inputs import Condition
from flux.model import VelocityModel


@dataclass(frozen=True, eq=False)
class Modulations:
    """The modulations of all layers in each step of a schedule.

    Attributes:
        levels: Noise level of each step.
        layers: What `flux.model.Flux.modulations` returns for all of them, one tensor for each layer, "S R
            channels": S steps, R rows of the batch, or a single row that stands for all of them.
    """

    levels: tuple[float, ...]
    layers: list[Tensor]

    @classmethod
    def of(cls, model: VelocityModel, levels: Sequence[float], cond: "Conditioning") -> "Modulations":
        """Compute them in one go. Rows with the same prompt and guidance share one row."""
        rows = [cond.vec] if cond.guidance is None else [cond.vec, cond.guidance]
        if all(bool((x == x[:1]).all()) for x in rows):
            rows = [x[:1] for x in rows]
        steps, count = len(levels), len(rows[0])
        t = torch.tensor(levels, dtype=cond.vec.dtype, device=cond.vec.device).repeat_interleave(count)
        made = model.modulations(t, *(x.repeat(steps, *[1] * (x.ndim - 1)) for x in rows))
        return cls(tuple(levels), [x.unflatten(0, (steps, count)) for x in made])

    def at_rows(self, rows: Sequence[int]) -> "Modulations":
        """Those of some rows."""
        return replace(self, layers=[x if x.shape[1] == 1 else x[:, rows] for x in self.layers])

    def at(self, t: float) -> list[Tensor] | None:
        """Each layer's modulations in the step at noise level t. None if it is not of this schedule."""
        if t not in self.levels:
            return None
        step = self.levels.index(t)
        return [layer[step] for layer in self.layers]


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The prompts and guidance that steer the rows of a batch.

    Attributes:
        txt: T5 features, "B T features".
        txt_ids: Positions of the text tokens, "B T 3".
        vec: Pooled CLIP features, "B features".
        guidance: Distilled guidance scale of each row, "B". None for models without.
        negative: Steers the second pass of true classifier-free guidance. If None, there is no such pass.
        true_cfg: Scale of true guidance, 1 or more.
        mimic_scale: Smaller scale to whose range the result of true guidance is brought down, see `guided`.
            If None, it stays as it is.
        mimic_percentile: Share of values, 0..1, that this range holds at least.
        modulations: Modulations that were computed in advance, see `scheduled`.
        condition: An image that steers the pass too, see `with_condition`.
        context_every: Number of steps from one computation of the context tokens to the next. The steps
            between reuse their keys and values, see `flux.sampling.context.ContextReuse`.
    """

    txt: Tensor
    txt_ids: Tensor
    vec: Tensor
    guidance: Tensor | None = None
    negative: "Conditioning | None" = None
    true_cfg: float = 1.0
    mimic_scale: float | None = None
    mimic_percentile: float = 0.995
    modulations: Modulations | None = None
    condition: Condition = field(default_factory=Condition)
    context_every: int = 1

    def with_condition(self, condition: Condition, context_every: int = 1) -> "Conditioning":
        """The same with an image that steers both passes, so that true guidance is that of the prompts alone.

        Args:
            condition: The image.
            context_every: The attribute of that name.

        Raises:
            InputError: The condition's rows are neither one nor those of the prompts.
        """
        negative = self.negative and self.negative.with_condition(condition)
        condition = condition.expanded(len(self.txt))
        return replace(self, condition=condition, context_every=context_every, negative=negative)

    def scheduled(self, model: VelocityModel, timesteps: Sequence[float]) -> "Conditioning":
        """The same with the modulations at all these noise levels, so that no step computes its own.

        With a negative pass, which may begin in a later step, the conditioning is returned as it is. The
        result is for this model only; do not move it to another device.
        """
        known = () if self.modulations is None else self.modulations.levels
        if self.negative is not None or all(t in known for t in timesteps):
            return self
        return replace(self, modulations=Modulations.of(model, timesteps, self))

    def modulations_at(self, t: float) -> list[Tensor] | None:
        """Each layer's modulations at noise level t, if they were computed in advance."""
        return None if self.modulations is None else self.modulations.at(t)

    def expanded(self, batch: int) -> "Conditioning":
        """Expand a single row to the whole batch."""
        return replace(
            self,
            txt=self.txt.expand(batch, -1, -1),
            txt_ids=self.txt_ids.expand(batch, -1, -1),
            vec=self.vec.expand(batch, -1),
            guidance=None if self.guidance is None else self.guidance.expand(batch),
            condition=self.condition.expanded(batch),
            negative=None if self.negative is None else self.negative.expanded(batch),
        )

    def at_rows(self, rows: Sequence[int]) -> "Conditioning":
        """The conditioning of some rows."""
        rows = list(rows)
        return replace(
            self,
            txt=self.txt[rows],
            txt_ids=self.txt_ids[rows],
            vec=self.vec[rows],
            guidance=None if self.guidance is None else self.guidance[rows],
            condition=self.condition.at_rows(rows),
            negative=None if self.negative is None else self.negative.at_rows(rows),
            modulations=None if self.modulations is None else self.modulations.at_rows(rows),
        )

    def stacked(self, other: "Conditioning") -> "Conditioning":
        """These rows, then those of `other`, as one batch of a single pass."""
        guidance = None
        if self.guidance is not None and other.guidance is not None:
            guidance = torch.cat((self.guidance, other.guidance))
        txt, txt_ids = torch.cat((self.txt, other.txt)), torch.cat((self.txt_ids, other.txt_ids))
        vec, condition = torch.cat((self.vec, other.vec)), self.condition.stacked(other.condition)
        return Conditioning(txt, txt_ids, vec, guidance, condition=condition)
