"""Text encoders: T5 for the features of each token, CLIP for one pooled vector."""

from typing import Any

from torch import Tensor, nn

from flux.errors import InputError


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
    def from_encoder(cls, encoder: nn.Module, max_length: int, tokenizer: str) -> "HFEmbedder":
        """Wrap an encoder that is already loaded.

        Args:
            encoder: A `CLIPTextModel` or a `T5EncoderModel`.
            max_length: Number of tokens to which a prompt is padded or truncated.
            tokenizer: Folder of the tokenizer.
        """
        embedder = cls.__new__(cls)
        nn.Module.__init__(embedder)
        embedder._set_up(encoder, max_length, tokenizer)
        return embedder

    def _set_up(self, encoder: nn.Module, max_length: int, tokenizer: str, subfolder: str = "") -> None:
        from transformers import AutoTokenizer, CLIPTextModel

        self.is_clip = isinstance(encoder, CLIPTextModel)
        self.max_length = max_length
        self.output_key = "pooler_output" if self.is_clip else "last_hidden_state"
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, subfolder=subfolder)
        self.hf_module = encoder

    def forward(self, text: list[str]) -> Tensor:
        """Encode prompts: "B T features" for T5, with T = max_length, "B features" for CLIP."""
        tokens = self.tokenizer(
            text, truncation=True, max_length=self.max_length, padding="max_length", return_tensors="pt"
        )
        # The transformer was trained with features of padding tokens, encoded without an attention mask.
        return self.hf_module(input_ids=tokens["input_ids"].to(self.hf_module.device))[self.output_key]
