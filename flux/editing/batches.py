"""Batches of edits that go through the model together, beside their reference."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from tqdm import tqdm

from flux.editing.automask import WatchedPass, changed_tokens, subject_tokens
from flux.editing.flow_edit import flow_edit, spatial_prior
from flux.editing.photo import TOKEN, Mask
from flux.editing.reference import prefetch
from flux.editing.source import OnStep, ReferenceStep, Source, guidance_args
from flux.editing.sparse import RowGroup, group_rows, sparse_step
from flux.intervention import NOTHING, Intervention
from flux.loaded_model import LoadedModel
from flux.math import PartialParts, Parts
from flux.sampling import (
    Conditioning,
    ContextReuse,
    Passes,
    Step,
    VelocityModel,
    euler_step,
    step_at,
    window,
)
from flux.settings.doses import Dose, InjectedParts
from flux.settings.edits import Turn
from flux.settings.resolved import ResolvedEdit

AUTO_MASK_AT = 0.25  # of the steps: by then the layout is settled, and little has drifted


# ---- which edits share a batch


@dataclass(frozen=True)
class BatchKind:
    """The properties that all edits of a batch share.

    Attributes:
        dose: how much is injected. Its mask is "auto", or None for a painted mask and for none.
        parts: which of queries, keys and values are injected.
        painted: whether the edits have masks given as images.
    """

    dose: Dose
    parts: InjectedParts
    painted: bool


def group_edits(
    entries: Sequence[Turn], painted: Sequence[bool], batch_size: int
) -> list[tuple[BatchKind, list[int]]]:
    """Divides edits into batches of one kind each.

    Args:
        entries: the edits.
        painted: whether each edit has a mask given as an image, which takes precedence over "auto".
        batch_size: the largest number of edits in a batch.

    Returns:
        For each batch its kind, and the places of its edits in `entries`, ascending.
    """
    groups: list[tuple[BatchKind, list[int]]] = []
    for place, (entry, has_image) in enumerate(zip(entries, painted, strict=True)):
        dose = entry.effective_dose()
        mask = "auto" if dose.mask == "auto" and not has_image else None
        kind = BatchKind(replace(dose, mask=mask), entry.parts or "kv", has_image)
        places = next((places for other, places in groups if other == kind), None)
        if places is None:
            groups.append((kind, places := []))
        places.append(place)
    return [
        (kind, places[start : start + batch_size])
        for kind, places in groups
        for start in range(0, len(places), batch_size)
    ]


# ---- a batch


@dataclass(eq=False)
class Batch:
    """Edits of one kind, at one step of their way from noise.

    Attributes:
        kind: what the edits have in common.
        places: their places among all edits.
        prompts: what each edit shows.
        sources: what each edit's source shows.
        layers: the layers that the dose may inject in, the most vital first.
        shares: multiplier of the dose's weight by step. Steps that are not listed inject nothing.
        subject_steps: further steps, in which edits of the whole image hold their subject.
        cond: steers the edits.
        latent: where the edits are, "B I 64".
        mask: which tokens may change, "B I 1", bool. If None, all. With an automatic mask, None until it is
            found.
        held: the subject's tokens in edits whose automatic mask is the whole image, "B I", bool. None if
            there is no such edit, as far as is known.
        sparse: whether tokens that may not change are left out, once the mask is known.
        groups: the rows by the tokens that they compute. Empty while all rows compute all tokens.
        context: reuses the context's keys and values, while the rows are not in groups. If None, they are
            computed in each step.
    """

    kind: BatchKind
    places: list[int]
    prompts: list[str]
    sources: list[str]
    layers: tuple[int, ...]
    shares: dict[int, float]
    subject_steps: range
    cond: Conditioning
    latent: Tensor
    mask: Tensor | None = None
    held: Tensor | None = None
    sparse: bool = False
    groups: list[RowGroup] = field(default_factory=list)
    context: ContextReuse | None = None

    def __post_init__(self):
        self.context = ContextReuse.of(self.cond)
        if self.sparse and self.mask is not None:
            self.groups = group_rows(self.mask, self.cond)

    @classmethod
    def start(
        cls,
        pipe: LoadedModel,
        source: Source,
        settings: ResolvedEdit,
        layers: Sequence[int],
        masks: Sequence[Mask | None],
        kind: BatchKind,
        places: list[int],
    ) -> "Batch":
        """Prepares a batch at the first step.

        Args:
            pipe: the models.
            source: where the edits begin.
            settings: of all edits.
            layers: the vital layers, the most vital first.
            masks: the painted mask of each of all edits.
            kind: see `group_edits`.
            places: likewise.
        """
        dose, entries, num = kind.dose, [settings.entries[place] for place in places], len(places)
        steps = window(source.num_steps, dose.inject_from, dose.until(source.is_noised))
        subject_steps = range(0)
        if dose.mask == "auto" and dose.hold_subject_until is not None:
            subject_steps = range(steps.stop, step_at(dose.hold_subject_until, source.num_steps))
        guidance = [settings.guidance if entry.guidance is None else entry.guidance for entry in entries]
        prompts = [entry.prompt for entry in entries]
        painted = [mask.tokens for mask in (masks[place] for place in places) if mask]
        # A mimicked scale takes the range of all tokens.
        mimics = settings.true_cfg != 1 and settings.mimic_scale is not None
        return cls(
            kind=kind,
            places=places,
            prompts=prompts,
            sources=source.prompts * (num // len(source.prompts)),
            layers=tuple(layers[: dose.top]),
            shares=dict(zip(steps, dose.shares(steps))),
            subject_steps=subject_steps,
            cond=pipe.condition(prompts, guidance, **guidance_args(settings)),
            latent=source.start.expand(num, -1, -1),
            mask=torch.cat(painted).to(pipe.device) if painted else None,
            sparse=settings.sparse and source.can_be_sparse and not mimics,
        )

    def share_at(self, index: int) -> float:
        """Returns the multiplier of the dose's weight in step `index`, as far as is known before it."""
        if index in self.subject_steps and self.held is not None:
            return 1.0
        return self.shares.get(index, 0.0)

    def layers_at(self, index: int) -> frozenset[int]:
        """Returns the layers in which step `index` injects."""
        share = self.share_at(index)
        return frozenset(layer for layer in self.layers if share * self.kind.dose.of_layer(layer) > 0)

    def needs_at(self, index: int, every: frozenset[int]) -> frozenset[int]:
        """Returns the layers whose keys and values step `index` needs of the reference, of `every` layer."""
        return every if self.groups else self.layers_at(index)

    @property
    def query_layers(self) -> frozenset[int]:
        """The layers in which it injects queries."""
        return frozenset(self.layers if "q" in self.kind.parts else ())

    def weight_at(self, layer: int, index: int) -> float | Tensor:
        """Returns the weight of what is injected: one for all tokens, or one for each, "B I"."""
        weight = self.share_at(index) * self.kind.dose.of_layer(layer)
        if index in self.subject_steps and self.held is not None:
            return weight * self.held
        if self.mask is None or weight == 1:
            return weight
        # Outside the mask the latent is the reference's, and so are all keys and values.
        return 1 - self.mask[:, :, 0].float() * (1 - weight)

    def intervention_at(self, index: int, reference: ReferenceStep) -> Passes[Intervention]:
        """Returns what step `index` injects of the reference, for each pass."""
        layers = self.layers_at(index)
        if not layers:
            return reference.kept.map(lambda _: NOTHING)
        weights = {layer: self.weight_at(layer, index) for layer in layers}
        partial = {
            layer: weight for layer, weight in weights.items() if isinstance(weight, Tensor) or weight < 1
        }

        def choose(kept: Parts) -> PartialParts:
            return tuple(x if part in self.kind.parts else None for part, x in zip("kvq", kept))

        return reference.kept.map(
            lambda kept: Intervention(inject={n: choose(kept[n]) for n in layers}, inject_weights=partial)
        )

    def set_mask(self, mask: Tensor, subject: Tensor | None) -> None:
        """Sets the automatic mask, "B I 1", and the subject's tokens, "B I"; both bool."""
        self.mask, whole_image = mask, mask.all(dim=1)
        self.held = subject & whole_image if subject is not None and whole_image.any() else None
        self.groups = group_rows(mask, self.cond) if self.sparse else []

    def step(
        self, pipe: LoadedModel, model: VelocityModel, source: Source, index: int, reference: ReferenceStep
    ) -> Step:
        """Takes one step beside the reference's.

        Returns:
            The Euler step of the edits, before drift and mask are applied.
        """
        ids, cond = pipe.image_ids(1, *source.size), source.cond_at(self.cond, index)
        interventions = self.intervention_at(index, reference)
        finds_mask = self.kind.dose.mask == "auto" and index == step_at(AUTO_MASK_AT, source.num_steps)
        if finds_mask:
            watching = replace(interventions.positive, watch=pipe.model.params.junction_layers)
            interventions = replace(interventions, positive=watching)
        latent = self.latent if reference.shift is None else self.latent + reference.shift
        where = model, latent, ids, cond, reference.t, reference.t_next
        if self.groups and reference.has_all(pipe.model.num_layers):
            self.context = None  # its keys and values are needed no more
            step = sparse_step(*where, interventions, reference.kept, self.groups, reference.velocity)
        else:
            step = euler_step(*where, interventions, context=self.context)
        if finds_mask:
            self.set_mask(*auto_mask(pipe, model, source, reference, self, step))
            step.watched.clear()
        self.latent = step.latent if reference.drift is None else step.latent + reference.drift
        if self.mask is not None:
            self.latent = torch.where(self.mask, self.latent, reference.next_latent)
        return step


def auto_mask(
    pipe: LoadedModel,
    model: VelocityModel,
    source: Source,
    reference: ReferenceStep,
    batch: Batch,
    step: Step,
) -> tuple[Tensor, Tensor | None]:
    """Finds the automatic masks of a batch, from the step that watched its edits.

    Returns:
        Which tokens each edit may change, "B I 1", bool; and the tokens of the subject that it shares with
        its source, "B I", bool, or None if no edit may change its whole image.
    """
    num, ids = len(batch.places), pipe.image_ids(1, *source.size)
    latent, own = reference.latent.expand(num, -1, -1), replace(batch.cond, negative=None)
    # The source gets the guidance of the edits, since other guidance changes the velocity everywhere.
    cond = replace(source.cond.expanded(num), negative=None, guidance=own.guidance)
    watching = Intervention(watch=pipe.model.params.junction_layers)
    of_source = euler_step(model, latent, ids, cond, reference.t, reference.t_next, watching)
    of_edits = euler_step(model, latent, ids, own, reference.t, reference.t_next)
    divergence = (of_edits.velocity - of_source.velocity).square().mean(dim=2).sqrt()
    sources = WatchedPass(batch.sources, of_source.watched)
    mask = changed_tokens(
        pipe.t5, sources, WatchedPass(batch.prompts, step.watched), divergence, *source.size
    )
    if not mask.all(dim=1).any():
        return mask, None
    return mask, subject_tokens(pipe.t5, sources, batch.prompts, *source.size)


# ---- all batches


def start_batches(
    pipe: LoadedModel,
    source: Source,
    settings: ResolvedEdit,
    layers: Sequence[int],
    masks: Sequence[Mask | None],
) -> list[Batch]:
    """Prepares the batches of all edits, at most `batch_size` edits each.

    Args:
        pipe: the models.
        source: where the edits begin. If it has a row for each edit, there must be one batch.
        settings: of the edits.
        layers: the vital layers, the most vital first.
        masks: the painted mask of each edit.
    """
    groups = group_edits(settings.entries, [mask is not None for mask in masks], settings.batch_size)
    return [Batch.start(pipe, source, settings, layers, masks, kind, places) for kind, places in groups]


def run_batches(
    pipe: LoadedModel,
    source: Source,
    batches: Sequence[Batch],
    kept: Sequence[ReferenceStep] | None = None,
    on_step: OnStep | None = None,
    progress: bool = False,
) -> Tensor:
    """Runs the edits of all batches beside their reference. Their latents are then the finished ones.

    Args:
        pipe: the models.
        source: where the edits begin.
        batches: the edits.
        kept: the steps of a kept reference. If None, the reference is computed, and nothing is kept beyond a
            step.
        on_step: called with each step of the first batch. Its number and the total count the steps of an
            inversion too, unless the reference was kept.
        progress: whether to show a progress bar.

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
        if kept is not None:
            return _follow(pipe, model, source, prefetch(kept, pipe.device), batches, report)
        every = frozenset(range(pipe.model.num_layers))
        steps = source.steps(
            model,
            lambda index: frozenset[int]().union(*(batch.needs_at(index, every) for batch in batches)),
            frozenset[int]().union(*(batch.query_layers for batch in batches)),
        )
        return _follow(pipe, model, source, steps, batches, report)


Report = Callable[[Step, int], None]


def _follow(
    pipe: LoadedModel,
    model: VelocityModel,
    source: Source,
    steps: Iterable[ReferenceStep],
    batches: Sequence[Batch],
    report: Report,
) -> Tensor:
    """Takes each step of the batches beside the reference's; returns the reference's last latent."""
    for batch in batches:
        batch.cond = batch.cond.scheduled(model, source.levels[:-1])
    latent = source.start
    for index, reference in enumerate(steps):
        shown = reference.step
        for number, batch in enumerate(batches):
            step = batch.step(pipe, model, source, index, reference)
            if number == 0:
                shown = step
        if shown:
            report(shown, index)
        latent = reference.next_latent
    for batch in batches:
        batch.context, batch.groups = None, []  # frees the context's keys and values before decoding
    return latent


def _flow_edits(
    pipe: LoadedModel, model: VelocityModel, source: Source, batches: Sequence[Batch], report: Report
) -> None:
    """Runs FlowEdit for each batch, with new noise in each step."""
    seed, ids = source.settings.seed, pipe.image_ids(1, *source.size)
    for number, batch in enumerate(batches):
        noises = [pipe.noise([seed + index], *source.size) for index in range(source.num_steps)]
        how = model, source.start, ids, source.cond, batch.cond, source.levels, noises
        prior: Tensor | float = 1.0
        if source.settings.inversion == "decflowedit":
            prior = spatial_prior(*how, columns=source.size[0] // TOKEN)
        latents = flow_edit(*how, batch.mask, prior)
        for index, latent in enumerate(latents):
            batch.latent = latent
            step = Step(0.0, 0.0, latent, torch.zeros_like(latent))
            report(step, number * source.num_steps + index)
