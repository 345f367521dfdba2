"""The convolutional autoencoder: images to latents of an eighth of their side, and back."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class AutoEncoderParams:
    """The size of an autoencoder.

    Attributes:
        resolution: Side of the images it was trained on. Unused.
        in_channels: Channels of an input image.
        ch: Channels at full resolution.
        out_ch: Channels of a decoded image.
        ch_mult: Factors on `ch`, one per resolution. Each resolution has half the side of the one before it.
        num_res_blocks: Residual blocks per resolution in the encoder. The decoder has one more.
        z_channels: Channels of a latent.
        scale_factor: Factor that brings latents to about unit variance.
        shift_factor: Mean of the latents, subtracted before scaling.
        num_groups: Groups of each group normalisation.
    """

    resolution: int
    in_channels: int
    ch: int
    out_ch: int
    ch_mult: list[int]
    num_res_blocks: int
    z_channels: int
    scale_factor: float
    shift_factor: float
    num_groups: int = 32


def group_norm(channels: int, num_groups: int) -> nn.GroupNorm:
    """Return the group normalisation used everywhere in the autoencoder."""
    return nn.GroupNorm(num_groups, channels, eps=1e-6, affine=True)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps the size."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


class AttnBlock(nn.Module):
    """Self-attention over all positions with one head, added to the input."""

    def __init__(self, in_channels: int, num_groups: int = 32):
        super().__init__()
        self.norm = group_norm(in_channels, num_groups)
        self.q, self.k, self.v, self.proj_out = (
            nn.Conv2d(in_channels, in_channels, kernel_size=1) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map "B C h w" to the same shape."""
        height = x.shape[-2]
        normed = self.norm(x)
        # CUDA's fused kernels, which store no attention matrix, need contiguous inputs.
        q, k, v = (
            rearrange(project(normed), "b c h w -> b 1 (h w) c").contiguous()
            for project in (self.q, self.k, self.v)
        )
        mixed = rearrange(F.scaled_dot_product_attention(q, k, v), "b 1 (h w) c -> b c h w", h=height)
        return x + self.proj_out(mixed)


class ResnetBlock(nn.Module):
    """Two normalised convolutions, added to the input, which a 1x1 convolution adapts to new channels."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int = 32):
        super().__init__()
        self.norm1 = group_norm(in_channels, num_groups)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = group_norm(out_channels, num_groups)
        self.conv2 = conv3x3(out_channels, out_channels)
        changes = in_channels != out_channels
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Map "B in_channels h w" to "B out_channels h w"."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Downsample(nn.Module):
    """Halve the side. The input is padded with zeros at the right and bottom edges only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map "B C 2h 2w" to "B C h w"."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the side."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map "B C h w" to "B C 2h 2w"."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """The blocks of encoder and decoder at the lowest resolution."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, num_groups)
        self.attn_1 = AttnBlock(channels, num_groups)
        self.block_2 = ResnetBlock(channels, channels, num_groups)

    def forward(self, x: Tensor) -> Tensor:
        """Map "B C h w" to the same shape."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The blocks of one resolution.

    Attributes:
        downsample: The change to the next resolution. Encoders set and call it, except for their last level.
        upsample: The same for a decoder.
    """

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, num_groups: int):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, num_groups) for a, b in pairwise(widths))
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map "B in_channels h w" to "B out_channels h w"."""
        for block in self.block:
            x = block(x)
        return x


class Encoder(nn.Module):
    """Images "B 3 8h 8w" to mean and log-variance of their latents, "B 2z h w" (with four levels)."""

    def __init__(self, params: AutoEncoderParams):
        super().__init__()
        widths = [params.ch * mult for mult in (1, *params.ch_mult)]
        self.conv_in = conv3x3(params.in_channels, params.ch)
        levels = [Level(a, b, params.num_res_blocks, params.num_groups) for a, b in pairwise(widths)]
        for level, width in zip(levels[:-1], widths[1:], strict=False):
            level.downsample = Downsample(width)
        self.down = nn.ModuleList(levels)
        self.mid = Middle(widths[-1], params.num_groups)
        self.norm_out = group_norm(widths[-1], params.num_groups)
        self.conv_out = conv3x3(widths[-1], 2 * params.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to the moments of their latents."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if isinstance(level.downsample, Downsample):
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents "B z h w" to images "B 3 8h 8w" (with four levels)."""

    def __init__(self, params: AutoEncoderParams):
        super().__init__()
        widths = [params.ch * mult for mult in (*params.ch_mult, params.ch_mult[-1])]
        self.conv_in = conv3x3(params.z_channels, widths[-1])
        self.mid = Middle(widths[-1], params.num_groups)
        # Numbered by resolution as in the encoder, and computed from the last to the first.
        levels = [Level(b, a, params.num_res_blocks + 1, params.num_groups) for a, b in pairwise(widths)]
        for level, width in zip(levels[1:], widths[1:], strict=False):
            level.upsample = Upsample(width)
        self.up = nn.ModuleList(levels)
        self.norm_out = group_norm(widths[0], params.num_groups)
        self.conv_out = conv3x3(widths[0], params.out_ch)

    def forward(self, z: Tensor) -> Tensor:
        """Map latents to images."""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
            # Called here and not by the level, so that the level's input can be freed before.
            if isinstance(level.upsample, Upsample):
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class DiagonalGaussian(nn.Module):
    """The mean of a normal distribution, or a sample of it.

    Args:
        sample: Whether to sample.
        chunk_dim: Dimension along which mean and log-variance are concatenated.
    """

    def __init__(self, sample: bool = True, chunk_dim: int = 1):
        super().__init__()
        self.sample, self.chunk_dim = sample, chunk_dim

    def forward(self, moments: Tensor) -> Tensor:
        """Map mean and log-variance, "B 2z h w", to "B z h w"."""
        mean, log_variance = moments.chunk(2, dim=self.chunk_dim)
        if not self.sample:
            return mean
        return mean + (log_variance / 2).exp() * torch.randn_like(mean)


class AutoEncoder(nn.Module):
    """Maps images "B 3 8h 8w" in -1..1 to latents "B z h w" of about unit variance, and back.

    Args:
        params: The size.
        sample_z: Whether `encode` samples a latent. If not, it returns the mean.
    """

    def __init__(self, params: AutoEncoderParams, sample_z: bool = False):
        super().__init__()
        self.params = params
        self.scale_factor, self.shift_factor = params.scale_factor, params.shift_factor
        self.encoder, self.decoder = Encoder(params), Decoder(params)
        self.reg = DiagonalGaussian(sample_z)

    def encode(self, x: Tensor) -> Tensor:
        """Map images to latents, shifted and scaled."""
        return self.scale_factor * (self.reg(self.encoder(x)) - self.shift_factor)

    def decode(self, z: Tensor) -> Tensor:
        """Map latents to images."""
        return self.decoder(z / self.scale_factor + self.shift_factor)

    def forward(self, x: Tensor) -> Tensor:
        """Encode and decode images."""
        return self.decode(self.encode(x))
