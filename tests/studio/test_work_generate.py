from dataclasses import replace

from helpers.studio import assert_same_image, finish, run_demo

from flux.studio.forms import generate_settings
from flux.studio.sessions import read_back
from flux.studio.work.generate import run_generate


def test_demo_0_repeats_a_run(studio, tmp_path, photo):
    form = {"prompt": "a dog", "seed": 3, "count": 2, "strength": 0.5}
    settings = generate_settings(studio, form)
    made = finish(run_generate(studio, studio.sessions.of("a"), settings, photo))
    out = run_demo("demo_0_test", made.record, tmp_path / "again")
    for name in ("000", "001"):
        assert_same_image(made.images[name], out / f"{name}.png")
    settings, about = read_back(made.images["001"])
    assert (about["prompt"], about["seed"]) == ("a dog", 4)
    assert settings.strength == 0.5


def test_images_are_reported_where_a_licence_asks_for_it(studio, monkeypatch):
    counted = []
    monkeypatch.setattr("flux.studio.state.track_usage_via_api", lambda name, n: counted.append((name, n)))
    settings = generate_settings(studio, {"prompt": "a dog", "count": 2, "num_steps": 1})
    for track_usage, expected in ((False, []), (True, [("flux-nano", 1)] * 2)):
        tracking = replace(studio, track_usage=track_usage)
        finish(run_generate(tracking, studio.sessions.of("a"), settings))
        assert counted == expected
