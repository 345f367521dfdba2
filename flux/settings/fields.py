"""The types of the settings' fields: texts, paths, lists of layers, weights."""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

MAX_SEED = 2**63 - 1
WIDEST_BORDER = 10  # times the side of the image


def _expected(what: str) -> PydanticCustomError:
    """Return an error that ends as "expected WHAT, got VALUE"."""
    return PydanticCustomError("expected", "{what}", {"what": what})


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # a stray surrogate: "\ud800" in a file, or a command line that is not UTF-8
        raise _expected("text that UTF-8 can hold") from None
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise _expected("some text")
    return text


def _expanded(path: str) -> str:
    """Replace a leading ~ by the home folder; refuse what JSON reads in place of a single backslash.

    Without a home folder, a path in it is refused: it would make a folder called ~.
    """
    if set(path) & set("\0\b\f\n\r\t"):
        raise _expected(r"a path (for each \ in it, write / or \\)")
    expanded = os.path.expanduser(path)
    if expanded.split(os.sep)[0] == "~":
        raise _expected("a path without ~, since this user has no home folder")
    return expanded


def no_repeats(entries: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuse a list that names something twice."""
    distinct = {frozenset(entry) if isinstance(entry, tuple) else entry for entry in entries}
    if len(distinct) < len(entries):
        raise _expected("each only once")
    return entries


def _form(layers: Any) -> str | None:
    """Return which form of a layers field is meant, so that only that form's errors are reported."""
    if isinstance(layers, str):
        return "word"
    if isinstance(layers, list | tuple):
        return "sets" if any(isinstance(entry, list | tuple) for entry in layers) else "numbers"
    return None


def _by_form(expected: str, *words: str) -> Discriminator:
    """Return the choice among the forms. If there are `words`, a text must be one of them."""
    return Discriminator(
        lambda layers: None if words and isinstance(layers, str) and layers not in words else _form(layers),
        custom_error_type="expected",
        custom_error_message="{what}",
        custom_error_context={"what": expected},
    )


def _offload_name(value: Any) -> Any:
    """Read true and false, which the field once was and the command line's bare --offload still is."""
    names = {"True": "model", "False": "none"}
    return names.get(str(value), value) if isinstance(value, bool | str) else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _four_sides(value: Any) -> Any:
    """Read one border for all sides."""
    entries = list(value) if isinstance(value, list | tuple) else [value]
    if len(entries) not in (1, 4) or not all(isinstance(entry, int | float) for entry in entries):
        raise _expected("one number, or four: left, right, above, below")
    if not all(0 <= entry <= WIDEST_BORDER for entry in entries):
        raise _expected(f"fractions of the image's sides, from 0 to {WIDEST_BORDER}")
    return entries * (4 // len(entries))


def _weight_form(weight: Any) -> str:
    return "layers" if isinstance(weight, Mapping) else "number"


# JSON's lists become tuples, which strictness forbids: hence strict=False, on the tuple, not on its items.
LIST = Field(strict=False, min_length=1)
LIST_OR_EMPTY = Field(strict=False)

String = Annotated[str, AfterValidator(_encodable)]
Text = Annotated[String, AfterValidator(_not_blank)]
FilePath = Annotated[Text, AfterValidator(_expanded)]  # or the word or hub id that may stand there instead
Words = Annotated[tuple[Text, ...], LIST_OR_EMPTY]
Files = Annotated[tuple[FilePath, ...], LIST_OR_EMPTY, BeforeValidator(_as_list)]

Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Side = Annotated[int, Field(ge=16)]
Steps = Annotated[int, Field(ge=1)]
Guidance = Annotated[float, Field(ge=0)]
TrueCfg = Annotated[float, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(gt=0, le=1)]
Borders = Annotated[tuple[float, float, float, float], LIST_OR_EMPTY, BeforeValidator(_four_sides)]
Offload = Annotated[Literal["none", "model", "blocks", "auto"], BeforeValidator(_offload_name)]

MetricName = Literal["dino", "psnr", "ssim", "lpips", "clip"]
Metrics = Annotated[tuple[MetricName, ...], LIST, AfterValidator(no_repeats)]

Number = Annotated[int, Field(ge=0)]
Numbers = Annotated[tuple[Number, ...], LIST_OR_EMPTY, AfterValidator(no_repeats)]
LayerNumbers = Annotated[tuple[Number, ...], LIST, AfterValidator(no_repeats)]
LayerSets = Annotated[tuple[LayerNumbers, ...], LIST, AfterValidator(no_repeats)]
SkippedLayers = Annotated[
    Annotated[Literal["all"], Tag("word")]
    | Annotated[LayerNumbers, Tag("numbers")]
    | Annotated[LayerSets, Tag("sets")],
    _by_form('"all", a list of layers, or a list of lists of layers', "all"),
]
VitalLayers = Annotated[
    Annotated[FilePath, Tag("word")] | Annotated[LayerNumbers, Tag("numbers")],
    _by_form('"auto", a list of layers, a vital_layers.json, or the name of a preset'),
]

LayerKey = Annotated[int, Field(strict=False, ge=0)]  # the keys of JSON's objects are texts
Weight = Annotated[
    Annotated[Fraction, Tag("number")] | Annotated[dict[LayerKey, Fraction], Tag("layers")],
    Discriminator(_weight_form),
]
LoraLayers = Annotated[
    Annotated[LayerNumbers, Tag("number")] | Annotated[dict[LayerKey, float], Tag("layers")],
    Discriminator(_weight_form),
]


class StrictModel(BaseModel, frozen=True):
    """The base of all models of settings: no conversions, no unknown fields, no changes.

    Subclasses repeat `frozen=True` for type checkers: only then may a subclass narrow the type of a field.
    """

    # A program uses few of these classes: with defer_build the others cost no time.
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, defer_build=True)
