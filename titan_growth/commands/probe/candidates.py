"""The candidates of a command line, and the recipe of each candidate's run.

A candidate must differ from the checkpoint's run in its growth only. So its recipe is the checkpoint's as it holds at
that step: past growths stay (the learning rate schedule counts from them), mesh and local batch are those of that
phase, and only keys that do not change what is computed may be given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tomli

from titan_growth.commands.growth_args import (
    SETTINGS,
    first_model_keys,
    growth_map,
    learning_rate_keys,
    model_keys,
    planned_growth,
    schedule_of,
)
from titan_growth.commands.source import Source
from titan_growth.config.loader import with_values
from titan_growth.config.schema.growth import SIZES, PlannedGrowth
from titan_growth.config.schema.recipe import Recipe
from titan_growth.growth.chain import chain_of
from titan_growth.growth.operators.base import operators
from titan_growth.models.registry import model_config_of
from titan_growth.run.phases import recipe_in_phase
from titan_growth.tools.errors import ConfigError, Problem, RefusedCheckpointError
from titan_growth.tools.findings import Findings

SHARED = (*SETTINGS, "mask_steps", "lr_policy", "lr", "warmup_steps", "warmup", "global_batch_size", "local_batch_size",
          "seq_len")  # fmt: skip
"""Settings that can be shared by all candidates."""

CHANGEABLE = ("parallelism.", "compile.", "activation_checkpoint.", "training.local_batch_size", "comm.")
"""Recipe keys, or prefixes of them, that change where and how a candidate is computed, but not what."""

_HOW_LARGE = frozenset({"factor", "layer_map", *SIZES})


@dataclass(frozen=True)
class Candidate:
    """A growth to try; `planned` is None for the small model as it is."""

    name: str
    planned: PlannedGrowth | None


def candidates_of(
    operator_names: Sequence[str], tables: Sequence[str], shared: Mapping[str, Any], source: Source
) -> list[Candidate]:
    """The small model, then every growth in the order given.

    Args:
        operator_names: one candidate each.
        tables: TOML, one candidate each.
        shared: settings for candidates that do not set them.

    Raises:
        ConfigError: when there is none, two are the same, or one does not fit the model.
    """
    common = planned_growth(shared).model_dump(exclude_unset=True, exclude={"at"})
    settings: list[dict[str, Any]] = [{"operator": name} for name in operator_names]
    settings += [_inline(text) for text in tables]
    if not settings:
        raise ConfigError([Problem("--operator", "is missing: which growths are to be tried", "Give it several times")])
    candidates = [Candidate("(not grown)", None)]
    for own in settings:
        name = " ".join(str(value) if key == "operator" else f"{key}={value}" for key, value in own.items())
        if any(one.name == name for one in candidates):
            raise ConfigError([Problem(f"'{name}'", "is given twice")])
        try:
            candidates.append(Candidate(name, _planned(own, common, source)))
        except ConfigError as error:
            found = [Problem(f"'{name}' {one.key}".strip(), one.message, one.hint) for one in error.problems]
            raise ConfigError(found) from None
    return candidates


def _planned(own: dict[str, Any], common: dict[str, Any], source: Source) -> PlannedGrowth:
    """A candidate's growth: its own settings, and the shared ones its operator knows."""
    taken = {key: value for key, value in common.items() if not (_HOW_LARGE & own.keys() and key in _HOW_LARGE)}
    if "options" in taken:
        known: frozenset[str] = getattr(operators().get(str(own["operator"])), "options", frozenset())
        taken["options"] = {key: value for key, value in taken["options"].items() if key in known}
    planned = planned_growth({**taken, **own})
    growth = growth_map(source.config, planned)
    if growth.masked and planned.mask_steps is None:
        message = f"'{planned.operator}' has a mask, and no mask_steps to open it over"
        raise ConfigError([Problem("", message, "Give --mask-steps, or mask_steps in its --stage")])
    if not growth.masked and "mask_steps" not in own:
        planned = planned.model_copy(update={"mask_steps": None})
    return planned


def _inline(text: str) -> dict[str, Any]:
    text = text.strip()
    try:
        table = tomli.loads(f"stage = {text if text.startswith('{') else f'{{{text}}}'}")["stage"]
    except tomli.TOMLDecodeError as error:
        hint = """For example --stage 'operator = "map", layer_map = [0, 0, 1, 2]'"""
        raise ConfigError([Problem("--stage", f"is no TOML: {error}", hint)]) from None
    known = PlannedGrowth.model_fields.keys() - {"at", "num_ranks"}
    for name in table:
        if name not in known:
            raise ConfigError([Problem(f"--stage {name}", "is no setting of a candidate", ", ".join(sorted(known)))])
    if "operator" not in table:
        raise ConfigError([Problem("--stage", "names no operator", 'For example operator = "stack"')])
    return {"operator": table.pop("operator"), **table}


def key_problems(words: Sequence[str]) -> Iterator[Problem]:
    """A problem for each recipe key that would make it another run."""
    for word in words:
        name = word.removeprefix("--").partition("=")[0].replace("-", "_")
        if word.startswith("--") and not name.startswith(CHANGEABLE):
            hint = f"Only {', '.join(one + '*' if one.endswith('.') else one for one in CHANGEABLE)} can be given"
            yield Problem(word.partition("=")[0], "would make it another run than the checkpoint's", hint)


def candidate_recipe(source: Source, candidate: Candidate, steps: int, plugins: Sequence[str] = ()) -> Recipe:
    """The recipe of a candidate's run: the checkpoint's, with this growth as the next one, and `steps` to go.

    Raises:
        ConfigError: when the growth does not follow from the checkpoint's own.
        CheckpointError: when the checkpoint has no moments to continue with.
    """
    recipe, step, num_growths = source.recipe, source.folder.step, len(source.lineage.events)
    if source.folder.manifest.model_only:
        raise RefusedCheckpointError(str(source.folder.path), "it holds only weights, and a probe goes on training")
    now = recipe_in_phase(recipe, num_growths)
    moved: dict[str, Any] = {"parallelism": None, "num_ranks": None, "local_batch_size": None}
    stages = [stage.model_copy(update=moved) for stage in recipe.growth.active_stages[:num_growths]]
    model = source.config
    if candidate.planned is not None:
        stages.append(candidate.planned.model_copy(update={"at": f"{step} steps"}))
        model = growth_map(source.config, candidate.planned).after
    values: dict[str, Any] = {
        "plugins": sorted({*recipe.plugins, *plugins}),
        **model_keys(model),
        "parallelism": now.parallelism.model_dump(),
        "training.local_batch_size": now.training.local_batch_size,
        "training.steps": step + steps,
        "lr_scheduler.total_steps": max(schedule_of(recipe).total_steps, step + steps),
        "lr_scheduler.total": None,
        **learning_rate_keys(recipe, grows=bool(stages)),
        "growth.enable": bool(stages),
        "growth.stages": [stage.model_dump(exclude_none=True) for stage in stages],
        "growth.watchdog": {"steps": 0} if stages else {},
        "checkpoint.enable": True,
        "checkpoint.load_only": False,
        "checkpoint.load_step": -1,
        "checkpoint.start_fresh": False,
        "checkpoint.initial_load_path": None,
        "checkpoint.last_save_model_only": True,
        "checkpoint.interval": step + steps,
        "checkpoint.enable_first_step_checkpoint": False,
        "metrics.log_freq": max(1, min(recipe.metrics.log_freq, steps)),
        "metrics.enable_tensorboard": False,
        "metrics.enable_wandb": False,
        "profiling.enable_profiling": False,
        "profiling.enable_memory_snapshot": False,
    }
    if stages:
        values |= first_model_keys(source.chain.configs[0])
    made = with_values(recipe, values)
    found = Findings()
    chain = chain_of(made.growth, model_config_of(made.model, found), found)
    if chain is not None and chain.configs[num_growths] != source.config:
        found.problem(f"'{candidate.name}'", "does not start from the checkpoint's model")
    found.raise_if_any()
    return made


def doubts(source: Source, candidates: Sequence[Candidate], steps: int) -> Iterator[str]:
    """Caveats about the candidates, for the reader of the ranking."""
    for one in candidates:
        if one.planned is None:
            continue
        warmup = schedule_of(source.recipe).warmup_after(source.folder.step, one.planned.own_warmup)
        if one.planned.lr_policy != "continue" and warmup >= steps:
            yield (
                f"{one.name}: its warmup of {warmup} steps is longer than the probe, so it never learns at its full "
                "rate. Give --warmup-steps, or --lr-policy continue"
            )
        if one.planned.mask_steps and one.planned.mask_steps > steps:
            yield f"{one.name}: after {steps} steps its mask is {steps / one.planned.mask_steps:.0%} open"
