"""Attacks on what is read beside tensors and metadata: manifest, lineage, recipe, and the files as such."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.unit.hostile import CASES, NOT_FOR_A_START, Bomb, case
from titan_growth.tools.sealed import sealed

__all__ = ["CASES", "NOT_FOR_A_START"]


def with_manifest(step: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the manifest so that it can no longer be read as one."""
    table = json.loads((step / "manifest.json").read_text())
    change(table)
    (step / "manifest.json").write_text(sealed(table))


def _manifest(name: str, **values: Any) -> None:
    case(f"manifest: {name}")(lambda step, bomb: with_manifest(step, lambda table: table.update(values)))


_manifest("layers as text", num_layers="x")
_manifest("a negative step", step=-4)
_manifest("true as a step", step=True)
_manifest("permanent as text", permanent="yes")
_manifest("losses as text", recent_losses=["a"])
_manifest("endless seconds", seconds=float("inf"))
_manifest("a roll-back with other keys", roll_back={"growth": 0, "run": "me"})
_manifest("a window as text", stability={"window": ["ab"]})
_manifest("a bad step without its data", stability={"events": [{"step": 1, "action": "skip", "reason": "x"}]})
_manifest("files as a list", files=["__0_0.distcp"])
_manifest("a file above the folder", files={"../../x": {"bytes": 1, "sha256": "0"}})
_manifest("a file with a line of its own", files={"x\nstep-4 is fine\x1b[2J": {"bytes": 1, "sha256": "0"}})
_manifest("a file of negative size", files={"x": {"bytes": -1, "sha256": "0"}})
_manifest("an unknown key", surprise=1)
_manifest("a number of 4,000 digits", flops=10**4000)


@case("manifest: nested 100,000 times")
def _(step: Path, bomb: Bomb) -> None:
    (step / "manifest.json").write_text('{"data":' * 100_000 + "}" * 100_000 + "\n")


@case("manifest: the metadata is not listed", start=False)
def _(step: Path, bomb: Bomb) -> None:
    with_manifest(step, lambda table: table["files"].pop(".metadata"))


@case("manifest: a shard is not listed")
def _(step: Path, bomb: Bomb) -> None:
    with_manifest(step, lambda table: table["files"].pop("__0_0.distcp"))


@case("lineage: nested 100,000 times", start=False)
def _(step: Path, bomb: Bomb) -> None:
    (step / "lineage.json").write_text("[" * 100_000)


def _lineage(name: str, **values: Any) -> None:
    def change(step: Path, bomb: Bomb) -> None:
        table = json.loads((step / "lineage.json").read_text())
        table["events"][0].update(values)
        (step / "lineage.json").write_text(json.dumps(table))

    case(f"lineage: {name}", start=False)(change)


_lineage("sizes as text", to_sizes={"n_layers": "2"})
_lineage("no layers", to_sizes={"dim": 2})
_lineage("an unknown key", surprise=1)


@case("lineage: no growths", start=False)
def _(step: Path, bomb: Bomb) -> None:
    (step / "lineage.json").write_text('{"events": []}\n')


def _recipe(name: str, old: str, new: str) -> None:
    def change(step: Path, bomb: Bomb) -> None:
        text = (step / "recipe.toml").read_text()
        assert old in text
        (step / "recipe.toml").write_text(text.replace(old, new, 1))

    case(f"recipe: {name}", start=False)(change)


_recipe("a billion layers", "n_layers = 2", f"n_layers = {10**12}")
_recipe("a width of 2^62", "dim = 16", f"dim = {2**62}")
_recipe("nested 10,000 times", "[model]", f"x = {'[' * 10_000}\n[model]")
_recipe("a number of a million digits", "n_layers = 2", f"n_layers = 0x{'f' * 800_000}")
_recipe("no recipe", "[model]", "[model")
_recipe("an unknown key with escape sequences", "[model]", '"\\u001b[2J" = 1\n[model]')
_recipe("another width", "dim = 16", "dim = 32")


@case("recipe: eight gigabytes", start=False)
def _(step: Path, bomb: Bomb) -> None:
    _sparse(step, "recipe.toml", 8 << 30)


@case("a shard of a terabyte")
def _(step: Path, bomb: Bomb) -> None:
    _sparse(step, "__0_0.distcp", 1 << 40)


def _sparse(step: Path, name: str, num_bytes: int) -> None:
    """A huge file that takes no room, with a manifest that lists it."""
    with (step / name).open("r+b") as file:
        file.truncate(num_bytes)
    with_manifest(step, lambda table: table["files"][name].update(bytes=num_bytes))


@case("a shard that is a link to another folder")
def _(step: Path, bomb: Bomb) -> None:
    (step / "__0_0.distcp").rename(step.parent / "secret")
    (step / "__0_0.distcp").symlink_to("../secret")


@case("a shard that is a pipe")
def _(step: Path, bomb: Bomb) -> None:
    (step / "__0_0.distcp").unlink()
    os.mkfifo(step / "__0_0.distcp")


@case("a manifest that is a pipe")
def _(step: Path, bomb: Bomb) -> None:
    (step / "manifest.json").unlink()
    os.mkfifo(step / "manifest.json")


@case("a manifest that is a device")
def _(step: Path, bomb: Bomb) -> None:
    (step / "manifest.json").unlink()
    (step / "manifest.json").symlink_to("/dev/zero")
