"""Stages "kontext", "fill" and "canny": low-rank changes that make flux-nano take an image as condition.

They see rendered scenes, whose truth is known:

    kontext    the scene before an edit as context, the edit as an instruction, the scene after it
    fill       a scene with a part masked, its caption, the whole scene
    canny      the edges of a scene, its caption, the scene

Kontext appends the condition as tokens; the others widen the input by its channels. Both are those of
FLUX.1's models of these names, so the results load as LoRAs of FLUX.1 do.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux.model import Flux
from flux.modules.autoencoder import AutoEncoder
from flux.sampling import pack
from flux.weights.load import read_weights
from training.loop.data import EMPTY, CaptionEncoder, positions
from training.loop.models import Generator, build_flux, compile_blocks, load_text_encoders, text_ids
from training.loop.optimizer import low_rank_optimizers
from training.loop.plan import Work
from training.loop.trainer import save_atomically
from training.scenes.compose import sample
from training.scenes.edits import EDITS, sample_pair
from training.scenes.instructions import instruction
from training.scenes.render import Renderer
from training.stages.autoencoder import load_autoencoder
from training.stages.export import export_adapter
from training.stages.flow import EmptyCaption, add_noise, autocast, load_generator, noise_levels, shift_for
from training.stages.schnell import LoraLinear, lora_weights

EXTRA_CHANNELS = {"kontext": 0, "fill": 320, "canny": 64}  # input channels beside the noisy latent's 64
RANKS = {"kontext": 16, "fill": 8, "canny": 6}
CANNY_THRESHOLDS = 50, 200
CHUNK = 64  # examples rendered at once
PLAIN_GUIDANCE = 1.0  # where the distilled model gives the plain velocity
WIDE_AREAS = {"background", "time"}  # edits of nearly all pixels: textures need not stay


@dataclass
class Drawn:
    """Rendered examples: target and condition as images `B 3 H W` in -1..1, a mask for Fill, texts."""

    target: Tensor
    condition: Tensor
    texts: list[str]
    mask: Tensor | None = None


# ---- what each kind sees


def draw_kontext(rng: random.Random, renderer: Renderer, count: int, side: int) -> Drawn:
    """Draw scenes before and after edits. Half of the batches edit a subject, half the place or the time."""
    wide = rng.random() < len(WIDE_AREAS) / len(EDITS)
    kinds = [edit for edit in EDITS if (edit in WIDE_AREAS) == wide]
    pairs = [sample_pair(rng, rng.choice(kinds)) for _ in range(count)]
    seed = rng.randrange(2**31)
    before, after = (
        renderer(torch.tensor([scene.row() for scene in scenes]), side, side, seed) * 2 - 1
        for scenes in ([pair.before for pair in pairs], [pair.after for pair in pairs])
    )
    return Drawn(after, before, [instruction(rng, pair) for pair in pairs])


def draw_fill(rng: random.Random, renderer: Renderer, count: int, side: int) -> Drawn:
    """Draw scenes with masked parts: the first subject's surroundings, a box, or all but a box."""
    scenes = [sample(rng) for _ in range(count)]
    rows = torch.tensor([scene.row() for scene in scenes])
    images, _, touched = renderer.with_masks(rows, side, side, rng.randrange(2**31))
    target = images * 2 - 1
    mask = torch.stack([_masked_part(rng, subject, side) for subject in touched[:, 0]])[:, None]
    mask = mask.to(target)
    return Drawn(target, target * (1 - mask), [scene.caption for scene in scenes], mask)


def _masked_part(rng: random.Random, subject: Tensor, side: int) -> Tensor:
    """Draw a mask `H W`, 1 where the model has to paint."""
    kind = rng.choice(("subject", "box", "border"))
    if kind == "subject" and subject.any():
        rows, columns = subject.any(1).nonzero().flatten(), subject.any(0).nonzero().flatten()
        grown = [rng.randint(0, side // 10) for _ in range(4)]
        top, bottom = int(rows[0]) - grown[0], int(rows[-1]) + grown[1]
        left, right = int(columns[0]) - grown[2], int(columns[-1]) + grown[3]
    else:
        height, width = (rng.uniform(0.3, 0.8) * side for _ in range(2))
        top, left = rng.uniform(0, side - height), rng.uniform(0, side - width)
        bottom, right = top + height, left + width
    mask = torch.zeros(side, side)
    mask[max(0, round(top)) : round(bottom), max(0, round(left)) : round(right)] = 1
    return 1 - mask if kind == "border" else mask


def draw_canny(rng: random.Random, renderer: Renderer, count: int, side: int) -> Drawn:
    """Draw scenes and their edges."""
    scenes = [sample(rng) for _ in range(count)]
    rows = torch.tensor([scene.row() for scene in scenes])
    images = renderer(rows, side, side, rng.randrange(2**31))
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    edges = np.stack([cv2.Canny(each, *CANNY_THRESHOLDS) for each in pixels])
    condition = torch.from_numpy(edges).to(images)[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
    return Drawn(images * 2 - 1, condition, [scene.caption for scene in scenes])


DRAW: dict[str, Callable[[random.Random, Renderer, int, int], Drawn]] = {
    "kontext": draw_kontext,
    "fill": draw_fill,
    "canny": draw_canny,
}


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a mask `B 1 H W` as Fill takes it, `B I 256`: each pixel of a token is a channel."""
    blocks = rearrange(mask, "b 1 (h r) (w s) -> b (r s) h w", r=8, s=8)
    return pack(blocks)


# ---- the buffer


class Examples:
    """A buffer of examples, encoded, on the training device. New ones replace the oldest."""

    def __init__(self, work: Work, kind: str, ae: AutoEncoder):
        self.kind, self.ae, self.side = kind, ae, work.side
        device, capacity = work.cluster.device, work.plan_for(kind).capacity
        self.rng = random.Random(f"{kind} {work.cluster.rank}".encode())
        self.renderer, self.captions = Renderer(device), CaptionEncoder(work.tokenizers)
        tokens = (self.side // 16) ** 2
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        channels = EXTRA_CHANNELS[kind] or 64
        self.target = torch.empty(capacity, tokens, 64, dtype=dtype, device=device)
        self.condition = torch.empty(capacity, tokens, channels, dtype=dtype, device=device)
        t5, clip = self.captions.batch([""], device)
        self.t5, self.clip = t5.repeat(capacity, 1), clip.repeat(capacity, 1)
        self.filled, self._next, self._owed = 0, 0, 0

    def refresh(self, count: int) -> None:
        """Add `count` examples an iteration, `CHUNK` at a time."""
        self._owed += count
        chunk = min(CHUNK, len(self.target))
        if self._owed >= chunk:
            self.add(chunk)
            self._owed -= chunk

    @torch.no_grad()
    def add(self, count: int) -> None:
        """Draw and encode `count` examples over the oldest ones. `count` must divide the capacity."""
        drawn = DRAW[self.kind](self.rng, self.renderer, count, self.side)
        place = slice(self._next, self._next + count)
        condition = self._encoded(drawn.condition)
        if drawn.mask is not None:
            condition = torch.cat((condition, pack_mask(drawn.mask)), dim=2)
        self.target[place] = self._encoded(drawn.target).to(self.target.dtype)
        self.condition[place] = condition.to(self.condition.dtype)
        self.t5[place], self.clip[place] = self.captions.batch(drawn.texts, self.t5.device)
        self.filled, self._next = max(self.filled, place.stop), place.stop % len(self.target)

    def _encoded(self, images: Tensor) -> Tensor:
        with autocast(images.device):
            return pack(self.ae.encode(images).float())

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw targets `B I 64`, conditions `B I C`, T5 ids and CLIP ids `B T`."""
        picks = torch.randint(self.filled, (size,), device=self.target.device)
        return self.target[picks].float(), self.condition[picks].float(), self.t5[picks], self.clip[picks]


# ---- training


def base_generator(work: Work) -> Generator:
    """Load the generator to adapt: the one trained here, or else the exported one in `work.begin`."""
    if work.begin is None or work.result("guidance").exists():
        return load_generator(work, "guidance", guidance=True)
    generator = Generator(work.sizes, work.tokenizers, guidance=True)
    generator.flux.load_state_dict(read_weights(work.begin / "transformer.safetensors", "cpu", torch.float32))
    load_text_encoders(generator, work.begin)
    return generator.to(work.cluster.device)


def widened(flux: Flux, extra: int) -> Flux:
    """Make a transformer whose input has `extra` channels more, which change nothing yet."""
    if not extra:
        return flux
    wide = build_flux(replace(flux.params, in_channels=flux.params.in_channels + extra))
    weights = dict(flux.state_dict())
    weights["img_in.weight"] = F.pad(weights["img_in.weight"], (0, extra))
    wide.load_state_dict(weights)
    return wide.to(flux.img_in.weight.device)


def adapted(flux: Flux, rank: int, *, text: bool) -> Flux:
    """Replace the input and the linear layers of the blocks, in place, by ones that learn a low-rank change.

    Modulations stay as they are. The change of the input is not of low rank.

    Args:
        flux: The transformer.
        rank: The rank of the changes in the blocks.
        text: Whether the text streams of the double-stream blocks learn too. Captions are known to the model,
            instructions are not.
    """
    flux.requires_grad_(False)
    for block in [flux, *flux.blocks]:
        for name, module in list(block.named_modules()):
            stays = "mod" in name or (name.startswith("txt_") and not text)
            if block is flux:
                stays = name != "img_in"
            if isinstance(module, nn.Linear) and not stays:
                own = min(module.weight.shape) if name == "img_in" else rank
                parent, _, child = name.rpartition(".")
                setattr(block.get_submodule(parent), child, LoraLinear(module, own))
    return flux


def image_positions(work: Work, kind: str) -> Tensor:
    """Return the positions of the image tokens, `1 I 3`. Kontext's context tokens follow, at index 1."""
    noise = positions(work.side, work.side, work.cluster.device)
    if EXTRA_CHANNELS[kind]:
        return noise
    context = noise.clone()
    context[..., 0] = 1
    return torch.cat((noise, context), dim=1)


def train_adapter(work: Work, kind: str) -> bool:
    """Run stage "kontext", "fill" or "canny". Return False if the call's budget ran out first."""
    plan, device = work.plan_for(kind), work.cluster.device
    torch.manual_seed(3)
    generator = base_generator(work).eval().requires_grad_(False)
    base = {name: value.detach().clone() for name, value in generator.flux.state_dict().items()}
    student = widened(generator.flux, EXTRA_CHANNELS[kind])
    student = adapted(student, RANKS[kind], text=kind == "kontext").to(device)
    optimizers = low_rank_optimizers(student, plan.lr, fused=device.type == "cuda")
    trainer = work.trainer(kind, student, optimizers, average_decay=0.99)
    if device.type == "cuda":
        compile_blocks(student)
    examples = Examples(work, kind, load_autoencoder(work))
    while examples.filled < plan.first:
        examples.add(min(CHUNK, plan.first))
    empty = EmptyCaption(CaptionEncoder(work.tokenizers), device)
    shift, txt_ids = shift_for(work.side), text_ids(device)
    img_ids = image_positions(work, kind)
    joined = 2 if EXTRA_CHANNELS[kind] else 1  # by channels, or by tokens

    def loss() -> Tensor:
        examples.refresh(plan.fresh)
        clean, condition, t5, clip = examples.batch(plan.batch)
        t5, clip = empty.replace_some(t5, clip, EMPTY)
        t = noise_levels(plan.batch, shift, device)
        x, target = add_noise(clean, t)
        with torch.no_grad(), autocast(device):
            txt, vec = generator.text(t5, clip)
        with autocast(device):
            x = torch.cat((x, condition), dim=joined)
            guidance = torch.full((plan.batch,), PLAIN_GUIDANCE, device=device)
            velocity = student(x, img_ids, txt, txt_ids, t, vec, guidance)
        return F.mse_loss(velocity[:, : clean.shape[1]].float(), target)

    if not trainer.run(loss, plan.batch):
        return False
    if work.cluster.first:
        learned = lora_weights(trainer.averaged(), base)
        save_atomically(learned, work.result(kind))
        export_adapter(learned, work.folder / "assets", kind)
    return True
