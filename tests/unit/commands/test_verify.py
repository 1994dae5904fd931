"""`titan_growth verify`: whole checkpoints pass, and whatever is done to one is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from tests.harness import run_ranks
from tests.runs import make_recipe, train
from titan_growth.checkpoint.folder import file_entry, open_step, write_manifest
from titan_growth.checkpoint.reader import SafeReader
from titan_growth.checkpoint.search import find_checkpoint
from titan_growth.commands.export import main as export_main
from titan_growth.commands.verify import main as verify_main
from titan_growth.config import plugins
from titan_growth.config.schema.recipe import CheckpointConfig
from titan_growth.growth.operators import base
from titan_growth.growth.operators.base import operators
from titan_growth.run.vet import problem_of
from titan_growth.tools.errors import ConfigError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint folder of a run on two ranks that has grown at step 2."""
    folder = tmp_path_factory.mktemp("verify")
    growth = {"growth__stages__0__at": "2 steps", "growth__stages__0__factor": 2}
    recipe = make_recipe(folder / "run", model__n_layers=4, training__steps=3, checkpoint__enable=True, **growth)
    run_ranks(train, 2, 2, recipe)
    return folder / "run" / "checkpoint"


def flip(path: Path) -> None:
    """Turns one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def signed(folder: Path) -> None:
    """Makes the manifest of a folder fit its files, as a stranger can."""
    step = open_step(folder)
    assert step is not None
    names = [path.name for path in folder.iterdir() if path.name != "manifest.json"]
    write_manifest(folder, replace(step.manifest, files={name: file_entry(folder / name) for name in names}))


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Stores other tensors in a folder."""
    reader = SafeReader(folder)
    tensors = {name: torch.cat([reader.read_chunk(one) for one in each]) for name, each in reader.chunks().items()
               if all(len(one.sizes) for one in each)}  # fmt: skip
    change(tensors)
    for path in folder.glob("*.distcp"):
        path.unlink()
    dcp.save(tensors, storage_writer=FileSystemWriter(folder), no_dist=True)
    signed(folder)


def not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layers.1.feed_forward.w1.weight"][3, 4] = torch.nan


def test_every_checkpoint_of_a_run_is_whole(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_main([str(root)]) == 0
    printed = capsys.readouterr().out
    assert "step-2: step 2, 2 layers, written by 2 ranks (dp_shard 2)" in printed
    assert "step-3: step 3, 4 layers, written by 2 ranks" in printed
    assert "1 growth behind it" in printed
    assert "tensors of the model and" in printed


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip(folder / "__0_0.distcp"), "__0_0.distcp does not match its checksum"),
        (lambda folder: flip(folder / ".metadata"), ".metadata does not match its checksum"),
        (lambda folder: (folder / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "it has no manifest, so it was never committed"),
        (lambda folder: (folder / "__0_0.distcp").write_bytes(b"x"), "__0_0.distcp has 1 bytes instead of"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json ends in the middle"),
        (lambda folder: ((folder / "recipe.toml").write_text("[model"), signed(folder)), "its recipe cannot be read"),
        (lambda folder: ((folder / "lineage.json").write_text("[]"), signed(folder)), "its lineage cannot be read"),
        (lambda folder: ((folder / ".metadata").write_bytes(b"cos\nsystem\n(S'x'\ntR."), signed(folder)), "os.system"),
        (lambda folder: rewritten(folder, not_finite), "layers.1.feed_forward.w1.weight is not finite"),
        (lambda folder: rewritten(folder, lambda tensors: tensors.pop("norm.weight")), "it has no norm.weight"),
    ],
)
def test_damage_is_named(
    damage: Callable[[Path], object], message: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root / "step-3", tmp_path / "step-3")
    damage(tmp_path / "step-3")
    assert verify_main([str(tmp_path / "step-3"), str(root / "step-2")]) == 1
    printed = capsys.readouterr().out
    error = next(line for line in printed.splitlines() if line.startswith("error: "))
    assert message in error
    assert "step-2: step 2" in printed, "the others are checked all the same"


def with_plugin(folder: Path, name: str) -> None:
    """As if the growth behind the checkpoint were by the operator of a plugin."""
    text = (folder / "recipe.toml").read_text()
    assert 'operator = "stack"' in text
    assert "plugins = []" in text
    text = text.replace('operator = "stack"', f'operator = "{name}"').replace("plugins = []", f'plugins = ["{name}"]')
    (folder / "recipe.toml").write_text(text)
    signed(folder)


def test_a_good_checkpoint_of_a_plugin_is_not_called_damaged(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not imported either; the message has the words to add, those that were given included."""
    marks = tmp_path / "imported"
    (tmp_path / "doubling.py").write_text(
        f"open({str(marks)!r}, 'w').close()\n"
        "from titan_growth.growth.operators.base import register_operator\n"
        "from titan_growth.growth.operators.depth import Stack\n"
        "register_operator('doubling')(type('Doubling', (Stack,), {'__module__': __name__}))\n"
    )
    (tmp_path / "other_plugin.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(base, "_OPERATORS", dict(operators()))
    monkeypatch.setattr(plugins, "_LOADED", {})
    shutil.copytree(root / "step-3", step := tmp_path / "step-3")
    with_plugin(step, "doubling")
    advice = (
        f"error: plugins: {step} was written with the plugin doubling, and its recipe means nothing without. Nothing "
        "that a checkpoint names is imported by itself. If you trust it, add --plugins "
    )
    assert verify_main([str(step), str(root / "step-2")]) == 2
    printed = capsys.readouterr().out
    assert f"{advice}doubling\n" in printed
    assert "refused" not in printed
    assert "step-2: step 2" in printed, "the others are checked all the same"
    assert not marks.exists()
    assert verify_main([str(step), "--plugins", "other_plugin"]) == 2
    assert capsys.readouterr().out == f"{advice}other_plugin,doubling\n"
    section = CheckpointConfig(enable=True)
    with pytest.raises(ConfigError, match="add --plugins other_plugin,doubling"):
        find_checkpoint(section, tmp_path, problem_of)
    assert export_main(["--from", str(step), "--to", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().out == f"{advice}other_plugin,doubling\n"
    assert verify_main([str(step), "--plugins", "doubling"]) == 0
    assert "1 growth behind it" in capsys.readouterr().out
    assert marks.exists()


def test_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert verify_main(["--help"]) == 0
    assert verify_main([]) == 0, "the help"
    assert verify_main(["--deep"]) == 2
    capsys.readouterr()
    assert verify_main([str(tmp_path / "none")]) == 1
    assert "no such folder" in capsys.readouterr().out
