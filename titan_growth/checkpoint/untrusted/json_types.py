"""JSON and TOML of a checkpoint, which may be a stranger's: read into exactly the types they should have.

Python's own readers take `NaN`, recurse as deep as the text is nested, and give a table of anything. What is read here
has passed a strict check of every field, and what is wrong comes as one line.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, TypeVar, cast

import tomli
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json as parse_json

from titan_growth.checkpoint.untrusted.pickles import RefusedError
from titan_growth.tools.text import one_line

STRICT = ConfigDict(strict=True, extra="forbid")
"""Set as `__pydantic_config__` of a dataclass: no 1 for true, no "1" for 1, no unknown keys."""

Count = Annotated[int, Field(ge=0, lt=10**40)]
"""A number of something. FLOPs of a run are below 10^30."""
Size = Annotated[int, Field(ge=0, lt=2**63)]
Number = float
Text = Annotated[str, AfterValidator(one_line)]
"""Is shown to the user at some time."""

Kind = TypeVar("Kind")


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def from_json(kind: type[Kind], text: str | bytes) -> Kind:
    """An instance of a dataclass (with `STRICT`) from JSON.

    Raises:
        RefusedError: naming the first field that is wrong.
    """
    try:
        value: Kind = _adapter(cast(Any, kind)).validate_json(text, strict=True)
    except ValidationError as error:
        raise RefusedError(first_problem(error)) from None
    return value


def table_of_json(text: str | bytes) -> Any:
    """What JSON holds. Raises RefusedError when it is none, or nested too deeply."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise RefusedError(one_line(str(error), 200)) from None


def table_of_toml(data: bytes) -> dict[str, Any]:
    """What TOML holds. Raises RefusedError when it is none, or nested too deeply."""
    try:
        return tomli.loads(data.decode())
    except RecursionError:
        raise RefusedError("it is nested too deeply") from None
    except ValueError as error:
        raise RefusedError(one_line(str(error), 200)) from None


def first_problem(error: ValidationError) -> str:
    """The first of the problems that pydantic has found, in one line and without the value."""
    details = error.errors(include_input=False, include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in details["loc"])
    return one_line(f"{where}: {details['msg']}" if where else details["msg"], 200)
