"""Masked scenes and edges: what is drawn, made and measured."""

from itertools import islice

import numpy as np
import pytest
import torch
from helpers.condition_models import SPECS, steered_pipe
from helpers.evaluation import SIDE
from PIL import Image

import training.evaluate_conditions as program
from flux.loaded_model import LoadedModel
from flux.settings.demos import ModelSettings
from flux.specs import configs
from training.evaluate_conditions import (
    Example,
    agreement,
    boxed,
    canny_examples,
    edges,
    fidelity,
    fill_examples,
    make,
    masked,
    table,
)
from training.scenes.render import Renderer


@pytest.fixture(scope="module")
def fills() -> list[Example]:
    return list(islice(fill_examples(Renderer(), SIDE), 5))


@pytest.fixture(scope="module")
def cannies() -> list[Example]:
    return list(islice(canny_examples(Renderer(), SIDE), 2))


@pytest.fixture(autouse=True)
def table_of_models(monkeypatch):
    for name in ("tiny-fill", "tiny-canny"):
        monkeypatch.setitem(configs, name, SPECS[name])


def test_masks_hold_what_the_caption_changes(fills):
    """A box around it, and nothing differs outside; or all but the middle."""
    assert {each.kind for each in fills} > {"outpaint"}
    for each in fills:
        image, truth, mask = (np.asarray(x) for x in (each.image, each.truth, each.mask))
        assert (image[mask == 0] == truth[mask == 0]).all()
        if each.kind == "outpaint":
            assert (mask == 0).mean() == 0.25
        else:
            assert (image != truth).any()
            assert each.asked["objects"]


def test_a_box_says_nothing_of_its_content():
    changed = torch.zeros(64, 64, dtype=torch.bool)
    changed[20:30, 2] = changed[25, 2:40] = True
    assert boxed(changed).getbbox() == (0, 12, 48, 38)
    assert (np.asarray(boxed(changed))[12:38, :48] == 255).all()


@pytest.mark.parametrize(("name", "of"), [("tiny-fill", masked), ("tiny-canny", edges)])
def test_rows_have_conditions_of_their_own(nano, fills, cannies, name, of):
    """A batch gives the same as its rows one by one."""
    pipe, examples = steered_pipe(nano, name), (fills if of is masked else cannies)[:2]
    settings = ModelSettings(model=name, num_steps=2, batch_size=2)
    together = make(pipe, settings, examples, of)
    for each, image in zip(examples, together):
        [alone] = make(pipe, settings, [each], of)
        assert np.abs(np.asarray(image, int) - np.asarray(alone, int)).max() <= 1


def test_pixels_are_compared_inside_and_outside(fills):
    each = next(each for each in fills if each.kind != "outpaint")
    assert fidelity(each, each.truth) == {"PSNR inside": 100.0, "changed outside": 0.0}
    assert fidelity(each, each.image)["PSNR inside"] < 60
    levels = np.asarray(each.truth).copy()
    levels[np.asarray(each.mask) == 0] ^= 1
    assert fidelity(each, Image.fromarray(levels)) == {"PSNR inside": 100.0, "changed outside": 1.0}


def test_edges_may_be_two_pixels_off(cannies):
    each = cannies[0]
    assert agreement(each, each.image) == {"edges F1": pytest.approx(1.0)}
    moved = [Image.fromarray(np.roll(np.asarray(each.image), by, axis=1)) for by in (2, 8)]
    near, far = (agreement(each, image)["edges F1"] for image in moved)
    assert near > 0.95 > far
    assert agreement(each, Image.new("RGB", (SIDE, SIDE))) == {"edges F1": 0.0}


def test_the_table_has_means_and_kinds(cannies):
    rows = [{"success": 1.0, "edges F1": 0.25}, {"success": 0.0, "edges F1": 0.75}]
    lines = table({"x": rows}, cannies).splitlines()
    assert lines[0].startswith("|  | success | edges F1 | ")
    assert lines[2].startswith("| x | 0.50 | 0.50 | ")
    assert lines[-1].startswith("2 scenes.")


@pytest.mark.parametrize("kind", ["fill", "canny"])
def test_the_command(nano, tmp_path, monkeypatch, capsys, kind):
    """It writes a row for the scenes, one for flux-nano, and one for each scale of true CFG."""
    pipes = {"flux-nano": nano, f"tiny-{kind}": steered_pipe(nano, f"tiny-{kind}")}
    monkeypatch.setattr(LoadedModel, "load", lambda settings: pipes[settings.model])
    monkeypatch.setattr(program, "SIDE", SIDE)
    options = ["--count", "2", "--num_steps", "1", "--true_cfg", "1", "2", "--device", "cpu"]
    argv = ["x", kind, "--model", f"tiny-{kind}", "--folder", str(tmp_path), *options]
    monkeypatch.setattr("sys.argv", argv)
    program.main()
    lines = capsys.readouterr().out.splitlines()
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:6]]
    assert names == ["the scene", "flux-nano", f"tiny-{kind}", f"tiny-{kind}, true CFG 2"]
    assert Image.open(tmp_path / kind / "sheet.png").width > 5 * SIDE


@pytest.mark.parametrize("option", ["--num_steps", "--count", "--true_cfg"])
def test_a_wrong_number_is_one_line(tmp_path, monkeypatch, capsys, option):
    from training.arguments import start

    monkeypatch.setattr("sys.argv", ["x", "fill", "--folder", str(tmp_path), option, "0"])
    with pytest.raises(SystemExit) as exit_:
        start(program.main)
    assert exit_.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
