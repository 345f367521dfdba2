"""A training from its folder of images to its LoRA: what is refused, what is written, how it resumes."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from helpers import lora_training
from helpers.lora_training import settings
from PIL import Image
from safetensors.torch import load_file

from flux.errors import InputError
from flux.lora.train import TrainProgress, make_plan, train
from flux.settings.demos import ModelSettings
from flux.settings.files import check_settings
from flux.settings.train import TrainSettings
from flux.specs import configs
from flux.weights.find import find_model

pytestmark = [pytest.mark.gradients, pytest.mark.usefixtures("tiny_nano")]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> TrainSettings:
    """A training that ran through."""
    with lora_training.tiny_nano():
        given = settings(tmp_path_factory.mktemp("trained"))
        train(given)
    return given


# ---- what it writes


def test_a_training_leaves_these_files(trained):
    names = {str(path.relative_to(trained.output_dir)) for path in Path(trained.output_dir).rglob("*.*")}
    loras = {"lora.safetensors", *(f"lora_{step:06}.safetensors" for step in (3, 6, 9, 12))}
    samples = {f"samples/step_{step:06}_0.png" for step in (0, 5, 10, 12)}
    others = {
        "run.json",
        "features.safetensors",
        "state.safetensors",
        "curves.csv",
        "curves.png",
        "samples.png",
    }
    assert names == loras | samples | others
    last, whole = (Path(trained.output_dir, name) for name in ("lora_000012.safetensors", "lora.safetensors"))
    assert last.read_bytes() == whole.read_bytes()


def test_curves_begin_at_the_base(trained):
    with Path(trained.output_dir, "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [0, 5, 10, 12]
    assert rows[0]["prompt"] == "a flower bell on the grass"
    assert float(rows[0]["to_base"]) == 0
    assert float(rows[-1]["to_base"]) > 1e-4
    assert all(0 < float(row["to_nearest"]) <= float(row["to_training"]) for row in rows)


def test_the_lora_is_added_to_its_base_and_refused_by_another(trained):
    path = str(Path(trained.output_dir, "lora.safetensors"))
    opened = find_model(ModelSettings(weights=trained.weights, lora=path))
    opened.check()
    changed = {patch.place.module.rpartition(".")[0][:15] for patch in opened.transformer.patches}
    assert changed == {"double_blocks.1", "single_blocks.0"}
    configs["flux-nano"] = lora_training.WHOLE
    with pytest.raises(InputError, match="a difference for another model"):
        find_model(ModelSettings(lora=path)).check()


def test_the_file_tells_of_its_training(trained):
    from safetensors import safe_open

    with safe_open(Path(trained.output_dir, "lora.safetensors"), "pt") as file:
        about = file.metadata()
    assert about["base_model"] == "flux-nano"
    assert about["trigger_word"] == "flower bell"
    assert json.loads(about["layers"]) == [1, 2]
    assert json.loads(about["settings"])["learning_rate"] == 1e-2
    assert not any(trained.output_dir in value or trained.images in value for value in about.values())


# ---- resuming


def test_a_training_that_went_through_does_nothing_more(trained):
    state = Path(trained.output_dir, "state.safetensors")
    before, seen = state.stat().st_mtime_ns, []
    train(trained, seen.append)
    assert not seen
    assert state.stat().st_mtime_ns == before


def test_fewer_steps_than_were_taken_are_refused(trained):
    with pytest.raises(InputError, match=r"Got steps 5, but .*state\.safetensors has taken 12"):
        train(trained.model_copy(update={"steps": 5}))


def test_the_state_of_another_training_is_refused(trained):
    state = Path(trained.output_dir, "state.safetensors")
    whole = state.read_bytes()
    try:
        state.write_bytes(Path(trained.output_dir, "lora.safetensors").read_bytes())
        with pytest.raises(InputError, match="the state of another training: delete it to begin anew"):
            train(trained)
        state.write_bytes(whole[:-100])
        with pytest.raises(InputError, match=r"state\.safetensors"):
            train(trained)
    finally:
        state.write_bytes(whole)


def test_more_steps_go_on_from_the_last(tmp_path):
    """Six steps and six more are twelve, bit for bit."""
    seen: list[TrainProgress] = []
    for steps in (6, 12):
        train(settings(tmp_path, "halves", steps=steps, sample_prompts=[]), seen.append)
    whole = settings(tmp_path, "whole", sample_prompts=[])
    train(whole)
    assert [progress.step for progress in seen] == list(range(1, 13))
    assert len({progress.loss for progress in seen}) == 12
    one, two = (Path(tmp_path, name, "lora.safetensors").read_bytes() for name in ("halves", "whole"))
    assert one == two


def program(*arguments) -> None:
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "lora_training.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_killed_and_resumed_it_ends_with_the_same_files(tmp_path):
    """Killed twice in a row, at random moments of its start, its steps and its saving."""
    program("kill", tmp_path, 2, 2)


@pytest.mark.slow
def test_killed_at_twenty_moments(tmp_path):
    program("kill", tmp_path, 20, 1)


def test_two_processes_train_as_one(tmp_path):
    """On batches of three, of which one process has two rows. Relative to the largest; measured 3.2e-6."""
    one = settings(tmp_path, "one", batch_size=3, sample_prompts=[], steps=6)
    train(one)
    program("share", tmp_path, "two", 2)
    factors = [load_file(Path(tmp_path, name, "lora.safetensors")) for name in ("one", "two")]
    for name, expected in factors[0].items():
        error = (factors[1][name] - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, name
    names = [sorted(path.name for path in Path(tmp_path, way).iterdir()) for way in ("one", "two")]
    assert names[0] == names[1]


def test_processes_wait_for_the_samples_of_the_first(tmp_path, monkeypatch):
    """torch ends a process that has waited for ten minutes, which encoding or sampling may well take."""
    from flux.runtime import parallel

    given = {}
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda **fields: given.update(fields))
    monkeypatch.setattr(parallel.dist, "get_rank", lambda: 1)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "TORCHELASTIC_RUN_ID": "test"}.items():
        monkeypatch.setenv(name, value)
    make_plan(settings(tmp_path, parallel=2, batch_size=2))
    assert given["timeout"] > timedelta(hours=24)


def test_an_edit_with_the_new_lora_under_injection(trained, tmp_path):
    """Scans and edits take it as any other LoRA, and it changes what they make."""
    import demo_4_edit

    fields = {"num_steps": 2, "width": 64, "height": 64, "edits": ["a cat on the grass"]}
    images = {}
    for name, loras in {"with": [str(Path(trained.output_dir, "lora.safetensors"))], "without": []}.items():
        with torch.inference_mode():
            demo_4_edit.main(
                "edit.json", **fields, weights=trained.weights, lora=loras, output_dir=str(tmp_path / name)
            )
        images[name] = Image.open(tmp_path / name / "edit_0.png").tobytes()
    assert images["with"] != images["without"]


@pytest.mark.parametrize(
    ("changed", "names"),
    [({"learning_rate": 1e-3}, "learning_rate"), ({"rank": 8}, "rank"), ({"seed": 1}, "seed")],
)
def test_another_training_is_refused(trained, changed, names):
    given = trained.model_copy(update=changed)
    with pytest.raises(InputError, match=f"a training that differs in {names}: give another output_dir"):
        train(given)


def test_other_images_are_refused(trained, tmp_path):
    images = lora_training.write_images(tmp_path / "images")
    (images / "0.txt").write_text("a [trigger] on the beach")
    with pytest.raises(InputError, match="that differs in training_images"):
        train(trained.model_copy(update={"images": str(images)}))


# ---- what is refused before anything loads


def refused(tmp_path, match: str, **fields) -> None:
    with pytest.raises(InputError, match=match) as error:
        make_plan(settings(tmp_path, **fields))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("content", [b"caf\xe9", bytes(20)])
def test_a_damaged_caption(content, tmp_path):
    Path(settings(tmp_path).images, "1.txt").write_bytes(content)
    refused(tmp_path, r"1\.txt, which is not UTF-8")


@pytest.mark.parametrize("subfolder", ["", "context"])
def test_samples_do_not_become_training_images(subfolder, tmp_path):
    """They would, at the next start, and the training could not resume."""
    place = os.path.join(tmp_path, "elsewhere", "..", "images", subfolder)
    refused(tmp_path, "where the training images are: .*give another folder", output_dir=place)
    make_plan(settings(tmp_path, output_dir=place, sample_prompts=[]))


def test_an_image_of_one_pixel(tmp_path):
    Image.new("RGB", (1, 1)).save(Path(settings(tmp_path).images, "1.png"))
    refused(tmp_path, r"1\.png of 1x1 pixels: expected at least 64")


def test_an_unreadable_image(tmp_path):
    path = Path(settings(tmp_path).images, "1.png")
    path.write_bytes(path.read_bytes()[:200])
    refused(tmp_path, r"Cannot read the image .*1\.png|1\.png, not a readable image")


def test_no_caption_and_no_trigger(tmp_path):
    Path(settings(tmp_path).images, "1.txt").unlink()
    for text in Path(settings(tmp_path).images).glob("*.txt"):
        text.write_text("a ball")
    refused(tmp_path, r"1\.png, which has no caption: write 1\.txt", trigger=None, sample_prompts=[])


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"model": "flux-schnell"}, "distilled to few steps.*Train on flux-dev"),
        ({"model": "flux-nano-schnell"}, "distilled to few steps.*Train on flux-nano"),
        ({"model": "flux-dev-fill"}, "which images steer: it cannot be trained here"),
        ({"layers": [4]}, r"\[4\].*layers 0\.\.3"),
        ({"layers": "folklore"}, "no file and no preset"),
        ({"rank": {"1": 4}}, r"no rank for layers \[2\]"),
        ({"parallel": 2, "batch_size": 2}, "start it with torchrun"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(tmp_path, fields, match):
    refused(tmp_path, match, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": [1, 1]}, "layers: expected each only once, got [1, 1]"),
        ({"layers": []}, "layers: expected at least one entry"),
        ({"parts": ["mlp", "mlp"]}, "parts: expected each only once"),
        ({"rank": 0}, "rank: expected at least 1, got 0"),
        ({"rank": {"1": 0}}, "rank.1: expected at least 1, got 0"),
        ({"compile": True}, "got compile true, which training has no use for"),
        ({"dtype": "float16"}, "got dtype float16, in which gradients overflow"),
        ({"offload": "blocks", "checkpointing": "off"}, 'got checkpointing "off" with streamed blocks'),
        ({"sample_prompts": ["a [trigger]"]}, "got [trigger] in sample_prompts, but no trigger: give one"),
        ({"parallel": 2}, "got batch_size 1 for 2 processes"),
    ],
)
def test_wrong_settings_are_told(fields, message):
    with pytest.raises(InputError) as error:
        check_settings(TrainSettings, {"images": "x", **fields})
    assert message in str(error.value)


def test_a_model_whose_vital_layers_nobody_knows(tmp_path, monkeypatch):
    monkeypatch.setitem(configs, "flux-nano", replace(lora_training.SPEC, vital_layers=None))
    refused(tmp_path, "vital layers of this model are not known: scan it")


def test_what_does_not_fit(tmp_path, monkeypatch):
    """Told with the stage and what to do, and before anything is written."""
    from flux.lora import forecast

    monkeypatch.setattr(forecast, "available", lambda device: 2**20)
    match = r"Got 0\.0 GiB of free memory on cpu, expected .* to sample at 256x192: make the samples smaller"
    refused(tmp_path, match, width=256, height=192)
    refused(tmp_path, "to train at 64x64 with 64 at once: give smaller sizes", batch_size=64, sizes=[64])
    assert not (tmp_path / "out").exists()


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    """The state of the last save stays, and the training resumes once there is room."""
    from flux.lora import trainer

    given = settings(tmp_path, sample_prompts=[])
    write = trainer.write_bytes

    def fail(path, data):
        if path.name == "state.safetensors" and path.exists():
            raise InputError(
                f"Cannot write {path} (no space left on device): make room or name another folder"
            )
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "write_bytes", fail)
        with pytest.raises(InputError, match="make room"):
            train(given)
    seen = []
    train(given, lambda progress: seen.append(progress.step))
    assert seen == list(range(4, 13))


def test_a_learning_rate_that_is_too_large(tmp_path):
    with pytest.raises(InputError, match=r"loss of .* in step .*: give a smaller learning_rate than 1e"):
        train(settings(tmp_path, learning_rate=1e30, sample_prompts=[]))


# ---- what is learnt


def test_a_lora_learns_what_the_velocity_is(trained):
    """The loss falls on images that are seen again and again; measured 0.75 of the first steps' loss."""
    given = settings(Path(trained.images).parent, "again", steps=60, learning_rate=3e-3, sample_prompts=[])
    losses = []
    train(given, lambda progress: losses.append(progress.loss))
    assert sum(losses[-20:]) < 0.85 * sum(losses[:20])


def test_weights_are_loaded_in_fewer_bits_and_streamed(tmp_path):
    """Both train to nearly the same factors as plain weights do; measured a cosine of 0.9999 in 8 bits."""
    ups = {}
    for name, fields in {
        "plain": {},
        "8bit": {"quantize": "8bit"},
        "streamed": {"offload": "blocks"},
    }.items():
        given = settings(tmp_path, name, sample_prompts=[], steps=3, save_every=3, **fields)
        ups[name] = torch.cat([x.flatten() for x in load_file(train(given)).values()])
    assert torch.equal(ups["streamed"], ups["plain"])
    cosine = torch.nn.functional.cosine_similarity(ups["8bit"], ups["plain"], dim=0)
    assert 0.999 < cosine < 1
