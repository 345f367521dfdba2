"""Where a batch of edits may change its reference: found by comparing both prompts of each edit."""

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from flux.editing.automask import (
    WatchedPass,
    attention_to_changes,
    changed_tokens,
    changes_whole_image,
    subject_tokens,
)
from flux.editing.reference import ReferenceStep, Source
from flux.intervention import NOTHING, Intervention
from flux.pipeline import Pipeline
from flux.sampling import Step, VelocityModel, euler_step, step_at

if TYPE_CHECKING:
    from flux.editing.batches import Batch

AUTO_MASK_AT = 0.25  # of the steps: by then the layout is settled, and little has drifted


def compare_prompts(
    pipe: Pipeline,
    model: VelocityModel,
    source: Source,
    batch: "Batch",
    latent: Tensor,
    t: float,
    watch_edits: bool = False,
) -> tuple[Step, Step]:
    """Passes the reference's latent through the model with the prompts of the sources, then of the edits.

    Args:
        pipe: the models.
        model: the transformer.
        source: where the edits begin.
        batch: the edits.
        latent: the reference's, "R I 64".
        t: its noise level.
        watch_edits: whether the edits' pass is watched, as the sources' is.

    Returns:
        Both steps, of no length.
    """
    num, ids = len(batch.places), pipe.image_ids(1, *source.size)
    latent, own = latent.expand(num, -1, -1), replace(batch.cond, negative=None)
    # The source gets the guidance of the edits, since other guidance changes the velocity everywhere.
    cond = replace(source.cond.expanded(num), negative=None, guidance=own.guidance)
    watching = Intervention(watch=pipe.model.params.junction_layers)
    of_source = euler_step(model, latent, ids, cond, t, t, watching)
    of_edits = euler_step(model, latent, ids, own, t, t, watching if watch_edits else NOTHING)
    return of_source, of_edits


def divergence_of(of_source: Step, of_edits: Step) -> Tensor:
    """Measures how far the velocities of both prompts differ at each token, "B I"."""
    return (of_edits.velocity - of_source.velocity).square().mean(dim=2).sqrt()


def whole_image_edits(pipe: Pipeline, model: VelocityModel, source: Source, batch: "Batch") -> Tensor:
    """Finds the edits that change their whole image before they begin, "B", bool.

    The path of a photograph is known in advance. So both prompts are compared where masks are found later.
    """
    assert source.path is not None
    index = step_at(AUTO_MASK_AT, source.num_steps)
    where = (source.path[index], source.levels[index])
    of_source, of_edits = compare_prompts(pipe, model, source, batch, *where, watch_edits=True)
    changed = attention_to_changes(
        pipe.t5, WatchedPass(batch.sources, of_source.watched), WatchedPass(batch.prompts, of_edits.watched)
    )
    return changes_whole_image(changed, divergence_of(of_source, of_edits), *source.size)


def auto_mask(
    pipe: Pipeline, model: VelocityModel, source: Source, reference: ReferenceStep, batch: "Batch", step: Step
) -> tuple[Tensor, Tensor | None]:
    """Finds the automatic masks of a batch, from the step that watched its edits.

    Returns:
        Which tokens each edit may change, "B I 1", bool; and the tokens of the subject that it shares with
        its source, "B I", bool, or None if no edit may change its whole image.
    """
    of_source, of_edits = compare_prompts(pipe, model, source, batch, reference.latent, reference.t)
    divergence = divergence_of(of_source, of_edits)
    sources = WatchedPass(batch.sources, of_source.watched)
    mask = changed_tokens(
        pipe.t5, sources, WatchedPass(batch.prompts, step.watched), divergence, *source.size
    )
    if not mask.all(dim=1).any():
        return mask, None
    return mask, subject_tokens(pipe.t5, sources, batch.prompts, *source.size)
