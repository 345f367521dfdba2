"""FlowEdit: editing an image without inversion."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from flux.editing.inversion import velocity_at
from flux.sampling import Conditioning, VelocityModel

FLOW_EDIT_SKIPS = 1 / 7  # of the steps, the noisiest: the paper's 4 of 28 for FLUX (appendix, table S1)
FLOW_EDIT_GUIDANCE = 1.5  # of the source, likewise; the paper's 5.5 of the target is the user's guidance


def flow_edit(
    model: VelocityModel,
    latent: Tensor,
    img_ids: Tensor,
    source: Conditioning,
    target: Conditioning,
    timesteps: Sequence[float],
    noises: Iterable[Tensor],
    mask: Tensor | None = None,
) -> Iterator[Tensor]:
    """FlowEdit (arXiv 2412.08629, algorithm 1, with n_avg = 1 and n_min = 0).

    The edit z walks from the clean latent x to the clean edit along the difference of two velocities, with
    new noise e in each step:

        s = (1 - t) x + t e
        z_next = z + (t_next - t) (v(z + s - x, t, target) - v(s, t, source))

    Args:
        model: the transformer.
        latent: x, "R I 64". Its rows are those of `source`: one, or one for each edit.
        img_ids: positions of the image tokens, "1 I 3".
        source: conditioning of the source.
        target: conditioning of the B edits.
        timesteps: descending noise levels.
        noises: e of each step, "1 I 64".
        mask: which tokens may change, "B I 1", bool. If None, all.

    Yields:
        The edits after each step, "B I 64". The noisiest steps, FLOW_EDIT_SKIPS of all, do not change them.
    """
    batch, steps = target.txt.shape[0], list(pairwise(timesteps))
    edited, ids = latent.expand(batch, -1, -1), img_ids.expand(batch, -1, -1)
    source, target = (cond.scheduled(model, timesteps[:-1]) for cond in (source, target))
    skipped = round(FLOW_EDIT_SKIPS * len(steps))
    for index, ((t, t_next), noise) in enumerate(zip(steps, noises)):
        if index >= skipped:
            noisy = (1 - t) * latent + t * noise
            source_velocity = velocity_at(model, noisy, img_ids, source, t)
            target_velocity = velocity_at(model, noisy + (edited - latent), ids, target, t)
            moved = edited + (t_next - t) * (target_velocity - source_velocity)
            edited = moved if mask is None else torch.where(mask, moved, latent)
        yield edited
