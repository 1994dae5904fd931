"""docs/recipe.md is what the schema says."""

from __future__ import annotations

from tests import recipe_page
from tests.unit.config.test_torchtitan import SHARED
from titan_growth.config.fields import leaves
from titan_growth.config.schema.recipe import Recipe


def test_the_page_is_up_to_date() -> None:
    written = recipe_page.PAGE.read_text(encoding="utf-8")
    assert written == recipe_page.page(), f"docs/recipe.md is stale. Run: {recipe_page.COMMAND}"


def test_every_key_is_on_the_page() -> None:
    """Counted from the flags, by another way than the page's own."""
    keys = {key.replace(".N.", ".") for key, _ in leaves(Recipe)}
    keys = {key for key in keys if not key.startswith("growth.stages.parallelism.")} | {"growth.stages.parallelism"}
    assert set(rows_of(recipe_page.page())) == keys


def test_torchtitans_keys_are_marked() -> None:
    rows = rows_of(recipe_page.page())
    assert sorted(key for key, row in rows.items() if row.split(" | ")[3].startswith("yes")) == SHARED


def rows_of(page: str) -> dict[str, str]:
    """Dotted key -> its row."""
    rows, table = {}, ""
    for line in page.split("## torchtitan's other keys")[0].splitlines():
        if line.startswith("## "):
            table = line[3:].strip("[]") + "." if "[" in line else ""
        elif line.startswith("| `"):
            rows[table + line.split("`")[1]] = line
    return rows
