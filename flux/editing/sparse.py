"""Sparse steps of edits: only the tokens that an edit may change are computed.

Everything else is the reference's, so its keys and values serve in all layers. A whole step would give the
same if its other tokens had the reference's keys and values injected in every layer. Their queries are not
needed, since their latent is the reference's too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flux.editing.source import ReferenceStep
from flux.intervention import FreeTokens, Intervention, rows_of
from flux.math import Parts
from flux.sampling import Conditioning, ContextReuse, Passes, Step, VelocityModel, euler_step


@dataclass(eq=False)
class RowGroup:
    """The rows of a batch that may change the same tokens. They share a pass.

    Attributes:
        rows: The rows, ascending.
        places: The same as a tensor, on the device of the latents.
        free: The tokens. If None, all of them.
        context: Reuses the context's keys and values of these rows. If None, they are computed.
    """

    rows: list[int]
    places: Tensor
    free: FreeTokens | None
    context: ContextReuse | None = None
    _known: tuple[Conditioning, Conditioning] | None = field(default=None, init=False)

    def cond_of(self, cond: Conditioning) -> Conditioning:
        """The conditioning of these rows, from that of the whole batch. It is the same in many steps."""
        if self._known is None or self._known[0] is not cond:
            self._known = cond, cond.at_rows(self.rows)
        return self._known[1]

    def intervention(self, whole: Intervention, kv: Mapping[int, Parts], batch: int) -> Intervention:
        """The intervention of this group's pass.

        Args:
            whole: The intervention for all rows and tokens.
            kv: Image keys and values of the reference in all layers, "R H I D" each.
            batch: Number of rows of the whole batch, which R divides.
        """
        if len(self.rows) < batch:
            whole = whole.at_rows(self.rows, batch)
        if self.free is None:
            return whole
        # A kept reference has a single row, and its layers are fetched one by one.
        if len(next(iter(kv.values()))[0]) > 1:
            kv = {n: tuple(rows_of(x, self.rows, batch) for x in parts[:2]) for n, parts in kv.items()}
        return replace(whole, free=replace(self.free, kv=kv))


def group_rows(mask: Tensor, cond: Conditioning) -> list[RowGroup]:
    """Group rows by the tokens that they may change.

    Args:
        mask: The tokens that each row may change, "B I 1".
        cond: The conditioning of the rows.

    Returns:
        The groups. Empty if every row may change all tokens, so that nothing is spared.
    """
    alike: dict[bytes, list[int]] = {}
    for row, tokens in enumerate(mask[:, :, 0].cpu()):
        alike.setdefault(tokens.numpy().tobytes(), []).append(row)
    groups = []
    for rows in alike.values():
        tokens = mask[rows[0], :, 0]
        free = None if tokens.all() else FreeTokens.of(tokens)
        places = torch.tensor(rows, device=mask.device)
        groups.append(RowGroup(rows, places, free, ContextReuse.of(cond)))
    return groups if any(group.free for group in groups) else []


def sparse_step(
    model: VelocityModel,
    img: Tensor,
    img_ids: Tensor,
    cond: Conditioning,
    interventions: Passes[Intervention],
    reference: ReferenceStep,
    groups: Sequence[RowGroup],
) -> Step:
    """Take one Euler step of a batch, a pass for each group of its rows.

    Args:
        model: The transformer.
        img: Packed latent, "B I 64".
        img_ids: Positions of the image tokens, "1 I 3".
        cond: Prompts and guidance.
        interventions: What each pass injects, for all rows and tokens.
        reference: The reference's step, with the keys and values of all layers. Its velocity stands where
            nothing is computed.
        groups: The rows, see `group_rows`.
    """
    batch, velocity, t, t_next = len(img), torch.empty_like(img), reference.t, reference.t_next
    for group in groups:
        each = Passes(*(group.intervention(*pair, batch) for pair in zip(interventions, reference.kept)))
        part, own = (img, cond) if len(group.rows) == batch else (img[group.places], group.cond_of(cond))
        found = euler_step(model, part, img_ids, own, t, t_next, each, context=group.context).velocity
        if group.free is not None:
            others = group.free.others
            found[:, others] = rows_of(reference.velocity, group.rows, batch)[:, others].to(found)
        velocity[group.places] = found
    return Step(t, t_next, img, velocity)
