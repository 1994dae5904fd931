"""What the layers do, over a run: on which steps, through a growth, after a resume, and without changing anything."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_layer_metrics import COMPILED, read_layers
from tests.distributed.test_resume import crash_after
from tests.harness import WarmRanks, run_ranks
from tests.runs import make_recipe, read_metrics, train, trainer_of, without_timings

EVERY: dict[str, Any] = {"metrics__layers_freq": 1, "metrics__attention_freq": 1}
GROWING: dict[str, Any] = {"training__steps": 4, "checkpoint__enable": True, "checkpoint__interval": 100, **EVERY}


def grown(folder: Path, warm_ranks: WarmRanks, stage: str, num_ranks: int = 1, **settings: Any) -> list[dict[str, Any]]:
    """The lines of a run that grows after step 2."""
    stages = f'[{{at = "2 steps", {stage}}}]'
    warm_ranks(train, num_ranks, num_ranks, make_recipe(folder, **GROWING, growth__stages=stages, **settings))
    return read_layers(folder)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_copied_and_new_layers_are_told_apart_after_a_growth(
    num_ranks: int, tmp_path: Path, warm_ranks: WarmRanks
) -> None:
    pipeline = {"parallelism__pipeline_parallel_degree": 2, "model__n_layers": 4} if num_ranks == 2 else {}
    lines = grown(tmp_path / "run", warm_ranks, 'operator = "stack", factor = 2', num_ranks, **pipeline)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines[:2]:
        assert len(line["layers"]["gradient_norm"]["attention"]) == 2
        assert "new_layers" not in line
        assert "means" not in line
    for line in lines[2:]:
        assert line["new_layers"] == [2, 3]
        for metric, by_group in line["means"].items():
            for group, means in by_group.items():
                values = line["layers"][metric][group]
                assert len(values) == 4
                expected = {"copied": statistics.fmean(values[:2]), "new": statistics.fmean(values[2:])}
                assert means == pytest.approx(expected, rel=1e-6)
        assert set(line["means"]) == set(line["layers"])
    copies = lines[2]["layers"]["weight_norm"]["attention"]
    assert copies[:2] == copies[2:], "a stacked layer starts with the weights of its source"
    assert copies != lines[3]["layers"]["weight_norm"]["attention"]


def test_new_layers_of_other_growths(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """Interposed copies lie between; after a growth in width every layer is one of the small model."""
    between = grown(tmp_path / "between", warm_ranks, 'operator = "interpose", factor = 2')
    assert between[2]["new_layers"] == [1, 3]
    wider = grown(tmp_path / "wider", warm_ranks, 'operator = "split_width", factor = 2')
    assert wider[2]["new_layers"] == []
    assert set(wider[2]["means"]["gradient_norm"]["attention"]) == {"copied"}


def test_a_model_may_begin_without_layers(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """All layers are new after its growth."""
    settings = {**GROWING, "growth__base__n_layers": 0, "model__n_layers": 2}
    stages = '[{at = "2 steps", operator = "random_depth", n_layers = 2, mask_steps = 2}]'
    warm_ranks(train, 2, 2, make_recipe(tmp_path / "run", **settings, growth__stages=stages))
    lines = read_layers(tmp_path / "run")
    assert lines[0]["layers"]["gradient_norm"]["layer"] == []
    assert lines[0]["layers"]["gradient_norm"]["head"] > 0
    assert lines[2]["new_layers"] == [0, 1]
    assert set(lines[2]["means"]["gradient_norm"]["layer"]) == {"new"}


@pytest.mark.usefixtures("warm_imports")
@pytest.mark.slow
def test_a_masked_layer_adds_what_its_mask_lets_through(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """And the measurement, in compiled and recomputed blocks, sees what the eager one sees."""
    stage = 'operator = "random_depth", factor = 2, mask_steps = 1000'
    eager = grown(tmp_path / "eager", warm_ranks, stage)
    for line in eager[2:]:
        means = line["means"]["activation_rms"]["attention"]
        assert means["new"] < 0.05 * means["copied"]
    settings = {**COMPILED, "activation_checkpoint__mode": "full"}
    for line, reference in zip(grown(tmp_path / "compiled", warm_ranks, stage, **settings), eager, strict=True):
        for metric, by_group in reference["layers"].items():
            for group, values in by_group.items():
                assert line["layers"][metric][group] == pytest.approx(values, rel=1e-4)


@pytest.mark.slow
def test_a_run_killed_and_resumed_leaves_the_lines_of_an_unbroken_one(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """Killed after lines of steps that the resumed run repeats: before a growth, and after it."""
    settings = {
        **EVERY,
        "training__steps": 6,
        "checkpoint__enable": True,
        "checkpoint__interval": 2,
        "growth__stages": '[{at = "4 steps", operator = "stack", factor = 2}]',
    }
    warm_ranks(train, 2, 2, make_recipe(tmp_path / "whole", **settings))
    broken = make_recipe(tmp_path / "broken", **settings)
    for step in (3, 5):
        with pytest.raises(AssertionError):
            run_ranks(crash_after, 2, 2, broken, step, "after the step")
        assert read_layers(tmp_path / "broken")[-1]["step"] == step
    run_ranks(train, 2, 2, broken)
    expected = without_timings(read_layers(tmp_path / "whole"))
    assert [line["step"] for line in expected] == [1, 2, 3, 4, 5, 6]
    assert without_timings(read_layers(tmp_path / "broken")) == expected


def test_a_resume_may_change_what_is_measured(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    saving = {"checkpoint__enable": True, "checkpoint__interval": 100, "lr_scheduler__decay_ratio": 0.0}
    for steps, freq in ((2, 1), (4, 0), (6, 3)):
        settings = {**saving, "training__steps": steps, "metrics__layers_freq": freq}
        warm_ranks(train, 1, 1, make_recipe(tmp_path / "run", **settings))
    assert [line["step"] for line in read_layers(tmp_path / "run")] == [1, 2, 6]


def test_each_kind_is_measured_on_its_own_steps(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """Also on steps that are not logged, and with validations between."""
    settings = {
        "training__steps": 6,
        "metrics__log_freq": 5,
        "metrics__layers_freq": 3,
        "metrics__attention_freq": 2,
        "validation__enable": True,
        "validation__freq": 1,
    }
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "run", **settings))
    kinds = {line["step"]: sorted(line["layers"]) for line in read_layers(tmp_path / "run")}
    layers = ["activation_max", "activation_rms", "gradient_norm", "update_ratio", "weight_norm"]
    logits = ["attention_logit_max"]
    assert kinds == {2: logits, 3: layers, 4: logits, 6: sorted(layers + logits)}


@pytest.mark.parametrize("settings", [{}, {"training__mixed_precision_param": "bfloat16"}], ids=["fp32", "bf16"])
def test_measuring_changes_nothing(settings: dict[str, Any], tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """The run's metrics are bit for bit those without, and a run without leaves no file."""
    for name, freqs in (("with", EVERY), ("without", {})):
        recipe = make_recipe(tmp_path / name, training__steps=3, **freqs, **settings)
        warm_ranks(train, 2, 2, recipe)
    found, expected = (without_timings(read_metrics(tmp_path / name)) for name in ("with", "without"))
    assert found == expected
    assert not (tmp_path / "without" / "layers.jsonl").exists()


def test_skipped_and_frozen_weights_do_not_move(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    frozen = {"optimizer__groups": '[{pattern = "layers.0.*", frozen = true}]'}
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "run", training__steps=1, **EVERY, **frozen))
    (line,) = read_layers(tmp_path / "run")
    ratios = line["layers"]["update_ratio"]["layer"]
    assert ratios[0] == 0
    assert all(ratio > 0 for ratio in ratios[1:])


def test_what_is_not_finite_is_null(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """The line of the step that ends the run is written before it ends."""
    recipe = make_recipe(tmp_path / "run", optimizer__lr=1e30, lr_scheduler__warmup_steps=0, **EVERY)
    with pytest.raises(AssertionError, match="gradient norm nan"):
        run_ranks(train, 2, 2, recipe)
    last = read_layers(tmp_path / "run")[-1]
    assert None in last["layers"]["gradient_norm"]["layer"]


@pytest.mark.slow
@pytest.mark.usefixtures("warm_imports")
@pytest.mark.parametrize("operator", ['"split_width"', '"random_depth", mask_steps = 3'])
def test_compiled_blocks_have_a_version_for_each_kind_of_step(
    operator: str, tmp_path: Path, warm_ranks: WarmRanks
) -> None:
    """Four kinds of steps, two lengths and batches of sequences, two models: more versions than torch allows."""
    settings = {
        **COMPILED,
        "training__steps": 12,
        "model__n_layers": 4,
        "metrics__layers_freq": 2,
        "metrics__attention_freq": 3,
        "validation__enable": True,
        "validation__freq": 4,
        "validation__seq_len": 64,
        "validation__local_batch_size": 4,
        "checkpoint__enable": True,
        "growth__stages": f'[{{at = "7 steps", operator = {operator}, factor = 2}}]',
    }
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "run", **settings), timeout_seconds=280)
    assert [line["step"] for line in read_layers(tmp_path / "run")] == [2, 3, 4, 6, 8, 9, 10, 12]


def _weights_kept(rank: int, recipe: Any) -> list[bool]:
    """Whether steps were skipped, and whether a copy of the weights outlived the last of them."""
    with trainer_of(recipe, 1) as trainer:
        assert trainer.fit()
        (stage,) = [one for one in trainer.runtime.engine.model.stages if one.name == "layer_metrics"]
        return [bool(trainer.state.stability.skipped), bool(stage._before)]


def test_a_skipped_step_leaves_no_copy_of_the_weights(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """The stages of a phase live as long as the run, so it would stay through all later ones."""
    skipping = {"training__steps": 5, "stability__spike": "skip", "stability__spike_window": 8}
    recipe = make_recipe(tmp_path / "run", **EVERY, **skipping, stability__spike_sigmas=1e-9)
    assert warm_ranks(_weights_kept, 1, recipe) == [[True, False]]
