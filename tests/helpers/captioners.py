"""Captioners of a few thousand random weights, one of each kind, saved with their processors."""

from pathlib import Path

import torch

WORDS = ["a", "dog", "cat", "on", "the", "grass", "describe", "it"]
CHAT_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TEXT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}USER: <image> {% endif %}"
    "{{ message.content | trim }} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""A template for plain texts, which puts the image in itself, as JoyCaption's."""
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 1.0,  # large, so that other images get other words
}


def blip(folder: Path) -> str:
    """BLIP: the image alone."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    ids = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {"vocab_size": len(words), "encoder_hidden_size": 16, "max_position_embeddings": 300}
    config = BlipConfig(
        text_config=SMALL | ids | text,
        vision_config=SMALL | {"image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    torch.manual_seed(0)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return str(folder)


def llava(folder: Path, template: str = CHAT_TEMPLATE) -> str:
    """Llava: a conversation that holds the image."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:"]
    tokenizer = word_tokenizer(special)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**SMALL, image_size=32, patch_size=16, projection_dim=16),
            text_config=LlamaConfig(**SMALL, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )
    _only_words(model, end=2, pad=0, specials=len(special)).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return str(folder)


def florence(folder: Path) -> str:
    """Florence-2: the token of a task."""
    from transformers import (
        BartConfig,
        CLIPImageProcessor,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
        Florence2VisionConfig,
    )

    special = ["<s>", "<pad>", "</s>", "<unk>", "<image>"]
    tokenizer = word_tokenizer(special, image_token="<image>")
    vision = Florence2VisionConfig(
        depths=(1, 1, 1, 1),
        embed_dim=(8, 8, 8, 8),
        num_heads=(1, 1, 1, 1),
        num_groups=(1, 1, 1, 1),
        window_size=4,
        initializer_range=1.0,
        projection_dim=16,
    )
    text = BartConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        init_std=1.0,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
        max_position_embeddings=300,
    )
    torch.manual_seed(0)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=image_token)
    model = Florence2ForConditionalGeneration(config)
    _only_words(model, end=2, pad=1, specials=len(special)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    images.image_seq_length = 2  # the pooled token and one for each of 32 x 32 pixels
    tasks = {"pure_text": {}}
    Florence2Processor(images, tokenizer, post_processor_config=tasks).save_pretrained(folder)
    return str(folder)


def _only_words(model, end: int, pad: int, specials: int):
    """The model, set up to say at least three words and no special token but the end, forced at the limit."""
    config = model.generation_config
    config.eos_token_id = config.forced_eos_token_id = end
    config.pad_token_id, config.min_new_tokens = pad, 3
    config.suppress_tokens = [token for token in range(specials) if token != end]
    return model


def word_tokenizer(special: list[str], end: str = "</s>", **named: str):
    """A tokenizer of WORDS and special tokens.

    Args:
        special: The special tokens, which are the first ones.
        end: The one that ends a text.
        named: Names that a processor gives to some of them.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {"<pad>": "pad_token", "<s>": "bos_token", end: "eos_token", "<unk>": "unk_token"}
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    given = {names[token]: token for token in special if token in names}
    extra = {"extra_special_tokens": named} if named else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given, **extra)
