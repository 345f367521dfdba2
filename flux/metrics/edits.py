"""How well edits keep what they should keep and follow their prompts: the measures of PIE-Bench (Ju et al.
2023, arXiv 2310.01506, section 5.1) and the direction in CLIP's space (StyleGAN-NADA, arXiv 2108.00946).

A mask is an array of booleans "H W", true where an edit may change its picture. What an item has no mask for,
or a mask that leaves nothing outside, is None.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flux.errors import InputError
from flux.metrics.features import CHUNK, Clip, Lpips
from flux.metrics.pixels import MAX_PSNR, Ssim

Scores = dict[str, float | None]

OUTSIDE = ("psnr", "mse", "pie_psnr", "pie_mse", "ssim")
NETS = {
    "structure": ("structure",),
    "lpips": ("lpips",),
    "clip": ("clip", "clip_edited", "clip_direction"),
}


@dataclass(frozen=True, eq=False)
class Edit:
    """What is measured: a picture before and after, what of it may change, and both prompts."""

    before: Image.Image
    after: Image.Image
    mask: np.ndarray | None
    source: str
    target: str


class EditMetrics:
    """The measures of edits, those without a net and the ones that are asked for.

    Always: `psnr` (dB, at most MAX_PSNR) and `mse` (of colours in 0..1) over the pixels outside the mask;
    `pie_psnr`, `pie_mse` and `ssim` as PIE-Bench's own evaluation has them, of whole pictures whose masked
    part is made black in both, so that its size counts as kept without error.

    Args:
        structure, lpips, clip: the nets; None: not measured. `structure` is DINO's self-similarity distance.
            `lpips`: of the blackened pictures. `clip`: 100 times the cosine of the edit and its prompt,
            `clip_edited` that of what is inside the mask, `clip_direction` the cosine of how the picture
            moved and how the prompt did.
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
        """With the nets of these names (of NETS): the DINO and the CLIP by hub id or folder; LPIPS on
        SqueezeNet, as in PIE-Bench's tables.

        Raises:
            InputError: a package or weights that are not there.
        """
        return cls(
            Structure.load(encoder, device) if "structure" in names else None,
            Lpips.load("squeeze", device) if "lpips" in names else None,
            ClipText.load(clip, device) if "clip" in names else None,
            device,
        )

    def of(self, edits: Sequence[Edit]) -> list[Scores]:
        """The scores of each edit, by name."""
        scores: list[Scores] = [dict.fromkeys(OUTSIDE) for _ in edits]
        outside = [(own, edit) for own, edit in zip(scores, edits) if _has_outside(edit.mask)]
        dark = [_blackened(edit, ~edit.mask) for _, edit in outside]
        befores, afters = [list(side) for side in zip(*dark)] or [[], []]
        similar = self.ssim.of(befores, afters)
        for (own, edit), (before, after), ssim in zip(outside, dark, similar):
            difference = np.asarray(before, np.float64) - np.asarray(after, np.float64)
            whole = float(np.square(difference / 255).mean())
            mse = whole / float((~edit.mask).mean())
            own |= {"psnr": _decibel(mse), "mse": mse, "pie_psnr": _decibel(whole), "pie_mse": whole}
            own["ssim"] = ssim
        if self.structure:
            _add(scores, "structure", self.structure.of(edits))
        if self.lpips:
            for own in scores:
                own["lpips"] = None
            kept = self.lpips.of(befores, afters)
            _add([own for own, _ in outside], "lpips", [1 - value for value in kept])
        if self.clip:
            for own, values in zip(scores, self.clip.of(edits)):
                own |= values
        return scores


def _add(scores: Sequence[Scores], name: str, values: Sequence[float]) -> None:
    for own, value in zip(scores, values, strict=True):
        own[name] = value


def _has_outside(mask: np.ndarray | None) -> bool:
    return mask is not None and not mask.all()


def _blackened(edit: Edit, keep: np.ndarray) -> tuple[Image.Image, Image.Image]:
    """Both pictures with everything black but where `keep` is true."""
    pictures = (np.asarray(picture) * keep[..., None] for picture in (edit.before, edit.after))
    return tuple(Image.fromarray(picture.astype(np.uint8)) for picture in pictures)


def _decibel(mse: float) -> float:
    return min(MAX_PSNR, float(-10 * np.log10(mse))) if mse else MAX_PSNR


class Structure:
    """Distance of what is where: mean squared difference of the pictures' self-similarities, the cosines
    between the keys of all tokens in the last layer of a DINO (Tumanyan et al. 2022, arXiv 2201.00424,
    equation 4). PIE-Bench's tables have it on "facebook/dino-vitb8", times 1000.
    """

    def __init__(self, model, processor):
        self.model = model.float().eval().requires_grad_(False)
        self.processor = processor
        # Releases of transformers and kinds of DINO differ in its name and its parents.
        names = [name for name, _ in model.named_modules() if name.split(".")[-1] in ("key", "k_proj")]
        self._key_layer = model.get_submodule(names[-1])

    @classmethod
    def load(cls, source: str, device: str | torch.device = "cpu") -> "Structure":
        from safetensors import SafetensorError
        from transformers import AutoConfig, AutoModel, BitImageProcessorPil, ViTImageProcessorPil

        processors = {"vit": ViTImageProcessorPil, "dinov2": BitImageProcessorPil}
        processors["dinov2_with_registers"] = BitImageProcessorPil
        try:
            kind = AutoConfig.from_pretrained(source).model_type
            if kind not in processors:
                raise InputError(
                    f"Got {source} for the structure distance, which is a {kind}: give a DINO or DINOv2, "
                    "such as facebook/dino-vitb8"
                )
            processor = processors[kind].from_pretrained(source)
            model = AutoModel.from_pretrained(source, dtype=torch.float32)
        except InputError:
            raise
        except (OSError, ValueError, SafetensorError) as error:
            if Path(source).is_dir():
                problem = "a folder without a whole DINO in it"
            else:
                problem = "no folder here, and the hub did not give it: give a folder or a hub id"
            raise InputError(f"Got {source} for the structure distance, which is {problem}") from error
        return cls(model.to(device), processor)

    @torch.no_grad()
    def self_similarity(self, pictures: Sequence[Image.Image]) -> Tensor:
        """ "B T T", T all of the DINO's tokens."""
        pixels = self.processor(list(pictures), return_tensors="pt")["pixel_values"].to(self.model.device)
        keys = []
        handle = self._key_layer.register_forward_hook(lambda _, __, output: keys.append(output))
        try:
            self.model(pixel_values=pixels)
        finally:
            handle.remove()
        (found,) = keys
        unit = F.normalize(found, dim=-1)
        return unit @ unit.mT

    def of(self, edits: Sequence[Edit]) -> list[float]:
        distances = []
        for start in range(0, len(edits), CHUNK):
            part = edits[start : start + CHUNK]
            before, after = (
                self.self_similarity(pictures)
                for pictures in ([edit.before for edit in part], [edit.after for edit in part])
            )
            distances += (before - after).square().mean((1, 2)).tolist()
        return distances


class ClipText:
    """A CLIP with its texts: how well pictures go with prompts."""

    def __init__(self, vision: Clip, text_model, tokenizer):
        self.vision, self.tokenizer = vision, tokenizer
        self.text_model = text_model.float().eval().requires_grad_(False)

    @classmethod
    def load(cls, source: str, device: str | torch.device = "cpu") -> "ClipText":
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer

        vision = Clip.load(source, device)
        try:
            text = CLIPTextModelWithProjection.from_pretrained(source, dtype=torch.float32)
            tokenizer = CLIPTokenizer.from_pretrained(source)
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"Got metric clip with {source} as its net, whose text model or tokenizer is not there: give "
                "a whole CLIP, such as openai/clip-vit-large-patch14, or leave clip out"
            ) from error
        return cls(vision, text.to(device), tokenizer)

    @torch.no_grad()
    def _texts(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        return self.text_model(**tokens.to(self.text_model.device)).text_embeds

    def of(self, edits: Sequence[Edit]) -> list[Scores]:
        before, after = ([getattr(edit, side) for edit in edits] for side in ("before", "after"))
        before, after = (F.normalize(self.vision.embed(pictures), dim=-1) for pictures in (before, after))
        source, target = ([getattr(edit, side) for edit in edits] for side in ("source", "target"))
        source, target = (F.normalize(self._texts(prompts), dim=-1) for prompts in (source, target))
        whole = 100 * F.cosine_similarity(after, target)
        direction = F.cosine_similarity(after - before, target - source)
        scores: list[Scores] = [
            {"clip": w, "clip_edited": None, "clip_direction": d}
            for w, d in zip(whole.tolist(), direction.tolist())
        ]
        masked = [n for n, edit in enumerate(edits) if edit.mask is not None]
        if masked:
            parts = self.vision.embed([_blackened(edits[n], edits[n].mask)[1] for n in masked])
            for n, value in zip(masked, (100 * F.cosine_similarity(parts, target[masked])).tolist()):
                scores[n]["clip_edited"] = value
        return scores
