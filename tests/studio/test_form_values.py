import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux.errors import InputError
from flux.settings.edits import EditSettings
from flux.studio.form_values import format_edits, integer_in, layers_on, number_in, parse_edits, values_of

PROMPTS = st.text("ab c", min_size=1).map(str.strip).filter(bool)


def test_numbers_from_a_browser_are_checked():
    form = {"steps": 3.0, "weight": 1, "count": True, "top": float("nan")}
    assert integer_in(form, "steps", 3) == 3
    assert number_in(form, "weight", 1) == 1
    for name in ("count", "top", "missing"):
        with pytest.raises(InputError, match=f"{name}: expected an integer from 1 to 4"):
            integer_in(form, name, 4)
        with pytest.raises(InputError, match=f"{name}: expected a number from 0 to 4"):
            number_in(form, name, 4)


def test_layers_from_a_browser_are_checked():
    assert layers_on({"on": [3, 1, 1]}, 15) == (1, 3)
    for wrong in ([15], [-1], ["2"], [True], [[1]], "1", None):
        with pytest.raises(InputError, match="0 to 14"):
            layers_on({"on": wrong}, 15)


def test_whole_numbers_become_integers():
    values = values_of({"seed": 3.0, "width": 2.5, "strength": 1.0, "count": 1e300}, "seed", "width", "top")
    assert values == {"seed": 3, "width": 2.5, "top": None}
    assert isinstance(values["seed"], int)


def test_edits_as_lines_and_back():
    text = "a cat\n> a white cat\n> a white cat at night\na fox"
    edits = parse_edits(text)
    assert edits[1] == "a fox"
    assert edits[0]["then"][1] == "a white cat at night"
    settings = EditSettings(prompt="a dog", edits=edits)
    assert [entry.prompt for entry in settings.entries] == [line.lstrip("> ") for line in text.splitlines()]
    assert format_edits(settings.edits) == text


@given(st.lists(st.tuples(PROMPTS, st.lists(PROMPTS, max_size=3)), min_size=1, max_size=4))
def test_any_edits_survive_as_text(edits):
    entries = [{"prompt": prompt, "then": then} if then else prompt for prompt, then in edits]
    settings = EditSettings(prompt="a dog", edits=entries)
    assert parse_edits(format_edits(settings.edits)) == entries
