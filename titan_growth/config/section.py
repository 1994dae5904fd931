"""The base of every recipe section: a frozen, strictly typed pydantic model.

Strict: `steps = "ten"` is an error. `extra = "forbid"`: so is a typo. `--help` prints the docstring under each field.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator


class BadValueError(ValueError):
    """A validator's error with a hint; any other ValueError is a message without one."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class Section(BaseModel):
    """Base of every table of a recipe."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        validate_default=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _can_be_stored(cls, value: Any) -> Any:
        """Refuses what TOML, a file system or a 64-bit counter cannot hold."""
        if isinstance(value, str):
            if "\0" in value:
                raise ValueError("holds a NUL character, which no path and no name can have")
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError(f"{value!a} is not UTF-8 text") from None
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{value} does not fit into 64 bits")
        return value
