"""The command line: its options are the fields of settings, or a function's parameters.

Each value is read by the type of its field. Texts stay as typed; lists and objects are JSON. A list of one
entry may be given as that entry, and entries without blanks may have commas between them. An empty value
stands for None where the field may be None and cannot be an empty text.
"""

import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from flux.errors import (
    InputError,
    exit_on_input_error,
    let_prints_fail,
    only_rank_zero_prints,
    raise_when_terminated,
)
from flux.settings.demos import Settings
from flux.settings.files import check_settings
from flux.settings.messages import show, unknown_field

OptionFields = Mapping[str, FieldInfo]


def run(
    main: Callable[..., object],
    text: str | None,
    fields: OptionFields | None = None,
    *,
    positional: str | None = None,
    arguments: Sequence[str] | None = None,
) -> None:
    """Call a function with the values of a command line, or print help for it.

    Args:
        main: Called with the given values by name. Its parameters are options.
        text: How the help begins.
        fields: More options, which `main` takes as keywords.
        positional: The parameter that an argument without a name is for. If None, there is none.
        arguments: The arguments. If None, those of the program.
    """
    let_prints_fail()
    raise_when_terminated()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = {**fields_of(main)}
    options |= {name: field for name, field in (fields or {}).items() if name not in options}
    with exit_on_input_error(), only_rank_zero_prints():
        if {"-h", "--help"} & set(arguments):
            print(help_text(options, text, positional))
            return
        values = parse(options, arguments, positional)
        values |= checked(fields_of(main), values)
    with exit_on_input_error():
        main(**values)


def fields_of(function: Callable[..., object]) -> dict[str, FieldInfo]:
    """Return a function's parameters as fields, described as in its docstring's "Args"."""
    args = (inspect.getdoc(function) or "").partition("Args:\n")[2].partition("\n\n")[0]
    described: dict[str, str] = {}
    name = ""
    for line in args.splitlines():
        start, _, rest = line.strip().partition(": ")
        if line.startswith("    ") and not line.startswith("     "):
            name, line = start, rest
        described[name] = f"{described.get(name, '')} {line.strip()}".strip()
    hints, found = get_type_hints(function, include_extras=True), {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            default = PydanticUndefined if parameter.default is parameter.empty else parameter.default
            found[name] = FieldInfo(annotation=hints[name], default=default, description=described.get(name))
    return found


def parse(fields: OptionFields, arguments: Sequence[str], positional: str | None = None) -> dict[str, Any]:
    """Return the values that the arguments give, by name.

    Options are written `--name value` or `--name=value`; a switch may stand alone. If the positional field
    is a list, each argument without a name is one of its entries.

    Raises:
        InputError: An option is unknown or lacks its value, a list is not JSON or is given twice, or an
            argument is too many.
    """
    values: dict[str, Any] = {}
    rest = list(arguments)
    takes_several = positional is not None and tuple in kinds_of(fields[positional].annotation)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            if positional is not None and takes_several:
                values[positional] = [*values.get(positional, ()), argument]
                continue
            if positional is None or positional in values:
                raise InputError(f"command line: got {show(argument)} without the name of a field before it")
            values[positional] = argument
            continue
        name, given, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        if name not in fields:
            raise InputError(f"command line: {unknown_field(name, fields)}")
        annotation = fields[name].rebuild_annotation()
        if name in values and tuple in kinds_of(fields[name].annotation):
            raise InputError(f'command line: got --{name} twice: give one list, such as \'["a", "b"]\'')
        if not given:
            # What follows a switch is its value, or it is for the positional field if that has room.
            has_room = positional is not None and (takes_several or positional not in values)
            is_value = rest and (_is_value(rest[0], annotation) or not (has_room or rest[0].startswith("--")))
            if _accepts(annotation, True) and not is_value:
                values[name] = True
                continue
            if not rest or rest[0].startswith("--"):
                raise InputError(f"command line: {name}: expected a value after --{name}")
            value = rest.pop(0)
        try:
            values[name] = value_of(value, annotation)
        except ValueError as error:
            raise InputError(f"command line: {name}: {error}") from None
    return values


def checked(fields: OptionFields, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the values that are for a function's own parameters, as these types have them.

    Raises:
        InputError: A value does not fit, or one without a default is missing.
    """
    types: dict[str, Any] = {name: (field.annotation, field) for name, field in fields.items()}
    own = {name: value for name, value in values.items() if name in fields}
    given = check_settings(create_model("Arguments", __base__=Settings, **types), own, "command line")
    return {name: getattr(given, name) for name in own}


def value_of(text: str, annotation: Any) -> Any:
    """Return the value that a text stands for in a field of this type.

    A text that does not fit is returned as it is: checking the settings reports it.

    Raises:
        ValueError: A list or an object is not JSON.
    """
    kinds, entries = kinds_of(annotation), _entry_kinds(annotation)
    empty = not text and not _accepts(annotation, text)
    if NoneType in kinds and (empty or (text in ("None", "null") and str not in kinds)):
        return None
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kinds & {int, float}:
        for number in (int, float):
            with suppress(ValueError):
                return number(text)
    if tuple in kinds or dict in kinds:
        if text.lstrip().startswith(("[", "{")):
            value = _json(text)
            return value if isinstance(value, list) or dict in kinds else [value]
        if entries & {int, float, tuple}:
            try:
                return json.loads(f"[{text}]")
            except ValueError:
                return text
        if str in entries:
            return [text] if " " in text else text.split(",") if text else []
    return text


def help_text(fields: OptionFields, text: str | None, positional: str | None = None) -> str:
    """Return the help: `text`, then each option with its type, description and default."""
    lines = [(text or "").strip(), "", "Options:"]
    for name, field in fields.items():
        default = "required" if field.is_required() else f"default: {show(field.default)}"
        about = f"{field.description or name} ({'default: not set' if field.default is None else default})"
        option = name.upper() if name == positional else f"--{name}"
        lines.append(f"  {option} {type_name(field.annotation)}")
        lines += textwrap.wrap(about, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def type_name(annotation: Any) -> str:
    """Return a type in words: "integer", "none|model|blocks|auto", "text or list"."""
    annotation = _bare(annotation)
    arguments = get_args(annotation)
    if _is_union(annotation):
        return " or ".join(dict.fromkeys(type_name(each) for each in arguments if each is not NoneType))
    if get_origin(annotation) is Literal:
        return "|".join(str(value).lower() if isinstance(value, bool) else str(value) for value in arguments)
    names = {str: "text", int: "integer", float: "number", bool: "true|false", tuple: "list"}
    return names.get(get_origin(annotation) or annotation, "object")


def _is_value(text: str, annotation: Any) -> bool:
    """Return whether an argument after a switch is its value: true, false, or any text if it may be one."""
    return text.lower() in ("true", "false") or (str in kinds_of(annotation) and not text.startswith("--"))


def _accepts(annotation: Any, value: Any) -> bool:
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f'expected JSON such as ["a", "b"], got {show(text)}: {error}') from None


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType)


def kinds_of(annotation: Any) -> set[type]:
    """Return the outermost types: `Annotated[tuple[int, ...], ...] | None` -> {tuple, NoneType}."""
    annotation = _bare(annotation)
    if _is_union(annotation):
        return set().union(*map(kinds_of, get_args(annotation)))
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    return {get_origin(annotation) or annotation}


def _entry_kinds(annotation: Any) -> set[type]:
    """Return the types of the entries of all lists among the outermost types."""
    annotation = _bare(annotation)
    if _is_union(annotation):
        return set().union(*map(_entry_kinds, get_args(annotation)))
    return kinds_of(get_args(annotation)[0]) if get_origin(annotation) is tuple else set()
