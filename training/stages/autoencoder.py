"""Stage "autoencoder": encodes images to latents of an eighth of their side, and decodes them.

There is no adversary and no perceptual loss: only absolute and squared error, edges at three scales, and a
weak pull of the latents towards a unit normal. Late in the stage, the latents' own mean and standard
deviation are folded into the weights, so that FLUX.1's own scale and shift make the latents unit normal. The
rest of the stage repairs what that does at the borders.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from flux.modules.autoencoder import AutoEncoder
from training.loop.models import channels_last
from training.loop.optimizer import convolution_optimizers
from training.loop.plan import Work
from training.loop.trainer import save_atomically
from training.scenes.render import Renderer

KL, EDGES, SQUARED = 1e-3, 0.5, 0.7
FOLD_AT = 0.75


def edge_loss(a: Tensor, b: Tensor) -> Tensor:
    """Average the absolute difference of gradients in both directions, at full, half and quarter size."""
    loss = a.new_zeros(())
    difference = a - b
    for _ in range(3):
        loss = loss + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        difference = F.avg_pool2d(difference, 2)
    return loss


def reconstruction_loss(ae: AutoEncoder, images: Tensor) -> Tensor:
    """Compute the loss of images in -1..1."""
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=images.is_cuda):
        mean, log_variance = ae.encoder(images).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 10)
        restored = ae.decoder(mean + (log_variance / 2).exp() * torch.randn_like(mean))
    restored = restored.float()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    error = images - restored
    return (
        error.abs().mean() + SQUARED * error.square().mean() + EDGES * edge_loss(images, restored) + KL * kl
    )


@torch.no_grad()
def fold_scale(
    weights: Mapping[str, Tensor], mean: float, deviation: float, scale: float, shift: float
) -> None:
    """Rewrite an autoencoder's weights in place, so that its latents are unit normal after scale and shift.

    z' = (z - mean) / (deviation * scale) + shift

    Args:
        weights: The weights by name.
        mean: The mean of the latents z.
        deviation: Their standard deviation.
        scale: The factor that is applied to z' - shift.
        shift: The shift.
    """
    factor = deviation * scale
    weight, bias = weights["encoder.conv_out.weight"], weights["encoder.conv_out.bias"]
    channels = len(weight) // 2
    weight[:channels] /= factor
    bias[:channels] = (bias[:channels] - mean) / factor + shift
    bias[channels:] -= 2 * torch.log(torch.tensor(factor))
    weight, bias = weights["decoder.conv_in.weight"], weights["decoder.conv_in.bias"]
    bias += weight.sum(dim=(1, 2, 3)) * (mean - factor * shift)
    weight *= factor


class Batches:
    """Draws batches: crops of large images, small images, and whole large ones in turn. Half are mirrored."""

    def __init__(self, rows: Tensor, renderer: Renderer, side: int, batch: int):
        self.side, self.batch, self.turn = side, batch, 0
        self.large = self._render(rows, renderer, side)
        self.small = self._render(rows, renderer, side // 2)

    @staticmethod
    def _render(rows: Tensor, renderer: Renderer, side: int) -> Tensor:
        parts = [(renderer(part, side, side) * 255).round().byte() for part in rows.split(128)]
        return torch.cat(parts)

    def __call__(self) -> Tensor:
        half = self.side // 2
        kind = self.turn % 4
        source = self.small if kind == 1 else self.large
        size = max(1, self.batch // 4) if kind == 3 else self.batch
        images = source[torch.randint(len(source), (size,), device=source.device)]
        if kind in (0, 2):
            top, left = torch.randint(half + 1, (2,)).tolist()
            images = images[:, :, top : top + half, left : left + half]
        if self.turn % 8 > 3:
            images = images.flip(3)
        self.turn += 1
        return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def train_autoencoder(work: Work) -> bool:
    """Train and write the autoencoder. Return False if the call's budget ran out first."""
    plan, device = work.plan_for("autoencoder"), work.cluster.device
    torch.manual_seed(0)
    ae = channels_last(AutoEncoder(work.sizes.ae).to(device))
    optimizers = convolution_optimizers(ae, plan.lr, fused=device.type == "cuda")
    trainer = work.trainer("autoencoder", ae, optimizers, average_decay=0.99)
    batches = Batches(work.pool("autoencoder").rows, Renderer(device), work.side, plan.batch)
    state = {"folded": trainer.spent >= FOLD_AT * plan.seconds}

    def fold_once() -> None:
        if state["folded"] or trainer.spent < FOLD_AT * plan.seconds:
            return
        mean, deviation = latent_statistics(ae, batches.large)
        mean, deviation = work.cluster.broadcast_number(mean), work.cluster.broadcast_number(deviation)
        for weights in (dict(ae.named_parameters()), trainer.average):
            fold_scale(weights, mean, deviation, ae.scale_factor, ae.shift_factor)
        state["folded"] = True

    if not trainer.run(lambda: reconstruction_loss(ae, batches()), plan.batch, after=fold_once):
        return False
    if work.cluster.first:
        ae.load_state_dict(trainer.averaged())
        # The last quarter moved both by a hundredth or so.
        mean, deviation = latent_statistics(ae, batches.large)
        fold_scale(dict(ae.named_parameters()), mean, deviation, ae.scale_factor, ae.shift_factor)
        save_atomically(ae.state_dict(), work.result("autoencoder"))
        mean, deviation = latent_statistics(ae, batches.large)
        mean, deviation = ae.scale_factor * (mean - ae.shift_factor), ae.scale_factor * deviation
        quality = round_trip_psnr(ae, batches.large[:64])
        print(f"autoencoder: {quality:.1f} dB, scaled latents {mean:.3f} +- {deviation:.3f}")
    return True


@torch.no_grad()
def latent_statistics(ae: AutoEncoder, images: Tensor, count: int = 256) -> tuple[float, float]:
    """Compute mean and standard deviation of the latents of byte images, before scale and shift."""
    latents = [ae.encoder(part.float() / 127.5 - 1).chunk(2, dim=1)[0] for part in images[:count].split(32)]
    latents = torch.cat(latents)
    return latents.mean().item(), latents.std().item()


@torch.no_grad()
def round_trip_psnr(ae: AutoEncoder, images: Tensor) -> float:
    """Average the PSNR in dB between byte images and their round trips, one by one on the device."""
    values = []
    for part in images.split(16):
        part = part.float() / 127.5 - 1
        restored = ae.decode(ae.scale_factor * (ae.encoder(part).chunk(2, dim=1)[0] - ae.shift_factor)).clamp(
            -1, 1
        )
        values.append(-10 * torch.log10(((part - restored) / 2).square().mean(dim=(1, 2, 3))))
    return torch.cat(values).mean().item()


def load_autoencoder(work: Work) -> AutoEncoder:
    """Load the trained autoencoder, frozen, to the device."""
    ae = AutoEncoder(work.sizes.ae)
    ae.load_state_dict(torch.load(work.result("autoencoder"), map_location="cpu"))
    return ae.to(work.cluster.device).eval().requires_grad_(False)
