"""Sheets of images with captions."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

INK, FRAME, PAPER = "#222222", "#dddddd", "#ffffff"


MAX_SHEET_PIXELS, MAX_SHEET_SIDE = 32e6, 16000  # more is slow to write, and viewers refuse it


MAX_LINES = 6  # of a caption; the whole text is in the picture's metadata


def grid(
    images: Sequence[Sequence[Image.Image | None]],
    captions: Sequence[Sequence[str]] | None = None,
    row_titles: Sequence[str] | None = None,
) -> Image.Image:
    """A sheet of pictures in rows, each with its caption under it and each row with its title above.

    `images` are rows of any length, None leaves a place empty. Every place has the first picture's size, and
    pictures of another are scaled to fit in; all are scaled down for a sheet that would pass MAX_SHEET_PIXELS
    or MAX_SHEET_SIDE. `captions` has the shape of `images`. Texts wrap to the width they have and end in
    "…" after MAX_LINES lines. Raises ValueError if there is no picture at all.
    """
    pictures = [picture for row in images for picture in row if picture is not None]
    if not pictures:
        raise ValueError("a grid needs at least one picture")
    width, height = pictures[0].size
    columns = max(len(row) for row in images)
    across, down = columns * width, len(images) * height
    shrink = min(1, math.sqrt(MAX_SHEET_PIXELS / (across * down)), MAX_SHEET_SIDE / max(across, down))
    width, height = max(1, round(width * shrink)), max(1, round(height * shrink))

    size = max(12, round(width / 22))
    gap = size
    regular, bold = _font("DejaVuSans.ttf", size), _font("DejaVuSans-Bold.ttf", size)
    line = round(1.35 * size)

    titles = [_wrap(text, bold, columns * (width + gap) - gap) for text in row_titles or [""] * len(images)]
    texts = [[_wrap(text, regular, width) for text in row] for row in captions or [[]] * len(images)]
    above = [len(lines) * line + (gap // 2 if lines else 0) for lines in titles]
    below = [max((len(lines) for lines in row), default=0) * line for row in texts]
    below = [space + (gap // 2 if space else 0) for space in below]

    sheet_height = gap + sum(a + height + b + gap for a, b in zip(above, below, strict=True))
    sheet = Image.new("RGB", (gap + columns * (width + gap), sheet_height), PAPER)
    draw = ImageDraw.Draw(sheet)

    def write(x: int, y: int, lines: list[str], font: ImageFont.FreeTypeFont) -> None:
        for number, words in enumerate(lines):
            draw.text((x, y + number * line), words, font=font, fill=INK, anchor="la")

    top = gap
    for i, row in enumerate(images):
        write(gap, top, titles[i], bold)
        top += above[i]
        for j, picture in enumerate(row):
            left = gap + j * (width + gap)
            if picture is not None:
                draw.rectangle((left - 1, top - 1, left + width, top + height), outline=FRAME)
                padded = ImageOps.pad(picture, (width, height), Image.Resampling.LANCZOS, PAPER)
                sheet.paste(padded, (left, top))
            if j < len(texts[i]):
                write(left, top + height + gap // 2, texts[i][j], regular)
        top += height + below[i] + gap
    return sheet


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of matplotlib's fonts: pillow's own knows no accents, no Greek and no Cyrillic."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """`text` in lines of at most `width` pixels, broken at spaces where there are any."""
    lines = []
    for paragraph in text.splitlines():
        current = ""
        for word in paragraph.split():
            longer = f"{current} {word}" if current else word
            if font.getlength(longer) <= width:
                current = longer
                continue
            if current:
                lines.append(current)
            while font.getlength(word) > width and len(word) > 1:
                fits = 1
                while font.getlength(word[: fits + 1]) <= width:
                    fits += 1
                lines.append(word[:fits])
                word = word[fits:]
            current = word
        lines.append(current)
    if len(lines) > MAX_LINES:
        last = lines[MAX_LINES - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: MAX_LINES - 1], last + "…"]
    return lines
