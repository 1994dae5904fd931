"""What `plan` says of growths: what they are worth, and what speaks against them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tests.recipes.test_recipes import plan_text
from titan_growth.config.loader import load_recipe
from titan_growth.models.registry import model_config_of
from titan_growth.tools.findings import Findings

RECIPE = """
[model]
name = "llama3"
flavor = "debugmodel"
n_layers = {layers}

[lr_scheduler]
warmup_steps = 10
{decay}

[training]
steps = 1000
local_batch_size = {batch}

[checkpoint]
enable = true

[growth.base]
{base}

[[growth.stages]]
at = "{at}"
operator = "{operator}"
{size}
optimizer_state = "{moments}"
lr_policy = "{policy}"
"""
USUAL = {
    "layers": 12,
    "batch": 8,
    "decay": "decay_ratio = 0.2",
    "base": "",
    "at": "50%",
    "operator": "interpose",
    "size": "factor = 4",
    "moments": "asymmetric",
    "policy": "continue",
}


def advice(folder: Path, changes: Mapping[str, object], more: str = "") -> str:
    """What the plan says after the timeline of the growths, on one line."""
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format_map({**USUAL, **changes}) + more, encoding="utf-8")
    block = next(part for part in plan_text(path, 1).split("\n\n") if part.startswith("growth ("))
    return " ".join(block[block.index(" fewer FLOPs") - 5 :].split()) if " fewer FLOPs" in block else ""


def test_a_growth_that_nothing_speaks_against_has_its_worth_only(tmp_path: Path) -> None:
    """3 of 12 layers for half of the tokens; the head and the attention count."""
    recipe = load_recipe(["--model.flavor", "debugmodel", "--model.n_layers", "12"])
    target = model_config_of(recipe.model, Findings())
    assert target is not None
    base = replace(target, num_layers=3)
    small, large = (config.flops_per_token(recipe.training.seq_len) for config in (base, target))
    ratio = 1 / (0.5 + 0.5 * small / large)
    saved, speedup = f"{1 - 1 / ratio:.1%}", f"{ratio - 1:.1%}"
    assert advice(tmp_path, {}) == (
        f"{saved} fewer FLOPs than as many tokens from scratch: a speedup of {speedup} if the loss is equal, and none "
        f"if growing needs {ratio:.2f} times the tokens"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decay": "", "at": "60%"}, "has brought the learning rate to 41% of its peak"),
        ({"moments": "reset"}, "moments are reset and no warmup follows"),
        ({"size": "factor = 6"}, "6 times the layers"),
        ({"operator": "stack", "batch": 512}, "tokens per parameter. Beyond about 20, interpose"),
    ],
    ids=["decay", "moments", "factor", "mature"],
)
def test_what_speaks_against_a_growth(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    text = advice(tmp_path, changes)
    assert text.count("note: ") == 1
    assert said in text


@pytest.mark.parametrize(
    "changes",
    [{"decay": ""}, {"policy": "restart", "decay": "", "at": "60%", "moments": "reset"}],
    ids=["half", "new"],
)
def test_what_does_not(changes: dict[str, object], tmp_path: Path) -> None:
    """Half-way through a linear decay; a restart, which lays out a new one and warms up."""
    assert "note:" not in advice(tmp_path, changes)


def test_several_growths(tmp_path: Path) -> None:
    second = '\n[[growth.stages]]\nat = "60%"\nfactor = 2\noptimizer_state = "copy"\nlr_policy = "continue"\n'
    text = advice(tmp_path, {"size": "factor = 2"}, second)
    assert "several growths in depth" in text


def test_a_growth_at_a_slope_is_worth_what_nobody_knows_yet(tmp_path: Path) -> None:
    assert advice(tmp_path, {"at": "slope 0.02 over 100 steps"}) == ""
