"""FlowEdit: an edit without inversion."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from flux.editing.inversion import _velocity
from flux.model import Flux
from flux.sampling import Conditioning

FLOW_EDIT_SKIPS = 1 / 7  # of the steps, the noisiest: the paper's 4 of 28 for FLUX (appendix, table S1)


FLOW_EDIT_GUIDANCE = 1.5  # of the source, likewise; its 5.5 of the target is the user's guidance


def flow_edit(
    model: Flux,
    latent: Tensor,
    img_ids: Tensor,
    source: Conditioning,
    target: Conditioning,
    timesteps: Sequence[float],
    noises: Iterable[Tensor],
    mask: Tensor | None = None,
) -> Iterator[Tensor]:
    """FlowEdit (arXiv 2412.08629, algorithm 1, with n_avg = 1 and n_min = 0): no inversion. The edit z walks
    from the clean latent x to the clean edit along the difference of two velocities, with noise e drawn anew
    for each step:

        s = (1 - t) x + t e
        z_next = z + (t_next - t) (v(z + s - x, t, target) - v(s, t, source))

    Args:
        latent: x, "1 I 64"; the edits have the rows of `target`.
        noises: e of each step, "1 I 64".
        mask: which tokens may change, "B I 1", bool; None: all.

    Yields:
        The edits after each step, "B I 64"; the noisiest steps (`FLOW_EDIT_SKIPS`) leave them as they are.
    """
    batch, steps = target.txt.shape[0], list(pairwise(timesteps))
    edited, ids = latent.expand(batch, -1, -1), img_ids.expand(batch, -1, -1)
    source, target = (cond.scheduled(model, timesteps[:-1]) for cond in (source, target))
    skipped = round(FLOW_EDIT_SKIPS * len(steps))
    for index, ((t, t_next), noise) in enumerate(zip(steps, noises)):
        if index >= skipped:
            noisy = (1 - t) * latent + t * noise
            of_source = _velocity(model, noisy, img_ids, source, t)
            of_target = _velocity(model, noisy + (edited - latent), ids, target, t)
            moved = edited + (t_next - t) * (of_target - of_source)
            edited = moved if mask is None else torch.where(mask, moved, latent)
        yield edited
