"""Fields of the recipe by dotted key, and command-line text as the value that a field expects.

A file gives typed values, a command line text. `parse_text` makes of the text what the file would have given; the
validator then judges both alike.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Union, get_args, get_origin

import tomli
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from titan_growth.tools.errors import Problem


def without_none(annotation: Any) -> Any:
    """`int | None` -> int; anything else as it is."""
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        if len(members) < len(get_args(annotation)):
            return members[0] if len(members) == 1 else Union[tuple(members)]  # noqa: UP007 (built at run time)
    return annotation


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class of an annotation, or of the items of a list; None if there is none."""
    annotation = without_none(annotation)
    if get_origin(annotation) is list:
        annotation = get_args(annotation)[0]
    return annotation if _is_section(annotation) else None


def section_names(root: type[BaseModel]) -> list[str]:
    """The tables of a section, without its plain keys."""
    return [name for name, field in root.model_fields.items() if section_of(field.annotation) is not None]


def _is_section(annotation: Any) -> bool:
    # Python 3.10 takes list[str] for a type, and then fails to find its base classes.
    return get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel)


def annotation_at(root: type[BaseModel], path: list[str]) -> Any | None:
    """The annotation of the field at a dotted path (list items by number), or None."""
    annotation: Any = root
    for name in path:
        annotation = without_none(annotation)
        if get_origin(annotation) is list and name.isdigit():
            annotation = get_args(annotation)[0]
        elif _is_section(annotation) and name in annotation.model_fields:
            annotation = annotation.model_fields[name].annotation
        else:
            return None
    return annotation


def leaves(root: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the recipe with its field, in the order of the schema; items of lists as `stages.N.key`."""
    for name, field in root.model_fields.items():
        section = section_of(field.annotation)
        key = f"{prefix}{name}"
        if section is None:
            yield key, field
        else:
            is_list = get_origin(without_none(field.annotation)) is list
            yield from leaves(section, key + (".N." if is_list else "."))


def type_text(annotation: Any) -> str:
    """An annotation for readers: `integer`, `"a" | "b"`, `list of strings`."""
    annotation = without_none(annotation)
    if get_origin(annotation) is typing.Literal:
        return " | ".join(repr(value).replace("'", '"') for value in get_args(annotation))
    if get_origin(annotation) is list:
        item = type_text(get_args(annotation)[0])
        if item.startswith("list"):
            return f"list of lists{item.removeprefix('list')}"
        return f"list of {item}" if '"' in item else f"list of {item}s"
    names = {int: "integer", float: "number", bool: "true | false", str: "string"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def no_option(key: str, owner: str, option: str, known: Sequence[str]) -> Problem:
    """What to say of an option that an operator or optimizer does not have."""
    others = f"Known: {', '.join(known)}" if known else "Remove it"
    return Problem(key, f"is no option of '{owner}'", suggestion(option, known) or others)


def suggestion(word: str, choices: Iterable[str]) -> str:
    """`Did you mean 'x'?`, or an empty string when no choice is near."""
    spellings = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(word.lower(), spellings, n=1, cutoff=0.6)
    return f"Did you mean {spellings[near[0]]!r}?" if near else ""


def parse_text(text: str, annotation: Any | None) -> Any:
    """Reads command-line text as a TOML value of the expected type; text that is none stays text."""
    if annotation is None:
        return _toml_value(text)
    inner = without_none(annotation)
    if inner is not annotation and text in ("None", "none", "null"):
        return None
    annotation = inner
    if annotation is str or (get_origin(annotation) is typing.Literal and isinstance(get_args(annotation)[0], str)):
        return text
    if annotation is bool:
        return {"true": True, "false": False}.get(text.lower(), _toml_value(text))
    if annotation is float:
        try:
            return float(text)
        except ValueError:
            return _toml_value(text)
    if get_origin(annotation) is list and section_of(annotation) is None and not text.lstrip().startswith("["):
        item = get_args(annotation)[0]
        return [parse_text(part.strip(), item) for part in text.split(",")] if text else []
    return _toml_value(text)


def _toml_value(text: str) -> Any:
    try:
        return tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        return text
