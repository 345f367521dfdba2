"""Methods with what the model's spec says filled in."""

import pytest
from helpers.evaluation import settings_of

from flux.errors import InputError
from flux.evaluate.resolve import evaluation_warnings, resolve_evaluation, resolve_methods
from flux.evaluate.settings import EvaluateSettings
from flux.settings.files import read_settings
from flux.specs import configs


def test_methods_share_what_is_not_theirs(benchmark, tmp_path):
    methods = [{"name": "x", "num_steps": 5}, {"name": "y"}]
    x, y = resolve_methods(settings_of(benchmark, tmp_path, methods=methods, guidance=2.0))
    assert (x.settings.num_steps, y.settings.num_steps) == (5, 2)
    assert x.settings.guidance == y.settings.guidance == 2.0
    assert x.layers == configs["flux-nano"].vital_layers


def test_flow_edit_finds_no_mask(benchmark, tmp_path):
    """It has no attention to compare, so a method that asks for one is refused, as demo 4 does."""
    methods = [{"name": "x", "inversion": "none", "mask": "auto"}]
    with pytest.raises(InputError, match='method \'x\': Got mask "auto" with inversion "none"'):
        resolve_methods(settings_of(benchmark, tmp_path, methods=methods))


@pytest.mark.parametrize("model", ["flux-nano-canny", "flux-nano-fill", "flux-dev-redux"])
def test_models_that_other_images_steer_are_refused(benchmark, tmp_path, model):
    with pytest.raises(InputError, match=f"Got the model {model}, .* choose a model without"):
        resolve_evaluation(settings_of(benchmark, tmp_path, model=model))


def test_what_all_methods_have_without_effect_is_said_once(benchmark, tmp_path):
    methods = [{"name": "x"}, {"name": "FlowEdit", "inversion": "none", "nudging": 1.1}]
    settings = settings_of(benchmark, tmp_path, methods=methods, negative_prompt="x", encoder="dino")
    assert evaluation_warnings(settings, resolve_methods(settings)) == [
        "without effect: negative_prompt (true_cfg is 1)",
        "64x64 is far from 256x256, the size that flux-nano was made for: "
        "expect scenes that repeat or fall apart",
        "without effect: encoder (no structure in metrics)",
        """method 'FlowEdit': without effect: nudging (inversion is "none")""",
    ]


@pytest.mark.parametrize(
    "file", ["evaluate", "evaluate_inversions", "evaluate_generated", "flux-dev/evaluate"]
)
def test_shipped_files_need_no_warning(file):
    settings = read_settings(EvaluateSettings, f"{file}.json")
    assert not evaluation_warnings(settings, resolve_methods(settings))
