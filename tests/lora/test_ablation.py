"""A small ablation of flux-nano's own LoRA: images, scores, folders that are resumed or refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import weight_files
from helpers.images import difference
from helpers.lora_files import file_of, pairs

from flux.errors import InputError
from flux.images.io import read_image
from flux.lora import ablation as module
from flux.lora.ablation import BASE, FULL, Ablation, UpdateAblator, variant_of
from flux.lora.effects import ablate, effects_text
from flux.lora.live import load_live
from flux.metrics.base import Metric
from flux.settings.ablate import AblateSettings
from flux.settings.complete import resolve
from flux.settings.files import check_settings, read_settings
from flux.settings.train import TrainSettings
from flux.specs import NANO_FOLDER

LORA = str(NANO_FOLDER / "schnell_lora.safetensors")
PROMPTS = [{"prompt": "a dog on the grass", "seed": 3}, {"prompt": "a red car on the street", "seed": 9}]


def settings_of(folder, **changes):
    given = {
        "prompts": PROMPTS, "lora": [LORA], "layers": [2, 4, 14], "width": 64, "height": 48, "num_steps": 1,
        "top": 1, "device": "cpu", "dtype": "float32", "batch_size": 2, "output_dir": str(folder),
    }  # fmt: skip
    return resolve(check_settings(AblateSettings, given | changes))


class Darkness(Metric):
    """1 minus the mean difference of the pixels, so that scores can be counted by hand."""

    @classmethod
    def load(cls, source=None, device="cpu"):
        return cls()

    def compare(self, references, images):
        pairs = zip(references, images, strict=True)
        return [1 - float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()) for a, b in pairs]


METRICS = {"dino": Darkness()}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_live(settings_of(tmp_path_factory.mktemp("unused")))


@pytest.fixture(scope="module")
def ablated(loaded, tmp_path_factory):
    """The folder of a finished ablation, and its effects."""
    folder = tmp_path_factory.mktemp("ablated")
    return folder, ablate(settings_of(folder), loaded, metrics=METRICS, progress=False)


def test_images(ablated, loaded, nano):
    """The whole LoRA, none of it, and all but one layer's update, each from the same noise."""
    folder, _ = ablated
    ablation, (pipe, live) = Ablation(settings_of(folder)), loaded

    def expected(pipe):
        settings = ablation.settings
        prompts, seeds = [entry["prompt"] for entry in PROMPTS], [entry["seed"] for entry in PROMPTS]
        return pipe.generate(prompts, seeds, **settings.sampling(), progress=False)

    def differences(variant, images):
        made = [read_image(ablation.image_path(row, variant)) for row in range(2)]
        return [difference(a, b) for a, b in zip(made, images, strict=True)]

    assert differences(BASE, expected(nano)) == [0, 0]
    live.set_strength(1.0, {4: 0.0})
    assert differences(variant_of((4,)), expected(pipe)) == [0, 0]
    assert min(differences(FULL, expected(pipe))) > 0
    live.set_strength(1.0)
    assert differences(FULL, expected(pipe)) == [0, 0]


def test_scores_are_those_of_the_images(ablated):
    folder, effects = ablated
    data = json.loads((folder / "ablation.json").read_text(encoding="utf-8"))
    ablation = Ablation(settings_of(folder))

    def change(reference, variant):
        images = [[read_image(ablation.image_path(row, v)) for v in (reference, variant)] for row in (0, 1)]
        return np.mean([1 - METRICS["dino"].compare([a], [b])[0] for a, b in images])

    for layer in (2, 4, 14):
        scores = data["layers"][f"{layer:02d}"]
        assert scores["effect"] == pytest.approx(change(FULL, variant_of((layer,))), abs=1e-6)
        assert scores["to_base"] == pytest.approx(change(BASE, variant_of((layer,))), abs=1e-6)
    assert data["whole"]["effect"] == pytest.approx(change(FULL, BASE), abs=1e-6)
    largest = max(data["layers"], key=lambda name: data["layers"][name]["effect"])
    assert data["chosen"] == [int(largest)]
    assert f"{largest}  " in effects_text(ablation.settings, effects).splitlines()[1]


def test_files(ablated):
    folder, _ = ablated
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert names == {
        "run.json", "ablation.json", "effect.png", "heat_map.png", "report.html", "similarity_to_full.csv",
        "similarity_to_base.csv",
    }  # fmt: skip
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Layers of schnell_lora.safetensors that matter in flux-nano" in page
    assert page.count('alt="without it: ') == 2
    assert "skipped" not in page


def test_resumed(ablated, loaded, tmp_path, monkeypatch):
    """Only what is missing is made again, and it is the same."""
    folder = shutil.copytree(ablated[0], tmp_path / "copy")
    lost = folder / "prompt_001" / "without_04.png"
    lost.unlink()
    made = []
    run = UpdateAblator.run
    monkeypatch.setattr(UpdateAblator, "run", lambda self, task: made.append(task.variant) or run(self, task))
    # Fields that change no image may differ.
    ablate(settings_of(folder, top=None, gap=True), loaded, metrics=METRICS, progress=False)
    assert made == [variant_of((4,))]
    before = ablated[0] / "prompt_001" / "without_04.png"
    assert difference(read_image(lost), read_image(before)) == 0


@pytest.mark.parametrize("changes", [{"num_steps": 2}, {"lora": [{"file": LORA, "weight": 0.5}]}])
def test_other_settings_are_refused(ablated, changes):
    with pytest.raises(InputError, match="which holds an ablation that differs in"):
        Ablation(settings_of(ablated[0], **changes))


def test_sets_and_a_part_of_the_update(loaded, tmp_path):
    settings = settings_of(tmp_path, layers=[[2, 4]], scale=0.5, prompts=PROMPTS[:1])
    ablate(settings, loaded, metrics=METRICS, progress=False)
    assert (tmp_path / "prompt_000" / "without_02-04.png").is_file()


def test_all_layers_are_those_of_the_lora(tmp_path, nano):
    weights = nano.model.state_dict()
    modules = ("single_blocks.2.linear2", "double_blocks.1.img_attn.proj")
    file = weight_files.save(file_of(pairs(weights, modules), lambda m: m), tmp_path / "lora.safetensors")
    settings = settings_of(tmp_path / "out", layers="all", lora=[str(file)])
    assert Ablation(settings).layer_sets == [(1,), (7,)]
    with pytest.raises(
        InputError, match=r"Got layers \[3\], in which .* changes nothing: it changes \[1, 7\]"
    ):
        Ablation(settings_of(tmp_path / "other", layers=[3, 7], lora=[str(file)]))


def test_results_travel_between_processes(loaded, tmp_path):
    work = UpdateAblator(settings_of(tmp_path), loaded)
    task = Ablation(settings_of(tmp_path)).tasks[0]
    images = work.run(task)()
    travelled = module.UpdateAblator.unpack(work.pack(lambda: images))()
    assert [difference(a, b) for a, b in zip(images, travelled, strict=True)] == [0, 0]


def test_shipped_configs():
    """Their LoRAs are flux-nano's own, found from any folder, and one that the shipped training writes."""
    own, subject = (read_settings(AblateSettings, name) for name in ("ablate.json", "ablate_subject.json"))
    assert Path(own.lora[0].file).samefile(LORA)
    assert Path(subject.lora[0].file).parent == Path(read_settings(TrainSettings, "train.json").output_dir)


@pytest.mark.parametrize("loras", [[], [LORA, LORA]])
def test_one_lora(loras):
    with pytest.raises(InputError, match=f"lora: expected one, whose layers are left out, got {len(loras)}"):
        check_settings(AblateSettings, {"prompts": ["a"], "top": 1, "lora": loras})


def test_a_lora_of_another_model(tmp_path):
    with pytest.raises(InputError, match="a LoRA for flux-nano, but the model is flux-dev"):
        Ablation(settings_of(tmp_path, model="flux-dev"))
    assert not list(tmp_path.iterdir())
