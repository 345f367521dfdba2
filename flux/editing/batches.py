"""Edits that go through the model together, beside their reference."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from flux.editing.automask import changed_tokens, subject_tokens
from flux.editing.flow_edit import flow_edit
from flux.editing.reference import Moment, Source, steering
from flux.intervention import NOTHING, Intervention
from flux.math import KeysValues
from flux.model import Flux
from flux.pipeline import Pipeline
from flux.sampling import Conditioning, Step, euler_step, step_at, window
from flux.settings.demos import EditSettings, Turn
from flux.settings.doses import Dose

AUTO_MASK_AT = 0.25  # of the steps: by then the layout stands, and little has drifted


@dataclass(eq=False)
class Batch:
    """Edits of one dose that go through the model together.

    Attributes:
        places: their places among all edits.
        sources: for each, the prompt of what it starts from.
        shares: what is left of the dose's weight in each step; in those not named nothing is taken.
        longer: further steps, in which edits that may change all of the picture take their subject.
        latent: where they are, "B I 64".
        mask: which tokens may change, "B I 1", bool; None: all. If the dose's mask is "auto", it is found on
            the way.
        all_over: with a mask so found, which edits may change all of the picture, "B 1", bool; None: none.
        subject: found for those, which tokens are the subject's that stays, "B I", bool.
    """

    places: list[int]
    sources: list[str]
    entries: list[Turn]
    dose: Dose
    layers: tuple[int, ...]
    shares: dict[int, float]
    longer: range
    cond: Conditioning
    latent: Tensor
    mask: Tensor | None
    all_over: Tensor | None = None
    subject: Tensor | None = None

    def takes(self, index: int) -> frozenset[int]:
        """The layers in which step `index` takes from the reference, as far as is known before it."""
        share = self._share(index)
        return frozenset(layer for layer in self.layers if share * self.dose.of_layer(layer) > 0)

    def _share(self, index: int) -> float:
        held = index in self.longer and self.all_over is not None
        return 1.0 if held else self.shares.get(index, 0.0)

    def found(self, mask: Tensor, subject: Tensor | None) -> None:
        """Takes over what was found on the way."""
        self.mask, self.subject, all_over = mask, subject, mask.all(dim=1)
        self.all_over = all_over if all_over.any() else None

    def taking(self, index: int, moment: Moment) -> Intervention:
        layers = self.takes(index)
        if not layers:
            return NOTHING

        def parts(kept: dict[int, KeysValues]) -> dict[int, KeysValues]:
            which = self.entries[0].parts
            return {n: tuple(x if part in which else None for part, x in zip("kv", kept[n])) for n in layers}

        weights = {layer: self._share(index) * self.dose.of_layer(layer) for layer in layers}
        if index in self.longer:
            held = self.subject & self.all_over
            weights = {layer: weight * held for layer, weight in weights.items()}
        elif self.mask is not None:
            # Outside the mask the latent is the reference's, and so are keys and values.
            may_change = self.mask[:, :, 0].float()
            weights = {n: 1 - may_change * (1 - w) if w < 1 else w for n, w in weights.items()}
        negative = moment.kept_negative
        return Intervention(
            take=parts(moment.kept),
            take_negative=None if negative is None else parts(negative),
            weights={layer: w for layer, w in weights.items() if isinstance(w, Tensor) or w < 1},
        )


Mask = tuple[Image.Image, Tensor]
"""Where an edit may change its source: as a picture, and as tokens, "1 I 1", bool."""


def batches_of(
    pipe: Pipeline,
    source: Source,
    settings: EditSettings,
    layers: Sequence[int],
    masks: Sequence[Mask | None],
) -> list[Batch]:
    """Edits that share dose and kind of mask, `batch_size` at a time."""
    groups: list[tuple[tuple, list[int]]] = []
    entries = settings.entries
    for place, (entry, mask) in enumerate(zip(entries, masks)):
        dose = entry.effective_dose()
        dose = replace(dose, mask="auto" if mask is None and dose.mask == "auto" else None)
        key = (dose, entry.parts, mask is None)
        members = next((members for other, members in groups if other == key), None)
        if members is None:
            groups.append((key, members := []))
        members.append(place)
    batches = []
    for (dose, *_), members in groups:
        steps = window(source.num_steps, dose.inject_from, dose.inject_until)
        longer = range(0)
        if dose.mask == "auto" and dose.all_over_until is not None:
            longer = range(steps.stop, step_at(dose.all_over_until, source.num_steps))
        for start in range(0, len(members), settings.batch_size):
            places = members[start : start + settings.batch_size]
            chosen = [entries[place] for place in places]
            guidance = [settings.guidance if e.guidance is None else e.guidance for e in chosen]
            cond = pipe.condition([entry.prompt for entry in chosen], guidance, **steering(settings))
            mask = None
            if masks[places[0]]:
                mask = torch.cat([masks[place][1] for place in places]).to(pipe.device)
            shares, latent = dict(zip(steps, dose.shares(steps))), source.start.expand(len(places), -1, -1)
            own, sources = tuple(layers[: dose.top]), source.prompts * (len(places) // len(source.prompts))
            batches.append(Batch(places, sources, chosen, dose, own, shares, longer, cond, latent, mask))
    return batches


def follow(
    pipe: Pipeline,
    model: Flux,
    source: Source,
    moments: Iterator[Moment],
    batches: Sequence[Batch],
    on_step: Callable[[Step, int], object],
) -> Tensor:
    """Takes the batches down beside the reference; returns the reference's last latent."""
    ids, auto_at = pipe.image_ids(1, *source.size), step_at(AUTO_MASK_AT, source.num_steps)
    latent = source.start
    for batch in batches:
        batch.cond = batch.cond.scheduled(model, source.levels[:-1])
    for index, moment in enumerate(moments):
        shown = moment.step
        for batch in batches:
            taking = batch.taking(index, moment)
            look = batch.dose.mask == "auto" and index == auto_at
            if look:
                taking = replace(taking, watch=pipe.model.params.around_the_joint)
            cond = source.at(batch.cond, index)
            step = euler_step(model, batch.latent, ids, cond, moment.t, moment.t_next, taking)
            if look:
                batch.found(*_auto_mask(pipe, model, source, moment, batch, step, ids))
            batch.latent = step.latent if moment.drift is None else step.latent + moment.drift
            if batch.mask is not None:
                batch.latent = torch.where(batch.mask, batch.latent, moment.next_latent)
            if batch is batches[0]:
                shown = step
        latent = moment.next_latent
        if shown:
            on_step(shown, index)
        # Before the next step's keys and values are made, else two steps' lie in memory at once.
        moment = taking = step = shown = None
    return latent


def _auto_mask(
    pipe: Pipeline, model: Flux, source: Source, moment: Moment, batch: Batch, step: Step, ids: Tensor
) -> tuple[Tensor, Tensor | None]:
    """From the step that watched the edits of a batch: which tokens they may change, "B I 1", and which are
    the subject's that they share with their sources, "B I", bool; None if no edit may change all of them.
    """
    num, watching = len(batch.entries), Intervention(watch=pipe.model.params.around_the_joint)
    at, own = moment.latent.expand(num, -1, -1), replace(batch.cond, negative=None)
    # As strongly guided as the edits: how strongly makes a difference everywhere.
    cond = replace(source.cond.expanded(num), negative=None, guidance=own.guidance)
    of_source = euler_step(model, at, ids, cond, moment.t, moment.t_next, watching)
    of_edits = euler_step(model, at, ids, own, moment.t, moment.t_next)
    apart = (of_edits.velocity - of_source.velocity).square().mean(dim=2).sqrt()
    prompts = [entry.prompt for entry in batch.entries]
    watched = (batch.sources, of_source.watched), (prompts, step.watched)
    mask = changed_tokens(pipe.t5, *watched, apart, *source.size)
    if not mask.all(dim=1).any():
        return mask, None
    return mask, subject_tokens(pipe.t5, of_source.watched, batch.sources, prompts, *source.size)


def flow(
    pipe: Pipeline,
    model: Flux,
    source: Source,
    batches: Sequence[Batch],
    on_step: Callable[[Step, int], object],
) -> None:
    """FlowEdit of each batch, with noises of its own."""
    width, height = source.size
    ids, seed = pipe.image_ids(1, width, height), source.settings.seed
    for number, batch in enumerate(batches):
        noises = (pipe.noise([seed + index], width, height) for index in range(source.num_steps))
        given = (source.start, ids, source.cond, batch.cond, source.levels, noises, batch.mask)
        for index, latent in enumerate(flow_edit(model, *given)):
            batch.latent = latent
            on_step(Step(0.0, 0.0, latent, torch.zeros_like(latent), {}), number * source.num_steps + index)
