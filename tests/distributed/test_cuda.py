"""GPU-only paths: `pytest -m gpu` on a machine with CUDA; more devices cover more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import BASE, argv_of, read_metrics, write_corpus

pytestmark = pytest.mark.gpu

NUM_DEVICES = torch.cuda.device_count() if torch.cuda.is_available() else 0

SIZES = {"model.dim": 128, "model.n_heads": 8, "model.n_kv_heads": 4, "model.vocab_size": 512, "training.seq_len": 128}
FLOAT8 = {"model.converters": "quantize.linear.float8", "training.mixed_precision_param": "bfloat16"}

MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "compile": (1, {"compile.enable": True}),
    "cpu offload": (1, {"training.enable_cpu_offload": True}),
    "fsdp": (2, {}),
    "tensor parallel": (2, {"parallelism.tensor_parallel_degree": 2}),
    "async tensor parallel": (
        2,
        {
            "parallelism.tensor_parallel_degree": 2,
            "parallelism.enable_async_tensor_parallel": True,
            "compile.enable": True,
        },
    ),
    "pipeline": (2, {"parallelism.pipeline_parallel_degree": 2}),
    "ring attention": (2, {"parallelism.context_parallel_degree": 2}),
    "ring attention, alltoall": (
        2,
        {"parallelism.context_parallel_degree": 2, "parallelism.context_parallel_rotate_method": "alltoall"},
    ),
    "gathered keys and values": (2, {"parallelism.context_parallel_degree": 2, "data.document_mask": True}),
    "3D": (8, {"parallelism.pipeline_parallel_degree": 2, "parallelism.tensor_parallel_degree": 2}),
}


def losses_of(folder: Path, num_ranks: int, **values: Any) -> list[float]:
    """Trains through the real entry and returns the losses of all steps."""
    corpus = folder.parent / "corpus.txt"
    if not corpus.exists():
        write_corpus(corpus)
    # Ring attention calls flash attention, which computes in bfloat16 only.
    recipe = {**BASE, **SIZES, "training.mixed_precision_param": "bfloat16", "training.dataset_path": str(corpus)}
    words = argv_of({**recipe, "job.dump_folder": str(folder), **values})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*launch, "-m", "titan_growth.train", *words], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line["loss"] for line in read_metrics(folder)]


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_of_gpus_computes_what_one_gpu_computes(name: str, tmp_path: Path) -> None:
    """In bfloat16, so to bfloat16 precision."""
    num_ranks, values = MESHES[name]
    if num_ranks > NUM_DEVICES:
        pytest.skip(f"needs {num_ranks} GPUs, there are {NUM_DEVICES}")
    same = {key: value for key, value in values.items() if key.startswith("data.")}
    expected = losses_of(tmp_path / "one", 1, **same)
    assert losses_of(tmp_path / "many", num_ranks, **values) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("recipe_name", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_float8_products_compute_what_emulation_computes(recipe_name: str, tmp_path: Path) -> None:
    if NUM_DEVICES == 0 or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this device has no Float8 products")
    values = {**FLOAT8, "quantize.linear.float8.recipe_name": recipe_name}
    real = losses_of(tmp_path / "real", 1, **values)
    emulated = losses_of(tmp_path / "emulated", 1, **values, **{"quantize.linear.float8.emulate": True})
    assert real == pytest.approx(emulated, rel=1e-2)
