"""`data.text_key`: which text of a record is the document.

The name of a field, the path of a nested one (`data.text`), or a template over several (`"{title}\\n\\n{body}"`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from titan_growth.data.readers.place import BadRowError, UnusableError
from titan_growth.tools.template import Piece, pieces_of

KEY = "data.text_key"
_NOT_THERE = object()
_NUM_SHOWN = 20


@dataclass(frozen=True)
class TextRule:
    """How a record becomes a text."""

    text_key: str

    @cached_property
    def _pieces(self) -> tuple[Piece, ...]:
        return pieces_of(self.text_key)

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The fields that are read, each once."""
        return tuple(dict.fromkeys(name for _, name in self._pieces if name is not None))

    def text_of(self, record: Any, *, may_have_surrogates: bool = False) -> str:
        """The text of a record. Raises BadRowError if a field is missing, or is no text."""
        if not isinstance(record, Mapping):
            raise BadRowError(f"{_type_name(record)} instead of an object", "Each record must be one object")
        text = "".join(literal if name is None else literal + _field(record, name) for literal, name in self._pieces)
        if may_have_surrogates:
            # JSON can escape half of a surrogate pair, which UTF-8 cannot encode.
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                which = " and ".join(repr(name) for name in self.fields)
                reason = f"the field {which} has a lone surrogate at character {error.start}"
                raise BadRowError(reason, "Repair the row") from error
        return text


def _field(record: Mapping[str, Any], name: str) -> str:
    """The text of a field. Raises BadRowError if it is missing, or none."""
    value = lookup(record, name)
    if isinstance(value, str):
        return value
    if value is _NOT_THERE:
        raise missing(name, names_in(record), BadRowError)
    fix = f"Name another field as {KEY} or repair the row"
    raise BadRowError(f"the field {name!r} is {_type_name(value)}, not a string", fix)


def lookup(record: Mapping[str, Any], name: str) -> Any:
    """The value of a field: of exactly this name, else at this dotted path. A marker of its own if there is none."""
    if name in record:
        return record[name]
    head, dot, rest = name.partition(".")
    inner = record.get(head) if dot else None
    return lookup(inner, rest) if isinstance(inner, Mapping) else _NOT_THERE


def is_there(record: Mapping[str, Any], name: str) -> bool:
    """Whether `lookup` finds a field."""
    return lookup(record, name) is not _NOT_THERE


def names_in(record: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The fields of a record, nested ones by their path, as far as a message has room for."""
    names: list[str] = []
    for name, value in record.items():
        nested = isinstance(value, Mapping) and value and prefix.count(".") < 3
        names += names_in(value, f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
        if len(names) > _NUM_SHOWN:
            break
    return names


def missing(name: str, names: Sequence[str], kind: type[UnusableError] = UnusableError) -> UnusableError:
    """The error for a field that is not there; lists those that are."""
    # In quotes where a blank at an end could not be seen.
    shown = [str(one)[:100] if str(one) == str(one).strip() else repr(one)[:100] for one in names[:_NUM_SHOWN]]
    return kind(f"no field {name!r}; it has: {', '.join(shown) or 'none'}", f"Set {KEY} to the one that holds the text")


def _type_name(value: Any) -> str:
    """What a value is, in JSON's words where they are not Python's."""
    return {"dict": "an object", "list": "a list", "NoneType": "null"}.get(type(value).__name__, type(value).__name__)
