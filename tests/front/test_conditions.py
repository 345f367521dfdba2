"""`flux.Pipeline` and the demos with images that steer: the same settings, files that repeat the run."""

import json

import numpy as np
import pytest
from helpers.condition_models import make_steered_folder, save_image, save_mask, save_steered, steered_pipe
from PIL import Image

from flux import Pipeline
from flux.conditions.images import read_conditions, sized
from flux.errors import InputError
from flux.sessions.batches import generate_all
from flux.settings.complete import resolve
from flux.settings.demos import GenerateSettings, ModelSettings
from flux.settings.files import read_settings

FAST = {"num_steps": 2, "progress": False}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """The tiny models are in the table, and the current folder is a new one."""
    return make_steered_folder(monkeypatch, tmp_path)


@pytest.fixture
def pipe(nano):
    """Make a pipeline of one of the tiny models."""
    return lambda name: Pipeline(steered_pipe(nano, name), ModelSettings(model=name))


def pixels(image) -> np.ndarray:
    return np.asarray(image, dtype=int)


def test_images_in_every_form(pipe):
    kontext = pipe("tiny-kontext")
    a, wide = Image.open("a.png"), Image.open("wide.png")
    first = kontext.generate("a dog", context="wide.png", **FAST)[0]
    assert first.size == (96, 48)
    for form in (wide, np.asarray(wide), ["wide.png"], [wide]):
        assert np.array_equal(kontext.generate("a dog", context=form, **FAST)[0], first)
    both = kontext.generate("a dog", context=["wide.png", a], **FAST)[0]
    assert not np.array_equal(both, first)
    assert not np.array_equal(kontext.generate("a dog", width=96, height=48, **FAST)[0], first), (
        "it is let go"
    )


def test_a_saved_run_repeats(pipe, folder, nano):
    """Images that no file held are saved beside run.json, which names them."""
    a, wide = Image.open("a.png"), Image.open("wide.png")
    made = pipe("tiny-kontext").generate("a dog", context=[a, wide], reference_strength=1.5, **FAST)
    made.save(folder / "out")
    settings = read_settings(GenerateSettings, folder / "out" / "run.json")
    assert settings.context == (str(folder / "out/context_0.png"), str(folder / "out/context_1.png"))
    images = read_conditions(settings)
    settings = resolve(sized(settings, images))
    models = steered_pipe(nano, "tiny-kontext").steered(images, settings)
    [again] = generate_all(models, settings, progress=False)
    assert np.array_equal(again, made[0])


def test_the_context_is_reused(pipe, folder, nano):
    """By images, edits, films and sweeps alike; the run repeats."""
    kontext, how = pipe("tiny-kontext"), {"context": "a.png", "num_steps": 3, "progress": False}
    plain = pixels(kontext.generate("a dog", **how)[0])
    assert np.array_equal(kontext.generate("a dog", context_every=1, **how)[0], plain)
    made = kontext.generate("a dog", context_every=2, **how)
    assert 0 < np.abs(pixels(made[0]) - plain).mean() < 20
    how["context_every"] = 2
    assert np.array_equal(kontext.watch("a dog", [1], words=["dog"], **how).image, made[0])
    assert np.array_equal(kontext.edit("a dog", ["a cat"], vital_layers=[1], **how).reference, made[0])
    skipped = kontext.skip("a dog", [2], folder=folder / "skip", **how)
    assert np.array_equal(skipped.image(), made[0])
    assert not np.array_equal(skipped.image(2), made[0])
    made.save(folder / "out")
    settings = resolve(read_settings(GenerateSettings, folder / "out" / "run.json"))
    models = steered_pipe(nano, "tiny-kontext").steered(read_conditions(settings), settings)
    [again] = generate_all(models, settings, progress=False)
    assert np.array_equal(again, made[0])


def test_fill_keeps_what_is_not_masked(pipe, folder):
    source, mask = Image.open("a.png"), Image.open("mask.png")
    made = pipe("tiny-fill").generate("a dog", fill=source, mask=mask, **FAST)
    assert np.array_equal(pixels(made[0])[:, :32], pixels(source)[:, :32])
    assert not np.array_equal(pixels(made[0])[:, 32:], pixels(source)[:, 32:])
    made.save(folder / "out")
    saved = json.loads((folder / "out/run.json").read_text())["settings"]
    assert (saved["fill"], saved["mask"]) == ("fill.png", "mask.png")
    assert np.array_equal(Image.open(folder / "out/mask.png").convert("L"), mask)


@pytest.mark.parametrize("mask", ["mask.png", "image", None])
def test_edits_of_a_filled_image(pipe, mask):
    """All of them keep the unmasked pixels; the mask of Fill is the one of the edits too."""
    given = Image.open("mask.png") if mask == "image" else mask
    more = {} if mask else {"outpaint": (0.0, 0.5, 0.0, 0.0), "overlap": 0.0}
    made = pipe("tiny-fill").edit("a dog", ["a cat"], fill="a.png", mask=given, **more, **FAST)
    source = pixels(Image.open("a.png"))
    kept = 32 if mask else 64
    for image in (made.reference, *made.edits):
        assert np.array_equal(pixels(image)[:, :kept], source[:, :kept])
    assert not np.array_equal(pixels(made.reference)[:, kept:], pixels(made.edits[0])[:, kept:])


@pytest.mark.parametrize("mask", ["mask.png", "image"])
def test_edits_of_a_filled_image_in_another_size(pipe, mask):
    """The mask is scaled with the image."""
    given = Image.open("mask.png") if mask == "image" else mask
    size = {"width": 32, "height": 32}
    made = pipe("tiny-fill").edit("a dog", ["a cat"], fill="a.png", mask=given, **size, **FAST)
    assert np.array_equal(pixels(made.reference)[:, :14], pixels(made.edits[0])[:, :14])
    assert not np.array_equal(pixels(made.reference)[:, 16:], pixels(made.edits[0])[:, 16:])


def test_edits_under_a_context_image(pipe):
    """With the kv injected in all layers and steps, the edit is nearer to its reference."""
    kontext = pipe("tiny-kontext")
    distances = []
    for weight in (0.0, 1.0):
        made = kontext.edit(
            "a dog", ["a cat"], context="a.png", mask="none", dose="paper", weight=weight,
            vital_layers=[0, 1, 2, 3], **FAST
        )  # fmt: skip
        distances.append(np.abs(pixels(made.reference) - pixels(made.edits[0])).mean())
    assert 0 < distances[1] < distances[0]


def test_skips_and_films(pipe, folder):
    canny = pipe("tiny-canny")
    skipped = canny.skip("a dog", [0, 2], control="wide.png", folder=folder / "skip", **FAST)
    plain = canny.generate("a dog", control="wide.png", **FAST)[0]
    assert np.array_equal(skipped.image(), plain), "the reference is the plain image"
    assert not np.array_equal(skipped.image(2), plain)
    film = canny.watch("a dog", [1], words=["dog"], control=Image.open("wide.png"), **FAST)
    assert np.array_equal(film.image, plain)


def test_demo_0(monkeypatch, folder):
    """A checkpoint, its image and its mask, named in a JSON file that lies beside them elsewhere."""
    import demo_0_test

    (folder / "there").mkdir()
    save_image(folder / "there" / "b.png", seed=7)
    save_mask(folder / "there" / "m.png")
    fields = {
        "model": "tiny-fill", "weights": str(save_steered("tiny-fill", folder)), "prompts": ["a dog"],
        "fill": "b.png", "mask": "m.png", "device": "cpu", "output_dir": "out",
    }  # fmt: skip
    (folder / "there" / "fill.json").write_text(json.dumps(fields))
    demo_0_test.main("there/fill.json")
    made, source = Image.open("out/000.png"), Image.open("there/b.png")
    assert np.array_equal(pixels(made)[:, :32], pixels(source)[:, :32])
    demo_0_test.main("out/run.json", output_dir="again")
    assert np.array_equal(Image.open("again/000.png"), made)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("tiny", {"context": "a.png"}, "Got context for tiny, which was trained without such images"),
        ("tiny-fill", {}, "Got no fill for tiny-fill"),
        ("tiny-fill", {"fill": "a.png", "mask": Image.new("L", (64, 64))}, "black all over"),
        ("tiny-canny", {"control": "wide.png", "width": 64, "height": 64}, "Got a control image of 128x64"),
        (
            "tiny-kontext",
            {"context": "a.png", "context_every": 2, "cache": 0.1},
            "got cache 0.1 and context_every 2, which both spare parts of a step",
        ),
        ("tiny-kontext", {"context": 3}, "Got int, expected a path, a PIL image or a NumPy array"),
    ],
)
def test_wrong_images_end_in_one_line(pipe, name, fields, message):
    with pytest.raises(InputError, match=message) as error:
        pipe(name).generate("a dog", **fields, **FAST)
    assert "\n" not in str(error.value)


def test_a_sweep_takes_files(pipe):
    with pytest.raises(InputError, match="Got context as an image: save it, and give its file"):
        pipe("tiny-kontext").skip("a dog", [0], context=Image.open("a.png"), **FAST)


def test_demos_2_and_4(folder):
    """A scan and edits of an outpainted image, by the demos."""
    import demo_2_skip
    import demo_4_edit

    given = {
        "model": "tiny-fill", "weights": str(save_steered("tiny-fill", folder)), "fill": "a.png",
        "outpaint": [0, 0.5, 0, 0], "overlap": 0.0, "device": "cpu",
    }  # fmt: skip
    (folder / "edit.json").write_text(
        json.dumps(given | {"prompt": "a dog", "edits": ["a cat"], "output_dir": "edits"})
    )
    demo_4_edit.main("edit.json")
    (folder / "skip.json").write_text(
        json.dumps(given | {"prompts": ["a dog"], "layers": [1], "output_dir": "skips"})
    )
    demo_2_skip.main("skip.json")
    source = pixels(Image.open("a.png"))
    made = ["edits/reference.png", "edits/edit_0.png", "skips/prompt_000/reference.png"]
    for image in map(Image.open, made):
        assert image.size == (96, 64)
        assert np.array_equal(pixels(image)[:, :64], source)
    assert np.array_equal(Image.open(made[0]), Image.open(made[2]))
    assert not np.array_equal(Image.open(made[0]), Image.open(made[1]))
    again = json.loads((folder / "edits/run.json").read_text())["settings"]
    assert (again["fill"], again["outpaint"], again["mask"]) == ("a.png", [0, 0.5, 0, 0], None)
