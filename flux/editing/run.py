"""All batches of edits, step by step beside their reference."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from flux.editing.batches import Batch
from flux.editing.flow_edit import FlowEdit
from flux.editing.photo import TOKEN
from flux.editing.reference import prefetch
from flux.editing.source import OnStep, ReferenceStep, Source
from flux.loaded_model import LoadedModel
from flux.sampling import Step, VelocityModel

Report = Callable[[Step, int], None]
"""Called with a step and its number."""


def run_batches(
    pipe: LoadedModel,
    source: Source,
    batches: Sequence[Batch],
    kept: Sequence[ReferenceStep] | None = None,
    on_step: OnStep | None = None,
    progress: bool = False,
) -> Tensor:
    """Run the edits of all batches beside their reference. Their latents are then the finished ones.

    Args:
        pipe: The models.
        source: Where the edits begin.
        batches: The edits.
        kept: The steps of a kept reference. If None, the reference is computed, and nothing is kept beyond a
            step.
        on_step: Called with each step of the first batch. Its number and the total count the steps of an
            inversion too, unless the reference was kept.
        progress: Whether to show a progress bar.

    Returns:
        The last latent of the reference, "R I 64"; with FlowEdit the clean latent.
    """
    done = source.inverted_steps if kept is None else 0
    total = source.num_steps * (len(batches) if source.inversion_free else 1)
    with tqdm(total=total, desc="edits", unit="step", disable=not progress) as bar, pipe.denoising() as model:

        def report(step: Step, index: int) -> None:
            bar.update()
            if on_step:
                on_step(step, done + index, done + total)

        if source.inversion_free:
            _flow_edits(pipe, model, source, batches, report)
            return source.start
        if kept is None:
            steps = _reference_steps(pipe, model, source, batches)
        else:
            steps = prefetch(kept, pipe.device)
        return _edit_beside(steps, pipe, model, source, batches, report)


def _reference_steps(
    pipe: LoadedModel, model: VelocityModel, source: Source, batches: Sequence[Batch]
) -> Iterator[ReferenceStep]:
    """Compute the reference, which keeps what the batches need of each step."""
    every = frozenset(range(pipe.model.num_layers))

    def layers_at(index: int) -> frozenset[int]:
        return frozenset[int]().union(*(batch.needs_at(index, every) for batch in batches))

    return source.steps(model, layers_at, frozenset[int]().union(*(batch.query_layers for batch in batches)))


def _edit_beside(
    steps: Iterable[ReferenceStep],
    pipe: LoadedModel,
    model: VelocityModel,
    source: Source,
    batches: Sequence[Batch],
    report: Report,
) -> Tensor:
    """Take each step of the batches beside the reference's; return the reference's last latent."""
    for batch in batches:
        batch.cond = batch.cond.scheduled(model, source.levels[:-1])
    latent = source.start
    for reference in steps:
        taken = [batch.step(pipe, model, source, reference) for batch in batches]
        if shown := taken[0] if taken else reference.step:
            report(shown, reference.index)
        latent = reference.next_latent
    for batch in batches:
        batch.context, batch.groups = None, []  # frees the context's keys and values before decoding
    return latent


def _flow_edits(
    pipe: LoadedModel, model: VelocityModel, source: Source, batches: Sequence[Batch], report: Report
) -> None:
    """Run FlowEdit or DecFlowEdit for each batch, with new noise in each step."""
    seed, columns = source.settings.seed, source.size[0] // TOKEN
    noises = [pipe.noise([seed + index], *source.size) for index in range(source.num_steps)]
    for number, batch in enumerate(batches):
        walk = FlowEdit(model, source.start, source.img_ids, source.cond, batch.cond, source.levels, noises)
        prior = walk.prior(columns) if source.settings.inversion == "decflowedit" else 1.0
        for index, latent in enumerate(walk.edits(batch.mask, prior)):
            batch.latent = latent
            step = Step(0.0, 0.0, latent, torch.zeros_like(latent))
            report(step, number * source.num_steps + index)
