"""The sweep over flux-nano's layers: its folder, which survives whatever stops the sweep."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.images import difference
from helpers.sweep import (
    NANO,
    PROMPTS,
    ROOT,
    SETTINGS,
    image_names,
    names,
    other_weights,
    run_sweep,
    same_sweeps,
    skip_settings,
)

from flux.errors import InputError
from flux.images import io
from flux.images.io import read_image, read_metadata
from flux.metrics.table import load_metrics
from flux.scan.similarity import score
from flux.scan.skipper import LayerSkipper
from flux.scan.sweep import Sweep, image_path, open_sweep, plan, read_sweep
from flux.weights.checkpoint import open_checkpoint


@pytest.fixture
def made(monkeypatch):
    """The tasks whose images are made from here on."""
    tasks, make = [], LayerSkipper.run
    monkeypatch.setattr(LayerSkipper, "run", lambda self, task: tasks.append(task) or make(self, task))
    return tasks


def test_tasks_of_a_sweep(tmp_path):
    """Batches never mix references; each prompt's seeds follow one another."""
    given = skip_settings(tmp_path, seeds=2, layers=[4, 7], batch_size=2)
    assert [(e.prompt[:5], e.seed) for e in given.entries] == [
        ("a dog", 3), ("a dog", 4), ("a red", 9), ("a red", 10)
    ]  # fmt: skip
    tasks = plan(given, 15)
    assert [task.row for task in tasks] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [task.seed for task in tasks[::2]] == [3, 4, 9, 10]
    assert [task.layer_sets for task in tasks[:2]] == [((), (4,)), ((7,),)]


# ---- the folder


def test_files_of_a_sweep(swept):
    """Names that demo 3 and others build on."""
    each = {"reference.png", "skip_00.png", "skip_05.png", "skip_12.png"}
    expected = {f"prompt_{number:03d}/{name}" for number in (0, 1) for name in each}
    assert names(swept) == expected | {"grid.png", "run.json"}
    record = json.loads((swept / "run.json").read_text())
    assert record["demo"] == "skip"
    assert record["settings"]["layers"] == [0, 12, 5]
    assert record["settings"]["prompts"] == PROMPTS
    assert record["rows"] == 2
    assert record["checkpoint"] == open_checkpoint(NANO.folder / NANO.repo_flow).fingerprint()
    about = read_metadata(swept / "prompt_001" / "skip_05.png")
    assert (about["prompt"], about["seed"], about["bypassed"]) == ("a red car on the street", 9, [5])


def test_the_reference_is_the_plain_image(nano, swept):
    [plain] = nano.generate(["a dog on the grass"], [3], **skip_settings(swept).sampling(), progress=False)
    assert difference(plain, read_image(swept / "prompt_000" / "reference.png")) == 0


def test_batches_make_the_same_images(nano, swept, tmp_path):
    batched = run_sweep(nano, tmp_path, batch_size=3)
    assert names(batched) == names(swept)
    for name in image_names(swept):
        assert difference(read_image(swept / name), read_image(batched / name)) <= 1


def test_two_seeds_of_each_prompt(nano, swept, tmp_path):
    """prompt_000 and prompt_001 are the first prompt's two seeds, prompt_002 the second prompt's first."""
    folder = run_sweep(nano, tmp_path, seeds=2, layers=[12])
    _, sets, entries = read_sweep(folder)
    assert sets == [(12,)]
    assert [entry.seed for entry in entries] == [3, 4, 9, 10]
    for there, here in ((0, 0), (1, 2)):
        a, b = (image_path(*of, (12,)) for of in ((swept, there), (folder, here)))
        assert difference(read_image(a), read_image(b)) == 0
    seconds = read_metadata(image_path(folder, 3, ()))
    assert (seconds["prompt"], seconds["seed"]) == ("a red car on the street", 10)


def test_sets_of_layers(nano, tmp_path):
    """A list of lists skips each set as a whole; "05-07" in the file's name."""
    folder = run_sweep(nano, tmp_path, layers=[[7, 5], [1]], prompts=PROMPTS[:1], num_steps=1)
    assert {"prompt_000/skip_05-07.png", "prompt_000/skip_01.png"} <= names(folder)


def test_each_finished_reference_is_reported_in_order(nano, swept, tmp_path, made):
    """The one that is enough is the last: a sweep that is started again ends there too, without a model."""
    told = []

    def enough(row: int) -> bool:
        assert len(list((tmp_path / f"prompt_{row:03d}").iterdir())) == 2
        return told.append(row) or row == 1

    def start(pipe) -> None:
        begun = Sweep(given)
        begun.run(pipe, enough, progress=False)
        begun.finish()

    given = skip_settings(tmp_path, prompts=["a dog", "a cat", "a car", "a bus"], layers=[3], num_steps=1)
    start(nano)
    first = names(tmp_path)
    assert told == [0, 1]
    assert len(image_names(tmp_path)) == 4
    assert [entry.prompt for entry in read_sweep(tmp_path)[2]] == ["a dog", "a cat"]
    made.clear()
    start(None)
    assert told == [0, 1, 0, 1]
    assert not made
    assert names(tmp_path) == first
    # Told that nothing is ever enough, it goes on.
    run_sweep(nano, tmp_path, prompts=["a dog", "a cat", "a car", "a bus"], layers=[3], num_steps=1)
    assert len(made) == 4
    assert len(read_sweep(tmp_path)[2]) == 4


# ---- stopped and started again


def test_a_finished_sweep_makes_nothing(swept):
    before = {name: (swept / name).stat().st_mtime_ns for name in image_names(swept)}
    run_sweep(None, swept)
    assert before == {name: (swept / name).stat().st_mtime_ns for name in image_names(swept)}


@pytest.mark.parametrize("size", [1, 3])
def test_only_what_is_missing_is_made(nano, swept, tmp_path, made, size):
    """A batch that is half there is made as a whole, so that its missing images are what they would have
    been; those that are there stay as they are.
    """
    folder = run_sweep(nano, tmp_path / "whole", batch_size=size)
    again = shutil.copytree(folder, tmp_path / "again")
    for layers in ((0,), (5,)):
        image_path(again, 1, layers).unlink()
    before = {name: (again / name).stat().st_mtime_ns for name in image_names(again)}
    made.clear()
    run_sweep(nano, again, batch_size=size)
    assert [task.layer_sets for task in made] == {1: [((0,),), ((5,),)], 3: [((), (0,), (12,)), ((5,),)]}[
        size
    ]
    assert before.items() <= {name: (again / name).stat().st_mtime_ns for name in image_names(again)}.items()
    assert same_sweeps(folder, again)


LAYERS = list(range(12))


@pytest.fixture(scope="module")
def undisturbed(nano, tmp_path_factory) -> Path:
    return run_sweep(nano, tmp_path_factory.mktemp("undisturbed"), layers=LAYERS, batch_size=2)


@pytest.fixture
def start(tmp_path):
    """Starts demo 2 in a process of its own."""
    started = []

    def start() -> subprocess.Popen:
        fields = {**SETTINGS, "layers": LAYERS, "batch_size": 2, "output_dir": str(tmp_path / "out")}
        (tmp_path / "skip.json").write_text(json.dumps(fields))
        started.append(
            subprocess.Popen(
                [sys.executable, ROOT / "demo_2_skip.py", tmp_path / "skip.json"],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                # Started in the background, these tests ignore Ctrl-C, and so would what they start.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for_images(process: subprocess.Popen, folder: Path, more_than: int) -> None:
    end = time.monotonic() + 120
    while process.poll() is None and len(image_names(folder)) <= more_than and time.monotonic() < end:
        time.sleep(0.005)
    assert len(image_names(folder)) > more_than


def test_killed_at_any_moment_it_ends_as_if_undisturbed(nano, undisturbed, start, tmp_path):
    chance, folder = random.Random(0), tmp_path / "out"
    for _ in range(2):
        before = len(image_names(folder))
        process = start()
        wait_for_images(process, folder, before)
        time.sleep(chance.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert before < len(image_names(folder)) < 2 * (1 + len(LAYERS))
    # As if the kill had hit in the middle of a file.
    (folder / "prompt_000" / ".flux-0123456789abcdef.tmp").write_bytes(b"\x89PNG")
    run_sweep(nano, folder, layers=LAYERS, batch_size=2)
    assert same_sweeps(undisturbed, folder)
    metrics = load_metrics(("dino", "psnr"), {"dino": NANO.dinov2})
    assert score(undisturbed, metrics, False).csv() == score(folder, metrics, False).csv()


def test_ctrl_c_ends_in_one_line_and_loses_nothing(nano, undisturbed, start, tmp_path):
    folder, process = tmp_path / "out", start()
    wait_for_images(process, folder, 1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.endswith("\nstopped; what was already written stays\n")
    assert not list(folder.rglob("*.tmp"))
    there = image_names(folder)
    before = {name: (folder / name).read_bytes() for name in there}
    assert 1 < len(there) < 2 * (1 + len(LAYERS))
    run_sweep(nano, folder, layers=LAYERS, batch_size=2)
    assert same_sweeps(undisturbed, folder)
    assert all((folder / name).read_bytes() == data for name, data in before.items())


@pytest.mark.parametrize("room", [0, 1, 4, 9], ids="{} files fit".format)
def test_a_full_disk(nano, swept, tmp_path, monkeypatch, room):
    """run.json, three images, all but the overview: whatever still fits, nothing is lost."""
    written, write = [], Path.write_bytes

    def limited(path, data):
        if len(written) == room:
            write(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(io.Path, "write_bytes", limited)
        with pytest.raises(InputError, match=r"^Cannot write .* \(no space left on device\): make room"):
            run_sweep(nano, tmp_path)
    assert len(names(tmp_path)) == room
    before = {name: (tmp_path / name).read_bytes() for name in image_names(tmp_path)}
    run_sweep(nano, tmp_path)
    assert same_sweeps(swept, tmp_path)
    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())


# ---- folders that are refused


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_steps": 4}, "num_steps"),
        ({"prompts": PROMPTS[:1]}, "prompts"),
        ({"layers": [0, 1]}, "layers"),
        ({"scale": 0.5}, "scale"),
        ({"seeds": 2}, "seeds"),
        ({"width": 112}, "width"),
        ({"negative_prompt": "a cat"}, "negative_prompt"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"weights": "/other.safetensors"}, "weights"),
        ({"ae_weights": "/other.safetensors"}, "ae_weights"),
        ({"text_encoders": "/other"}, "text_encoders"),
    ],
    ids=str,
)
def test_another_sweeps_folder_is_refused(swept, changes, field):
    """Images of two different sweeps in one folder would be scored as if they were one."""
    with pytest.raises(InputError, match=rf"differs in .*\b{field}\b.*another output_dir"):
        open_sweep(skip_settings(swept, **changes))


def test_other_weights_of_the_same_name_are_refused(tmp_path):
    """A file that was trained on since, even if the sweep had only begun."""
    weights = tmp_path / "mine.safetensors"
    shutil.copy(NANO.folder / NANO.repo_flow, weights)
    given = skip_settings(tmp_path / "out", weights=str(weights))
    open_sweep(given)
    open_sweep(given)
    other_weights(weights)
    with pytest.raises(InputError, match=r"differs in weights: give another output_dir"):
        open_sweep(given)


@pytest.mark.parametrize(
    "changes", [{"batch_size": 4}, {"offload": True}, {"compile": True}, {"workers": 2}], ids=str
)
def test_what_changes_no_image_may_change(swept, changes):
    assert open_sweep(skip_settings(swept, **changes)) == swept


def test_an_unknown_run_json_is_refused_and_stays(tmp_path):
    """Another demo's, or no JSON at all: it is reported, and not written over."""
    for content, told in (
        ('{"demo": "edit", "settings": {}}', "a folder of demo 'edit'"),
        ("{", "cannot be read"),
    ):
        (tmp_path / "run.json").write_text(content)
        for refuse in (read_sweep, lambda folder: open_sweep(skip_settings(folder))):
            with pytest.raises(InputError, match=told):
                refuse(tmp_path)
        assert (tmp_path / "run.json").read_text() == content


def test_settings_that_cannot_be_are_refused(copy):
    record = json.loads((copy / "run.json").read_text())
    record["settings"]["scale"] = 7
    (copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"^[^\n]*run\.json: scale: [^\n]*$"):
        read_sweep(copy)


@pytest.mark.parametrize(
    "content", [{}, {"prompt_000/skip_05.png": "", "notes.txt": ""}], ids=["empty", "foreign"]
)
def test_a_folder_without_a_sweep(tmp_path, content):
    for name in content:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"no run.json of demo_2_skip.py"):
        read_sweep(tmp_path)


@pytest.mark.parametrize(
    ("layers", "name"), [((5,), "prompt_001/skip_05.png"), ((), "prompt_001/reference.png")]
)
def test_an_unfinished_sweep(copy, layers, name):
    image_path(copy, 1, layers).unlink()
    with pytest.raises(InputError, match=f"lacks 1 of its 8 images.*{name}.*demo_2_skip.py finish it"):
        read_sweep(copy)


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ([0, 15], r"Got layers \[15\], but this model numbers its layers 0..14"),
        ([-1], "layers"),
        ([3, 4, 3], "once"),
    ],
    ids=str,
)
def test_layers_out_of_range_or_repeated(tmp_path, monkeypatch, capsys, layers, told):
    """One line and status 2 from the demo itself, before anything is written."""
    monkeypatch.syspath_prepend(ROOT)
    import demo_2_skip

    path = tmp_path / "skip.json"
    path.write_text(json.dumps({**SETTINGS, "layers": layers, "output_dir": str(tmp_path / "out")}))
    with pytest.raises(SystemExit) as stopped:
        demo_2_skip.main(str(path))
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(told, err)
    assert not (tmp_path / "out").exists()
