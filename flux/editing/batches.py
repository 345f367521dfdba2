"""Batches of edits that go through the model together: which edits share one, and one step of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flux.editing.automask import WatchedPass, auto_mask
from flux.editing.photo import Mask
from flux.editing.source import ReferenceStep, Source, guidance_args
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

AUTO_MASK_AT = 0.25  # of the steps: by then the layout is settled, and little has drifted


# ---- which edits share a batch


@dataclass(frozen=True)
class BatchKind:
    """The properties that all edits of a batch share.

    Attributes:
        dose: How much is injected. Its mask is "auto", or None for a painted mask and for none.
        parts: Which of queries, keys and values are injected.
        painted: Whether the edits have masks given as images.
    """

    dose: Dose
    parts: InjectedParts
    painted: bool


def group_edits(
    entries: Sequence[Turn], painted: Sequence[bool], batch_size: int
) -> list[tuple[BatchKind, list[int]]]:
    """Divide edits into batches of one kind each.

    Args:
        entries: The edits.
        painted: Whether each edit has a mask given as an image, which takes precedence over "auto".
        batch_size: The largest number of edits in a batch.

    Returns:
        For each batch its kind, and the places of its edits in `entries`, ascending.
    """
    groups: list[tuple[BatchKind, list[int]]] = []
    for place, (entry, has_image) in enumerate(zip(entries, painted, strict=True)):
        dose = entry.effective_dose()
        mask = "auto" if dose.mask == "auto" and not has_image else None
        kind = BatchKind(replace(dose, mask=mask), entry.parts or "kv", has_image)
        # Not a dictionary: a dose with a weight for each layer has no hash.
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
        kind: What the edits have in common.
        places: Their places among all edits.
        prompts: What each edit shows.
        layers: The layers that the dose may inject in, the most vital first.
        shares: Multiplier of the dose's weight by step. Steps that are not listed inject nothing.
        subject_steps: Further steps, in which edits of the whole image hold their subject.
        cond: Steers the edits.
        latent: Where the edits are, "B I 64".
        mask_step: The step in which an automatic mask is found. None without one.
        mask: Which tokens may change, "B I 1", bool. If None, all. With an automatic mask, None until it is
            found.
        held: The subject's tokens in edits whose automatic mask is the whole image, "B I", bool. None if
            there is no such edit, as far as is known.
        sparse: Whether tokens that may not change are left out, once the mask is known.
        groups: The rows by the tokens that they compute. Empty while all rows compute all tokens.
        context: Reuses the context's keys and values, while the rows are not in groups. If None, they are
            computed in each step.
    """

    kind: BatchKind
    places: list[int]
    prompts: list[str]
    layers: tuple[int, ...]
    shares: dict[int, float]
    subject_steps: range
    cond: Conditioning
    latent: Tensor
    mask_step: int | None = None
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
        kind: BatchKind,
        places: list[int],
        layers: Sequence[int],
        masks: Sequence[Mask | None],
    ) -> "Batch":
        """Prepare a batch at the first step.

        Args:
            pipe: The models.
            source: Where the edits begin.
            kind: See `group_edits`.
            places: Likewise.
            layers: The vital layers, the most vital first.
            masks: The painted mask of each of all edits.
        """
        settings, dose = source.settings, kind.dose
        entries = [settings.entries[place] for place in places]
        prompts = [entry.prompt for entry in entries]
        guidance = [settings.guidance if entry.guidance is None else entry.guidance for entry in entries]
        painted = [mask.tokens for place in places if (mask := masks[place])]
        steps, subject_steps = _injecting_steps(dose, source)
        # A mimicked scale takes the range of all tokens.
        mimics = settings.true_cfg != 1 and settings.mimic_scale is not None
        return cls(
            kind=kind,
            places=places,
            prompts=prompts,
            layers=tuple(layers[: dose.top]),
            shares=dict(zip(steps, dose.shares(steps))),
            subject_steps=subject_steps,
            cond=pipe.condition(prompts, guidance, **guidance_args(settings)),
            latent=source.start.expand(len(places), -1, -1),
            mask_step=step_at(AUTO_MASK_AT, source.num_steps) if dose.mask == "auto" else None,
            mask=torch.cat(painted).to(pipe.device) if painted else None,
            sparse=settings.sparse and source.can_be_sparse and not mimics,
        )

    def share_at(self, index: int) -> float:
        """Return the multiplier of the dose's weight in step `index`, as far as is known before it."""
        if index in self.subject_steps and self.held is not None:
            return 1.0
        return self.shares.get(index, 0.0)

    def layers_at(self, index: int) -> frozenset[int]:
        """Return the layers in which step `index` injects."""
        share = self.share_at(index)
        return frozenset(layer for layer in self.layers if share * self.kind.dose.of_layer(layer) > 0)

    def needs_at(self, index: int, every: frozenset[int]) -> frozenset[int]:
        """Return the layers whose keys and values step `index` needs of the reference, of `every` layer."""
        return every if self.groups else self.layers_at(index)

    @property
    def query_layers(self) -> frozenset[int]:
        """The layers in which it injects queries."""
        return frozenset(self.layers if "q" in self.kind.parts else ())

    def weight_at(self, layer: int, index: int) -> float | Tensor:
        """Return the weight of what is injected: one for all tokens, or one for each, "B I"."""
        weight = self.share_at(index) * self.kind.dose.of_layer(layer)
        if index in self.subject_steps and self.held is not None:
            return weight * self.held
        if self.mask is None or weight == 1:
            return weight
        # Outside the mask the latent is the reference's, and so are all keys and values.
        return 1 - self.mask[:, :, 0].float() * (1 - weight)

    def intervention_at(self, reference: ReferenceStep) -> Passes[Intervention]:
        """Return what the batch injects of a step of the reference, for each pass."""
        layers = self.layers_at(reference.index)
        if not layers:
            return reference.kept.map(lambda _: NOTHING)
        weights = {layer: self.weight_at(layer, reference.index) for layer in layers}
        partial = {n: weight for n, weight in weights.items() if isinstance(weight, Tensor) or weight < 1}

        def choose(kept: Parts) -> PartialParts:
            return tuple(x if part in self.kind.parts else None for part, x in zip("kvq", kept))

        return reference.kept.map(
            lambda kept: Intervention(inject={n: choose(kept[n]) for n in layers}, inject_weights=partial)
        )

    def set_mask(self, mask: Tensor, subject: Tensor | None) -> None:
        """Set the automatic mask, "B I 1", and the subject's tokens, "B I"; both bool."""
        self.mask, whole_image = mask, mask.all(dim=1)
        self.held = subject & whole_image if subject is not None and whole_image.any() else None
        self.groups = group_rows(mask, self.cond) if self.sparse else []

    def step(self, pipe: LoadedModel, model: VelocityModel, source: Source, reference: ReferenceStep) -> Step:
        """Take one step beside the reference's.

        Returns:
            The Euler step of the edits, before drift and mask are applied.
        """
        cond, interventions = source.cond_at(self.cond, reference.index), self.intervention_at(reference)
        finds_mask = reference.index == self.mask_step
        if finds_mask:
            watching = replace(interventions.positive, watch=pipe.model.params.junction_layers)
            interventions = replace(interventions, positive=watching)
        latent = self.latent if reference.shift is None else self.latent + reference.shift
        where = model, latent, source.img_ids, cond
        if self.groups and reference.has_all(pipe.model.num_layers):
            self.context = None  # its keys and values are needed no more
            step = sparse_step(*where, interventions, reference, self.groups)
        else:
            step = euler_step(*where, reference.t, reference.t_next, interventions, context=self.context)
        if finds_mask:
            edits = WatchedPass(self.prompts, step.watched)
            self.set_mask(*auto_mask(pipe, model, source, reference, self.cond, edits))
            step.watched.clear()
        self.latent = step.latent if reference.drift is None else step.latent + reference.drift
        if self.mask is not None:
            self.latent = torch.where(self.mask, self.latent, reference.next_latent)
        return step


def _injecting_steps(dose: Dose, source: Source) -> tuple[range, range]:
    """Find the steps that inject by the dose, and the later ones that hold the subject alone."""
    steps = window(source.num_steps, dose.inject_from, dose.until(source.is_noised))
    if dose.mask != "auto" or dose.hold_subject_until is None:
        return steps, range(0)
    return steps, range(steps.stop, step_at(dose.hold_subject_until, source.num_steps))


def start_batches(
    pipe: LoadedModel, source: Source, layers: Sequence[int], masks: Sequence[Mask | None]
) -> list[Batch]:
    """Prepare the batches of all edits of the source's settings, at most `batch_size` edits each.

    Args:
        pipe: The models.
        source: Where the edits begin. If it has a row for each edit, there must be one batch.
        layers: The vital layers, the most vital first.
        masks: The painted mask of each edit.
    """
    settings = source.settings
    groups = group_edits(settings.entries, [mask is not None for mask in masks], settings.batch_size)
    return [Batch.start(pipe, source, kind, places, layers, masks) for kind, places in groups]
