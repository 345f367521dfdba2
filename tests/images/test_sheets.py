"""Sheets of images: places, captions, sizes."""

import numpy as np
import pytest
from helpers.images import noise, same
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from flux.images import sheets
from flux.images.fonts import caption_font
from flux.images.sheets import Sheet, grid, wrap_text

LONG = (
    "a photo of a tiny red car and a Donaudampfschifffahrtsgesellschaftskapitänsmütze on the beach, at sunset"
)
COLOURS = [["red", "lime", "blue"], ["yellow", "cyan", "magenta"]]


def plain(colour: str, width: int = 128, height: int = 96) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def box(sheet: Image.Image, colour: str) -> tuple[int, int, int, int]:
    """Where a colour is: left, top, right, bottom."""
    found = np.all(np.array(sheet) == plain(colour).getpixel((0, 0)), axis=-1)
    (ys,), (xs,) = found.any(1).nonzero(), found.any(0).nonzero()
    return xs[0], ys[0], xs[-1] + 1, ys[-1] + 1


def ink(sheet: Image.Image) -> np.ndarray:
    """Where there is writing: dark and grey."""
    pixels = np.array(sheet).astype(int)
    return (pixels.max(-1) < 160) & (np.ptp(pixels, axis=-1) < 8)


def test_images_stand_in_rows_unchanged():
    sheet = grid([[plain(colour) for colour in row] for row in COLOURS])
    boxes = [[box(sheet, colour) for colour in row] for row in COLOURS]
    for row in boxes:
        for left, top, right, bottom in row:
            assert (right - left, bottom - top) == (128, 96)
            assert top == row[0][1]
        assert row[0][2] < row[1][0]
        assert row[1][2] < row[2][0] < sheet.width - 128
    assert all(upper[0] == lower[0] and upper[3] < lower[1] for upper, lower in zip(*boxes, strict=True))
    assert not ink(sheet).any()
    texture = noise(128, 96)
    sheet = grid([[plain("red"), texture]])
    left, top, right, _ = box(sheet, "red")
    gap = left
    assert same(sheet.crop((right + gap, top, right + gap + 128, top + 96)), texture)


@pytest.mark.parametrize("width", [64, 128, 512])
def test_captions_stay_under_their_image(width):
    """Wrapped to the width, clear of the neighbours and of the row below."""
    images = [[plain(colour, width, 48) for colour in row] for row in COLOURS]
    sheet = grid(images, [[LONG, "short", LONG], ["", LONG, "two\nlines"]])
    written = ink(sheet)
    boxes = [[box(sheet, colour) for colour in row] for row in COLOURS]
    for row, inked in zip(boxes, ([True, True, True], [False, True, True]), strict=True):
        end = boxes[1][0][1] if row is boxes[0] else sheet.height
        assert [written[row[0][3] : end, left:right].any() for left, _, right, _ in row] == inked
        for left, top, right, bottom in row:
            assert (right - left, bottom - top) == (width, 48)
            assert not written[top - 8 : bottom + 4, left:right].any()
    columns = written.any(0)
    for left, _, right, _ in boxes[0]:
        columns[left:right] = False
    assert not columns.any(), "a caption is wider than its image"
    assert not written[-8:].any()


def test_titles_stand_above_their_row():
    images = [[plain(colour) for colour in row] for row in COLOURS]
    captions = [[LONG] * 3] * 2
    sheet, untitled = grid(images, captions, [LONG * 3, "second"]), grid(images, captions)
    written = ink(sheet)
    left, top, _, _ = box(sheet, "red")
    right = box(sheet, "blue")[2]
    title = written[: top - 4]
    assert title.any(0).nonzero()[0].min() >= left
    assert 300 < title.any(0).nonzero()[0].max() < right
    assert (np.diff(title.any(1).astype(int)) == 1).sum() >= 3, "a long title wraps"
    assert not written[top - 4 : top].any()
    second = box(sheet, "yellow")[1] - box(sheet, "red")[1]
    assert second > box(untitled, "yellow")[1] - box(untitled, "red")[1] + 12


def test_wrapping_loses_no_word():
    font = caption_font(13)
    for width in (200, 400, 4000):
        lines = wrap_text(LONG, font, width)
        assert all(font.getlength(line) <= width for line in lines)
        assert "".join(lines).replace(" ", "") == LONG.replace(" ", "")
    assert wrap_text(LONG, font, 4000) == [LONG]
    assert wrap_text("one\n\ntwo  words ", font, 400) == ["one", "", "two words"]
    assert wrap_text("", font, 400) == []
    assert wrap_text("WWW", font, 1) == ["W", "W", "W"]


def test_overlong_captions_end_in_an_ellipsis():
    font = caption_font(13)
    lines = wrap_text("word " * 1000, font, 300)
    assert len(lines) == sheets.MAX_LINES
    assert lines[-1].endswith("word…")
    assert all(font.getlength(line) <= 300 for line in lines)


def test_accents_greek_and_cyrillic_are_drawn():
    """The font that pillow carries shows the same empty box for all of these."""
    font = caption_font(20)
    shapes = {bytes(font.getmask(letter)) for letter in "éßøЖλő→\uffff"}
    assert len(shapes) == 8
    assert isinstance(font, ImageFont.FreeTypeFont)


def test_empty_places_and_ragged_rows():
    sheet = grid([[plain("red"), None, plain("blue")], [plain("cyan")]], [["", "nothing here", ""], [""]])
    red, blue, cyan = (box(sheet, colour) for colour in ("red", "blue", "cyan"))
    assert cyan[0] == red[0]
    assert blue[0] - red[2] == 128 + 2 * red[0]
    middle = np.array(sheet)[red[1] : red[3], red[2] + 2 : blue[0] - 2]
    assert (middle == 255).all()
    assert ink(sheet)[red[3] :, red[2] : blue[0]].any()


def test_other_sizes_are_scaled_to_fit():
    sheet = grid([[plain("red"), plain("blue", 1280, 480)]])
    left, top, right, bottom = box(sheet, "blue")
    assert (right - left, bottom - top) == (128, 48)
    assert top - box(sheet, "red")[1] == 24


def test_sheets_have_a_limit(monkeypatch):
    images = [[plain(colour) for colour in row] for row in COLOURS]
    monkeypatch.setattr(sheets, "MAX_SHEET_PIXELS", 6 * 64 * 48)
    left, top, right, bottom = box(grid(images), "red")
    assert (right - left, bottom - top) == (64, 48)
    monkeypatch.setattr(sheets, "MAX_SHEET_SIDE", 3 * 32)
    left, top, right, bottom = box(grid(images), "red")
    assert (right - left, bottom - top) == (32, 24)


def test_grid_without_images():
    with pytest.raises(ValueError, match="at least one image"):
        grid([[None], []])


# ---- properties


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=60)


@given(texts, st.integers(20, 400))
def test_lines_fit_and_keep_the_letters(text, width):
    """As long as no line is cut off, wrapping loses spaces alone."""
    font = caption_font(13)
    lines = wrap_text(text, font, width)
    assert len(lines) <= sheets.MAX_LINES
    for line in lines:
        assert font.getlength(line) <= width or len(line.rstrip("…")) <= 1
    if not lines or not lines[-1].endswith("…"):
        assert "".join("".join(lines).split()) == "".join(text.split())


@settings(max_examples=40)  # each draws a whole sheet
@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=4),
    st.integers(8, 90),
    st.integers(8, 90),
    st.data(),
)
def test_a_sheet_has_room_for_every_image_and_text(shape, width, height, data):
    """Places do not overlap, and the sheet is exactly as large as its rows."""
    image = Image.new("RGB", (width, height), "red")
    rows = [[image if there else None for there in row] for row in shape]
    if not any(map(any, shape)):
        rows[0][0] = image
    captions = [data.draw(st.lists(texts, max_size=len(row))) for row in rows]
    titles = data.draw(st.lists(texts, min_size=len(rows), max_size=len(rows)))
    layout = Sheet.measure(rows, captions, titles)
    sheet = layout.draw()
    assert (layout.width, layout.height) == (width, height)
    assert layout.columns == max(map(len, rows))
    assert sheet.width == layout.columns * (width + layout.gap) + layout.gap
    heights = [layout.above(row) + height + layout.below(row) + layout.gap for row in layout.rows]
    assert sheet.height == layout.gap + sum(heights)
    red = np.all(np.array(sheet) == (255, 0, 0), axis=-1).sum()
    assert red == width * height * sum(image is not None for row in rows for image in row)
