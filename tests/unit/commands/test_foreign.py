"""A step folder of torchtitan on the command line, and what is said of folders that are no checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli
import torch
import torch.distributed.checkpoint as dcp

from tests.runs import BASE, make_recipe
from titan_growth.__main__ import main
from titan_growth.checkpoint.reader import SafeReader
from titan_growth.commands.described import described
from titan_growth.config.loader import to_toml
from titan_growth.interchange.reader import HuggingFaceReader
from titan_growth.models.registry import family_module, model_config_of
from titan_growth.tools.findings import Findings

MODEL = "".join(
    f"{key.removeprefix('model.')} = {value!r}\n" for key, value in BASE.items() if key.startswith("model.")
)
RECIPE = f'[model]\n{MODEL}[data]\ntokenizer = "bytes"\n[training]\nseq_len = 32\n'


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as torchtitan writes it: weights at the top, entries of bytes among them, and no manifest."""
    root = tmp_path_factory.mktemp("foreign")
    config = model_config_of(make_recipe(root / "sizes").model, Findings())
    assert config is not None
    generator = torch.Generator().manual_seed(3)
    model = family_module("llama3").Decoder(config, 32)
    weights = model.state_dict().items()
    state: dict[str, Any] = {name: torch.randn(one.shape, generator=generator) * 0.02 for name, one in weights}
    (root / "recipe.toml").write_text(RECIPE)
    state |= {"train_state.step": torch.tensor(3), "lr_scheduler.last_epoch": 3}
    dcp.save(state, checkpoint_id=root / "step-3", no_dist=True)
    return root


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    status = main([str(word) for word in words])
    return status, capsys.readouterr().out


def test_it_is_verified_and_exported_with_a_recipe(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step, recipe = theirs / "step-3", ("--recipe", theirs / "recipe.toml")
    assert said(capsys, "verify", step, *recipe) == (
        0,
        f"{step}: 4 layers, 127,392 parameters, written by another program\n"
        "    0.5 MiB of tensors, all of the recipe's model, readable and finite\n"
        "    no manifest: there are no checksums to compare, and no counters\n",
    )
    status, text = said(capsys, "export", "--from", step, "--to", tmp_path / "out", *recipe)
    assert status == 0
    assert "127,392 parameters of step 3 as LlamaForCausalLM" in text
    assert text.endswith("; trained on 32 tokens a sequence, config.json allows 131,072\n")
    config, tokenizer = (json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in
                         ("config", "tokenizer_config"))  # fmt: skip
    assert config["max_position_embeddings"] == tokenizer["model_max_length"] == 131_072
    stored = HuggingFaceReader(tmp_path / "out")
    assert "layers.3.ffn_norm.weight" in stored.tensor_entries()


def test_it_is_grown_with_a_recipe(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("grow", "--from", theirs / "step-3", "--to", tmp_path / "step-3", "--operator", "stack", "--factor", "2")
    status, text = said(capsys, *words, "--recipe", theirs / "recipe.toml")
    assert status == 0, text
    assert "4 layers of width 32 -> 8 layers of width 32, 238,240 parameters, without moments" in text
    status, text = said(capsys, "verify", tmp_path / "step-3")
    assert status == 0, text
    assert "step 3, 8 layers" in text


def test_lineage_and_probe_say_what_there_is(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = said(capsys, "lineage", theirs / "step-3")
    assert (status, "written by another program, such as torchtitan: no growths" in text) == (0, True)
    assert main(["lineage", str(theirs / "step-9")]) == 1
    assert capsys.readouterr().err.endswith("step-9: no such folder. Name a step-N folder\n")
    status, text = said(capsys, "probe", "--from", theirs / "step-3", "--operator", "stack", "--factor", "2")
    assert (status, "DCP folder of another program, such as torchtitan. Give --recipe FILE" in text) == (1, True)
    own = ("probe", "--from", theirs / "step-3", "--operator", "stack", "--settle", "3")
    assert said(capsys, *own) == (
        2,
        "error: --settle: is for a folder of another program. Give its --recipe, or leave it out\n",
    )


GROWTH = "[growth]\nstages = [{at = '50%', factor = 2}]\n"
PROBE = ("--operator", "stack", "--factor", "2", "--steps", "2", "--settle", "3")


def test_a_probe_trains_its_weights_by_the_recipe_first(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE + "steps = 50\n[checkpoint]\nenable = true\n" + GROWTH)
    monkeypatch.setattr("titan_growth.commands.probe.runs._launched", lambda *more: "error: no space")
    words = ("probe", "--from", theirs / "step-3", "--recipe", recipe, "--to", tmp_path / "out", *PROBE)
    status, text = said(capsys, *words)
    assert (status, text.splitlines()) == (
        2,
        ["for moments: 3 steps on 1 rank ...", "error: --recipe: its run does not get to step 3: error: no space"],
    )
    written: dict[str, Any] = {}

    def launched(recipe_file: Path, num_ranks: int, keys: list[str]) -> str:
        written.update(tomli.loads(recipe_file.read_text()), num_ranks=num_ranks, keys=keys)
        return "error: no space"

    monkeypatch.setattr("titan_growth.commands.probe.runs._launched", launched)
    keys = ("--num-ranks", "2", "--", "--training.local_batch_size", "4")
    assert said(capsys, *words, *keys)[0] == 2
    assert (written["num_ranks"], written["keys"]) == (2, ["--training.local_batch_size", "4"])
    assert (written["training"]["steps"], written["lr_scheduler"]["total_steps"]) == (3, 50)
    assert written["checkpoint"]["initial_load_path"] == str(theirs / "step-3")
    assert written["growth"].get("stages", []) == []


@pytest.mark.slow
def test_a_probe_ranks_growths_of_its_weights(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(make_recipe(tmp_path / "none", validation__enable=True)))
    before = sorted(theirs.rglob("*"))
    words = ("probe", "--from", theirs / "step-3", "--recipe", recipe, "--to", tmp_path / "out", *PROBE)
    status, text = said(capsys, *words)
    assert status == 0, text
    table = [" ".join(line.split()[:2]) for line in text.splitlines()]
    assert {"1. stack", "(not grown)"} <= {*table}, text
    assert "started from the weights of" in (tmp_path / "out" / "settled" / "probe.log").read_text()
    assert not list((tmp_path / "out").glob("*/checkpoint"))
    assert sorted(theirs.rglob("*")) == before


def test_what_is_wrong_is_one_line(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = said(capsys, "verify", theirs / "step-3")
    assert status == 1
    assert "refused: it has no manifest, and nothing else of ours: a DCP folder of another program" in text
    assert "Give --recipe FILE, a recipe with its model in [model]" in text
    (tmp_path / "other.toml").write_text(RECIPE.replace("n_layers = 4", "n_layers = 5"))
    words = ("--from", theirs / "step-3", "--to", tmp_path / "out", "--recipe")
    status, text = said(capsys, "export", *words, tmp_path / "other.toml")
    assert status == 1
    assert "it is of another model: has no layers.4." in text
    assert text.endswith("Give a --recipe with its model in [model]\n")
    assert said(capsys, "export", *words, tmp_path / "none.toml")[0] == 2
    assert not (tmp_path / "out").exists()
    shutil.copytree(theirs / "step-3", broken := tmp_path / "step-3")
    (shard,) = broken.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-2000])
    status, text = said(capsys, "verify", broken, "--recipe", theirs / "recipe.toml")
    assert status == 1
    assert text.startswith("error: step-3 refused: ")


def test_a_head_beside_a_tied_embedding_is_not_dropped_in_silence(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchtitan stores both names of tied weights, so their values decide."""
    recipe = tmp_path / "tied.toml"
    recipe.write_text(RECIPE.replace("[model]", "[model]\ntie_word_embeddings = true"))
    for words in (("verify", theirs / "step-3"), ("export", "--from", theirs / "step-3", "--to", tmp_path / "out")):
        status, text = said(capsys, *words, "--recipe", recipe)
        assert status == 1
        assert (
            "step-3 refused: output.weight is not tok_embeddings.weight, though the recipe has "
            "model.tie_word_embeddings = true. Say false there if the head was trained apart"
        ) in text
    reader = SafeReader(theirs / "step-3")
    state = {
        name: reader.read_chunk(chunks[0])
        for name, chunks in reader.chunks().items()
        if "." in name and "state" not in name
    }
    state["output.weight"] = state["tok_embeddings.weight"].clone()
    dcp.save(state, checkpoint_id=tmp_path / "step-4", no_dist=True)
    assert said(capsys, "export", "--from", tmp_path / "step-4", "--to", tmp_path / "out", "--recipe", recipe)[0] == 0


def test_a_recipe_that_is_not_looked_at_is_said(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--from", theirs / "step-3", "--to", tmp_path / "step-3", "--operator", "stack", "--factor", "2")
    assert said(capsys, "grow", *words, "--recipe", theirs / "recipe.toml")[0] == 0
    status, text = said(capsys, "verify", tmp_path / "step-3", "--recipe", theirs / "none.toml")
    assert status == 2
    assert "--recipe: was not looked at: the folders say themselves which model they hold. Leave it out" in text
    both = (tmp_path / "step-3", theirs / "step-3", "--recipe", theirs / "recipe.toml")
    assert said(capsys, "verify", *both)[0] == 0


def test_other_folders_are_described(theirs: Path, tmp_path: Path) -> None:
    assert described(theirs) == (
        f"it is a folder of DCP folders of another program, such as torchtitan. Name one, such as {theirs / 'step-3'}"
    )
    (tmp_path / "run" / "checkpoint" / "step-7").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint" / "step-12").mkdir()
    assert described(tmp_path / "run" / "checkpoint" / "step-12") == (
        "it has no manifest, and nothing else, so it was never committed. Name a step-N folder"
    )
    (tmp_path / "run" / "checkpoint" / "step-7" / "manifest.json").touch()
    newest = tmp_path / "run" / "checkpoint" / "step-7"
    assert described(tmp_path / "run") == (
        f"it is the folder of a run. Name one of its checkpoints; the newest is {newest}"
    )
    assert described(tmp_path / "run" / "checkpoint") == (
        f"it is a folder of checkpoints. Name one of its checkpoints; the newest is {newest}"
    )
    (tmp_path / "model.safetensors").touch()
    assert described(tmp_path).startswith("it is a Hugging Face folder. grow and import take it")
