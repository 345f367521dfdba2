"""FlowEdit and DecFlowEdit: editing an image without inversion, as published."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from flux.editing.inversion import velocity_at
from flux.sampling import Conditioning, VelocityModel

FLOW_EDIT_SKIPS = 1 / 7  # of the steps, the noisiest: the paper's 4 of 28 for FLUX (appendix, table S1)
FLOW_EDIT_GUIDANCE = 1.5  # of the source, likewise; the paper's 5.5 of the target is the user's guidance

# DecFlowEdit's prior (its section 4.2)
PRIOR_STEPS = 0.25, 0.75  # fractions of the steps whose differences count
PRIOR_SMOOTHING = 5  # tokens: the side of the mean filter
PRIOR_THRESHOLD, PRIOR_SOFTNESS = 0.55, 0.08


@dataclass(frozen=True, eq=False)
class FlowEdit:
    """A batch of edits by FlowEdit (arXiv 2412.08629, algorithm 1, with n_avg = 1 and n_min = 0).

    An edit z walks from the clean latent x to the clean edit along the difference of two velocities, with
    new noise e in each step:

        s = (1 - t) x + t e
        z_next = z + (t_next - t) M (v(z + s - x, t, target) - v(s, t, source))

    M is 1 in FlowEdit, and the prior in DecFlowEdit (arXiv 2609.34237, equation 6).

    Attributes:
        model: The transformer.
        clean: The clean latent x, "R I 64". Its rows are those of `source`: one, or one for each edit.
        img_ids: Positions of the image tokens, "1 I 3".
        source: Steers v(..., source).
        target: Steers v(..., target), for the B edits.
        levels: Noise levels, falling to 0.
        noises: The noise e of each step, "1 I 64".
    """

    model: VelocityModel
    clean: Tensor
    img_ids: Tensor
    source: Conditioning
    target: Conditioning
    levels: Sequence[float]
    noises: Sequence[Tensor]

    def edits(self, mask: Tensor | None = None, prior: Tensor | float = 1.0) -> Iterator[Tensor]:
        """Take the steps of the edits.

        Args:
            mask: Which tokens may change, "B I 1", bool. If None, all.
            prior: M, a number or "B I 1".

        Yields:
            The edits after each step, "B I 64". The noisiest steps, FLOW_EDIT_SKIPS of all, do not change
            them.
        """
        clean, batch = self.clean, self.target.txt.shape[0]
        edited, ids = clean.expand(batch, -1, -1), self.img_ids.expand(batch, -1, -1)
        source, target = (cond.scheduled(self.model, self.levels[:-1]) for cond in (self.source, self.target))
        skipped = round(FLOW_EDIT_SKIPS * len(self.noises))
        for index, ((t, t_next), noise) in enumerate(zip(pairwise(self.levels), self.noises)):
            if index >= skipped:
                noisy = (1 - t) * clean + t * noise
                source_velocity = velocity_at(self.model, noisy, self.img_ids, source, t)
                target_velocity = velocity_at(self.model, noisy + (edited - clean), ids, target, t)
                moved = edited + (t_next - t) * (prior * (target_velocity - source_velocity))
                edited = moved if mask is None else torch.where(mask, moved, clean)
            yield edited

    def prior(self, columns: int) -> Tensor:
        """Find DecFlowEdit's prior: how far FlowEdit may move each token (arXiv 2609.34237, section 4.2).

        It comes from a FlowEdit of its own, whose guidance is 1 for source and target. With D_k, the
        difference of its velocities in step k of T, with percentiles q over the tokens, and the sigmoid S:

            E = |sum of D_k over 0.25 T <= k <= 0.75 T|, A = mean of E over 5x5 tokens        (equation 2)
            M = S((clip((A - q10) / (q90 - q10), 0, 1) - 0.55) / 0.08)                 (equations 3 and 4)

        Args:
            columns: Tokens in a row of the image.

        Returns:
            M, "B I 1".
        """
        probe = replace(self, source=unguided(self.source), target=unguided(self.target))
        first, last = (share * len(self.noises) for share in PRIOR_STEPS)
        before, total = self.clean, torch.zeros_like(self.clean)
        for index, ((t, t_next), edited) in enumerate(zip(pairwise(self.levels), probe.edits())):
            if first <= index <= last:
                total = total + (edited - before) / (t_next - t)
            before = edited
        energy = total.float().norm(dim=2).unflatten(1, (-1, columns))[:, None]
        half = PRIOR_SMOOTHING // 2
        smooth = F.avg_pool2d(energy, PRIOR_SMOOTHING, 1, half, count_include_pad=False).flatten(1)
        low, high = (smooth.quantile(share, dim=1, keepdim=True) for share in (0.1, 0.9))
        relative = ((smooth - low) / (high - low).clamp(min=1e-8)).clamp(0, 1)
        prior = torch.sigmoid((relative - PRIOR_THRESHOLD) / PRIOR_SOFTNESS)
        return prior[:, :, None].to(self.clean)


def unguided(cond: Conditioning) -> Conditioning:
    """Return the conditioning with guidance 1 and without a negative pass."""
    guidance = None if cond.guidance is None else torch.ones_like(cond.guidance)
    return replace(cond, guidance=guidance, negative=None, modulations=None)
