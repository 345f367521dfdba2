"""The steps of an image as a film, and demo 1, which writes it."""

from pathlib import Path

import pytest
from helpers.attention import DOG, settings
from PIL import Image

from flux.attention.film import Film
from flux.attention.watch import watch

ROOT = Path(__file__).parents[2]


def test_a_film_holds_every_step(nano, tmp_path):
    """Noisy and predicted clean images of each step, the final one last; sheets by name."""
    chosen = settings(at_steps=(0, 3), words=("dog",))
    steps, attention = watch(nano, DOG, 7, chosen, progress=False)
    [final] = nano.decode(steps[-1].latent, 96, 64)
    decoded = []
    film = Film.of(nano, DOG, steps, attention, final, lambda: decoded.append(None))
    assert len(film.noisy) == len(film.clean) == len(decoded) == 4
    assert film.levels == [step.t for step in steps]
    assert film.clean[1] == nano.decode(steps[1].clean, 96, 64)[0]
    assert film.noisy[0] == nano.decode(steps[0].noisy, 96, 64)[0]
    film.save(tmp_path / "film.webp")
    with Image.open(tmp_path / "film.webp") as animation:
        assert animation.n_frames == 4, "the last two are equal, and one frame"
    assert [name for name, _ in film.sheets()] == ["steps", "layers", "words"]


def test_a_film_without_attention_or_words(nano):
    steps, attention = watch(nano, "", 7, settings(prompt="", num_steps=1, at_steps=()), progress=False)
    [final] = nano.decode(steps[-1].latent, 96, 64)
    assert [name for name, _ in Film.of(nano, "", steps, attention, final).sheets()] == ["steps", "layers"]
    assert [name for name, _ in Film.of(nano, DOG, steps, [], final).sheets()] == ["steps"]


def test_long_films_take_several_rows_of_the_sheet(nano):
    """Seven steps a row, noisy above clean, and the final image at the end of both."""
    image = Image.new("RGB", (32, 32))
    film = Film(DOG, [0.5] * 9, [image] * 9, [image] * 9, image, [], 5)
    [(_, sheet)] = film.sheets()
    one_row = Film(DOG, [0.5] * 6, [image] * 6, [image] * 6, image, [], 5)
    [(_, small)] = one_row.sheets()
    assert sheet.width == small.width
    assert sheet.height > 1.5 * small.height


# ---- the demo


def demo(monkeypatch, *names, **fields):
    monkeypatch.syspath_prepend(ROOT)
    import demo_1_layer

    demo_1_layer.main(*names, **fields)


@pytest.fixture
def file(tmp_path):
    """A file of the demo for a picture made at once."""
    path = tmp_path / "layer.json"
    path.write_text(
        '{"prompt": "a dog on the grass", "seed": 7, "width": 64, "height": 64, "num_steps": 2, '
        f'"layers": [3, 12], "words": ["dog"], "output_dir": "{tmp_path / "out"}"}}'
    )
    return str(path)


def test_demo_writes_both_sheets(monkeypatch, nano, file, tmp_path):
    monkeypatch.setattr("flux.loaded_model.LoadedModel.load", lambda *_: nano)
    demo(monkeypatch, file)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"layers.png", "words.png", "steps.png", "steps.gif", "run.json"} <= names
    assert Image.open(tmp_path / "out" / "layers.png").info["flux"]

    demo(monkeypatch, file, layers=[], output_dir=str(tmp_path / "plain"))
    assert not {"layers.png", "words.png"} & {path.name for path in (tmp_path / "plain").iterdir()}


def test_demo_tells_a_wrong_word_before_loading(monkeypatch, file, capsys):
    monkeypatch.setattr("flux.loaded_model.LoadedModel.load", lambda *_: pytest.fail("loaded a model"))
    with pytest.raises(SystemExit) as end:
        demo(monkeypatch, file, words=["cat"])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: Got the word 'cat'")
