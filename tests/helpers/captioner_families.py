"""The families of captioners that users name: their classes of transformers, with tiny random weights.

Processors are put together here, as far as they can be without the network. Those of Qwen-VL, InternVL and
SmolVLM read videos too, for which they need torchvision: the tests do without it where they can.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers.processors import TemplateProcessing

from helpers.captioners import SMALL, WORDS, word_tokenizer

TEXT = {**SMALL, "num_key_value_heads": 2}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}


def template(image: str) -> str:
    """A chat template that puts `image` where a message has one."""
    return (
        "{% for message in messages %}{{ message.role }}: {% if message.content is string %}"
        "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
        f"{image} "
        "{% else %}{{ part.text }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )


def save_model(folder: Path, name: str, specials: int, end: int, seed: int = 0, **config: Any) -> None:
    """Saves a model that says at least three words, and no special token but the end.

    Args:
        folder: The folder.
        name: The beginning of its classes' names.
        specials: The number of special tokens, which are the first ones.
        end: The token of the end. That of padding is 0.
        seed: The seed of its weights, with which other images get other words.
        config: Its configuration.
    """
    kind = "CausalLM" if name == "Git" else "ConditionalGeneration"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}For{kind}")(getattr(transformers, f"{name}Config")(**config))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1 and not weight.any():  # through which images would make no difference
                weight.normal_()
    given = {
        "eos_token_id": end, "pad_token_id": 0, "min_new_tokens": 3, "max_length": None,
        "suppress_tokens": [token for token in range(specials) if token != end],
    }  # fmt: skip
    for each in (model, getattr(model, "language_model", model)):
        each.generation_config = transformers.GenerationConfig(
            **given, bos_token_id=each.generation_config.bos_token_id
        )
    model.save_pretrained(folder)


def save_parts(folder: Path, processor: str, tokenizer: Any, images: Any) -> None:
    """Saves a processor's parts, as repositories of models with videos hold them."""
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "processor_class": processor}))


def _qwen(folder: Path, name: str, seed: int, rope: dict[str, Any], **vision: Any) -> None:
    special = [
        "<pad>", "<|im_end|>", "<unk>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
        "<|video_pad|>",
    ]  # fmt: skip
    tokenizer = word_tokenizer(special, end="<|im_end|>")
    tokenizer.chat_template = template("<|vision_start|> <|image_pad|> <|vision_end|>")
    save_model(
        folder, name, len(special), 1, seed,
        text_config={**TEXT, "vocab_size": len(tokenizer), "head_dim": 8, "bos_token_id": None,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **rope}},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                       "out_hidden_size": 16, "patch_size": 4, "initializer_range": 1.0, **vision},
        image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4,
    )  # fmt: skip
    size = {"shortest_edge": 16 * 16, "longest_edge": 48 * 48}
    images = transformers.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size)
    save_parts(folder, f"{name.replace('5VL', '5_VL')}Processor", tokenizer, images)


def qwen2_5_vl(folder: Path) -> None:
    _qwen(folder, "Qwen2_5_VL", 0, {"mrope_section": [1, 1, 2]}, window_size=16, fullatt_block_indexes=[0])


def qwen3_vl(folder: Path) -> None:
    rope = {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
    _qwen(folder, "Qwen3VL", 0, rope, num_position_embeddings=16, deepstack_visual_indexes=[0])


def internvl(folder: Path) -> None:
    special = ["<pad>", "<|im_end|>", "<unk>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>", "\n"]
    named = {"start_image_token": 3, "end_image_token": 4, "context_image_token": 5, "video_token": 6}
    named = {name: special[place] for name, place in named.items()}
    tokenizer = word_tokenizer(special, end="<|im_end|>", **named)
    tokenizer.chat_template = template("<IMG_CONTEXT>")
    vision = {**VISION, "image_size": [32, 32], "patch_size": [8, 8]}
    save_model(
        folder, "InternVL", len(special), 1,
        text_config={"model_type": "qwen2", **TEXT, "vocab_size": len(tokenizer), "bos_token_id": None},
        vision_config=vision, image_token_id=5, image_seq_length=4,
    )  # fmt: skip
    images = transformers.GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=False)
    save_parts(folder, "InternVLProcessor", tokenizer, images)
    path = folder / "processor_config.json"
    path.write_text(json.dumps({"processor_class": "InternVLProcessor", "image_seq_length": 4}))


def _idefics(folder: Path, name: str, **parts: Any) -> None:
    special = [
        "<pad>", "<end_of_utterance>", "<unk>", "<image>", "<fake_token_around_image>", "<global-img>",
        "\n\n", "\n", *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
    ]  # fmt: skip
    named = {"end_of_utterance_token": 1, "image_token": 3, "fake_image_token": 4, "global_image_token": 5}
    named = {role: special[place] for role, place in named.items()}
    tokenizer = word_tokenizer(special, end="<end_of_utterance>", **named)
    save_model(
        folder, name, len(special), 1,
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(tokenizer), "bos_token_id": None},
        vision_config=VISION, scale_factor=2, image_token_id=3,
    )  # fmt: skip
    images = getattr(transformers, f"{name}ImageProcessorPil")(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    kind = getattr(transformers, f"{name}Processor")
    kind(images, tokenizer, image_seq_len=4, chat_template=template("<image>"), **parts).save_pretrained(
        folder
    )


def idefics3(folder: Path) -> None:
    _idefics(folder, "Idefics3")


def smolvlm(folder: Path) -> None:
    _idefics(folder, "SmolVLM", video_processor=transformers.SmolVLMVideoProcessor())


def gemma3(folder: Path) -> None:
    special = ["<pad>", "<end_of_turn>", "<unk>", "<bos>", "<start_of_image>", "<end_of_image>"]
    special += ["<image_soft_token>", "\n\n"]
    named = {"boi_token": special[4], "eoi_token": special[5], "image_token": special[6]}
    tokenizer = word_tokenizer(special, end="<end_of_turn>", **named)
    tokenizer.bos_token = "<bos>"
    save_model(
        folder, "Gemma3", len(special), 1, 5,
        text_config={**TEXT, "vocab_size": len(tokenizer), "head_dim": 8, "query_pre_attn_scalar": 8,
                     "sliding_window": 64, "bos_token_id": 3, "eos_token_id": 1, "pad_token_id": 0},
        vision_config=VISION, mm_tokens_per_image=4, boi_token_index=4, eoi_token_index=5,
        image_token_index=6,
    )  # fmt: skip
    images = transformers.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    text = "{{ bos_token }} " + template("<start_of_image>")
    transformers.Gemma3Processor(images, tokenizer, chat_template=text, image_seq_length=4).save_pretrained(
        folder
    )


def llava_next(folder: Path) -> None:
    special, sizes = ["<pad>", "</s>", "<unk>", "<s>", "<image>"], [[32, 64], [64, 32], [64, 64]]
    tokenizer = word_tokenizer(special, end="</s>")
    vision = {**VISION, "patch_size": 16, "projection_dim": 16, "model_type": "clip_vision_model"}
    text = {"model_type": "llama", **TEXT, "vocab_size": len(tokenizer), "bos_token_id": 3}
    save_model(
        folder, "LlavaNext", len(special), 1,
        text_config=text, vision_config=vision, image_token_index=4, image_grid_pinpoints=sizes,
    )  # fmt: skip
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=sizes
    )
    transformers.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    ).save_pretrained(folder)


def blip2(folder: Path) -> None:
    special = ["<pad>", "</s>", "<unk>", "<s>", "<image>"]
    tokenizer = word_tokenizer(special, end="</s>")
    begun = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    tokenizer.backend_tokenizer.post_processor = begun
    save_model(
        folder, "Blip2", len(special), 1,
        vision_config={**VISION, "patch_size": 16},
        qformer_config={**SMALL, "vocab_size": 9, "encoder_hidden_size": 16, "cross_attention_frequency": 1},
        text_config={"model_type": "opt", "vocab_size": len(tokenizer), "hidden_size": 16,
                     "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "init_std": 1.0, "bos_token_id": 3, "eos_token_id": 1,
                     "pad_token_id": 0, "max_position_embeddings": 300},
        num_query_tokens=4, image_token_index=4, initializer_range=1.0,
    )  # fmt: skip
    images = transformers.BlipImageProcessorPil(size={"height": 32, "width": 32})
    transformers.Blip2Processor(images, tokenizer, num_query_tokens=4).save_pretrained(folder)


def git(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    save_model(
        folder, "Git", 5, 3,
        vision_config={**VISION, "patch_size": 16}, **SMALL, vocab_size=len(words), bos_token_id=2,
        eos_token_id=3, max_position_embeddings=300,
    )  # fmt: skip
    names = ["input_ids", "attention_mask"]
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"), model_input_names=names)
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    transformers.GitProcessor(images, tokenizer).save_pretrained(folder)


CHAT: dict[str, Callable[[Path], None]] = {
    "Qwen2.5-VL": qwen2_5_vl,
    "Qwen3-VL": qwen3_vl,
    "InternVL3": internvl,
    "Idefics3": idefics3,
    "SmolVLM": smolvlm,
    "Gemma3": gemma3,
    "LLaVA-NeXT": llava_next,
}
"""Chat models. LLaVA itself stands in `helpers.captioners`."""
WITH_VIDEOS = ("Qwen2.5-VL", "Qwen3-VL", "InternVL3", "SmolVLM")
