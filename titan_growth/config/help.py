"""`--help`: every key of the recipe with its type, default and text, taken from the schema itself."""

from __future__ import annotations

import json
import textwrap

from pydantic.fields import FieldInfo

from titan_growth.config.fields import leaves, section_of, type_text
from titan_growth.config.plugins import recipe_class

USAGE = """usage: python -m titan_growth train --job.config_file FILE [--section.key value ...]

Every key of the recipe can be given on the command line as --section.key value, --section.key=value, or, for
true/false, as a bare --section.key. Lists are comma-separated or TOML; growths are --growth.stages.0.at "300 steps".
--help SECTION prints one table only; with --plugins or --job.config_file, a plugin's tables too.
"""


def help_text(section: str | None = None) -> str:
    """The help of the recipe, tables of loaded plugins included, or of one table."""
    root = recipe_class()
    blocks = [USAGE]
    seen = ""
    for key, field in leaves(root):
        table = key.split(".")[0]
        if section not in (None, table):
            continue
        if table != seen:
            seen = table
            model = section_of(root.model_fields[table].annotation)
            about = (model.__doc__ or "").strip().split("\n")[0] if model else ""
            blocks.append(f"\n[{table}]  {about}".rstrip() + "\n" if model else "\n")
        default = default_text(field)
        kind = type_text(field.annotation)
        blocks.append(f"  --{key}  ({kind}; {default if default == 'required' else f'default {default}'})\n")
        indent = " " * 6
        blocks.append(
            textwrap.fill(field_text(field), width=116, initial_indent=indent, subsequent_indent=indent) + "\n"
        )
    return "".join(blocks)


def field_text(field: FieldInfo) -> str:
    """The docstring below a field, on one line."""
    return " ".join((field.description or "").split())


def default_text(field: FieldInfo) -> str:
    """A field's default as TOML writes it, `none`, or `required`."""
    if field.is_required():
        return "required"
    return "none" if field.default is None else json.dumps(field.default)
