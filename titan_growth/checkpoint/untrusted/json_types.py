"""JSON and TOML of an untrusted checkpoint, parsed into exactly the expected types.

Python's own parsers accept `NaN`, recurse as deep as the text is nested, and return tables of anything. Here every
field is checked strictly, and an error is one line.
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
"""A counter. The FLOPs of a run stay below 10^30."""
Size = Annotated[int, Field(ge=0, lt=2**63)]
Number = float
Text = Annotated[str, AfterValidator(one_line)]
"""Text that may be shown to the user."""

Kind = TypeVar("Kind")


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def from_json(kind: type[Kind], text: str | bytes) -> Kind:
    """An instance of a dataclass (with `STRICT`) from JSON.

    Raises:
        RefusedError: names the first invalid field.
    """
    try:
        value: Kind = _adapter(cast(Any, kind)).validate_json(text, strict=True)
    except ValidationError as error:
        raise RefusedError(first_problem(error)) from None
    return value


def table_of_json(text: str | bytes) -> Any:
    """Parses JSON. Raises RefusedError if it is invalid or nested too deeply."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise RefusedError(one_line(str(error), 200)) from None


def table_of_toml(data: bytes) -> dict[str, Any]:
    """Parses TOML. Raises RefusedError if it is invalid or nested too deeply."""
    try:
        return tomli.loads(data.decode())
    except RecursionError:
        raise RefusedError("it is nested too deeply") from None
    except ValueError as error:
        raise RefusedError(one_line(str(error), 200)) from None


def first_problem(error: ValidationError) -> str:
    """The first problem that pydantic found, in one line and without the value."""
    details = error.errors(include_input=False, include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in details["loc"])
    return one_line(f"{where}: {details['msg']}" if where else details["msg"], 200)
