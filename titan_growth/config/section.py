"""What every recipe section is: a frozen, strictly typed pydantic model whose docstrings are its help text.

Strict means that a file cannot smuggle in `steps = "ten"`; `extra = "forbid"` means that a typo is an error and not a
silently used default. The docstring under each field is what `--help` prints.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


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
