"""Several LoRAs as one file, or merged into a checkpoint: the same numbers as loading them together."""

import pytest
import torch
from helpers import tiny_models, weight_files
from helpers.lora_files import MODULES, file_of, pairs
from safetensors.torch import load_file

from flux.errors import InputError
from flux.lora.__main__ import main
from flux.lora.contents import open_lora
from flux.lora.merge import merge, merge_into
from flux.specs import NANO_FOLDER


@pytest.fixture
def files(tiny, weights, tmp_path):
    """One of kohya's, and one in diffusers' names with other ranks and modules."""
    first = file_of(pairs(weights, MODULES), lambda m: "lora_unet_" + m.replace(".", "_"), 2.0)
    second = {}
    for module, (down, up) in pairs(weights, MODULES[2:8], rank=3, seed=5).items():
        for name, part in tiny_models.to_diffusers_transformer({f"{module}.weight": up}, 32).items():
            stem = f"transformer.{name.removesuffix('.weight')}"
            second |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": part}
    return (
        weight_files.save(first, tmp_path / "first.safetensors", title="a"),
        weight_files.save(second, tmp_path / "second.safetensors", title="b", other="c"),
    )


def together(base, files, weights):
    return weight_files.velocity(weight_files.load(base, loras=list(zip(files, weights, strict=True))))


@pytest.mark.parametrize("form", [None, "bfl", "diffusers"])
def test_one_file(base, files, tmp_path, form):
    out = tmp_path / "both.safetensors"
    merge(files, out, [0.5, -1.5], form=form)
    lora = open_lora(out)
    assert lora.names == {None: "kohya", "bfl": "BFL", "diffusers": "diffusers"}[form]
    assert {key: lora.file.checkpoint.metadata[key] for key in ("title", "other")} == {
        "title": "a",
        "other": "c",
    }
    found = together(base, [out], [1.0])
    assert tiny_models.relative_error(found, together(base, files, [0.5, -1.5])) < 2e-6


def test_ranks_add_up(files, tmp_path):
    merge(files, tmp_path / "both.safetensors")
    both = load_file(tmp_path / "both.safetensors")
    name = "lora_unet_" + MODULES[2].replace(".", "_")
    assert both[f"{name}.lora_down.weight"].shape == (7, 32)
    assert both[f"lora_unet_{MODULES[-1].replace('.', '_')}.lora_down.weight"].shape == (4, 32)


def test_into_a_checkpoint(base, files, tmp_path):
    out = tmp_path / "merged.safetensors"
    assert merge_into(base, files, out, [0.5, -1.5]) == "flux-dev"
    other = tmp_path / "other.safetensors"
    other.touch()
    assert out.stat().st_mode == other.stat().st_mode
    found = weight_files.velocity(weight_files.load(out))
    assert torch.equal(found, together(base, files, [0.5, -1.5]))


def test_another_form_into_packed_weights(tiny, tmp_path, monkeypatch):
    """The merged file has plain weights."""
    from dataclasses import replace

    from flux.specs import configs

    monkeypatch.setitem(configs, "flux-dev", replace(configs["flux-dev"], params=weight_files.WIDE))
    held = weight_files.save_gguf(weight_files.wide().state_dict(), tmp_path / "m.gguf", "Q8_0")
    module = "double_blocks.0.img_attn.proj"
    file = {f"{module}.lokr_w1": torch.randn(4, 4), f"{module}.lokr_w2": 0.1 * torch.randn(64, 64)}
    lora = weight_files.save(file, tmp_path / "lora.safetensors")
    merge_into(tmp_path / "m.gguf", [lora], tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    assert {x.dtype for x in merged.values()} == {torch.bfloat16}
    expected = held[f"{module}.weight"] + torch.kron(*file.values())
    assert tiny_models.relative_error(merged[f"{module}.weight"].float(), expected) < 1e-2
    assert tiny_models.relative_error(merged["img_in.weight"].float(), held["img_in.weight"]) < 1e-2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "[1]"], "Got 2 LoRAs and 1 weights, expected a weight for each"),
        (["--base", "nothing"], "which does not exist"),
        (["--base", "nothing", "--form", "bfl"], "leave them out with base"),
        ([str(NANO_FOLDER / "schnell_lora.safetensors")], "one for flux-nano: give LoRAs for one model"),
    ],
)
def test_errors_are_one_line(files, tmp_path, capsys, arguments, message):
    out = tmp_path / "out.safetensors"
    with pytest.raises(SystemExit) as ended:
        main(["merge", *map(str, files), *arguments, "--output", str(out)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_checkpoint_of_another_model(files, tmp_path):
    other = weight_files.save(weight_files.wide().state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(InputError, match="is not this model's"):
        merge_into(other, files, tmp_path / "out.safetensors")


def test_numbers_too_large_for_the_weights(base, files, tmp_path):
    with pytest.raises(InputError, match=r"has a number too large for torch\.float32: give smaller weights"):
        merge_into(base, files[:1], tmp_path / "out.safetensors", [1e39])
    assert not (tmp_path / "out.safetensors").exists()
