"""The sweep over flux-nano's layers: what its pictures are, and its folder, which survives what stops it."""

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

import numpy as np
import pytest
from helpers.sweep import NANO, PROMPTS, ROOT, SETTINGS, other_weights
from PIL import Image

import flux.scan.sweep as vitality
from flux.errors import InputError
from flux.images import io
from flux.images.io import read_image, read_metadata
from flux.intervention import Intervention
from flux.metrics.table import load_metrics
from flux.pipeline import Pipeline
from flux.sampling import sample
from flux.scan.similarity import score
from flux.scan.layers import layer_sets
from flux.scan.sweep import LayerSkipper, Task, check_sweep, image_path, open_sweep, plan, sweep
from flux.settings.complete import resolve
from flux.settings.demos import SkipSettings
from flux.weights.checkpoint import open_checkpoint


def settings(folder, **changes) -> SkipSettings:
    return resolve(SkipSettings(**{**SETTINGS, "output_dir": str(folder), **changes}))


def run(pipe, folder, **changes):
    return sweep(settings(folder, **changes), pipe, progress=False)


@pytest.fixture(scope="module")
def swept(nano, tmp_path_factory):
    return run(nano, tmp_path_factory.mktemp("swept"))


@pytest.fixture
def copy(swept, tmp_path):
    """The finished sweep, to be damaged."""
    return shutil.copytree(swept, tmp_path / "copy")


@pytest.fixture
def made(monkeypatch):
    """The tasks whose pictures are made from here on."""
    tasks, make = [], LayerSkipper.run
    monkeypatch.setattr(LayerSkipper, "run", lambda self, task: tasks.append(task) or make(self, task))
    return tasks


def names(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def pictures(folder) -> set[str]:
    return {name for name in names(folder) if name.startswith("prompt")}


def difference(a: Image.Image, b: Image.Image) -> int:
    """The largest, in levels of 255."""
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def same_sweeps(a, b) -> bool:
    """The same files, the same pixels, and so the same scores."""
    return names(a) == names(b) and all(
        difference(read_image(a / name), read_image(b / name)) == 0 for name in pictures(a) | {"grid.png"}
    )


# ---- the pictures


def full(pipe, given: SkipSettings, layers: tuple[int, ...]) -> Image.Image:
    """A picture without shortcuts: every layer of every step computed for it alone."""
    prompt, size = given.prompts[0], (given.width, given.height)
    cond = pipe.condition([prompt.prompt], given.guidance, given.true_cfg, given.negative_prompt)
    levels = pipe.schedule(given.num_steps, *size)
    skipping = Intervention(skip=frozenset(layers), skip_scale=given.scale)
    *_, last = sample(
        pipe.model, pipe.noise([prompt.seed], *size), pipe.image_ids(1, *size), cond, levels, skipping
    )
    return pipe.decode(last.latent, *size, given.watermark)[0]


WAYS = {
    "plain": {"num_steps": 3},
    "scaled": {"scale": 0.5},
    "true CFG": {"true_cfg": 3.0, "negative_prompt": "grass"},
    "one step": {"num_steps": 1, "true_cfg": 3.0, "scale": 0.5},
}
# The first and the last layer, the last double-stream one and the first single-stream one, pairs across.
SETS = [(), (0,), (4,), (5,), (14,), (2, 9), (13, 14)]


@pytest.mark.parametrize("way", WAYS)
def test_the_first_steps_shortcut_changes_no_bit(nano, tmp_path, way):
    """What enters the first bypassed layer in the first step is the reference's own."""
    given = settings(tmp_path, **WAYS[way])
    skipper, found = LayerSkipper(given, nano), []
    for layers in SETS:
        [picture] = skipper.make(Task(0, *PROMPTS[0].values(), (layers,)))
        assert difference(picture, full(nano, given, layers)) == 0, layers
        found.append(picture.tobytes())
    assert len(set(found)) == len(SETS)


def test_the_shortcut_spares_the_layers_below(nano, tmp_path, monkeypatch):
    """In the only step, a picture without the last layer computes no layer, one without layer 12 the last
    two.
    """
    computed = []
    for layer, block in enumerate((*nano.model.double_blocks, *nano.model.single_blocks)):
        forward = block.forward

        def counted(*given, layer=layer, forward=forward, **more):
            computed.append(layer)
            return forward(*given, **more)

        monkeypatch.setattr(block, "forward", counted)
    skipper, expected = LayerSkipper(settings(tmp_path, num_steps=1), nano), {(14,): [], (12,): [13, 14]}
    skipper.make(Task(0, "a dog", 0, ((0,),)))
    for layers, layers_above in expected.items():
        computed.clear()
        skipper.make(Task(0, "a dog", 0, (layers,)))
        assert computed == layers_above


@pytest.mark.parametrize("way", ["plain", "scaled"])
def test_rows_of_a_batch_are_pictures_of_their_own(nano, tmp_path, way):
    """As one by one but for rounding; and whatever another row bypasses, not a bit of this row changes."""
    given = settings(tmp_path, **WAYS[way])
    skipper = LayerSkipper(given, nano)

    def batch(*sets):
        return skipper.make(Task(0, *PROMPTS[0].values(), sets))

    rows = batch((), (1,), (12,), (3, 8))
    for layers, row in zip([(), (1,), (12,), (3, 8)], rows):
        assert difference(row, full(nano, given, layers)) <= 1
    others = batch((6,), (1,), (12,), (14,))
    changed = [difference(row, other) for row, other in zip(rows, others)]
    assert changed[1] == changed[2] == 0
    assert changed[0] > 5 < changed[3]


def test_a_text_is_encoded_once_for_all_its_layers(nano, tmp_path, monkeypatch):
    texts, condition = [], nano.condition
    monkeypatch.setattr(nano, "condition", lambda *given: texts.append(given[0]) or condition(*given))
    run(nano, tmp_path, width=64, num_steps=1, true_cfg=2.0, batch_size=3)
    assert texts == [[entry["prompt"]] for entry in PROMPTS]


def test_tasks_of_a_sweep(tmp_path):
    """Batches never mix references; each prompt's seeds follow one another."""
    given = settings(tmp_path, seeds=2, layers=[4, 7], batch_size=2)
    assert [(e.prompt[:5], e.seed) for e in given.entries] == [
        ("a dog", 3), ("a dog", 4), ("a red", 9), ("a red", 10)
    ]  # fmt: skip
    tasks = plan(given, 15)
    assert [task.row for task in tasks] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [task.seed for task in tasks[::2]] == [3, 4, 9, 10]
    assert [task.layer_sets for task in tasks[:2]] == [((), (4,)), ((7,),)]


def test_all_layers_one_by_one():
    assert layer_sets("all", 15) == [(layer,) for layer in range(15)]
    assert layer_sets([3, 1], 15) == [(3,), (1,)]
    assert layer_sets([[7, 5], [1]], 15) == [(5, 7), (1,)]


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


def test_the_reference_is_the_plain_picture(nano, swept):
    [plain] = nano.generate(["a dog on the grass"], [3], **settings(swept).sampling(), progress=False)
    assert difference(plain, read_image(swept / "prompt_000" / "reference.png")) == 0


def test_batches_make_the_same_pictures(nano, swept, tmp_path):
    batched = run(nano, tmp_path, batch_size=3)
    assert names(batched) == names(swept)
    for name in pictures(swept):
        assert difference(read_image(swept / name), read_image(batched / name)) <= 1


def test_two_seeds_of_each_prompt(nano, swept, tmp_path):
    """prompt_000 and prompt_001 are the first prompt's two seeds, prompt_002 the second prompt's first."""
    folder = run(nano, tmp_path, seeds=2, layers=[12])
    _, sets, entries = check_sweep(folder)
    assert sets == [(12,)]
    assert [entry.seed for entry in entries] == [3, 4, 9, 10]
    for there, here in ((0, 0), (1, 2)):
        a, b = (image_path(*of, (12,)) for of in ((swept, there), (folder, here)))
        assert difference(read_image(a), read_image(b)) == 0
    seconds = read_metadata(image_path(folder, 3, ()))
    assert (seconds["prompt"], seconds["seed"]) == ("a red car on the street", 10)


def test_sets_of_layers(nano, tmp_path):
    """A list of lists bypasses each set as a whole; "05-07" in the file's name."""
    folder = run(nano, tmp_path, layers=[[7, 5], [1]], prompts=PROMPTS[:1], num_steps=1)
    assert {"prompt_000/skip_05-07.png", "prompt_000/skip_01.png"} <= names(folder)


def test_each_finished_reference_is_told_in_order(nano, swept, tmp_path, made):
    """The one that is enough is the last: a sweep that is started again ends there too, without a model."""
    told = []

    def enough(row: int) -> bool:
        assert len(list((tmp_path / f"prompt_{row:03d}").iterdir())) == 2
        return told.append(row) or row == 1

    given = settings(tmp_path, prompts=["a dog", "a cat", "a car", "a bus"], layers=[3], num_steps=1)
    sweep(given, nano, enough, progress=False)
    first = names(tmp_path)
    assert told == [0, 1]
    assert len(pictures(tmp_path)) == 4
    assert [entry.prompt for entry in check_sweep(tmp_path)[2]] == ["a dog", "a cat"]
    made.clear()
    sweep(given, None, enough, progress=False)
    assert told == [0, 1, 0, 1]
    assert not made
    assert names(tmp_path) == first
    # Told that nothing is ever enough, it goes on.
    run(nano, tmp_path, prompts=["a dog", "a cat", "a car", "a bus"], layers=[3], num_steps=1)
    assert len(made) == 4
    assert len(check_sweep(tmp_path)[2]) == 4


# ---- decoding beside the steps


@pytest.fixture
def beside(monkeypatch):
    """As on a GPU with room for all nets."""
    monkeypatch.setattr(vitality, "decodes_beside", lambda pipe: True)


def test_steps_do_not_wait_for_the_last_pictures(nano, swept, tmp_path, monkeypatch, beside):
    """Here a task is decoded only when the next one has been denoised; and no third one is begun."""
    waiting, decoded = [], []
    denoise, decode = LayerSkipper.denoise, LayerSkipper.decode

    def denoised(skipper, task):
        latents = denoise(skipper, task)
        waiting.append(len(waiting) + 1 - len(decoded))
        return latents

    def decode_late(skipper, latents):
        end = time.monotonic() + 60
        while len(waiting) < min(len(decoded) + 2, 8):
            assert time.monotonic() < end, "the steps wait"
            time.sleep(0.005)
        decoded.append(1)
        return decode(skipper, latents)

    monkeypatch.setattr(LayerSkipper, "denoise", denoised)
    monkeypatch.setattr(LayerSkipper, "decode", decode_late)
    assert same_sweeps(swept, run(nano, tmp_path))
    assert waiting == [1, *[2] * 7]


@pytest.mark.parametrize("error", [InputError("Got pictures full of NaN"), KeyboardInterrupt()], ids=repr)
def test_what_stops_the_thread_stops_the_sweep(nano, swept, tmp_path, monkeypatch, beside, error):
    """At the next task; started again, it ends as if undisturbed."""
    begun, decode = [], LayerSkipper.decode

    def failing(skipper, latents):
        begun.append(1)
        if len(begun) == 3:
            raise error
        return decode(skipper, latents)

    with monkeypatch.context() as patch:
        patch.setattr(LayerSkipper, "decode", failing)
        with pytest.raises(type(error)):
            run(nano, tmp_path)
    assert len(pictures(tmp_path)) == 2
    assert same_sweeps(swept, run(nano, tmp_path))


@pytest.mark.gpu
def test_decoding_on_a_stream_of_its_own_changes_no_bit(tmp_path, monkeypatch):
    given = settings(tmp_path / "beside", device="cuda", layers=list(range(12)), batch_size=2)
    pipe = Pipeline.load(given)
    assert LayerSkipper(given, pipe).decodes_beside
    folder = sweep(given, pipe, progress=False)
    monkeypatch.setattr(vitality, "decodes_beside", lambda pipe: False)
    other = sweep(given.model_copy(update={"output_dir": str(tmp_path / "other")}), pipe, progress=False)
    assert same_sweeps(folder, other)


# ---- stopped and started again


def test_a_finished_sweep_makes_nothing(swept):
    before = {name: (swept / name).stat().st_mtime_ns for name in pictures(swept)}
    run(None, swept)
    assert before == {name: (swept / name).stat().st_mtime_ns for name in pictures(swept)}


@pytest.mark.parametrize("size", [1, 3])
def test_only_what_is_missing_is_made(nano, swept, tmp_path, made, size):
    """A batch that is half there is made as a whole, so that its missing pictures are what they would have
    been; those that are there stay as they are.
    """
    folder = run(nano, tmp_path / "whole", batch_size=size)
    again = shutil.copytree(folder, tmp_path / "again")
    for layers in ((0,), (5,)):
        image_path(again, 1, layers).unlink()
    before = {name: (again / name).stat().st_mtime_ns for name in pictures(again)}
    made.clear()
    run(nano, again, batch_size=size)
    assert [task.layer_sets for task in made] == {1: [((0,),), ((5,),)], 3: [((), (0,), (12,)), ((5,),)]}[size]
    assert before.items() <= {name: (again / name).stat().st_mtime_ns for name in pictures(again)}.items()
    assert same_sweeps(folder, again)


LAYERS = list(range(12))


@pytest.fixture(scope="module")
def undisturbed(nano, tmp_path_factory):
    """By batch size."""
    folders = {}

    def of(size: int) -> Path:
        if size not in folders:
            folder = tmp_path_factory.mktemp("undisturbed")
            folders[size] = run(nano, folder, layers=LAYERS, batch_size=size)
        return folders[size]

    return of


@pytest.fixture
def start(tmp_path):
    """Starts demo 2 in a process of its own."""
    started = []

    def start(size: int) -> subprocess.Popen:
        fields = {**SETTINGS, "layers": LAYERS, "batch_size": size, "output_dir": str(tmp_path / "out")}
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


def wait_for_pictures(process: subprocess.Popen, folder: Path, more_than: int) -> None:
    end = time.monotonic() + 120
    while process.poll() is None and len(pictures(folder)) <= more_than and time.monotonic() < end:
        time.sleep(0.005)
    assert len(pictures(folder)) > more_than


@pytest.mark.parametrize(("size", "kills"), [(1, 2), (2, 1)])
def test_killed_at_any_moment_it_ends_as_if_undisturbed(nano, undisturbed, start, tmp_path, size, kills):
    chance, folder = random.Random(size), tmp_path / "out"
    for _ in range(kills):
        before = len(pictures(folder))
        process = start(size)
        wait_for_pictures(process, folder, before)
        time.sleep(chance.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert before < len(pictures(folder)) < 2 * (1 + len(LAYERS))
    # As if the kill had hit in the middle of a file.
    (folder / "prompt_000" / ".flux-0123456789abcdef.tmp").write_bytes(b"\x89PNG")
    run(nano, folder, layers=LAYERS, batch_size=size)
    assert same_sweeps(undisturbed(size), folder)
    metrics = load_metrics(("dino", "psnr"), {"dino": NANO.dinov2})
    assert score(undisturbed(size), metrics, False).csv() == score(folder, metrics, False).csv()


def test_ctrl_c_ends_in_one_line_and_loses_nothing(nano, undisturbed, start, tmp_path):
    folder, process = tmp_path / "out", start(1)
    wait_for_pictures(process, folder, 1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.endswith("\nstopped; what was already written stays\n")
    assert not list(folder.rglob("*.tmp"))
    there = pictures(folder)
    before = {name: (folder / name).read_bytes() for name in there}
    assert 1 < len(there) < 2 * (1 + len(LAYERS))
    run(nano, folder, layers=LAYERS)
    assert same_sweeps(undisturbed(1), folder)
    assert all((folder / name).read_bytes() == data for name, data in before.items())


@pytest.mark.parametrize("room", [0, 1, 4, 9], ids="{} files fit".format)
def test_a_full_disk(nano, swept, tmp_path, monkeypatch, room):
    """run.json, three pictures, all but the overview: whatever still fits, it is told and nothing is lost."""
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
            run(nano, tmp_path)
    assert len(names(tmp_path)) == room
    before = {name: (tmp_path / name).read_bytes() for name in pictures(tmp_path)}
    run(nano, tmp_path)
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
    """Pictures of two different sweeps in one folder would be scored as if they were one."""
    with pytest.raises(InputError, match=rf"another .*\b{field}\b.*another output_dir"):
        open_sweep(settings(swept, **changes))


def test_other_weights_of_the_same_name_are_refused(tmp_path):
    """A file that was trained on since, even if the sweep had only begun."""
    weights = tmp_path / "mine.safetensors"
    shutil.copy(NANO.folder / NANO.repo_flow, weights)
    given = settings(tmp_path / "out", weights=str(weights))
    open_sweep(given)
    open_sweep(given)
    other_weights(weights)
    with pytest.raises(InputError, match="another weights: give another output_dir"):
        open_sweep(given)


@pytest.mark.parametrize(
    "changes", [{"batch_size": 4}, {"offload": True}, {"compile": True}, {"workers": 2}], ids=str
)
def test_what_changes_no_picture_may_change(swept, changes):
    assert open_sweep(settings(swept, **changes)) == swept


def test_an_unknown_run_json_is_refused_and_stays(tmp_path):
    """Another demo's, or no JSON at all: it is told, and not written over."""
    for content, told in (('{"demo": "edit", "settings": {}}', "'edit' wrote"), ("{", "cannot be read")):
        (tmp_path / "run.json").write_text(content)
        for refuse in (check_sweep, lambda folder: open_sweep(settings(folder))):
            with pytest.raises(InputError, match=told):
                refuse(tmp_path)
        assert (tmp_path / "run.json").read_text() == content


def test_settings_that_cannot_be_are_told(copy):
    record = json.loads((copy / "run.json").read_text())
    record["settings"]["scale"] = 7
    (copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"^[^\n]*run\.json: scale: [^\n]*$"):
        check_sweep(copy)


@pytest.mark.parametrize(
    "content", [{}, {"prompt_000/skip_05.png": "", "notes.txt": ""}], ids=["empty", "foreign"]
)
def test_a_folder_without_a_sweep(tmp_path, content):
    for name in content:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="no run.json of demo_2_skip.py"):
        check_sweep(tmp_path)


@pytest.mark.parametrize(
    ("layers", "name"), [((5,), "prompt_001/skip_05.png"), ((), "prompt_001/reference.png")]
)
def test_an_unfinished_sweep(copy, layers, name):
    image_path(copy, 1, layers).unlink()
    with pytest.raises(InputError, match=f"lacks 1 of its 8 images.*{name}.*demo_2_skip.py finish it"):
        check_sweep(copy)


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ([0, 15], r"Got layers \[15\], but this model numbers its layers 0..14"),
        ([[2, 15]], r"Got layers \[15\]"),
        ([-1], "layers"),
        ([3, 4, 3], "once"),
        ([[7, 5], [5, 7]], "once"),
        ([], "layers"),
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
