"""What every recipe section is: a frozen, strictly typed pydantic model whose docstrings are its help text.

Strict means that a file cannot smuggle in `steps = "ten"`; `extra = "forbid"` means that a typo is an error and not a
silently used default. The docstring under each field is what `--help` prints.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator


class BadValueError(ValueError):
    """What a validator raises when it can also say what to do; any other ValueError is a message without that."""

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
        """Refuses what TOML, a file system or a counter cannot hold, before something deeper down stumbles over it."""
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
