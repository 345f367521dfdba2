"""Who attends to whom: text and image tokens in the attention of a layer, as numbers and as pictures.

The queries and keys come from a pass that watches the layer (`flux.intervention.Intervention.watch`). Shapes
    as in `flux.math`: B batch, T text tokens, I image tokens, N = T + I, H heads, D head size.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from flux.errors import InputError
from flux.images.io import INK, PAPER, grid
from flux.intervention import NOTHING, Intervention, check_layers
from flux.modules.conditioner import HFEmbedder
from flux.pipeline import Pipeline
from flux.sampling import Step, sample
from flux.settings.demos import LayerSettings
from flux.specs import get_spec

CHUNK = 512  # queries taken at once
COLOURS = "magma"
COVER = 0.7  # how much of a heat map's colour is the map's, the rest being the picture's grey


# The words of a prompt


def prompt_words(prompt: str) -> list[str]:
    """The prompt's words in order, each once, whether written large or small."""
    words = {}
    for word in re.findall(r"\w+(?:[-'’]\w+)*", prompt):
        words.setdefault(word.casefold(), word)
    return list(words.values())


def find_word(prompt: str, word: str) -> list[tuple[int, int]]:
    """Where the prompt says this word, or run of words ("top hat"): start and end of each place in it.

    Large and small letters count as equal. Raises InputError if the prompt does not say it.
    """
    found = re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)
    if places := [match.span() for match in found]:
        return places
    raise InputError(
        f"Got the word {word!r}, which is not in the prompt {prompt!r}: "
        f"give some of {', '.join(prompt_words(prompt)) or 'its words, but it has none'}"
    )


@dataclass(frozen=True, eq=False)
class TextTokens:
    """What the T tokens of a prompt stand for.

    Attributes:
        padding: which ones fill the prompt up to the encoder's length, "T", bool. FLUX masks nothing, so they
            are attended to as well. The end-of-text token is not among them.
        words: which ones each chosen word is made of, "T", bool. A token that spans more than the word, as an
            unknown token may, counts as the word's.
    """

    padding: Tensor
    words: dict[str, Tensor]


def text_tokens(t5: HFEmbedder, prompt: str, words: Sequence[str] = ()) -> TextTokens:
    """The prompt's tokens as `t5` makes them. No words: every word of the prompt that was not cut off.

    Raises InputError for a word that the prompt does not say, or that lies behind the encoder's length.
    """
    tokens = t5.tokenizer(
        prompt,
        truncation=True,
        max_length=t5.max_length,
        padding="max_length",
        return_offsets_mapping=True,
    )
    # Some tokenizers count the blank before a word as part of its token: hence overlap, not equality.
    begin, end = torch.tensor(tokens["offset_mapping"]).unbind(dim=-1)
    members = {}
    for word in words or prompt_words(prompt):
        mask = torch.zeros_like(begin, dtype=torch.bool)
        for start, stop in find_word(prompt, word):
            mask |= torch.maximum(begin, torch.tensor(start)) < torch.minimum(end, torch.tensor(stop))
        if mask.any():
            members[word] = mask
        elif words:
            raise InputError(
                f"Got the word {word!r}, which lies behind the prompt's first {t5.max_length} tokens: "
                "the model does not see it, shorten the prompt"
            )
    return TextTokens(torch.tensor(tokens["attention_mask"]) == 0, members)


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


@dataclass(frozen=True, eq=False)
class StepAttention:
    """Step number `index`, from noise level `t` on: the attention of each layer that was looked at."""

    index: int
    t: float
    layers: dict[int, LayerAttention]


def steps_to_watch(settings: LayerSettings) -> list[int]:
    """The chosen steps, or else the first, the middle and the last. Raises InputError for one not there."""
    last = settings.num_steps - 1
    if wrong := [step for step in settings.at_steps if not 0 <= step <= last]:
        raise InputError(f"Got at_steps {wrong}, but the {settings.num_steps} steps are numbered 0..{last}")
    return sorted(set(settings.at_steps or (0, settings.num_steps // 2, last)))


def check_watch(settings: LayerSettings) -> None:
    """Raises InputError if layers, steps or words are to be looked at that are not there, before a model is
    loaded. The settings are complete ones.
    """
    check_layers(settings.layers, get_spec(settings.model).num_layers)
    steps_to_watch(settings)
    for entry in settings.prompts:
        for word in settings.words:
            find_word(entry.prompt, word)


def watch(
    pipe: Pipeline,
    prompt: str,
    seed: int,
    settings: LayerSettings,
    progress: bool = True,
    on_step: Callable[[Step], None] | None = None,
) -> tuple[list[Step], list[StepAttention]]:
    """Samples one picture as `Pipeline.generate` does: its steps, and the attention of `settings.layers` in
    the steps to watch.

    With true guidance the pass of the prompt is looked at, not the negative one. The queries and keys of one
    watched step lie in memory until they have been looked at: at 1024x1024 in bfloat16, 57 MB a layer.

    Args:
        settings: complete ones (`flux.specs.complete`).
        on_step: called with each step as soon as it is taken; an exception from it ends the run.

    Raises:
        InputError: as `text_tokens` and `steps_to_watch`.
    """
    chosen = steps_to_watch(settings) if settings.layers else []
    tokens = text_tokens(pipe.t5, prompt, settings.words) if chosen else None
    watching = Intervention(watch=frozenset(settings.layers))
    interventions = [watching if index in chosen else NOTHING for index in range(settings.num_steps)]

    cond = pipe.condition([prompt], settings.guidance, settings.true_cfg, settings.negative_prompt)
    size = (settings.width, settings.height)
    noise, ids = pipe.noise([seed], *size), pipe.image_ids(1, *size)
    levels = pipe.schedule(settings.num_steps, *size)
    steps, seen = [], []
    with pipe.denoising() as model:
        taken = sample(model, noise, ids, cond, levels, interventions)
        for step in tqdm(taken, total=settings.num_steps, desc="denoise", unit="step", disable=not progress):
            if len(steps) in chosen:
                # Taken out of the step, which lives on, they are free as soon as they have been looked at.
                found = {layer: look(*step.watched.pop(layer), tokens) for layer in settings.layers}
                seen.append(StepAttention(len(steps), step.t, found))
            steps.append(step)
            if on_step:
                on_step(step)
    return steps, seen


# Pictures


def heat_map(picture: Image.Image, values: Tensor, top: float) -> Image.Image:
    """Values of the picture's tokens ("I", 0..top) as colours over its greys, interpolated between tokens."""
    rows, columns = picture.height // 16, picture.width // 16
    fine = F.interpolate(values.reshape(1, 1, rows, columns), picture.size[::-1], mode="bilinear")[0, 0]
    return blend((fine / top).numpy(), np.asarray(picture.convert("L")) / 255)


def blend(values: np.ndarray, greys: np.ndarray) -> Image.Image:
    """Values and greys, 0..1 each, of every pixel -> the values' colours, greys shining through."""
    from matplotlib import colormaps

    colours = colormaps[COLOURS](values)[..., :3]
    mixed = COVER * colours + (1 - COVER) * greys[..., None]
    return Image.fromarray((255 * mixed).round().astype(np.uint8))


def colour_scale(width: int, height: int, top: float) -> Image.Image:
    """What the colours of `heat_map` mean, as they look over a middle grey: a bar from 0 up to `top`."""
    text = max(11, min(width, height) // 14)
    bar = (3 * text // 2, max(2, height - 2 * text))
    shares = np.linspace(1, 0, bar[1])[:, None].repeat(bar[0], axis=1)
    image = Image.new("RGB", (width, height), PAPER)
    image.paste(blend(shares, np.full_like(shares, 0.5)), (text, text))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(text)
    for part in (0, 0.25, 0.5, 0.75, 1):
        at = (2 * text + bar[0], text + round((1 - part) * (bar[1] - 1)))
        draw.text(at, percent(part * top), font=font, fill=INK, anchor="lm")
    return image


def percent(share: float) -> str:
    """0.0312 -> "3.1%"."""
    return f"{100 * share:.2g}%" if share < 0.0995 else f"{100 * share:.0f}%"


def layer_title(layer: int, num_double: int) -> str:
    return f"layer {layer} ({'double' if layer < num_double else 'single'}-stream)"


def layers_sheet(picture: Image.Image, seen: Sequence[StepAttention], num_double: int) -> Image.Image:
    """How much each image token attends to text: layers in rows, steps in columns, over the final picture.

    All maps share one scale, shown beside them.
    """
    layers = list(seen[0].layers)
    top = max(float(step.layers[layer].text.max()) for step in seen for layer in layers)
    images, captions = [], []
    for layer in layers:
        found = [(step, step.layers[layer]) for step in seen]
        maps = [heat_map(picture, attention.text[0], top) for _, attention in found]
        images.append([picture, *maps, colour_scale(*picture.size, top)])
        texts = [
            f"step {step.index}, t = {step.t:.2f}: text {percent(attention.text.mean())} "
            f"(padding {percent(attention.padding.mean())}), image {percent(attention.image.mean())}"
            for step, attention in found
        ]
        captions.append(["the picture", *texts, "of an image token's attention goes to text"])
    return grid(images, captions, [layer_title(layer, num_double) for layer in layers])


DIRECTIONS = {
    "to_words": ("image tokens attend to the word", "of an image token's attention goes to the word"),
    "from_words": ("the word attends to image tokens", "of the word's attention goes to an image token"),
}


def words_sheet(picture: Image.Image, seen: Sequence[StepAttention], num_double: int) -> Image.Image:
    """Each word's maps, mean over the steps, words in columns: for each layer a row of how much the image
    tokens attend to the word, and one of how much the word attends to them.

    The maps of a row share one scale, shown beside them.
    """
    images, captions, titles = [], [], []
    steps = ", ".join(str(step.index) for step in seen)
    for layer in seen[0].layers:
        for direction, (meaning, legend) in DIRECTIONS.items():
            per_step = [getattr(step.layers[layer], direction) for step in seen]
            maps = {word: sum(step[word][0] for step in per_step) / len(seen) for word in per_step[0]}
            top = max(float(values.max()) for values in maps.values())
            heats = [heat_map(picture, values, top) for values in maps.values()]
            images.append([picture, *heats, colour_scale(*picture.size, top)])
            texts = [
                f"{word}: up to {percent(values.max())}, mean {percent(values.mean())}"
                for word, values in maps.items()
            ]
            captions.append(["the picture", *texts, legend])
            titles.append(f"{layer_title(layer, num_double)}: {meaning} (mean of steps {steps})")
    return grid(images, captions, titles)
