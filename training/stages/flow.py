"""Stages "flow128", "flow256" and "guidance": train the transformer with its text encoders, then distil it.

Rectified flow (arXiv 2209.03003): noise level t mixes a latent with noise, and the model learns the
difference of the two. Training begins with images of half the size and continues at full size. Then a copy
with a guidance input learns the velocity that classifier-free guidance gives, as FLUX.1-dev did.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flux.modules.autoencoder import AutoEncoder
from flux.modules.layers import timestep_embedding
from flux.sampling import get_lin_function
from flux.weights.load import read_weights
from training.loop.data import CHUNK, EMPTY, CaptionEncoder, Latents, positions
from training.loop.models import Generator, compile_blocks, load_text_encoders, text_ids
from training.loop.optimizer import flow_optimizers
from training.loop.plan import Work
from training.loop.trainer import save_atomically
from training.scenes.render import Renderer
from training.stages.autoencoder import load_autoencoder

GUIDANCE, GUIDANCE_RANGE = 3.5, (1.0, 5.0)


def noise_levels(count: int, shift: float, device: torch.device) -> Tensor:
    """Draw logit-normal noise levels, shifted like the sampler's (arXiv 2403.03206, section 3.1)."""
    t = torch.sigmoid(torch.randn(count, device=device))
    return shift * t / (1 + (shift - 1) * t)


def shift_for(side: int) -> float:
    """Compute the sampler's shift at the full size. Smaller sizes have none."""
    tokens = (side // 16) ** 2
    return math.exp(get_lin_function()(tokens)) if tokens >= 256 else 1.0


def add_noise(latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Add noise of levels `t` to latents. Return the mix, and the velocity towards the noise."""
    noise = torch.randn_like(latents)
    t = t[:, None, None]
    return (1 - t) * latents + t * noise, noise - latents


def autocast(device: torch.device) -> torch.autocast:
    """Compute in bfloat16 on GPUs."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


class EmptyCaption:
    """The token ids of the empty caption."""

    def __init__(self, encoder: CaptionEncoder, device: torch.device):
        self.t5, self.clip = encoder.batch([""], device)

    def replace_some(self, t5: Tensor, clip: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Replace a random share of the captions by the empty one."""
        drop = (torch.rand(len(t5), device=t5.device) < share)[:, None]
        return torch.where(drop, self.t5, t5), torch.where(drop, self.clip, clip)

    @torch.no_grad()
    def encoded(self, generator: Generator, batch: int) -> tuple[Tensor, Tensor]:
        """Encode it for a batch: T5's features `B T C` and CLIP's pooled ones `B C`."""
        txt, vec = generator.text(self.t5, self.clip)
        return txt.expand(batch, -1, -1).contiguous(), vec.expand(batch, -1).contiguous()


def load_generator(work: Work, stage: str, guidance: bool = False) -> Generator:
    """Load a trained generator to the device."""
    generator = Generator(work.sizes, work.tokenizers, guidance)
    generator.load_state_dict(torch.load(work.result(stage), map_location="cpu"))
    return generator.to(work.cluster.device)


@torch.no_grad()
def without_guidance(weights: dict[str, Tensor], scale: float = GUIDANCE) -> dict[str, Tensor]:
    """Fold one guidance scale of a distilled model into the last bias of its time embedder."""
    embedding = timestep_embedding(torch.tensor([scale]), 256).to(weights["guidance_in.in_layer.weight"])
    hidden = F.silu(
        F.linear(embedding, weights["guidance_in.in_layer.weight"], weights["guidance_in.in_layer.bias"])
    )
    out = weights["guidance_in.out_layer.weight"], weights["guidance_in.out_layer.bias"]
    folded = {name: value for name, value in weights.items() if not name.startswith("guidance_in.")}
    folded["time_in.out_layer.bias"] = folded["time_in.out_layer.bias"] + F.linear(hidden, *out)[0]
    return folded


def first_generator(work: Work) -> Generator:
    """Make the generator that training begins with, on the CPU.

    It is untrained, or the distilled one of the files in `work.begin` at guidance 1, where guidance changes
    nothing.
    """
    generator = Generator(work.sizes, work.tokenizers)
    if work.begin:
        weights = read_weights(work.begin / "transformer.safetensors", "cpu", torch.float32)
        generator.flux.load_state_dict(without_guidance(weights, scale=GUIDANCE_RANGE[0]))
        load_text_encoders(generator, work.begin)
    return generator


def make_latents(work: Work, stage: str, ae: AutoEncoder, side: int) -> Latents:
    """Make the stage's buffer, with its first latents."""
    plan = work.plan_for(stage)
    latents = Latents(work.pool(stage), ae, Renderer(work.cluster.device), side, side, plan.capacity)
    while latents.filled < plan.first:
        latents.add(min(CHUNK, plan.first))
    return latents


def train_flow(work: Work, stage: str) -> bool:
    """Run stage "flow128" or "flow256". Return False if the call's budget ran out first."""
    plan, device = work.plan_for(stage), work.cluster.device
    side = work.side if stage == "flow256" else work.side // 2
    torch.manual_seed(0)
    latents = make_latents(work, stage, load_autoencoder(work), side)
    generator = first_generator(work)
    if work.begin or stage == "flow128":
        generator.t5.load_state_dict(torch.load(work.result("text"), map_location="cpu"))
    generator = generator.to(device)
    optimizers = flow_optimizers(generator.named_parameters(), plan.lr, fused=device.type == "cuda")
    trainer = work.trainer(stage, generator, optimizers)
    if stage == "flow256" and trainer.iteration == 0 and not work.begin:
        trainer.continue_from(work.folder / "flow128.state.pt")
    if device.type == "cuda":
        compile_blocks(generator.flux)
        generator.t5.compile()
        generator.clip.compile()
    empty = EmptyCaption(CaptionEncoder(work.tokenizers), device)
    shift = shift_for(side)
    img_ids, txt_ids = positions(side, side, device, like=(work.side, work.side)), text_ids(device)

    def loss() -> Tensor:
        latents.refresh(plan.fresh)
        clean, t5, clip = latents.batch(plan.batch)
        t5, clip = empty.replace_some(t5, clip, EMPTY)
        t = noise_levels(plan.batch, shift, device)
        x, target = add_noise(clean, t)
        with autocast(device):
            txt, vec = generator.text(t5, clip)
            velocity = generator.flux(x, img_ids, txt, txt_ids, t, vec)
        return F.mse_loss(velocity.float(), target)

    if not trainer.run(loss, plan.batch):
        return False
    if work.cluster.first:
        save_atomically(trainer.averaged(), work.result(stage))
    return True


def guidance_student(work: Work, teacher: Generator) -> Generator:
    """Make the student of stage "guidance": the teacher with a guidance input that changes nothing yet."""
    student = Generator(work.sizes, work.tokenizers, guidance=True).to(work.cluster.device)
    student.load_state_dict(teacher.state_dict(), strict=False)
    for parameter in student.flux.guidance_in.get_submodule("out_layer").parameters():
        torch.nn.init.zeros_(parameter)
    student.t5.requires_grad_(False)
    student.clip.requires_grad_(False)
    return student


def train_guidance(work: Work) -> bool:
    """Run stage "guidance": a student with a guidance input learns the guided velocity in one pass."""
    plan, device = work.plan_for("guidance"), work.cluster.device
    torch.manual_seed(1)
    latents = make_latents(work, "guidance", load_autoencoder(work), work.side)
    teacher = load_generator(work, "flow256").eval().requires_grad_(False)
    student = guidance_student(work, teacher)
    trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    optimizers = flow_optimizers(trained, plan.lr, fused=device.type == "cuda")
    trainer = work.trainer("guidance", student, optimizers, average_decay=0.98)
    if device.type == "cuda":
        compile_blocks(teacher.flux)
        compile_blocks(student.flux)
    shift = shift_for(work.side)
    img_ids, txt_ids = positions(work.side, work.side, device), text_ids(device)
    no_txt, no_vec = EmptyCaption(CaptionEncoder(work.tokenizers), device).encoded(teacher, plan.batch)

    def loss() -> Tensor:
        latents.refresh(plan.fresh)
        clean, t5, clip = latents.batch(plan.batch)
        t = noise_levels(plan.batch, shift, device)
        low, high = GUIDANCE_RANGE
        scale = low + (high - low) * torch.rand(plan.batch, device=device)
        with torch.no_grad(), autocast(device):
            x, _ = add_noise(clean, t)
            txt, vec = teacher.text(t5, clip)
            conditional = teacher.flux(x, img_ids, txt, txt_ids, t, vec).float()
            unconditional = teacher.flux(x, img_ids, no_txt, txt_ids, t, no_vec).float()
            target = unconditional + scale[:, None, None] * (conditional - unconditional)
        with autocast(device):
            velocity = student.flux(x, img_ids, txt, txt_ids, t, vec, scale)
        return F.mse_loss(velocity.float(), target)

    if not trainer.run(loss, plan.batch):
        return False
    if work.cluster.first:
        save_atomically(trainer.averaged(), work.result("guidance"))
    return True
