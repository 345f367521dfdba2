"""Attention between text and image tokens in one layer, in numbers.

The queries and keys come from a pass that watches the layer (`flux.intervention.Intervention.watch`). The
image tokens are the noise tokens. A condition's tokens, those of context images and of Redux, have no maps.
The letters of shapes are those of `flux.math`: B batch, T text tokens, I image tokens, N all tokens, those of
a condition included, H heads, D head size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flux.attention.tokens import TextTokens

QUERY_CHUNK = 512  # queries at a time


@torch.no_grad()
def mean_attention(q: Tensor, k: Tensor, groups: Tensor | None = None, chunk: int = QUERY_CHUNK) -> Tensor:
    """Compute softmax(q k^T / sqrt(D)) in float32, averaged over heads and summed over groups of keys.

    The largest tensors hold the scores of `chunk` queries in one head, "B chunk N"; two of them are alive at
    once. At 1024x1024 (4096 image and 512 text tokens, 24 heads) that is 2 x 9.4 MB for each row of the
    batch, where the maps of all heads would take 2 GB.

    Args:
        q: Queries, "B H M D", any of the sequence's.
        k: Keys of the whole sequence, "B H N D".
        groups: The share of each key in each group, "N G". If None, each key is its own group; the result
            then is "B M N", so ask for few queries.
        chunk: Number of queries computed at a time.

    Returns:
        Float32, "B M G". It sums to 1 over groups that hold each key once.
    """
    scale = 1 / math.sqrt(q.shape[-1])

    def shares(query: Tensor, key: Tensor) -> Tensor:
        weights = torch.softmax(scale * query.float() @ key.float().mT, dim=-1)
        return weights if groups is None else weights @ groups

    parts = []
    for queries in q.split(chunk, dim=2):
        per_head = map(shares, queries.unbind(dim=1), k.unbind(dim=1))
        parts.append(sum(per_head) / q.shape[1])
    return torch.cat(parts, dim=1)


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """One layer's attention in one step: means over heads, in shares of 1, float32 on the CPU.

    Attributes:
        text: How much each image token attends to text, padding included, "B I".
        padding: The part of `text` that goes to padding, "B I".
        to_words: How much each image token attends to all tokens of each word, "B I".
        from_words: How much the tokens of each word attend to each image token, their mean, "B I". What is
            missing to a sum of 1 goes to text and to a condition.
        condition: How much each image token attends to a condition's tokens, "B I"; 0 without one.
    """

    text: Tensor
    padding: Tensor
    to_words: dict[str, Tensor]
    from_words: dict[str, Tensor]
    condition: Tensor

    @property
    def image(self) -> Tensor:
        """How much each image token attends to image tokens, "B I"."""
        return 1 - self.text - self.condition


def layer_attention(q: Tensor, k: Tensor, tokens: TextTokens, chunk: int = QUERY_CHUNK) -> LayerAttention:
    """Measure the attention of one layer. For the memory it takes see `mean_attention`.

    Args:
        q: Queries of text tokens, then of image tokens, after QK-norm and rotary embedding, "B H T+I D".
        k: Keys of these, then of a condition's tokens, likewise, "B H N D".
        tokens: The words and the padding of the prompt.
        chunk: Number of queries computed at a time.
    """
    num_txt, num_own = len(tokens.padding), q.shape[2]
    groups = torch.zeros(k.shape[2], 3 + len(tokens.words))
    groups[:num_txt, 0] = 1
    groups[num_own:, 1] = 1
    groups[:num_txt, 2:] = torch.stack([tokens.padding, *tokens.words.values()], dim=1).float()
    shares = mean_attention(q[:, :, num_txt:], k, groups.to(q.device), chunk).cpu().unbind(dim=-1)

    from_words = {}
    for word, mask in tokens.words.items():
        of_word = q[:, :, :num_txt][:, :, mask.to(q.device)]
        from_words[word] = mean_attention(of_word, k, chunk=chunk)[:, :, num_txt:num_own].mean(dim=1).cpu()
    text, condition, padding, *to_words = shares
    return LayerAttention(text, padding, dict(zip(tokens.words, to_words)), from_words, condition)
