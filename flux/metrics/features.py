"""How alike pictures look to DINOv2: the measure of a layer's vitality (Stable Flow, arXiv 2411.14430)."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from flux.errors import InputError

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
