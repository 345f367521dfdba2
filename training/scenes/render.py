"""Renders scenes from rows of numbers, in batches, on CPU or GPU.

renderer = Renderer("cuda")
images = renderer(torch.tensor([scene.row() for scene in scenes]), 256, 256)         # "B 3 H W" in 0..1
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.scenes.atlas import CELL, boxes, sprites
from training.scenes.backgrounds import PAINTERS, Canvas, palette
from training.scenes.compose import DETAIL_SLOTS, FIRST_DETAIL, FIRST_THING, SLOT_WIDTH, THING_SLOTS
from training.scenes.edits import Pair
from training.scenes.habits import FLOATING, hat_placement
from training.scenes.vocabulary import OBJECTS, PLACES, SPRITES

NIGHT_LIGHT, SUNSET_LIGHT = (0.68, 0.73, 0.92), (1.0, 0.87, 0.78)
LEVELS = 3  # the atlas at full, half and quarter size, so that small things do not glitter


@dataclass
class _Layer:
    """The sprites of one slot, one for each of some rows. Lengths are fractions of the image."""

    rows: Tensor
    sprite: Tensor
    x: Tensor
    foot: Tensor
    size: Tensor
    colour: Tensor

    def take(self, chosen: Tensor) -> "_Layer":
        return _Layer(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


class Renderer:
    """Draws scenes: the background, its details, then the subjects with their hats, back to front.

    Only textures are random, and the renderer has its own generator for them. `seed` makes a batch
    repeatable, and two batches whose rows have the same places in the same order get the same textures.
    """

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device)
        self.generator.manual_seed(0)
        self.palette = palette(self.device)
        self.boxes = torch.tensor(boxes())
        self.floating = torch.tensor(FLOATING)
        self.hat_table = _hat_table()
        images = torch.from_numpy(sprites().copy()).permute(0, 3, 1, 2).to(self.device, torch.float32) / 255
        images[:, :3] *= images[:, 3:]
        self.levels = [F.avg_pool2d(images, 2**level) if level else images for level in range(LEVELS)]

    @torch.no_grad()
    def __call__(self, rows: Tensor, width: int, height: int, seed: int | None = None) -> Tensor:
        """Render rows `B COLUMNS`, on the CPU, to images `B 3 height width` in 0..1."""
        return self._draw(rows, width, height, seed)

    @torch.no_grad()
    def with_masks(
        self, rows: Tensor, width: int, height: int, seed: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Render images `B 3 H W` with the masks of their subjects.

        Returns:
            The images; the opacity of each subject with its hat, `B 4 H W`; and where it or its shadow is
            drawn, `B 4 H W`, booleans.
        """
        masks = torch.zeros(2, len(rows), THING_SLOTS, height, width, device=self.device)
        images = self._draw(rows, width, height, seed, masks)
        return images, masks[0], masks[1] > 0

    @torch.no_grad()
    def pairs(
        self, pairs: list[Pair], width: int, height: int, seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Render the images before and after edits, and the pixels that each edit may change.

        Returns:
            The images before and after, `B 3 H W`, and booleans `B 1 H W`. After an edit of a subject, the
            images are equal outside of them. For a new background or time they are all pixels but the
            subject's.
        """
        images, others, changes = [], [], []
        for number, pair in enumerate(pairs):  # one by one, so that both get the same textures
            before, after = (torch.tensor([scene.row()]) for scene in (pair.before, pair.after))
            image, alpha, touched = self.with_masks(before, width, height, seed + number)
            other, _, other_touched = self.with_masks(after, width, height, seed + number)
            if pair.changed:
                slots = list(pair.changed)
                changed = (touched[:, slots] | other_touched[:, slots]).any(1, keepdim=True)
            else:
                changed = (alpha < 0.5).all(1, keepdim=True)
            images.append(image)
            others.append(other)
            changes.append(changed)
        return torch.cat(images), torch.cat(others), torch.cat(changes)

    def _draw(
        self, rows: Tensor, width: int, height: int, seed: int | None, masks: Tensor | None = None
    ) -> Tensor:
        """Draw the scenes, and each subject's opacity and touched pixels into `masks`, `2 B 4 H W`."""
        if seed is not None:
            self.generator.manual_seed(seed)
        image = torch.empty(len(rows), 3, height, width, device=self.device)
        for place in range(len(PLACES)):
            chosen = (rows[:, 0] == place).nonzero()[:, 0]
            if len(chosen):
                painted = PAINTERS[PLACES[place].name](self._canvas(rows[chosen], width, height))
                image[chosen.to(self.device)] = painted.clamp(0, 1)
        for slot in range(DETAIL_SLOTS + THING_SLOTS):
            first = FIRST_DETAIL + slot * SLOT_WIDTH
            layer, hats = self._layers(rows, first, width, height)
            mask = masks[:, :, slot - DETAIL_SLOTS] if masks is not None and first >= FIRST_THING else None
            self._stamp(image, layer, rows, mask, shadow=True)
            self._stamp(image, hats, rows, mask, shadow=False)
        return image.clamp_(0, 1)

    def _canvas(self, rows: Tensor, width: int, height: int) -> Canvas:
        on_device = rows[:, :FIRST_DETAIL].to(self.device, torch.float32)
        fields = [on_device[:, column].view(-1, 1, 1, 1) for column in range(FIRST_DETAIL)]
        time, plain = fields[1], self.palette[on_device[:, 2].long()].view(-1, 3, 1, 1)
        return Canvas(
            height, width, *fields[3:], night=time == 1, sunset=time == 2, plain=plain, random=self.generator
        )

    def _layers(self, rows: Tensor, first: int, width: int, height: int) -> tuple[_Layer, _Layer]:
        """Return the sprites of one slot, and the hats that they wear."""
        present = (rows[:, first] >= 0).nonzero()[:, 0]
        values = rows[present, first : first + SLOT_WIDTH].float()
        sprite, colour, hat = values[:, 0].long(), values[:, 4].long(), values[:, 5].long()
        layer = _Layer(present, sprite, values[:, 1], values[:, 2], values[:, 3], colour)
        worn = (hat >= 0).nonzero()[:, 0]
        across, down = min(width, height) / width, min(width, height) / height
        placing = self.hat_table[sprite[worn], hat[worn] - self.first_hat] * layer.size[worn, None]
        hats = _Layer(
            present[worn],
            hat[worn],
            layer.x[worn] + placing[:, 1] * across,
            layer.foot[worn] + placing[:, 2] * down,
            placing[:, 0],
            torch.full_like(worn, -1),
        )
        return layer, hats

    first_hat = next(number for number, sprite in enumerate(OBJECTS) if sprite.hat)

    def _stamp(self, image: Tensor, layer: _Layer, rows: Tensor, mask: Tensor | None, shadow: bool) -> None:
        """Draw a layer onto the image, and its opacity and touched pixels into `mask`, `2 B H W`."""
        height, width = image.shape[-2:]
        shorter = min(height, width)
        level = torch.log2(CELL / (layer.size * shorter)).round().clamp(0, LEVELS - 1)
        for number, atlas in enumerate(self.levels):
            part = layer.take(level == number)
            if not len(part.rows):
                continue
            where = part.rows.to(self.device)
            drawn = self._sprites(atlas, part, width, height)
            recoloured = (part.colour >= 0).nonzero()[:, 0]
            if len(recoloured):
                chosen = recoloured.to(self.device)
                drawn[chosen] = self._recolour(drawn[chosen], part.colour[recoloured].to(self.device))
            alpha = drawn[:, 3:]
            shade = self._shadow(part, width, height) if shadow else torch.zeros_like(alpha)
            light = _light(rows[part.rows, 1]).to(self.device)
            image[where] = drawn[:, :3] * light + image[where] * (1 - shade) * (1 - alpha)
            if mask is not None:
                mask[0, where] = torch.maximum(mask[0, where], alpha[:, 0])
                mask[1, where] = torch.maximum(mask[1, where], torch.maximum(alpha, shade)[:, 0])

    def _sprites(self, atlas: Tensor, part: _Layer, width: int, height: int) -> Tensor:
        """Draw sprites on empty images of the full size, premultiplied RGBA `B 4 H W`."""
        shorter = min(width, height)
        box = self.boxes[part.sprite]
        size_x, size_y = part.size * shorter / width, part.size * shorter / height
        centre_x = part.x - ((box[:, 0] + box[:, 2]) / 2 - 0.5) * size_x
        centre_y = part.foot - (box[:, 3] - 0.5) * size_y
        theta = torch.zeros(len(part.rows), 2, 3)
        theta[:, 0, 0], theta[:, 0, 2] = 1 / size_x, (1 - 2 * centre_x) / size_x
        theta[:, 1, 1], theta[:, 1, 2] = 1 / size_y, (1 - 2 * centre_y) / size_y
        images = atlas[part.sprite.to(self.device)]
        grid = F.affine_grid(theta.to(self.device), [len(theta), 4, height, width], align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    def _shadow(self, part: _Layer, width: int, height: int) -> Tensor:
        """Draw a soft ellipse under each sprite that stands on the ground, `B 1 H W`."""
        box = self.boxes[part.sprite]
        half = ((box[:, 2] - box[:, 0]) * part.size / 2).view(-1, 1, 1, 1).to(self.device)
        u = (torch.arange(width, device=self.device) + 0.5) / width
        v = (torch.arange(height, device=self.device) + 0.5) / height
        shorter = min(width, height)
        across = (u.view(1, 1, 1, -1) - part.x.view(-1, 1, 1, 1).to(self.device)) * width / shorter
        down = (v.view(1, 1, -1, 1) - part.foot.view(-1, 1, 1, 1).to(self.device) + 0.008) * height / shorter
        distance = (across / (0.95 * half)) ** 2 + (down / (0.16 * half)) ** 2
        strength = 0.36 * (~self.floating[part.sprite]).float().view(-1, 1, 1, 1).to(self.device)
        return ((1.25 - distance) * 1.2).clamp(0, 1) * strength

    def _recolour(self, drawn: Tensor, colour: Tensor) -> Tensor:
        """Recolour premultiplied sprites. Dark parts (eyes, wheels) and nearly white ones stay."""
        alpha = drawn[:, 3:]
        rgb = drawn[:, :3] / alpha.clamp(min=1e-3)
        brightest, darkest = rgb.amax(1, keepdim=True), rgb.amin(1, keepdim=True)
        # The minimum is there so that grey fur is coloured too.
        strength = ((brightest - darkest) / brightest.clamp(min=1e-3) * 1.3).clamp(0.55, 1)
        value = brightest * (1 - 0.35 * (darkest > 0.85).float())
        target = self.palette[colour].view(-1, 3, 1, 1)
        new = value.clamp(min=0.12) ** 0.8 * (1 - strength + strength * target * 1.05)
        new = torch.where(brightest < 0.25, rgb, new.clamp(0, 1))
        return torch.cat((new * alpha, alpha), dim=1)


def _light(times: Tensor) -> Tensor:
    """Look up the light on things at each row's time of day, `B 3 1 1`."""
    table = torch.tensor([(1.0, 1.0, 1.0), NIGHT_LIGHT, SUNSET_LIGHT])
    return table[times.long()].view(-1, 3, 1, 1)


def _hat_table() -> Tensor:
    """Tabulate size, x offset and foot offset of each hat on each wearer of size 1, `S hats 3`."""
    hats = [number for number, sprite in enumerate(OBJECTS) if sprite.hat]
    table = torch.zeros(len(SPRITES), len(hats), 3)
    for number, sprite in enumerate(OBJECTS):
        if sprite.head:
            table[number] = torch.tensor([hat_placement(number, hat, 1.0) for hat in hats])
    return table
