"""`data.text_key` as a recipe writes it: the name of a field, or a template such as `"{title}\\n\\n{body}"`."""

from __future__ import annotations

from string import Formatter
from typing import NamedTuple


class Piece(NamedTuple):
    """Literal text, and the field whose value follows it (None: nothing does)."""

    literal: str
    field: str | None


def pieces_of(text_key: str) -> tuple[Piece, ...]:
    """The pieces of a template; a text without braces names one field. Raises ValueError for a bad template."""
    if "{" not in text_key and "}" not in text_key:
        return (Piece("", text_key),)
    pieces = []
    for literal, name, spec, conversion in Formatter().parse(text_key):
        if name is not None and (not name.strip() or spec or conversion):
            raise ValueError("a template has fields as {name}, with nothing else in the braces")
        pieces.append(Piece(literal, name))
    if all(piece.field is None for piece in pieces):
        raise ValueError("the template names no field")
    return tuple(pieces)
