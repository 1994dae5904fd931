"""The package's shape does not get worse. A ceiling that no longer binds is lowered, never raised without a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.structure import Structure

PACKAGE = Path(__file__).parents[2] / "titan_growth"


@pytest.fixture(scope="module")
def package() -> Structure:
    return Structure(PACKAGE)


def test_the_package_keeps_its_shape(package: Structure) -> None:
    assert len(package.top_modules) <= 8
    # 9,400 above 25,000: more kinds of corpora and the account of what is left out, tokens of whole documents, special
    # tokens, initial weights, parametrisations, parameter groups, rotary scaling, optimizers, schedules of the batch,
    # frontiers, what plugins are told, folders of other programs, measurements by layer, QK-clip, the SDC
    # check, averages of weights, what is known about planned growths.
    assert sum(package.lines.values()) <= 34_400
    assert package.long_files == []
    assert package.mean_length <= 9.7
    assert package.longest.length <= 57, package.longest
    assert package.documented >= 65
    assert len(package.imports_in_functions) <= 73
    assert len(package.tuple_functions) <= 17
    assert len(package.parsers) <= 2, package.parsers
    assert len(package.private_torch) <= 32


def write(folder: Path, **files: str) -> Structure:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return Structure(folder)


def test_functions_are_counted_with_nested_ones_and_methods(tmp_path: Path) -> None:
    source = (
        'class A:\n    def one(self):\n        """Text."""\n\n'
        "        def two():\n            import os\n\n        return two\n"
    )
    found = write(tmp_path, a=source)
    assert [(str(one), one.length) for one in found.functions] == [("a.py:one", 7), ("a.py:two", 2)]
    assert found.documented == 50.0
    assert found.imports_in_functions == ["a.py:6"]
    assert str(found.longest) == "a.py:one"


def test_only_tuples_of_a_fixed_number_of_items_count(tmp_path: Path) -> None:
    found = write(
        tmp_path,
        a="def pair() -> tuple[int, str]: ...\n"
        "def many() -> tuple[int, ...]: ...\n"
        "def text() -> 'tuple[int, int]': ...\n"
        "def inner() -> list[tuple[int, int]]: ...\n",
    )
    assert found.tuple_functions == ["a.py:pair", "a.py:text"]
    assert found.all_tuple_functions == ["a.py:pair", "a.py:many", "a.py:text"]


def test_parsers_are_loops_over_argv_without_argparse(tmp_path: Path) -> None:
    loop = "def main(argv):\n    words = iter(argv)\n    for word in words:\n        next(words)\n"
    found = write(
        tmp_path,
        by_hand=loop,
        counted="def main(argv):\n    at = 0\n    while at < len(argv):\n        at += 1\n",
        parsed=f"import argparse\n{loop}",
        passes_on="def main(argv):\n    for problem in check(argv):\n        print(problem)\n",
    )
    assert found.parsers == ["by_hand.py", "counted.py"]


def test_private_torch_names_are_found_in_imports_and_attributes(tmp_path: Path) -> None:
    source = (
        "import torch\n"
        "from torch.distributed import distributed_c10d as c10d\n"
        "from torch.distributed._tensor import DTensor\n"
        "from torch.distributed.tensor.experimental import context_parallel\n"
        "torch.cuda.memory._record_memory_history()\n"
        "c10d._world\n"
        "torch.Tensor.__add__\n"
        "def function():\n    other._private\n"
    )
    found = write(tmp_path, a=source)
    assert found.private_torch == ["a.py:3", "a.py:4", "a.py:5", "a.py:6"]
    assert "private torch names, lines            4  a.py 4" in found.table()
