"""Writes docs/recipe.md: every key of the recipe, from the schema.

python -m tests.recipe_page
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from titan_growth.config.fields import section_of, type_text
from titan_growth.config.help import default_text, field_text
from titan_growth.config.schema.recipe import Recipe
from titan_growth.config.torchtitan_keys import IGNORED, NEUTRAL

COMMAND = "python -m tests.recipe_page"
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "recipe.md"
TORCHTITAN: dict[str, object] = json.loads((ROOT / "tests" / "golden" / "torchtitan_defaults.json").read_text())

INTRODUCTION = f"""# Recipe keys

Every key of a recipe. Each is also a flag: `--section.key value`, `--section.key=value` or, for true, a bare
`--section.key`. `./run_train.sh --help SECTION` prints one table; [the README](../README.md) has an example.

**torchtitan** says whether torchtitan 0.2.2 has the key: *yes*, with the same default unless another one is named;
*no* marks the keys that exist only here.

Generated from `titan_growth/config/schema/` by `{COMMAND}`.
"""

ELSEWHERE = """## torchtitan's other keys

These keys of torchtitan 0.2.2 have no counterpart here. The values listed load, because they ask for nothing that is
missing; any other value is refused by name.

| key | values that load |
| --- | --- |
"""

WITHOUT_EFFECT = """
These load with a warning: they belong to features that are off.

| key | no effect, because |
| --- | --- |
"""


def page() -> str:
    """The whole page."""
    tables = dict(sections(Recipe))
    index = "Tables: " + ", ".join(f"[`{name}`](#{_anchor(name)})" for name in tables if name) + "."
    return "\n".join(
        [INTRODUCTION, _wrapped(index), "", *(_table(name, section) for name, section in tables.items()), _others()]
    )


def sections(root: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Dotted name and class of every table that has keys, the recipe itself first."""
    if any(section_of(field.annotation) is None for field in root.model_fields.values()):
        yield prefix, root
    for name, field in root.model_fields.items():
        section = section_of(field.annotation)
        if section and not _is_repeated(name, section, prefix):
            yield from sections(section, f"{prefix}.{name}" if prefix else name)


def _is_repeated(name: str, section: type[BaseModel], prefix: str) -> bool:
    """Whether a nested table is one of the recipe's own: a growth may have its own [parallelism]."""
    return bool(prefix) and name in Recipe.model_fields and Recipe.model_fields[name].annotation is section


def _table(name: str, section: type[BaseModel]) -> str:
    lines = [f"## {_heading(name)}", ""]
    if name:
        lines += [_wrapped(" ".join((section.__doc__ or "").split())), ""]
    lines += ["| key | type | default | torchtitan | |", "| --- | --- | --- | --- | --- |"]
    for key, field in section.model_fields.items():
        nested = section_of(field.annotation)
        if nested is None or _is_repeated(key, nested, name):
            lines.append(_row(name, key, field))
    return "\n".join([*lines, ""])


def _row(table: str, key: str, field: FieldInfo) -> str:
    kind = "a table" if section_of(field.annotation) else type_text(field.annotation)
    text = re.sub(r"docs/([\w/]+\.md)", r"[\1](\1)", field_text(field))
    cells = [f"`{key}`", kind, default_text(field), _in_torchtitan(f"{table}.{key}", field.default), text]
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _in_torchtitan(key: str, default: object) -> str:
    if key not in TORCHTITAN:
        return "no"
    other = TORCHTITAN[key]
    return "yes" if other == default else f"yes, `{json.dumps(other)}`"


def _others() -> str:
    neutral = [
        f"| `{key}` | {', '.join(f'`{json.dumps(value)}`' for value in values)} |" for key, values in NEUTRAL.items()
    ]
    ignored = [f"| `{key}` | {reason} |" for key, reason in IGNORED.items()]
    return ELSEWHERE + "\n".join(neutral) + "\n" + WITHOUT_EFFECT + "\n".join(ignored) + "\n"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, width=120, break_on_hyphens=False, break_long_words=False)


def _heading(name: str) -> str:
    return {"": "Outside all tables", "growth.stages": "[[growth.stages]]"}.get(name, f"[{name}]")


def _anchor(name: str) -> str:
    """GitHub's anchor of the heading: punctuation is dropped."""
    return name.replace(".", "")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
