"""Hugging Face folders in and out: the same bytes, the same numbers, the same tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import run_ranks
from tests.hugging_face import (
    SCALED,
    edit_config,
    make_folder,
    our_logits,
    some_tokens,
    stored,
    their_logits,
    weights_of,
)
from tests.runs import make_recipe, train
from titan_growth.checkpoint.folder import open_step
from titan_growth.commands.export import export_folder
from titan_growth.commands.export import main as export_main
from titan_growth.commands.grow import main as grow_main
from titan_growth.commands.import_ import main as import_main
from titan_growth.commands.lineage import main as lineage_main
from titan_growth.commands.verify import main as verify_main
from titan_growth.interchange import reader as reader_module
from titan_growth.interchange.reader import HuggingFaceReader, in_halves, in_pairs
from titan_growth.models.hugging_face import parameter_shapes
from titan_growth.models.registry import FAMILIES, family_module, model_config_of
from titan_growth.tools.errors import CheckpointError
from titan_growth.tools.findings import Findings

KINDS: dict[str, dict[str, Any]] = {
    "grouped queries, scaled rope": {"rope_scaling": SCALED},
    "tied head, bfloat16": {"tie_word_embeddings": True, "dtype": torch.bfloat16},
    "wide heads": {"head_dim": 16, "num_key_value_heads": 4, "dtype": torch.float16},
    "qwen3": {"family": "qwen3", "head_dim": 16, "rope_scaling": SCALED},
    "qwen3, tied head": {"family": "qwen3", "head_dim": 8, "tie_word_embeddings": True, "dtype": torch.bfloat16},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind."""
    root = tmp_path_factory.mktemp("folders")
    return {name: make_folder(root / str(number), **kind) for number, (name, kind) in enumerate(KINDS.items())}


@pytest.mark.parametrize("kind", KINDS)
def test_in_and_out_again(
    kind: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same names, dtypes, bytes and config.json; in between, a checkpoint that computes the same logits."""
    import transformers

    source, step, back = folders[kind], tmp_path / "step-0", tmp_path / "back"
    assert len(list(source.glob("*.safetensors"))) > 3
    assert import_main(["--from", str(source), "--to", str(step)]) == 0
    assert verify_main([str(step)]) == 0
    assert capsys.readouterr().out.count("\n") == 5, "import has more to say than a line"
    folder = open_step(step)
    assert folder is not None
    assert folder.manifest.model_only
    export_folder(step, back, max_file_bytes=20_000)
    assert len(list(back.glob("*.safetensors"))) > 3
    before, after = weights_of(source), weights_of(back)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == KINDS[kind].get("dtype", torch.float32)
        assert torch.equal(tensor, after[name]), name
    was, now = (transformers.AutoConfig.from_pretrained(path).to_dict() for path in (source, back))
    assert {key for key in was.keys() | now.keys() if was.get(key) != now.get(key)} <= {
        "_name_or_path",
        *(["rope_parameters"] if transformers.__version__ < "5" else []),  # which version 4 keeps and does not use
    }
    tokens = some_tokens()
    expected = their_logits(back, tokens)
    assert (our_logits(step, tokens) - expected).abs().max() < 1e-5
    assert expected.abs().max() > 1


def test_scaling_matters_in_these_tests(folders: dict[str, Path], tmp_path: Path) -> None:
    """Otherwise the test above would not notice its loss."""
    shutil.copytree(folders["grouped queries, scaled rope"], tmp_path / "plain")
    edit_config(tmp_path / "plain", rope_scaling=None, rope_theta=1e4, rope_parameters=None)
    tokens = some_tokens()
    with_it = their_logits(folders["grouped queries, scaled rope"], tokens)
    without = their_logits(tmp_path / "plain", tokens)
    assert (with_it - without).abs().max() > 1e-2


def test_older_places_of_the_rotary_settings(folders: dict[str, Path], tmp_path: Path) -> None:
    """transformers 4 wrote rope_theta beside rope_scaling; an export has both, for either version."""
    source = folders["grouped queries, scaled rope"]
    before = {key: value for key, value in SCALED.items() if key != "rope_type"} | {"type": "llama3"}
    for name, values in {
        "4.x": {"rope_scaling": SCALED, "rope_theta": 1e4},
        "older": {"rope_scaling": before, "rope_theta": 10000},
    }.items():
        shutil.copytree(source, tmp_path / name)
        edit_config(tmp_path / name, rope_parameters=None, **values)
        assert HuggingFaceReader(tmp_path / name).opened.config == HuggingFaceReader(source).opened.config
    assert import_main(["--from", str(source), "--to", str(tmp_path / "step")]) == 0
    export_folder(tmp_path / "step", tmp_path / "back")
    table = json.loads((tmp_path / "back" / "config.json").read_text())
    assert table["rope_scaling"] == SCALED
    assert table["rope_theta"] == 1e4
    assert table["rope_parameters"] == {**SCALED, "rope_theta": 1e4}
    assert table["dtype"] == table["torch_dtype"] == "float32"


def test_orders_are_inverse_and_move_something() -> None:
    values = torch.arange(48.0).reshape(16, 3)
    assert torch.equal(in_halves(in_pairs(values, 8), 8), values)
    assert in_pairs(values, 8)[:, 0].div(3).tolist()[:8] == [0, 4, 1, 5, 2, 6, 3, 7]
    assert in_pairs(values, None) is values


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tables_list_every_parameter(family: str) -> None:
    """And the shapes that follow from the roles are those of the model."""
    module = family_module(family)
    assert module.HUGGING_FACE.names.keys() == module.ROLES.keys()
    assert module.HUGGING_FACE.neighbours <= module.ROLES.keys()
    from titan_growth.config.schema.model import ModelConfig

    config = model_config_of(ModelConfig(name=family, flavor="debugmodel"), Findings())
    assert config is not None
    with torch.device("meta"):
        model = module.Decoder(config, 8)
    assert dict(parameter_shapes(config, module.ROLES)) == {n: tuple(t.shape) for n, t in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["grouped queries, scaled rope", "tied head, bfloat16"])
def test_small_pieces_are_the_same_tensors(
    kind: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces end between heads, whatever their size limit."""
    whole = HuggingFaceReader(folders[kind])
    assert all(len(chunks) == 1 for chunks in whole.chunks().values())
    monkeypatch.setattr(reader_module, "PIECE_BYTES", 1300)
    pieces = HuggingFaceReader(folders[kind])
    for name, (chunk,) in whole.chunks().items():
        found = pieces.chunks()[name]
        assert len(found) > 1 or chunk.num_bytes <= 1300
        assert torch.equal(torch.cat([pieces.read_chunk(piece) for piece in found]), whole.read_chunk(chunk)), name


# ---- from runs -----------------------------------------------------------------------------------------------------

ROPE = {"model__rope_theta": 1e4, "model__rope_original_max_seq_len": 16}


COMPLETEP = {
    "model__parametrization": "completep",
    "model__mup__base_dim": 16,
    "model__mup__base_n_layers": 2,
    "model__mup__base_head_dim": 4,
}
"""Three factors, none of them 1."""


@pytest.mark.parametrize(
    ("num_ranks", "settings"),
    [
        (2, {"parallelism__tensor_parallel_degree": 2, **ROPE}),
        (1, {"model__name": "qwen3", "model__tie_word_embeddings": True, "model__head_dim": 16, **ROPE}),
        (1, {**COMPLETEP, **ROPE}),
        (1, {"model__name": "qwen3", "model__tie_word_embeddings": True, "model__head_dim": 16, **COMPLETEP, **ROPE}),
    ],
    ids=["llama tp2", "qwen3 tied", "llama CompleteP", "qwen3 tied CompleteP"],
)
def test_a_run_comes_out(
    num_ranks: int, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers computes the same logits from the export, and AutoTokenizer the same tokens."""
    import transformers

    recipe = make_recipe(tmp_path / "run", training__steps=2, checkpoint__enable=True, **settings)
    run_ranks(train, num_ranks, num_ranks, recipe)
    step = tmp_path / "run" / "checkpoint" / "step-2"
    assert export_main(["--from", str(step), "--to", str(tmp_path / "out")]) == 0
    assert "of step 2 as" in capsys.readouterr().out
    tokens = some_tokens()
    assert (our_logits(step, tokens) - their_logits(tmp_path / "out", tokens)).abs().max() < 1e-5
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("gr\u00fcn").input_ids == [256, *"gr\u00fcn".encode()]
    assert export_main(["--from", str(step), "--to", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    halves = weights_of(tmp_path / "half")
    for name, tensor in weights_of(tmp_path / "out").items():
        assert torch.equal(halves[name], tensor.bfloat16())


def test_a_mask_that_is_still_opening_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = {"at": "2 steps", "operator": "random_depth", "factor": 2, "mask_steps": 10}
    growth = {f"growth__stages__0__{key}": value for key, value in stage.items()}
    recipe = make_recipe(tmp_path / "run", training__steps=4, checkpoint__enable=True, model__n_layers=2, **growth)
    run_ranks(train, 1, 1, recipe)
    step = tmp_path / "run" / "checkpoint" / "step-4"
    assert export_main(["--from", str(step), "--to", str(tmp_path / "out")]) == 1
    assert "mask of its last growth is still opening" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert export_main(["--from", str(step.with_name("step-2")), "--to", str(tmp_path / "out")]) == 0


def test_a_model_that_transformers_does_not_have_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(tmp_path / "run", training__steps=1, checkpoint__enable=True, model__name="qwen3")
    run_ranks(train, 1, 1, recipe)
    step = tmp_path / "run" / "checkpoint" / "step-1"
    wider = ["--operator", "zero_width", "--dim", "48", "--optimizer-state", "reset"]
    assert grow_main(["--from", str(step), "--to", str(tmp_path / "wide"), *wider]) == 0
    assert export_main(["--from", str(tmp_path / "wide"), "--to", str(tmp_path / "out")]) == 1
    assert "epsilon of their own (model.qk_norm_eps)" in capsys.readouterr().out


def test_a_model_with_capped_logits_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(tmp_path / "run", training__steps=1, checkpoint__enable=True, model__logit_softcap=30.0)
    run_ranks(train, 1, 1, recipe)
    step = tmp_path / "run" / "checkpoint" / "step-1"
    assert export_main(["--from", str(step), "--to", str(tmp_path / "out")]) == 1
    assert "LlamaForCausalLM has no cap on its logits (model.logit_softcap = 30)" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


# ---- growth --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tied head, bfloat16", "wide heads"])
def test_growing_a_folder_is_growing_what_was_imported(
    kind: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a copy in between; stored dtypes are kept."""
    folder, step = folders[kind], tmp_path / "step-0"
    assert import_main(["--from", str(folder), "--to", str(step)]) == 0
    words = ["--operator", "stack", "--factor", "2"]
    for source, target in ((folder, tmp_path / "a"), (step, tmp_path / "b")):
        assert grow_main(["--from", str(source), "--to", str(target), *words]) == 0
        assert verify_main([str(target)]) == 0
    one, other = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert one.keys() == other.keys()
    assert len([name for name in one if "wq" in name]) == 8
    for name, tensor in one.items():
        assert tensor.dtype == KINDS[kind].get("dtype", torch.float32)
        assert torch.equal(tensor, other[name]), name
    capsys.readouterr()
    assert lineage_main([str(tmp_path / "a")]) == 0
    assert f"read from {folder}" in capsys.readouterr().out


# ---- command lines -------------------------------------------------------------------------------------------------


def test_a_wrong_command_line_is_explained(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, step = folders["qwen3"], tmp_path / "step-0"
    assert import_main(["--from", str(source), "--to", str(step)]) == 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    capsys.readouterr()
    for main, words, status, message in (
        (import_main, ["--from", str(source)], 2, "--to: is missing"),
        (import_main, ["--from", str(tmp_path / "no"), "--to", "x"], 2, "no such folder"),
        (import_main, ["--from", str(step), "--to", str(tmp_path / "x")], 2, "is a step folder already"),
        (import_main, ["--from", str(source), "--to", str(tmp_path / "full")], 2, "is not empty"),
        (import_main, ["--from", str(source), "--to", str(source / "x")], 2, "is inside the source"),
        (import_main, ["--form", str(source)], 2, "Did you mean 'from'"),
        (import_main, ["--from", str(tmp_path / "full"), "--to", "x"], 1, "full refused: it has no config.json"),
        (export_main, ["--from", str(source), "--to", str(tmp_path / "x")], 2, "is a Hugging Face folder already"),
        (export_main, ["--from", str(tmp_path / "full"), "--to", str(tmp_path / "x")], 1, "was never committed"),
        (export_main, ["--from", str(step), "--to", str(tmp_path / "full")], 2, "is not empty"),
        (export_main, ["--from", str(step), "--to", "x", "--dtype", "int8"], 2, "expected one of float32"),
        (import_main, ["--help"], 0, "usage: python -m titan_growth import"),
        (export_main, [], 0, "usage: python -m titan_growth export"),
    ):
        assert main(words) == status, words
        assert message in capsys.readouterr().out
        assert not (tmp_path / "x").exists()


def test_damage_is_found_before_anything_is_written(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = tmp_path / "step-0"
    assert import_main(["--from", str(folders["qwen3"]), "--to", str(step)]) == 0
    shard = next(step.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    assert export_main(["--from", str(step), "--to", str(tmp_path / "out")]) == 1
    assert "does not match its checksum" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_nothing(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that is too small is noticed before the write; one that fills up, during it."""
    import collections

    usage = collections.namedtuple("usage", "total used free")
    source, step = folders["qwen3"], tmp_path / "step-0"
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: usage(10, 9, 1))
        assert import_main(["--from", str(source), "--to", str(step)]) == 1
    assert "only 0.0 MiB are free" in capsys.readouterr().out
    assert import_main(["--from", str(source), "--to", str(step)]) == 0
    from titan_growth.commands import export as exporting

    real, calls = exporting.write_file, []

    def full(path: Path, *rest: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device", str(path))
        real(path, *rest)

    monkeypatch.setattr(exporting, "write_file", full)
    with pytest.raises(CheckpointError, match=r"out: No space left on device\. Nothing was committed"):
        export_folder(step, tmp_path / "out", max_file_bytes=20_000)
    assert len(calls) == 3
    assert list((tmp_path / "out").iterdir()) == []
