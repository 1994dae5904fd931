"""Growing a checkpoint on disk: what a run would have grown, in a folder that a run starts from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.harness import WarmRanks
from tests.runs import make_recipe, read_metrics, train
from titan_growth.checkpoint.folder import open_step
from titan_growth.checkpoint.reader import SafeReader
from titan_growth.commands.grow import main as grow_main
from titan_growth.commands.lineage import main as lineage_main
from titan_growth.commands.source import open_source
from titan_growth.models.roles import layer_of, with_layer


@pytest.fixture(scope="module")
def source(warm_ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3 layers, trained for 4 steps on two ranks."""
    folder = tmp_path_factory.mktemp("offline")
    recipe = make_recipe(folder / "run", model__n_layers=3, training__steps=4, checkpoint__enable=True)
    warm_ranks(train, 2, 2, recipe)
    return folder / "run" / "checkpoint" / "step-4"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, whole."""
    reader = SafeReader(folder)
    tensors = {}
    for name, chunks in reader.chunks().items():
        size = reader.tensor_entries()[name].size
        tensors[name] = torch.empty(size, dtype=chunks[0].dtype)
        for chunk in chunks:
            box = tuple(slice(at, at + length) for at, length in zip(chunk.offsets, chunk.sizes, strict=True))
            tensors[name][box] = reader.read_chunk(chunk)
    return tensors


def grow(source: Path, target: Path, *words: str) -> int:
    return grow_main(["--from", str(source), "--to", str(target), *words])


def test_a_stacked_checkpoint_with_its_moments(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert grow(source, tmp_path / "step-4", "--operator", "stack", "--factor", "4") == 0
    assert "3 layers of width 32 -> 12 layers of width 32" in capsys.readouterr().out
    before, after = stored(source), stored(tmp_path / "step-4")
    assert {layer_of(name) for name in after} == {None, *range(12)}
    assert not any(name.startswith("rng.") for name in after)
    for name, tensor in after.items():
        layer = layer_of(name)
        assert torch.equal(tensor, before[name if layer is None else with_layer(name, layer % 3)]), name
    folder = open_step(tmp_path / "step-4")
    assert folder is not None
    assert folder.damage(checksums=True) is None
    assert folder.manifest.progress.step == 4
    (event,) = folder.lineage().ancestors
    assert (event.operator, event.source, event.to_layers) == ("stack", str(source), 12)


@pytest.mark.parametrize(
    "words",
    [
        ["--operator", "zero_width", "--dim", "48", "--n-heads", "6", "--n-kv-heads", "3"],
        pytest.param(
            ["--operator", "split_width", "--factor=2", "--noise", "0.01", "--optimizer-state", "copy_scaled"],
            marks=pytest.mark.slow,
        ),
        ["--operator", "map", "--layer-map", "0,1,1,2"],
    ],
)
def test_a_run_goes_on_from_it(words: list[str], source: Path, tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """With all of its state: counters, moments, cursor; on another mesh."""
    assert grow(source, tmp_path / "grown", *words) == 0
    table = open_step(tmp_path / "grown").recipe_table()["model"]  # type: ignore[union-attr]
    shutil.copy(source.parents[2] / "corpus.txt", tmp_path / "corpus.txt")
    sizes = {f"model__{key}": table[key] for key in ("n_layers", "dim", "n_heads", "n_kv_heads", "hidden_dim")}
    sizes |= {"model__head_dim": table["head_dim"], "model__norm_eps": table["norm_eps"]}
    recipe = make_recipe(
        tmp_path / "run",
        **sizes,
        training__steps=6,
        checkpoint__enable=True,
        checkpoint__initial_load_path=str(tmp_path / "grown"),
        checkpoint__initial_load_model_only=False,
        parallelism__tensor_parallel_degree=1 if table["n_kv_heads"] % 2 else 2,
    )
    warm_ranks(train, 2, 2, recipe)
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [5, 6]
    lineage = json.loads((tmp_path / "run" / "checkpoint" / "step-6" / "lineage.json").read_text())
    assert [event["operator"] for event in lineage["ancestors"]] == [words[1]]
    assert lineage["events"] == []


def test_its_lineage_prints(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert grow(source, tmp_path / "one", "--operator", "stack", "--factor", "2", "--optimizer-state", "reset") == 0
    assert grow(tmp_path / "one", tmp_path / "two", "--operator", "interpose", "--n-layers", "8") == 0
    capsys.readouterr()
    assert lineage_main([str(tmp_path / "two")]) == 0
    text = capsys.readouterr().out
    assert "before this run, step 4: stack, n_layers 3 -> 6" in text
    assert "before this run, step 4: interpose, n_layers 6 -> 8" in text
    assert f"read from {tmp_path / 'one'}" in text
    assert "layers from 0 0 1 2 3 3 4 5" in text
    assert "step 4: 8 layers" in text
    assert lineage_main([str(tmp_path)]) == 1
    assert lineage_main([]) == 2


def test_without_moments(source: Path, tmp_path: Path) -> None:
    assert grow(source, tmp_path / "bare", "--operator", "stack", "--factor", "2", "--optimizer_state=reset") == 0
    assert not any(name.startswith("optimizer.") for name in stored(tmp_path / "bare"))
    assert open_step(tmp_path / "bare").manifest.model_only  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--operator", "stak", "--factor", "2"], 2, "unknown operator 'stak'.*Did you mean 'stack'"),
        (["--operator", "stack"], 2, "--operator: does not say how large the model becomes"),
        (["--operator", "stack", "--dim", "64"], 2, "--dim: has no meaning for 'stack'"),
        (["--operator", "stack", "--factor", "one"], 2, "--factor: "),
        (["--operator", "stack", "--factor"], 2, "--factor: needs a value"),
        (["--operator", "middle", "--factor", "3"], 2, "--operator: middle: adds 6 layers"),
        (["--operator", "random_depth", "--factor", "2"], 2, "goes on during training, so it cannot be done on disk"),
        (["--opera", "stack", "--factor", "2"], 2, "--opera: is no argument.*Did you mean 'operator'"),
    ],
)
def test_what_is_wrong_is_said(
    words: list[str], status: int, said: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert grow(source, tmp_path / "x", *words) == status
    assert re.search(said, capsys.readouterr().out, re.DOTALL)
    assert not (tmp_path / "x").exists()


def test_the_source_and_the_target_are_looked_at(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--operator", "stack", "--factor", "2"]
    assert grow(tmp_path / "none", tmp_path / "x", *words) == 2
    damaged = tmp_path / "damaged"
    shutil.copytree(source, damaged)
    shard = next(damaged.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    assert grow(damaged, tmp_path / "x", *words) == 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert grow(source, tmp_path / "full", *words) == 2
    text = capsys.readouterr().out
    for said in ("no such folder", "does not match its checksum", "is not empty"):
        assert said in text


@pytest.mark.parametrize(
    "settings",
    [
        {"model__hidden_dim": None, "model__multiple_of": 24, "model__ffn_dim_multiplier": 1.3},
        {"model__name": "qwen3", "model__hidden_dim": 64},
    ],
)
def test_what_was_grown_can_be_grown_again(settings: dict[str, object], tmp_path: Path, warm_ranks: WarmRanks) -> None:
    recipe = make_recipe(tmp_path / "run", training__steps=2, checkpoint__enable=True, **settings)
    warm_ranks(train, 1, 1, recipe)
    source = tmp_path / "run" / "checkpoint" / "step-2"
    before = open_source(source)
    wider = ["--operator", "zero_width", "--dim", str(before.config.dim + 16)]
    assert grow(source, tmp_path / "wide" / "step-2", *wider) == 0
    wide = open_source(tmp_path / "wide" / "step-2")
    assert wide.config.dim == before.config.dim + 16
    assert wide.config.norm_eps == pytest.approx(before.config.norm_eps * before.config.dim / wide.config.dim)
    assert wide.config.qk_norm_eps == (before.config.norm_eps if before.config.qk_norm else None)
    assert grow(tmp_path / "wide" / "step-2", tmp_path / "deep" / "step-2", "--operator", "stack", "--factor", "2") == 0
    assert open_source(tmp_path / "deep" / "step-2").config.num_layers == 2 * before.config.num_layers
    assert wide.folder.manifest.seconds > before.folder.manifest.seconds
