"""Settings filled in from the spec of their model."""

import json

import pytest

from flux.errors import InputError
from flux.settings.complete import check_run, resolve
from flux.settings.demos import GenerateSettings, LayerSettings, ModelSettings, ScanSettings, SkipSettings
from flux.settings.edits import EditSettings
from flux.settings.files import check_settings
from flux.settings.resolved import (
    ResolvedEdit,
    ResolvedGenerate,
    ResolvedLayer,
    ResolvedModel,
    ResolvedScan,
    ResolvedSkip,
)

PROMPTS = {"prompts": ["a"]}


def test_missing_numbers_come_from_the_model():
    settings = resolve(ModelSettings(model="flux-schnell"))
    assert (settings.width, settings.height, settings.num_steps, settings.true_cfg) == (1024, 1024, 4, 1.0)
    settings = resolve(ModelSettings())
    assert (settings.model, settings.width, settings.num_steps, settings.true_cfg) == (
        "flux-nano",
        256,
        20,
        1.0,
    )


def test_given_numbers_stay():
    """Among them those that are false in Python."""
    settings = resolve(ModelSettings(model="flux-dev", guidance=0.0, num_steps=7, width=512))
    assert (settings.guidance, settings.num_steps, settings.width, settings.height) == (0.0, 7, 512, 1024)


def test_resolved_settings_stay():
    settings = resolve(GenerateSettings(**PROMPTS, width=1080))
    assert resolve(settings) == settings
    assert isinstance(settings, GenerateSettings)


def test_sizes_are_rounded_down_with_a_notice(capsys):
    settings = resolve(ModelSettings(model="flux-dev", width=1080, height=1024))
    assert (settings.width, settings.height) == (1072, 1024)
    assert capsys.readouterr().out == "width 1080 is rounded down to 1072, a multiple of 16\n"


@pytest.mark.parametrize(
    "settings",
    [
        SkipSettings(**PROMPTS, model="flux-dev", layers=[3, 57]),
        SkipSettings(**PROMPTS, model="flux-dev", layers=[[0, 1], [2, 57]]),
        EditSettings(prompt="a dog", edits=["a cat"], model="flux-dev", vital_layers=[57]),
    ],
    ids=["layers", "sets of layers", "vital layers"],
)
def test_layer_57_is_refused(settings):
    with pytest.raises(InputError, match=r"Got layers \[57\], but this model numbers its layers 0\.\.56"):
        resolve(settings)


@pytest.mark.parametrize(
    "settings",
    [
        SkipSettings(**PROMPTS, layers="all"),
        SkipSettings(**PROMPTS, layers=[0, 14]),
        SkipSettings(**PROMPTS, layers=[[0, 14]]),
        EditSettings(prompt="a dog", edits=["a cat"]),
        EditSettings(prompt="a dog", edits=["a cat"], vital_layers=[14]),
        LayerSettings(prompt="a dog"),
    ],
    ids=repr,
)
def test_right_layers_pass(settings):
    assert resolve(settings).num_steps == 20


def test_an_unknown_model_in_settings():
    with pytest.raises(InputError, match="unknown model"):
        resolve(ModelSettings(model="flux-max"))


@pytest.mark.parametrize(
    ("cls", "fields", "resolved"),
    [
        (ModelSettings, {}, ResolvedModel),
        (GenerateSettings, PROMPTS, ResolvedGenerate),
        (LayerSettings, PROMPTS, ResolvedLayer),
        (SkipSettings, PROMPTS, ResolvedSkip),
        (ScanSettings, PROMPTS | {"top": 3}, ResolvedScan),
        (EditSettings, {"prompt": "a dog", "edits": ["a cat", {"prompt": "b", "then": ["c"]}]}, ResolvedEdit),
    ],
)
def test_each_demo_has_resolved_settings(cls, fields, resolved):
    """They have the same fields in the same order, with nothing missing, and are read back."""
    settings = check_settings(cls, fields)
    found = resolve(settings)
    assert type(found) is resolved
    assert list(found.to_json()) == list(settings.to_json())
    changed = {name for name, value in settings.to_json().items() if found.to_json()[name] != value}
    assert changed == {"width", "height", "num_steps", "guidance", "true_cfg", "watermark"}
    assert check_settings(resolved, found.to_json()) == found


@pytest.mark.parametrize(
    ("fields", "guidance"), [({}, 3.0), ({"guidance": 2.0}, 2.0), ({"photo": None}, 3.5)]
)
def test_the_guidance_of_the_public_code(fields, guidance):
    settings = {"prompt": "a dog", "edits": ["a cat"], "photo": "a.png", "as_published": True, **fields}
    assert resolve(check_settings(EditSettings, settings)).guidance == guidance


def test_resolved_settings_lack_nothing():
    with pytest.raises(InputError, match="width: expected an integer, got null"):
        check_settings(ResolvedModel, resolve(ModelSettings()).to_json() | {"width": None})


@pytest.mark.parametrize(
    ("cls", "fields", "name"),
    [
        (GenerateSettings, PROMPTS | {"image": "{}"}, "000.png"),
        (LayerSettings, PROMPTS | {"model": "flux-nano-kontext", "context": "{}"}, "step_03_clean.png"),
        (LayerSettings, PROMPTS | {"model": "flux-nano-kontext", "context": "{}"}, "prompt_001/steps.png"),
        (EditSettings, {"prompt": "a", "edits": ["b"], "photo": "{}"}, "edit_0.png"),
        (EditSettings, {"prompt": "a", "edits": ["b"], "photo": "{}"}, "reference.png"),
        (EditSettings, {"prompt": "a", "edits": [{"prompt": "b", "mask": "{}"}]}, "comparison.png"),
    ],
)
def test_a_run_writes_over_none_of_its_own_images(tmp_path, cls, fields, name):
    """An edit of an earlier edit in the same folder is refused, since the earlier one would be lost."""
    folder = tmp_path / "out"

    def check(path, output_dir) -> None:
        given = json.loads(json.dumps(fields).replace("{}", str(path)))
        check_run(resolve(check_settings(cls, given | {"output_dir": str(output_dir), "device": "cpu"})))

    with pytest.raises(InputError, match=rf"{name}, which this run would write over: name another"):
        check(folder / name, f"{folder}/../out")
    assert not folder.exists()
    check(folder / f"my_{name}", folder)
    check(folder / name, tmp_path / "another")


@pytest.mark.parametrize(("demo", "refused"), [("skip", True), ("train", True), ("edit", False), (5, False)])
def test_a_run_writes_over_no_record_of_work_that_can_be_resumed(tmp_path, demo, refused):
    record = tmp_path / "run.json"
    record.write_text(json.dumps({"demo": demo, "settings": {}}))
    settings = resolve(check_settings(GenerateSettings, PROMPTS | {"output_dir": str(tmp_path)}))
    if refused:
        with pytest.raises(InputError, match=f"{tmp_path}, which holds work of .*: name another output_dir"):
            check_run(settings)
    else:
        check_run(settings)
