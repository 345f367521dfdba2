from dataclasses import replace

import pytest

from flux.errors import InputError
from flux.settings.doses import DOSES, Dose
from flux.studio.form_values import dose_values
from flux.studio.forms import edit_settings, film_settings, generate_settings, notes_about, scan_settings

EDIT = {"prompt": "a dog", "edits": "a cat", "layers": {"on": [1]}}


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"width": 4096, "height": 4096}, "4096x4096"),
        ({"width": 512, "height": 512}, "area"),
        ({"num_steps": 10**6}, "steps"),
        ({"count": 50}, "count"),
        ({"count": 1e300}, "count"),
        ({"guidance": 1e300}, "guidance"),
        ({"true_cfg": 101.0}, "true_cfg"),
        ({"prompt": "a" * 10**5}, "100000 letters"),
        ({"num_steps": 2.5}, "integer"),
        ({"seed": -1}, "seed"),
        ({"width": float("nan")}, "width"),
    ],
)
def test_too_much_is_refused(studio, form, said):
    with pytest.raises(InputError, match=said):
        generate_settings(studio, {"prompt": "a dog", **form})


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"edits": "\n \n"}, "no edit"),
        ({"edits": "a\n" * 7}, "7 edits"),
        ({"layers": {"on": []}}, "no layer"),
        ({"layers": "<script>"}, "layers '<script>'"),
        ({"layers": {"on": [1, 15]}}, "0 to 14"),
        ({"inject_from": 0.8, "inject_until": 0.2}, "inject_from"),
        ({"dose": "huge"}, "dose"),
    ],
)
def test_edits_that_cannot_be(studio, form, said):
    with pytest.raises(InputError, match=said):
        edit_settings(studio, {**EDIT, **form})


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"prompts": " \n"}, "no prompt"),
        ({"prompts": "a\n" * 65}, "65 prompts"),
        ({"layers": []}, "no layer"),
        ({"top": 2}, "at most 1"),
    ],
)
def test_scans_that_cannot_be(studio, form, said):
    with pytest.raises(InputError, match=said):
        scan_settings(studio, {"prompts": "a dog", "layers": [1], **form})


def test_the_same_scan_has_the_same_folder(studio):
    """So that it resumes; how many layers are vital is chosen from its images afterwards."""
    form = {"prompts": "a dog", "layers": {"on": [1, 2]}}
    folder = scan_settings(studio, form).output_dir
    assert scan_settings(studio, {**form, "top": 1}).output_dir == folder
    assert scan_settings(studio, {**form, "seed": 1}).output_dir != folder


def test_films_of_words_that_the_prompt_lacks(studio):
    form = {"prompt": "a dog", "layers": {"on": [1]}}
    assert film_settings(studio, {**form, "words": "dog, a"}).words == ("dog", "a")
    with pytest.raises(InputError, match="cat"):
        film_settings(studio, {**form, "words": "cat"})


def test_a_dose_of_the_page_is_the_named_one_but_for_what_is_changed(studio):
    """The page shows its numbers; sent along untouched, they must not count as the user's."""

    def effective_dose(name: str, **own) -> Dose:
        [entry] = edit_settings(studio, {**EDIT, "dose": name, **dose_values(name), **own}).entries
        return entry.effective_dose()

    for name, dose in DOSES.items():
        assert effective_dose(name) == dose
    assert effective_dose("auto", weight=0.7) == replace(DOSES["auto"], weight=0.7)
    without_end = replace(DOSES["auto"], inject_until=0.5, hold_subject_until=None, noised_until=None)
    assert effective_dose("auto", inject_until=0.5) == without_end


def test_notes_beside_fields(studio):
    """Mistakes are noted, and fields without effect. A text that is still missing is no mistake."""
    form = {**EDIT, "edits": "", "true_cfg": 1.0}
    assert notes_about(studio, edit_settings, form) == {}
    notes = notes_about(studio, edit_settings, {**form, "seed": -1, "num_steps": 0})
    assert notes == {
        "seed": "Expected at least 0, got -1.",
        "num_steps": "Expected at least 1, got 0.",
    }
    notes = notes_about(studio, edit_settings, {**form, "negative_prompt": "snow", "paste_back": True})
    assert notes == {
        "negative_prompt": "Without effect: true_cfg is 1.",
        "paste_back": "Without effect: no photo.",
    }
    assert notes_about(studio, edit_settings, {**form, "paste_back": True, "photo": "photo.png"}) == {}
    form = {"prompt": "a dog", "strength": 0.5}
    assert notes_about(studio, generate_settings, form) == {"strength": "Without effect: no image."}


def test_sides_are_rounded_without_a_word_in_the_terminal(studio, capsys):
    notes = notes_about(studio, generate_settings, {"prompt": "a dog", "width": 100, "height": 64})
    assert notes == {"width": "Rounded down to 96, a multiple of 16."}
    assert capsys.readouterr().out == ""
