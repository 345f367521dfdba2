"""Where an edit may change its reference: what attends to the words in which their prompts differ, and where
these words lead the picture apart. Where the subject of both stands: what attends to the words they share.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flux.attention.maps import mean_attention
from flux.attention.tokens import prompt_words, text_tokens
from flux.editing.photo import TOKEN
from flux.modules.conditioner import HFEmbedder

THRESHOLD = 0.65  # of the most that any image token attends to the words, or is led apart by them
ALL_OVER = 0.25  # on flux-nano another place or time of day was above, another object or hat below


def other_words(prompt: str, than: str) -> list[str]:
    """The prompt's words that the other prompt has not, in any case."""
    there = {word.casefold() for word in prompt_words(than)}
    return [word for word in prompt_words(prompt) if word.casefold() not in there]


def attended(
    t5: HFEmbedder, watched: dict[int, tuple[Tensor, Tensor]], prompts: Sequence[str], others: Sequence[str]
) -> Tensor:
    """How much each image token of each row attends to the words of its prompt that the other one has not,
    0..1 of the most, "B I"; 0 where the encoder sees none of them.
    """
    shares = []
    for prompt, other in zip(prompts, others):
        seen, words = text_tokens(t5, prompt), other_words(prompt, other)
        own = [seen.words[word].float() for word in words if word in seen.words]
        shares.append(sum(own, torch.zeros(len(seen.padding))))
    groups, total = torch.stack(shares)[..., None], 0.0
    for q, k in watched.values():
        num_txt = groups.shape[1]
        of_keys = F.pad(groups, (0, 0, 0, q.shape[2] - num_txt)).to(q.device)
        total = total + mean_attention(q[:, :, num_txt:], k, of_keys)[..., 0]
    return total / total.amax(dim=1, keepdim=True).clamp(min=torch.finfo(total.dtype).tiny)


def subject_tokens(
    t5: HFEmbedder,
    watched: dict[int, tuple[Tensor, Tensor]],
    prompts: Sequence[str],
    others: Sequence[str],
    width: int,
    height: int,
) -> Tensor:
    """The image tokens of each row that attend to the words which its prompt shares with the other one,
    "B I", bool; none where they share no word.

    The less evenly a word is attended to, the more it counts: an object's name is where the object stands, an
    article everywhere.
    """
    shared = []
    for prompt, other in zip(prompts, others):
        seen, own = text_tokens(t5, prompt), set(other_words(prompt, other))
        words = [tokens for word, tokens in seen.words.items() if word not in own]
        shared.append(sum(words, torch.zeros(len(seen.padding))) > 0)
    shared, total = torch.stack(shared)[:, None], 0.0
    num_txt = shared.shape[2]
    for q, k in watched.values():
        of_text = torch.eye(q.shape[2], num_txt, device=q.device)
        total = total + mean_attention(q[:, :, num_txt:], k, of_text)
    uneven = total.std(dim=1, keepdim=True) / total.mean(dim=1, keepdim=True)
    maps = torch.where(shared.to(total.device), total * uneven, 0).sum(dim=2)
    return may_change(maps, width, height)[:, :, 0] & (maps > 0)


def smoothed(maps: Tensor, width: int, height: int) -> Tensor:
    """Means over 3x3 tokens, "B I" -> "B 1 rows columns"."""
    maps = maps.reshape(-1, 1, height // TOKEN, width // TOKEN)
    return F.avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=False)


def may_change(maps: Tensor, width: int, height: int) -> Tensor:
    """The tokens where a row's map, "B I", has `THRESHOLD` or more of its most, seen in neighbourhoods of 3x3
    tokens, and their neighbours, "B I 1", bool; where it is 0 all over, all tokens.
    """
    smooth = smoothed(maps.float(), width, height)
    chosen = (smooth >= THRESHOLD * smooth.amax(dim=(2, 3), keepdim=True)).float()
    return F.max_pool2d(chosen, 3, stride=1, padding=1).flatten(1)[:, :, None] > 0


def all_over(changed: Tensor, apart: Tensor, width: int, height: int) -> Tensor:
    """Whether an edit may change all of its picture, "B", bool: whether that is so along the picture's edge,
    which another place or time of day changes, and another object seldom. There the median of the geometric
    mean of both maps, each in proportion to its largest values, is more than `ALL_OVER`.

    Args:
        changed: how much each token attends to the words that change, "B I".
        apart: how far the velocities of the two prompts are apart, at the same latent, "B I".
    """
    edge = torch.ones(height // TOKEN, width // TOKEN, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    changed, apart = (smoothed(maps.float(), width, height) for maps in (changed, apart))
    # A few tokens that are far apart are no measure of the others.
    most = apart.flatten(1).quantile(0.95, dim=1) * changed.flatten(1).amax(dim=1)
    both = (changed * apart)[:, 0, edge].median(dim=1).values
    return both > ALL_OVER**2 * most


def changed_tokens(
    t5: HFEmbedder,
    of_sources: tuple[Sequence[str], dict[int, tuple[Tensor, Tensor]]],
    of_edits: tuple[Sequence[str], dict[int, tuple[Tensor, Tensor]]],
    apart: Tensor,
    width: int,
    height: int,
) -> Tensor:
    """The tokens that each edit may change, "B I 1", bool: those that attend, in the edit, to words which its
    prompt alone has, or, in its source, to words which the source's prompt alone has, and those where the two
    prompts lead the picture apart. All tokens where that is so `all_over`, or where neither prompt has a word
    of its own.

    Args:
        of_sources, of_edits: the prompt of each row, and the queries and keys watched in their pass.
        apart: as `all_over` takes it.
    """
    (sources, before), (prompts, after) = of_sources, of_edits
    changed = torch.maximum(attended(t5, after, prompts, sources), attended(t5, before, sources, prompts))
    everywhere = all_over(changed, apart, width, height)[:, None, None]
    return may_change(changed, width, height) | may_change(apart, width, height) | everywhere
