from flux.studio.forms import film_settings
from flux.studio.progress import MadeImage
from flux.studio.work.film import run_film


def test_a_film_and_its_sheets(studio):
    settings = film_settings(studio, {"prompt": "a dog", "layers": {"on": [1]}})
    session = studio.sessions.of("a")
    made = [update.result for update, _ in run_film(studio, session, settings) if update.result]
    assert isinstance(made[0], MadeImage)
    [run] = session.runs
    assert made[1:] == [run.folder / "film.webp"]
    for name in ("film.webp", "steps.png", "layers.png", "words.png"):
        assert (run.folder / name).is_file()
    assert list(run.images) == ["picture"]
