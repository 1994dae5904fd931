"""The SDC check: it changes nothing, and it finds one flipped bit, and where."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed.meshes import Case, mesh, slow_ones
from tests.harness import WarmRanks
from tests.runs import make_recipe, read_metrics, trainer_of, without_timings
from titan_growth.config.schema.recipe import Recipe
from titan_growth.tools.bits import bits_of
from titan_growth.tools.errors import TrainingError
from titan_growth.tools.shards import local_of
from titan_growth.trainer import Trainer

pytestmark = pytest.mark.usefixtures("warm_imports")

SETTINGS: dict[str, Any] = {"training__steps": 3, "model__n_layers": 2, "lr_scheduler__warmup_steps": 0}
EVERY_STEP = {"debug__sdc_check_interval": 1}
STEP_2 = {"debug__sdc_check_interval": 2}


# ---- it changes nothing ----------------------------------------------------------------------------------------------


def drop_out(_block: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return F.dropout(output, 0.1)


def state_after(rank: int, num_ranks: int, recipe: Recipe, is_random: bool) -> str:
    """A digest of this rank's weights, moments, random state and place in the data at the end of a run."""
    digest = hashlib.sha256()
    with trainer_of(recipe, num_ranks) as trainer:
        if is_random:
            for part in trainer.runtime.engine.model.parts:
                for block in part.layers.values():
                    block.register_forward_hook(drop_out)
        assert trainer.fit()
        tensors = {**trainer.runtime.tensors(optimizer=True), "rng": torch.get_rng_state()}
        for name, tensor in tensors.items():
            digest.update(name.encode() + bits_of(local_of(tensor).contiguous()).numpy().tobytes())
        digest.update(str((trainer.progress.samples, trainer.progress.tokens)).encode())
    return digest.hexdigest()


COMPILED = {"compile__enable": True, "compile__backend": "aot_eager"}
AC = "activation_checkpoint__"
FLOAT8 = {
    "model__converters": ["quantize.linear.float8"],
    "model__dim": 64,
    "model__vocab_size": 288,
    "quantize__linear__float8__enable_fsdp_float8_all_gather": True,
    "quantize__linear__float8__precompute_float8_dynamic_scale_for_fsdp": True,
}
SLOW = (
    "fsdp2, compiled",
    "tp2, compiled, recomputed",
    "fsdp2 x tp2",
    "hsdp 2x2",
    "pp2 x fsdp2, Interleaved1F1B",
)
UNCHANGED: dict[str, Case] = {
    "accumulation": mesh(training__local_batch_size=2),
    "bfloat16": mesh(training__mixed_precision_param="bfloat16"),
    "layer metrics": mesh(training__local_batch_size=4, metrics__layers_freq=1, metrics__attention_freq=1),
    "z-loss, Muon": mesh(training__z_loss_weight=0.1, optimizer__name="Muon", training__local_batch_size=4),
    "fsdp2, accumulation": mesh(shard=2, training__local_batch_size=2),
    "fsdp2, recomputed": mesh(shard=2, **{f"{AC}mode": "full"}),
    "fsdp2, operations recomputed": mesh(shard=2, **{f"{AC}mode": "selective", f"{AC}selective_ac_option": "op"}),
    "fsdp2, compiled": mesh(shard=2, **COMPILED),
    "fsdp2, Float8": mesh(shard=2, **FLOAT8),
    "hsdp 2x2": mesh(replicate=2, shard=2),
    "tp2": mesh(tp=2, training__z_loss_weight=0.1),
    "tp2, compiled, recomputed": mesh(
        tp=2, compile__enable=True, compile__backend="aot_eager", **{f"{AC}mode": "full"}
    ),
    "cp2": mesh(cp=2),
    "pp2": mesh(pp=2, training__local_batch_size=4),
    "pp2, ZBVZeroBubble": mesh(pp=2, schedule="ZBVZeroBubble", model__n_layers=4),
    "pp2 x fsdp2, Interleaved1F1B": mesh(pp=2, shard=2, schedule="Interleaved1F1B", model__n_layers=4),
    "fsdp2 x tp2": mesh(shard=2, tp=2),
}


@pytest.mark.parametrize("name", slow_ones(UNCHANGED, *SLOW))
def test_the_run_is_that_without_the_check(name: str, warm_ranks: WarmRanks, tmp_path: Path) -> None:
    """Weights, moments, random state, data cursor and metrics, bit for bit."""
    case = UNCHANGED[name]
    settings = {**SETTINGS, **case.layout}
    is_random = "tp" not in name and "recomputed" not in name and "compiled" not in name
    ends, lines = [], []
    for number, check in enumerate(({}, EVERY_STEP)):
        recipe = make_recipe(tmp_path / str(number), **settings, **check)
        ends.append(warm_ranks(state_after, case.num_ranks, case.num_ranks, recipe, is_random))
        lines.append(without_timings(read_metrics(tmp_path / str(number))))
        if (layers := tmp_path / str(number) / "layers.jsonl").exists():
            lines[-1] += without_timings([json.loads(line) for line in layers.read_text().splitlines()])
    assert ends[0] == ends[1]
    assert lines[0] == lines[1]


# ---- it finds one bit ------------------------------------------------------------------------------------------------


class Flip:
    """Flips one bit of the last number but two, in the n-th call of its hook in step 2."""

    def __init__(self, trainer: Trainer, call: int) -> None:
        self.trainer, self.call, self.calls = trainer, call, 0

    def __call__(self, values: Tensor) -> None:
        if self.trainer.progress.step + 1 == 2:
            self.calls += 1
            if self.calls == self.call:
                bits_of(local_of(values).detach()).view(-1)[-3] ^= 1 << 12

    def on_output(self, _block: nn.Module, _inputs: Any, output: Tensor) -> None:
        self(output)

    def on_gradient(self, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        self(gradient)
        return gradient

    def on_gradient_of_output(self, _block: nn.Module, _inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self.on_gradient)


def error_of(rank: int, num_ranks: int, recipe: Recipe, where: str, guilty: int, call: int) -> str | None:
    """What the run ends with when a rank flips a bit; None if it does not end."""
    kind, _, name = where.partition(" ")
    with trainer_of(recipe, num_ranks) as trainer:
        for part in trainer.runtime.engine.model.parts if rank == guilty else ():
            flip = Flip(trainer, call)
            if kind == "weight":
                part.get_parameter(name).register_hook(flip.on_gradient)
            elif name in dict(part.named_modules()):
                hook = flip.on_output if kind == "output" else flip.on_gradient_of_output
                part.get_submodule(name).register_forward_hook(hook)
        try:
            trainer.fit()
        except TrainingError as error:
            assert trainer.progress.step == 1, "the step was taken"
            return str(error)
    return None


FOUND: list[tuple[Case, str, int, int, str]] = [
    (mesh(), "output layers.0.attention.wo", 0, 2, "first the output of layers.0, the gradient of tok_embeddings"),
    (mesh(), "output norm", 0, 2, "first the loss, the gradient of"),
    (mesh(), "gradient layers.1.feed_forward", 0, 2, "first the gradient at the output of layers.0, the gradient of"),
    (mesh(), "weight layers.1.attention.wk.weight", 0, 2, "the gradient of layers.1.attention.wk.weight and 0 others"),
    (mesh(shard=2), "output layers.1.ffn_norm", 1, 2, "first the output of layers.1, the gradient of"),
    (mesh(shard=2), "gradient layers.1.feed_forward.w2", 1, 2, "first the gradient at the output of layers.0"),
    (mesh(tp=2), "weight layers.1.attention.wk.weight", 1, 2, "the gradient of layers.1.attention.wk.weight and 0"),
    (mesh(cp=2), "output layers.1.attention.wo", 1, 2, "first the output of layers.1"),
    (mesh(pp=2, training__local_batch_size=8), "output layers.1.attention", 1, 5, "first the output of layers.1"),
    (mesh(replicate=2, shard=2), "output layers.0.attention", 2, 2, "first the output of layers.0"),
]


@pytest.mark.parametrize(
    ("case", "where", "guilty", "call", "found"),
    FOUND,
    ids=[f"{case.num_ranks} ranks, {row[0]}" for case, *row in FOUND],
)
def test_a_flipped_bit_is_found(
    case: Case, where: str, guilty: int, call: int, found: str, warm_ranks: WarmRanks, tmp_path: Path
) -> None:
    """In the second pass, on one rank, which is named before those that it has spread to."""
    recipe = make_recipe(tmp_path / "run", **SETTINGS, **case.layout, **STEP_2)
    errors = warm_ranks(error_of, case.num_ranks, case.num_ranks, recipe, where, guilty, call)
    assert set(errors) == {errors[0]}, "the ranks do not agree"
    expected = f"step 2: a microbatch gave other bits when it was run again (silent data corruption). rank {guilty} ("
    assert errors[0] is not None
    assert errors[0].startswith(expected)
    assert found in errors[0]
    assert "no check has passed before; checkpoints after it may be damaged" in errors[0]


def test_an_error_in_both_passes_or_in_other_steps_is_not_looked_for(warm_ranks: WarmRanks, tmp_path: Path) -> None:
    """What the check does not see: step 2 alone is checked here, and its second microbatch is not."""
    recipe = make_recipe(tmp_path / "run", **SETTINGS, training__local_batch_size=4, **STEP_2)
    assert warm_ranks(error_of, 1, 1, recipe, "output layers.0", 0, 3) == [None]


def warnings_of(rank: int, num_ranks: int, recipe: Recipe) -> list[str]:
    """The warnings of a run in which rank 1 flips a bit."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    with trainer_of(recipe, num_ranks) as trainer:
        logging.getLogger("titan_growth").addHandler(handler)
        if rank == 1:
            block = trainer.runtime.engine.model.parts[0].layers["0"]
            block.register_forward_hook(Flip(trainer, 2).on_output)
        assert trainer.fit()
        logging.getLogger("titan_growth").removeHandler(handler)
    return [line for line in said if "silent" in line]


def test_it_only_warns_on_request(warm_ranks: WarmRanks, tmp_path: Path) -> None:
    case = mesh(shard=2)
    recipe = make_recipe(tmp_path / "run", **SETTINGS, **case.layout, **EVERY_STEP, debug__sdc_check_action="warn")
    first, other = warm_ranks(warnings_of, 2, 2, recipe)
    assert len(first) == 1
    assert "rank 1 (cpu" in first[0]
    assert "Step 1 passed; checkpoints after it may be damaged" in first[0]
    assert other == []
