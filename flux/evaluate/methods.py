"""Edits of a benchmark made by one method, several at once."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from flux.editing.batches import batches_of, flow, follow
from flux.editing.flow_edit import FLOW_EDIT_GUIDANCE
from flux.editing.photo import token_mask
from flux.editing.reference import Source, replayed, steering
from flux.evaluate.benchmark import Item
from flux.evaluate.settings import Method
from flux.pipeline import Pipeline, counted
from flux.sampling import Step, sample
from flux.settings.demos import EditSettings


@dataclass(frozen=True, eq=False)
class Made:
    """An edit, and the generated reference it was made from, if any.

    Attributes:
        seconds: its share of the time that its batch took, everything included.
        evaluations: of the transformer, on one picture each.
    """

    picture: Image.Image
    reference: Image.Image | None
    seconds: float
    evaluations: float


class Maker:
    """Makes edits with one loaded model.

    Args:
        size: width and height of the edits.
        seed: added to that of each item.
        photos: whether the photographs are edited, or pictures generated from their prompts.
        reconstruct: whether each photograph's own prompt takes the place of the edit's.
    """

    def __init__(
        self,
        pipe: Pipeline,
        size: tuple[int, int],
        seed: int = 0,
        photos: bool = True,
        reconstruct: bool = False,
    ):
        self.pipe, self.size, self.seed, self.photos = pipe, size, seed, photos
        self.reconstruct = reconstruct

    def make(self, method: Method | None, items: Sequence[Item]) -> list[Made]:
        """The items' edits by the method, as one batch; None: the autoencoder's round trip alone.

        Raises:
            InputError: as `flux.editing.edit.edit`.
        """
        begin = time.perf_counter()
        with counted(self.pipe) as evaluations, torch.inference_mode():
            if method is None:
                pictures, references = self._decoded(self._encoded(items)), None
            elif method.strength is not None:
                pictures, references = self._image_to_image(method, items), None
            else:
                pictures, references = self._edited(method, items)
        shares = ((time.perf_counter() - begin) / len(items), evaluations() / len(items))
        return [Made(*pair, *shares) for pair in zip(pictures, references or [None] * len(items))]

    def _encoded(self, items: Sequence[Item]) -> Tensor:
        return torch.cat([self.pipe.encode(item.photo(*self.size)) for item in items])

    def _decoded(self, latents: Tensor) -> list[Image.Image]:
        return self.pipe.decode(latents, *self.size)

    def _targets(self, items: Sequence[Item]) -> list[str]:
        return [item.source if self.reconstruct else item.target for item in items]

    def _image_to_image(self, method: Method, items: Sequence[Item]) -> list[Image.Image]:
        """SDEdit (arXiv 2108.01073): noise of that strength, and from there to the new prompt."""
        settings, pipe = method.settings, self.pipe
        cond = pipe.condition(self._targets(items), settings.guidance, **steering(settings))
        levels = pipe.schedule(settings.num_steps, *self.size)
        levels = levels[round((1 - method.strength) * settings.num_steps) :]
        noise = pipe.noise([self.seed + item.seed for item in items], *self.size)
        latent = levels[0] * noise + (1 - levels[0]) * self._encoded(items)
        with pipe.denoising() as model:
            for step in sample(model, latent, pipe.image_ids(1, *self.size), cond, levels):
                latent = step.latent
        return self._decoded(latent)

    def _edited(
        self, method: Method, items: Sequence[Item]
    ) -> tuple[list[Image.Image], list[Image.Image] | None]:
        """What `flux.editing.edit.edit` makes of each item, its references and edits in rows of one batch; the
        edits, and the references if they were generated.
        """
        pipe, settings = self.pipe, method.settings
        masks = [None] * len(items)
        if settings.mask == "given":
            pictures = [item.mask(*self.size) for item in items]
            masks = [(picture, token_mask(picture, [self.size], *self.size)) for picture in pictures]
        settings = settings.model_copy(
            update={
                "edits": tuple(self._targets(items)),
                "batch_size": len(items),
                "mask": None if settings.mask == "given" else settings.mask,
                "seed": self.seed,
            }
        )
        source = self._source(settings, items)
        [batch] = batches_of(pipe, source, settings, settings.vital_layers, masks)
        batch.sources = [item.source for item in items]
        with pipe.denoising() as model:
            if source.path is None and self.photos:
                flow(pipe, model, source, [batch], _unseen)
            else:
                moments = source.moments(model, pipe.image_ids(1, *self.size), batch.takes)
                latent = follow(pipe, model, source, moments, [batch], _unseen)
        edits = self._decoded(batch.latent / source.scale)
        return edits, None if self.photos else self._decoded(latent)

    def _source(self, settings: EditSettings, items: Sequence[Item]) -> Source:
        """What `flux.editing.reference.find_source` finds for each item, in rows of one batch."""
        pipe, prompts = self.pipe, [item.source for item in items]
        levels = pipe.schedule(settings.num_steps, *self.size)
        common = (prompts[0], settings, levels)
        if not self.photos:
            cond = pipe.condition(prompts, settings.guidance, **steering(settings))
            return Source(*common, cond, pipe.noise([self.seed + item.seed for item in items], *self.size))
        clean = self._encoded(items)
        if settings.inversion == "none" and not settings.as_published:
            return Source(*common, pipe.condition(prompts, FLOW_EDIT_GUIDANCE, **steering(settings)), clean)
        cond = pipe.condition(prompts, 1.0, **steering(settings))
        path, scale = replayed(pipe, settings, cond, clean, levels)
        return Source(*common, cond, path[0], path, scale)


def _unseen(step: Step, index: int) -> None:
    """No one watches the steps."""
