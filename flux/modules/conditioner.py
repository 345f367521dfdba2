"""Text encoders: T5 for the features of each token, CLIP for one pooled vector."""

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from flux.errors import InputError, warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HFEmbedder(nn.Module):
    """A tokenizer and a text encoder of the transformers library behind one call.

    Args:
        version: Hub id or folder of the encoder.
        max_length: Number of tokens to which a prompt is padded or truncated.
        tokenizer: Hub id or folder of the tokenizer. If None, `version`.
        subfolder: Folder of the encoder within `version`.
        tokenizer_subfolder: Folder of the tokenizer within `tokenizer`.
        **hf_kwargs: Passed to the encoder's `from_pretrained` (dtype, ...).

    Raises:
        InputError: If the files lack weights or their shapes do not match.
    """

    def __init__(
        self,
        version: str,
        max_length: int,
        tokenizer: str | None = None,
        subfolder: str = "",
        tokenizer_subfolder: str = "",
        **hf_kwargs,
    ):
        super().__init__()
        from transformers import AutoConfig, CLIPTextModel, T5EncoderModel

        # A whole CLIP model has the type "clip", its text encoder alone "clip_text_model".
        model_type = AutoConfig.from_pretrained(version, subfolder=subfolder).model_type
        encoder_class = CLIPTextModel if model_type.startswith("clip") else T5EncoderModel
        # The library's annotation leaves out that `output_loading_info` makes it return a pair.
        pair: Any = encoder_class.from_pretrained(
            version, subfolder=subfolder, output_loading_info=True, **hf_kwargs
        )
        encoder, info = pair
        # transformers would initialise missing weights at random, with only a warning.
        wrong = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
        if wrong:
            raise InputError(
                f"{version} is no whole {encoder_class.__name__}: missing or misshapen {', '.join(wrong[:3])}"
            )
        encoder.eval().requires_grad_(False)
        self._set_up(encoder, max_length, tokenizer or version, tokenizer_subfolder)

    @classmethod
    def from_encoder(
        cls, encoder: nn.Module, max_length: int, tokenizer: "str | PreTrainedTokenizerBase"
    ) -> "HFEmbedder":
        """Wrap an encoder that is already loaded.

        Args:
            encoder: A `CLIPTextModel` or a `T5EncoderModel`.
            max_length: Number of tokens to which a prompt is padded or truncated.
            tokenizer: The tokenizer, or its folder.
        """
        embedder = cls.__new__(cls)
        nn.Module.__init__(embedder)
        embedder._set_up(encoder, max_length, tokenizer)
        return embedder

    def _set_up(
        self,
        encoder: nn.Module,
        max_length: int,
        tokenizer: "str | PreTrainedTokenizerBase",
        subfolder: str = "",
    ) -> None:
        from transformers import AutoTokenizer, CLIPTextModel

        self.is_clip = isinstance(encoder, CLIPTextModel)
        self.max_length = max_length
        self.output_key = "pooler_output" if self.is_clip else "last_hidden_state"
        is_folder = isinstance(tokenizer, str)
        # The library annotates neither what AutoTokenizer returns nor that a tokenizer may be called.
        loaded: Any = (
            AutoTokenizer.from_pretrained(tokenizer, subfolder=subfolder) if is_folder else tokenizer
        )
        self.tokenizer = loaded
        self.hf_module = encoder

    def token_ids(self, prompt: str) -> list[int]:
        """Divide a prompt into the tokens that the encoder sees."""
        return self.tokenizer(prompt, truncation=True, max_length=self.max_length)["input_ids"]

    def forward(self, text: list[str]) -> Tensor:
        """Encode prompts: "B T features" for T5, with T = max_length, "B features" for CLIP.

        T5 warns of each prompt with words that it does not see. CLIP does not: a pooled vector of the first
        tokens is how FLUX was trained.
        """
        if not self.is_clip:
            for line in unseen_words_warnings(self, text):
                warn(line)
        tokens = self.tokenizer(
            text, truncation=True, max_length=self.max_length, padding="max_length", return_tensors="pt"
        )
        # The transformer was trained with features of padding tokens, encoded without an attention mask.
        return self.hf_module(input_ids=tokens["input_ids"].to(self.hf_module.device))[self.output_key]


class TextReader(NamedTuple):
    """The part of a text encoder that says what it sees of a prompt. It needs no weights.

    Attributes:
        tokenizer: The encoder's tokenizer.
        max_length: Number of tokens to which a prompt is cut.
    """

    tokenizer: "PreTrainedTokenizerBase"
    max_length: int


def cut_words(t5: HFEmbedder | TextReader, prompt: str) -> list[str]:
    """List the words of a prompt that lie wholly or partly beyond the encoder's length."""
    tokens = t5.tokenizer(prompt, truncation=True, max_length=t5.max_length, return_offsets_mapping=True)
    if len(tokens["input_ids"]) < t5.max_length:
        return []
    seen = max(end for _, end in tokens["offset_mapping"])
    # Text without blanks has no words: what is left of it is named instead.
    starts = (match.start() for match in re.finditer(r"\S{1,30}(?!\S)", prompt) if match.end() > seen)
    return prompt[min(seen, next(starts, seen)) :].split()


def unreadable_words(t5: HFEmbedder | TextReader, prompt: str) -> list[str]:
    """List the words of a prompt with letters that the encoder has no token for, such as Chinese in T5."""
    unknown = t5.tokenizer.unk_token_id
    tokens = t5.tokenizer(prompt, truncation=True, max_length=t5.max_length, return_offsets_mapping=True)
    spans = [span for span, id in zip(tokens["offset_mapping"], tokens["input_ids"]) if id == unknown]
    words = (
        match[0]
        for match in re.finditer(r"\S+", prompt)
        if any(
            re.search(r"\w", prompt[max(start, match.start()) : min(end, match.end())])
            for start, end in spans
        )
    )
    return list(dict.fromkeys(words))


def unseen_words_warnings(t5: HFEmbedder | TextReader, prompts: list[str]) -> list[str]:
    """Return a sentence for each prompt with words that are cut off, and with words that cannot be read."""
    lines = []
    for prompt in prompts:
        if cut := cut_words(t5, prompt):
            lines.append(
                f"The model sees only the first {t5.max_length} tokens of {shortened(prompt)!r} and "
                f"overlooks its last words, {shortened(' '.join(cut), 120)!r}: shorten the prompt"
            )
        if unreadable := unreadable_words(t5, prompt):
            lines.append(
                f"The text encoder has no tokens for {shortened(' '.join(unreadable), 120)!r} in "
                f"{shortened(prompt)!r} and overlooks it: say it in other words, best in English"
            )
    return lines


def shortened(text: str, length: int = 60) -> str:
    """Cut a text to its beginning, with "…" after it if something is missing."""
    return text if len(text) <= length else text[:length] + "…"
