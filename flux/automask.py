"""Where an edit may change its reference: what attends to the words in which their prompts differ, and where
these words lead the picture apart.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flux.attention_maps import look, prompt_words, text_tokens
from flux.model import Flux
from flux.modules.conditioner import HFEmbedder
from flux.photo import TOKEN

THRESHOLD = 0.5  # of the most that any image token attends to the words, or is led apart by them
ALL_OVER = 0.3  # on flux-nano another place or time of day was above, another object or hat below


def layers_to_watch(model: Flux) -> frozenset[int]:
    """The two layers on either side of where the streams join: what the tokens stand for is settled there."""
    joint = len(model.double_blocks)
    return frozenset(layer for layer in range(joint - 2, joint + 2) if 0 <= layer < model.num_layers)


def other_words(prompt: str, than: str) -> list[str]:
    """The prompt's words that the other prompt has not, in any case."""
    there = {word.casefold() for word in prompt_words(than)}
    return [word for word in prompt_words(prompt) if word.casefold() not in there]


def attended(
    t5: HFEmbedder, watched: dict[int, tuple[Tensor, Tensor]], row: int, prompt: str, words: list[str]
) -> Tensor | None:
    """How much each image token of a row attends to these words of its prompt, 0..1 of the most, "I"; None:
    the encoder sees none of them.
    """
    tokens = text_tokens(t5, prompt)
    seen = {word: mask for word, mask in tokens.words.items() if word in words}
    if not seen:
        return None
    rows = ((q[row : row + 1], k[row : row + 1]) for q, k in watched.values())
    maps = [look(q, k, type(tokens)(tokens.padding, seen)).to_words.values() for q, k in rows]
    total = sum(each[0] for layer in maps for each in layer)
    return total / total.max()


def smoothed(maps: Tensor, width: int, height: int) -> Tensor:
    """Means over 3x3 tokens, "B I" -> "B 1 rows columns"."""
    maps = maps.reshape(-1, 1, height // TOKEN, width // TOKEN)
    return F.avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=False)


def may_change(maps: list[Tensor], width: int, height: int) -> Tensor:
    """The tokens where one of these maps, "I" each, has `THRESHOLD` or more of the most, and their
    neighbours, "1 I 1", bool.
    """
    smooth = smoothed(torch.stack(maps).amax(dim=0), width, height)
    chosen = (smooth >= THRESHOLD * smooth.max()).float()
    return F.max_pool2d(chosen, 3, stride=1, padding=1).flatten()[None, :, None] > 0


def led_apart(apart: Tensor, width: int, height: int) -> Tensor:
    """Where two prompts lead a picture apart, "B I 1", bool: the tokens with `THRESHOLD` or more of the
    largest difference, and their neighbours. Where the median of a picture's tokens is more than `ALL_OVER`
    of their 95th percentile, all tokens.

    Args:
        apart: how far the velocities of the two prompts are apart, at the same latent, "B I". Seen in
            neighbourhoods of 3x3 tokens.
    """
    smooth = smoothed(apart.float(), width, height).flatten(1)
    all_over = smooth.median(dim=1).values > ALL_OVER * smooth.quantile(0.95, dim=1)
    parts = torch.cat([may_change([row], width, height) for row in apart.float()])
    return parts | all_over[:, None, None]


def changed_tokens(
    t5: HFEmbedder,
    of_source: tuple[str, dict[int, tuple[Tensor, Tensor]]],
    prompts: list[str],
    of_edits: dict[int, tuple[Tensor, Tensor]],
    width: int,
    height: int,
) -> Tensor:
    """The tokens that each edit may change, "B I 1", bool: those that attend, in the edit, to words which its
    prompt alone has, or, in the source, to words which the source's prompt alone has. Where neither has any,
    all tokens.

    Args:
        of_source: its prompt, and the queries and keys watched in its pass; of_edits: those of their pass.
    """
    source, watched = of_source
    found = []
    for row, prompt in enumerate(prompts):
        maps = [
            attended(t5, of_edits, row, prompt, other_words(prompt, source)),
            attended(t5, watched, 0, source, other_words(source, prompt)),
        ]
        maps = [each for each in maps if each is not None]
        everywhere = torch.ones(1, width // TOKEN * (height // TOKEN), 1, dtype=torch.bool)
        found.append(may_change(maps, width, height) if maps else everywhere)
    return torch.cat(found)
