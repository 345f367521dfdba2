"""The font of captions: one that has the characters of the texts."""

import sys
import unicodedata
from functools import cache
from pathlib import Path

from PIL import ImageFont

UNSEEN = {"Cc", "Cf", "Mn", "Zl", "Zp", "Zs"}  # kinds of characters that need no glyph of their own


def caption_font(size: int, bold: bool = False, letters: str = "") -> ImageFont.FreeTypeFont:
    """Load the font that `font_file` chooses for these letters."""
    return ImageFont.truetype(font_file(letters, bold), size)


def font_file(letters: str, bold: bool = False) -> Path:
    """Return the file of a font that has these letters.

    It is one of matplotlib's, since pillow's own has no accents, no Greek and no Cyrillic. If that lacks some
    characters, such as Chinese ones, it is the installed font that has most of them. A line on stderr names
    those that it lacks too.
    """
    import matplotlib

    own = Path(
        matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    )
    needed = {letter for letter in letters if unicodedata.category(letter) not in UNSEEN}
    if needed <= _characters_of(own):
        return own
    return _best_font(frozenset(needed), own)


@cache
def _best_font(needed: frozenset[str], own: Path) -> Path:
    best, missing = own, needed - _characters_of(own)
    for file in sorted(installed_fonts()):
        lacks = needed - _characters_of(file)
        if len(lacks) < len(missing):
            lacks |= _blank(file, needed - lacks)
        if len(lacks) < len(missing):
            best, missing = file, lacks
    _tell_once(frozenset(missing))
    return best


def _blank(file: Path, letters: frozenset[str]) -> frozenset[str]:
    """Return the letters of which a font draws nothing in one colour, as some fonts of coloured emoji."""
    try:
        font = ImageFont.truetype(file, 32)
        return frozenset(letter for letter in letters if font.getmask(letter).getbbox() is None)
    except OSError:  # matplotlib reads some files that pillow does not
        return letters


@cache
def _tell_once(missing: frozenset[str]) -> None:
    if missing:
        some = "".join(sorted(missing)[:20])
        print(f"no installed font has {some}: captions show boxes in their place", file=sys.stderr)


def installed_fonts() -> list[Path]:
    """Return the files of the fonts that this machine has."""
    from matplotlib import font_manager

    return [Path(file) for file in font_manager.findSystemFonts()]


@cache
def _characters_of(file: Path) -> frozenset[str]:
    """Return the characters that a font has an outline for. A file that cannot be used has none."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(str(file))
    except (RuntimeError, OSError):
        return frozenset()
    # Fonts of bitmaps, as those of coloured emoji, have a single size.
    return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
