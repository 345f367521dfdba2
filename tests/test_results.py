"""Results: shown in a notebook, and saved as files from which the demos repeat them."""

import json
import runpy
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux.errors import InputError
from flux.front import Pipeline
from flux.results import SHOWN_SIDE, ImagesResult
from flux.settings.demos import ModelSettings
from flux.settings.files import CONFIGS, check_settings
from flux.settings.resolved import ResolvedGenerate

pytestmark = pytest.mark.usefixtures("loads_once")

ROOT = CONFIGS.parent
DOG, CAT = "a dog on the grass", "a cat on the grass"
SMALL = {"width": 64, "height": 64, "num_steps": 2, "progress": False}


@pytest.fixture(scope="module")
def pipe(nano):
    return Pipeline(nano, ModelSettings(device="cpu", dtype="float32"))


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def repeat(demo: str, folder: Path, monkeypatch) -> Path:
    """Run a demo with the run.json in a folder; return the folder that it writes to, beside it."""
    again = folder.with_name("again")
    arguments = [demo, str(folder / "run.json"), "--output_dir", str(again)]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(ROOT / demo), run_name="__main__")
    return again


def assert_same_images(folder: Path, other: Path) -> None:
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    assert names
    for name in names:
        if (other / name).exists():
            assert np.array_equal(read(folder / name), read(other / name)), name
    # What the demo does not write is what the run starts from.
    missing = {name for name in names if not (other / name).exists()}
    assert missing <= {"photo.png", "mask.png", "image.png"}


# ---- saved, and repeated by the demo


def test_images(pipe, tmp_path, monkeypatch):
    made = pipe.generate([DOG, CAT], seed=7, **SMALL)
    folder = made.save(tmp_path / "images")
    assert {path.name for path in folder.iterdir()} == {"000.png", "001.png", "grid.png", "run.json"}
    assert json.loads((folder / "run.json").read_text())["settings"]["output_dir"] == str(folder)
    assert_same_images(folder, repeat("demo_0_test.py", folder, monkeypatch))


def test_no_image_is_saved_over_the_photo_that_it_was_made_of(pipe, tmp_path):
    photo = tmp_path / "edit_0.png"
    Image.new("RGB", (64, 64), "green").save(photo)
    made, before = pipe.edit(DOG, [CAT], photo=photo, **SMALL), photo.read_bytes()
    with pytest.raises(InputError, match=r"edit_0.png, which this run would write over"):
        made.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["edit_0.png"]
    assert photo.read_bytes() == before
    assert (made.save(tmp_path / "edits") / "edit_0.png").is_file()


def test_images_of_an_image(pipe, tmp_path, monkeypatch):
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    folder = pipe.generate(DOG, image=photo, strength=0.5, **SMALL).save(tmp_path / "images")
    assert_same_images(folder, repeat("demo_0_test.py", folder, monkeypatch))


def test_edits(pipe, tmp_path, monkeypatch):
    made = pipe.edit(DOG, [CAT, {"prompt": "a red dog", "dose": "add"}], seed=7, **SMALL | {"num_steps": 4})
    folder = made.save(tmp_path / "edits")
    names = {"reference.png", "edit_0.png", "edit_1.png", "comparison.png", "run.json"}
    assert {path.name for path in folder.iterdir()} == names
    record = json.loads((folder / "run.json").read_text())
    assert record["settings"]["vital_layers"] == record["layers"] == [4, 0]
    assert record["evaluations"] > 0
    assert_same_images(folder, repeat("demo_4_edit.py", folder, monkeypatch))


def test_edits_of_a_photograph_with_a_mask(pipe, tmp_path, monkeypatch):
    """Both came from no file: they are saved beside the run.json, which names them."""
    photo = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    mask = np.zeros((64, 96), dtype=bool)
    mask[:, 48:] = True
    how = {"num_steps": 4, "width": 96, "height": 64, "progress": False}
    folder = pipe.edit(DOG, CAT, photo=photo, mask=mask, **how).save(tmp_path / "edits")
    assert json.loads((folder / "run.json").read_text())["settings"]["mask"] == "mask.png"
    assert_same_images(folder, repeat("demo_4_edit.py", folder, monkeypatch))


def test_skipped_layers(pipe, tmp_path, monkeypatch):
    made = pipe.skip([DOG, CAT], [[4], [0, 9]], seed=7, **SMALL)
    assert not np.array_equal(np.asarray(made.image(9, 0)), np.asarray(made.image()))
    assert np.array_equal(np.asarray(made.image(row=1)), np.asarray(pipe.generate(CAT, seed=8, **SMALL)[0]))
    folder = made.save(tmp_path / "skip")
    assert np.array_equal(read(folder / "prompt_000" / "skip_00-09.png"), np.asarray(made.image(0, 9)))
    assert json.loads((folder / "run.json").read_text())["settings"]["output_dir"] == str(folder)
    assert_same_images(folder, repeat("demo_2_skip.py", folder, monkeypatch))


def test_a_scan(pipe, tmp_path):
    result = pipe.scan(DOG, [0, 4, 9], top=2, seed=7, folder=tmp_path / "scan", **SMALL)
    assert result.folder == tmp_path / "scan"
    assert result.vitality.keys() == {0, 4, 9}
    top = sorted(result.vitality, key=result.vitality.__getitem__)[1:]
    assert sorted(result.vital_layers) == sorted(top)
    copy = result.save(tmp_path / "copy")
    assert {"vital_layers.json", "vitality.png", "report.html", "run.json"} <= {
        p.name for p in copy.iterdir()
    }
    edit = pipe.edit(DOG, CAT, vital_layers=copy / "vital_layers.json", **SMALL)
    assert sorted(edit.settings.vital_layers) == sorted(result.vital_layers)


def test_a_temporary_folder_lives_as_long_as_its_result(pipe):
    made = pipe.skip(DOG, 4, **SMALL)
    folder = made.folder
    assert (folder / "grid.png").is_file()
    del made
    assert not folder.exists()


def test_a_film(pipe, tmp_path, monkeypatch):
    made = pipe.watch(DOG, 4, words="dog", seed=7, **SMALL)
    folder = made.save(tmp_path / "film")
    assert_same_images(folder, repeat("demo_1_layer.py", folder, monkeypatch))
    assert (folder / "steps.gif").read_bytes() == (tmp_path / "again" / "steps.gif").read_bytes()
    assert np.array_equal(np.asarray(made.image), np.asarray(pipe.generate(DOG, seed=7, **SMALL)[0]))


def test_an_image_that_was_not_made(pipe):
    made = pipe.skip(DOG, [4, 9], **SMALL)
    for layers, row in (((5,), 0), ((4, 9), 0), ((4,), 1)):
        with pytest.raises(InputError, match=f"of row {row}: skipped were 04, 09, of the rows 0 to 0"):
            made.image(*layers, row=row)


def test_a_sweep_is_not_saved_over_another(pipe, tmp_path):
    made = pipe.skip(DOG, 4, **SMALL).save(tmp_path)
    with pytest.raises(InputError, match="holds a sweep that differs in layers"):
        pipe.skip(DOG, 5, **SMALL).save(tmp_path)
    assert json.loads((made / "run.json").read_text())["settings"]["layers"] == [4]
    assert not (made / "prompt_000" / "skip_05.png").exists()


def test_the_name_of_an_image_is_no_folder(pipe, tmp_path):
    with pytest.raises(InputError, match="the name of an image: save writes a folder of several files"):
        pipe.generate(DOG, **SMALL).save(tmp_path / "dog.png")


def test_a_folder_that_cannot_be_written_to(pipe, tmp_path):
    (tmp_path / "file").touch()
    for made in (pipe.generate(DOG, **SMALL), pipe.skip(DOG, 4, **SMALL)):
        with pytest.raises(InputError, match="Cannot write"):
            made.save(tmp_path / "file" / "folder")


# ---- shown


def test_each_result_shows_itself(pipe, tmp_path):
    made = {
        "<1 image of 64x64, flux-nano>": pipe.generate(DOG, **SMALL),
        "<2 images of 64x64, flux-nano>": pipe.generate([DOG, CAT], **SMALL),
        "<1 edit of 'a dog on the grass', flux-nano>": pipe.edit(DOG, CAT, **SMALL),
        "<1 prompt with 1 layer skipped, flux-nano>": pipe.skip(DOG, 4, **SMALL),
        "<2 steps of 'a dog on the grass', flux-nano>": pipe.watch(DOG, **SMALL),
        "<2 steps of 'a dog on the grass', layers 4, 9, flux-nano>": pipe.watch(DOG, [4, 9], **SMALL),
    }
    for text, result in made.items():
        assert repr(result) == text
        shown = Image.open(BytesIO(result._repr_png_()))
        assert min(shown.size) >= 64
        assert max(shown.size) <= SHOWN_SIDE
    scan = pipe.scan(DOG, [4, 9], top=1, **SMALL)
    assert repr(scan) == f"<vital layers {scan.vital_layers} of flux-nano>"
    assert scan.heat_map.size != scan.sheet().size
    assert np.array_equal(np.asarray(scan.sheet()), read(scan.folder / "vitality.png")[..., :3])


def test_an_edit_shows_its_reference_beside_it(pipe):
    made = pipe.edit(DOG, CAT, **SMALL)
    sheet = np.asarray(made.sheet())
    for image in (made.reference, made.edits[0]):
        rows = np.lib.stride_tricks.sliding_window_view(sheet, (64, 64, 3))[:, :, 0]
        assert (rows == np.asarray(image)).all(axis=(2, 3, 4)).any()


def test_large_images_are_shown_smaller():
    fields = {"prompts": [DOG], "width": 4096, "height": 16, "num_steps": 1, "guidance": 1.0, "true_cfg": 1.0}
    settings = check_settings(ResolvedGenerate, {**fields, "watermark": False, "output_dir": "output"})
    result = ImagesResult(settings, [Image.new("RGB", (4096, 16))])
    assert Image.open(BytesIO(result._repr_png_())).width == SHOWN_SIDE
