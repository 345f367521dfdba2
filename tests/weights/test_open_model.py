"""A model's files are opened once, for everything that a start does with them."""

import json
import shutil
from collections import Counter

import pytest
import torch
from helpers import weight_files
from helpers.evaluation import settings_of, write_squares

from flux.errors import InputError
from flux.evaluate.run import evaluate
from flux.loaded_model import LoadedModel
from flux.scan.run import scan
from flux.settings.complete import resolve
from flux.settings.demos import ModelSettings, ScanSettings
from flux.specs import NANO_FOLDER, configs
from flux.weights import checkpoint
from flux.weights.find import find_model, local_model
from flux.weights.open_model import ModelFiles, OpenFiles, OpenModel

SPEC = configs["flux-nano"]


@pytest.fixture
def reads(monkeypatch):
    """How often each file's header has been read."""
    counts, read = Counter(), checkpoint.read_header

    def counted(path):
        counts[path.name] += 1
        return read(path)

    monkeypatch.setattr(checkpoint, "read_header", counted)
    return counts


@pytest.fixture
def settings(tmp_path):
    """Paths of the user's own, a LoRA for the transformer and for CLIP, and a plan to be worked out."""
    shutil.copy(NANO_FOLDER / SPEC.repo_flow, tmp_path / "flow.safetensors")
    shutil.copy(NANO_FOLDER / SPEC.repo_ae, tmp_path / "ae.safetensors")
    width, clip_width = SPEC.params.hidden_size, SPEC.params.vec_in_dim
    modules = {
        "diffusion_model.double_blocks.0.img_attn.proj": width,
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": clip_width,
    }
    pairs = {f"{name}.lora_down.weight": torch.ones(2, size) for name, size in modules.items()}
    pairs |= {f"{name}.lora_up.weight": torch.ones(size, 2) for name, size in modules.items()}
    lora = weight_files.save(pairs, tmp_path / "lora.safetensors")
    return resolve(
        ModelSettings(
            weights=str(tmp_path / "flow.safetensors"),
            ae_weights=str(tmp_path / "ae.safetensors"),
            lora=({"file": str(lora), "weight": 0.5},),
            device="cpu",
            offload="auto",
        )
    )


def test_a_start_reads_each_header_once(settings, reads):
    """As demo 4 starts: the fingerprint tells a remembered scan, then the pipeline is loaded."""
    opened = local_model(settings)
    assert len(opened.fingerprint()) == 32
    LoadedModel.load(settings, opened=opened)
    expected = {"flow.safetensors": 1, "ae.safetensors": 1, "lora.safetensors": 1, "model.safetensors": 2}
    assert reads == expected, "the two text encoders have files of the same name"


def test_a_pipeline_alone_reads_each_header_once(settings, reads):
    LoadedModel.load(settings)
    assert set(reads.values()) == {1, 2}
    assert reads.total() == 5


def test_a_scan_reads_each_header_once(settings, reads, tmp_path):
    """Its folder names the checkpoint, at the start and at the end."""
    fields = {"prompts": ["a dog"], "layers": [3, 5], "top": 1, "stop_when": "never", "metrics": ["dino"]}
    sizes = {"width": 64, "height": 64, "num_steps": 1, "output_dir": str(tmp_path / "scan")}
    model = {name: getattr(settings, name) for name in ModelSettings.model_fields if name not in sizes}
    assert len(scan(resolve(ScanSettings(**{**model, **fields, **sizes})), progress=False)) == 1
    for name in ("flow.safetensors", "ae.safetensors", "lora.safetensors"):
        assert reads[name] == 1, name
    record = json.loads((tmp_path / "scan" / "run.json").read_text())
    assert record["checkpoint"] == find_model(settings).fingerprint()


def test_an_evaluation_reads_each_header_once(reads, tmp_path):
    """Its record names the checkpoint, and a method may ask for the remembered scan of it."""
    benchmark = write_squares(tmp_path / "benchmark")
    methods = [{"name": "Default", "vital_layers": "auto"}]
    settings = settings_of(benchmark, tmp_path / "out", methods=methods, count=1, num_steps=4)
    evaluate(settings, progress=False)
    assert reads == {"transformer.safetensors": 1, "ae.safetensors": 1, "model.safetensors": 2}
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["checkpoint"] == local_model(resolve(ModelSettings())).fingerprint()


def test_one_file_for_everything_is_opened_once(tmp_path, reads):
    opened = OpenFiles()
    file = weight_files.save({"a": torch.zeros(1)}, tmp_path / "all.safetensors")
    assert opened.open(file, "transformer") is opened.open(file, "vae") is opened.open(file)
    assert reads.total() == 1


def test_only_what_is_asked_for_is_opened(reads):
    """Programs written for upstream load one network at a time, from a place where the others are not."""
    files = ModelFiles(NANO_FOLDER / "nothing", NANO_FOLDER / SPEC.repo_ae, NANO_FOLDER / "nothing")
    OpenModel(SPEC, files).load_autoencoder("cpu", torch.float32)
    assert reads == {SPEC.repo_ae: 1}


def test_loading_twice_gives_two_models(settings):
    model = find_model(settings)
    first, second = (model.load_transformer("cpu", torch.float32) for _ in range(2))
    assert first is not second
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with torch.no_grad():
        first.img_in.weight.zero_()
    assert second.img_in.weight.abs().max() > 0


def test_a_model_that_is_not_here(settings):
    gone = settings.model_copy(update={"weights": "/nowhere.safetensors"})
    assert local_model(gone) is None
    with pytest.raises(InputError, match="does not exist"):
        find_model(gone)
