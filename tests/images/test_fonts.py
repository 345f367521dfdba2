"""The font of captions has the letters of their texts."""

from pathlib import Path

import matplotlib
import pytest
from fontTools import ttLib
from PIL import Image

from flux.images import fonts
from flux.images.fonts import caption_font, font_file
from flux.images.sheets import Sheet

FOLDER = Path(matplotlib.get_data_path(), "fonts", "ttf")
SERIF, STIX = FOLDER / "DejaVuSerif.ttf", FOLDER / "STIXGeneral.ttf"
OWN = {False: FOLDER / "DejaVuSans.ttf", True: FOLDER / "DejaVuSans-Bold.ttf"}
DOG = "🐶"
HOOKED = "\u1d81"  # a letter of STIX that DejaVu Sans lacks


@pytest.fixture
def installed(monkeypatch):
    """Sets the fonts that the machine has."""
    return lambda *files: monkeypatch.setattr(fonts, "installed_fonts", lambda: list(files))


@pytest.mark.parametrize("bold", [False, True])
def test_usual_letters_have_the_usual_font(installed, bold):
    """No other font is looked for, and what is not drawn needs none."""
    installed(None)
    assert font_file("éßøЖλő→ \n\u200d\ufe0f", bold) == OWN[bold]
    assert caption_font(13, bold).getname()[0] == "DejaVu Sans"


def test_other_letters_have_an_installed_font(installed, tmp_path, capsys):
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    installed(tmp_path / "broken.ttf", SERIF, STIX)
    assert font_file("a dog " + HOOKED) == STIX
    assert caption_font(13, letters=HOOKED).getmask(HOOKED).getbbox()
    assert capsys.readouterr().err == ""


def test_a_font_that_draws_nothing_is_not_chosen(installed, tmp_path, capsys):
    """Fonts of coloured emoji may have such outlines: a caption would have gaps that nobody was told of."""
    font = ttLib.TTFont(SERIF)
    for table in font["cmap"].tables:
        if table.format == 12:  # of characters beyond 16 bits
            table.cmap[ord(DOG)] = "space"
    font.save(tmp_path / "blank.ttf")
    installed(tmp_path / "blank.ttf")
    assert font_file("a " + DOG) == OWN[False]
    assert capsys.readouterr().err == f"no installed font has {DOG}: captions show boxes in their place\n"


def test_letters_of_no_font_are_named_once(installed, capsys):
    installed(SERIF)
    for text in ("草地", "草地上", "草地"):
        assert font_file(text) == OWN[False]
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "no installed font has 地草",
        "no installed font has 上地草",
    ]


def test_a_sheet_has_one_font_for_all_captions(installed):
    """Chosen by all of its texts, so that a sheet's captions look alike."""
    installed(SERIF, STIX)
    images = [[Image.new("RGB", (64, 64))] * 2]
    sheet = Sheet.measure(images, [["a dog", HOOKED]], ["a title"])
    assert sheet.regular.getname() == ("STIXGeneral", "Regular")
    assert Sheet.measure(images, [["a dog", "a cat"]], ["a title"]).regular.getname()[0] == "DejaVu Sans"
