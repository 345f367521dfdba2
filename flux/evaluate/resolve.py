"""Fills in what an evaluation's settings leave to the model's spec."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flux.editing.edit import check_edits
from flux.errors import InputError
from flux.evaluate.benchmark import Item
from flux.evaluate.settings import EvaluateSettings, Method, methods_of
from flux.settings.complete import resolve
from flux.settings.effect import settings_warnings
from flux.settings.fields import Side, StrictModel
from flux.settings.resolved import ResolvedEdit
from flux.specs import ModelSpec, get_spec
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

    @property
    def by_instruction(self) -> bool:
        """Whether the model edits by instructions, with the photographs as context images."""
        return get_spec(self.model).condition == "kontext"

    def prompt_of(self, item: Item) -> str:
        """The prompt of an item's edit."""
        return item.prompt(self.by_instruction, self.reconstruct)

    def check_items(self, items: Sequence[Item]) -> None:
        """Raise InputError if the model edits by instructions and cannot edit these items so."""
        if not self.by_instruction:
            return
        if self.reconstruct or self.references == "generated":
            raise InputError(
                f"Got the model {self.model}, which edits photographs by instructions: leave out reconstruct "
                "and references, or choose another model"
            )
        if missing := [item.key for item in items if not item.instruction]:
            raise InputError(
                f"Got the model {self.model}, which edits by instructions, but {len(missing)} edits of "
                f"{self.benchmark} have no editing_instruction, the first is {missing[0]}: add them, or "
                "choose another model"
            )


@dataclass(frozen=True, eq=False)
class ResolvedMethod(Method):
    """A method with everything filled in.

    Attributes:
        settings: The resolved settings of the edit.
        layers: Its vital layers, the most vital first.
        hidden: The layers in which the photograph, as a context image, is not attended to.
    """

    settings: ResolvedEdit
    layers: tuple[int, ...] = field(kw_only=True)
    hidden: frozenset[int] = frozenset()


def resolve_evaluation(settings: EvaluateSettings) -> ResolvedEvaluate:
    """Fill in the size of the edits.

    Raises:
        InputError: The model is unknown, or needs images that a benchmark does not have.
    """
    model = resolve(settings)
    if get_spec(settings.model).condition not in (None, "kontext"):
        raise InputError(
            f"Got the model {settings.model}, which is steered by images that a benchmark does not have: "
            "choose a model without, such as flux-nano, or a Kontext model"
        )
    fields: dict[str, Any] = {name: getattr(settings, name) for name in EvaluateSettings.model_fields}
    fields |= {"width": model.width, "height": model.height}
    # Everything has been validated already.
    return ResolvedEvaluate.model_construct(None, **fields)


def resolve_methods(settings: EvaluateSettings, opened: OpenModel | None = None) -> list[ResolvedMethod]:
    """Read the methods, fill in what the model's spec says, and find their vital layers.

    Args:
        settings: The settings of the evaluation.
        opened: The model's files, if they are open already.

    Raises:
        InputError: As `resolve`, `find_vital_layers` and `check_edits`, or a method has `context_in` and the
            model takes no context image. The message begins with the method's name.
    """
    spec, methods = get_spec(settings.model), []
    checkpoint = opened.fingerprint() if opened else checkpoint_of(resolve(settings))
    for method in methods_of(settings):
        try:
            given = {"context": ("photo",)} if spec.condition == "kontext" else {}
            edit = resolve(method.settings.model_copy(update=given))
            uses_layers = method.strength is None or method.context_in != "all"
            layers = find_vital_layers(edit.vital_layers, spec, checkpoint) if uses_layers else ()
            if method.strength is None:
                unmasked = edit.model_copy(update={"mask": None if edit.mask == "given" else edit.mask})
                check_edits(unmasked, layers)
            hidden = _hidden_layers(method, layers, spec)
        except InputError as error:
            raise InputError(f"method {method.name!r}: {error}") from error
        methods.append(
            ResolvedMethod(
                method.name, edit, method.strength, method.context_in, layers=layers, hidden=hidden
            )
        )
    return methods


def _hidden_layers(method: Method, layers: Sequence[int], spec: ModelSpec) -> frozenset[int]:
    """Return the layers in which a method does not attend to the context image."""
    if method.context_in == "all":
        return frozenset()
    if spec.condition != "kontext":
        raise InputError("got context_in for a model without context images: choose a Kontext model")
    vital = frozenset(layers)
    return vital if method.context_in == "others" else frozenset(range(spec.num_layers)) - vital


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
