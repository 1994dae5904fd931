"""Runs from and into Hugging Face folders, on meshes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.harness import WarmRanks, run_ranks
from tests.hugging_face import (
    SCALED,
    SIZES,
    edit_config,
    make_folder,
    our_logits,
    some_tokens,
    their_logits,
    their_model,
    weights_of,
)
from tests.runs import BASE, argv_of, make_recipe, read_metrics, train, trainer_of, write_corpus
from titan_growth.checkpoint.loading import load
from titan_growth.commands.check import main as check_main
from titan_growth.commands.export import export_folder
from titan_growth.commands.grow import main as grow_main
from titan_growth.commands.import_ import import_folder
from titan_growth.config.schema.recipe import Recipe
from titan_growth.interchange.reader import HuggingFaceReader
from titan_growth.models.registry import model_config_of
from titan_growth.run.initial import initial_reader
from titan_growth.tools.findings import Findings

MODEL = {
    "model__n_layers": SIZES["num_hidden_layers"],
    "model__hidden_dim": SIZES["intermediate_size"],
    "model__rope_theta": 1e4,
    "model__rope_original_max_seq_len": 16,
    "model__max_seq_len": 256,
}
"""The recipe of the folders below."""

SAVING = {"checkpoint__enable": True, "training__steps": 2}
MESH_4 = {"parallelism__pipeline_parallel_degree": 2, "parallelism__tensor_parallel_degree": 2}
MESH_8 = {**MESH_4, "parallelism__data_parallel_shard_degree": 2}


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with grouped queries and scaled rotary embeddings."""
    return make_folder(tmp_path_factory.mktemp("hf_folder") / "llama", rope_scaling=SCALED)


def _first_batch(_rank: int, recipe: Recipe) -> list[dict[str, torch.Tensor]]:
    with trainer_of(recipe, 1) as trainer:
        return trainer.runtime.data.next_batch()


def _transformers_loss(hf_folder: Path, recipe: Recipe, ranks: WarmRanks) -> float:
    """The mean over the run's first global batch."""
    model = their_model(hf_folder)
    (batch,) = ranks(_first_batch, 1, recipe)
    losses = []
    for microbatch in batch:
        with torch.no_grad():
            logits = model(microbatch["input"]).logits
        losses.append(F.cross_entropy(logits.flatten(0, 1), microbatch["labels"].flatten(), reduction="none"))
    return float(torch.cat(losses).mean())


def test_the_first_loss_is_that_of_transformers(hf_folder: Path, tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """From the folder on one rank and on a mesh of four, from the imported checkpoint, and in transformers."""
    step = tmp_path / "imported" / "step-0"
    import_folder(hf_folder, step)
    losses = {}
    for name, num_ranks, settings in (
        ("imported", 1, {"checkpoint__initial_load_path": str(step)}),
        ("folder", 1, {"checkpoint__initial_load_path": str(hf_folder), "checkpoint__initial_load_in_hf": True}),
        ("folder on four ranks", 4, {"checkpoint__initial_load_path": str(hf_folder), **MESH_4}),
    ):
        recipe = make_recipe(tmp_path / name, **SAVING, **MODEL, **settings)
        warm_ranks(train, num_ranks, num_ranks, recipe)
        losses[name] = read_metrics(tmp_path / name)[0]["loss"]
    assert losses["folder"] == losses["imported"]
    assert losses["folder on four ranks"] == pytest.approx(losses["folder"], rel=1e-6)
    reference = _transformers_loss(hf_folder, make_recipe(tmp_path / "x", **MODEL), warm_ranks)
    assert losses["folder"] == pytest.approx(reference, rel=1e-6)


def _read_by_a_rank(rank: int, num_ranks: int, recipe: Recipe, path: str) -> tuple[int, int]:
    """(bytes this rank read, bytes of its shards)."""
    with trainer_of(recipe, num_ranks) as trainer:
        tensors = trainer.runtime.tensors(optimizer=False)
        reader = initial_reader(Path(path), recipe.model.name, trainer.runtime.model_config)
        load(reader, tensors, casts=True)
        local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors.values()]
        return reader.num_bytes_read, sum(tensor.numel() * 4 for tensor in local)


def test_a_rank_reads_its_shards_and_nothing_else(hf_folder: Path, tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """Rows and columns: on pp 2 x tp 2 the ranks read the folder once, except for replicated tensors."""
    recipe = make_recipe(tmp_path / "run", **SAVING, **MODEL, **MESH_4)
    for read, held in warm_ranks(_read_by_a_rank, 4, 4, recipe, str(hf_folder)):
        assert read == held
        assert held < HuggingFaceReader(hf_folder).opened.num_bytes / 3


def _weights_on_one_rank(_rank: int, recipe: Recipe) -> dict[str, torch.Tensor]:
    with trainer_of(recipe, 1) as trainer:
        return {name: tensor.clone() for name, tensor in trainer.runtime.tensors(optimizer=False).items()}


@pytest.mark.parametrize(
    ("there", "here", "imported"), [(torch.bfloat16, "float32", False), (torch.float16, "bfloat16", True)]
)
def test_weights_are_cast(there: torch.dtype, here: str, imported: bool, tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """From a folder and from a step folder; and a tied head takes the embedding."""
    folder = make_folder(tmp_path / "tied", rope_scaling=SCALED, tie_word_embeddings=True, dtype=there)
    settings = {
        "training__dtype": here,
        "training__mixed_precision_param": here,
        "model__tie_word_embeddings": True,
        "checkpoint__initial_load_path": str(tmp_path / "step-0" if imported else folder),
    }
    if imported:
        import_folder(folder, tmp_path / "step-0")
    (found,) = warm_ranks(_weights_on_one_rank, 1, make_recipe(tmp_path / "run", **SAVING, **MODEL, **settings))
    expected = weights_of(folder)
    dtype = getattr(torch, here)
    assert torch.equal(found["output.weight"], expected["model.embed_tokens.weight"].to(dtype))
    assert torch.equal(
        found["layers.3.feed_forward.w2.weight"], expected["model.layers.3.mlp.down_proj.weight"].to(dtype)
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model__n_heads": 8, "model__n_kv_heads": 2, "model__head_dim": 4}, "n_heads is 4 there and 8 here"),
        ({"model__name": "qwen3"}, "its family is llama3, the recipe's is qwen3"),
        ({"model__hidden_dim": 64}, "w1.weight is 48 x 32 there and 64 x 32 here"),
        ({"model__n_layers": 5}, "it is of another model: has no layers.4"),
        ({"checkpoint__initial_load_model_only": False}, "holds only weights"),
        (
            {"model__parametrization": "mup", "model__mup__base_dim": 16},
            "was trained with logits x 1, queries x 1, branches x 1, and this model has logits x 0.5",
        ),
    ],
)
def test_another_model_is_refused_before_a_run(
    settings: dict[str, Any], expected: str, hf_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {key.replace("__", "."): value for key, value in {**SAVING, **MODEL, **settings}.items()}
    values |= {"job.dump_folder": str(tmp_path / "run"), "checkpoint.initial_load_path": str(hf_folder)}
    values["training.dataset_path"] = str(write_corpus(tmp_path / "corpus.txt"))
    assert check_main(argv_of({**BASE, **values})) == 2
    assert expected in capsys.readouterr().err


def test_what_must_agree_is_listed(hf_folder: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "run", **{**MODEL, "model__rope_theta": 5e5}, **SAVING)
    config = model_config_of(recipe.model, Findings())
    assert config is not None
    assert HuggingFaceReader(hf_folder, config=config).differences() == [
        "model.rope_theta is 500000.0, but llama was trained with 10000.0"
    ]
    step = tmp_path / "imported" / "step-0"
    import_folder(hf_folder, step)
    settings = {"checkpoint__initial_load_path": str(step), "checkpoint__initial_load_in_hf": True}
    recipe = make_recipe(tmp_path / "run", **MODEL, **SAVING, **settings)
    with pytest.raises(AssertionError, match=r"is no Hugging Face folder, which checkpoint\.initial_load_in_hf"):
        run_ranks(train, 1, 1, recipe)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model__tie_word_embeddings": True},
        {"model__name": "qwen3", "model__head_dim": 16, "model__rope_scaling_factor": 8.0},
    ],
    ids=["llama", "tied", "qwen3"],
)
def test_out_of_a_3d_mesh(settings: dict[str, Any], tmp_path: Path) -> None:
    """transformers computes our logits from a checkpoint written by eight ranks."""
    recipe = make_recipe(tmp_path / "run", **{**MODEL, "model__max_seq_len": 256}, **SAVING, **MESH_8, **settings)
    run_ranks(train, 8, 8, recipe, timeout_seconds=250)
    step = tmp_path / "run" / "checkpoint" / "step-2"
    export_folder(step, tmp_path / "out", max_file_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    tokens = some_tokens()
    expected = their_logits(tmp_path / "out", tokens)
    assert (our_logits(step, tokens) - expected).abs().max() < 1e-5
    edit_config(tmp_path / "out", rope_scaling=None, rope_parameters=None)
    assert (their_logits(tmp_path / "out", tokens) - expected).abs().max() > 1e-3, "scaling does not matter here"


@pytest.mark.slow
def test_a_run_from_a_folder_grows(hf_folder: Path, tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """The folder is the small model of a recipe with growth; a resume no longer needs it."""
    stage = {"growth__stages__0__at": "2 steps", "growth__stages__0__factor": 2}
    settings = {**MODEL, **SAVING, **stage, "model__n_layers": 8, "checkpoint__initial_load_path": str(hf_folder)}
    run_ranks(train, 2, 2, make_recipe(tmp_path / "run", **{**settings, "training__steps": 3}))
    run_ranks(train, 2, 2, make_recipe(tmp_path / "run", **{**settings, "training__steps": 4}))
    lines = [line for line in read_metrics(tmp_path / "run") if "grad_norm" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    reference = _transformers_loss(hf_folder, make_recipe(tmp_path / "x", **MODEL), warm_ranks)
    assert lines[0]["loss"] == pytest.approx(reference, rel=1e-6)
    assert (tmp_path / "run" / "checkpoint" / "step-4").is_dir()


@pytest.mark.slow
def test_a_folder_is_grown_and_trained_on_a_3d_mesh(hf_folder: Path, tmp_path: Path) -> None:
    grown = tmp_path / "grown" / "step-0"
    assert grow_main(["--from", str(hf_folder), "--to", str(grown), "--operator", "stack", "--factor", "2"]) == 0
    settings = {**MODEL, "model__n_layers": 8, "training__steps": 10, "checkpoint__initial_load_path": str(grown)}
    losses = {}
    for name, num_ranks, mesh in (("one", 1, {}), ("mesh", 8, MESH_8)):
        recipe = make_recipe(tmp_path / name, **{**SAVING, **settings}, **mesh)
        run_ranks(train, num_ranks, num_ranks, recipe, timeout_seconds=250)
        losses[name] = [line["loss"] for line in read_metrics(tmp_path / name)]
    assert len(losses["mesh"]) == 10
    assert losses["mesh"][0] == pytest.approx(losses["one"][0], rel=1e-5)
    assert losses["mesh"][-1] < losses["mesh"][0] - 0.5
