"""The commands for models that an image steers: upstream's options, their loops, checkpoints in a folder."""

import importlib
import inspect
import sys
import weakref
from collections import Counter

import pytest
from helpers.condition_models import (
    REDUX_SIZES,
    SPECS,
    make_steered_folder,
    save_depth_model,
    save_image,
    save_mask,
    save_redux_adapter,
    save_siglip,
    save_steered,
    steered_pipe,
)
from PIL import Image

from flux import cli, cli_control, cli_fill, cli_kontext, cli_redux
from flux.errors import InputError
from flux.images.io import read_metadata
from flux.loaded_model import LoadedModel
from flux.settings.conditions import ConditionSettings
from flux.specs import configs


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """The tiny models are in the table, and the current folder is a new one."""
    return make_steered_folder(monkeypatch, tmp_path)


@pytest.fixture
def loaded(monkeypatch, nano):
    """Models are made in memory. The list holds the settings of each that was asked for."""
    asked = []

    def load(settings, *_):
        asked.append(settings)
        return steered_pipe(nano, settings.model)

    monkeypatch.setattr(LoadedModel, "load", load)
    return asked


def typed(monkeypatch, *lines: str) -> None:
    """Answer the prompts of a loop."""
    answers = iter(lines)
    monkeypatch.setattr("builtins.input", lambda _: next(answers, "/q"))


def metadata(folder) -> list[dict]:
    return [read_metadata(path) or {} for path in sorted((folder / "output").iterdir())]


# ---- upstream's options

# Upstream's parameters, in its order, without those of TensorRT.
PARAMETERS = {
    "control": "name width height seed prompt device num_steps loop guidance offload output_dir "
    "add_sampling_metadata img_cond_path lora_scale",
    "fill": "seed prompt device num_steps loop guidance offload output_dir add_sampling_metadata "
    "img_cond_path img_mask_path",
    "kontext": "name aspect_ratio seed prompt device num_steps loop guidance offload output_dir "
    "add_sampling_metadata img_cond_path",
    "redux": "name width height seed device num_steps loop guidance offload output_dir add_sampling_metadata "
    "img_cond_path",
}
OPTIONS = {
    "control": "prompt width height num_steps guidance seed img_cond_path lora_scale",
    "fill": "prompt width height num_steps guidance seed img_cond_path img_mask_path",
    "kontext": "prompt width height num_steps guidance seed img_cond_path",
    "redux": "prompt width height num_steps guidance seed img_cond_path",
}


@pytest.mark.parametrize("command", PARAMETERS)
def test_names_and_order_are_upstreams(command):
    module = importlib.import_module(f"flux.cli_{command}")
    for function, expected in ((module.main, PARAMETERS), (module.SamplingOptions, OPTIONS)):
        names = expected[command].split()
        assert list(inspect.signature(function).parameters)[: len(names)] == names


@pytest.mark.parametrize(
    ("main", "fields", "expected"),
    [
        (
            cli_kontext.main,
            {},
            ("flux-dev-kontext", 30, 2.5, "replace the logo with the text 'Black Forest Labs'", 512),
        ),
        (cli_fill.main, {}, ("flux-dev-fill", 50, 30.0, "a white paper cup", 128)),
        (
            cli_control.main,
            {"name": "flux-dev-canny"},
            ("flux-dev-canny", 50, 30.0, "a robot made out of gold", 512),
        ),
        (
            cli_control.main,
            {"name": "flux-dev-depth-lora"},
            ("flux-dev-depth-lora", 50, 10.0, "a robot made out of gold", 512),
        ),
        (cli_redux.main, {}, ("flux-dev", 50, 2.5, "", 512)),
        (cli_redux.main, {"name": "flux-schnell"}, ("flux-schnell", 4, 3.5, "", 256)),
    ],
)
def test_defaults_are_upstreams(monkeypatch, folder, main, fields, expected):
    """With upstream's images in the folder `assets`, nothing else has to be given."""
    (folder / "assets").mkdir()
    save_mask(folder / "assets" / "cup_mask.png")
    for name in ("cup.png", "robot.webp"):
        save_image(folder / "assets" / name)
    used = []
    monkeypatch.setattr(
        "flux.sessions.session.LocalSession.load", lambda session: used.append(session.settings)
    )
    monkeypatch.setattr("flux.sessions.session.LocalSession.generate", lambda *given: used.append(given[1]))
    main(**fields)
    settings, prompt = used
    length = configs[settings.model].text_length
    assert (settings.model, settings.num_steps, settings.guidance, prompt, length) == expected


def test_each_field_of_conditions_is_an_option_of_one_command():
    """Upstream's options name the images."""
    taken = Counter(name for names in cli.COMMANDS.values() for name in names)
    images = {"context", "fill", "mask", "control", "redux"}
    assert taken == Counter(ConditionSettings.model_fields.keys() - images)


# ---- the loop


def test_the_image_and_the_shape_of_kontext_change(monkeypatch, folder, loaded):
    typed(
        monkeypatch, "/ar 2:1", "a cat", "/ar auto", "/i wide.png", "", "/i lost.png", "/ar x", "/m mask.png"
    )
    cli_kontext.main("tiny-kontext", prompt="a dog", img_cond_path=("a.png",), seed=3, loop=True)
    found = metadata(folder)
    assert len(loaded) == 1
    assert [(each["width"], each["height"]) for each in found] == [(64, 64), (80, 32), (96, 48)]
    assert [each["context"] for each in found] == [["a.png"], ["a.png"], ["wide.png"]]


def test_wrong_commands_are_answered(monkeypatch, capsys, loaded):
    typed(monkeypatch, "/i lost.png", "/ar x", "/m mask.png", "/i")
    cli_kontext.main("tiny-kontext", prompt="a dog", img_cond_path=("a.png",), loop=True)
    said = capsys.readouterr().out
    assert "Got the image lost.png, which is not there" in said
    assert "Got the aspect ratio 'x'" in said
    assert "Got '/m mask.png'." in said
    assert "Got '/i'." in said


def test_image_and_mask_of_fill_change_together(monkeypatch, folder, loaded, capsys):
    """A mask of another size than the image is answered at once, and not kept."""
    save_mask(folder / "wide_mask.png", 128, 64)
    typed(monkeypatch, "/m wide_mask.png", "a cat")
    cli_fill.main(
        name="tiny-fill", prompt="a dog", img_cond_path="a.png", img_mask_path="mask.png", loop=True
    )
    assert "make them of one size" in capsys.readouterr().out
    assert [each["mask"] for each in metadata(folder)] == ["mask.png", "mask.png"]


def test_another_strength_of_the_lora_loads_the_model_again(monkeypatch, folder, loaded):
    typed(monkeypatch, "/l 0.5", "", "/g 3", "")
    cli_control.main("tiny-canny", prompt="a dog", img_cond_path="a.png", lora_scale=0.8, loop=True)
    assert [settings.lora_scale for settings in loaded] == [0.8, 0.5]
    assert len(metadata(folder)) == 3


def test_an_earlier_model_is_let_go_before_the_next_is_loaded(monkeypatch, folder, nano):
    """Both at once may not fit into memory. One that failed to load is tried again."""
    models = []

    def load(settings, *_):
        assert not [model for model in models if model() is not None]
        if len(models) == 1:
            models.append(lambda: None)
            raise InputError("the disk is away")
        pipe = steered_pipe(nano, settings.model)
        models.append(weakref.ref(pipe.model))
        return pipe

    monkeypatch.setattr(LoadedModel, "load", load)
    typed(monkeypatch, "/l 0.5", "a cat", "a pig")
    cli_control.main("tiny-canny", prompt="a dog", img_cond_path="a.png", loop=True)
    assert [each["prompt"] for each in metadata(folder)] == ["a dog", "a pig"]
    assert len(models) == 3


# ---- whole commands


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["flux", *arguments])
    try:
        cli.app()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize(
    ("command", "size"),
    [
        (("kontext", "--name", "tiny-kontext", "--img_cond_path", "a.png,wide.png"), (64, 64)),
        (
            ("fill", "--name", "tiny-fill", "--img_cond_path", "a.png", "--img_mask_path", "mask.png"),
            (64, 64),
        ),
        (("fill", "--name", "tiny-fill", "--img_cond_path", "a.png", "--outpaint", "0,0.5,0,0"), (96, 64)),
        (("control", "--name", "tiny-canny", "--img_cond_path", "wide.png"), (96, 48)),
    ],
)
def test_a_checkpoint_in_a_folder(monkeypatch, folder, command, size):
    """From the command line to an image: the file is found, checked and loaded."""
    weights = str(save_steered(command[2], folder))
    assert run(monkeypatch, *command, "--weights", weights, "--prompt", "a dog", "--device", "cpu") == 0
    with Image.open(folder / "output" / "img_0.jpg") as image:
        assert image.size == size


def test_depth(monkeypatch, folder, loaded):
    depth = save_depth_model(folder / "depth")
    arguments = ("--img_cond_path", "a.png", "--depth_model", str(depth), "--prompt", "a dog")
    assert run(monkeypatch, "control", "--name", "tiny-depth", *arguments) == 0
    assert metadata(folder)[0]["control"] == "a.png"


def test_redux_needs_no_prompt(monkeypatch, folder, loaded):
    save_redux_adapter(folder / "redux.safetensors", (REDUX_SIZES[0], SPECS["tiny"].params.context_in_dim))
    files = ("--redux_weights", "redux.safetensors", "--siglip", str(save_siglip(folder / "siglip")))
    size = ("--width", "64", "--height", "64")
    assert run(monkeypatch, "redux", "--name", "tiny", "--img_cond_path", "a.png", *files, *size) == 0
    assert metadata(folder)[0]["redux"] == ["a.png"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("control", "--img_cond_path", "a.png"), "missing field 'name'"),
        (
            ("fill", "--name", "flux-dev", "--img_cond_path", "a.png", "--outpaint", "1"),
            "choose flux-dev-fill",
        ),
        (("fill", "--img_cond_path", "a.png"), "Got no img_mask_path: name the image"),
        (("kontext", "--prompt", "make it night"), "Got no img_cond_path: name the image"),
        (("a dog",), "Got 'a dog', which is no command: name one of t2i, kontext, fill"),
        (("fill", "--img_cond_path", "a.png", "--outpaint", "x"), "one number, or four"),
        (("kontext", "--img_cond_path", "lost.png"), "lost.png, which is not there"),
        (("kontext", "--context", "a.png"), "unknown field 'context'"),
        (("redux", "--name", "flux-nano", "--img_cond_path", "a.png"), "has no Redux adapter"),
        (("--name", "flux-dev-fill"), "Got no fill for flux-dev-fill"),
    ],
)
def test_wrong_commands_end_with_one_line(monkeypatch, capsys, loaded, command, message):
    assert run(monkeypatch, *command) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]
    assert not loaded
