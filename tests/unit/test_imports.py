"""Imports point one way, from folder to folder (docs/composition.md), those inside functions included."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "titan_growth"

LAYERS: list[tuple[str, ...]] = [
    ("version", "__init__"),
    ("tools",),
    ("config", "liveness"),
    ("models", "data"),
    ("optimizers",),
    ("checkpoint",),
    ("growth", "interchange"),
    ("layout",),
    ("stages",),
    ("engine", "metrics"),
    ("run",),
    ("grower",),
    ("trainer",),
    ("session",),
    ("commands",),
    ("train",),
    ("launch",),
    ("__main__",),
]
"""Lowest first. A module may import from its own folder, and from folders below it."""

SEPARATE = [
    ("config", "liveness"),
    ("models", "data"),
    ("checkpoint", "data"),
    ("growth", "interchange"),
    ("data", "metrics"),
    ("engine", "metrics"),
    ("engine", "data"),
    ("engine", "checkpoint"),
]
"""Folders that know nothing of each other, though one may stand below the other."""


def layer_of(module: str) -> int:
    found = [
        number
        for number, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(name + ".")
    ]
    assert len(found) == 1, f"titan_growth.{module} has no layer (or two): put it into LAYERS"
    return found[0]


def modules() -> dict[str, Path]:
    """Module name without `titan_growth.` -> file."""
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def imports_of(source: str, module: str, known: set[str]) -> set[str]:
    """Modules of the package that a source imports anywhere, also inside functions and `TYPE_CHECKING` blocks."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] != "titan_growth":
                continue
            parts = name.split(".")[1:]
            while parts and ".".join(parts) not in known and ".".join([*parts, "__init__"]) not in known:
                parts.pop()  # the last part is a name in the module
            target = ".".join(parts) or "__init__"
            found.add(target if target in known else f"{target}.__init__")
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_down(module: str) -> None:
    known = modules()
    layer = layer_of(module)
    for target in sorted(imports_of(known[module].read_text(), module, set(known))):
        assert layer_of(target) <= layer, f"titan_growth.{module} imports titan_growth.{target}, which is above it"


def test_parts_of_a_layer_stay_apart() -> None:
    known = modules()
    pairs = {
        (module.split(".")[0], target.split(".")[0])
        for module, path in known.items()
        for target in imports_of(path.read_text(), module, set(known))
    }
    for one, other in SEPARATE:
        assert (one, other) not in pairs
        assert (other, one) not in pairs


def test_every_layer_is_made_of_modules_that_exist() -> None:
    """A renamed module must not leave its old name behind in the table."""
    known = modules()
    for names in LAYERS:
        for name in names:
            assert name in known or f"{name}.__init__" in known, name


def test_there_are_no_cycles() -> None:
    """Two modules of one layer may not import each other at module level."""
    known = modules()
    graph = {}
    for module, path in known.items():
        tree = ast.parse(path.read_text())
        top = ast.Module(
            body=[node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], type_ignores=[]
        )
        graph[module] = imports_of(ast.unparse(top), module, set(known))
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) == set(known)


def test_the_reader_of_imports_sees_all_forms() -> None:
    known = {"__init__", "tools.errors", "tools.__init__", "data.__init__", "engine.optimizer"}
    source = """
import titan_growth.engine.optimizer
from titan_growth import data
def later():
    from titan_growth.tools.errors import Problem
    from titan_growth.tools import errors
    import titan_growth.tools
"""
    assert imports_of(source, "x", known) == {"engine.optimizer", "data.__init__", "tools.errors", "tools.__init__"}
