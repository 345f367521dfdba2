"""The package's own code loads exported files, and training continues from them."""

from dataclasses import replace

import torch

from flux.model import Flux
from flux.modules.conditioner import HFEmbedder
from flux.weights.load import read_weights
from training.evaluate import ExportedModels
from training.stages.export import scaled_fp8, take_over
from training.stages.flow import first_generator, train_flow, without_guidance
from training.stages.schnell import merged
from training.stages.text import train_text
from training.stages.tokenizers import CLIP_LENGTH, T5_LENGTH


def test_scaled_fp8_reads_back(tmp_path):
    from safetensors.torch import save_file

    weights = {"a.weight": torch.randn(64, 48) * 0.02, "a.bias": torch.randn(64)}
    save_file(scaled_fp8(weights), tmp_path / "w.safetensors")
    read = read_weights(tmp_path / "w.safetensors", "cpu", torch.float32)
    assert read.keys() == weights.keys()
    error = (read["a.weight"] - weights["a.weight"]).norm() / weights["a.weight"].norm()
    assert error < 0.04
    torch.testing.assert_close(read["a.bias"], weights["a.bias"], atol=2e-3, rtol=1e-3)


def test_exported_files_load_as_the_package_loads_them(work):
    assets = work.folder / "assets"
    weights = read_weights(assets / "transformer.safetensors", "cpu", torch.float32)
    Flux(replace(work.sizes.flux, guidance_embed=True)).load_state_dict(weights)
    lora = read_weights(assets / "schnell_lora.safetensors", "cpu", torch.float32)
    Flux(work.sizes.flux).load_state_dict(merged(without_guidance(weights), lora))
    t5 = HFEmbedder(
        str(assets / "text_encoder_2"), T5_LENGTH, str(assets / "tokenizer_2"), dtype=torch.float32
    )
    clip = HFEmbedder(
        str(assets / "text_encoder"), CLIP_LENGTH, str(assets / "tokenizer"), dtype=torch.float32
    )
    assert t5(["a dog", ""]).shape == (2, T5_LENGTH, work.sizes.flux.context_in_dim)
    features = clip(["a dog", "a cat"])
    assert features.shape == (2, work.sizes.flux.vec_in_dim)
    assert not torch.equal(features[0], features[1])


def test_exported_files_are_trained_further(work, tmp_path):
    """Training begins with the model at guidance 1 and its text encoders. All other files are copied."""
    further = replace(work, folder=tmp_path, begin=work.folder / "assets")
    take_over(further)
    begun, models = first_generator(further).eval(), ExportedModels(work, further.begin)
    ids, t = torch.zeros(1, 4, 3), torch.tensor([0.4])
    x, txt_ids = torch.randn(1, 4, 64), torch.zeros(1, T5_LENGTH, 3)
    cond = models.conditioning(["a dog"], 1.0)
    with torch.no_grad():
        guided = models.flux("nano")(x, ids, cond.txt, txt_ids, t, cond.vec, cond.guidance)
        torch.testing.assert_close(begun.flux(x, ids, cond.txt, txt_ids, t, cond.vec), guided)
    assert train_text(further)
    assert train_flow(further, "flow256")
    assert (tmp_path / "flow128.done").exists()
    assert not (tmp_path / "flow128.pt").exists()
