"""`python -m titan_growth probe`: which growth is best for this checkpoint? Try several for a few steps each.

    python -m titan_growth probe --from outputs/checkpoint/step-5000 --steps 100 --factor 2 \\
        --operator stack --operator interpose --operator zero_depth --lr-policy continue

Every candidate is a real run: the checkpoint is taken into a folder of its own (its shards as links), the candidate is
written into its recipe as the next growth, and the launcher starts it on as many ranks as asked for. So whatever a run
can do can be probed, on the mesh it will have: every operator and map, masks and learned growths, policies for moments
and learning rate. All candidates see the same batches and the same learning rate schedule, which stays laid out to the
end of the run that the checkpoint is from, or to the end of the probe where that is later. The small model goes on as
well, for comparison.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli

from titan_growth.checkpoint.folder import LINEAGE, MANIFEST, RECIPE, Manifest, file_entry, step_path, write_manifest
from titan_growth.checkpoint.lineage import Lineage
from titan_growth.config.growth_schema import SIZES, GrowthStage
from titan_growth.config.loader import load_recipe, to_toml, with_values
from titan_growth.config.plugins import load_plugins
from titan_growth.config.schema import Recipe
from titan_growth.growth.chain import chain_of
from titan_growth.growth_arguments import STAGE_WORDS, Source, checked_stage, map_of, open_source, parse_words, stage_of
from titan_growth.models.config import ModelConfig
from titan_growth.models.registry import model_config_of
from titan_growth.plan import plan_run
from titan_growth.probe_report import Outcome, outcome_of, report
from titan_growth.tools.device import Device
from titan_growth.tools.errors import CheckpointError, ConfigError, Problem, TitanGrowthError
from titan_growth.tools.files import write_atomic
from titan_growth.tools.run_folder import METRICS_FILE

USAGE = """usage: python -m titan_growth probe --from STEP_FOLDER --operator NAME [--operator NAME ...] [-- RECIPE KEYS]

Grows a checkpoint by several operators or maps, trains each result for K steps on the same batches, and ranks them by
the validation loss they come to (by the loss of the last batch, where the recipe validates nothing).

  --from FOLDER       a committed step folder with moments
  --steps K           steps after each growth; default 50
  --operator NAME     a candidate; give it several times
  --stage TOML        a candidate with settings of its own: --stage 'operator = "map", layer_map = [0, 0, 1, 2]'
  --factor N          and all other settings of [[growth.stages]] (--optimizer-state copy, --lr-policy continue,
                      --warmup-steps 10, --mask-steps 100, --noise 0.1, ...): of every candidate that does not set them
  --num-ranks N       ranks to run on; default 1. The mesh is the recipe's unless keys say otherwise
  --to FOLDER         keep recipes, logs and metrics of the candidates there; must not exist, or be empty
  --plugins a,b       modules with operators of your own, besides those of the recipe

What follows -- goes to every run, such as: -- --parallelism.tensor_parallel_degree 2 --training.local_batch_size 4

Exit status: 0 all candidates ran, 1 one or more failed, 2 wrong arguments.
"""

_OWN = ("from", "steps", "stage", "num_ranks", "to", "plugins")
_STAGE = (*STAGE_WORDS, "mask_steps", "lr_policy", "lr", "warmup_steps", "global_batch_size", "local_batch_size",
          "seq_len")  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A growth to try; None for the small model as it is."""

    name: str
    stage: GrowthStage | None


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    if not argv or argv[0] in ("--help", "-h"):
        print(USAGE, end="")
        return 0
    position = argv.index("--") if "--" in argv else len(argv)
    words, keys = argv[:position], argv[position + 1 :]
    own = [word for word in keys if word.partition("=")[0] in ("--job.dump_folder", "--job.config_file")]
    try:
        given = parse_words(words, (*_OWN, *_STAGE), command="probe")
        steps, num_ranks = (_count(given, name, default) for name, default in (("steps", 50), ("num_ranks", 1)))
        if own:
            raise ConfigError([Problem(own[0], "is the probe's own to set", "Name a folder with --to")])
        if "from" not in given:
            raise ConfigError([Problem("--from", "is missing")])
        source = open_source(Path(given["from"][-1]))
        load_plugins([*source.recipe.plugins, *filter(None, given.get("plugins", [""])[-1].split(","))])
        candidates = _candidates(given, source)
        with _work_folder(given.get("to", [None])[-1]) as folder:
            # All of them are prepared and checked before any is started.
            runs = [
                _prepared(source, one, folder / f"{number}-{_file_name(one.name)}", steps, num_ranks, keys)
                for number, one in enumerate(candidates)
            ]
            outcomes = [_run(source, run, steps, num_ranks, keys) for run in runs]
    except ConfigError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems))
        return error.exit_status
    except TitanGrowthError as error:
        print(f"error: {error}")
        return error.exit_status
    except KeyboardInterrupt:
        print("stopped")
        return 130
    print("\n".join(report(outcomes, steps, str(source.folder.path))))
    return int(any(outcome.failure for outcome in outcomes))


def _count(given: dict[str, list[str]], name: str, default: int) -> int:
    text = given.get(name, [str(default)])[-1]
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError([Problem(f"--{name.replace('_', '-')}", f"expected a positive whole number, got '{text}'")])
    return int(text)


def _candidates(given: dict[str, list[str]], source: Source) -> list[Candidate]:
    """The small model, then every growth, in the order they were given.

    Raises:
        ConfigError: when there is none, two are the same, or one does not fit the model.
    """
    shared = {name: given[name][-1] for name in _STAGE if name in given and name != "operator"}
    settings = [{"operator": name} for name in given.get("operator", [])]
    settings += [_inline(text) for text in given.get("stage", [])]
    if not settings:
        raise ConfigError([Problem("--operator", "is missing: which growths are to be tried", "Give it several times")])
    common = stage_of({**shared, "operator": "stack"}).model_dump(exclude_unset=True, exclude={"at", "operator"})
    candidates = [Candidate("(not grown)", None)]
    for own in settings:
        sized = {"factor", "layer_map", *SIZES} & own.keys()
        name = " ".join(str(value) if key == "operator" else f"{key}={value}" for key, value in own.items())
        taken = {key: value for key, value in common.items() if not (sized and key in {"factor", "layer_map", *SIZES})}
        try:
            stage = checked_stage({**taken, **own})
            growth = map_of(source.config, stage)
        except ConfigError as error:
            raise ConfigError(
                [Problem(f"'{name}' {one.key}", one.message, one.hint) for one in error.problems]
            ) from None
        if growth.masked and stage.mask_steps is None:
            hint = "Give --mask-steps, or mask_steps in its --stage"
            raise ConfigError([Problem(f"'{name}'", "has a mask, and no mask_steps to open it over", hint)])
        if not growth.masked and stage.mask_steps is not None and "mask_steps" not in own:
            stage = stage.model_copy(update={"mask_steps": None})  # meant for those that have a mask
        if any(one.name == name for one in candidates):
            raise ConfigError([Problem(f"'{name}'", "is given twice")])
        candidates.append(Candidate(name, stage))
    return candidates


def _inline(text: str) -> dict[str, Any]:
    try:
        table = tomli.loads(f"stage = {{{text.strip().removeprefix('{').removesuffix('}')}}}")["stage"]
    except tomli.TOMLDecodeError as error:
        hint = """For example --stage 'operator = "map", layer_map = [0, 0, 1, 2]'"""
        raise ConfigError([Problem("--stage", f"is no TOML: {error}", hint)]) from None
    known = GrowthStage.model_fields.keys() - {"at", "num_ranks"}
    for name in table:
        if name not in known:
            raise ConfigError([Problem(f"--stage {name}", "is no setting of a candidate", ", ".join(sorted(known)))])
    if "operator" not in table:
        raise ConfigError([Problem("--stage", "names no operator", 'For example operator = "stack"')])
    return {"operator": table.pop("operator"), **table}


def candidate_recipe(source: Source, candidate: Candidate, steps: int) -> Recipe:
    """The recipe of a candidate's run: that of the checkpoint, with the growth as its next one, and `steps` to go.

    Raises:
        ConfigError: when the growths that the checkpoint has behind it and this one make no chain.
        CheckpointError: when the checkpoint has no moments to go on with.
    """
    recipe, step = source.recipe, source.folder.step
    if source.folder.manifest.model_only:
        raise CheckpointError(f"{source.folder.path} refused: it holds only weights, and a probe goes on training")
    done = recipe.growth.active_stages[: len(source.lineage.events)]
    stages, model = list(done), source.config
    if candidate.stage is not None:
        stages.append(candidate.stage.model_copy(update={"at": f"{step} steps"}))
        model = map_of(source.config, candidate.stage).after
    first = source.chain.configs[0]
    values: dict[str, Any] = {
        **{f"model.{key}": size for key, size in model.sizes.items()},
        "model.head_dim": model.head_dim,
        "growth.enable": True,
        "growth.stages": [stage.model_dump(exclude_none=True) for stage in stages],
        "growth.watchdog.steps": 0,
        "training.steps": step + steps,
        "lr_scheduler.total_steps": max(recipe.lr_scheduler.total_steps or recipe.training.steps, step + steps),
        "checkpoint.enable": True,
        "checkpoint.load_only": False,
        "checkpoint.load_step": -1,
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
        sizes = {key: getattr(first, field) for key, field in SIZES.items()}
        values |= {f"growth.base.{key}": size for key, size in sizes.items()}
    recipe = with_values(recipe, values)
    target, problems = model_config_of(recipe.model)
    chain, more = chain_of(recipe.growth, target) if target is not None else (None, [])
    if chain is None or chain.configs[len(done)] != source.config:
        found = [*problems, *more] or [Problem(f"'{candidate.name}'", "does not start from the checkpoint's model")]
        raise ConfigError(found)
    return recipe


@contextlib.contextmanager
def _work_folder(wanted: str | None) -> Any:
    """A folder for the runs: the one asked for, which stays, or one that is gone afterwards."""
    if wanted is None:
        with tempfile.TemporaryDirectory(prefix="titan_growth-probe-") as temporary:
            yield Path(temporary)
        return
    folder = Path(wanted)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError([Problem("--to", f"{folder} is not empty", "Name a folder that does not exist")])
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


@dataclass(frozen=True)
class ProbeRun:
    """A candidate that is ready to start."""

    name: str
    folder: Path
    model: ModelConfig

    @property
    def recipe_file(self) -> Path:
        """What it is started with."""
        return self.folder / "probe.toml"


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name).strip("_")


def _prepared(
    source: Source, candidate: Candidate, folder: Path, steps: int, num_ranks: int, keys: Sequence[str]
) -> ProbeRun:
    """Makes the folder of a candidate's run.

    Raises:
        ConfigError: when its recipe does not fit the number of ranks, or the keys are wrong.
    """
    folder.mkdir()
    recipe = with_values(candidate_recipe(source, candidate, steps), {"job.dump_folder": str(folder.resolve())})
    config, problems = model_config_of(recipe.model)
    assert config is not None, problems
    run = ProbeRun(candidate.name, folder, config)
    run.recipe_file.write_text(to_toml(recipe), encoding="utf-8")
    recipe = load_recipe(["--job.config_file", str(run.recipe_file), *keys])
    manifest = source.folder.manifest
    if candidate.stage is None:
        manifest = replace(manifest, held_out_loss=None)
    plan, problems, _ = plan_run(
        recipe,
        num_ranks=num_ranks,
        device_type=Device.detect().type,
        progress=manifest.progress,
        num_growths=len(source.lineage.events),
        grows_at_once=manifest.held_out_loss is not None,
    )
    if plan is None:
        raise ConfigError([Problem(f"'{candidate.name}' {one.key}", one.message, one.hint) for one in problems])
    copy_linked(source, manifest, step_path(folder / recipe.checkpoint.folder, manifest.progress.step), recipe)
    return run


def _run(source: Source, run: ProbeRun, steps: int, num_ranks: int, keys: Sequence[str]) -> Outcome:
    """Carries out one candidate, and clears its checkpoints away."""
    command = [sys.executable, "-m", "titan_growth", "launch", "--job.config_file", str(run.recipe_file), *keys]
    print(f"{run.name}: {steps} steps on {num_ranks} rank{'s' if num_ranks > 1 else ''} ...", flush=True)
    with open(run.folder / "probe.log", "w+b") as log:
        environ = {**os.environ, "NGPU": str(num_ranks)}
        status = subprocess.run(command, env=environ, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines() or [f"status {status}"]
    shutil.rmtree(run.folder / source.recipe.checkpoint.folder)
    failure = "" if status == 0 else next((line for line in reversed(said) if "error" in line.lower()), said[-1])
    try:
        lines = [json.loads(line) for line in (run.folder / METRICS_FILE).read_text().splitlines()]
    except (OSError, ValueError):
        lines = []
    return outcome_of(run.name, run.model, lines, source.folder.manifest, failure)


def copy_linked(source: Source, manifest: Manifest, target: Path, recipe: Recipe) -> None:
    """A copy of a checkpoint that is written with another recipe; the shards are links, and nothing is written there.

    Growths that were taken back are forgotten: they would put off the one that is tried.
    """
    target.mkdir(parents=True)
    for name in manifest.files:
        if name not in (RECIPE, LINEAGE, MANIFEST):
            (target / name).symlink_to((source.folder.path / name).resolve())
    write_atomic(target / RECIPE, to_toml(recipe))
    write_atomic(target / LINEAGE, Lineage(source.lineage.events, source.lineage.ancestors).to_json())
    files = {**manifest.files, **{name: file_entry(target / name) for name in (RECIPE, LINEAGE)}}
    fresh: dict[str, Any] = {"roll_back": None, "metrics_offset": 0, "permanent": False}
    write_manifest(target, replace(manifest, files=files, **fresh))
