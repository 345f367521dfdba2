"""Content filters: is an image, or a prompt, one that should not be made or shown?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from flux.errors import InputError, reason_of
from flux.images.io import as_rgb, to_pil

DEFAULT = "Falconsai/nsfw_image_detection"
LABEL, THRESHOLD = "nsfw", 0.85
PIXTRAL = "mistral-community/pixtral-12b"
MOST_PIXELS = 512**2  # of an image that Pixtral is shown
PROTECTED = "a character, logo or artwork under copyright or trademark, or a real and well-known person"
ABOUT_IMAGES = f"Does this image show {PROTECTED}? Answer yes or no."
ABOUT_PROMPTS = (
    f"Does this prompt for an image ask for {PROTECTED}, or for something unsafe for work? Answer yes or no. "
    "The prompt is: "
)


@dataclass(frozen=True, eq=False)
class ContentFilter:
    """An image classifier that knows the label "nsfw"; called with an image, it tells whether that is unsafe.

    Attributes:
        model: The classifier.
        processor: Its image processor.
        index: The number of its label "nsfw".
        threshold: The probability from which on an image is unsafe.
    """

    model: Any
    processor: Any
    index: int
    threshold: float = THRESHOLD

    @classmethod
    def load(
        cls, name: str = DEFAULT, device: torch.device | str = "cpu", threshold: float = THRESHOLD
    ) -> "ContentFilter":
        """Load a classifier.

        Args:
            name: Hub id or folder.
            device: Where it computes.
            threshold: The probability from which on an image is unsafe.

        Raises:
            InputError: The classifier cannot be read, or lacks the label "nsfw".
        """
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        try:
            model = AutoModelForImageClassification.from_pretrained(name)
            processor = AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise InputError(
                f"Got content_filter {name!r}, which cannot be loaded ({reason_of(error)}): give an image "
                'classifier\'s hub name or folder, or "off"'
            ) from error
        labels = {label.lower(): index for index, label in model.config.id2label.items()}
        if LABEL not in labels:
            raise InputError(
                f"Got content_filter {name!r} with the labels {sorted(labels)}: none is {LABEL!r}"
            )
        return cls(model.to(device).eval(), processor, int(labels[LABEL]), threshold)

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> bool:
        """Return whether the probability that the image is unsafe reaches the threshold."""
        pixels = self.processor(images=image, return_tensors="pt").to(self.model.device)
        return bool(self.model(**pixels).logits.softmax(dim=-1)[0, self.index] >= self.threshold)


class PixtralContentFilter(nn.Module):
    """Upstream's filter of prompts and images: a language model that sees, and an image classifier.

    The language model has 12 billion parameters, in bfloat16: 24 GB.

    Args:
        device: Where both compute.
        nsfw_threshold: The probability from which on an image is unsafe for work.
        pixtral: Hub id or folder of the language model.
        nsfw: Hub id or folder of the image classifier.

    Raises:
        InputError: One of them cannot be read.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        nsfw_threshold: float = THRESHOLD,
        pixtral: str = PIXTRAL,
        nsfw: str = DEFAULT,
    ):
        super().__init__()
        from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration

        self.unsafe = ContentFilter.load(nsfw, device, nsfw_threshold)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(pixtral)
            self.processor = AutoImageProcessor.from_pretrained(pixtral, backend="pil")
            model: Any = LlavaForConditionalGeneration.from_pretrained(pixtral, dtype=torch.bfloat16)
        except (OSError, ValueError) as error:
            raise InputError(
                f"Got {pixtral!r} for the content filter, which cannot be loaded ({reason_of(error)}): give "
                "a hub name or folder of a Pixtral"
            ) from error
        self.model: Any = model.to(device).eval()
        self.yes, self.no = (
            self.tokenizer.encode(word, add_special_tokens=False)[-1] for word in ("yes", "no")
        )

    def test_image(self, image: Image.Image | str | Path | Tensor) -> bool:
        """Return whether an image should not be used.

        Args:
            image: The image, its file, or a tensor in -1..1, "3 H W" or "1 3 H W".

        Raises:
            InputError: The file cannot be read.
        """
        if isinstance(image, Tensor):
            image = to_pil(image.float().clamp(-1, 1).reshape(3, *image.shape[-2:]))
        image = as_rgb(image)
        if self.unsafe(image):
            return True
        factor = (MOST_PIXELS / (image.width * image.height)) ** 0.5
        if factor < 1:
            image = image.resize((max(1, int(image.width * factor)), max(1, int(image.height * factor))))
        inputs = self.processor(images=[image], return_tensors="pt")
        patch = self.model.config.vision_config.patch_size
        rows, columns = (int(side) // patch for side in inputs["image_sizes"][0])
        # Patches row by row, with a token after each row and another one after the last.
        patches = "[IMG_BREAK]".join(["[IMG]" * columns] * rows) + "[IMG_END]"
        return self._says_yes(f"{patches}{ABOUT_IMAGES}", **inputs)

    def test_txt(self, txt: str) -> bool:
        """Return whether a prompt should not be used."""
        return self._says_yes(f"{ABOUT_PROMPTS}{txt}")

    @torch.inference_mode()
    def _says_yes(self, question: str, **image: Any) -> bool:
        """Return whether yes is likelier than no as the model's answer."""
        tokens = self.tokenizer(f"[INST]{question}[/INST]", return_tensors="pt")
        given = {
            name: x.to(self.model.device, self.model.dtype if x.is_floating_point() else None)
            for name, x in {**tokens, **image}.items()
            if name != "token_type_ids"
        }
        logits = self.model(**given).logits[0, -1]
        return bool(logits[self.yes] > logits[self.no])
