"""Automatic masks: which tokens of its reference an edit may change.

They are the tokens that attend to the words in which the two prompts differ, and those where the velocities
of the two prompts diverge. For an edit of the whole image, the subject is found too: the tokens that attend
to the shared words. `auto_mask` does it all, in one step of the edit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from flux.attention.maps import mean_attention
from flux.attention.tokens import prompt_words, text_tokens
from flux.editing.photo import TOKEN
from flux.editing.source import ReferenceStep, Source
from flux.intervention import Intervention
from flux.loaded_model import LoadedModel
from flux.modules.conditioner import HFEmbedder
from flux.sampling import Conditioning, VelocityModel, euler_step

THRESHOLD = 0.65  # of a map's maximum: tokens above it may change
WHOLE_IMAGE = 0.25  # on flux-nano another place or time of day was above, another object or hat below


@dataclass(frozen=True, eq=False)
class WatchedPass:
    """A pass of the model whose attention was watched.

    Attributes:
        prompts: The prompt of each of the B rows.
        layers: Queries and keys by layer, see `flux.intervention.Recorded`.
    """

    prompts: Sequence[str]
    layers: Mapping[int, tuple[Tensor, Tensor]]


def auto_mask(
    pipe: LoadedModel,
    model: VelocityModel,
    source: Source,
    reference: ReferenceStep,
    cond: Conditioning,
    edits: WatchedPass,
) -> tuple[Tensor, Tensor | None]:
    """Find the automatic masks of a batch of edits, in a step that watched its attention.

    The divergence of an edit is measured at the reference's latent x of this step, at noise level t, with one
    pass more for each prompt. It is the root mean square, over channels, of

        v(x, t, target) - v(x, t, source)

    Args:
        pipe: The models.
        model: The transformer.
        source: Where the edits began.
        reference: The reference's step.
        cond: Steers the edits.
        edits: The pass of the edits in this step.

    Returns:
        Which tokens each edit may change, "B I 1", bool; and the tokens of the subject that it shares with
        its source, "B I", bool, or None if no edit may change its whole image.
    """
    num = len(edits.prompts)
    where = model, reference.latent.expand(num, -1, -1), source.img_ids
    levels = reference.t, reference.t_next
    # The source gets the guidance of the edits, since other guidance changes the velocity everywhere.
    source_cond = replace(source.cond.expanded(num), negative=None, guidance=cond.guidance)
    watching = Intervention(watch=pipe.model.params.junction_layers)
    of_source = euler_step(*where, source_cond, *levels, watching)
    of_edits = euler_step(*where, replace(cond, negative=None), *levels)
    divergence = (of_edits.velocity - of_source.velocity).square().mean(dim=2).sqrt()
    sources = WatchedPass(source.prompts * (num // len(source.prompts)), of_source.watched)
    mask = changed_tokens(pipe.t5, sources, edits, divergence, *source.size)
    if not mask.all(dim=1).any():
        return mask, None
    return mask, subject_tokens(pipe.t5, sources, edits.prompts, *source.size)


def words_only_in(prompt: str, other: str) -> list[str]:
    """List the words of a prompt that the other prompt does not have, regardless of case."""
    known = {word.casefold() for word in prompt_words(other)}
    return [word for word in prompt_words(prompt) if word.casefold() not in known]


def word_attention(t5: HFEmbedder, watched: WatchedPass, others: Sequence[str]) -> Tensor:
    """Measure how much image tokens attend to the words that only their own prompt has.

    Args:
        t5: The text encoder of the prompts.
        watched: A pass of the prompts.
        others: The prompt that each row's is compared with.

    Returns:
        Shares of each row's maximum, "B I"; 0 in a row without such a word within the encoder's length.
    """
    weights = []
    for prompt, other in zip(watched.prompts, others):
        tokens = text_tokens(t5, prompt)
        words = [tokens.words[word] for word in words_only_in(prompt, other) if word in tokens.words]
        weights.append(sum((word.float() for word in words), torch.zeros(len(tokens.padding))))
    groups, totals = torch.stack(weights)[..., None], []
    num_txt = groups.shape[1]
    for q, k in watched.layers.values():
        of_keys = F.pad(groups, (0, 0, 0, k.shape[2] - num_txt)).to(q.device)
        totals.append(mean_attention(q[:, :, num_txt:], k, of_keys)[..., 0])
    total = reduce(torch.add, totals)
    return total / total.amax(dim=1, keepdim=True).clamp(min=torch.finfo(total.dtype).tiny)


def subject_tokens(
    t5: HFEmbedder, watched: WatchedPass, others: Sequence[str], width: int, height: int
) -> Tensor:
    """Find the subject that two prompts share: the image tokens that attend to the shared words.

    With a_j, the attention of each image token to text token j, the map is the sum over the shared words'
    tokens of

        a_j std(a_j) / mean(a_j)

    So a word counts the more, the less evenly it is attended to. The name of an object is attended to where
    the object is, an article everywhere.

    Args:
        t5: The text encoder of the prompts.
        watched: A pass of the prompts.
        others: The prompt that each row's is compared with.
        width: Width of the image in pixels.
        height: Height of the image in pixels.

    Returns:
        Which tokens are the subject's, "B I", bool; none where no word is shared.
    """
    shared = []
    for prompt, other in zip(watched.prompts, others):
        tokens, own = text_tokens(t5, prompt), set(words_only_in(prompt, other))
        words = [mask for word, mask in tokens.words.items() if word not in own]
        shared.append(sum(words, torch.zeros(len(tokens.padding))) > 0)
    is_shared, totals = torch.stack(shared)[:, None], []
    num_txt = is_shared.shape[2]
    for q, k in watched.layers.values():
        text = torch.eye(k.shape[2], num_txt, device=q.device)
        totals.append(mean_attention(q[:, :, num_txt:], k, text))
    total = reduce(torch.add, totals)
    correction = min(1, total.shape[1] - 1)  # torch warns of the deviation of a single token
    spread = total.std(dim=1, correction=correction, keepdim=True)
    unevenness = spread / total.mean(dim=1, keepdim=True)
    maps = torch.where(is_shared.to(total.device), total * unevenness, 0).sum(dim=2)
    return dilated_mask(maps, width, height)[:, :, 0] & (maps > 0)


def smoothed(maps: Tensor, width: int, height: int) -> Tensor:
    """Average maps over 3x3 tokens, "B I" -> "B 1 rows columns"."""
    maps = maps.reshape(-1, 1, height // TOKEN, width // TOKEN)
    return F.avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=False)


def dilated_mask(maps: Tensor, width: int, height: int) -> Tensor:
    """Select the tokens where a smoothed map is at least THRESHOLD of its maximum, and their neighbours.

    Args:
        maps: One for each row, "B I".
        width: Width of the image in pixels.
        height: Height of the image in pixels.

    Returns:
        "B I 1", bool. All tokens of a row whose map is 0 everywhere.
    """
    smooth = smoothed(maps.float(), width, height)
    chosen = (smooth >= THRESHOLD * smooth.amax(dim=(2, 3), keepdim=True)).float()
    return F.max_pool2d(chosen, 3, stride=1, padding=1).flatten(1)[:, :, None] > 0


def changes_whole_image(changed: Tensor, divergence: Tensor, width: int, height: int) -> Tensor:
    """Decide by the image's edge which edits change their whole image.

    Another place or time of day changes the edge, another object seldom. With c = `changed` and
    d = `divergence`, both smoothed, an edit changes its whole image if

        median of sqrt(c d) over the edge > WHOLE_IMAGE sqrt(max(c) q95(d))

    where q95 is the 95th percentile over the image.

    Args:
        changed: How much each token attends to the words that change, "B I".
        divergence: How far the velocities of the two prompts differ at the same latent, "B I".
        width: Width of the image in pixels.
        height: Height of the image in pixels.

    Returns:
        One decision for each row, "B", bool.
    """
    edge = torch.ones(height // TOKEN, width // TOKEN, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    changed, divergence = (smoothed(maps.float(), width, height) for maps in (changed, divergence))
    # A few tokens of large divergence say nothing about the others: hence a percentile, not the maximum.
    most = divergence.flatten(1).quantile(0.95, dim=1) * changed.flatten(1).amax(dim=1)
    both = (changed * divergence)[:, 0, edge].median(dim=1).values
    return both > WHOLE_IMAGE**2 * most


def changed_tokens(
    t5: HFEmbedder, sources: WatchedPass, edits: WatchedPass, divergence: Tensor, width: int, height: int
) -> Tensor:
    """Find the tokens that each edit may change.

    These attend, in the edit, to words that only its prompt has, or, in its source, to words that only the
    source's prompt has; or the velocities of the two prompts diverge there. All tokens of an edit that
    `changes_whole_image`, or if neither prompt has a word of its own.

    Args:
        t5: The text encoder of the prompts.
        sources: A pass of the sources, one row for each edit.
        edits: A pass of the edits.
        divergence: As in `changes_whole_image`.
        width: Width of the image in pixels.
        height: Height of the image in pixels.

    Returns:
        "B I 1", bool.
    """
    changed = torch.maximum(
        word_attention(t5, edits, sources.prompts), word_attention(t5, sources, edits.prompts)
    )
    everywhere = changes_whole_image(changed, divergence, width, height)[:, None, None]
    return dilated_mask(changed, width, height) | dilated_mask(divergence, width, height) | everywhere
