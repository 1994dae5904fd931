"""The table of folders in docs/composition.md is the one that test_imports.py enforces."""

from __future__ import annotations

import re

from tests.unit.docs.pages import ROOT
from tests.unit.test_imports import LAYERS, SEPARATE

ROW = re.compile(r"^\| `([\w.]+?)(?:/|\.py)` \| .* \| (nothing|all)(?: but (.*?))? \|$", re.M)


def test_folders_and_what_they_may_import() -> None:
    page = (ROOT / "docs" / "composition.md").read_text().split("## Folders")[1].split("\n## ")[0]
    rows = ROW.findall(page)
    names = [name for name, _, _ in rows]
    listed = [name for layer in LAYERS for name in layer if name not in ("version", "__init__")]
    assert names == listed, "the rows are the layers of test_imports.py, lowest first"
    for number, (name, _, apart) in enumerate(rows):
        partners = {other for pair in SEPARATE if name in pair for other in pair} - {name}
        assert set(re.findall(r"`(\w+)`", apart)) == partners & set(names[:number]), name
