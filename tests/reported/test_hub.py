"""Reports about Hugging Face folders: tied heads, rotary settings, and settings of an export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hugging_face import SCALED, edit_config, make_folder, our_logits, some_tokens, their_logits
from titan_growth.commands.export import export_folder
from titan_growth.commands.import_ import main as import_main
from titan_growth.interchange.reader import HuggingFaceReader
from titan_growth.run.initial import initial_notes, initial_reader


def written(path: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """A small folder of one file."""
    import transformers

    make_folder(path, dtype=dtype, **settings)
    transformers.AutoModelForCausalLM.from_pretrained(path).save_pretrained(path.with_name(f"{path.name}-whole"))
    return path.with_name(f"{path.name}-whole")


def put_head(folder: Path, head: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), "lm_head.weight": head}, file, metadata={"format": "pt"})


def test_transformers_42612_a_head_of_its_own_in_a_tied_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(tmp_path / "tied", tie_word_embeddings=True)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    put_head(folder, embedding.clone())
    assert import_main(["--from", str(folder), "--to", str(tmp_path / "copy")]) == 0
    other = embedding.clone()
    other[-1, -1] += 1
    put_head(folder, other)
    capsys.readouterr()
    assert import_main(["--from", str(folder), "--to", str(tmp_path / "step")]) == 1
    assert (
        capsys.readouterr()
        .out.strip()
        .endswith(
            "tied-whole refused: lm_head.weight is not model.embed_tokens.weight, though its config.json says "
            "tie_word_embeddings = true. Say false there if the head was trained apart, or take "
            "lm_head.weight out of its "
            "files"
        )
    )
    assert not (tmp_path / "step").exists()
    edit_config(folder, tie_word_embeddings=False)
    assert import_main(["--from", str(folder), "--to", str(tmp_path / "step")]) == 0
    tokens = some_tokens(16)
    assert (our_logits(tmp_path / "step", tokens) - their_logits(folder, tokens)).abs().max() < 1e-5


def test_transformers_42612_a_head_that_a_tied_recipe_leaves_out(tmp_path: Path) -> None:
    warning = "is left out: model.tie_word_embeddings = true takes tok_embeddings.weight for it"
    for tied_there in (True, False):
        folder = written(tmp_path / f"tied-{tied_there}", tie_word_embeddings=tied_there)
        step = tmp_path / f"step-of-{tied_there}"
        assert import_main(["--from", str(folder), "--to", str(step)]) == 0
        for source in (folder, step):
            for tied_here in (True, False):
                config = replace(HuggingFaceReader(folder).opened.config, tie_word_embeddings=tied_here)
                notes = initial_notes(initial_reader(source, "llama3", config), {}, config)
                left_out = tied_here and not tied_there
                assert notes == ([f"output.weight of {source.name} {warning}"] if left_out else [])


def test_litgpt_1727_a_tied_model_comes_out_tied(tmp_path: Path) -> None:
    folder = written(tmp_path / "tied", tie_word_embeddings=True)
    assert import_main(["--from", str(folder), "--to", str(tmp_path / "step")]) == 0
    export_folder(tmp_path / "step", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    tokens = some_tokens(16)
    assert (their_logits(tmp_path / "out", tokens) - their_logits(folder, tokens)).abs().max() == 0


@pytest.mark.parametrize("scaling", [None, SCALED], ids=["plain", "scaled"])
def test_marin_7156_rotary_settings_for_older_and_newer_readers(scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    folder = written(tmp_path / "folder", rope_theta=12345.0, rope_scaling=scaling)
    assert import_main(["--from", str(folder), "--to", str(tmp_path / "step")]) == 0
    export_folder(tmp_path / "step", tmp_path / "out")
    table = json.loads((tmp_path / "out" / "config.json").read_text())
    assert table["rope_theta"] == table["rope_parameters"]["rope_theta"] == 12345.0
    assert table["rope_scaling"] == scaling
    tokens = some_tokens(48)
    for keys in ({}, {"rope_parameters": None}):  # as each version of transformers reads it
        edit_config(tmp_path / "out", **keys)
        assert (their_logits(tmp_path / "out", tokens) - their_logits(folder, tokens)).abs().max() < 1e-6


def test_nanotron_188_rotary_base_of_the_folder(tmp_path: Path) -> None:
    folder = written(tmp_path / "folder", rope_theta=12345.0)
    assert import_main(["--from", str(folder), "--to", str(tmp_path / "step")]) == 0
    tokens = some_tokens(48)
    found = our_logits(tmp_path / "step", tokens)
    assert (found - their_logits(folder, tokens)).abs().max() < 1e-5
    edit_config(folder, rope_theta=10000.0, rope_parameters=None)
    assert (found - their_logits(folder, tokens)).abs().max() > 1e-3, "the base does not matter here"
