"""Methods with what the model's spec says filled in."""

from helpers.evaluation import settings_of

from flux.evaluate.resolve import resolve_methods
from flux.specs import configs


def test_methods_share_what_is_not_theirs(benchmark, tmp_path):
    methods = [{"name": "x", "num_steps": 5}, {"name": "y"}]
    x, y = resolve_methods(settings_of(benchmark, tmp_path, methods=methods, guidance=2.0))
    assert (x.settings.num_steps, y.settings.num_steps) == (5, 2)
    assert x.settings.guidance == y.settings.guidance == 2.0
    assert x.layers == configs["flux-nano"].vital_layers
