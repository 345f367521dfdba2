"""Fills in what an evaluation's settings leave to the model's spec."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flux.editing.edit import check_edits
from flux.errors import InputError
from flux.evaluate.settings import EvaluateSettings, Method, methods_of
from flux.settings.complete import resolve
from flux.settings.effect import settings_warnings
from flux.settings.fields import Side, StrictModel
from flux.settings.resolved import ResolvedEdit
from flux.specs import get_spec
from flux.vital_layers import find_vital_layers
from flux.weights.find import checkpoint_of
from flux.weights.open_model import OpenModel


class Sized(StrictModel, frozen=True):
    """The size of the edits."""

    width: Side
    height: Side


class ResolvedEvaluate(Sized, EvaluateSettings, frozen=True):
    """Settings of an evaluation whose size is known. Its methods have the other numbers."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the edits in pixels."""
        return self.width, self.height


@dataclass(frozen=True, eq=False)
class ResolvedMethod(Method):
    """A method with everything filled in.

    Attributes:
        settings: The resolved settings of the edit.
        layers: Its vital layers, the most vital first.
    """

    settings: ResolvedEdit
    layers: tuple[int, ...] = field(kw_only=True)


def resolve_evaluation(settings: EvaluateSettings) -> ResolvedEvaluate:
    """Fills in the size of the edits. Raises InputError for an unknown model."""
    model = resolve(settings)
    fields: dict[str, Any] = {name: getattr(settings, name) for name in EvaluateSettings.model_fields}
    fields |= {"width": model.width, "height": model.height}
    # Everything has been validated already.
    return ResolvedEvaluate.model_construct(None, **fields)


def resolve_methods(settings: EvaluateSettings, opened: OpenModel | None = None) -> list[ResolvedMethod]:
    """Reads the methods, fills in what the model's spec says, and finds their vital layers.

    Args:
        settings: the settings of the evaluation.
        opened: the model's files, if they are open already.

    Raises:
        InputError: as `resolve`, `find_vital_layers` and `check_edits`, with the method's name.
    """
    spec, methods = get_spec(settings.model), []
    checkpoint = opened.fingerprint() if opened else checkpoint_of(resolve(settings))
    for method in methods_of(settings):
        try:
            edit = resolve(method.settings)
            layers = find_vital_layers(edit.vital_layers, spec, checkpoint)
            unmasked = edit.model_copy(update={"mask": None if edit.mask == "given" else edit.mask})
            check_edits(unmasked, layers)
        except InputError as error:
            raise InputError(f"method {method.name!r}: {error}") from error
        methods.append(ResolvedMethod(method.name, edit, method.strength, layers=layers))
    return methods


def evaluation_warnings(settings: EvaluateSettings, methods: Sequence[ResolvedMethod]) -> list[str]:
    """Return the `settings_warnings` of all methods: what they have in common once, else with the name."""
    spec = get_spec(settings.model)
    lines = [settings_warnings(method.settings, spec) for method in methods]
    common = [line for line in lines[0] if all(line in own for own in lines)]
    for name, metric in (("encoder", "structure"), ("clip", "clip")):
        default = EvaluateSettings.model_fields[name].default
        if getattr(settings, name) != default and metric not in settings.metrics:
            common.append(f"without effect: {name} (no {metric} in metrics)")
    return common + [
        f"method {method.name!r}: {line}"
        for method, own in zip(methods, lines)
        for line in own
        if line not in common
    ]
