"""The arguments of a call as settings: images or files, types of other libraries."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flux.errors import InputError
from flux.front.arguments import read_arguments, read_file_arguments
from flux.settings.demos import GenerateSettings, ModelSettings, ScanSettings, SkipSettings
from flux.settings.edits import EditSettings

MODEL = ModelSettings(device="cpu")
EDIT = {"prompt": "a dog", "edits": ["a cat"]}


def test_images_and_files(tmp_path):
    """Settings name the files of both; only the images are yet to be saved."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "photo.png")
    mask = np.ones((8, 8), dtype=bool)
    settings, _, images = read_arguments(
        EditSettings, MODEL, {**EDIT, "photo": tmp_path / "photo.png", "mask": mask}
    )
    assert (settings.photo, settings.mask) == (str(tmp_path / "photo.png"), "mask.png")
    assert images.images.keys() == {"photo", "mask"}
    assert images.unfiled.keys() == {"mask"}


@pytest.mark.parametrize("word", ["auto", "none"])
def test_the_words_of_masks_are_no_files(word):
    settings, _, images = read_arguments(EditSettings, MODEL, {**EDIT, "mask": word})
    assert (settings.mask, images.images) == (word, {})


def test_other_types_and_defaults():
    given = {"prompts": ["a dog"], "layers": np.arange(2), "width": np.int64(64), "guidance": None}
    settings = read_file_arguments(SkipSettings, MODEL, given, Path("out"))
    assert (settings.layers, settings.width, settings.guidance) == ((0, 1), 64, None)
    assert (settings.output_dir, settings.device) == ("out", "cpu")


def test_a_run_that_resumes_takes_files(tmp_path):
    given = {"prompts": ["a dog"], "control": Image.new("RGB", (8, 8))}
    with pytest.raises(InputError, match="Got control as an image: save it, and give its file"):
        read_file_arguments(SkipSettings, MODEL, given, "out")


@pytest.mark.parametrize("prompts", [{"a dog"}, iter(["a dog"]), np.array(["a dog"])])
def test_lists_of_other_types(prompts):
    settings, _, _ = read_arguments(GenerateSettings, MODEL, {"prompts": prompts})
    assert [entry.prompt for entry in settings.prompts] == ["a dog"]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("layers", np.int64(4), (4,)),
        ("layers", "all", "all"),
        ("metrics", "psnr", ("psnr",)),
        ("device", torch.device("cpu"), "cpu"),
    ],
)
def test_single_entries_and_names_of_pytorch(field, value, expected):
    given = {"prompts": "a dog", "top": 1, field: value}
    settings = read_file_arguments(ScanSettings, MODEL, given, "out")
    assert getattr(settings, field) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lora": "a.safetensors", "quantize": "8bit"}, "Got lora, quantize for a model that is loaded"),
        ({"model": "flux-nano-schnell"}, "Got model for a model that is loaded: give that to Pipeline.load"),
        ({"output_dir": "out"}, "Got output_dir: give the folder to the result's save"),
        ({"parallel": 2}, "Got parallel: a Pipeline uses one GPU"),
    ],
)
def test_what_a_call_cannot_change(arguments, message):
    """It would stand in run.json without having made the images."""
    with pytest.raises(InputError, match=message):
        read_arguments(EditSettings, MODEL, {**EDIT, **arguments})


def test_what_the_model_is_loaded_with_may_be_repeated():
    settings, _, _ = read_arguments(EditSettings, MODEL, {**EDIT, "device": "cpu", "model": "flux-nano"})
    assert settings.device == "cpu"
