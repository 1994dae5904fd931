"""Recipes as users of torchtitan 0.2.2 have them plan and run unchanged, and no key of theirs is dropped silently.

The recipes are written here from the table of torchtitan's keys: every key that its llama3 files spell out, with the
values that they are known for. What a recipe comes to is compared with numbers known from elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from titan_growth.__main__ import main
from titan_growth.config.loader import inspect_recipe
from titan_growth.tools.findings import Findings

ROOT = Path(__file__).resolve().parents[2]

Table = dict[str, Any]

COMMON: Table = {
    "job": {"dump_folder": "./outputs", "description": "Llama 3 training", "print_config": False},
    "profiling": {"enable_profiling": True, "save_traces_folder": "profile_trace", "profile_freq": 100},
    "metrics": {"log_freq": 10, "enable_tensorboard": True, "save_tb_folder": "tb"},
    "model": {"name": "llama3", "hf_assets_path": "./assets/hf/Llama-3.1-8B"},
    "optimizer": {"name": "AdamW", "eps": 1e-8},
    "lr_scheduler": {"warmup_steps": 200},
    "training": {"seq_len": 8192, "max_norm": 1.0, "steps": 1000, "dataset": "c4"},
    "parallelism": {
        "data_parallel_replicate_degree": 1,
        "data_parallel_shard_degree": -1,
        "fsdp_reshard_after_forward": "default",
        "tensor_parallel_degree": 1,
        "enable_async_tensor_parallel": False,
        "pipeline_parallel_degree": 1,
        "pipeline_parallel_schedule": "1F1B",
        "context_parallel_degree": 1,
    },
    "checkpoint": {
        "enable": False,
        "folder": "checkpoint",
        "interval": 500,
        "last_save_model_only": True,
        "export_dtype": "float32",
        "async_mode": "disabled",
    },
    "activation_checkpoint": {"mode": "full"},
    "compile": {"enable": False, "components": ["model", "loss"]},
    "quantize": {
        "linear": {
            "float8": {
                "enable_fsdp_float8_all_gather": False,
                "precompute_float8_dynamic_scale_for_fsdp": False,
                "filter_fqns": ["output"],
            }
        }
    },
    "validation": {"enable": False, "dataset": "c4_validation", "freq": 500, "steps": -1},
    "comm": {"init_timeout_seconds": 300, "train_timeout_seconds": 100, "trace_buf_size": 20000},
}
"""What the files have in common; each of them overrides some of it."""

RECIPES: dict[str, Table] = {
    "debugmodel": {
        "profiling": {
            "enable_profiling": False,
            "profile_freq": 10,
            "enable_memory_snapshot": False,
            "save_memory_snapshot_folder": "memory_snapshot",
        },
        "metrics": {
            "log_freq": 1,
            "disable_color_printing": False,
            "enable_tensorboard": False,
            "enable_wandb": False,
        },
        "model": {"hf_assets_path": "./tests/assets/tokenizer"},
        "optimizer": {"lr": 8e-4},
        "lr_scheduler": {"warmup_steps": 2, "decay_ratio": 0.8, "decay_type": "linear", "min_lr_factor": 0.0},
        "training": {"local_batch_size": 8, "seq_len": 2048, "steps": 10, "dataset": "c4_test"},
        "checkpoint": {"interval": 10, "last_save_model_only": False},
        "activation_checkpoint": {"mode": "selective", "selective_ac_option": "2"},
        "validation": {"freq": 5, "steps": 10},
    },
    "8B": {
        "optimizer": {"lr": 3e-4},
        "training": {"local_batch_size": 1},
        "activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"},
    },
    "70B": {
        "optimizer": {"lr": 1.5e-4},
        "training": {"local_batch_size": 8},
        "parallelism": {"tensor_parallel_degree": 8},
    },
    "405B": {
        "model": {"converters": ["float8"]},
        "optimizer": {"lr": 8e-5},
        "lr_scheduler": {"warmup_steps": 600},
        "training": {"local_batch_size": 2, "steps": 3000},
        "parallelism": {"tensor_parallel_degree": 8, "enable_async_tensor_parallel": True},
        "compile": {"enable": True},
        "quantize": {
            "linear": {
                "float8": {
                    "enable_fsdp_float8_all_gather": True,
                    "precompute_float8_dynamic_scale_for_fsdp": True,
                }
            }
        },
    },
}

FLOAT8 = "quantize.linear.float8"
WARNINGS = {
    "debugmodel": {f"{FLOAT8}.filter_fqns": "model.converters does not name"},
    "8B": {
        f"{FLOAT8}.filter_fqns": "model.converters does not name",
        "checkpoint.last_save_model_only": "checkpoint.enable is false",
    },
    "70B": {
        f"{FLOAT8}.filter_fqns": "model.converters does not name",
        "checkpoint.last_save_model_only": "checkpoint.enable is false",
    },
    "405B": {
        "model.converters": "'float8' is an older name of 'quantize.linear.float8'",
        "checkpoint.last_save_model_only": "checkpoint.enable is false",
    },
}
"""All warnings of each recipe, by key."""

SIZES = {
    "debugmodel": (6_163_712, 2048, 256, 6, 16, 16),
    "8B": (8_030_261_248, 128256, 4096, 32, 32, 128),
    "70B": (70_553_706_496, 128256, 8192, 80, 64, 128),
    "405B": (405_853_388_800, 128256, 16384, 126, 128, 128),
}
"""Parameters, vocabulary, width, layers, heads, width of a head."""


def recipe_of(name: str) -> Table:
    table = merged(COMMON, RECIPES[name])
    table["model"]["flavor"] = name
    return table


def merged(base: Table, changes: Table) -> Table:
    result = copy.deepcopy(base)
    for key, value in changes.items():
        result[key] = merged(result[key], value) if isinstance(value, dict) else value
    return result


def write(folder: Path, table: Table) -> Path:
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(table))
    return path


def leaves(table: Table, prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]


# ---- plan ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_ranks"),
    [
        ("debugmodel", 1),
        ("debugmodel", 8),
        ("8B", 1),
        ("8B", 8),
        ("8B", 256),
        ("70B", 8),
        ("70B", 256),
        ("405B", 256),
        ("405B", 512),
    ],
)
def test_recipes_plan(name: str, num_ranks: int, tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path, recipe_of(name))
    assert main(["plan", "--job.config_file", str(path), "--world-size", str(num_ranks)]) == 0
    output = capsys.readouterr()
    params, vocab, dim, num_layers, heads, head_dim = SIZES[name]
    seq_len = recipe_of(name)["training"]["seq_len"]
    assert f"parameters: {params:,}\n" in output.out
    flops = 6 * (params - vocab * dim) + 12 * num_layers * heads * head_dim * seq_len
    assert f"FLOPs per token: {flops:,} " in output.out
    assert f"{num_ranks} rank" in output.out
    lines = output.err.splitlines()
    assert len(lines) == len(WARNINGS[name]), lines
    for key, reason in WARNINGS[name].items():
        assert any(line.startswith(f"warning: {key}: ") and reason in line for line in lines), key


def test_405b_as_it_is_shipped_there(tmp_path: Path, capsys: Any) -> None:
    """One pipeline part, Float8 under tensor parallelism, compiled: all of it in force."""
    path = write(tmp_path, recipe_of("405B"))
    assert main(["plan", "--job.config_file", str(path), "--world-size", "512"]) == 0
    text = capsys.readouterr().out
    assert "mesh: dp_shard 64 x tp 8 = 512 ranks" in text
    assert "stages: float8 -> tensor_parallel -> activation_checkpoint -> compile -> fsdp" in text
    assert "float8: tensorwise, gathered in Float8, scales precomputed, without output" in text
    assert "collectives overlapped with products" in text


def test_405b_in_three_dimensions_by_flags(tmp_path: Path, capsys: Any) -> None:
    words = ["--parallelism.pipeline_parallel_degree", "8", "--training.local_batch_size", "32"]
    words += ["--parallelism.pipeline_parallel_schedule", "Interleaved1F1B"]
    path = write(tmp_path, recipe_of("405B"))
    assert main(["plan", "--job.config_file", str(path), "--world-size=512", *words]) == 0
    assert "mesh: pp 8 x dp_shard 8 x tp 8 = 512 ranks" in capsys.readouterr().out


def _other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return type(value)(value * 2 + 1) if value != -1 else 3
    return ["wq"] if isinstance(value, list) else "other"


@pytest.mark.parametrize("name", RECIPES)
def test_no_key_is_dropped_silently(name: str, tmp_path: Path) -> None:
    """Another value of any key changes what the run will do, or is refused, or warned about, by name."""
    table = recipe_of(name)
    before = inspect_recipe(["--job.config_file", str(write(tmp_path, table))], found := Findings())
    assert not found.problems
    keys = list(leaves(table))
    assert len(keys) >= 48
    for key in keys:
        changed = copy.deepcopy(table)
        node = changed
        for part in key.split(".")[:-1]:
            node = node[part]
        node[key.rpartition(".")[2]] = _other(node[key.rpartition(".")[2]])
        recipe = inspect_recipe(["--job.config_file", str(write(tmp_path, changed))], found := Findings())
        # Of a list it may be an item, and two keys that do not agree are refused under the name of one of them.
        refused = any(key in str(problem) for problem in found.problems)
        assert refused or not found.problems, f"{key} = {node}: the problem has another name"
        warned = any(warning.key == key for warning in found.warnings)
        assert refused or warned or recipe != before, f"{key} = {node} is dropped silently"
