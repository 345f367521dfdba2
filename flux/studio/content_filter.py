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
    """An image classifier; called with an image, it tells whether the image is unsafe.

    Attributes:
        model: The classifier.
        processor: Its image processor.
        index: The number of its label "nsfw".
    """

    model: Any
    processor: Any
    index: int

    @classmethod
    def load(cls, name: str, device: torch.device | str = "cpu") -> "ContentFilter":
        """Loads a classifier by hub name or folder.

        Raises:
            InputError: The classifier cannot be read, or lacks the label "nsfw".
        """
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        try:
            model = AutoModelForImageClassification.from_pretrained(name)
            processor = AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"Got content_filter {name!r}, which cannot be loaded ({reason}): give an image classifier's "
                'hub name or folder, or "off"'
            ) from error
        labels = {label.lower(): index for index, label in model.config.id2label.items()}
        if LABEL not in labels:
            raise InputError(
                f"Got content_filter {name!r} with the labels {sorted(labels)}: none is {LABEL!r}"
            )
        return cls(model.to(device).eval(), processor, int(labels[LABEL]))

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> bool:
        """Tells whether the probability that the image is unsafe reaches THRESHOLD."""
        pixels = self.processor(images=image, return_tensors="pt").to(self.model.device)
        return bool(self.model(**pixels).logits.softmax(dim=-1)[0, self.index] >= THRESHOLD)
