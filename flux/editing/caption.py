"""A prompt for a photograph, written by a captioning model."""

from PIL import Image

from flux.errors import InputError


def describe_image(image: Image.Image, model: str, device: str = "cpu") -> str:
    """Describes an image in words.

    Args:
        image: the image.
        model: hub id or folder of an image-to-text model of transformers.
        device: where the model computes.

    Raises:
        InputError: the model cannot be loaded, or cannot describe images.
    """
    from transformers import pipeline

    try:
        captioner = pipeline("image-text-to-text", model=model, device=device)
        [found] = captioner(images=image, text="", max_new_tokens=64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"Got caption_model {model!r}, which cannot describe the photo ({reason}): give an "
            "image-to-text model, or say in prompt what the photo shows"
        ) from error
    text = found["generated_text"].strip()
    if not text:
        raise InputError(f"Got no words from caption_model {model!r}: say in prompt what the photo shows")
    return text
