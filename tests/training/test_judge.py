"""The judge asks for what an edit changes, and sees it in the image after the edit alone."""

import numpy as np
import pytest
import torch
from helpers.evaluation import SIDE
from helpers.training import perfect

from flux.errors import InputError
from flux.evaluate.benchmark import read_benchmark
from flux.images.io import read_image, to_pil
from training.benchmark import draw
from training.judge import MeasuringJudge, asked_for, changeable, overlap, shows
from training.scenes.render import Renderer
from training.stages.export import export_judge


def test_what_is_asked_is_in_the_scene_after_and_not_before():
    for number in range(120):
        _, pair = draw(number)
        want = asked_for(pair.edit, pair.before.content, pair.after.content)
        assert shows(perfect([pair.after]), 0, want), (pair.edit, pair.after.caption)
        assert not shows(perfect([pair.before]), 0, want), (pair.edit, pair.before.caption)


def test_what_may_change_of_generated_images():
    old, new = np.zeros((40, 40), dtype=bool), np.zeros((40, 40), dtype=bool)
    old[20, 10], new[20, 20] = True, True
    local = changeable(old, new, {"objects": ["dog"]})
    assert np.argwhere(local).min(0).tolist() == [13, 3]
    assert np.argwhere(local).max(0).tolist() == [27, 27]
    scene = changeable(old | new, new, {"place": "beach"})
    assert np.argwhere(~scene).tolist() == [[20, 20]]
    assert overlap(old | new, new) == 0.5
    assert overlap(old, old & new) == 0


def test_a_judge_from_its_file(rendered_edits, judge_file):
    judge = MeasuringJudge.load(judge_file)
    items = read_benchmark(rendered_edits)[:3]
    images = [read_image(item.path) for item in items]
    wanted = [item.asked for item in items]
    verdicts = judge.judge(images, images, wanted)
    assert all(verdict.overlap in (0, 1) for verdict in verdicts)
    assert all(verdict.mask.shape == (SIDE, SIDE) for verdict in verdicts)
    seen, _ = judge.see(images)
    assert [verdict.success for verdict in verdicts] == [
        shows(seen, n, each) for n, each in enumerate(wanted)
    ]


def test_the_shipped_judge_sees_what_is_rendered():
    """It accepts the scenes after their edits, and not those before."""
    pairs = [draw(number)[1] for number in range(18)]
    asked = [asked_for(pair.edit, pair.before.content, pair.after.content) for pair in pairs]
    before, after, _ = Renderer().pairs(pairs, 128, 128)
    judge = MeasuringJudge.load()
    for images, least, most in ((before, 0, 1), (after, 17, 18)):
        seen, _ = judge.see([to_pil(2 * image - 1) for image in images])
        assert least <= sum(shows(seen, n, each) for n, each in enumerate(asked)) <= most


def test_a_judge_in_bytes_is_the_judge(judge_file, tmp_path):
    """Each weight is off by at most half a step of its own channel's scale, as measured on the file."""
    weights = torch.load(judge_file, weights_only=True)
    export_judge(weights, tmp_path / "judge.safetensors")
    judge = MeasuringJudge.load(tmp_path / "judge.safetensors")
    for name, value in judge.model.state_dict().items():
        exact = weights[name].float()
        largest = exact.flatten(1).abs().amax(dim=1) if exact.ndim > 1 else torch.zeros(len(exact))
        error = (value - exact).abs().reshape(len(exact), -1).amax(dim=1)
        assert (error <= 0.51 * largest / 127).all(), name


def test_what_is_no_judge(tmp_path):
    with pytest.raises(InputError, match="not there: python -m training measuring"):
        MeasuringJudge.load(tmp_path / "measuring.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="holds no measuring model"):
        MeasuringJudge.load(tmp_path / "other.pt")
    (tmp_path / "other.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match="holds no measuring model"):
        MeasuringJudge.load(tmp_path / "other.safetensors")
