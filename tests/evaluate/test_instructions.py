"""A Kontext model edits by instructions: each row sees its own photograph."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from helpers.condition_models import SPECS, steered_pipe
from helpers.evaluation import INSTRUCTIONS, SIDE, settings_of

from flux.conditions.images import ConditionImages
from flux.editing.edit import edit
from flux.errors import InputError
from flux.evaluate.benchmark import Item, read_benchmark
from flux.evaluate.methods import MethodRunner
from flux.evaluate.resolve import ResolvedMethod, resolve_evaluation, resolve_methods
from flux.evaluate.run import evaluate
from flux.images.io import read_metadata
from flux.intervention import Intervention
from flux.specs import configs

MODEL = "tiny-kontext"
VITAL = SPECS[MODEL].vital_layers


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setitem(configs, MODEL, SPECS[MODEL])


@pytest.fixture(scope="module")
def kontext(nano):
    return steered_pipe(nano, MODEL)


@pytest.fixture(scope="module")
def items(benchmark) -> list[Item]:
    return read_benchmark(benchmark)[:2]


def methods_of(benchmark, folder, *fields: dict) -> list[ResolvedMethod]:
    named = [{"name": f"m{number}", **each} for number, each in enumerate(fields)]
    return resolve_methods(settings_of(benchmark, folder, model=MODEL, methods=named))


def run(kontext, method, items) -> list[np.ndarray]:
    made = MethodRunner(kontext, (SIDE, SIDE), seed=5).run(method, items)
    return [np.asarray(each.image, dtype=int) for each in made]


def differences(a, b) -> list[int]:
    return [int(np.abs(x - y).max()) for x, y in zip(a, b)]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"reference_strength": 1.5},
        {"context_every": 2},
        {"true_cfg": 2.0},
        {"context_in": "vital"},
        {"context_in": "others"},
    ],
)
def test_a_batch_is_what_kontext_makes_one_by_one(kontext, benchmark, items, tmp_path, fields):
    """From noise alone, with the instruction as prompt and the item's photograph as context image."""
    [method] = methods_of(benchmark, tmp_path, {"strength": 1.0} | fields)
    hidden = {"vital": {1, 3}, "others": set(VITAL)}.get(fields.get("context_in", ""), set())
    for item, found in zip(items, run(kontext, method, items)):
        steered = kontext.steered(ConditionImages(context=(item.photo(SIDE, SIDE),)), method.settings)
        [alone] = steered.generate(
            item.instruction,
            5 + item.seed,
            intervention=Intervention(hide_context=frozenset(hidden)),
            progress=False,
            **method.settings.sampling(),
        )
        assert differences([found], [np.asarray(alone, dtype=int)])[0] <= 1


def test_where_the_context_is_seen_matters(kontext, benchmark, items, tmp_path):
    plain, everywhere, vital, nowhere = methods_of(
        benchmark,
        tmp_path,
        {"strength": 1.0},
        {"strength": 1.0, "context_in": "vital", "vital_layers": "all"},
        {"strength": 1.0, "context_in": "vital"},
        {"strength": 1.0, "context_in": "others", "vital_layers": "all"},
    )
    images = [run(kontext, method, items) for method in (plain, everywhere, vital, nowhere)]
    assert differences(images[0], images[1]) == [0, 0]
    assert min(*differences(images[0], images[2]), *differences(images[2], images[3])) > 1


def test_injection_goes_with_instructions(kontext, benchmark, items, tmp_path):
    """The photograph is the reference too, whose own prompt is empty."""
    [method] = methods_of(benchmark, tmp_path, {"mask": "none"})
    for item, found in zip(items, run(kontext, method, items)):
        photo = item.photo(SIDE, SIDE)
        steered = kontext.steered(ConditionImages(context=(photo,)), method.settings)
        own = {"prompt": "", "edits": (item.instruction,), "seed": 5}
        alone = edit(steered, method.settings.model_copy(update=own), method.layers, photo, progress=False)
        assert differences([found], [np.asarray(alone.edits[0], dtype=int)])[0] <= 1


def test_layers_are_needed_only_where_they_are_used(benchmark, tmp_path, monkeypatch):
    monkeypatch.setitem(configs, MODEL, replace(SPECS[MODEL], vital_layers=None))
    [plain] = methods_of(benchmark, tmp_path, {"strength": 1.0, "num_steps": 1})
    assert plain.hidden == frozenset()
    with pytest.raises(InputError, match=r"method 'm0': The vital layers of this model are not known"):
        methods_of(benchmark, tmp_path, {"strength": 1.0, "context_in": "vital"})


def test_images_say_the_instruction(benchmark, tmp_path, painting):
    folder = evaluate(settings_of(benchmark, tmp_path, model=MODEL), progress=False)
    assert read_metadata(folder / "default" / "000.png")["prompt"] == INSTRUCTIONS["replace"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context_in": "vital"}, r'context_in: expected "all", "vital" or "others", and a strength'),
        ({"strength": 1.0, "context_in": [4]}, r"context_in: expected .*, got \[4\]"),
        ({"strength": 1.0, "vital_layers": [0]}, "got vital_layers with strength"),
    ],
)
def test_wrong_methods_are_told(benchmark, tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        methods_of(benchmark, tmp_path, fields)


def test_models_without_context_see_none(benchmark, tmp_path):
    methods = [{"name": "x", "strength": 1.0, "context_in": "vital"}]
    with pytest.raises(InputError, match=r"method 'x': got context_in for a model without context images"):
        resolve_methods(settings_of(benchmark, tmp_path, methods=methods))


def test_a_benchmark_without_instructions_is_told(benchmark, tmp_path, painting):
    shutil.copytree(benchmark, tmp_path / "silent")
    path = tmp_path / "silent" / "mapping_file.json"
    entries = json.loads(path.read_text())
    entries["001"]["editing_instruction"] = ""
    path.write_text(json.dumps(entries))
    with pytest.raises(
        InputError, match=r"1 edits of .*silent have no editing_instruction, the first is 001"
    ):
        evaluate(settings_of(tmp_path / "silent", tmp_path / "out", model=MODEL), progress=False)
    assert not painting
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fields", [{"reconstruct": True}, {"references": "generated"}])
def test_instructions_are_for_photographs(benchmark, tmp_path, fields):
    methods = [{"name": "x"}]
    settings = resolve_evaluation(settings_of(benchmark, tmp_path, model=MODEL, methods=methods, **fields))
    with pytest.raises(InputError, match="edits photographs by instructions"):
        settings.check_items(read_benchmark(benchmark))
