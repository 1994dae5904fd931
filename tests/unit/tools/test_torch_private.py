"""Private and experimental names of PyTorch are used in `tools/torch_private.py` and nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "titan_growth"
HOME = PACKAGE / "tools" / "torch_private.py"
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != HOME]

OTHERS = {"_replace", "_exit", "_strip_protocol", "_fingerprint", "_current_frames"}
"""Attributes with an underscore that are not PyTorch's: of named tuples, `os`, `sys`, fsspec and datasets."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


@cache
def our_names() -> set[str]:
    """Names with an underscore that the package itself defines: functions, classes, variables, attributes."""
    found = set(OTHERS)
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and on_itself(node):
                found.add(node.attr)
    return {name for name in found if is_private(name)}


def on_itself(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def private_names(source: str) -> Iterator[str]:
    """PyTorch's private and experimental names in a module, as `line: name`."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first, *words = name.split(".")
            if first == "torch" and any(is_private(word) or word == "experimental" for word in words):
                yield f"{node.lineno}: {name}"
        if not isinstance(node, ast.Attribute) or on_itself(node) or node.attr in our_names():
            continue
        if is_private(node.attr) or node.attr == "experimental":
            yield f"{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_private_names_of_torch_stay_in_one_module(path: Path) -> None:
    """Add a function with its reason to tools/torch_private.py, and call that."""
    assert list(private_names(path.read_text())) == []


def test_every_form_is_seen() -> None:
    source = """
import torch._dynamo.config
import torch.distributed._functional_collectives as collectives
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.utils import _pytree
torch._foreach_norm(tensors)
dist.distributed_c10d._world.pg_map
mesh["dp", "cp"]._flatten("fsdp")
torch.ops.aten._scaled_mm.default
torch.distributed.tensor.experimental.local_map
self._foreach_norm()
torch.nn.Module.__init__
"""
    assert sorted(int(found.partition(":")[0]) for found in private_names(source)) == list(range(2, 12))


def test_the_module_uses_what_the_test_looks_for() -> None:
    assert len(list(private_names(HOME.read_text()))) > 30
