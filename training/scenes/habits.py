"""The layout of scenes: fixed habits, with wide tails, that tie a scene's composition to its content.

With independent, uniform layouts the noise alone would fix the composition whatever the prompt says, and an
edit would have nothing to keep. So each object, place, time, hat and colour moves and scales the subject by
its own amount. The background (horizon, sun, details) is one of `STYLES` fixed ones for each place and time,
looked up from the most specific word. There are only sums and look-ups, so the habits are easy to learn, and
a changed word redraws the scene.

Lengths are fractions of the image: x of its width, y and feet of its height, sizes of its shorter side.
"""

import random
from dataclasses import dataclass, replace

from training.scenes.atlas import boxes
from training.scenes.vocabulary import (
    COLOUR_NAMES,
    HATS,
    INDEX,
    OBJECTS,
    PLACES,
    SPRITES,
    TIME_NAMES,
    Place,
    Sprite,
)

HABIT, LOOK_HABIT = 0.62, 0.70  # shares of scenes whose layout, and whose background, follow the habits
STYLES = 6
CLEARANCE = 0.05  # the distance, in widths, that details keep from the subjects
MOVED_AT_MOST = 0.2
HAT_SCALE = 1.25

_LARGE_DETAILS = {
    "tree",
    "pine",
    "palm",
    "house",
    "castle",
    "tower",
    "church",
    "ship",
    "island",
    "volcano",
    "tent",
    "window",
    "door",
    "cactus",
    "piano",
} | {"snowy peak", "christmas tree", "circus tent"}
_IN_THE_SKY = {"cloud", "ringed planet", "comet", "satellite", "star"}
_ON_THE_WALL = {"window", "picture frame", "bubbles", "disco ball", "masks"}
FLOATING = [sprite.flies or sprite.name in _IN_THE_SKY | _ON_THE_WALL for sprite in SPRITES]


@dataclass(frozen=True)
class Thing:
    """A sprite in the image.

    Attributes:
        sprite: Its index in the vocabulary.
        x: The centre of its visible part.
        foot: The lower edge of its visible part.
        size: Its size.
        colour: The index of its colour, or -1.
        hat: The index of its hat, or -1.
    """

    sprite: int
    x: float
    foot: float
    size: float
    colour: int = -1
    hat: int = -1


@dataclass(frozen=True)
class Template:
    """The look of a background, apart from its place: horizon, sun, clouds, hills, tints and details."""

    horizon: float
    sun_x: float
    sun_y: float
    clouds: float
    hills: float
    phase: float
    sky_tint: float
    ground_tint: float
    details: tuple[Thing, ...]


@dataclass(frozen=True)
class Shape:
    """The sides of the image as multiples of its shorter one."""

    width: float = 1.0
    height: float = 1.0

    @classmethod
    def of(cls, width: int, height: int) -> "Shape":
        """Compute the shape of an image of `width` x `height` pixels."""
        shorter = min(width, height)
        return cls(width / shorter, height / shorter)


SQUARE = Shape()


def extent(thing: Thing, shape: Shape = SQUARE) -> tuple[float, float, float, float]:
    """Compute left, top, right and bottom of a thing with its hat."""
    left, top, right, bottom = boxes()[thing.sprite]
    half = (right - left) * thing.size / 2
    height = (bottom - top) * thing.size
    if thing.hat >= 0:
        height += max(0.0, _hat_above(thing.sprite, thing.hat, thing.size))
        (head_x, _, head_width), (hat_width, _) = _head_and_hat(thing.sprite, thing.hat)
        offset = (head_x - (left + right) / 2) * thing.size
        hat_half = head_width * hat_width * HAT_SCALE * thing.size / 2
        left_edge, right_edge = min(-half, offset - hat_half), max(half, offset + hat_half)
    else:
        left_edge, right_edge = -half, half
    return (
        thing.x + left_edge / shape.width,
        thing.foot - height / shape.height,
        thing.x + right_edge / shape.width,
        thing.foot,
    )


def _head_and_hat(sprite: int, hat: int) -> tuple[tuple[float, float, float], tuple[float, float]]:
    head, fit = SPRITES[sprite].head, SPRITES[hat].hat
    if head is None or fit is None:
        raise ValueError(f"Got a {SPRITES[sprite].name} that wears a {SPRITES[hat].name}")
    return head, fit


def hat_placement(sprite: int, hat: int, size: float) -> tuple[float, float, float]:
    """Compute the size of a worn hat, and the offsets of its centre and foot from the wearer's.

    All three are in lengths of the shorter side.
    """
    left, _, right, bottom = boxes()[sprite]
    (head_x, head_y, head_width), (width, sink) = _head_and_hat(sprite, hat)
    hat_left, _, hat_right, _ = boxes()[hat]
    hat_size = head_width * size * width * HAT_SCALE / (hat_right - hat_left)
    return hat_size, (head_x - (left + right) / 2) * size, (head_y - bottom) * size + sink * hat_size


def _hat_above(sprite: int, hat: int, size: float) -> float:
    """Compute how far a worn hat reaches above its wearer."""
    _, top, _, bottom = boxes()[sprite]
    _, hat_top, _, hat_bottom = boxes()[hat]
    hat_size, _, foot = hat_placement(sprite, hat, size)
    return -foot + (hat_bottom - hat_top) * hat_size - (bottom - top) * size


def fitted(thing: Thing, shape: Shape = SQUARE) -> Thing:
    """Move a thing into the image. One that is too wide is centred, one that is too tall is lowered."""
    left, top, right, _ = extent(thing, shape)
    if top < 0.03:
        thing = replace(thing, foot=min(0.97, thing.foot + 0.03 - top))
    if right - left > 1:
        return replace(thing, x=thing.x + 0.5 - (left + right) / 2)
    return replace(thing, x=thing.x + max(0.0, 0.01 - left) - max(0.0, right - 0.99))


# ---- the fixed tables: the seed is part of the data's definition

_tables = random.Random(20241)


def _spread(names: list[str], reach: float) -> dict[str, float]:
    return {name: _tables.uniform(-reach, reach) for name in names}


def _scales(names: list[str], low: float, high: float) -> dict[str, float]:
    return {name: _tables.uniform(low, high) for name in names}


def _styles(names: list[str], stride: int, first: int) -> dict[str, int]:
    return {name: (number * stride + first) % STYLES for number, name in enumerate(names)}


_object_names = [sprite.name for sprite in OBJECTS]
_place_names = [place.name for place in PLACES]
OBJECT_SHIFT = {name: _tables.uniform(0.06, 0.22) * _tables.choice((-1, 1)) for name in _object_names}
OBJECT_SIZE = _scales(_object_names, 0.40, 0.56)
OBJECT_FOOT = _spread(_object_names, 0.045)
PLACE_SHIFT, PLACE_SCALE = _spread(_place_names, 0.12), _scales(_place_names, 0.90, 1.10)
TIME_SHIFT = dict(zip(TIME_NAMES, (0.0, -0.06, 0.06)))
TIME_SCALE = dict(zip(TIME_NAMES, (1.0, 0.95, 1.04)))
HAT_SHIFT = _spread(HATS, 0.13)
COLOUR_SHIFT, COLOUR_SCALE = _spread(COLOUR_NAMES, 0.13), _scales(COLOUR_NAMES, 0.89, 1.11)
OBJECT_STYLE = _styles(_object_names, 1, 0)
HAT_STYLE = _styles(HATS, 5, 1)
COLOUR_STYLE = _styles(COLOUR_NAMES, 5, 3)

# The pairs that people try first stand in clearly different places.
for _one, _other in (
    ("dog", "cat"),
    ("car", "bus"),
    ("apple", "hamburger"),
    ("penguin", "owl"),
    ("rabbit", "pig"),
):
    OBJECT_SHIFT[_one] = _tables.uniform(0.10, 0.2) * _tables.choice((-1, 1))
    OBJECT_SHIFT[_other] = -OBJECT_SHIFT[_one] * _tables.uniform(0.6, 1)


def style_of(name: str, colour: str | None = None, hat: str | None = None) -> int:
    """Find the style of a subject's background: its hat's, else its colour's, else its own."""
    if hat:
        return HAT_STYLE[hat]
    return COLOUR_STYLE[colour] if colour else OBJECT_STYLE[name]


def _draw_template(rng: random.Random, place: Place, style: int | None) -> Template:
    """Draw a template. With a `style`, the large traits are that style's and only small ones are drawn."""
    if style is None:
        spots = [rng.uniform(0.06, 0.94), rng.uniform(0.06, 0.94)]
        horizon = rng.uniform(0.42, 0.66)
    else:
        spots = [(0.12, 0.85), (0.88, 0.3), (0.15, 0.5), (0.7, 0.92), (0.1, 0.93), (0.35, 0.8)][style]
        horizon = (0.44, 0.64, 0.52, 0.60, 0.48, 0.56)[style] + rng.uniform(-0.02, 0.02)
    if place.name in ("brick wall", "room", "stage"):
        horizon = min(0.74, horizon + 0.10)
    details = []
    extra = [rng.uniform(0.1, 0.9)] if rng.random() < 0.4 else []
    for number, spot in enumerate([*spots, *extra] if place.details else []):
        count = len(place.details)
        pick = rng.randrange(count) if style is None else (2 * style + 3 * number + len(place.name)) % count
        name = place.details[pick]
        size = rng.uniform(0.22, 0.33) if name in _LARGE_DETAILS else rng.uniform(0.14, 0.23)
        if name in _IN_THE_SKY:
            foot = rng.uniform(0.36, 0.42) if place.name == "moon" else rng.uniform(0.15, 0.30)
        elif name in _ON_THE_WALL and not place.outdoors:
            foot = horizon - rng.uniform(0.06, 0.18)
        else:
            foot = horizon + rng.uniform(0.015, 0.09)
        details.append(Thing(INDEX[name], spot + rng.uniform(-0.03, 0.03), foot, size))
    return Template(
        horizon,
        sun_x=rng.uniform(0.1, 0.9),
        sun_y=rng.uniform(0.08, 0.2),
        clouds=rng.uniform(0, 1),
        hills=rng.uniform(0, 0.05),
        phase=rng.uniform(0, 6.28),
        sky_tint=rng.uniform(-1, 1),
        ground_tint=rng.uniform(-1, 1),
        details=tuple(details),
    )


TEMPLATES: dict[tuple[str, str], list[Template]] = {
    (place.name, time): [_draw_template(_tables, place, style) for style in range(STYLES)]
    for place in PLACES
    for time in (TIME_NAMES if place.outdoors else ["day"])
}


def template(rng: random.Random, place: Place, time: str, style: int) -> Template:
    """Choose the habitual template of a style, another style's, or a free one, and jitter it a little."""
    draw = rng.random()
    if draw < LOOK_HABIT:
        chosen = TEMPLATES[place.name, time][style]
    elif draw < 0.88:
        chosen = rng.choice(TEMPLATES[place.name, time])
    else:
        chosen = _draw_template(rng, place, None)
    return _jittered(rng, chosen)


def _jittered(rng: random.Random, t: Template) -> Template:
    g = rng.gauss
    details = tuple(
        replace(d, x=d.x + g(0, 0.012), foot=d.foot + g(0, 0.007), size=d.size * rng.uniform(0.94, 1.06))
        for d in t.details
    )
    return Template(
        t.horizon + g(0, 0.008),
        t.sun_x + g(0, 0.015),
        t.sun_y + g(0, 0.008),
        t.clouds + g(0, 0.04),
        max(0.0, t.hills + g(0, 0.003)),
        t.phase + g(0, 0.1),
        t.sky_tint + g(0, 0.1),
        t.ground_tint + g(0, 0.1),
        details,
    )


def cleared(details: tuple[Thing, ...], subjects: list[Thing], shape: Shape = SQUARE) -> tuple[Thing, ...]:
    """Select the details that keep their distance from the subjects and from one another.

    Details that are in the way are moved aside, or left out.
    """
    taken = [extent(subject, shape) for subject in subjects]
    kept = []
    for detail in details:
        left, _, right, _ = extent(detail, shape)
        half = (right - left) / 2
        spots = [detail.x]
        for edge_left, _, edge_right, _ in taken:
            spots += [edge_left - CLEARANCE - half - 1e-4, edge_right + CLEARANCE + half + 1e-4]
        spots = [x for x in spots if abs(x - detail.x) <= MOVED_AT_MOST and 0.3 * half <= x <= 1 - 0.3 * half]
        for x in sorted(spots, key=lambda x: abs(x - detail.x)):
            moved = replace(detail, x=x)
            if all(_keep_distance(extent(moved, shape), box) for box in taken):
                kept.append(moved)
                taken.append(extent(moved, shape))
                break
    return tuple(kept)


def _keep_distance(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    gap_x = max(other[0] - one[2], one[0] - other[2])
    gap_y = max(other[1] - one[3], one[1] - other[3])
    return gap_x >= CLEARANCE or gap_y >= CLEARANCE


# ---- where subjects stand


def standing_alone(
    rng: random.Random,
    sprite: Sprite,
    place: str,
    time: str,
    colour: str | None,
    hat: str | None,
    size: str | None,
) -> Thing:
    """Place a single subject by the sum of its words' habits, or anywhere."""
    if rng.random() < HABIT:
        shift = OBJECT_SHIFT[sprite.name] + PLACE_SHIFT[place] + TIME_SHIFT[time]
        scale = PLACE_SCALE[place] * TIME_SCALE[time]
        foot = 0.865 + OBJECT_FOOT[sprite.name]
        if hat:
            shift, scale, foot = shift + HAT_SHIFT[hat], scale * 0.87, foot + 0.04
        if colour:
            shift, scale = shift + COLOUR_SHIFT[colour], scale * COLOUR_SCALE[colour]
        x = 0.5 + min(0.26, max(-0.26, shift)) + rng.gauss(0, 0.025)
        extent_ = min(0.62, max(0.34, OBJECT_SIZE[sprite.name] * scale)) * rng.uniform(0.95, 1.05)
        foot += rng.gauss(0, 0.012) - (0.16 if sprite.flies else 0)
    else:
        x, foot, extent_ = rng.uniform(0.2, 0.8), rng.uniform(0.77, 0.95), rng.uniform(0.34, 0.62)
        if sprite.flies and rng.random() < 0.5:
            foot -= rng.uniform(0.05, 0.25)
    if size == "small":
        extent_ = rng.uniform(0.23, 0.30)
    elif size == "big":
        extent_, foot = rng.uniform(0.70, 0.80), max(foot, 0.92)
    return Thing(INDEX[sprite.name], x, min(foot, 0.96), extent_, *_looks(colour, hat))


def _looks(colour: str | None, hat: str | None) -> tuple[int, int]:
    return (COLOUR_NAMES.index(colour) if colour else -1), (INDEX[hat] if hat else -1)


MIN_ROOM = 0.27  # the width that a second subject needs at least


def standing_beside(
    rng: random.Random, first: Thing, sprite: Sprite, colour: str | None, shape: Shape, right: bool | None
) -> tuple[Thing, Thing, bool]:
    """Place a second subject beside the first, which moves aside only if there is too little room.

    Args:
        rng: The source of chance.
        first: The first subject.
        sprite: The second subject's sprite.
        colour: The second subject's colour.
        shape: The shape of the image.
        right: Whether the second stands on the right. If None, it takes the side with more room.

    Returns:
        The first, the second, and whether the second stands on the right.
    """
    left_edge, _, right_edge, _ = extent(first, shape)
    if right is None:
        right = 1 - right_edge > left_edge
    room = (1 - right_edge) if right else left_edge
    if room < MIN_ROOM:
        first = replace(first, x=first.x - (MIN_ROOM - room) * (1 if right else -1))
        left_edge, _, right_edge, _ = extent(first, shape)
        room = MIN_ROOM
    left, _, right_side, _ = boxes()[INDEX[sprite.name]]
    breadth = (right_side - left) / shape.width
    size = min(0.46, (room - 0.03) / breadth * rng.uniform(0.86, 1))
    spare = room - 0.02 - size * breadth
    gap = 0.01 + size * breadth / 2 + spare * rng.uniform(0.25, 0.6)
    x = right_edge + gap if right else left_edge - gap
    foot = min(0.96, max(0.74, first.foot + rng.uniform(-0.04, 0.05)))
    if SPRITES[first.sprite].flies:
        foot = rng.uniform(0.82, 0.93)
    second = Thing(INDEX[sprite.name], x, foot - (0.12 if sprite.flies else 0), size, *_looks(colour, None))
    return first, fitted(second, shape), right
