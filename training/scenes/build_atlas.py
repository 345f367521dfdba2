"""Builds atlas.webp from the npm package of Fluent 3D emoji. Needed only to add or change sprites.

npm pack @lobehub/fluent-emoji-3d@1.1.0
python -m training.scenes.build_atlas lobehub-fluent-emoji-3d-1.1.0.tgz
"""

import io
import sys
import tarfile

from PIL import Image

from training.scenes.atlas import ATLAS_FILE, CELL, COLUMNS
from training.scenes.vocabulary import SPRITES

# The chin strap of a worn helmet would hang in front of the face. Only the part above this height is kept.
CUT_BELOW = {"helmet": 0.6}
# The dog of the set is almost as orange as the cat. In chestnut it looks different.
TINTS = {"dog": (0.72, 0.56, 0.50)}


def tinted(image: Image.Image, tint: tuple[float, float, float]) -> Image.Image:
    """Multiply the colours."""
    *colours, alpha = image.split()
    scaled = [band.point(lambda value, f=factor: int(value * f)) for band, factor in zip(colours, tint)]
    return Image.merge("RGBA", (*scaled, alpha))


def build(archive: str) -> None:
    """Write the atlas from the package's archive."""
    rows = -(-len(SPRITES) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    with tarfile.open(archive) as package:
        for number, sprite in enumerate(SPRITES):
            file = package.extractfile(f"package/assets/{sprite.file}.webp")
            assert file is not None  # no folder has such a name
            image = Image.open(io.BytesIO(file.read())).convert("RGBA")
            image = image.resize((CELL, CELL), Image.Resampling.LANCZOS)
            if sprite.name in TINTS:
                image = tinted(image, TINTS[sprite.name])
            if sprite.name in CUT_BELOW:
                top = round(CUT_BELOW[sprite.name] * CELL)
                image.paste((0, 0, 0, 0), (0, top, CELL, CELL))
            atlas.paste(image, (number % COLUMNS * CELL, number // COLUMNS * CELL))
    atlas.save(ATLAS_FILE, quality=84, alpha_quality=90, method=6)
    print(f"wrote {ATLAS_FILE}: {len(SPRITES)} sprites, {ATLAS_FILE.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    build(sys.argv[1])
