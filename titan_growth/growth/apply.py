"""One growth on all ranks: read, verified, and either right on every rank or an error on every rank."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from titan_growth.checkpoint.reader import SafeReader
from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.growth.ligo import LearnedGrowth, learn
from titan_growth.growth.operators.base import GrowthMap
from titan_growth.growth.operators.learn import DEFAULT_OPTIONS
from titan_growth.growth.read import Box, copied_elements, new_elements, read_grown
from titan_growth.growth.rules import Rules
from titan_growth.growth.verify import verify_growth
from titan_growth.models.registry import family_module
from titan_growth.tools.collectives import describe_os_error, fail_together, gather_objects
from titan_growth.tools.errors import CheckpointError, GrowthError, RefusedCheckpointError
from titan_growth.tools.logs import logger

Result = TypeVar("Result")


def _read_together(source: Path, read: Callable[[], Result]) -> Result:
    """What each rank reads of a checkpoint; raises CheckpointError on all when one cannot."""
    errors: list[str] = []
    results: list[Result] = []
    try:
        results.append(read())
    except CheckpointError as error:
        errors = [str(error)]
    except OSError as error:
        errors = [str(RefusedCheckpointError(source.name, describe_os_error(error)))]
    fail_together(errors, CheckpointError)
    return results[0]


class LearnedModel(NamedTuple):
    """What a learning phase leaves besides the parameters."""

    record: dict[str, float]
    """Steps, first and last loss."""
    num_bytes_read: int
    """By all ranks."""


def learn_growth(
    source: Path,
    growth_map: GrowthMap,
    planned: PlannedGrowth,
    parameters: Mapping[str, Tensor],
    *,
    family: str,
    seed: int,
    device: torch.device,
    train_step: Callable[[], float],
) -> LearnedModel:
    """Carries out a growth that is learned; the parameters of the grown model hold the result.

    Args:
        train_step: trains on the next batch without a step of the optimizer, and returns the loss.

    Raises:
        CheckpointError: when the small model cannot be read.
        GrowthError: when a learned weight is not finite.
    """
    roles = family_module(family).ROLES
    learned = _read_together(
        source, lambda: LearnedGrowth(source, growth_map, parameters, roles=roles, seed=seed, device=device)
    )
    options = DEFAULT_OPTIONS | planned.options
    losses = learn(learned, steps=options["steps"], lr=options["lr"], train_step=train_step)
    wrong = [shard.name for shard in learned.shards if not bool(torch.isfinite(shard.local).all())]
    message = f"the learned model is wrong: {wrong[0]} is not finite. Lower options.lr" if wrong else ""
    fail_together([message] if message else [], GrowthError)
    logger.info("the growth was learned in %d steps: loss %.4f -> %.4f", len(losses), losses[0], losses[-1])
    record = {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1]}
    return LearnedModel(record, sum(gather_objects(learned.num_bytes_read)))


def fresh_elements(
    tensors: Mapping[str, Tensor], growth_map: GrowthMap, planned: PlannedGrowth, *, family: str
) -> dict[str, Tensor]:
    """Which elements of each parameter are new in a growth, or copies; parameters without any are left out.

    Args:
        tensors: this rank's parameters of the grown model.

    Returns:
        Masks that broadcast to this rank's shards, on their device.
    """
    rules = Rules(growth_map, planned, family_module(family))
    found = {}
    for name, tensor in tensors.items():
        box = Box.of(tensor, rules.of(name))
        if not box.local.numel():
            continue
        if masks := [mask for mask in (new_elements(box), copied_elements(box)) if mask is not None and mask.any()]:
            found[name] = functools.reduce(torch.logical_or, masks).to(box.local.device)
    return found


def carry_out(
    source: Path,
    tensors: Mapping[str, Tensor],
    growth_map: GrowthMap,
    planned: PlannedGrowth,
    *,
    family: str,
    seed: int,
) -> int:
    """Fills this rank's tensors of the grown model from the small one's checkpoint, and verifies them.

    Args:
        source: the small model's step folder.
        tensors: parameters and, where the growth keeps some of it, optimizer state of the grown model.
        seed: of this growth.

    Returns:
        Bytes that all ranks together have read, verification apart.

    Raises:
        CheckpointError: on every rank, when any of them cannot read its share.
        GrowthError: on every rank, when any of them finds something wrong.
    """
    rules = Rules(growth_map, planned, family_module(family))
    reader = SafeReader(source)
    _read_together(source, lambda: read_grown(reader, tensors, rules, seed=seed))
    num_bytes_read = reader.num_bytes_read
    try:
        wrong = verify_growth(SafeReader(source), tensors, rules)
    except (CheckpointError, OSError) as error:
        wrong = [str(error)]
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    fail_together([f"the grown model is wrong: {wrong[0]}{more}"] if wrong else [], GrowthError)
    logger.info("every tensor is what its source makes of it (%d compared on this rank)", len(tensors))
    return sum(gather_objects(num_bytes_read))
