"""Runs one editing method on several items of a benchmark, as one batch.

A Kontext model edits by instructions: the photograph of each item is the context image of its row, the
instruction is its prompt. With a strength of 1 it starts from noise alone, as Kontext is made to. Methods
without a strength also make a reference of the photograph, with an empty prompt, and inject its kv.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from PIL import Image
from torch import Tensor

from flux.conditions.images import Steering
from flux.conditions.kontext import kontext_condition
from flux.editing.batches import start_batches
from flux.editing.photo import Mask, token_mask
from flux.editing.run import run_batches
from flux.editing.source import generated_source, guidance_args, photo_source
from flux.evaluate.benchmark import Item
from flux.evaluate.resolve import ResolvedMethod
from flux.inputs import Condition
from flux.intervention import Intervention
from flux.loaded_model import LoadedModel, count_evaluations


@dataclass(frozen=True, eq=False)
class EditResult:
    """A method's edit of one item.

    Attributes:
        image: The edit.
        reference: The reference it was made from, if that was generated.
        seconds: The edit's share of its batch's whole time. None if it was not recorded.
        evaluations: The edit's share of the transformer's evaluations, counted per image.
        mask_iou: Intersection over union of the tokens of the automatic mask and those that the benchmark's
            mask touches. None without an automatic mask.
    """

    image: Image.Image
    reference: Image.Image | None
    seconds: float | None
    evaluations: float | None
    mask_iou: float | None = None


class MethodRunner:
    """Makes edits with one loaded model.

    Args:
        pipe: The model.
        size: Width and height of the edits in pixels.
        seed: Added to the seed of each item.
        photos: Whether to edit the photographs. If False, the references are generated from the prompts.
        reconstruct: Whether to use each photograph's own prompt instead of the edit's.
    """

    def __init__(
        self,
        pipe: LoadedModel,
        size: tuple[int, int],
        seed: int = 0,
        photos: bool = True,
        reconstruct: bool = False,
    ):
        self.pipe, self.size, self.seed, self.photos = pipe, size, seed, photos
        self.reconstruct, self.by_instruction = reconstruct, pipe.spec.condition == "kontext"

    def run(self, method: ResolvedMethod | None, items: Sequence[Item]) -> list[EditResult]:
        """Edit the items as one batch. If `method` is None, the autoencoder encodes and decodes them.

        Raises:
            InputError: As `flux.editing.edit.edit`.
        """
        begin = time.perf_counter()
        references: Sequence[Image.Image | None] = [None] * len(items)
        ious: Sequence[float | None] = [None] * len(items)
        with count_evaluations(self.pipe) as evaluations, torch.inference_mode():
            if method is None:
                images = self._decoded(self._encoded(items))
            elif method.strength is not None:
                images = self._image_to_image(self._steered(method, items), method, method.strength, items)
            else:
                images, references, ious = self._edited(self._steered(method, items), method, items)
        shares = ((time.perf_counter() - begin) / len(items), evaluations() / len(items))
        return [EditResult(image, ref, *shares, iou) for image, ref, iou in zip(images, references, ious)]

    def _photos(self, items: Sequence[Item]) -> list[Image.Image]:
        return [item.photo(*self.size) for item in items]

    def _encoded(self, items: Sequence[Item]) -> Tensor:
        return torch.cat([self.pipe.encode(photo) for photo in self._photos(items)])

    def _decoded(self, latents: Tensor) -> list[Image.Image]:
        return self.pipe.decode(latents, *self.size)

    def _targets(self, items: Sequence[Item]) -> list[str]:
        return [item.prompt(self.by_instruction, self.reconstruct) for item in items]

    def _seeds(self, items: Sequence[Item]) -> list[int]:
        return [self.seed + item.seed for item in items]

    def _steered(self, method: ResolvedMethod, items: Sequence[Item]) -> LoadedModel:
        """The model, which sees each item's photograph in the item's row if it edits by instructions."""
        pipe = self.pipe
        if not self.by_instruction:
            return pipe
        side, strength = pipe.spec.size, method.settings.reference_strength
        conditions = [
            kontext_condition(pipe.encode_pixels, photo, side, strength=strength)
            for photo in self._photos(items)
        ]
        condition = reduce(Condition.stacked, conditions)
        return replace(pipe, steering=Steering(condition, method.settings.context_every))

    def _image_to_image(
        self, pipe: LoadedModel, method: ResolvedMethod, strength: float, items: Sequence[Item]
    ) -> list[Image.Image]:
        """Generate from the photographs with added noise (SDEdit, arXiv 2108.01073)."""
        settings, (width, height) = method.settings, self.size
        return pipe.generate(
            self._targets(items),
            self._seeds(items),
            width=width,
            height=height,
            num_steps=settings.num_steps,
            guidance=settings.guidance,
            **guidance_args(settings),
            image=self._photos(items),
            strength=strength,
            intervention=Intervention(hide_context=method.hidden),
            progress=False,
        )

    def _edited(
        self, pipe: LoadedModel, method: ResolvedMethod, items: Sequence[Item]
    ) -> tuple[list[Image.Image], Sequence[Image.Image | None], Sequence[float | None]]:
        """Edit each item as `flux.editing.edit.edit` does, but with all items in the rows of one batch.

        Returns:
            The edits; the references if they were generated, else None for each; and each edit's
            `EditResult.mask_iou`.
        """
        settings = method.settings
        prompts = ["" if self.by_instruction else item.source for item in items]
        masks: list[Mask | None] = [None] * len(items)
        if settings.mask == "given":
            images = [item.mask(*self.size) for item in items]
            masks = [Mask(image, token_mask(image, [self.size], *self.size)) for image in images]
        settings = settings.model_copy(
            update={
                "edits": tuple(self._targets(items)),
                "batch_size": len(items),
                "mask": None if settings.mask == "given" else settings.mask,
                "seed": self.seed,
            }
        )
        if self.photos:
            source = photo_source(pipe, settings, prompts, self._encoded(items))
        else:
            source = generated_source(pipe, settings, prompts, self._seeds(items))
        [batch] = start_batches(pipe, source, method.layers, masks)
        latent = run_batches(pipe, source, [batch])
        edits = self._decoded(batch.latent / source.scale)
        nothing = [None] * len(items)
        if not self.photos:
            return edits, self._decoded(latent), nothing
        found = batch.mask if batch.kind.dose.mask == "auto" else None
        return edits, nothing, nothing if found is None else self._ious(found, items)

    def _ious(self, masks: Tensor, items: Sequence[Item]) -> list[float | None]:
        """Compare masks of tokens, "B I 1", with the benchmark's. None where that has no pixel."""
        ious: list[float | None] = []
        for found, item in zip(masks.cpu(), items):
            image = item.mask(*self.size, guarded=False)
            exact = token_mask(image, [self.size], *self.size)[0] if image.getbbox() else None
            ious.append(None if exact is None else ((found & exact).sum() / (found | exact).sum()).item())
        return ious
