"""Sheets of images in rows, with captions and titles."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

from flux.images.fonts import caption_font

INK, FRAME, PAPER = "#222222", "#dddddd", "#ffffff"
MAX_SHEET_PIXELS, MAX_SHEET_SIDE = 32e6, 16000  # larger files are slow to write, and viewers refuse them
MAX_LINES = 6  # of a caption; the whole text is in the image's metadata


def grid(
    images: Sequence[Sequence[Image.Image | None]],
    captions: Sequence[Sequence[str]] | None = None,
    row_titles: Sequence[str] | None = None,
) -> Image.Image:
    """Draw a sheet of images in rows, a caption under each image and a title above each row.

    Every place has the size of the first image; images of another size are scaled to fit. All are scaled
    down if the sheet would exceed MAX_SHEET_PIXELS or MAX_SHEET_SIDE.

    Args:
        images: Rows of any length. None leaves a place empty.
        captions: Texts in the shape of `images`. They wrap to the width of an image and end in "…" after
            MAX_LINES lines.
        row_titles: A title for each row. They wrap to the width of the sheet.

    Raises:
        ValueError: There is no image at all.
    """
    return Sheet.measure(images, captions, row_titles).draw()


@dataclass(frozen=True, eq=False)
class SheetRow:
    """One row of a sheet: its images, with title and captions broken into lines."""

    images: Sequence[Image.Image | None]
    title: list[str]
    captions: list[list[str]]


@dataclass(frozen=True, eq=False)
class Sheet:
    """The layout of a sheet. Lengths are in pixels.

    Attributes:
        rows: The rows, from top to bottom.
        columns: Number of places in the longest row.
        width: Width of each image.
        height: Height of each image.
        gap: Space between images, and around all. It is the size of the text, too.
        regular: The font of captions.
        bold: The font of titles.
    """

    rows: list[SheetRow]
    columns: int
    width: int
    height: int
    gap: int
    regular: ImageFont.FreeTypeFont
    bold: ImageFont.FreeTypeFont

    @classmethod
    def measure(
        cls,
        images: Sequence[Sequence[Image.Image | None]],
        captions: Sequence[Sequence[str]] | None = None,
        row_titles: Sequence[str] | None = None,
    ) -> "Sheet":
        """Choose the size of the images and of the text, and break the texts into lines.

        The arguments and errors are those of `grid`.
        """
        first = next((image for row in images for image in row if image is not None), None)
        if first is None:
            raise ValueError("a grid needs at least one image")
        columns = max(len(row) for row in images)
        across, down = columns * first.width, len(images) * first.height
        shrink = min(1, math.sqrt(MAX_SHEET_PIXELS / (across * down)), MAX_SHEET_SIDE / max(across, down))
        width, height = max(1, round(first.width * shrink)), max(1, round(first.height * shrink))
        gap = max(12, round(width / 22))
        whole_width = columns * (width + gap) - gap
        letters = "".join([*(row_titles or []), *(text for row in captions or [] for text in row)])
        regular, bold = caption_font(gap, False, letters), caption_font(gap, True, letters)
        rows = [
            SheetRow(
                row, wrap_text(title, bold, whole_width), [wrap_text(text, regular, width) for text in texts]
            )
            for row, title, texts in zip(
                images, row_titles or [""] * len(images), captions or [[]] * len(images)
            )
        ]
        return cls(rows, columns, width, height, gap, regular, bold)

    @property
    def line(self) -> int:
        """The height of a line of text."""
        return round(1.35 * self.gap)

    def above(self, row: SheetRow) -> int:
        """Return the height of a row's title."""
        return self._text_height(len(row.title))

    def below(self, row: SheetRow) -> int:
        """Return the height of a row's longest caption."""
        return self._text_height(max(map(len, row.captions), default=0))

    def _text_height(self, lines: int) -> int:
        return lines * self.line + self.gap // 2 if lines else 0

    def draw(self) -> Image.Image:
        """Draw the sheet."""
        gap = self.gap
        heights = [self.above(row) + self.height + self.below(row) + gap for row in self.rows]
        sheet = Image.new("RGB", (gap + self.columns * (self.width + gap), gap + sum(heights)), PAPER)
        top = gap
        for row, height in zip(self.rows, heights):
            self._draw_row(sheet, row, top)
            top += height
        return sheet

    def _draw_row(self, sheet: Image.Image, row: SheetRow, top: int) -> None:
        gap, width, height = self.gap, self.width, self.height
        draw = ImageDraw.Draw(sheet)

        def write(left: int, top: int, lines: list[str], font: ImageFont.FreeTypeFont) -> None:
            for number, line in enumerate(lines):
                draw.text((left, top + number * self.line), line, font=font, fill=INK, anchor="la")

        write(gap, top, row.title, self.bold)
        top += self.above(row)
        for column, image in enumerate(row.images):
            left = gap + column * (width + gap)
            if image is not None:
                draw.rectangle((left - 1, top - 1, left + width, top + height), outline=FRAME)
                padded = ImageOps.pad(image, (width, height), Image.Resampling.LANCZOS, PAPER)
                sheet.paste(padded, (left, top))
            if column < len(row.captions):
                write(left, top + height + gap // 2, row.captions[column], self.regular)


def wrap_text(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels, at spaces if possible, and at most MAX_LINES."""
    lines = [line for paragraph in text.splitlines() for line in _wrap_paragraph(paragraph, font, width)]
    if len(lines) <= MAX_LINES:
        return lines
    last = lines[MAX_LINES - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: MAX_LINES - 1], last + "…"]


def _wrap_paragraph(paragraph: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines, current = [], ""
    for word in paragraph.split():
        longer = f"{current} {word}" if current else word
        if font.getlength(longer) <= width:
            current = longer
            continue
        if current:
            lines.append(current)
        *pieces, current = _split_word(word, font, width)
        lines += pieces
    return [*lines, current]


def _split_word(word: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Split a word that is wider than a line into pieces that fit, at least one letter each."""
    pieces = []
    while font.getlength(word) > width and len(word) > 1:
        length = 1
        while font.getlength(word[: length + 1]) <= width:
            length += 1
        pieces.append(word[:length])
        word = word[length:]
    return [*pieces, word]
