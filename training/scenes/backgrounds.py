"""The sixteen backgrounds, painted for many scenes at once.

Each painter takes a `Canvas` (the scenes of one place) and returns their backgrounds, `B 3 H W` in 0..1.
Places differ in their structure (skyline, bricks, dunes, waves). Tints only vary them a little.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.scenes.vocabulary import COLOURS

Painter = Callable[["Canvas"], Tensor]


@dataclass
class Canvas:
    """The scenes of one place: the size of the image, and the numbers of their templates, `B 1 1 1` each."""

    height: int
    width: int
    horizon: Tensor
    sun_x: Tensor
    sun_y: Tensor
    clouds: Tensor
    hills: Tensor
    phase: Tensor
    sky_tint: Tensor
    ground_tint: Tensor
    night: Tensor
    sunset: Tensor
    plain: Tensor
    random: torch.Generator

    def __post_init__(self):
        device = self.horizon.device
        self.u = ((torch.arange(self.width, device=device) + 0.5) / self.width).view(1, 1, 1, -1)
        self.v = ((torch.arange(self.height, device=device) + 0.5) / self.height).view(1, 1, -1, 1)
        self.pixel = 1 / min(self.height, self.width)
        self.aspect = self.width / self.height

    def colour(self, red: float, green: float, blue: float) -> Tensor:
        """Make a colour, `1 3 1 1`."""
        return torch.tensor((red, green, blue), device=self.horizon.device).view(1, 3, 1, 1)

    def by_time(self, day: Tensor, night: Tensor, sunset: Tensor) -> Tensor:
        """Choose by each scene's time of day."""
        return torch.where(self.night, night, torch.where(self.sunset, sunset, day))

    def noise(self, rows: int, columns: int, smooth: bool = True) -> Tensor:
        """Draw random values in -0.5..0.5 on a coarse grid, and enlarge them to the image, `B 1 H W`."""
        grid = torch.rand(
            len(self.horizon), 1, rows, columns, device=self.horizon.device, generator=self.random
        )
        size = (self.height, self.width)
        if smooth:
            return F.interpolate(grid, size=size, mode="bilinear", align_corners=False) - 0.5
        return F.interpolate(grid, size=size, mode="nearest") - 0.5

    def dots(self, rows: int, columns: int, share: float, reach: float) -> Tensor:
        """Scatter small soft dots over the image, `B 1 H W` in 0..1."""
        grid = torch.rand(
            len(self.horizon), 1, rows, columns, device=self.horizon.device, generator=self.random
        )
        spread = F.interpolate((grid < share).float(), size=(self.height, self.width), mode="bicubic")
        return ((spread - reach) * 4).clamp(0, 1)

    def below(self, line: Tensor) -> Tensor:
        """Mask everything below a line, given as y: 1 below, 0 above, one pixel soft."""
        return ((self.v - line) / self.pixel + 0.5).clamp(0, 1)

    def depth(self) -> Tensor:
        """Compute the depth: 0 at the horizon, 1 at the lower edge."""
        return ((self.v - self.horizon) / (1 - self.horizon)).clamp(0, 1)


def _over(image: Tensor, layer: Tensor, mask: Tensor) -> Tensor:
    return image + (layer - image) * mask


def _dim(c: Canvas, ground: Tensor) -> Tensor:
    """Darken ground by the light of the hour."""
    one = torch.ones_like(c.colour(1, 1, 1))
    return ground * c.by_time(one, c.colour(0.38, 0.43, 0.66), c.colour(1.0, 0.80, 0.70))


def _disc(c: Canvas, sky: Tensor, colour: Tensor, radius: float = 0.062) -> Tensor:
    distance = ((c.u - c.sun_x).mul(c.aspect) ** 2 + (c.v - c.sun_y) ** 2).sqrt()
    return _over(sky, colour, ((radius - distance) / c.pixel + 0.5).clamp(0, 1))


def _stars(c: Canvas, sky: Tensor, where: Tensor) -> Tensor:
    stars = c.dots(c.height // 4, c.width // 4, 0.012, reach=0.3) * (1.1 - c.v)
    return _over(sky, c.colour(1.0, 1.0, 0.93), stars * where)


def _sky(c: Canvas, top: Tensor, bottom: Tensor, clouds: bool = True) -> Tensor:
    """Paint the sky of the hour with sun or moon. `top` and `bottom` are its colours by day."""
    top = c.by_time(top, c.colour(0.03, 0.04, 0.15), c.colour(0.36, 0.26, 0.56)) + 0.03 * c.sky_tint
    bottom = c.by_time(bottom, c.colour(0.12, 0.16, 0.38), c.colour(1.0, 0.62, 0.34)) + 0.03 * c.sky_tint
    sky = torch.lerp(top, bottom, (c.v / c.horizon).clamp(0, 1))
    disc = c.by_time(c.colour(1.0, 0.93, 0.50), c.colour(0.95, 0.95, 0.86), c.colour(1.0, 0.86, 0.42))
    sky = _disc(c, _stars(c, sky, c.night.float()), disc)
    if clouds:
        puffs = c.noise(6, 5) + 0.45 * c.noise(14, 11) + 0.25 * c.clouds - 0.10
        haze = (1 - c.v / c.horizon).clamp(0, 1) * (~c.night).float()
        sky = _over(sky, c.by_time(c.colour(1, 1, 1), c.colour(1, 1, 1), c.colour(1.0, 0.8, 0.72)),
                    (puffs * 3.2).clamp(0, 0.85) * haze)  # fmt: skip
    return sky


def _hills(c: Canvas, sky: Tensor, colour: Tensor) -> Tensor:
    """Paint a row of far hills above the horizon."""
    line = c.horizon - (0.035 + 1.6 * c.hills) * (1 + torch.sin(c.u * 5 + 1.7 * c.phase)) - 0.01
    return _over(sky, _dim(c, colour), c.below(line))


def _rolling(c: Canvas) -> Tensor:
    """Draw a softly waved horizon, as y."""
    wave = torch.sin(c.u * 6 + c.phase) + 0.3 * torch.sin(c.u * 14 + 2 * c.phase)
    return c.horizon + c.hills * wave


def _ground(c: Canvas, sky: Tensor, far: Tensor, near: Tensor, shade: Tensor | float, line: Tensor) -> Tensor:
    """Paint ground from `far` to `near` under a line. `shade` darkens or lightens it pointwise."""
    ground = torch.lerp(far, near, c.depth()) * (1 + shade) + 0.03 * c.ground_tint
    return _over(sky, _dim(c, ground), c.below(line))


def _blades(c: Canvas) -> Tensor:
    return 0.30 * c.noise(c.height // 12, c.width // 3) + 0.25 * c.noise(9, 9)


def _water(c: Canvas) -> Tensor:
    """Compute waves that widen towards the viewer, in -1..1."""
    depth = (c.v - c.horizon).clamp(0) ** 0.6
    return torch.sin(depth * 85 + 2 * torch.sin(c.u * 8 + c.phase) + 7 * c.noise(5, 5))


def grass(c: Canvas) -> Tensor:
    sky = _hills(
        c, _sky(c, c.colour(0.32, 0.62, 0.98), c.colour(0.78, 0.92, 1.0)), c.colour(0.44, 0.72, 0.42)
    )
    return _ground(c, sky, c.colour(0.42, 0.76, 0.25), c.colour(0.23, 0.58, 0.17), _blades(c), _rolling(c))


def beach(c: Canvas) -> Tensor:
    sky = _sky(c, c.colour(0.25, 0.66, 0.98), c.colour(0.80, 0.95, 1.0))
    grain = 0.10 * c.noise(c.height // 4, c.width // 4) + 0.08 * c.noise(12, 12)
    sand = torch.lerp(c.colour(0.97, 0.86, 0.62), c.colour(0.90, 0.74, 0.46), c.depth()) * (1 + grain)
    shore = c.horizon + 0.10 + 1.2 * c.hills + 0.02 * torch.sin(c.u * 9 + c.phase)
    wet = _over(sand, sand * 0.84, 1 - c.below(shore + 0.045))
    foam = _over(wet, c.colour(0.97, 1.0, 1.0), 1 - c.below(shore + 0.014))
    sea = torch.lerp(c.colour(0.08, 0.45, 0.72), c.colour(0.20, 0.72, 0.82), c.depth() * 4) + 0.04 * _water(c)
    ground = _over(foam, sea, 1 - c.below(shore)) + 0.03 * c.ground_tint
    return _over(sky, _dim(c, ground), c.below(c.horizon))


def snow(c: Canvas) -> Tensor:
    sky = _hills(
        c, _sky(c, c.colour(0.55, 0.74, 0.95), c.colour(0.88, 0.94, 1.0)), c.colour(0.80, 0.87, 0.96)
    )
    drifts = 0.07 * c.noise(7, 5) + 0.03 * torch.sin(c.depth() * 14 + 3 * torch.sin(c.u * 5 + c.phase))
    image = _ground(c, sky, c.colour(0.95, 0.97, 1.0), c.colour(0.86, 0.91, 0.98), drifts, _rolling(c))
    return _over(image, c.colour(1, 1, 1), 0.8 * c.dots(c.height // 6, c.width // 6, 0.025, reach=0.3))


def desert(c: Canvas) -> Tensor:
    sky = _hills(
        c, _sky(c, c.colour(0.42, 0.72, 0.95), c.colour(1.0, 0.92, 0.76)), c.colour(0.90, 0.70, 0.42)
    )
    ripples = 0.05 * torch.sin(c.v * 95 * (0.6 + c.v) + 5 * torch.sin(c.u * 4 + c.phase)) + 0.08 * c.noise(
        6, 5
    )
    image = _ground(c, sky, c.colour(0.96, 0.78, 0.46), c.colour(0.86, 0.62, 0.30), ripples, _rolling(c))
    crest = c.horizon + 0.12 + 0.07 * torch.sin(c.u * 4.5 + 2.3 * c.phase)
    shade = (c.below(crest) * (1 - (c.v - crest) * 7).clamp(0, 1)) * 0.16
    return image * (1 - shade)


def sea(c: Canvas) -> Tensor:
    sky = _sky(c, c.colour(0.35, 0.66, 0.98), c.colour(0.84, 0.95, 1.0))
    crests = (_water(c) - 0.55).clamp(0) * 0.55
    water = torch.lerp(c.colour(0.10, 0.50, 0.76), c.colour(0.03, 0.26, 0.52), c.depth()) + crests
    return _over(sky, _dim(c, water + 0.03 * c.ground_tint), c.below(c.horizon))


def forest(c: Canvas) -> Tensor:
    sky = _sky(c, c.colour(0.55, 0.80, 0.72), c.colour(0.78, 0.92, 0.74), clouds=False)
    stem = torch.sin(c.u * 34 + c.phase + 1.5 * torch.sin(c.u * 9 + c.phase))
    back = torch.sin(c.u * 57 + 2 * c.phase)
    sky = _over(
        sky, _dim(c, c.colour(0.30, 0.46, 0.30)), ((back - 0.2) * 8).clamp(0, 1) * c.below(c.horizon * 0.1)
    )
    sky = _over(sky, _dim(c, c.colour(0.36, 0.25, 0.16)), ((stem - 0.5) * 9).clamp(0, 1))
    leaves = c.noise(16, 16) * 0.9 + 0.20 * torch.sin(c.u * 13 + c.phase) + 0.5 * c.noise(5, 5)
    canopy = ((leaves - 3.2 * (c.v - 0.20)) * 8).clamp(0, 1)
    sky = _over(sky, _dim(c, c.colour(0.12, 0.38, 0.15) * (1 + 0.6 * c.noise(22, 22))), canopy)
    mottled = 0.45 * c.noise(14, 10) + 0.15 * c.noise(c.height // 6, c.width // 6)
    return _ground(c, sky, c.colour(0.26, 0.42, 0.18), c.colour(0.20, 0.32, 0.13), mottled, c.horizon)


def street(c: Canvas) -> Tensor:
    sky = _sky(c, c.colour(0.45, 0.68, 0.95), c.colour(0.88, 0.93, 0.98))
    block = torch.floor(c.u * 9)
    height = 0.5 + 0.5 * torch.sin(block * 2.4 + c.phase * 3 + block * block * c.hills * 40)
    tone = 0.42 + 0.26 * (0.5 + 0.5 * torch.sin(block * 5.1 + c.phase * 5))
    walls = tone * c.colour(0.98, 0.93, 1.0) + 0.03 * c.sky_tint
    windows = (torch.frac(c.u * 36) > 0.45) & (torch.frac(c.v * 26) > 0.5)
    lit = torch.where(c.night, c.colour(0.95, 0.80, 0.35), walls * 0.62)
    houses = _over(_dim(c, walls), torch.where(c.night, lit, _dim(c, lit)), windows.float())
    image = _over(sky, houses, c.below(c.horizon - 0.10 - 0.26 * height))
    asphalt = 0.07 * c.noise(c.height // 4, c.width // 4)
    image = _ground(c, image, c.colour(0.44, 0.45, 0.48), c.colour(0.33, 0.34, 0.37), asphalt, c.horizon)
    depth = c.depth()
    pavement = c.below(c.horizon) * (1 - c.below(c.horizon + 0.028))
    image = _over(image, _dim(c, c.colour(0.74, 0.73, 0.71)), pavement)
    middle = 0.5 + 0.25 * torch.sin(c.phase) * (1 - depth)
    dash = ((c.u - middle).abs() < 0.008 + 0.022 * depth) & (torch.sin(depth**0.6 * 26) > 0) & (depth > 0.08)
    return _over(image, _dim(c, c.colour(0.95, 0.93, 0.86)), dash.float())


def mountains(c: Canvas) -> Tensor:
    sky = _sky(c, c.colour(0.32, 0.58, 0.92), c.colour(0.85, 0.93, 1.0))
    peaks = [0.5 + 0.38 * torch.sin(c.phase), 0.5 + 0.38 * torch.sin(1.7 * c.phase + 2)]
    ridge = torch.minimum(
        c.horizon - (0.33 - 1.05 * (c.u - peaks[0]).abs()), c.horizon - (0.25 - 0.95 * (c.u - peaks[1]).abs())
    )
    ridge = torch.minimum(ridge, c.horizon - 0.06 - 0.02 * torch.sin(c.u * 17 + c.phase)) + 0.015 * c.noise(
        1, 24
    )
    white = ((ridge + 0.10 + 0.06 * c.noise(1, 20) - c.v) / c.pixel / 2).clamp(0, 1)
    side = 0.06 * torch.sign(c.u - peaks[0])
    rock = _over(c.colour(0.45, 0.48, 0.58) - side, c.colour(0.96, 0.97, 1.0), white) + 0.02 * c.sky_tint
    image = _over(sky, _dim(c, rock), c.below(ridge))
    return _ground(
        c, image, c.colour(0.45, 0.66, 0.34), c.colour(0.30, 0.50, 0.24), 0.22 * c.noise(12, 10), _rolling(c)
    )


def garden(c: Canvas) -> Tensor:
    sky = _hills(c, _sky(c, c.colour(0.42, 0.72, 1.0), c.colour(0.86, 0.95, 1.0)), c.colour(0.36, 0.62, 0.36))
    image = _ground(c, sky, c.colour(0.36, 0.66, 0.28), c.colour(0.22, 0.50, 0.20), _blades(c), _rolling(c))
    field = c.below(c.horizon + 0.03)
    for petals in ((0.95, 0.30, 0.36), (1.0, 0.85, 0.25), (0.98, 0.98, 1.0), (0.72, 0.42, 0.90)):
        image = _over(
            image, _dim(c, c.colour(*petals)), c.dots(c.height // 7, c.width // 7, 0.03, 0.25) * field
        )
    return image


def table(c: Canvas) -> Tensor:
    wall = torch.lerp(c.colour(0.97, 0.93, 0.82), c.colour(0.93, 0.86, 0.70), c.v) + 0.04 * c.sky_tint
    wall = wall * (1 - 0.03 * (torch.sin(c.u * 60 + c.phase) > 0.6).float())
    plank = torch.floor(c.depth() ** 0.7 * 4)
    grain = 0.05 * torch.sin(plank * 3.7 + c.phase) + 0.30 * c.noise(c.height // 5, 4)
    seam = (torch.frac(c.depth() ** 0.7 * 4) < 0.05).float() * 0.25
    wood = (
        torch.lerp(c.colour(0.66, 0.43, 0.24), c.colour(0.50, 0.30, 0.15), c.depth()) + 0.03 * c.ground_tint
    )
    return _over(wall, wood * (1 + grain - seam), c.below(c.horizon))


def brick_wall(c: Canvas) -> Tensor:
    row = torch.floor(c.v * 14)
    across, down = torch.frac(c.u * 7 * c.aspect + 0.5 * (row % 2)), torch.frac(c.v * 14)
    bricks = c.colour(0.72, 0.29, 0.20) * (1 + 0.28 * c.noise(14, 14, smooth=False)) + 0.03 * c.sky_tint
    wall = _over(bricks, c.colour(0.82, 0.77, 0.70), ((across < 0.06) | (down < 0.11)).float())
    paving = 0.06 * c.noise(c.height // 4, c.width // 4) - 0.18 * (torch.frac(c.depth() * 2.5) < 0.04).float()
    return _ground(c, wall, c.colour(0.66, 0.64, 0.62), c.colour(0.52, 0.50, 0.49), paving, c.horizon)


def room(c: Canvas) -> Tensor:
    stripes = (torch.sin(c.u * 42 * c.aspect + c.phase) > 0).float()
    wall = c.colour(0.95, 0.84, 0.78) * (1 - 0.10 * stripes) + 0.04 * c.sky_tint
    wall = _over(wall, c.colour(0.97, 0.95, 0.92), c.below(c.horizon - 0.035))
    weave = 0.05 * c.noise(c.height // 4, c.width // 4)
    carpet = (
        torch.lerp(c.colour(0.74, 0.12, 0.14), c.colour(0.60, 0.07, 0.10), c.depth()) + 0.02 * c.ground_tint
    )
    border = ((c.depth() - 0.16).abs() < 0.03).float()
    carpet = _over(carpet * (1 + weave), c.colour(0.93, 0.74, 0.36), 0.85 * border)
    return _over(wall, carpet, c.below(c.horizon))


def moon(c: Canvas) -> Tensor:
    sky = torch.lerp(c.colour(0.01, 0.01, 0.05), c.colour(0.09, 0.07, 0.18), c.v) + 0.015 * (1 + c.sky_tint)
    sky = _stars(c, sky, torch.ones_like(c.horizon))
    earth = _over(
        c.colour(0.20, 0.45, 0.90), c.colour(0.45, 0.75, 0.45), ((c.noise(24, 24) - 0.08) * 12).clamp(0, 1)
    )
    sky = _disc(c, sky, earth, radius=0.085)
    pits = ((c.noise(13, 10) + 0.4 * c.noise(5, 5) - 0.18) * 9).clamp(0, 1)
    return _ground(c, sky, c.colour(0.66, 0.66, 0.70), c.colour(0.47, 0.47, 0.52), -0.22 * pits, _rolling(c))


def under_water(c: Canvas) -> Tensor:
    water = torch.lerp(c.colour(0.16, 0.62, 0.82), c.colour(0.03, 0.26, 0.50), c.v) + 0.03 * c.sky_tint
    rays = (torch.sin((c.u + 0.35 * c.v) * 22 + c.phase) * 0.5 + 0.5) * (1 - c.v) * 0.18
    ripples = 0.08 * torch.sin(c.v * 70 + 4 * torch.sin(c.u * 6 + c.phase)) + 0.10 * c.noise(8, 8)
    sand = torch.lerp(c.colour(0.40, 0.60, 0.62), c.colour(0.52, 0.62, 0.52), c.depth()) * (1 + ripples)
    return _over(water + rays, sand + 0.02 * c.ground_tint, c.below(_rolling(c)))


def stage(c: Canvas) -> Tensor:
    folds = torch.sin(c.u * 70 * c.aspect + 3 * torch.sin(c.u * 6 + c.phase) + 2 * c.v)
    curtain = c.colour(0.50, 0.10, 0.42) * (1 + 0.30 * folds) + 0.03 * c.sky_tint
    hem = 0.07 + 0.03 * torch.cos(c.u * 25 + c.phase)
    curtain = _over(curtain, c.colour(0.86, 0.66, 0.26), ((c.v - hem).abs() < 0.012).float())
    plank = torch.frac((c.u - 0.5) * 9 / (0.6 + 0.8 * c.depth()) + 0.5)
    boards = c.colour(0.62, 0.42, 0.26) * (1 - 0.22 * (plank < 0.05).float() + 0.10 * c.noise(4, 30))
    light = 1 - 3.2 * ((c.u - 0.3 - 0.4 * c.sun_x) ** 2 + 2.5 * (c.v - 0.88) ** 2)
    boards = (boards + 0.02 * c.ground_tint) * (0.62 + 0.55 * light.clamp(0, 1))
    beam = (1 - (c.u - 0.3 - 0.4 * c.sun_x).abs() / (0.06 + 0.28 * c.v)).clamp(0, 1) * 0.22
    return _over(curtain * (0.85 + beam) + 0.3 * beam, boards, c.below(c.horizon))


def plain(c: Canvas) -> Tensor:
    distance = (c.u - c.sun_x) ** 2 + (c.v - 2.5 * c.sun_y) ** 2
    return (c.plain + 0.02 * c.sky_tint) * (1.04 - 0.36 * distance)


PAINTERS: dict[str, Painter] = {
    "grass": grass, "beach": beach, "snow": snow, "desert": desert, "sea": sea, "forest": forest,
    "street": street, "mountains": mountains, "garden": garden, "table": table, "brick wall": brick_wall,
    "room": room, "moon": moon, "under water": under_water, "stage": stage, "plain": plain,
}  # fmt: skip


def palette(device: torch.device) -> Tensor:
    """Return the colours of the vocabulary, `11 3`."""
    return torch.tensor(list(COLOURS.values()), device=device)
