"""The convolutional autoencoder between pictures and latents of an eighth of their side."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class AutoEncoderParams:
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
    return nn.GroupNorm(num_groups, channels, eps=1e-6, affine=True)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


class AttnBlock(nn.Module):
    """Attention of every place to every other, one head, added to the input."""

    def __init__(self, in_channels: int, num_groups: int = 32):
        super().__init__()
        self.norm = group_norm(in_channels, num_groups)
        self.q, self.k, self.v, self.proj_out = (
            nn.Conv2d(in_channels, in_channels, kernel_size=1) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[-2]
        normed = self.norm(x)
        # Contiguous: only then do CUDA's kernels do without a matrix of all places by all places.
        q, k, v = (
            rearrange(project(normed), "b c h w -> b 1 (h w) c").contiguous()
            for project in (self.q, self.k, self.v)
        )
        mixed = rearrange(F.scaled_dot_product_attention(q, k, v), "b 1 (h w) c -> b c h w", h=height)
        return x + self.proj_out(mixed)


class ResnetBlock(nn.Module):
    """Two normalised convolutions, added to the input."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int = 32):
        super().__init__()
        self.norm1 = group_norm(in_channels, num_groups)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = group_norm(out_channels, num_groups)
        self.conv2 = conv3x3(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Downsample(nn.Module):
    """Half the side. One row and column of zeros at the far edges, none at the near ones."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the side."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """What encoder and decoder have at their lowest resolution."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, num_groups)
        self.attn_1 = AttnBlock(channels, num_groups)
        self.block_2 = ResnetBlock(channels, channels, num_groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The blocks of one resolution. A change of resolution, where there is one, is added by its owner."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, num_groups: int):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, num_groups) for a, b in zip(widths, widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x


class Encoder(nn.Module):
    """Pictures "B 3 8h 8w" -> mean and log-variance of their latents, "B 2z h w" (with four levels)."""

    def __init__(self, params: AutoEncoderParams):
        super().__init__()
        widths = [params.ch * mult for mult in (1, *params.ch_mult)]
        self.conv_in = conv3x3(params.in_channels, params.ch)
        self.down = nn.ModuleList(
            Level(a, b, params.num_res_blocks, params.num_groups) for a, b in zip(widths, widths[1:])
        )
        for level in self.down[:-1]:
            level.downsample = Downsample(level.block[-1].conv2.out_channels)
        self.mid = Middle(widths[-1], params.num_groups)
        self.norm_out = group_norm(widths[-1], params.num_groups)
        self.conv_out = conv3x3(widths[-1], 2 * params.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents "B z h w" -> pictures "B 3 8h 8w" (with four levels)."""

    def __init__(self, params: AutoEncoderParams):
        super().__init__()
        widths = [params.ch * mult for mult in (*params.ch_mult, params.ch_mult[-1])]
        self.conv_in = conv3x3(params.z_channels, widths[-1])
        self.mid = Middle(widths[-1], params.num_groups)
        # Numbered like the encoder's levels, by resolution, and run from the last to the first.
        self.up = nn.ModuleList(
            Level(below, own, params.num_res_blocks + 1, params.num_groups)
            for own, below in zip(widths, widths[1:])
        )
        for level in self.up[1:]:
            level.upsample = Upsample(level.block[-1].conv2.out_channels)
        self.norm_out = group_norm(widths[0], params.num_groups)
        self.conv_out = conv3x3(widths[0], params.out_ch)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class DiagonalGaussian(nn.Module):
    """The mean of an encoding, or a draw from it."""

    def __init__(self, sample: bool = True, chunk_dim: int = 1):
        super().__init__()
        self.sample, self.chunk_dim = sample, chunk_dim

    def forward(self, moments: Tensor) -> Tensor:
        mean, log_variance = moments.chunk(2, dim=self.chunk_dim)
        if not self.sample:
            return mean
        return mean + (log_variance / 2).exp() * torch.randn_like(mean)


class AutoEncoder(nn.Module):
    """Pictures in -1..1, "B 3 8h 8w", to and from latents shifted and scaled to about unit variance, "B z h
    w".
    """

    def __init__(self, params: AutoEncoderParams, sample_z: bool = False):
        super().__init__()
        self.params = params
        self.scale_factor, self.shift_factor = params.scale_factor, params.shift_factor
        self.encoder, self.decoder = Encoder(params), Decoder(params)
        self.reg = DiagonalGaussian(sample_z)

    def encode(self, x: Tensor) -> Tensor:
        return self.scale_factor * (self.reg(self.encoder(x)) - self.shift_factor)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z / self.scale_factor + self.shift_factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))
