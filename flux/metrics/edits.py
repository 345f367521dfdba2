"""Measures of edits: how well they keep what they should, and how well they follow their prompts.

They are those of PIE-Bench (Ju et al. 2023, arXiv 2310.01506, section 5.1) and the direction in CLIP's space
(StyleGAN-NADA, arXiv 2108.00946).

A mask is an array of booleans "H W", true where an edit may change its image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from flux.errors import InputError
from flux.metrics.features import CHUNK, DINOV2, Clip, Lpips, VisionKind, load_vision
from flux.metrics.pixels import MAX_PSNR, Ssim, decibels, mean_squared_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EditScores = dict[str, float | None]
"""The scores of one edit by name. None where it has no mask, or a mask that leaves nothing to measure."""

OUTSIDE = ("psnr", "mse", "pie_psnr", "pie_mse", "ssim")
"""Names of the scores that need no model."""
NETS = {
    "structure": ("structure",),
    "lpips": ("lpips",),
    "clip": ("clip", "clip_edited", "clip_direction"),
}
"""Models to measure with, and the names of the scores of each."""


@dataclass(frozen=True, eq=False)
class MeasuredEdit:
    """An image before and after its edit, the mask, if any, and both prompts."""

    before: Image.Image
    after: Image.Image
    mask: np.ndarray | None
    source: str
    target: str


class EditMetrics:
    """The measures of edits: those without a model, and those of the models that are given.

    Always measured, outside the mask:
        psnr: in dB, capped at MAX_PSNR; mse: of colours in 0..1. Both over the pixels outside the mask.
        pie_psnr, pie_mse, ssim: as in PIE-Bench's own evaluation, over whole images whose masked part is
            made black in both. The masked part thus counts as kept without error.

    Args:
        structure: Measures `structure`, the distance of self-similarities.
        lpips: Measures `lpips`, the distance of the blackened images.
        clip: Measures `clip`, 100 times the cosine of edit and prompt; `clip_edited`, the same inside the
            mask; `clip_direction`, the cosine between the image's change and the prompt's.
        device: Where SSIM computes.
    """

    def __init__(
        self,
        structure: "Structure | None" = None,
        lpips: Lpips | None = None,
        clip: "ClipText | None" = None,
        device: str | torch.device = "cpu",
    ):
        self.structure, self.lpips, self.clip = structure, lpips, clip
        self.ssim = Ssim.load(device=device)

    @classmethod
    def load(
        cls, names: Sequence[str], encoder: str, clip: str, device: str | torch.device = "cpu"
    ) -> "EditMetrics":
        """Load the measures with the models of some names.

        Args:
            names: Keys of NETS.
            encoder: Hub id or folder of the DINO for "structure".
            clip: Hub id or folder of the CLIP for "clip".
            device: Where the models compute.

        Raises:
            InputError: A package or weights are missing.
        """
        return cls(
            Structure.load(encoder, device) if "structure" in names else None,
            Lpips.load("squeeze", device) if "lpips" in names else None,  # as PIE-Bench's tables
            ClipText.load(clip, device) if "clip" in names else None,
            device,
        )

    def measure(self, edits: Sequence[MeasuredEdit]) -> list[EditScores]:
        """Return the scores of each edit."""
        scores: list[EditScores] = [dict.fromkeys(OUTSIDE) for _ in edits]
        masks = {
            n: edit.mask for n, edit in enumerate(edits) if edit.mask is not None and not edit.mask.all()
        }
        outside = [_black_except(edits[n], ~mask) for n, mask in masks.items()]
        befores, afters = [edit.before for edit in outside], [edit.after for edit in outside]
        for (n, mask), edit, ssim in zip(masks.items(), outside, self.ssim.compare(befores, afters)):
            whole = mean_squared_error(edit.before, edit.after)
            mse = whole / float((~mask).mean())
            scores[n] |= {"psnr": min(MAX_PSNR, decibels(mse)), "mse": mse}
            scores[n] |= {"pie_psnr": min(MAX_PSNR, decibels(whole)), "pie_mse": whole, "ssim": ssim}
        if self.structure:
            for own, distance in zip(scores, self.structure.distances(edits), strict=True):
                own["structure"] = distance
        if self.lpips:
            kept = dict(zip(masks, self.lpips.compare(befores, afters), strict=True))
            for n, own in enumerate(scores):
                own["lpips"] = 1 - kept[n] if n in kept else None
        if self.clip:
            for own, values in zip(scores, self.clip.measure(edits), strict=True):
                own |= values
        return scores


def _black_except(edit: MeasuredEdit, keep: np.ndarray) -> MeasuredEdit:
    """Make both images black wherever `keep` is false."""
    before, after = (
        Image.fromarray((np.asarray(image) * keep[..., None]).astype(np.uint8))
        for image in (edit.before, edit.after)
    )
    return replace(edit, before=before, after=after)


DINO = VisionKind(
    "DINO",
    "for the structure distance",
    "give a folder or a hub id of a DINO or DINOv2, such as facebook/dino-vitb8",
    {"vit": "ViTImageProcessorPil", **DINOV2.processors},
)


class Structure:
    """The structure distance: the mean squared difference of two images' self-similarities.

    A self-similarity holds the cosines between the keys of all tokens in the last layer of a DINO (Tumanyan
    et al. 2022, arXiv 2201.00424, equation 4). PIE-Bench's tables use "facebook/dino-vitb8" and show the
    distance times 1000.
    """

    def __init__(self, model: "PreTrainedModel", processor: Any):
        self.model, self.processor = model, processor
        # Releases of transformers and kinds of DINO differ in the layer's name and its parents.
        names = [name for name, _ in model.named_modules() if name.split(".")[-1] in ("key", "k_proj")]
        self._key_layer: nn.Module = model.get_submodule(names[-1])

    @classmethod
    def load(cls, source: str, device: str | torch.device = "cpu") -> "Structure":
        """Load the DINO or DINOv2 `source`; raise InputError as `load_vision`."""
        return cls(*load_vision(DINO, source, device))

    @torch.no_grad()
    def self_similarity(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the self-similarities of images, "B T T" for the T tokens of the DINO."""
        pixels = self.processor(list(images), return_tensors="pt")["pixel_values"].to(self.model.device)
        keys: list[Tensor] = []

        def keep(_layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            keys.append(output)

        handle = self._key_layer.register_forward_hook(keep)
        try:
            self.model(pixel_values=pixels)
        finally:
            handle.remove()
        (found,) = keys
        unit = F.normalize(found, dim=-1)
        return unit @ unit.mT

    def distances(self, edits: Sequence[MeasuredEdit]) -> list[float]:
        """Return the distance between before and after of each edit, CHUNK edits at a time."""
        distances = []
        for start in range(0, len(edits), CHUNK):
            part = edits[start : start + CHUNK]
            before = self.self_similarity([edit.before for edit in part])
            after = self.self_similarity([edit.after for edit in part])
            distances += (before - after).square().mean((1, 2)).tolist()
        return distances


class ClipText:
    """A CLIP with its text encoder: how well images match prompts."""

    def __init__(self, vision: Clip, text_model: "PreTrainedModel", tokenizer: Any):
        self.vision, self.tokenizer = vision, tokenizer
        self.text_model = text_model.float().eval().requires_grad_(False)

    @classmethod
    def load(cls, source: str, device: str | torch.device = "cpu") -> "ClipText":
        """Load the CLIP `source` (hub id or folder).

        Raises:
            InputError: The vision model, the text model or the tokenizer cannot be loaded.
        """
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer

        vision = Clip.load(source, device)
        try:
            text = CLIPTextModelWithProjection.from_pretrained(source, dtype=torch.float32)
            tokenizer = CLIPTokenizer.from_pretrained(source)
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"Got {source} as the model of metric clip, whose text model or tokenizer is missing: give a "
                "whole CLIP, such as openai/clip-vit-large-patch14, or leave clip out"
            ) from error
        # transformers wraps Module.to in a way that loses its type
        return cls(vision, text.to(device), tokenizer)  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def _embed_texts(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        return self.text_model(**tokens.to(self.text_model.device)).text_embeds

    def measure(self, edits: Sequence[MeasuredEdit]) -> list[EditScores]:
        """Return `clip`, `clip_edited` and `clip_direction` of each edit (see `EditMetrics`)."""
        before = F.normalize(self.vision.embed([edit.before for edit in edits]), dim=-1)
        after = F.normalize(self.vision.embed([edit.after for edit in edits]), dim=-1)
        source = F.normalize(self._embed_texts([edit.source for edit in edits]), dim=-1)
        target = F.normalize(self._embed_texts([edit.target for edit in edits]), dim=-1)
        whole = 100 * F.cosine_similarity(after, target)
        direction = F.cosine_similarity(after - before, target - source)
        scores: list[EditScores] = [
            {"clip": w, "clip_edited": None, "clip_direction": d}
            for w, d in zip(whole.tolist(), direction.tolist())
        ]
        parts = {
            n: _black_except(edit, edit.mask).after for n, edit in enumerate(edits) if edit.mask is not None
        }
        if parts:
            inside = self.vision.embed(list(parts.values()))
            values = 100 * F.cosine_similarity(inside, target[list(parts)])
            for n, value in zip(parts, values.tolist()):
                scores[n]["clip_edited"] = value
        return scores
