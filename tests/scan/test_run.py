"""A scan in one go: sweep, scores, selection and report; what stops it early, and what demo 4 remembers of
it.
"""

import csv
import json
import os
import re
import signal
import threading
import zlib

import numpy as np
import pytest
from helpers.sweep import NANO, PROMPTS, ROOT, SETTINGS, other_weights
from PIL import Image

from flux.errors import InputError
from flux.images.io import read_image
from flux.metrics.base import Metric
from flux.scan.__main__ import main
from flux.scan.run import scan
from flux.scan.skipper import LayerSkipper
from flux.scan.sweep import read_sweep
from flux.settings.complete import resolve
from flux.settings.demos import ScanSettings, SkipSettings
from flux.settings.edits import EditSettings
from flux.vital_layers import find_vital_layers, remembered_scan
from flux.weights.checkpoint import open_checkpoint
from flux.weights.find import checkpoint_of

OWN = open_checkpoint(NANO.folder / NANO.repo_flow).fingerprint()
FILES = {"similarity.csv", "vital_layers.json", "vitality.png", "heat_map.png", "report.html", "grid.png"}
MANY = [f"picture number {number}" for number in range(14)]


def settings(folder, **changes) -> ScanSettings:
    return resolve(ScanSettings(**fields(folder, **changes)))


def fields(folder, **changes) -> dict:
    return {**SETTINGS, "top": 1, "num_steps": 1, "output_dir": str(folder), **changes}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing is remembered yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def small_model(monkeypatch, nano):
    """No test loads it once more."""
    monkeypatch.setattr("flux.loaded_model.LoadedModel.load", lambda settings, opened=None: nano)


@pytest.fixture
def plain_images(monkeypatch):
    """Images made at once, of a grey that tells their seed."""

    def make(skipper, task):
        return lambda: [Image.new("RGB", (96, 64), (task.seed % 256,) * 3)] * len(task.layer_sets)

    monkeypatch.setattr(LayerSkipper, "run", make)


class MadeByHand(Metric):
    """A metric that needs no loading."""

    @classmethod
    def load(cls, source=None, device="cpu"):
        return cls()


class Synthetic(MadeByHand):
    """A similarity for each layer, lower for later ones, give or take what the reference says. More `noise`
    than the steps between layers leaves their order open.
    """

    def __init__(self, noise: float = 0.001):
        self.noise = noise

    def compare(self, references, images):
        draw = np.random.default_rng(zlib.crc32(references[0].tobytes()))
        values = 0.9 - 0.05 * np.arange(len(images))
        return (values + self.noise * draw.standard_normal(len(images))).tolist()


@pytest.fixture
def synthetic(monkeypatch):
    """Scores at once; called, it sets their noise."""

    def use(noise: float = 0.001):
        for module in ("scan.run", "metrics.table"):
            monkeypatch.setattr(f"flux.{module}.load_metrics", lambda *_: {"dino": Synthetic(noise)})

    use()
    return use


@pytest.fixture
def numbers_only(plain_images, synthetic, monkeypatch):
    """Nothing is painted that the test does not look at."""
    for name in ("plot_heat_map", "plot_vitality", "write_report"):
        monkeypatch.setattr(f"flux.scan.publish.{name}", lambda *_, **__: None)


def demo_3(monkeypatch, folder, **more) -> None:
    monkeypatch.syspath_prepend(ROOT)
    import demo_3_dino

    file = folder.parent / "dino.json"
    file.write_text(json.dumps({"input_dir": str(folder), "device": "cpu", "top": 1, **more}))
    demo_3_dino.main(str(file))


def written(folder) -> dict:
    return json.loads((folder / "vital_layers.json").read_text())


# ---- everything in a row


def test_a_scan_writes_everything_and_demo_3_reads_it(tmp_path, monkeypatch, capsys):
    folder, file = tmp_path / "scan", tmp_path / "scan.json"
    metrics = ["dino", "psnr", "ssim"]
    file.write_text(json.dumps(fields(folder, metrics=metrics, layers=[0, 12, 5], watermark=False)))
    main(str(file), num_steps=2)
    assert capsys.readouterr().out == f"vital layers: [0]\n{folder / 'report.html'}\n"
    assert {path.name for path in folder.iterdir()} == FILES | {"run.json", "prompt_000", "prompt_001"}
    rows = list(csv.DictReader((folder / "similarity.csv").open()))
    assert list(rows[0]) == ["prompt", "layers", "metric", "similarity"]
    expected = [(p, layer, metric) for p in "01" for layer in ("00", "12", "05") for metric in metrics]
    assert [(row["prompt"], row["layers"], row["metric"]) for row in rows] == expected
    of = {(row["prompt"], row["layers"], row["metric"]): float(row["similarity"]) for row in rows}
    assert all(of[p, "00", metric] < of[p, "12", metric] for p in "01" for metric in metrics)

    found = written(folder)
    assert (found["vital_layers"], found["rule"]) == ([0], {"metric": "dino", "top": 1})
    assert (found["model"], found["checkpoint"], found["rows"]) == ("flux-nano", OWN, 2)
    assert found["protocol"] == json.loads((folder / "run.json").read_text())["settings"]
    assert found["nets"] == {"dino": NANO.dinov2}
    for name in ("vitality.png", "heat_map.png", "grid.png"):
        assert min(read_image(folder / name).size) > 100
    assert "a red car on the street" in (folder / "report.html").read_text()
    assert find_vital_layers(str(folder / "vital_layers.json"), NANO) == (0,)

    # The folder is demo 2's: demo 3 finds the same in it, beside it or elsewhere.
    first = {name: (folder / name).read_bytes() for name in FILES}
    demo_3(monkeypatch, folder, metrics=metrics, output_dir=str(tmp_path / "dino"))
    assert {path.name for path in (tmp_path / "dino").iterdir()} == FILES - {"grid.png"}
    for name in ("similarity.csv", "vital_layers.json"):
        assert (tmp_path / "dino" / name).read_bytes() == first[name]
    demo_3(monkeypatch, folder, metrics=metrics, top=3)
    assert written(folder)["vital_layers"] == [0, 5, 12]
    assert (folder / "similarity.csv").read_bytes() == first["similarity.csv"]
    # A second scan makes no images, and says the same as the first.
    monkeypatch.setattr(LayerSkipper, "run", lambda *_: pytest.fail("made images again"))
    main(str(file), num_steps=2)
    for name in ("similarity.csv", "vital_layers.json"):
        assert (folder / name).read_bytes() == first[name]


@pytest.mark.parametrize("layers", [[[0, 1], [5]], [[0, 1], [5, 6]]], ids=["one alone", "pairs only"])
@pytest.mark.parametrize("rule", [{"top": 1}, {"top": None, "gap": True}], ids=["top", "gap"])
def test_sets_of_layers_are_scored_but_never_vital(tmp_path, plain_images, synthetic, layers, rule):
    given = settings(tmp_path, layers=layers, prompts=MANY[:8], **rule)
    assert scan(given, progress=False) == [layer for [layer, *more] in layers if not more]
    assert set(written(tmp_path)["vitality"]) == {"-".join(f"{n:02d}" for n in entry) for entry in layers}


def test_two_scans_that_differ_only_in_how_they_score_share_a_folder(tmp_path, numbers_only):
    assert scan(settings(tmp_path), progress=False) == [5]
    assert scan(settings(tmp_path, top=2, stop_when="stable"), progress=False) == [5, 12]
    with pytest.raises(InputError, match=r"differs in num_steps"):
        scan(settings(tmp_path, num_steps=2), progress=False)


# ---- early stop


@pytest.mark.parametrize(("stop_when", "name"), [("never", "skip:"), ("stable", "skip, at most:")])
def test_the_time_of_a_scan_that_may_stop_is_an_upper_bound(stop_when, name, tmp_path, numbers_only, capsys):
    scan(settings(tmp_path, stop_when=stop_when))
    assert name in capsys.readouterr().err


def test_a_settled_scan_stops(tmp_path, synthetic, monkeypatch, capsys):
    """After eight prompts the set is settled: while the eighth is scored the ninth is made, and that is all.
    Begun anew it ends at the same place, and demo 3 takes the nine for a whole sweep.
    """
    given = settings(tmp_path / "scan", prompts=MANY, stop_when="stable", width=64, batch_size=2)
    assert scan(given, progress=False) == [5]
    assert capsys.readouterr().out == "the vital layers are settled after 8 references\n"
    folder = tmp_path / "scan"
    first = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found = written(folder)
    assert (found["stable"], found["stable_after"], found["rows"]) == (True, 8, 9)
    assert len(list(folder.glob("prompt_*/*.png"))) == 9 * 4
    assert len((folder / "similarity.csv").read_text().splitlines()) == 1 + 9 * 3
    assert read_sweep(folder)[0]["rows"] == 9

    monkeypatch.setattr(LayerSkipper, "run", lambda *_: pytest.fail("made images again"))
    assert scan(given, progress=False) == [5]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == first
    demo_3(monkeypatch, folder, output_dir=str(tmp_path / "dino"))
    for name in ("similarity.csv", "vital_layers.json"):
        assert (tmp_path / "dino" / name).read_bytes() == first[folder / name]


def test_a_scan_that_was_killed_stops_at_the_same_place(tmp_path, numbers_only, monkeypatch):
    """Wherever it was stopped before."""
    given = {"prompts": MANY, "stop_when": "stable"}
    scan(settings(tmp_path / "whole", **given), progress=False)
    make, made = LayerSkipper.run, []

    def stop_at(count):
        def counted(skipper, task):
            if len(made) == count:
                raise KeyboardInterrupt
            made.append(task)
            return make(skipper, task)

        monkeypatch.setattr(LayerSkipper, "run", counted)

    for count in (1, 14, 35):
        stop_at(count)
        with pytest.raises(KeyboardInterrupt):
            scan(settings(tmp_path / "again", **given), progress=False)
    stop_at(99)
    scan(settings(tmp_path / "again", **given), progress=False)
    whole, again = (
        {path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*")}
        for name in ("whole", "again")
    )
    assert whole == again
    assert len([name for name in whole if name.suffix == ".png"]) == 9 * 4 + 1
    csvs = [(tmp_path / name / "similarity.csv").read_text() for name in ("whole", "again")]
    assert csvs[0] == csvs[1]


def test_an_open_scan_makes_all_prompts(tmp_path, numbers_only, synthetic, capsys):
    synthetic(noise=3)
    scan(settings(tmp_path, prompts=MANY, stop_when="stable"), progress=False)
    found = written(tmp_path)
    assert (found["stable"], found["stable_after"], found["rows"]) == (False, None, len(MANY))
    assert "settled" not in capsys.readouterr().out


def test_never_means_never(tmp_path, numbers_only):
    scan(settings(tmp_path, prompts=MANY), progress=False)
    found = written(tmp_path)
    assert (found["stable"], found["stable_after"], found["rows"]) == (True, 8, len(MANY))


# ---- what goes wrong


def test_scores_that_fail_end_the_scan_soon(tmp_path, plain_images, monkeypatch):
    """Not after all prompts: 64 of them may take a day."""

    class Failing(MadeByHand):
        def compare(self, references, images):
            raise InputError("Got an image that is too small")

    monkeypatch.setattr("flux.scan.run.load_metrics", lambda *_: {"dino": Failing()})
    with pytest.raises(InputError, match=r"too small"):
        scan(settings(tmp_path, prompts=[f"{number}" for number in range(60)]), progress=False)
    assert len(list(tmp_path.glob("prompt_*"))) < 60


def test_images_of_unequal_size(tmp_path, plain_images, monkeypatch, synthetic, capsys):
    scan(settings(tmp_path / "scan"), progress=False)
    Image.new("RGB", (16, 16)).save(tmp_path / "scan" / "prompt_001" / "skip_05.png")
    with pytest.raises(InputError, match=r"unequal size.*skip_05.png has 16x16 .* reference 96x64"):
        scan(settings(tmp_path / "scan"), progress=False)
    with pytest.raises(SystemExit):
        demo_3(monkeypatch, tmp_path / "scan")
    assert re.search(r"error: Got images of unequal size: .*\n", capsys.readouterr().err)


def test_demo_3_tells_what_the_folder_lacks(tmp_path, plain_images, monkeypatch, synthetic, capsys):
    """No sweep at all, or one without a reference: one line and status 2."""
    scan(settings(tmp_path / "scan"), progress=False)
    (tmp_path / "scan" / "prompt_001" / "reference.png").unlink()
    (tmp_path / "empty").mkdir()
    for name, told in (("scan", "lacks 1 of its 8 images .*prompt_001/reference.png"), ("empty", "no run")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            demo_3(monkeypatch, tmp_path / name)
        assert stopped.value.code == 2
        assert re.fullmatch(rf"error: Got .*{told}.*\n", capsys.readouterr().err)


def test_ctrl_c_does_not_wait_for_all_scores(tmp_path, plain_images, monkeypatch, capsys, request):
    """A scan that goes on finds many rows to score at once; those that wait are dropped."""
    scored = []

    class Slow(MadeByHand):
        def compare(self, references, images):
            scored.append(threading.current_thread())
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(0.2)
            return [0.5] * len(images)

    monkeypatch.setattr("flux.scan.run.load_metrics", lambda *_: {"dino": Slow()})
    # Started in the background, a program ignores Ctrl-C, and so would this test.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, ours))
    file = tmp_path / "scan.json"
    file.write_text(json.dumps(fields(tmp_path / "scan", prompts=MANY)))
    with pytest.raises(SystemExit) as stopped:
        main(str(file))
    assert stopped.value.code == 130
    assert len(scored) < 4
    assert capsys.readouterr().err.endswith("\nstopped; what was already written stays\n")


# ---- what demo 4 remembers

WHOLE = {"layers": "all", "prompts": MANY[:8], "top": 2}


def auto(**changes) -> tuple[int, ...]:
    """The layers that demo 4 takes, left alone: the most vital first."""
    given = resolve(EditSettings(prompt="a dog", edits=["a cat"], device="cpu", **changes))
    return find_vital_layers(given.vital_layers, NANO, checkpoint_of(given))


def test_a_scan_of_this_checkpoint_goes_before_the_preset(tmp_path, numbers_only, capsys):
    assert auto() == NANO.vital_layers
    assert scan(settings(tmp_path / "scan", **WHOLE), progress=False) == [13, 14]
    assert remembered_scan(OWN).read_bytes() == (tmp_path / "scan" / "vital_layers.json").read_bytes()
    assert str(remembered_scan(OWN)).startswith(str(tmp_path / "cache"))
    capsys.readouterr()
    assert auto() == (14, 13)
    assert str(remembered_scan(OWN)) in capsys.readouterr().out
    # What was named is not looked up.
    assert auto(vital_layers=[3]) == (3,)


def test_demo_3_is_remembered_as_well(tmp_path, numbers_only, monkeypatch):
    """The last word counts."""
    scan(settings(tmp_path / "scan", **WHOLE), progress=False)
    demo_3(monkeypatch, tmp_path / "scan", top=3, output_dir=str(tmp_path / "dino"))
    assert auto() == (14, 13, 12)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts": MANY[:7]},
        {"prompts": MANY[:4], "seeds": 2},
        {"layers": list(range(15))},
        {"layers": [0, 12, 5]},
        {"scale": 0.5},
        {"top": None, "threshold": 2.0},
    ],
    ids=str,
)
def test_what_cannot_stand_for_a_checkpoint_is_not_remembered(tmp_path, numbers_only, changes):
    """Too few prompts, not all layers, not skipped, or nothing vital found."""
    scan(settings(tmp_path / "scan", **{**WHOLE, **changes}), progress=False)
    assert not (tmp_path / "cache").exists()
    assert auto() == NANO.vital_layers


def test_other_weights_are_not_served(tmp_path, numbers_only):
    """Neither the other's scan to this checkpoint nor this one's to the other."""
    other = str(other_weights(tmp_path / "other.safetensors"))
    scan(settings(tmp_path / "other", weights=other, **WHOLE), progress=False)
    assert auto() == NANO.vital_layers
    assert auto(weights=other) == (14, 13)
    scan(settings(tmp_path / "own", **{**WHOLE, "top": 1}), progress=False)
    assert auto() == (14,)
    assert auto(weights=other) == (14, 13)
    # By content, not by name.
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((NANO.folder / NANO.repo_flow).read_bytes())
    assert auto(weights=str(copy)) == (14,)


def test_a_cache_that_cannot_be_written(tmp_path, numbers_only, capsys):
    """The scan is there all the same."""
    (tmp_path / "cache").write_text("in the way")
    assert scan(settings(tmp_path / "scan", **WHOLE), progress=False) == [13, 14]
    assert "not remembered" in capsys.readouterr().out
    assert written(tmp_path / "scan")


def test_a_sweep_of_demo_2_is_a_scans(tmp_path, numbers_only):
    """Demo 2 and a scan go on with each other's folder."""
    from flux.scan.sweep import sweep

    given = fields(tmp_path / "scan")
    given.pop("top")
    sweep(resolve(SkipSettings(**given)), progress=False)
    assert scan(settings(tmp_path / "scan"), progress=False) == [5]
    assert [entry.model_dump() for entry in read_sweep(tmp_path / "scan")[2]] == PROMPTS
