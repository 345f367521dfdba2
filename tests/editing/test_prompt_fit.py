"""Prompts that describe another image than the photograph."""

import pytest
import torch

from flux.editing.prompt_fit import WORST_FIT, prompt_fit, warn_of_unfit_prompt
from flux.editing.source import find_source
from flux.errors import InputWarning
from flux.evaluate.benchmark import Item, read_benchmark
from flux.settings.complete import resolve
from flux.settings.edits import EditSettings
from training.benchmark import write

SIDE = 256


def photographs(folder, count: int) -> list[Item]:
    """Rendered scenes, with prompts that describe them."""
    write(folder, count, SIDE)
    return read_benchmark(folder)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("photographs"), 3)


def test_the_own_prompt_fits_best(nano, few):
    """Each photograph's own prompt is not warned of, every other one's is."""
    for row, item in enumerate(few):
        clean = nano.encode(item.photo(SIDE, SIDE))
        fits = [prompt_fit(nano, each.source, clean, SIDE, SIDE) for each in few]
        assert fits[row] < WORST_FIT < min(fits[:row] + fits[row + 1 :])


def test_no_prompt_fits_as_well_as_none(nano, few):
    assert prompt_fit(nano, "", nano.encode(few[0].photo(64, 64)), 64, 64) == 1.0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("row", "is_right"), [(0, True), (2, False)])
def test_an_edit_with_another_images_prompt_is_told(nano, few, row, is_right):
    given = {"prompt": few[row].source, "edits": ("a cat",), "photo": "a.png", "num_steps": 1}
    settings, photo = resolve(EditSettings(**given)), few[0].photo(SIDE, SIDE)
    if is_right:
        find_source(nano, settings, photo, progress=True)
    else:
        with pytest.warns(InputWarning, match="fits this photo worse than no prompt at all"):
            find_source(nano, settings, photo, progress=True)


def test_blank_prompts_are_not_compared(monkeypatch):
    monkeypatch.setattr("flux.editing.prompt_fit.prompt_fit", lambda *_: pytest.fail("compared"))
    warn_of_unfit_prompt(None, " ", None, 64, 64)


@pytest.mark.slow
def test_prompts_of_other_photographs_are_told_apart(nano, tmp_path):
    """The numbers of WORST_FIT: over 120 photographs, none is mistaken either way."""
    items, right, wrong = photographs(tmp_path, 120), [], []
    with torch.inference_mode():
        for number, item in enumerate(items):
            clean = nano.encode(item.photo(SIDE, SIDE))
            others = (items[(number + turn) % len(items)].source for turn in range(1, len(items)))
            other = next(source for source in others if source != item.source)
            right.append(prompt_fit(nano, item.source, clean, SIDE, SIDE))
            wrong.append(prompt_fit(nano, other, clean, SIDE, SIDE))
    print(f"right: at most {max(right):.3f}; wrong: at least {min(wrong):.3f}")
    assert max(right) < WORST_FIT < min(wrong)
