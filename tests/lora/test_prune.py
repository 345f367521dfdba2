"""Pruned LoRA files: chosen layers, copied bit for bit, in every form."""

import json

import pytest
import torch
from helpers import weight_files
from helpers.lora_files import MODULES, file_of, pairs
from safetensors.torch import load_file

from flux.errors import InputError
from flux.lora.__main__ import main
from flux.lora.contents import open_lora
from flux.lora.prune import choose_layers, prune, read_scores
from flux.lora.report import look_into, write_report
from flux.specs import NANO_FOLDER
from flux.weights.lora_places import layer_of

SCORES = {0: 0.5, 1: 0.1, 2: 0.1, 6: 0.3, 4: -0.2}


@pytest.fixture
def source(tiny, weights, tmp_path):
    file = file_of(pairs(weights), lambda m: "lora_unet_" + m.replace(".", "_"), 2.0)
    return weight_files.save(file, tmp_path / "x.safetensors", ss_steps="1500")


@pytest.fixture
def scores(tmp_path):
    data = {"layers": {f"{layer:02d}": {"effect": score} for layer, score in SCORES.items()} | {"00-01": {}}}
    path = tmp_path / "ablation.json"
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("outside", [True, False])
def test_kept_layers_are_the_same_bits(source, base, weights, tmp_path, outside):
    out = tmp_path / "small.safetensors"
    assert prune(source, out, [0, 6, 5], outside=outside) == [0, 6]
    before, after = load_file(source), load_file(out)
    kept = {m for m in MODULES if layer_of(m, 3) in ((0, 6, None) if outside else (0, 6))}
    assert {name.partition(".")[0] for name in after} == {"lora_unet_" + m.replace(".", "_") for m in kept}
    assert all(torch.equal(x, before[name]) for name, x in after.items())
    metadata = open_lora(out).file.checkpoint.metadata
    assert (metadata["ss_steps"], metadata["layers"]) == ("1500", "[0, 6]")
    if outside:
        chosen = weight_files.load(base, loras=[(source, 1.0, (0, 6))])
        assert weight_files.same(weight_files.load(base, loras=[(out, 1.0)]), chosen)


def test_a_file_in_8_bits_keeps_its_scales(tmp_path):
    out = tmp_path / "small.safetensors"
    prune(NANO_FOLDER / "schnell_lora.safetensors", out, [4, 0])
    small, whole = (open_lora(path) for path in (out, NANO_FOLDER / "schnell_lora.safetensors"))
    assert small.layers == [0, 4]
    assert out.stat().st_size < 0.5 * whole.path.stat().st_size
    kept = {patch.name: patch for patch in small.patches}
    for patch in whole.patches:
        if patch.name in kept:
            pairs = (p.change.factors(p.place, 1.0, torch.device("cpu")) for p in (patch, kept[patch.name]))
            assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


def test_configuration_of_peft(tiny, weights, tmp_path):
    """Alphas stay, and modules that are gone are no targets any more."""
    names = [f"single_transformer_blocks.{i}.proj_out" for i in (1, 3)]
    config = {"r": 4, "lora_alpha": 32, "target_modules": names}
    chosen = pairs(weights, [f"single_blocks.{i}.linear2" for i in (1, 3)])
    file = {}
    for name, (down, up) in zip(names, chosen.values(), strict=True):
        file |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    text = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    source = weight_files.save(file, tmp_path / "x.safetensors", lora_adapter_metadata=text)
    prune(source, tmp_path / "small.safetensors", [6])
    lora = open_lora(tmp_path / "small.safetensors")
    assert [patch.scale for patch in lora.patches] == [8.0]
    assert lora.file.peft_config["transformer.target_modules"] == names[1:]


def test_choice_by_scores():
    assert choose_layers(SCORES, top=2) == [0, 6]
    assert choose_layers(SCORES, top=3) == [0, 1, 6]
    assert choose_layers(SCORES, share=0.5) == [0]
    assert choose_layers(SCORES, share=0.51) == [0, 6]
    assert choose_layers(SCORES, share=1.0) == [0, 1, 2, 6]
    assert choose_layers(SCORES, share=0.0) == [0]


def test_scores_of_an_ablation(source, scores):
    assert read_scores(scores, open_lora(source)) == SCORES


def test_scores_of_another_files_ablation(source, scores):
    scores.write_text(json.dumps(json.loads(scores.read_text()) | {"lora": "y", "lora_fingerprint": "other"}))
    with pytest.warns(match=r"ablation\.json has the effects of another file than .*x\.safetensors: y"):
        assert read_scores(scores, open_lora(source)) == SCORES


def test_a_report_of_several_files_with_one_name(source, tmp_path):
    """As trainings write them: each lora.safetensors has its own sizes."""
    small, elsewhere = tmp_path / "a" / source.name, tmp_path / "b" / source.name
    prune(source, small, [0])
    prune(source, elsewhere, [1, 2])
    reports = look_into([source, small])
    write_report(tmp_path, reports)
    for file, report in zip((source, small), reports, strict=True):
        assert read_scores(tmp_path / "report.json", open_lora(file)) == report.sizes
    with pytest.raises(InputError, match=r"of several files named x\.safetensors: report this one alone"):
        read_scores(tmp_path / "report.json", open_lora(elsewhere))


def test_scores_of_a_report(source, tmp_path):
    """A report may have several files: the one with the LoRA's name counts."""
    reports = look_into([NANO_FOLDER / "schnell_lora.safetensors"])
    write_report(tmp_path / "other", reports)
    reports = look_into([source])
    write_report(tmp_path / "out", reports)
    assert read_scores(tmp_path / "out" / "report.json", open_lora(source)) == reports[0].sizes
    with pytest.raises(InputError, match=r"which has none for a layer of x\.safetensors"):
        read_scores(tmp_path / "other" / "report.json", open_lora(source))


def test_command(source, scores, tmp_path, capsys):
    out = tmp_path / "small.safetensors"
    main(["prune", str(source), "--scores", str(scores), "--top", "2", "--output", str(out)])
    assert capsys.readouterr().out == f"{out}: layers 0, 6\n"
    assert open_lora(out).layers == [0, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected exactly one of top, share and layers"),
        (["--top", "2", "--layers", "1"], "expected exactly one of top, share and layers"),
        (["--top", "2"], "top and share choose by scores"),
        (["--layers", "1", "--scores", "x.json"], "layers are chosen without scores"),
        (["--layers", "5"], "changes nothing: it changes [0, 1, 2, 3, 4, 6]"),
        (["--layers", "[0, 9]"], "Got layers [9], but this model numbers its layers 0..6"),
        (["--top", "2", "--scores", "nothing.json"], "cannot be read: No such file"),
        (["--top", "2", "--scores", __file__], "is no ablation.json and no report.json"),
    ],
)
def test_errors_are_one_line(source, tmp_path, capsys, arguments, message):
    out = tmp_path / "out.safetensors"
    with pytest.raises(SystemExit) as ended:
        main(["prune", str(source), *arguments, "--output", str(out)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()
