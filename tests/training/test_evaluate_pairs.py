"""New scenes with a LoRA that was trained on pairs: the images that are compared, and the files."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from flux.specs import configs
from flux.vocabulary import vocabulary_warnings
from training import evaluate_pairs
from training.evaluate_pairs import OTHER, UNSEEN, evaluate
from training.subjects import draw_set


@dataclass
class StandIn:
    """Answers an instruction with the scene as it is or, with a LoRA, with the scene after."""

    has_lora: bool

    def generate(self, instruction: str, *, seed: int, context: Image.Image, **_):
        drawn = draw_set("moon drum", 2, seed=UNSEEN)[seed]
        assert context.tobytes() == drawn.before.tobytes()
        asked = self.has_lora and instruction == "add a moon drum"
        return type("Answer", (), {"images": [drawn.image if asked else drawn.before]})


class Equal:
    """A metric: 1 for the same image, 0 for another."""

    def compare(self, references, images):
        return [float(a.tobytes() == b.tobytes()) for a, b in zip(references, images, strict=True)]


def test_the_table_and_the_sheet(tmp_path, monkeypatch):
    class Models:
        load = staticmethod(lambda model, lora=None, device="": StandIn(lora is not None))

    monkeypatch.setattr(evaluate_pairs, "Pipeline", Models)
    monkeypatch.setattr(evaluate_pairs.Dino, "load", lambda *_: Equal())
    path = evaluate(Path("x.safetensors"), "moon drum", 2, 1, tmp_path, "cpu")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[2:5] == [
        "| the scene before | 0.000 | 1 |",
        "| without the LoRA | 0.000 | 1.000 |",
        "| with the LoRA | 1.000 | 0.000 |",
    ]
    assert f"{OTHER!r} with the LoRA, to the same without it: 1.000" in lines
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 256


def test_scenes_are_not_those_of_the_training():
    trained, new = (draw_set("ghost clock", 10, 64, seed=seed) for seed in (0, UNSEEN))
    assert not {each.before.tobytes() for each in trained} & {each.before.tobytes() for each in new}


def test_the_other_instruction_has_known_words():
    assert not vocabulary_warnings([OTHER], configs["flux-nano-kontext"].vocabulary)
