"""Packages that are missing: each is hidden from import, and what needs it says so before anything starts."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.runs import BASE, argv_of, write_corpus
from titan_growth.__main__ import main
from titan_growth.tools.packages import CORE, EXTRAS

CHECKOUT = Path(__file__).parents[3]
PROJECT = tomli.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
NAMES = {"upath": "universal-pathlib"}

HIDE = """
import os, sys

class Hider:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in os.environ["HIDDEN"].split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hider())
"""


def run(folder: Path, hidden: list[str], *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A command in a process (and its children) that cannot import some packages."""
    (folder / "sitecustomize.py").write_text(HIDE)
    environ |= {"HIDDEN": " ".join(hidden), "PYTHONPATH": f"{folder}:{CHECKOUT}", "VIRTUAL_ENV": sys.prefix}
    return subprocess.run(
        command, env={**os.environ, **environ}, cwd=folder, capture_output=True, text=True, timeout=120
    )


# ---- core ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["torch", "torchdata", "tensorboard", "tomli", "sentencepiece", "pydantic"])
@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "titan_growth", "plan"],
        [sys.executable, "-m", "titan_growth.train"],
        [str(CHECKOUT / "run_train.sh")],
    ],
    ids=["titan_growth", "rank", "run_train"],
)
def test_no_entry_point_starts_without_a_core_package(module: str, command: list[str], tmp_path: Path) -> None:
    result = run(tmp_path, [module], *command)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith(f"error: {module} is not installed for ")
    assert f"Run pip install '{CORE[module]}', or ./setup.sh train" in line
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["sitecustomize.py"]


def test_all_missing_core_packages_are_named_at_once(tmp_path: Path) -> None:
    result = run(tmp_path, ["tomli_w", "zstandard"], sys.executable, "-m", "titan_growth", "check")
    assert result.returncode == 2
    assert result.stderr.startswith("error: tomli-w, zstandard are not installed for ")
    assert "pip install 'tomli-w>=1.0' 'zstandard>=0.22', or" in result.stderr


def test_help_and_version_need_no_package(tmp_path: Path) -> None:
    for word in ("--help", "--version"):
        assert run(tmp_path, list(CORE), sys.executable, "-m", "titan_growth", word).returncode == 0


@pytest.mark.slow  # torchrun imports torch
def test_ranks_of_torchrun_say_it(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "titan_growth.train"]
    result = run(tmp_path, ["tomli"], sys.executable, *torchrun)
    assert result.returncode != 0
    assert "error: tomli is not installed" in result.stderr
    assert "ModuleNotFoundError" not in result.stderr
    assert "exitcode  : 2" in result.stderr


# ---- extras ----------------------------------------------------------------------------------------------------------


def test_the_default_recipe_needs_no_extra(tmp_path: Path) -> None:
    result = run(tmp_path, list(EXTRAS), sys.executable, "-m", "titan_growth", "plan")
    assert result.returncode == 0, result.stderr
    assert "model: llama3" in result.stdout


@pytest.mark.slow  # a whole run
def test_a_run_needs_no_extra(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.txt")
    values = {**BASE, "job.dump_folder": str(tmp_path / "run"), "training.dataset_path": str(tmp_path / "corpus.txt")}
    values |= {"metrics.enable_tensorboard": True, "checkpoint.enable": True, "growth.enable": False}
    result = run(tmp_path, list(EXTRAS), str(CHECKOUT / "run_train.sh"), *argv_of(values), NGPU="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "run" / "metrics.jsonl").exists()


FLOAT8 = ["--model.converters", "quantize.linear.float8"]


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        ("wandb", ["--metrics.enable_wandb"], "metrics.enable_wandb: needs the package wandb, which is not installed"),
        ("torchao", FLOAT8, "model.converters: needs the package torchao, which is not installed"),
        ("datasets", ["--training.dataset", "some/corpus"], "training.dataset: needs the package datasets, which"),
        ("datasets", ["--training.dataset_path", "SAVED"], "training.dataset_path: needs the package datasets, which"),
        ("pyarrow", ["--training.dataset_path", "a.parquet"], "training.dataset_path: needs the package pyarrow"),
        ("upath", ["--data.tokenizer_path", "memory://a/t.model"], "needs the package universal_pathlib, which"),
        ("fsspec", ["--checkpoint.folder", "file:///a"], "checkpoint.folder: file:///a: needs the package fsspec"),
    ],
    ids=["wandb", "float8", "hub", "saved", "parquet", "url", "checkpoint-url"],
)
def test_check_names_the_key_and_the_extra(
    module: str, words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # what import and find_spec take for a package that is not there
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").write_bytes(b"PAR1")
    Path("SAVED").mkdir()
    for name in ("state.json", "dataset_info.json"):
        Path("SAVED", name).write_text("{}")
    values = {**BASE, "job.dump_folder": "run", "checkpoint.enable": True}
    assert main(["check", *argv_of(values), *words]) == 2
    output = "".join(capsys.readouterr())
    assert message in output
    assert f"pip install 'titan_growth[{EXTRAS[module]}]'" in output
    assert "Traceback" not in output


def test_plot_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", "a=run", "--to", str(tmp_path / "a.png")]) == 2
    message = "error: --to: needs the package matplotlib, which is not installed. Run pip install 'titan_growth[plot]'"
    assert message in "".join(capsys.readouterr())


# ---- tables ----------------------------------------------------------------------------------------------------------


def module_level(nodes: list[ast.stmt]) -> Iterator[str]:
    """Packages that a module imports when it is imported itself."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]
        elif not isinstance(node, ast.FunctionDef) and not ast.unparse(node).startswith("if TYPE_CHECKING:"):
            for field in ("body", "orelse", "handlers", "finalbody"):
                yield from module_level(getattr(node, field, []))


def test_no_module_imports_an_extra_at_module_level() -> None:
    for path in (CHECKOUT / "titan_growth").rglob("*.py"):
        found = set(module_level(ast.parse(path.read_text()).body)) & set(EXTRAS)
        assert not found, f"{path}: {found}"


def test_the_tables_are_those_of_pyproject() -> None:
    assert sorted(CORE.values()) == sorted(PROJECT["dependencies"])
    extras = PROJECT["optional-dependencies"]
    for module, extra in EXTRAS.items():
        names = {canonicalize_name(Requirement(line).name) for line in extras[extra]}
        assert NAMES.get(module, module) in names


def test_constraints_pin_what_pyproject_asks_for() -> None:
    lines = [line for line in (CHECKOUT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(pin.name): pin for pin in map(Requirement, lines)}
    extras = PROJECT["optional-dependencies"]
    used = [line for name in ("plot", "float8", "hub", "remote", "dev") for line in extras[name]]
    for requirement in map(Requirement, PROJECT["dependencies"] + used):
        if requirement.name != PROJECT["name"]:
            [pin] = pins[canonicalize_name(requirement.name)].specifier
            assert pin.operator == "=="
            assert requirement.specifier.contains(pin.version), requirement
