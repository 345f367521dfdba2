"""A LoRA trained from the page, on weights of its own."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.images import noise
from helpers.studio import make_studio

from flux.errors import InputError
from flux.images.io import read_image
from flux.specs import configs
from flux.studio.forms import train_settings
from flux.studio.work.lora import HeldLora
from flux.studio.work.train import Sample, can_train, keep_images, run_training

FORM = {"trigger": "flower bell", "layers": "vital", "steps": 4, "seed": 0}


def session_of(studio):
    return studio.sessions.of("a")


@pytest.fixture
def uploads(tmp_path):
    folder = tmp_path / "uploads"
    folder.mkdir()
    for seed in range(3):
        noise(64 + 64 * seed, 64, seed).save(folder / f"my {seed}.png")
    return folder


def keep(studio, uploads):
    files = [{"path": str(path)} for path in sorted(uploads.iterdir())]
    return keep_images(studio, session_of(studio), files, uploads)


def results_of(studio, uploads, **more):
    images = str(keep(studio, uploads)[0].parent)
    updates = run_training(
        studio, session_of(studio), train_settings(studio, {**FORM, "images": images, **more})
    )
    return [update.result for update in updates if update.result]


def test_images_are_kept_as_bare_pixels(studio, uploads):
    kept = keep(studio, uploads)
    assert [path.name for path in kept] == ["00.png", "01.png", "02.png"]
    assert np.array_equal(read_image(kept[1]), read_image(uploads / "my 1.png"))
    assert keep(studio, uploads) == kept, "in place of the earlier ones"
    small = replace(studio, limits=replace(studio.limits, side=32))
    assert read_image(keep(small, uploads)[0]).size == (32, 32)


def test_uploads_that_are_refused(studio, uploads, tmp_path):
    some = {"path": str(uploads / "my 0.png")}
    for wrong in (None, [], [some] * 13, {"path": "x"}):
        with pytest.raises(InputError, match="drop 1 to 12"):
            keep_images(studio, session_of(studio), wrong, uploads)
    with pytest.raises(InputError, match="not uploaded"):
        keep_images(studio, session_of(studio), [some], tmp_path / "elsewhere")


def test_a_training(studio, nano, uploads):
    weights = {name: value.clone() for name, value in nano.model.state_dict().items()}
    *samples, lora = results_of(studio, uploads)
    assert [sample.step for sample in samples] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert all(isinstance(sample, Sample) and sample.path.is_file() for sample in samples)
    assert isinstance(lora, HeldLora)
    assert lora.report.lora.layers == sorted(configs["flux-nano"].vital_layers)
    assert all(change.norm > 0 for change in lora.report.changes)
    settings = json.loads(lora.report.lora.file.checkpoint.metadata["settings"])
    assert (settings["trigger"], settings["rank"]) == ("flower bell", 16)
    assert str(studio.folder) not in json.dumps(lora.report.lora.file.checkpoint.metadata)
    assert all(torch.equal(weights[name], value) for name, value in nano.model.state_dict().items())


def test_a_stopped_training(studio, uploads):
    images = str(keep(studio, uploads)[0].parent)
    session = session_of(studio)
    settings = train_settings(studio, {**FORM, "images": images, "steps": 100})
    results = []
    for update in run_training(studio, session, settings):
        results.append(update.result)
        if update.done == 2:
            session.stop.set()
    assert not any(isinstance(result, HeldLora) for result in results)
    assert not studio.engine.running
    session.stop.clear()


def test_large_models_are_trained_elsewhere(nano, tmp_path):
    studio = make_studio(nano, tmp_path)
    assert can_train(studio)
    for model in ("flux-dev", "flux-nano-schnell"):
        studio.engine.settings = studio.engine.settings.model_copy(update={"model": model})
        assert not can_train(studio)
        with pytest.raises(InputError, match=r"flux\.lora train"):
            next(run_training(studio, session_of(studio), None))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"images": None}, "drop a handful"),
        ({"trigger": " "}, "trigger: expected"),
        ({"trigger": "x" * 5000}, "letters"),
        ({"steps": 301}, "steps: expected"),
        ({"steps": 1.5}, "steps: expected"),
        ({"layers": "/etc/passwd"}, "layers: expected"),
    ],
)
def test_values_that_the_form_does_not_send(studio, more, said):
    with pytest.raises(InputError, match=said):
        train_settings(studio, {**FORM, "images": "x", **more})
