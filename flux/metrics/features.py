"""How alike pictures look to DINOv2: the measure of a layer's vitality (Stable Flow, arXiv 2411.14430)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from flux.errors import InputError
from flux.images.io import to_tensor
from flux.metrics.base import Metric

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BaseImageProcessor, PreTrainedModel

FILES = ("config.json", "preprocessor_config.json", "model.safetensors")


class PerceptualEncoder:
    """A DINOv2 of transformers in float32, with the preparation of pixels that belongs to it.

    Args:
        model: a Dinov2Model, or one with registers.
        processor: turns pictures into its normalised pixels.
    """

    def __init__(self, model: "PreTrainedModel", processor: "BaseImageProcessor"):
        self.model = model.float().eval().requires_grad_(False)
        self.processor = processor

    @classmethod
    def load(cls, name_or_folder: str | Path, device: str | torch.device = "cpu") -> "PerceptualEncoder":
        """Loads a hub id such as "facebook/dinov2-giant", or a folder in the form of `save_pretrained`.

        Raises:
            InputError: no such folder or hub model, a folder that lacks a file, or a model of another kind.
        """
        from safetensors import SafetensorError
        from transformers import AutoConfig, AutoModel, BitImageProcessorPil

        name = str(name_or_folder)
        try:
            kind = AutoConfig.from_pretrained(name).model_type
            if not kind.startswith("dinov2"):
                raise InputError(f"Got {name} as the DINOv2, which is a {kind}: try facebook/dinov2-giant")
            # Pillow prepares, whether or not torchvision is installed: scores do not depend on it.
            processor = BitImageProcessorPil.from_pretrained(name)
            model = AutoModel.from_pretrained(name, dtype=torch.float32)
        except InputError:
            raise
        except (OSError, ValueError, SafetensorError) as error:
            if Path(name).is_dir():
                problem = f"a folder without a whole DINOv2 in it ({', '.join(FILES)})"
            else:
                problem = "no folder here, and the hub did not give it: give a folder or a hub id"
            raise InputError(f"Got {name} as the DINOv2, which is {problem}") from error
        return cls(model.to(device), processor)

    @torch.no_grad()
    def embed(self, images: "list[Image]", batch_size: int = 16) -> Tensor:
        """Pictures of any sizes -> "B C": of each the class token after the last norm, at length 1."""
        features = torch.empty(len(images), self.model.config.hidden_size, device=self.model.device)
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            pixels = self.processor(images[rows], return_tensors="pt")["pixel_values"]
            hidden = self.model(pixel_values=pixels.to(self.model.device)).last_hidden_state
            features[rows] = F.normalize(hidden[:, 0], dim=-1)
        return features


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine between the rows of two batches of features, "B C", "B C" -> "B", in -1..1."""
    return F.cosine_similarity(a, b, dim=-1)


CHUNK = 32  # pictures in memory at once, and in a batch of a metric's net


class Dino(Metric):
    """Cosine of DINOv2's CLS features, in -1..1; the paper's measure, with the ViT-g/14 (appendix A.2)."""

    def __init__(self, encoder: PerceptualEncoder):
        self.encoder = encoder

    @classmethod
    def load(cls, source: str | None = None, device: str | torch.device = "cpu") -> "Dino":
        return cls(PerceptualEncoder.load(source or "facebook/dinov2-giant", device))

    def of(self, references: Sequence[Image], pictures: Sequence[Image]) -> list[float]:
        return _cosines(self.encoder.embed, references, pictures)


class Clip(Metric):
    """Cosine of CLIP's image embeddings, after the projection; the paper's appendix B.2, with the
    ViT-L/14.
    """

    def __init__(self, model, processor):
        self.model = model.float().eval().requires_grad_(False)
        self.processor = processor

    @classmethod
    def load(cls, source: str | None = None, device: str | torch.device = "cpu") -> "Clip":
        from safetensors import SafetensorError
        from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

        name = source or "openai/clip-vit-large-patch14"
        problem = f"Got metric clip with {name} as its net, which is"
        try:
            processor = CLIPImageProcessorPil.from_pretrained(name)
            model, report = CLIPVisionModelWithProjection.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            if Path(name).is_dir():
                raise InputError(f"{problem} a folder without a whole CLIP vision model in it") from error
            raise InputError(
                f"{problem} no folder here, and the hub did not give it: give a folder or a hub id, or leave "
                "clip out"
            ) from error
        # transformers fills what a file lacks with random numbers.
        if report["missing_keys"]:
            raise InputError(
                f"{problem} no whole CLIP vision model: {min(report['missing_keys'])} is missing"
            )
        return cls(model.to(device), processor)

    @torch.no_grad()
    def embed(self, images: list[Image]) -> Tensor:
        """Pictures of any sizes -> "B C"."""
        features = []
        for start in range(0, len(images), CHUNK):
            pixels = self.processor(images[start : start + CHUNK], return_tensors="pt")["pixel_values"]
            features.append(self.model(pixel_values=pixels.to(self.model.device)).image_embeds)
        return torch.cat(features)

    def of(self, references: Sequence[Image], pictures: Sequence[Image]) -> list[float]:
        return _cosines(self.embed, references, pictures)


class Lpips(Metric):
    """1 minus LPIPS 0.1 (Zhang et al. 2018) on AlexNet, its authors' package's default, or on the net that
    `source` names ("squeeze" for SqueezeNet); a change is thus the LPIPS distance itself.
    """

    def __init__(self, net: Callable[[Tensor, Tensor], Tensor], device: str | torch.device = "cpu"):
        self.net, self.device = net, device

    @classmethod
    def load(cls, source: str | None = None, device: str | torch.device = "cpu") -> "Lpips":
        try:
            import lpips
        except (ImportError, RuntimeError) as error:  # the latter from a torchvision for another torch
            raise InputError(
                f"Got metric lpips, whose package cannot be imported ({error}): pip install lpips, or leave "
                "lpips out"
            ) from error
        try:
            net = lpips.LPIPS(net=source or "alex", verbose=False)
        except (OSError, RuntimeError) as error:
            file = "squeezenet1_1-b8a52dc0.pth" if source == "squeeze" else "alexnet-owt-7be5be79.pth"
            raise InputError(
                f"Got metric lpips, whose net torchvision could not download ({error}): put "
                f"{file} into {torch.hub.get_dir()}/checkpoints, or leave lpips out"
            ) from error
        return cls(net.to(device).requires_grad_(False), device)

    @torch.no_grad()
    def of(self, references: Sequence[Image], pictures: Sequence[Image]) -> list[float]:
        distances = [
            self.net(*(to_tensor(picture)[None].to(self.device) for picture in pair)).item()
            for pair in zip(references, pictures, strict=True)
        ]
        return [1 - distance for distance in distances]


def _cosines(
    embed: Callable[[list[Image]], Tensor], references: Sequence[Image], pictures: Sequence[Image]
) -> list[float]:
    distinct = {id(picture): picture for picture in (*references, *pictures)}
    features = dict(zip(distinct, embed(list(distinct.values()))))
    a, b = (torch.stack([features[id(picture)] for picture in side]) for side in (references, pictures))
    return similarity(a, b).tolist()
