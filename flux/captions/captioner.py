"""Image-to-text models of transformers, and how each kind is asked.

| kind | how it is recognised | how it is asked |
|---|---|---|
| `TaskCaptioner` | Florence-2's class | a task's token; the processor reads the answer |
| `ChatCaptioner` | a chat template | a conversation that holds the image |
| `PlainCaptioner` | none of these, such as BLIP and BLIP-2 | the image and the beginning of its description |
| `GitCaptioner` | GIT's class | the same, but without a mark of the text's end |
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image

from flux.errors import InputError, reason_of

SYSTEM_PROMPT = "You are a helpful image captioner."
PHOTO_PROMPT = "Describe this image in one sentence. Begin with its subject."
"""The question to a chat model whose answer is to be a photograph's prompt."""
PHOTO_TOKENS = 64
"""The most tokens of a photograph's prompt."""


@dataclass(frozen=True)
class Description:
    """A captioner's words for an image.

    Attributes:
        text: The words, on one line.
        whole: Whether the captioner came to its end. If not, the limit of tokens cut it off.
    """

    text: str
    whole: bool


class Captioner(ABC):
    """A loaded model that describes images.

    Args:
        name: Its hub id or folder, for messages.
        processor: Its processor of transformers.
        model: The model.
    """

    prompt: ClassVar[str]
    """The default prompt: a question, a task, or the beginning of a description."""
    prompts: ClassVar[tuple[str, ...]] = ()
    """All prompts that it takes. If empty, it takes any text."""
    repeats_prompt: ClassVar[bool] = False
    """Whether the tokens that it generates begin with those that it was given."""

    def __init__(self, name: str, processor: Any, model: Any):
        self.name, self.processor, self.model = name, processor, model

    @classmethod
    def load(cls, name: str, device: str = "cpu", prompt: str | None = None) -> "Captioner":
        """Load a captioner of any kind.

        Args:
            name: Hub id or folder of an image-to-text model of transformers.
            device: Where the model computes.
            prompt: The prompt that `describe` will get: it is checked before weights are read. If None, the
                default of its kind.

        Raises:
            InputError: The model cannot be loaded, describes no images, or does not take the prompt.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            # False, since without it a model that brings code asks on the terminal.
            processor: Any = AutoProcessor.from_pretrained(name, trust_remote_code=False)
            if not (hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")):
                raise ValueError("it reads no images with texts")
            kind = _kind_of(processor)
            kind.check_prompt(kind.prompt if prompt is None else prompt)
            model: Any = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=False)
            model = model.to(device).eval()
        except InputError:
            raise
        except ImportError as error:  # of processors that read videos too
            raise InputError(
                f"Got caption_model {name!r}, which needs a package that is not installed "
                f"({reason_of(error).partition('. ')[0]}): pip install torchvision num2words"
            ) from error
        except Exception as error:  # from the hub, tokenizers, models, devices: of many types
            raise _no_captioner(name, error) from error
        return kind(name, processor, model)

    @classmethod
    def check_prompt(cls, prompt: str) -> None:
        """Raise InputError if the model cannot be asked this."""
        if cls.prompts and prompt not in cls.prompts:
            raise InputError(f"Got caption_prompt {prompt!r}: this model takes {', '.join(cls.prompts)}")

    def describe(
        self, images: Sequence[Image.Image], prompt: str | None = None, max_new_tokens: int = 256
    ) -> list[Description]:
        """Describe images, all in one batch. The same images get the same words each time.

        Args:
            images: RGB images.
            prompt: The question, the task, or the beginning of the descriptions. If None, the default of its
                kind.
            max_new_tokens: The most tokens of a description.

        Raises:
            InputError: The model cannot describe these images, or cannot be asked this.
        """
        import torch

        ask = self.prompt if prompt is None else prompt
        self.check_prompt(ask)
        try:
            inputs = self.inputs(images, ask)
            inputs = inputs.to(self.model.device, dtype=self.model.dtype)  # the dtype is for pixels alone
            with torch.inference_mode():
                # An end that is forced at the limit would look like the captioner's own.
                limits = {"max_new_tokens": max_new_tokens, "forced_eos_token_id": None}
                tokens = self.model.generate(**inputs, **limits, do_sample=False)
            begin = inputs["input_ids"].shape[1] if self.repeats_prompt else 0
            answers = self.processor.batch_decode(tokens[:, begin:], skip_special_tokens=True)
            texts = [self.read(answer, image) for answer, image in zip(answers, images)]
        except Exception as error:  # each model has its own way to fail
            raise _no_captioner(self.name, error) from error
        tokenizer = self.processor.tokenizer
        ends = {tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id}
        return [
            Description(" ".join(text.split()), last in ends)
            for text, last in zip(texts, tokens[:, -1].tolist())
        ]

    @abstractmethod
    def inputs(self, images: Sequence[Image.Image], prompt: str) -> Any:
        """Return the tensors that the model takes, a row for each image."""

    def read(self, answer: str, image: Image.Image) -> str:  # noqa: ARG002  # some kinds need the image
        """Return the description in an answer."""
        return answer


class PlainCaptioner(Captioner):
    """A model that only describes, such as BLIP. A prompt is the beginning of its descriptions."""

    prompt = ""

    def inputs(self, images: Sequence[Image.Image], prompt: str) -> Any:  # noqa: D102  # as its base
        return self.processor(
            images=list(images), text=[prompt] * len(images), padding=True, return_tensors="pt"
        )


class GitCaptioner(PlainCaptioner):
    """GIT. It continues its text token by token, so the text must not end with a mark of its end."""

    def inputs(self, images: Sequence[Image.Image], prompt: str) -> Any:  # noqa: D102  # as its base
        found = super().inputs(images, prompt)
        for name in ("input_ids", "attention_mask"):
            found[name] = found[name][:, :-1]
        return found


class TaskCaptioner(PlainCaptioner):
    """Florence-2, which is given the name of a task in place of a text."""

    prompt = "<MORE_DETAILED_CAPTION>"
    prompts = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")

    def read(self, answer: str, image: Image.Image) -> str:  # noqa: D102  # as its base
        task = self.prompt  # the answers to all of its prompts are read alike
        return self.processor.post_process_generation(answer, task=task, image_size=image.size)[task]


class ChatCaptioner(Captioner):
    """A model that answers a conversation: Qwen-VL, InternVL, SmolVLM, JoyCaption, Llava and many more."""

    prompt = (
        "Describe this image in a few plain sentences: its subject, what it does, its surroundings, colours, "
        "light and style. Begin with the subject. Do not say that it is an image."
    )
    repeats_prompt = True

    def inputs(self, images: Sequence[Image.Image], prompt: str) -> Any:  # noqa: D102  # as its base
        text, tokenizer = self._conversation(prompt), self.processor.tokenizer
        tokenizer.padding_side = "left"  # the answers begin where the rows end
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        return self.processor(
            images=[[image] for image in images],
            text=[text] * len(images),
            padding=True,
            add_special_tokens=not begun,
            return_tensors="pt",
        )

    def _conversation(self, prompt: str) -> str:
        """Return the conversation as the model's template writes it, up to the answer."""
        parts = [{"type": "image"}, {"type": "text", "text": prompt}]
        try:
            text = self._written([{"role": "user", "content": parts}])
        except Exception:  # templates raise errors of their own
            text = ""
        # A template for plain texts, such as JoyCaption's, raises, or writes the list as Python would.
        if text and "'type'" not in text:
            return text
        system = {"role": "system", "content": SYSTEM_PROMPT}
        text, token = self._written([system, {"role": "user", "content": prompt}]), self.processor.image_token
        if token not in text:
            text = self._written([system, {"role": "user", "content": f"{token}\n{prompt}"}])
        return text

    def _written(self, messages: list[dict[str, Any]]) -> str:
        template = _template_of(self.processor)
        return self.processor.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )


def describe_image(image: Image.Image, model: str, device: str = "cpu") -> str:
    """Describe an image in words that serve as its prompt.

    Args:
        image: The image.
        model: Hub id or folder of an image-to-text model of transformers.
        device: Where the model computes.

    Raises:
        InputError: The model cannot be loaded, or cannot describe images.
    """
    captioner = Captioner.load(model, device)
    prompt = PHOTO_PROMPT if isinstance(captioner, ChatCaptioner) else None
    [found] = captioner.describe([image], prompt, PHOTO_TOKENS)
    if not found.text:
        raise InputError(f"Got no words from caption_model {model!r}: say in prompt what the photo shows")
    return found.text


def _kind_of(processor: Any) -> type[Captioner]:
    from transformers import Florence2Processor, GitProcessor

    if isinstance(processor, Florence2Processor):
        return TaskCaptioner
    if isinstance(processor, GitProcessor):
        return GitCaptioner
    return ChatCaptioner if _template_of(processor) else PlainCaptioner


def _template_of(processor: Any) -> Any:
    """Return the chat template, which some models keep with their tokenizer. None if there is none."""
    own = getattr(processor, "chat_template", None)
    return own or getattr(processor.tokenizer, "chat_template", None)


def _no_captioner(name: str, error: Exception) -> InputError:
    return InputError(
        f"Got caption_model {name!r}, which cannot describe the image ({reason_of(error)}): give an "
        "image-to-text model of transformers, or write the text yourself"
    )
