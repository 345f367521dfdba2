from typing import get_args

from flux.settings.demos import GenerateSettings
from flux.settings.doses import DoseName, InjectedParts
from flux.settings.edits import EditSettings, Inversion
from flux.specs import configs
from flux.studio.forms import edit_settings, generate_settings, scan_settings
from flux.studio.tabs import dose, edit, fill, film, generate, instruct, scan
from flux.studio.tabs.history import without_field
from flux.studio.tabs.runs import words_note
from flux.vocabulary import unknown_words


def test_words_that_a_model_does_not_know(studio):
    form = {"prompt": "a dog", "edits": "a <b>zebrra</b>", "layers": {"on": [1]}}
    note = words_note(studio, edit_settings(studio, form))
    assert "zebrra" in note
    assert "near: zebra" in note
    assert "<b>zebrra</b>" in note
    form = {"prompts": "a dog on a skyscraper", "layers": {"on": [1]}}
    assert "skyscraper" in words_note(studio, scan_settings(studio, form))
    assert words_note(studio, generate_settings(studio, {"prompt": "a dog"})) == ""


def test_the_page_offers_every_choice_of_a_json_file():
    """Also so that a run of any choice can come back."""
    for labels, choices in (
        (dose.DOSE_LABELS, DoseName),
        (dose.PARTS_LABELS, InjectedParts),
        (dose.METHOD_LABELS, Inversion),
    ):
        assert set(labels) == set(get_args(choices))


def test_settings_without_a_field_are_listed():
    edit_fields = ("prompt", "edits", "seed", "weight", "dose")
    settings = EditSettings(prompt="a dog", edits=("a cat",), seed=3, weight=0.5, dose="add")
    assert without_field(settings, edit_fields) == []
    settings = EditSettings(
        prompt="a dog",
        edits=("a cat", {"prompt": "a fox", "then": ["at night", {"prompt": "in the snow", "weight": 1}]}),
        weight={3: 0.5},
        cfg_from=0.5,
    )
    absent = ["cfg_from", "strengths by layer", "settings of single edits"]
    assert without_field(settings, edit_fields) == absent
    settings = GenerateSettings(prompts=("a dog", "a cat"))
    assert without_field(settings, ("prompt",)) == ["the prompts after the first"]


def test_examples_use_known_words():
    texts = [scan.PROMPTS, film.PROMPT, fill.PROMPT]
    for kind in ("small", "steered"):
        texts += [prompt for prompt, _ in generate.EXAMPLES[kind]]
        texts += [f"{prompt} {edits}" for prompt, _, edits in edit.EXAMPLES[kind]]
    assert not unknown_words(" ".join(texts), configs["flux-nano"].vocabulary)
    assert not unknown_words(" ".join(instruct.EXAMPLES), configs["flux-nano-kontext"].vocabulary)
