"""Checks between keys of one recipe, and the durations that growths are given in."""

from __future__ import annotations

import pytest

from tests.runs import argv_of
from titan_growth.config.duration import Duration
from titan_growth.config.loader import inspect_recipe

GROWING = {"checkpoint.enable": True, "training.steps": 100, "growth.stages.0.factor": 2}
TWICE = {**GROWING, "growth.stages.0.at": "10 steps", "growth.stages.1.factor": 2}
TOKENS = {**GROWING, "training.global_batch_size": 8, "training.seq_len": 10}

REFUSED = [
    (
        {"profiling.enable_profiling": True, "profiling.profile_freq": 3},
        "profiling.profile_freq",
        "warmup + active = 4",
    ),
    ({"training.global_batch_size": 0}, "training.global_batch_size", "must be -1 (derive it) or at least 1"),
    ({"training.global_batch_size": 12}, "training.global_batch_size", "12 is not a multiple of"),
    ({"training.dataloader.persistent_workers": True}, "training.dataloader.persistent_workers", "needs"),
    ({"training.dataloader.prefetch_factor": 2}, "training.dataloader.prefetch_factor", "needs"),
    (
        {"training.dtype": "bfloat16", "training.mixed_precision_param": "float32"},
        "training.mixed_precision_param",
        "conflicts with training.dtype",
    ),
    ({"data.tokenizer": "bytes", "data.tokenizer_path": "x"}, "data.tokenizer_path", "conflicts"),
    ({"validation.steps": 0}, "validation.steps", "must be -1"),
    ({"validation.enable": True, "data.validation_fraction": 0.0}, "data.validation_fraction", "holds nothing out"),
    ({"checkpoint.keep_latest_k": 1}, "checkpoint.keep_latest_k", "0 (all) or at least 2"),
    ({"checkpoint.folder": ""}, "checkpoint.folder", "inside job.dump_folder"),
    ({"checkpoint.folder": "/tmp/x"}, "checkpoint.folder", "inside job.dump_folder"),
    ({"checkpoint.folder": "a/../../x"}, "checkpoint.folder", "inside job.dump_folder"),
    ({**GROWING, "growth.stages.0.at": "1 step", "checkpoint.enable": False}, "growth.enable", "needs checkpoints"),
    ({**GROWING, "growth.stages.0.at": "1 step", "checkpoint.load_only": True}, "checkpoint.load_only", "conflicts"),
    ({**GROWING, "growth.stages.0.at": "100 steps"}, "growth.stages.0.at", "not before the last step"),
    ({**TWICE, "growth.stages.1.at": "10 steps"}, "growth.stages.1.at", "not after the growth before"),
    ({"job.save_config_file": "sub/config.json"}, "job.save_config_file", "file name of its own"),
    ({"job.save_config_file": "recipe.toml"}, "job.save_config_file", "file name of its own"),
]
ACCEPTED = [
    {"profiling.enable_profiling": True, "profiling.profile_freq": 4},
    {"profiling.profile_freq": 3},
    {"training.global_batch_size": 16},
    {"training.dataloader.num_workers": 1, "training.dataloader.prefetch_factor": 2},
    {"training.dtype": "bfloat16"},
    {"validation.enable": True, "data.validation_fraction": 0.0, "validation.dataset_path": "x"},
    {"data.validation_fraction": 0.0},
    {"checkpoint.keep_latest_k": 0},
    {"checkpoint.keep_latest_k": 2},
    {**GROWING, "growth.stages.0.at": "99 steps"},
    {**TOKENS, "growth.stages.0.at": "7920 tokens"},
    {**GROWING, "growth.stages.0.at": "100 steps", "growth.enable": False, "checkpoint.enable": False},
    {**GROWING, "growth.stages.0.at": "100 steps", "comm.mode": "fake_backend"},
    {**TWICE, "growth.stages.1.at": "11 steps"},
    {**TWICE, **TOKENS, "growth.stages.1.at": "801 tokens"},
]
WARNED = [
    ({"checkpoint.load_only": True}, "checkpoint.load_only"),
    ({"checkpoint.initial_load_path": "x"}, "checkpoint.initial_load_path"),
    ({"checkpoint.load_step": 3}, "checkpoint.load_step"),
    ({"lr_scheduler.total_steps": 9, "training.steps": 10}, "lr_scheduler.total_steps"),
    ({"growth.base.lr": 1e-3}, "growth.base"),
    (
        {
            **GROWING,
            "growth.stages.0.at": "1 step",
            "growth.stages.0.lr_policy": "continue",
            "growth.stages.0.warmup_steps": 3,
        },
        "growth.stages.0.warmup_steps",
    ),
]


@pytest.mark.parametrize(("values", "key", "message"), REFUSED, ids=[str(list(case[0].items())) for case in REFUSED])
def test_refused(values: dict[str, object], key: str, message: str) -> None:
    _, problems, _ = inspect_recipe(argv_of(values))
    assert [problem.key for problem in problems] == [key]
    assert message in problems[0].message


@pytest.mark.parametrize("values", ACCEPTED, ids=[str(list(case.items())) for case in ACCEPTED])
def test_accepted(values: dict[str, object]) -> None:
    _, problems, warnings = inspect_recipe(argv_of(values))
    assert [str(problem) for problem in problems + warnings] == []


@pytest.mark.parametrize(("values", "key"), WARNED, ids=[case[1] for case in WARNED])
def test_allowed_but_without_effect(values: dict[str, object], key: str) -> None:
    _, problems, warnings = inspect_recipe(argv_of(values))
    assert not problems
    assert [warning.key for warning in warnings] == [key]


@pytest.mark.parametrize(
    ("text", "value", "unit", "shown"),
    [
        ("300 steps", 300, "steps", "300 steps"),
        ("1 step", 1, "steps", "1 step"),
        ("300 tokens", 300, "tokens", "300 tokens"),
        ("1 token", 1, "tokens", "1 token"),
        ("3T tokens", 3 * 10**12, "tokens", "3,000,000,000,000 tokens"),
        ("3t tokens", 3 * 10**12, "tokens", "3,000,000,000,000 tokens"),
        (" 10M  Tokens ", 10**7, "tokens", "10,000,000 tokens"),
        ("10Mtokens", 10**7, "tokens", "10,000,000 tokens"),
        ("1.5B tokens", 1_500_000_000, "tokens", "1,500,000,000 tokens"),
        ("1.001k steps", 1001, "steps", "1,001 steps"),
        ("1_000 steps", 1000, "steps", "1,000 steps"),
        ("1,000 steps", 1000, "steps", "1,000 steps"),
        ("9007199254740993 tokens", 2**53 + 1, "tokens", "9,007,199,254,740,993 tokens"),
    ],
)
def test_duration(text: str, value: int, unit: str, shown: str) -> None:
    duration = Duration.parse(text)
    assert (duration.value, duration.unit, str(duration)) == (value, unit, shown)
    assert Duration.parse(str(duration)) == duration


def test_every_thousandth_is_exact() -> None:
    for steps in range(1000, 10_000):
        assert Duration.parse(f"{steps // 1000}.{steps % 1000:03}k steps").value == steps


@pytest.mark.parametrize(
    "text", ["300", "", "steps", "-3 steps", "0 steps", "0.5 steps", "1.0001k steps", "3 epochs", "3 t", "1e3 steps"]
)
def test_not_a_duration(text: str) -> None:
    with pytest.raises(ValueError, match='expected a count with a unit, such as "300 steps" or "10M tokens"'):
        Duration.parse(text)
