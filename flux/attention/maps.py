"""Who attends to whom: text and image tokens in the attention of a layer, as numbers and as pictures.

The queries and keys come from a pass that watches the layer (`flux.intervention.Intervention.watch`). Shapes
    as in `flux.math`: B batch, T text tokens, I image tokens, N = T + I, H heads, D head size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flux.attention.tokens import TextTokens

CHUNK = 512  # queries taken at once


# The words of a prompt


# Attention


@torch.no_grad()
def mean_attention(q: Tensor, k: Tensor, groups: Tensor | None = None, chunk: int = CHUNK) -> Tensor:
    """softmax(q k^T / sqrt(D)) in float32, mean over heads, summed over groups of keys.

    The largest tensors made hold one head's scores of `chunk` queries, "B chunk N"; two of them are alive at
    once. At 1024x1024 (4096 image and 512 text tokens, 24 heads) that is 2 x 9.4 MB for a row of the batch,
    where the maps of all heads at once would be 2 GB.

    Args:
        q: queries, "B H M D", any of the sequence's; k: all its keys, "B H N D".
        groups: the share of each key that belongs to each group, "N G"; None: each key is its own group. The
            result then is "B M N", so ask for few queries.

    Returns:
        float32, "B M G". Over groups that hold each key once it sums to 1.
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
    """One layer's attention in one step, mean over heads; float32 on the CPU, shares of 1.

    Attributes:
        text: how much each image token attends to text, "B I", padding included; to image tokens it is 1
            minus this.
        padding: the part of `text` that goes to padding.
        to_words: how much each image token attends to the tokens of each word (their sum), "B I".
        from_words: how much the tokens of each word (their mean) attend to each image token, "B I". What is
            missing to a sum of 1 stays in the text.
    """

    text: Tensor
    padding: Tensor
    to_words: dict[str, Tensor]
    from_words: dict[str, Tensor]

    @property
    def image(self) -> Tensor:
        """How much each image token attends to image tokens, "B I"."""
        return 1 - self.text


def look(q: Tensor, k: Tensor, tokens: TextTokens, chunk: int = CHUNK) -> LayerAttention:
    """What a layer's queries and keys of all tokens ("B H N D" each, text first, after QK-norm and rotary
    embedding) tell. Memory: see `mean_attention`.
    """
    num_txt, num_img = len(tokens.padding), q.shape[2] - len(tokens.padding)
    text = torch.ones(num_txt, dtype=torch.bool)
    columns = torch.stack([text, tokens.padding, *tokens.words.values()], dim=1).float()
    groups = torch.cat((columns, columns.new_zeros(num_img, columns.shape[1])))
    shares = mean_attention(q[:, :, num_txt:], k, groups.to(q.device), chunk).cpu().unbind(dim=-1)

    from_words = {}
    for word, mask in tokens.words.items():
        of_word = q[:, :, :num_txt][:, :, mask.to(q.device)]
        from_words[word] = mean_attention(of_word, k, chunk=chunk)[:, :, num_txt:].mean(dim=1).cpu()
    return LayerAttention(shares[0], shares[1], dict(zip(tokens.words, shares[2:])), from_words)


# A picture's making, watched


# Pictures
