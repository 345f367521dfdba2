"""A LoRA from two checkpoints: what was merged comes out again."""

import pytest
import torch
from helpers import tiny_models, weight_files
from helpers.lora_files import MODULES, RANK, added, pairs

from flux.errors import InputError
from flux.lora.__main__ import main
from flux.lora.contents import open_lora
from flux.lora.extract import extract, low_rank


@pytest.fixture
def tuned(tiny, weights, tmp_path):
    """The weights with a pair on some modules, another bias, and another norm."""
    found = added(weights, pairs(weights, MODULES), 1.0)
    found["img_in.bias"] = found["img_in.bias"] + 0.5
    scale = "double_blocks.1.img_attn.norm.query_norm.scale"
    found[scale] = found[scale] + 0.5
    return weight_files.save(found, tmp_path / "tuned.safetensors")


def error(base, lora, tuned):
    found, expected = weight_files.load(base, loras=[(lora, 1.0)]), weight_files.load(tuned)
    return tiny_models.relative_error(weight_files.velocity(found), weight_files.velocity(expected))


@pytest.mark.parametrize("how", [{"rank": RANK}, {"share": 0.999999}])
def test_a_lora_comes_out_again(base, tuned, tmp_path, how):
    out = tmp_path / "lora.safetensors"
    assert extract(base, tuned, out, **how) > 0.999999
    assert error(base, out, tuned) < 1e-6
    lora = open_lora(out)
    assert {patch.place.module for patch in lora.patches} == {
        *MODULES,
        "double_blocks.1.img_attn.norm.query_norm",
    }
    assert {patch.change.rank for patch in lora.patches} == {RANK, None}


def test_noise_of_the_files_has_no_rank(base, tuned, tmp_path):
    """The pairs' own rank is found, however much is allowed."""
    out = tmp_path / "lora.safetensors"
    extract(base, tuned, out, rank=20)
    assert {patch.change.rank for patch in open_lora(out).patches} <= {RANK, RANK + 1, None}


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
@pytest.mark.parametrize(("rank", "share"), [(5, None), (None, 0.7), (3, 0.99), (24, None)])
def test_best_product(shape, rank, share):
    """Equal to the truncated singular value decomposition."""
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    shares = (values**2).cumsum(0) / (values**2).sum()
    count = min(rank or 24, 24 if share is None else int((shares < share).sum()) + 1)
    down, up, squares = low_rank(matrix, rank, share)
    expected = (left[:, :count] * values[:count]) @ right[:count]
    assert down.shape == (count, shape[1])
    assert tiny_models.relative_error((up @ down).double(), expected) < 1e-6
    assert squares == pytest.approx(float((values[:count] ** 2).sum()), rel=1e-6)


def test_command(base, tuned, tmp_path, capsys):
    out = tmp_path / "lora.safetensors"
    main(["extract", str(tuned), "--base", str(base), "--rank", "1", "--output", str(out)])
    share = float(capsys.readouterr().out.split(": ")[1].split(" %")[0])
    assert 40 < share < 46
    assert open_lora(out).file.checkpoint.metadata["extracted_from"] == "tuned.safetensors"


def test_refused(base, tuned, tiny, tmp_path):
    with pytest.raises(InputError, match="neither rank nor share"):
        extract(base, tuned, tmp_path / "out.safetensors")
    with pytest.raises(InputError, match="which do not differ"):
        extract(base, base, tmp_path / "out.safetensors", rank=4)
    other = weight_files.save(weight_files.wide().state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(InputError, match="is not this model's"):
        extract(base, other, tmp_path / "out.safetensors", rank=4)
    assert not (tmp_path / "out.safetensors").exists()
