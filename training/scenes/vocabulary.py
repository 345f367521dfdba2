"""The objects, hats, colours, places and times that a caption of flux-nano can name.

Every sprite comes from Microsoft's Fluent 3D emoji (MIT, see ATLAS_LICENSE). `file` is its code point in that
set. The heads were set by hand for each animal, as x, y and width in fractions of the sprite, from top left.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sprite:
    """One image of the atlas, and what captions may do with it.

    Attributes:
        name: Its name.
        file: Its code point.
        words: The nouns that captions use.
        head: Where a hat goes: x, y and width. If None, it wears none.
        hat: Of a hat, the width relative to the head's, and how deep it sinks as a fraction of its size.
        recolourable: Whether captions may give it a colour.
        flies: Whether it hovers above the ground.
        common: Whether it is drawn more often than others.
    """

    name: str
    file: str
    words: tuple[str, ...] = ()
    head: tuple[float, float, float] | None = None
    hat: tuple[float, float] | None = None
    recolourable: bool = False
    flies: bool = False
    common: bool = False


# name | file | head x, y, width | flags: c recolourable, f flies, + common | further words
_OBJECTS = """
dog|1f415|.33,.24,.30|c+|
cat|1f408|.25,.23,.28|c+|
tiger|1f405|.27,.31,.28||
horse|1f40e|.20,.14,.22|c+|
zebra|1f993|.21,.12,.22||
cow|1f404|.27,.20,.26||
pig|1f416|.22,.37,.28|c+|
sheep|1f411|.28,.13,.26||
camel|1f42a|.22,.16,.22||
giraffe|1f992|.23,.14,.18||
elephant|1f418|.30,.24,.34|c+|
rabbit|1f407|.22,.23,.26|c+|bunny
squirrel|1f43f-fe0f|.30,.20,.26||
kangaroo|1f998|.17,.22,.20||
monkey|1f412|.30,.20,.34||
gorilla|1f98d|.18,.14,.22||
rooster|1f413|.22,.16,.22||
chick|1f425|.50,.16,.42||baby chicken
penguin|1f427|.50,.22,.36|+|
duck|1f986|.30,.10,.26||
owl|1f989|.50,.10,.46|+|
flamingo|1f9a9|.32,.08,.18||
parrot|1f99c|.35,.10,.28||
turtle|1f422|.12,.66,.20|c|
dinosaur|1f996|.20,.14,.30|c|
frog|1f438|.50,.20,.42|c|
teddy bear|1f9f8|.50,.11,.36|c|
octopus|1f419|.50,.11,.45|c|
mouse|1f401|.25,.20,.26||
hippo|1f99b|.28,.46,.30||
whale|1f433||c|
tropical fish|1f420||| fish
crab|1f980|||
butterfly|1f98b||cf|
snail|1f40c|||
snowman|26c4|||
robot|1f916|||
ghost|1f47b|||
apple|1f34e||c+|
banana|1f34c|||
pineapple|1f34d|||
strawberry|1f353|||
watermelon|1f349|||
pear|1f350|||
carrot|1f955|||
cheese|1f9c0|||
hamburger|1f354||+|burger
pizza|1f355|||
donut|1f369|||
cake|1f382|||birthday cake
ice cream|1f366|||
cup of coffee|2615|||
teapot|1fad6||c|
car|1f697||c+|
bus|1f68c||c+|
truck|1f69a||c|
fire truck|1f692|||
tractor|1f69c||c|
motorcycle|1f3cd-fe0f||c|
bicycle|1f6b2|||bike
train|1f682||c|
sailboat|26f5|||
airplane|2708-fe0f||f|plane
helicopter|1f681||cf|
rocket|1f680||cf|
ufo|1f6f8||f|flying saucer
balloon|1f388||cf+|
gift|1f381||c|
trophy|1f3c6|||
soccer ball|26bd|||
guitar|1f3b8||c|
drum|1f941||c|
camera|1f4f7|||
television|1f4fa|||tv
telephone|260e-fe0f||c|
alarm clock|23f0||c|
candle|1f56f-fe0f|||
book|1f4d5||c|
backpack|1f392||c|
umbrella|2602-fe0f||c|
chair|1fa91||c|
couch|1f6cb-fe0f||c|sofa
bell|1f514||c|
shoe|1f45f||c|
pumpkin|1f383|||
"""

# name | file | width, sink | further words
_HATS = """
top hat|1f3a9|1.15,.06|black top hat
crown|1f451|1.00,.06|golden crown
straw hat|1f452|1.45,.10|sun hat
cap|1f9e2|1.10,.10|blue cap
helmet|26d1-fe0f|1.15,.14|red helmet
bow|1f380|.90,.16|red bow
"""

# The details of backgrounds, which no caption names.
_DETAILS = """
tree 1f333, pine 1f332, palm 1f334, cactus 1f335, rock 1faa8, house 1f3e0, tent 26fa, cloud 2601-fe0f, herb
1f33f, sunflower 1f33b, tulip 1f337, mushroom 1f344, log 1fab5, shell 1f41a, coral 1fab8, bubbles 1fae7,
potted plant 1fab4, window 1fa9f, picture frame 1f5bc-fe0f, traffic light 1f6a6, stop sign 1f6d1, mailbox
1f4eb, barrel 1f6e2-fe0f, ringed planet 1fa90, comet 2604-fe0f, satellite 1f6f0-fe0f, castle 1f3f0, christmas
tree 1f384, bucket 1faa3, tower 1f5fc, church 26ea, anchor 2693, ship 1f6a2, door 1f6aa, lantern 1f3ee, fuel
pump 26fd, barrier 1f6a7, jar 1fad9, light bulb 1f4a1, snowy peak 1f5fb, volcano 1f30b, island 1f3dd-fe0f, ice
cube 1f9ca, star 1f31f, masks 1f3ad, microphone 1f399-fe0f, piano 1f3b9, circus tent 1f3aa, disco ball 1faa9
"""


def _read_head(text: str) -> tuple[float, float, float] | None:
    if not text:
        return None
    x, y, width = map(float, text.split(","))
    return x, y, width


def _read_objects() -> list[Sprite]:
    sprites = []
    for line in _OBJECTS.strip().splitlines():
        name, file, head, flags, more = (part.strip() for part in line.split("|"))
        words = (name, more) if more else (name,)
        sprites.append(
            Sprite(name, file, words, _read_head(head), None, "c" in flags, "f" in flags, common="+" in flags)
        )
    for line in _HATS.strip().splitlines():
        name, file, fit, more = line.split("|")
        width, sink = map(float, fit.split(","))
        sprites.append(Sprite(name, file, (name, more), hat=(width, sink)))
    return sprites


OBJECTS: list[Sprite] = _read_objects()
DETAILS: list[Sprite] = [
    Sprite(name, file)
    for name, file in (
        entry.strip().rsplit(" ", 1) for entry in _DETAILS.replace("\n", " ").strip().split(",")
    )
]
SPRITES: list[Sprite] = OBJECTS + DETAILS
INDEX: dict[str, int] = {sprite.name: number for number, sprite in enumerate(SPRITES)}
HATS: list[str] = [sprite.name for sprite in OBJECTS if sprite.hat]
ANIMALS: list[str] = [sprite.name for sprite in OBJECTS if sprite.head]

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.16, 0.17),
    "orange": (1.00, 0.55, 0.12),
    "yellow": (1.00, 0.85, 0.16),
    "green": (0.20, 0.70, 0.27),
    "blue": (0.14, 0.42, 0.95),
    "purple": (0.56, 0.27, 0.80),
    "pink": (1.00, 0.55, 0.75),
    "brown": (0.52, 0.32, 0.17),
    "black": (0.15, 0.15, 0.17),
    "white": (0.97, 0.97, 0.97),
    "gray": (0.56, 0.57, 0.60),
}
COLOUR_NAMES: list[str] = list(COLOURS)
SIZES: dict[str, tuple[str, ...]] = {"small": ("small", "tiny"), "big": ("big", "large")}
NUMBERS: dict[int, str] = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class Place:
    """A background.

    Attributes:
        name: Its name.
        phrases: How captions say it.
        outdoors: Whether day and night differ there.
        details: The sprites that stand in it.
        weight: How often it is drawn.
    """

    name: str
    phrases: tuple[str, ...]
    outdoors: bool
    details: tuple[str, ...]
    weight: float


def _place(name: str, phrases: str, outdoors: bool, details: str, weight: float) -> Place:
    split = tuple(detail.strip() for detail in details.split(",")) if details else ()
    return Place(name, tuple(phrase.strip() for phrase in phrases.split("/")), outdoors, split, weight)


PLACES: list[Place] = [
    _place("grass", "on the grass / in a green field / on a lawn / in a meadow", True,
           "tree, house, rock, tulip, cloud, mushroom, log, sunflower, church, circus tent", 3.0),
    _place("beach", "on the beach / on a sandy beach / by the sea", True,
           "palm, shell, ship, bucket, anchor, island, rock, cloud, tower", 2.4),
    _place("snow", "in the snow / on a snowy field / on snow", True,
           "pine, christmas tree, house, rock, ice cube, log, snowy peak, church, cloud, lantern", 2.4),
    _place("desert", "in the desert / on desert sand / among sand dunes", True,
           "cactus, rock, tent, palm, barrel, volcano, castle, cloud, log, tower", 1.7),
    _place("sea", "on the water / in the sea / on the ocean", True,
           "ship, island, cloud, tower, anchor, barrel, snowy peak, palm, castle, rock", 1.3),
    _place("forest", "in the forest / in the woods / among trees", True,
           "pine, mushroom, log, herb, rock, tent, tree, tulip, lantern, house", 1.7),
    _place("street", "on the street / on a road / on a city street", True,
           "traffic light, stop sign, mailbox, tree, fuel pump, barrier, tower, church, house, lantern", 2.0),
    _place("mountains", "in the mountains / in front of mountains", True,
           "pine, rock, tent, house, log, cloud, herb, castle, tree, sunflower", 1.4),
    _place("garden", "in a garden / in a flower field / among flowers", True,
           "sunflower, tulip, herb, tree, bucket, mushroom, house, potted plant, cloud, lantern", 1.4),
    _place("table", "on a wooden table / on a table / on a wooden desk", False,
           "potted plant, window, picture frame, jar, light bulb, tulip, lantern", 2.2),
    _place("brick wall", "in front of a brick wall / by a brick wall", False,
           "window, door, mailbox, barrel, potted plant, traffic light, bucket, barrier, lantern", 1.5),
    _place("room", "in a room / on a carpet in a room / on a red carpet", False,
           "window, door, picture frame, potted plant, christmas tree, jar, lantern", 1.5),
    _place("moon", "on the moon / in space", False,
           "ringed planet, comet, satellite, rock, star, volcano, barrel, tower, tent, ice cube", 1.3),
    _place("under water", "under water / underwater / deep in the ocean", False,
           "coral, shell, bubbles, anchor, rock, barrel, castle, herb, star, ship", 1.3),
    _place("stage", "on a stage / on a theater stage", False,
           "masks, microphone, piano, disco ball, potted plant, star, lantern, barrel", 1.3),
    _place("plain", "on a plain {} background / on a {} background / in front of a {} background", False,
           "", 2.0),
]  # fmt: skip
PLACE_INDEX: dict[str, int] = {place.name: number for number, place in enumerate(PLACES)}

# Most captions of scenes by day do not mention the time.
TIMES: dict[str, tuple[str, ...]] = {
    "day": ("", "", "", "", "on a sunny day", "during the day"),
    "night": ("at night", "under the stars", "on a dark night"),
    "sunset": ("at sunset", "at dusk", "in the evening light"),
}
TIME_NAMES: list[str] = list(TIMES)
STYLES: tuple[str, ...] = ("a photo of", "a picture of", "an illustration of", "a 3d render of")

_PLURALS = {
    "mouse": "mice", "sheep": "sheep", "tropical fish": "tropical fish", "fish": "fish", "snowman": "snowmen",
    "butterfly": "butterflies", "bunny": "bunnies", "strawberry": "strawberries", "trophy": "trophies",
    "cup of coffee": "cups of coffee", "bus": "buses", "octopus": "octopuses", "couch": "couches",
}  # fmt: skip


def plural(noun: str) -> str:
    """Form the plural that captions use: "bus" -> "buses", "cup of coffee" -> "cups of coffee"."""
    return _PLURALS.get(noun, noun + "s")


def with_article(phrase: str) -> str:
    """Put "a" or "an" before a phrase, by its sound: "an owl", "a ufo"."""
    return ("an " if phrase[0] in "aeiou" and not phrase.startswith("ufo") else "a ") + phrase


def all_words() -> list[str]:
    """List every word that a caption can hold, sorted."""
    phrases = [word for sprite in OBJECTS for noun in sprite.words for word in (noun, plural(noun))]
    phrases += [phrase.replace("{}", "") for place in PLACES for phrase in place.phrases]
    phrases += [phrase for times in TIMES.values() for phrase in times]
    phrases += [*STYLES, *COLOURS, *NUMBERS.values(), *(word for words in SIZES.values() for word in words)]
    phrases += [
        "there is there are and an a next to beside with on top of standing sitting on its head wearing in"
    ]
    phrases += ["to the left of on the left of to the right of on the right of"]
    return sorted({word for phrase in phrases for word in phrase.split()})
