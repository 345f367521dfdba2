"""The fields of a caption run's JSON file."""

from typing import ClassVar

from pydantic import Field

from flux.settings.demos import Settings
from flux.settings.fields import FilePath, String, Text


class CaptionSettings(Settings, frozen=True):
    """Settings of `python -m flux.captions`: a folder of images, and what describes them."""

    demo: ClassVar[str] = "captions"
    program: ClassVar[str] = "python -m flux.captions"
    images: FilePath = Field(description="folder of the images; the texts are written beside them")
    caption_model: FilePath = Field(
        description="hub id or folder of an image-to-text model of transformers that describes them"
    )
    caption_prompt: Text | None = Field(
        default=None, description="what the model is asked; if None, a description in plain sentences"
    )
    prefix: String = Field(default="", description="text before each description")
    trigger: String = Field(default="", description="word that each text begins with, unless it is in it")
    recaption: bool = Field(default=False, description="describe images that have a text again")
    max_side: int = Field(default=1024, ge=16, description="images are scaled down to this longest side")
    max_new_tokens: int = Field(default=256, ge=1, description="the most tokens of a description")
    batch_size: int = Field(default=1, ge=1, description="images described at once")
    device: Text = Field(default="auto", description='where to run: "auto", "cpu", "cuda", "cuda:1", "mps"')
    text_encoders: FilePath | None = Field(
        default=None, description="folder with tokenizer and tokenizer_2, which count the texts' tokens"
    )
