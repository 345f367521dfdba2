"""The small models that images steer do what they are asked to, as the judge sees it.

The scenes are those of `training.benchmark` and `training.evaluate_conditions`, with fewer steps.
"""

import random
from collections.abc import Sequence
from itertools import islice

import numpy as np
import pytest
from helpers import tiny_models

from flux.conditions.fill import paste_unmasked
from flux.conditions.kontext import kontext_condition
from flux.loaded_model import LoadedModel
from flux.settings.demos import ModelSettings
from training.benchmark import draw
from training.evaluate_conditions import (
    FIRST,
    Example,
    agreement,
    canny_examples,
    edges,
    fill_examples,
    image_of,
    make,
    masked,
    measure,
)
from training.judge import MeasuringJudge, asked_for
from training.scenes.instructions import instruction
from training.scenes.render import Renderer

SIDE = 256


@pytest.fixture(scope="module")
def judge():
    return MeasuringJudge.load()


def settings_of(name: str, num_steps: int = 6) -> ModelSettings:
    return ModelSettings(model=name, width=SIDE, height=SIDE, num_steps=num_steps, batch_size=2)


def instructed(numbers: Sequence[int]) -> list[tuple[Example, np.ndarray]]:
    """Held-out edits, whose captions are instructions, and the pixels of each that must stay."""
    made = []
    for number in numbers:
        kind, pair = draw(number)
        before, after, changed = Renderer().pairs([pair], SIDE, SIDE, seed=number)
        asked = asked_for(pair.edit, pair.before.content, pair.after.content)
        text = instruction(random.Random(number), pair)
        example = Example(kind, image_of(before), image_of(after), text, asked, number)
        made.append((example, ~changed[0, 0].numpy()))
    return made


def context(pipe: LoadedModel, example: Example):
    return kontext_condition(pipe.encode_pixels, example.image, SIDE)


def psnr(a, b, where: np.ndarray) -> float:
    """The PSNR of the pixels in a mask, in dB."""
    difference = (np.asarray(a, float) - np.asarray(b, float))[where]
    return float(10 * np.log10(255**2 / np.mean(difference**2)))


@pytest.mark.parametrize(
    ("first", "count", "successes", "least"),
    [(FIRST + 3, 3, 3, 29), pytest.param(FIRST, 24, 21, 33, marks=pytest.mark.slow)],
)
def test_instructions_are_followed(judge, first, count, successes, least):
    """Something more, something less, another place, ...: and all else stays."""
    name = "flux-nano-kontext"
    examples, stay = zip(*instructed(range(first, first + count)))
    images = make(tiny_models.load_nano(name), settings_of(name), examples, context)
    verdicts = judge.judge([each.image for each in examples], images, [each.asked for each in examples])
    kept = [psnr(image, each.image, where) for image, each, where in zip(images, examples, stay)]
    assert sum(verdict.success for verdict in verdicts) >= successes
    assert np.median(kept) > least


@pytest.mark.parametrize(("count", "successes"), [(2, 2), pytest.param(20, 19, marks=pytest.mark.slow)])
def test_what_is_filled_is_what_the_prompt_says(judge, count, successes):
    """All else stays, also before the image's own pixels are put back."""
    name = "flux-nano-fill"
    examples = list(islice(fill_examples(Renderer(), SIDE), count))
    images = make(tiny_models.load_nano(name), settings_of(name), examples, masked)
    kept = [psnr(image, each.image, np.asarray(each.mask) == 0) for image, each in zip(images, examples)]
    pasted = [paste_unmasked(image, each.image, each.mask) for image, each in zip(images, examples)]
    scores = measure(judge, examples, pasted)
    assert sum(score["success"] for score in scores) >= successes
    assert all(score["changed outside"] == 0 for score in scores)
    assert np.median(kept) > 31


@pytest.mark.parametrize(("count", "successes"), [(2, 2), pytest.param(20, 19, marks=pytest.mark.slow)])
def test_edges_are_those_of_the_control_image(nano, judge, count, successes):
    """Without it, an image of the same prompt and noise has others."""
    name = "flux-nano-canny"
    examples = list(islice(canny_examples(Renderer(), SIDE), count))
    images = make(tiny_models.load_nano(name), settings_of(name), examples, edges)
    free = make(nano, settings_of("flux-nano"), examples)
    scores = measure(judge, examples, images)
    without = [agreement(each, image)["edges F1"] for each, image in zip(examples, free)]
    assert sum(score["success"] for score in scores) >= successes
    assert min(score["edges F1"] for score in scores) > 0.8 > max(without)
