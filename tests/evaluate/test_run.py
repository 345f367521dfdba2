"""Evaluations: what their file may say, that they go on where they were, and that a batch's edits are those
that `flux.editing.edit.edit` makes one by one.
"""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import flux.editing.automask
import flux.editing.batches
import flux.editing.edit
import flux.evaluate.run
from flux.editing.edit import edit
from flux.errors import InputError
from flux.evaluate.benchmark import Item, encode_mask, read_benchmark, write_benchmark
from flux.evaluate.measure import Measurer
from flux.evaluate.methods import Made, Maker
from flux.evaluate.run import Task, completed, evaluate
from flux.evaluate.settings import EvaluateSettings, methods_of
from flux.evaluate.store import Store
from flux.evaluate.summary import by_kind, markdown, means
from flux.images.io import read_image, read_metadata, save_image
from flux.metrics.edits import OUTSIDE
from flux.settings.complete import resolve
from flux.settings.files import check_settings, read_settings
from flux.specs import configs

SIDE = 64
PROMPTS = {"replace": ("a dog on the grass", "a cat on the grass"), "add": ("a car", "a car and a dog")}


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """Four items of two kinds: a coloured square on noise, which is what may change, and turns white."""
    folder, random = tmp_path_factory.mktemp("benchmark"), np.random.default_rng(0)
    entries = []
    for number in range(4):
        kind = list(PROMPTS)[number % 2]
        pixels = random.integers(60, 120, (SIDE, SIDE, 3), dtype=np.uint8).repeat(1, axis=0)
        pixels[16:48, 16:48] = random.integers(0, 256, 3)
        mask = np.zeros((SIDE, SIDE), dtype=bool)
        mask[16:48, 16:48] = True
        truth = np.where(mask[..., None], np.uint8(255), pixels)
        names = [f"{number}.png", f"{number}_target.png"]
        for name, picture in zip(names, (pixels, truth)):
            save_image(Image.fromarray(picture), folder / "annotation_images" / name)
        entry = {
            "image_path": names[0],
            "target_image_path": names[1],
            "original_prompt": PROMPTS[kind][0],
            "editing_prompt": PROMPTS[kind][1],
            "editing_type_id": "1" if kind == "replace" else "2",
            "mask": encode_mask(mask),
            "seed": number,
        }
        entries.append((f"{number:03d}", entry))
    write_benchmark(folder, entries)
    return folder


def settings_of(benchmark, folder, **more) -> EvaluateSettings:
    fields = {
        "benchmark": str(benchmark),
        "output_dir": str(folder),
        "methods": [{"name": "Default"}, {"name": "img2img", "strength": 0.5}],
        "metrics": [],
        "device": "cpu",
        "width": SIDE,
        "height": SIDE,
        "num_steps": 2,
        "batch_size": 3,
    }
    return check_settings(EvaluateSettings, fields | more)


class PaintingWorker:
    """Stands for the model: every edit is its photograph, darker."""

    made: list[Task] = []

    def __init__(self, settings, pipe=None):
        self.settings = settings

    def run(self, task: Task) -> list[Made]:
        type(self).made.append(task)
        generated = self.settings.references == "generated"
        photos = [item.photo(SIDE, SIDE) for item in task.items]
        return [
            Made(photo.point(lambda v: v // 2), photo if generated else None, 0.25, 7.0) for photo in photos
        ]


@pytest.fixture
def painting(monkeypatch):
    monkeypatch.setattr(flux.evaluate.run, "EvaluateWorker", PaintingWorker)
    monkeypatch.setattr(PaintingWorker, "made", [])
    return PaintingWorker.made


def results(folder) -> list[dict]:
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


# ---- what the file may say


@pytest.mark.parametrize(
    "file",
    ["evaluate", "evaluate_inversions", "evaluate_strength", "evaluate_generated", "flux-dev/evaluate"],
)
def test_shipped_files_are_sound(file):
    settings = read_settings(EvaluateSettings, f"{file}.json")
    for method in methods_of(settings):
        assert resolve(method.settings).num_steps
    assert check_settings(EvaluateSettings, settings.to_json()) == settings


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([{"dose": "paper"}], 'each to have a "name"'),
        ([{"name": "a b"}, {"name": "A-b"}], "names of their own, got"),
        ([{"name": "truth"}], "names of their own, got 'truth'"),
        (
            [{"name": "x", "inverson": "euler"}],
            r"methods\[0\]: unknown field 'inverson', did you mean 'inversion'",
        ),
        ([{"name": "x"}, {"name": "y", "weight": 2.0}], r"methods\[1\]: weight: expected at most 1"),
        (
            [{"name": "x", "prompt": "a cat", "seed": 1}],
            r"methods\[0\]: got prompt, seed, which all methods share",
        ),
        ([{"name": "x", "strength": 1.5}], r"methods\[0\]: expected a strength in 0..1"),
        ([], "at least one"),
    ],
)
def test_wrong_methods_are_named(benchmark, tmp_path, methods, message):
    with pytest.raises(InputError, match=message):
        settings_of(benchmark, tmp_path, methods=methods)


def test_what_does_not_go_together(benchmark, tmp_path):
    with pytest.raises(InputError, match="strength"):
        settings_of(benchmark, tmp_path, references="generated")
    with pytest.raises(InputError, match="reconstruct"):
        settings_of(benchmark, tmp_path, reconstruct=True, judge="measuring.pt")


def test_a_method_the_model_cannot_do_is_told_before_any_work(benchmark, tmp_path, painting):
    methods = [{"name": "x"}, {"name": "too deep", "vital_layers": [99]}]
    with pytest.raises(InputError, match="method 'too deep'.*99"):
        evaluate(settings_of(benchmark, tmp_path / "out", methods=methods), progress=False)
    methods = [{"name": "no step", "inject_from": 0.3, "inject_until": 0.4}]
    with pytest.raises(InputError, match="method 'no step'.*none of which lies in"):
        evaluate(settings_of(benchmark, tmp_path / "out", methods=methods), progress=False)
    with pytest.raises(InputError, match="judge nowhere.pt, which is not there"):
        evaluate(settings_of(benchmark, tmp_path / "out", judge="nowhere.pt"), progress=False)
    assert not painting
    assert not (tmp_path / "out").exists()


def test_methods_share_what_is_not_theirs(benchmark, tmp_path):
    methods = [{"name": "x", "num_steps": 5}, {"name": "y"}]
    x, y = completed(settings_of(benchmark, tmp_path, methods=methods, guidance=2.0))
    assert (x.settings.num_steps, y.settings.num_steps) == (5, 2)
    assert x.settings.guidance == y.settings.guidance == 2.0
    assert x.settings.vital_layers == configs["flux-nano"].vital_layers


# ---- the folder


def test_what_is_written(benchmark, tmp_path, painting):
    folder = evaluate(settings_of(benchmark, tmp_path), progress=False)
    rows = results(folder)
    keys = {item.key for item in read_benchmark(benchmark)}
    methods = {"autoencoder", "truth", "default", "img2img"}
    assert {(row["method"], row["item"]) for row in rows} == {(m, key) for m in methods for key in keys}
    assert len(rows) == 16
    # The truth differs from the photograph inside the mask alone.
    assert {float(row["psnr"]) for row in rows if row["method"] == "truth"} == {100.0}
    item = read_benchmark(benchmark)[0]
    before = np.asarray(item.photo(SIDE, SIDE), dtype=float)
    outside = ~np.asarray(item.mask(SIDE, SIDE))
    mse = np.square((before - before // 2)[outside] / 255).mean()
    [row] = [row for row in rows if (row["method"], row["item"]) == ("default", "000")]
    assert float(row["mse"]) == pytest.approx(mse)
    assert (float(row["seconds"]), float(row["evaluations"])) == (0.25, 7.0)
    assert read_metadata(folder / "default" / "000.png")["prompt"] == PROMPTS["replace"][1]
    assert read_image(folder / "sheet.png").width > 4 * SIDE
    summary = (folder / "summary.md").read_text()
    assert "| Default |" in summary
    assert "| method | replace | add |" in summary
    assert json.loads((folder / "run.json").read_text())["demo"] == "evaluate"
    assert check_settings(EvaluateSettings, json.loads((folder / "run.json").read_text())["settings"])


def test_a_second_start_makes_what_is_missing(benchmark, tmp_path, painting):
    folder = evaluate(settings_of(benchmark, tmp_path), progress=False)
    before = (folder / "results.csv").read_text()
    # The truth is no model's work. Three items, then the fourth.
    assert [(task.method, len(task.items)) for task in painting] == [
        (method, count) for count in (3, 1) for method in ("autoencoder", "default", "img2img")
    ]
    painting.clear()
    evaluate(settings_of(benchmark, tmp_path), progress=False)
    assert not painting
    (folder / "default" / "002.png").unlink()
    lines = before.splitlines(keepends=True)
    (folder / "results.csv").write_text("".join(line for line in lines if not line.startswith("001,add,img")))
    evaluate(settings_of(benchmark, tmp_path), progress=False)
    done = {(task.method, *(item.key for item in task.items)) for task in painting}
    assert done == {("default", "002"), ("img2img", "001")}
    assert sorted((folder / "results.csv").read_text().splitlines()) == sorted(before.splitlines())


def test_stopped_and_started_again_is_the_same(benchmark, tmp_path, painting, monkeypatch):
    """Ctrl-C in the middle: what was made stays, and the rest is made as if nothing had happened."""
    whole = evaluate(settings_of(benchmark, tmp_path / "whole", batch_size=1), progress=False)
    calls, run = [], PaintingWorker.run

    def interrupted(self, task):
        calls.append(task)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return run(self, task)

    with monkeypatch.context() as patch:
        patch.setattr(PaintingWorker, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(settings_of(benchmark, tmp_path / "cut", batch_size=1), progress=False)
    assert len(results(tmp_path / "cut")) == 4 + 5
    painting.clear()
    cut = evaluate(settings_of(benchmark, tmp_path / "cut", batch_size=1), progress=False)
    assert len(painting) == 12 - 5
    assert (cut / "summary.csv").read_text() == (whole / "summary.csv").read_text()


def test_methods_may_come_and_go(benchmark, tmp_path, painting):
    evaluate(settings_of(benchmark, tmp_path), progress=False)
    painting.clear()
    other = {"methods": [{"name": "Paper", "dose": "paper"}]}
    evaluate(settings_of(benchmark, tmp_path, **other), progress=False)
    assert {task.method for task in painting} == {"paper"}
    assert {row["method"] for row in results(tmp_path)} >= {"default", "paper"}
    assert "Default" not in (tmp_path / "summary.md").read_text()
    # The name of the one that went still stands for it.
    with pytest.raises(InputError, match="another method 'Default'"):
        evaluate(settings_of(benchmark, tmp_path, methods=[{"name": "Default", "top": 1}]), progress=False)
    painting.clear()
    evaluate(settings_of(benchmark, tmp_path), progress=False)
    assert not painting


def test_a_folder_of_other_settings_is_refused(benchmark, tmp_path, painting):
    evaluate(settings_of(benchmark, tmp_path), progress=False)
    with pytest.raises(InputError, match="another num_steps"):
        evaluate(settings_of(benchmark, tmp_path, num_steps=3), progress=False)
    evaluate(settings_of(benchmark, tmp_path, count=2, batch_size=8), progress=False)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(InputError, match="cannot be read"):
        evaluate(settings_of(benchmark, tmp_path), progress=False)


def test_other_measures_are_taken_from_the_pictures_there(benchmark, tmp_path, painting, monkeypatch):
    """Of all rows, those left out this time included; time and work stay what they were. Nothing is made."""
    settings = settings_of(
        benchmark, tmp_path, references="generated", methods=[{"name": "a"}, {"name": "b"}]
    )
    evaluate(settings, progress=False)
    before = results(tmp_path)
    painting.clear()
    other = settings.model_copy(
        update={"metrics": ("structure",), "methods": settings.methods[:1], "count": 2}
    )
    measured, rows = [], Measurer.rows
    monkeypatch.setattr(Measurer, "rows", lambda self, *given: measured.append(given) or rows(self, *given))
    for _ in range(2):
        evaluate(other, progress=False)
    assert not painting
    assert sum(len(items) for _, items, _ in measured) == 8
    after = results(tmp_path)
    assert all(float(row.pop("structure")) >= 0 for row in after)
    assert sorted(map(str, after)) == sorted(map(str, before))


def test_another_benchmark_is_refused(benchmark, tmp_path, painting):
    settings = settings_of(benchmark, tmp_path / "out")
    evaluate(settings, progress=False)
    other = tmp_path / "other"
    [item, *_] = read_benchmark(benchmark)
    save_image(item.photo(SIDE, SIDE), other / "annotation_images" / "one.png")
    entry = {"image_path": "one.png", "original_prompt": "", "editing_prompt": "", "mask": []}
    write_benchmark(other, [("000", entry)])
    with pytest.raises(InputError, match="another edits"):
        Store(settings.model_copy(update={"benchmark": str(other)}))


def test_reconstruction_is_measured_everywhere(benchmark, tmp_path, painting):
    """Against the photograph itself, the part that an edit might change included, and without a truth."""
    folder = evaluate(settings_of(benchmark, tmp_path, reconstruct=True), progress=False)
    rows = results(folder)
    assert {row["method"] for row in rows} == {"autoencoder", "default", "img2img"}
    photo = np.asarray(read_benchmark(benchmark)[0].photo(SIDE, SIDE), dtype=float)
    assert float(rows[0]["mse"]) == pytest.approx(np.square((photo - photo // 2) / 255).mean())


def test_generated_references_are_what_edits_are_compared_with(benchmark, tmp_path, painting, monkeypatch):
    """Where the subject is, only a judge can say."""
    settings = settings_of(benchmark, tmp_path, references="generated", methods=[{"name": "Default"}])
    folder = evaluate(settings, progress=False)
    assert {(row["method"], row["psnr"]) for row in results(folder)} == {("default", "")}
    assert read_image(folder / "default" / "000_reference.png").size == (SIDE, SIDE)


# ---- tables


def test_means_leave_out_what_was_not_measured():
    rows = [
        {"kind": "add", "success": 1.0, "psnr": 30.0},
        {"kind": "add", "success": 1.0, "psnr": 20.0},
        {"kind": "time", "success": 0.0, "psnr": 40.0},
        {"kind": "time", "success": None, "psnr": None},
    ]
    assert means(rows) == {"success": 2 / 3, "psnr": 30.0, "both": 1 / 3}
    found = by_kind(rows)
    assert list(found) == ["all", "local", "add", "time"]
    assert found["add"]["both"] == 0.5
    assert found["time"]["psnr"] == 40.0
    assert found["local"] == found["add"]
    assert found["time"]["items"] == 2
    assert list(by_kind(rows[:2])) == ["all", "add"]


def test_the_table_by_kind():
    """What nobody measured of a kind is a dash."""
    rows = [
        {"kind": "add", "success": 1.0, "overlap": 0.5, "psnr": 30.0},
        {"kind": "time", "success": 1.0, "overlap": 0.5, "psnr": None},
    ]
    shown = markdown({"x": by_kind(rows)}, ["success", "both", "overlap", "psnr"])
    assert "success / PSNR / and 25 dB / overlap by kind" in shown
    assert "| method | local | add | time |" in shown
    assert "| x | 1.00 / 30.00 / 1.00 / 0.50 | 1.00 / 30.00 / 1.00 / 0.50 | 1.00 / - / - / 0.50 |" in shown


# ---- the model


@pytest.fixture(scope="module")
def items(benchmark) -> list[Item]:
    return read_benchmark(benchmark)[:2]


@pytest.mark.parametrize(
    ("references", "fields"),
    [
        ("photo", {"name": "default"}),
        ("photo", {"name": "published", "as_published": True}),
        ("photo", {"name": "FlowEdit", "inversion": "none"}),
        ("photo", {"name": "mask", "mask": "given"}),
        ("photo", {"name": "auto", "mask": "auto"}),
        ("generated", {"name": "default"}),
    ],
)
def test_a_batch_is_what_edit_makes_one_by_one(nano, benchmark, items, tmp_path, fields, references):
    """Rows of one batch, each with its own photograph, prompts and mask, within a grey level of 255."""
    photos = references == "photo"
    [method] = completed(settings_of(benchmark, tmp_path, methods=[fields], references=references))
    made = Maker(nano, (SIDE, SIDE), photos=photos).make(method, items)
    for item, found in zip(items, made):
        given = method.settings.mask == "given"
        own = {"prompt": item.source, "edits": (item.target,), "seed": 0 if photos else item.seed}
        settings = method.settings.model_copy(update=own | ({"mask": None} if given else {}))
        photo, mask = item.photo(SIDE, SIDE) if photos else None, item.mask(SIDE, SIDE) if given else None
        alone = edit(nano, settings, settings.vital_layers, photo, mask, progress=False)
        assert_close(found.picture, alone.edits[0])
        if not photos:
            assert_close(found.reference, alone.reference)


@pytest.mark.parametrize("all_over", [False, True])
@pytest.mark.parametrize("references", ["photo", "generated"])
def test_masks_of_a_batch_are_those_of_one_by_one(
    nano, benchmark, items, tmp_path, monkeypatch, references, all_over
):
    """To the token, where each row has words, a source and a part to change, or a subject, of its own."""
    monkeypatch.setattr(flux.editing.automask, "THRESHOLD", 1.0)
    monkeypatch.setattr(flux.editing.automask, "ALL_OVER", 0.0 if all_over else 1.0)
    found, make = [], flux.editing.batches._auto_mask
    monkeypatch.setattr(
        flux.editing.batches, "_auto_mask", lambda *given: found.append(make(*given)) or found[-1]
    )
    size = {"width": 128, "height": 128}
    settings = settings_of(benchmark, tmp_path, methods=[{"name": "x"}], references=references, **size)
    maker = Maker(nano, (128, 128), photos=references == "photo")
    for part in (items, items[:1], items[1:]):
        maker.make(completed(settings)[0], part)
    masks, subjects = zip(*found)
    together, *alone = subjects if all_over else masks
    assert torch.equal(together, torch.cat(alone))
    assert 0 < together[0].sum() < 64
    assert not torch.equal(*together)
    if all_over:
        assert all(mask.all() for mask in masks)
    else:
        assert subjects == (None,) * 3, "a subject is looked for where all may change"


def assert_close(a: Image.Image, b: Image.Image) -> None:
    difference = np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()
    assert difference <= 1, f"{difference} of 255"


def test_img2img_of_a_batch_is_generate(nano, benchmark, items, tmp_path):
    method = completed(settings_of(benchmark, tmp_path))[1]
    made = Maker(nano, (SIDE, SIDE), seed=5).make(method, items)
    for item, found in zip(items, made):
        photo = item.photo(SIDE, SIDE)
        kept = {name: getattr(method.settings, name) for name in ("num_steps", "guidance", "true_cfg")}
        size = {"width": SIDE, "height": SIDE}
        seeds = [5 + item.seed]
        [alone] = nano.generate(
            [item.target], seeds, **size, **kept, image=photo, strength=0.5, progress=False
        )
        assert_close(found.picture, alone)


def test_reconstruct_aims_at_the_photographs_own_prompt(nano, benchmark, items, tmp_path):
    [method] = completed(settings_of(benchmark, tmp_path, methods=[{"name": "x"}]))
    [made, _] = Maker(nano, (SIDE, SIDE), reconstruct=True).make(method, items)
    own = {"prompt": items[0].source, "edits": (items[0].source,)}
    settings = method.settings.model_copy(update=own)
    alone = edit(nano, settings, settings.vital_layers, items[0].photo(SIDE, SIDE), progress=False)
    assert_close(made.picture, alone.edits[0])


def test_evaluations_are_counted_in_pictures(nano, benchmark, items, tmp_path):
    """Two steps of Euler's inversion, of the reference, and of the edit, each once for each of the items."""
    fields = {"name": "x", "inversion": "euler", "dose": "paper"}
    [method] = completed(settings_of(benchmark, tmp_path, methods=[fields], true_cfg=1.0))
    made = Maker(nano, (SIDE, SIDE)).make(method, items)
    assert [each.evaluations for each in made] == [6, 6]


def test_a_small_evaluation_of_the_model_itself(nano, benchmark, tmp_path):
    """Two items, two methods, two steps: the command's whole way."""
    settings = settings_of(benchmark, tmp_path, count=2, metrics=["structure"])
    folder = evaluate(settings, pipe=nano, progress=False)
    rows = results(folder)
    assert len(rows) == 8
    assert all(row[name] for row in rows for name in (*OUTSIDE, "structure"))
    scores = {row["method"]: float(row["psnr"]) for row in rows}
    assert scores["autoencoder"] > scores["img2img"]
