"""The comparison of layers to train LoRAs in: equal numbers, a table, and that it resumes."""

import csv
from pathlib import Path

import pytest
from helpers import lora_training

from flux.errors import InputError
from flux.metrics.features import PerceptualEncoder
from flux.settings.files import check_settings, read_settings
from flux.specs import configs
from training import lora_layers
from training.lora_layers import ASKED, LayersSettings, Outcome, costs_of, prompts_of, ranks_for, summary
from training.subjects import NAMES, SUBJECTS, draw_asked

CHOICES = {"vital": [0, 4], "as 26 and 39": [7, 10], "all": "all"}


@pytest.fixture(autouse=True)
def no_gradients():
    """Instead of the fixture that switches gradients off."""


@pytest.mark.parametrize("layers", [(0, 4), (7, 10), (11, 14), tuple(range(15))])
def test_each_choice_trains_nearly_as_many_numbers(layers):
    """Within a fiftieth of the budget, and not more."""
    ranks = ranks_for(layers, 327_680)
    trained = sum(ranks[layer] * cost for layer, cost in costs_of(layers).items())
    assert 0.98 * 327_680 < trained <= 327_680
    assert max(ranks.values()) - min(ranks.values()) <= 1


def test_a_budget_that_is_too_small():
    with pytest.raises(InputError, match="Got budget 100, expected at least 20480"):
        ranks_for((0, 4), 100)


def test_the_file_beside_it_compares_all_subjects_and_styles():
    file = Path(lora_layers.__file__).with_name("lora_layers.json")
    settings = read_settings(LayersSettings, file)
    assert settings.names == NAMES
    assert len(settings.names) * len(settings.choices) * len(settings.seeds) == 96


@pytest.mark.parametrize("name", NAMES)
def test_prompts_with_and_without_the_trigger(name):
    prompts = prompts_of(name)
    assert [name in prompt for prompt in prompts] == [True] * 3 + [False] * 3


def test_summary():
    def outcome(choice: str, seed: int, learnt: float) -> Outcome:
        return Outcome("flower bell", choice, seed, learnt, 0.1, 0.02, 1000, 12.0, 0.4)

    found = [
        outcome("vital", 0, 0.1),
        outcome("vital", 1, 0.3),
        outcome("all", 0, 0.2),
        outcome("all", 1, 0.2),
    ]
    lines = summary({"vital": (0, 4), "all": "all", "none yet": (1,)}, found).splitlines()
    # 1.96 times the standard deviation 0.1414 over the root of two
    assert lines[2] == "| vital (0, 4) | 0.200 ± 0.196 | 0.100 | 0.020 | 1,000 | 12 | 0.40 |"
    assert lines[3].startswith("| all | 0.200 | ")
    assert lines[-1] == "4 trainings."


def test_it_runs_and_resumes(tmp_path, monkeypatch):
    """On a tiny model: what is done is not done again, and the table has every training."""
    weights, whole = str(lora_training.write_base(tmp_path)), lora_layers.training_of
    monkeypatch.setattr(
        lora_layers, "training_of", lambda *given: whole(*given).model_copy(update={"weights": weights})
    )
    monkeypatch.setattr(lora_layers, "DRAWINGS", 1)
    fields = {
        "names": ["moon drum"], "choices": {"vital": [1, 2]}, "budget": 20_000, "seeds": [3], "images": 2,
        "steps": 3, "num_steps": 1, "side": 64, "device": "cpu", "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    with lora_training.tiny_nano():
        lora_layers.compare(check_settings(LayersSettings, fields))
        (result,) = (tmp_path / "out").rglob("time.json")
        before = result.stat().st_mtime_ns
        more = {**fields, "choices": {"vital": [1, 2], "late": [3]}}
        table = lora_layers.compare(check_settings(LayersSettings, more))
    assert result.stat().st_mtime_ns == before
    assert "| late (3) |" in table.read_text()
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["choice"] for row in rows] == ["vital", "late"]
    assert all(0 < int(row["trained"]) <= 20_000 for row in rows)
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert float(rows[0]["leaked"]) > 0
    assert float(rows[0]["base"]) == float(rows[1]["base"]) != float(rows[0]["likeness"])


@pytest.mark.parametrize(
    ("place", "hour"),
    [asked[:2] if asked is ASKED[0] else pytest.param(*asked[:2], marks=pytest.mark.slow) for asked in ASKED],
)
def test_drawings_are_liked_more_than_other_subjects(place, hour):
    """The measure tells subjects apart: a drawing is nearer to others of its subject than of another one."""
    encoder = PerceptualEncoder.load(configs["flux-nano"].dinov2)
    drawn = {name: encoder.embed(draw_asked(name, place, hour, 3)) for name in SUBJECTS}
    for name, own in drawn.items():
        new = encoder.embed(draw_asked(name, place, hour, 1, seed=9))
        others = [float((each @ new[0]).mean()) for other, each in drawn.items() if other != name]
        assert float((own @ new[0]).mean()) > max(others), name


def test_layers_that_the_model_lacks_are_told_before_anything_is_written(tmp_path):
    choices, folder = {"first": [0], "wrong": [0, 99]}, tmp_path / "out"
    fields = {"names": NAMES[:1], "choices": choices, "output_dir": str(folder)}
    with pytest.raises(InputError, match=r"Got layers \[99\], but this model numbers its layers 0\.\.14"):
        lora_layers.compare(check_settings(LayersSettings, fields))
    assert not folder.exists()


def test_unknown_names(tmp_path):
    settings = check_settings(
        LayersSettings, {"names": ["a cat"], "choices": CHOICES, "output_dir": str(tmp_path)}
    )
    with pytest.raises(InputError, match=r"Got names \['a cat'\], expected some of flower bell"):
        lora_layers.compare(settings)
