"""The shape of the package in numbers: `python -m tests.structure [PACKAGE_DIR]`.

What counts: every `def` of every file, nested ones and methods too. A function's length is its lines from `def` to its
last, decorators apart. Imports are in-function anywhere below a `def`. A private torch name has a part that begins with
one underscore, or is called experimental, in an import or an attribute written out from a module or class of torch.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef

LONG_FILE = 300


@dataclass(frozen=True)
class Function:
    """A function and the file it is in, relative to the package."""

    file: str
    node: FunctionNode

    @property
    def length(self) -> int:
        return (self.node.end_lineno or self.node.lineno) - self.node.lineno + 1

    def __str__(self) -> str:
        return f"{self.file}:{self.node.name}"


class Structure:
    """Counts of a package."""

    def __init__(self, package: Path) -> None:
        paths = sorted(package.rglob("*.py"))
        assert paths, f"{package} has no Python files"
        texts = {str(path.relative_to(package)): path.read_text(encoding="utf-8") for path in paths}
        self.trees = {file: ast.parse(text) for file, text in texts.items()}
        self.lines = {file: len(text.splitlines()) for file, text in texts.items()}
        self.functions = [
            Function(file, node)
            for file, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, FunctionNode)
        ]

    @cached_property
    def top_modules(self) -> list[str]:
        """Modules that lie in no folder."""
        return [file for file in self.lines if "/" not in file]

    @cached_property
    def long_files(self) -> list[str]:
        """Files over 300 lines."""
        return [f"{file} ({count})" for file, count in self.lines.items() if count > LONG_FILE]

    @cached_property
    def longest(self) -> Function:
        """The longest function."""
        return max(self.functions, key=lambda function: function.length)

    @cached_property
    def mean_length(self) -> float:
        """Lines of a function."""
        return sum(function.length for function in self.functions) / len(self.functions)

    @cached_property
    def documented(self) -> float:
        """Percent of functions with a docstring."""
        return 100 * sum(ast.get_docstring(one.node) is not None for one in self.functions) / len(self.functions)

    @cached_property
    def imports_in_functions(self) -> list[str]:
        """Import statements inside functions."""
        found = {
            (function.file, node.lineno)
            for function in self.functions
            for node in ast.walk(function.node)
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        return [f"{file}:{line}" for file, line in sorted(found)]

    @cached_property
    def tuple_functions(self) -> list[str]:
        """Functions that return a fixed number of values: `tuple[X, Y]`, not `tuple[X, ...]`."""
        return [str(function) for function in self.functions if len(_tuple_items(function.node)) > 1]

    @cached_property
    def all_tuple_functions(self) -> list[str]:
        """The same with `tuple[X, ...]`."""
        return [str(function) for function in self.functions if _tuple_items(function.node)]

    @cached_property
    def parsers(self) -> list[str]:
        """Modules that read command-line words themselves, without argparse."""
        found = dict.fromkeys(one.file for one in self.functions if _walks_over_argv(one.node))
        return [file for file in found if "argparse" not in _imported(self.trees[file])]

    @cached_property
    def private_torch(self) -> list[str]:
        """Places that use private or experimental names of torch."""
        return [f"{file}:{line}" for file, tree in self.trees.items() for line in sorted(set(_private_names(tree)))]

    def table(self) -> str:
        """All counts as text; few names are named."""
        rows = [
            ("modules on top", len(self.top_modules), f"{sum(self.lines[file] for file in self.top_modules):,} lines"),
            ("files", len(self.lines), f"{sum(self.lines.values()):,} lines"),
            (f"files over {LONG_FILE} lines", len(self.long_files), ", ".join(self.long_files)),
            ("functions", len(self.functions), f"mean {self.mean_length:.1f} lines"),
            ("longest function, lines", self.longest.length, str(self.longest)),
            ("functions with docstrings, %", round(self.documented), ""),
            ("in-function imports", len(self.imports_in_functions), ""),
            ("functions returning tuple[X, Y]", len(self.tuple_functions), ""),
            ("  tuple[X, ...] included", len(self.all_tuple_functions), ""),
            ("hand-written parsers", len(self.parsers), ", ".join(self.parsers)),
            ("private torch names, lines", len(self.private_torch), _by_file(self.private_torch)),
        ]
        return "\n".join(f"{name:<33}{count:>6}  {note}".rstrip() for name, count, note in rows)


def _tuple_items(node: FunctionNode) -> list[ast.expr]:
    """Items of a function's `tuple[...]` annotation; `...` is none."""
    returned = node.returns
    if isinstance(returned, ast.Constant) and isinstance(returned.value, str):
        returned = ast.parse(returned.value, mode="eval").body
    if not (isinstance(returned, ast.Subscript) and ast.unparse(returned.value).lower() == "tuple"):
        return []
    items = returned.slice.elts if isinstance(returned.slice, ast.Tuple) else [returned.slice]
    return [item for item in items if not (isinstance(item, ast.Constant) and item.value is ...)]


def _imported(tree: ast.AST) -> set[str]:
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def _walks_over_argv(node: FunctionNode) -> bool:
    """Whether a loop or comprehension goes over the parameter `argv`, or over an iterator of it."""
    parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    if "argv" not in (parameter.arg for parameter in parameters):
        return False
    inner = list(ast.walk(node))
    words = {"argv"}
    for assigned in (one for one in inner if isinstance(one, ast.Assign)):
        if _is_words(assigned.value, words):
            words |= {target.id for target in assigned.targets if isinstance(target, ast.Name)}
    loops = [one.iter for one in inner if isinstance(one, ast.For | ast.comprehension)]
    counted = [one.test for one in inner if isinstance(one, ast.While)]
    return any(_is_words(loop, words) for loop in loops) or any(_names(test) & words for test in counted)


def _is_words(node: ast.expr, words: set[str]) -> bool:
    """`argv`, a slice of it, or `iter(argv)` and the like; what any other function makes of it is not a word list."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("iter", "list", "enumerate", "deque", "reversed"):
        return any(_is_words(argument, words) for argument in node.args)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
        return _is_words(node.value, words)
    return isinstance(node, ast.Name) and node.id in words


def _names(node: ast.AST) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}


def _private_names(tree: ast.AST) -> Iterator[int]:
    """Lines of private torch names."""
    of_torch = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                of_torch.add(alias.asname or alias.name)
                if _is_private(f"{node.module}.{alias.name}"):
                    yield alias.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    of_torch.add(alias.asname or "torch")
                    if _is_private(alias.name):
                        yield node.lineno
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and _root(node) in of_torch:
            yield node.lineno


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _is_private(name: str) -> bool:
    parts = name.split(".")
    return any(part.startswith("_") and not part.startswith("__") for part in parts) or "experimental" in parts


def _by_file(places: list[str]) -> str:
    files = [place.rpartition(":")[0] for place in places]
    return ", ".join(f"{file} {files.count(file)}" for file in dict.fromkeys(files))


if __name__ == "__main__":
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "titan_growth"
    print(Structure(root).table())
