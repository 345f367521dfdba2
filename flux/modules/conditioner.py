"""Text encoders: T5 for the token features, CLIP for the pooled vector."""

from torch import Tensor, nn

from flux.errors import InputError


class HFEmbedder(nn.Module):
    """A tokenizer and a text encoder of transformers behind one call.

    Args:
        version: hub id or folder of the encoder.
        max_length: tokens a prompt is padded or cut to.
        tokenizer: hub id or folder of the tokenizer; None: the encoder's own.
        subfolder, tokenizer_subfolder: folders within those.
        hf_kwargs: handed to the encoder's `from_pretrained` (dtype, ...).
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
        from transformers import AutoConfig, AutoTokenizer, CLIPTextModel, T5EncoderModel

        # A CLIP checkpoint with its vision half says "clip", the text half alone "clip_text_model".
        model_type = AutoConfig.from_pretrained(version, subfolder=subfolder).model_type
        self.is_clip = model_type.startswith("clip")
        self.max_length = max_length
        self.output_key = "pooler_output" if self.is_clip else "last_hidden_state"
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer or version, subfolder=tokenizer_subfolder)
        encoder = CLIPTextModel if self.is_clip else T5EncoderModel
        self.hf_module, found = encoder.from_pretrained(
            version, subfolder=subfolder, output_loading_info=True, **hf_kwargs
        )
        # transformers would draw what is missing at random and only warn.
        wrong = sorted(map(str, (*found["missing_keys"], *found["mismatched_keys"])))
        if wrong:
            raise InputError(
                f"{version} is no whole {encoder.__name__}: missing or misshapen {', '.join(wrong[:3])}"
            )
        self.hf_module.eval().requires_grad_(False)

    @classmethod
    def around(cls, encoder: nn.Module, max_length: int, tokenizer: str) -> "HFEmbedder":
        """An encoder that is loaded already, and the tokenizer of that folder."""
        from transformers import AutoTokenizer, CLIPTextModel

        embedder = cls.__new__(cls)
        nn.Module.__init__(embedder)
        embedder.is_clip = isinstance(encoder, CLIPTextModel)
        embedder.max_length = max_length
        embedder.output_key = "pooler_output" if embedder.is_clip else "last_hidden_state"
        embedder.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        embedder.hf_module = encoder
        return embedder

    def forward(self, text: list[str]) -> Tensor:
        """Prompts -> "B T features" (T5, T = max_length) or "B features" (CLIP)."""
        tokens = self.tokenizer(
            text, truncation=True, max_length=self.max_length, padding="max_length", return_tensors="pt"
        )
        # Without a mask, as the transformer was trained: padding takes part in the attention.
        return self.hf_module(input_ids=tokens["input_ids"].to(self.hf_module.device))[self.output_key]
