"""Similarity of images by a model's features: DINOv2, CLIP, LPIPS.

DINOv2's is the measure of a layer's vitality (Stable Flow, arXiv 2411.14430, section 3.1).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from flux.errors import InputError
from flux.images.io import to_tensor
from flux.metrics.base import Metric

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 32  # images in memory at once, and in a batch of a metric's model
DINOV2_FILES = ("config.json", "preprocessor_config.json", "model.safetensors")


# ---- loading


@dataclass(frozen=True)
class VisionKind:
    """A kind of vision model, and how error messages speak of it.

    Attributes:
        name: What the model is called.
        role: What it is wanted for, as in "Got SOURCE as the DINOv2".
        advice: What to do instead, said after a colon.
        processors: The model types of transformers that are accepted, and the image processor of each. All
            use Pillow, whether or not torchvision is installed, so results do not depend on it.
        model: The class of transformers that loads it.
        all_weights: Whether every weight must be in the file. transformers fills missing ones with random
            numbers.
    """

    name: str
    role: str
    advice: str
    processors: Mapping[str, str]
    model: str = "AutoModel"
    all_weights: bool = False


DINOV2 = VisionKind(
    "DINOv2",
    "as the DINOv2",
    "give a folder or a hub id, such as facebook/dinov2-giant",
    {"dinov2": "BitImageProcessorPil", "dinov2_with_registers": "BitImageProcessorPil"},
)
CLIP = VisionKind(
    "CLIP vision model",
    "as the model of metric clip",
    "give a folder or a hub id, such as openai/clip-vit-large-patch14, or leave clip out",
    {"clip": "CLIPImageProcessorPil", "clip_vision_model": "CLIPImageProcessorPil"},
    model="CLIPVisionModelWithProjection",
    all_weights=True,
)


def load_vision(
    kind: VisionKind, source: str | Path, device: str | torch.device = "cpu"
) -> tuple["PreTrainedModel", Any]:
    """Load a vision model of transformers in float32, ready for inference, with its image processor.

    Args:
        kind: What is expected.
        source: Hub id, or folder in the form of `save_pretrained`.
        device: Where the model computes.

    Raises:
        InputError: There is no such folder or hub model, a file is missing or damaged, or the model is of
            another kind.
    """
    import transformers
    from safetensors import SafetensorError

    source = str(source)
    got = f"Got {source} {kind.role}, which is"
    try:
        found = transformers.AutoConfig.from_pretrained(source).model_type
        if found not in kind.processors:
            raise InputError(f"{got} a {found} and no whole {kind.name}: {kind.advice}")
        processor = getattr(transformers, kind.processors[found]).from_pretrained(source)
        model, report = getattr(transformers, kind.model).from_pretrained(
            source, dtype=torch.float32, output_loading_info=True
        )
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if Path(source).is_dir():
            problem = f"a folder without a whole {kind.name} in it ({', '.join(DINOV2_FILES)})"
            raise InputError(f"{got} {problem}: {kind.advice}") from error
        raise InputError(f"{got} no folder here, and the hub did not give it: {kind.advice}") from error
    if kind.all_weights and report["missing_keys"]:
        missing = min(report["missing_keys"])
        raise InputError(f"{got} no whole {kind.name}: {missing} is missing, {kind.advice}")
    return model.eval().requires_grad_(False).to(torch.device(device)), processor


# ---- DINOv2


class PerceptualEncoder:
    """A DINOv2 of transformers in float32, with its own preparation of pixels.

    Args:
        model: A Dinov2Model, or one with registers.
        processor: Turns images into the model's normalised pixels.
    """

    def __init__(self, model: "PreTrainedModel", processor: Any):
        self.model, self.processor = model, processor

    @classmethod
    def load(cls, source: str | Path, device: str | torch.device = "cpu") -> "PerceptualEncoder":
        """Load a hub id such as "facebook/dinov2-giant", or a folder; raise InputError as `load_vision`."""
        return cls(*load_vision(DINOV2, source, device))

    @torch.no_grad()
    def embed(self, images: Sequence[Image], batch_size: int = 16) -> Tensor:
        """Embed images of any sizes as "B C": their class tokens after the last norm, of length 1."""
        features = torch.empty(len(images), self.model.config.hidden_size, device=self.model.device)
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            pixels = self.processor(list(images[rows]), return_tensors="pt")["pixel_values"]
            hidden = self.model(pixel_values=pixels.to(self.model.device)).last_hidden_state
            features[rows] = F.normalize(hidden[:, 0], dim=-1)
        return features


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosines between the rows of two batches of features, "B C", "B C" -> "B", in -1..1."""
    return F.cosine_similarity(a, b, dim=-1)


class Dino(Metric):
    """Cosine of DINOv2's class tokens, in -1..1; the paper uses the ViT-g/14 (appendix A.2)."""

    def __init__(self, encoder: PerceptualEncoder):
        self.encoder = encoder

    @classmethod
    def load(cls, source: str | None = None, device: str | torch.device = "cpu") -> "Dino":
        """Load the DINOv2 `source`, by default the paper's; raise InputError as `load_vision`."""
        return cls(PerceptualEncoder.load(source or "facebook/dinov2-giant", device))

    def compare(self, references: Sequence[Image], images: Sequence[Image]) -> list[float]:
        """Return the cosine of each image and its reference."""
        return _cosines(self.encoder.embed, references, images)


# ---- CLIP


class Clip(Metric):
    """Cosine of CLIP's projected image embeddings; the paper uses the ViT-L/14 (appendix B.2)."""

    def __init__(self, model: "PreTrainedModel", processor: Any):
        self.model, self.processor = model, processor

    @classmethod
    def load(cls, source: str | None = None, device: str | torch.device = "cpu") -> "Clip":
        """Load the CLIP `source`, by default the paper's; raise InputError as `load_vision`."""
        return cls(*load_vision(CLIP, source or "openai/clip-vit-large-patch14", device))

    @torch.no_grad()
    def embed(self, images: Sequence[Image]) -> Tensor:
        """Embed images of any sizes as "B C"."""
        features = []
        for start in range(0, len(images), CHUNK):
            pixels = self.processor(list(images[start : start + CHUNK]), return_tensors="pt")["pixel_values"]
            features.append(self.model(pixel_values=pixels.to(self.model.device)).image_embeds)
        return torch.cat(features)

    def compare(self, references: Sequence[Image], images: Sequence[Image]) -> list[float]:
        """Return the cosine of each image and its reference."""
        return _cosines(self.embed, references, images)


# ---- LPIPS


class Lpips(Metric):
    """1 minus LPIPS 0.1 (Zhang et al. 2018); a change is thus the LPIPS distance itself.

    Args:
        model: The package's model: images "1 3 H W" in -1..1, twice, to their distance.
        device: Where the model computes.
    """

    def __init__(self, model: Callable[[Tensor, Tensor], Tensor], device: str | torch.device = "cpu"):
        self.model, self.device = model, device

    @classmethod
    def load(cls, source: str | None = None, device: str | torch.device = "cpu") -> "Lpips":
        """Load the model of the package lpips.

        Args:
            source: "alex" for AlexNet, the package's default, or "squeeze" for SqueezeNet.
            device: Where the model computes.

        Raises:
            InputError: The package is not installed, or torchvision cannot download the model.
        """
        try:
            import lpips  # pyright: ignore[reportMissingImports] - an optional package
        except (ImportError, RuntimeError) as error:  # the latter from a torchvision for another torch
            raise InputError(
                f"Got metric lpips, whose package cannot be imported ({error}): pip install lpips, or leave "
                "lpips out"
            ) from error
        try:
            model = lpips.LPIPS(net=source or "alex", verbose=False)
        except (OSError, RuntimeError) as error:
            file = "squeezenet1_1-b8a52dc0.pth" if source == "squeeze" else "alexnet-owt-7be5be79.pth"
            raise InputError(
                f"Got metric lpips, whose model torchvision could not download ({error}): put "
                f"{file} into {torch.hub.get_dir()}/checkpoints, or leave lpips out"
            ) from error
        return cls(model.to(device).requires_grad_(False), device)

    @torch.no_grad()
    def compare(self, references: Sequence[Image], images: Sequence[Image]) -> list[float]:
        """Return 1 minus the LPIPS distance of each image and its reference."""
        distances = [
            self.model(to_tensor(a)[None].to(self.device), to_tensor(b)[None].to(self.device)).item()
            for a, b in zip(references, images, strict=True)
        ]
        return [1 - distance for distance in distances]


def _cosines(
    embed: Callable[[Sequence[Image]], Tensor], references: Sequence[Image], images: Sequence[Image]
) -> list[float]:
    """Embed each distinct image once and return the cosine of each pair."""
    distinct = {id(image): image for image in (*references, *images)}
    features = dict(zip(distinct, embed(list(distinct.values()))))
    a, b = (torch.stack([features[id(image)] for image in side]) for side in (references, images))
    return similarity(a, b).tolist()
