"""The content filter of upstream's page: an image classifier that knows the label "nsfw"."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from flux.errors import InputError

DEFAULT = "Falconsai/nsfw_image_detection"
LABEL, THRESHOLD = "nsfw", 0.85


@dataclass(frozen=True, eq=False)
class ContentFilter:
    """Called with a picture, says whether its probability of LABEL reaches THRESHOLD."""

    net: Any
    processor: Any
    index: int

    @classmethod
    def load(cls, name: str, device: torch.device | str = "cpu") -> "ContentFilter":
        """From the hub or a folder. Raises InputError if that cannot be read, or lacks the label."""
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        try:
            net = AutoModelForImageClassification.from_pretrained(name)
            processor = AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"Got content_filter {name!r}, which cannot be loaded ({reason}): give an image classifier's "
                'hub name or folder, or "off"'
            ) from error
        labels = {label.lower(): index for index, label in net.config.id2label.items()}
        if LABEL not in labels:
            raise InputError(
                f"Got content_filter {name!r} with the labels {sorted(labels)}: none is {LABEL!r}"
            )
        return cls(net.to(device).eval(), processor, int(labels[LABEL]))

    @torch.inference_mode()
    def __call__(self, picture: Image.Image) -> bool:
        pixels = self.processor(images=picture, return_tensors="pt").to(self.net.device)
        return bool(self.net(**pixels).logits.softmax(dim=-1)[0, self.index] >= THRESHOLD)
