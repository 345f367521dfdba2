"""The benchmark of rendered edits: that it is what its entries say, and that the judge asks for just that."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from flux.errors import InputError
from flux.evaluate.benchmark import read_benchmark
from flux.images.io import read_image
from training.benchmark import EDITS, draw, marked, write
from training.judge import Judge, asked, may_change, overlap, shows
from training.loop.nets import TOY
from training.scenes.labels import labels_of
from training.stages.vision import MeasuringNet, Seen

SIDE, COUNT = 64, 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    write(folder, COUNT, SIDE)
    return folder


def test_every_kind_is_there_in_turn(folder):
    items = read_benchmark(folder)
    assert [item.kind for item in items] == [list(EDITS)[number % len(EDITS)] for number in range(COUNT)]
    assert [item.seed for item in items] == list(range(COUNT))
    wanted = [item.asked for item in items if item.kind == "attribute"]
    assert "worn" in wanted[0]
    assert "colour" in wanted[1]


def test_pictures_differ_where_the_mask_says(folder):
    """For another background or time, all but the subject may differ; else nothing outside the mask does."""
    for item in read_benchmark(folder):
        before, after = (np.asarray(read_image(path), dtype=int) for path in (item.path, item.truth))
        outside = ~np.asarray(item.mask(SIDE, SIDE))
        differ = np.abs(before - after).max(axis=2)
        assert before.shape == (SIDE, SIDE, 3)
        assert differ.max() > 5, item
        if item.kind not in ("background", "time"):
            assert differ[outside].max() == 0, item
        else:
            assert outside.any()
            assert outside.mean() < 0.6


def test_a_longer_benchmark_begins_with_a_shorter_one(folder, tmp_path):
    write(tmp_path, 3, SIDE)
    short, long = (json.loads((each / "mapping_file.json").read_text()) for each in (tmp_path, folder))
    assert list(long.items())[:3] == list(short.items())
    for entry in short.values():
        files = [each / "annotation_images" / entry["image_path"] for each in (tmp_path, folder)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_marks():
    assert marked("a dog on snow", "a red dog on snow") == "a dog on snow"
    assert marked("a red dog on snow", "a dog in a room") == "a [red] dog [on snow]"


# ---- the judge


def as_seen(scene) -> Seen:
    """What a faultless net would see."""
    labels = labels_of(torch.tensor([scene.row()]))
    onehot = torch.nn.functional.one_hot
    return Seen(
        objects=8 * labels.objects - 4,
        worn=8 * labels.worn - 4,
        colours=labels.colours - 0.5,
        place=onehot(labels.place, 32).float(),
        time=onehot(labels.time, 3).float(),
        count=onehot(labels.count, 4).float(),
        x=labels.x,
    )


def test_what_is_asked_is_in_the_scene_after_and_not_before():
    for number in range(120):
        _, pair = draw(number)
        want = asked(pair.edit, pair.before.content, pair.after.content)
        assert shows(as_seen(pair.after), 0, want), (pair.edit, pair.after.caption)
        assert not shows(as_seen(pair.before), 0, want), (pair.edit, pair.before.caption)


def test_what_may_change_of_generated_pictures():
    old, new = np.zeros((40, 40), dtype=bool), np.zeros((40, 40), dtype=bool)
    old[20, 10], new[20, 20] = True, True
    local = may_change(old, new, {"objects": ["dog"]})
    assert np.argwhere(local).min(0).tolist() == [13, 3]
    assert np.argwhere(local).max(0).tolist() == [27, 27]
    scene = may_change(old | new, new, {"place": "beach"})
    assert np.argwhere(~scene).tolist() == [[20, 20]]
    assert overlap(old | new, new) == 0.5
    assert overlap(old, old & new) == 0


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A measuring net that has learned nothing, as training leaves it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("judge") / "measuring.pt"
    torch.save({name: x.half() for name, x in MeasuringNet(TOY).state_dict().items()}, path)
    return path


def test_a_judge_from_its_file(folder, file):
    judge = Judge.load(file)
    items = read_benchmark(folder)[:3]
    pictures = [read_image(item.path) for item in items]
    wanted = [item.asked for item in items]
    verdicts = judge.of(pictures, pictures, wanted)
    assert all(verdict.overlap in (0, 1) for verdict in verdicts)
    assert all(verdict.mask.shape == (SIDE, SIDE) for verdict in verdicts)
    seen, _ = judge.see(pictures)
    assert [verdict.success for verdict in verdicts] == [
        shows(seen, n, each) for n, each in enumerate(wanted)
    ]


def test_what_is_no_judge(tmp_path):
    with pytest.raises(InputError, match="not there: python -m training measuring"):
        Judge.load(tmp_path / "measuring.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="holds no measuring net"):
        Judge.load(tmp_path / "other.pt")


def test_an_evaluation_with_a_judge(folder, file, tmp_path, monkeypatch):
    """Of photographs by the benchmark's masks, of generated references by the judge's."""
    import flux.evaluate.run
    from flux.evaluate.methods import Made
    from flux.evaluate.settings import EvaluateSettings

    class Worker:
        def __init__(self, settings, pipe=None):
            self.generated = settings.references == "generated"

        def run(self, task):
            pictures = [Image.new("RGB", (SIDE, SIDE), "red") for _ in task.items]
            return [Made(picture, picture if self.generated else None, 0.0, 0.0) for picture in pictures]

    monkeypatch.setattr(flux.evaluate.run, "EvaluateWorker", Worker)
    for references in ("photo", "generated"):
        settings = EvaluateSettings(
            benchmark=str(folder),
            methods=[{"name": "x"}],
            references=references,
            judge=str(file),
            metrics=[],
            count=6,
            width=SIDE,
            height=SIDE,
            device="cpu",
            output_dir=str(tmp_path / references),
        )
        with torch.inference_mode():
            out = flux.evaluate.run.evaluate(settings, progress=False)
        assert "| x | " in (out / "summary.md").read_text()
        assert "| success | and 25 dB | overlap | PSNR |" in (out / "summary.md").read_text()
    # Another net is another judge, whatever its file is called.
    copy, other = (tmp_path / name for name in ("copy.pt", "other.pt"))
    copy.write_bytes(file.read_bytes())
    torch.save({name: x.half() for name, x in MeasuringNet(TOY).state_dict().items()}, other)
    for judge, outdated in ((copy, False), (other, True)):
        again = settings.model_copy(update={"judge": str(judge)})
        assert flux.evaluate.run.Store(again).outdated == outdated
