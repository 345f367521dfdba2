"""Training data: scenes drawn by many processes, captions as token ids, and a buffer of latents.

Scenes are cheap to draw and to render, but expensive to encode. So each new latent goes into a large buffer
from which batches are drawn. It is seen several times while it stays.
"""

import multiprocessing
import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flux.modules.autoencoder import AutoEncoder
from flux.sampling import image_ids, pack
from training.loop.models import channels_last
from training.scenes.compose import COLUMNS, sample
from training.scenes.habits import SQUARE, Shape
from training.scenes.render import Renderer
from training.stages.tokenizers import CLIP_LENGTH, T5_LENGTH

NOISE_WORDS = 0.05  # share of captions with one unknown word, for the model to overlook
CHUNK = 256  # scenes rendered at once
EMPTY = 0.10  # share of captions left empty, for classifier-free guidance


class CaptionEncoder:
    """Encodes captions to token ids of both tokenizers, cut and padded to their lengths.

    Neither tokenizer joins anything across a space, so the ids of a caption are those of its words in a row.
    The ids of each word are computed once.
    """

    def __init__(self, tokenizers: Path):
        from transformers import AutoTokenizer

        self.t5 = AutoTokenizer.from_pretrained(tokenizers / "tokenizer_2")
        self.clip = AutoTokenizer.from_pretrained(tokenizers / "tokenizer")
        self._known: dict[str, tuple[list[int], list[int]]] = {}

    def __call__(self, caption: str) -> tuple[list[int], list[int]]:
        """Encode a caption to the ids of T5 and of CLIP."""
        t5: list[int] = []
        clip = [self.clip.bos_token_id]
        for part in caption.split():
            if part not in self._known:
                ids = (self.t5(part, add_special_tokens=False), self.clip(part, add_special_tokens=False))
                self._known[part] = tuple(found["input_ids"] for found in ids)
            t5 += self._known[part][0]
            clip += self._known[part][1]
        t5 = [*t5[: T5_LENGTH - 1], self.t5.eos_token_id]
        clip = [*clip[: CLIP_LENGTH - 1], self.clip.eos_token_id]
        t5 += [self.t5.pad_token_id] * (T5_LENGTH - len(t5))
        clip += [self.clip.pad_token_id] * (CLIP_LENGTH - len(clip))
        return t5, clip

    def batch(self, captions: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Encode captions to token ids `B T`, for T5 and for CLIP."""
        t5, clip = zip(*(self(caption) for caption in captions))
        return torch.tensor(t5, device=device), torch.tensor(clip, device=device)


@dataclass
class Pool:
    """Scenes as the renderer's rows `N COLUMNS`, with their captions' ids `N T` in int16, on the CPU."""

    rows: Tensor
    t5: Tensor
    clip: Tensor

    def __len__(self) -> int:
        return len(self.rows)


def draw_pool(count: int, tokenizers: Path, seed: int, shape: Shape = SQUARE, processes: int = 1) -> Pool:
    """Draw `count` scenes. The same seed and number of processes draw the same scenes."""
    share = -(-count // processes)
    jobs = [(share, tokenizers, seed * 1009 + number, shape) for number in range(processes)]
    if processes == 1:
        parts = [_draw_part(*jobs[0])]
    else:
        # Forked before anything uses the GPU. The processes inherit the tables and the atlas.
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            parts = pool.starmap(_draw_part, jobs)
    return Pool(*(torch.from_numpy(np.concatenate(columns))[:count] for columns in zip(*parts)))


def _draw_part(count: int, tokenizers: Path, seed: int, shape: Shape) -> tuple[np.ndarray, ...]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    rng = random.Random(seed)
    encode = CaptionEncoder(tokenizers)
    rows = np.empty((count, COLUMNS), np.float32)
    t5, clip = np.empty((count, T5_LENGTH), np.int16), np.empty((count, CLIP_LENGTH), np.int16)
    for number in range(count):
        scene = sample(rng, shape)
        rows[number] = scene.row()
        t5[number], clip[number] = encode(_with_noise(rng, scene.caption))
    return rows, t5, clip


def _with_noise(rng: random.Random, caption: str) -> str:
    """Insert a made-up word into some of the captions."""
    if rng.random() >= NOISE_WORDS:
        return caption
    made_up = "".join(rng.choice("bcdfghklmnprstvw") + rng.choice("aeiou") for _ in range(rng.randint(1, 4)))
    words = caption.split()
    words.insert(rng.randint(0, len(words)), made_up)
    return " ".join(words)


class Latents:
    """A buffer of packed latents of rendered scenes, with their captions, on the training device."""

    def __init__(
        self, pool: Pool, ae: AutoEncoder, renderer: Renderer, width: int, height: int, capacity: int
    ):
        self.pool, self.ae, self.renderer = pool, ae, renderer
        self.width, self.height = width, height
        device = renderer.device
        tokens = (width // 16) * (height // 16)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.latents = torch.empty(capacity, tokens, 64, dtype=dtype, device=device)
        self.scene = torch.zeros(capacity, dtype=torch.long, device=device)
        self.t5, self.clip = pool.t5.to(device), pool.clip.to(device)
        self.filled, self._next, self._drawn, self._owed = 0, 0, 0, 0
        self._order = torch.randperm(len(pool))
        self.encoder = channels_last(ae.encoder)

    def refresh(self, count: int) -> None:
        """Add `count` scenes an iteration. They are rendered `CHUNK` at a time, to keep a GPU busy."""
        self._owed += count
        chunk = min(CHUNK, len(self.latents))
        if self._owed >= chunk:
            self.add(chunk)
            self._owed -= chunk

    @torch.no_grad()
    def add(self, count: int) -> None:
        """Render and encode `count` scenes over the oldest ones. `count` must divide the capacity."""
        places = [(self._drawn + number) % len(self.pool) for number in range(count)]
        chosen = self._order[places]
        self._drawn += count
        images = self.renderer(self.pool.rows[chosen], self.width, self.height)
        images = (2 * images - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=images.is_cuda):
            mean = self.encoder(images).chunk(2, dim=1)[0].float()
        latents = self.ae.scale_factor * (mean - self.ae.shift_factor)
        stop = self._next + count
        self.latents[self._next : stop] = pack(latents).to(self.latents.dtype)
        self.scene[self._next : stop] = chosen.to(self.scene.device)
        self.filled, self._next = max(self.filled, stop), stop % len(self.latents)

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw latents `B I 64`, T5 ids and CLIP ids `B T` from the filled part of the buffer."""
        picks = torch.randint(self.filled, (size,), device=self.latents.device)
        scenes = self.scene[picks]
        return self.latents[picks].float(), self.t5[scenes].long(), self.clip[scenes].long()


def positions(width: int, height: int, device: torch.device, like: tuple[int, int] | None = None) -> Tensor:
    """Positions of the image tokens, `1 I 3`.

    Args:
        width: The width of the image in pixels.
        height: The height of the image in pixels.
        device: The device of the positions.
        like: Width and height of a larger image. The positions are stretched over it, so that what is learned
            about places at the small size holds at the large one.
    """
    ids = image_ids(1, height, width, device)
    if like is not None:
        for axis, (own, other) in enumerate(((height, like[1]), (width, like[0])), start=1):
            ids[..., axis] = (ids[..., axis] + 0.5) * other / own - 0.5
    return ids
