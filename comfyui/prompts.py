"""Several prompts as the rows of one conditioning, and a latent with as many rows of the same noise."""

from typing import Any

import torch


def read_prompts(text: str) -> list[str]:
    """Read one prompt from each line that is not blank.

    Raises:
        ValueError: There is none.
    """
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError("Got no prompt: write one a line")
    return prompts


def encode_rows(clip: Any, prompts: list[str], guidance: float) -> list:
    """Encode prompts as the rows of one conditioning.

    The text tokens of all are padded to the longest, as each tokenizer pads, before they are encoded: an
    encoder that sees padding gives other numbers than zeros put behind its result.

    Args:
        clip: ComfyUI's text encoders.
        prompts: The reference's prompt, then those of the edits.
        guidance: FLUX's distilled guidance.

    Raises:
        ValueError: Encoding gives more than one conditioning, as scheduled text encoder hooks do.
    """
    tokens = pad_together([clip.tokenize(prompt) for prompt in prompts])
    encoded = [clip.encode_from_tokens_scheduled(each) for each in tokens]
    if any(len(conditioning) != 1 for conditioning in encoded):
        raise ValueError("Got a CLIP with scheduled hooks: connect one without, all rows share a schedule")
    rows = [conditioning[0][0] for conditioning in encoded]
    extras = [conditioning[0][1] for conditioning in encoded]
    joined = {**extras[0], "guidance": guidance}
    for name, value in extras[0].items():
        if isinstance(value, torch.Tensor) and value.shape[:1] == rows[0].shape[:1]:
            joined[name] = torch.cat([extra[name] for extra in extras])
    return [[torch.cat(rows), joined]]


def pad_together(tokens: list[dict[str, list]]) -> list[dict[str, list]]:
    """Pad tokens of one chunk to the longest prompt's, with each prompt's own last token and weight 1.

    Encoders that split prompts into chunks, as CLIP does, give one pooled vector, so their chunks stay.
    """
    padded = [dict(each) for each in tokens]
    for name in tokens[0]:
        if any(len(each[name]) != 1 for each in tokens):
            continue
        longest = max(len(each[name][0]) for each in tokens)
        for each, new in zip(tokens, padded, strict=True):
            chunk = each[name][0]
            padding = (0, 1.0, *chunk[-1][2:])
            new[name] = [chunk + [padding] * (longest - len(chunk))]
    return padded


def repeat_latent(latent: dict[str, Any], rows: int) -> dict[str, Any]:
    """Repeat a latent of one row so that every row gets the same noise.

    Args:
        latent: ComfyUI's latent of one image.
        rows: Number of rows.

    Raises:
        ValueError: The latent has several rows.
    """
    samples = latent["samples"]
    if samples.shape[0] != 1:
        raise ValueError(f"Got a latent of {samples.shape[0]} images: give one, it is repeated for each edit")
    # ComfyUI draws the noise of each row by its index here, so equal indices mean equal noise.
    return {**latent, "samples": samples.repeat(rows, *[1] * (samples.ndim - 1)), "batch_index": [0] * rows}
