"""`python -m titan_growth probe`: which growth is best for this checkpoint? Try several for a few steps each.

Every candidate is a real run: its folder links the checkpoint's shards, its recipe has the candidate as the next
growth, and the launcher starts it. So whatever a run can do can be probed, on the mesh it will have. All candidates
continue at the same batch on the same learning rate schedule, which still ends where the checkpoint's run does, or with
the probe if that is later. The small model continues too, for comparison.

A step folder of torchtitan has weights whose moments mean nothing here. With a recipe for them they are trained for
some steps first, and that run's checkpoint is probed.
"""

from __future__ import annotations

import shutil
import signal
from argparse import Namespace
from functools import partial
from pathlib import Path

from titan_growth.commands.args import CommandLine, positive
from titan_growth.commands.foreign import open_with_recipe
from titan_growth.commands.growth_args import add_settings, settings_of
from titan_growth.commands.probe.candidates import SHARED, candidates_of, doubts, key_problems
from titan_growth.commands.probe.report import Outcome, report
from titan_growth.commands.probe.runs import carried_out, prepared, settled, work_folder
from titan_growth.commands.source import open_source
from titan_growth.config.plugins import load_plugins
from titan_growth.tools.errors import ConfigError, Problem
from titan_growth.tools.text import many

_LINE = CommandLine(
    "probe",
    """Grows a checkpoint by several operators or maps, trains each result for K steps from the same batch on, and
    ranks them by their validation loss (by the loss of the last batch, where the recipe validates nothing). A
    setting of [[growth.stages]] holds for every candidate that does not set it. What follows -- goes to every run:
    recipe keys that change how it is computed, and not what.""",
    example="""--from outputs/checkpoint/step-5000 --steps 100 --num-ranks 8 --factor 2 \\
    --operator stack --operator interpose --stage 'operator = "map", layer_map = [0, 0, 1, 2]' \\
    -- --parallelism.tensor_parallel_degree 2 --training.local_batch_size 4""",
    statuses="0 all candidates ran, 1 one or more failed, 2 wrong arguments, 130 interrupted",
)
_SETTLE = 20
_SETTLE_TEXT = (
    f"With --recipe: steps by which the weights first get moments, from step 0 of the recipe (default: {_SETTLE})."
)
_RANKS = "Ranks to run on, on this machine. The mesh is that of the checkpoint's recipe."
_TARGET = "Keep recipes, logs and metrics of the candidates there. Must not exist, or be empty."
_LINE.option(
    "--from", "FOLDER", "A committed step folder with moments, or one of torchtitan.", required=True, dest="source"
)
_LINE.recipe_of_another()
_LINE.option("--settle", "K", _SETTLE_TEXT, positive)
_LINE.option("--operator", "NAME", "A candidate. Give it several times.", repeated=True)
_LINE.option("--stage", "TOML", "A candidate with settings of its own. Give it several times.", repeated=True)
_LINE.option("--steps", "K", "Steps after each growth.", positive, default=50)
_LINE.option("--num-ranks", "N", _RANKS, positive, default=1)
_LINE.option("--to", "FOLDER", _TARGET)
_LINE.plugins()
add_settings(_LINE, SHARED)


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    end = argv.index("--") if "--" in argv else len(argv)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _LINE.run(argv[:end], partial(_probe, keys=argv[end + 1 :]))
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}")
        return 1
    except KeyboardInterrupt:
        print("stopped")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _probe(args: Namespace, keys: list[str]) -> int:
    if problems := list(key_problems(keys)):
        raise ConfigError(problems)
    load_plugins(args.plugins)
    settle = args.settle or _SETTLE
    if args.recipe_file is None and args.settle is not None:
        raise ConfigError(
            [Problem("--settle", "is for a folder of another program", "Give its --recipe, or leave it out")]
        )
    path = Path(args.source)
    source = open_source(path) if args.recipe_file is None else open_with_recipe(path, args.recipe_file)
    candidates = candidates_of(args.operator, args.stage, settings_of(args, SHARED), source)
    outcomes: list[Outcome] = []
    with work_folder(args.to, source) as folder:
        if args.recipe_file is not None:
            print(f"for moments: {many(settle, 'step')} on {many(args.num_ranks, 'rank')} ...", flush=True)
            source = settled(source, folder / "settled", settle, args.num_ranks, keys)
        # All of them are prepared and checked before any is started.
        runs = [
            prepared(
                source,
                one,
                folder / f"{number}-{_file_name(one.name)}",
                steps=args.steps,
                num_ranks=args.num_ranks,
                keys=keys,
                plugins=args.plugins,
            )
            for number, one in enumerate(candidates)
        ]
        try:
            for run in runs:
                print(f"{run.name}: {args.steps} steps on {many(args.num_ranks, 'rank')} ...", flush=True)
                outcomes.append(carried_out(source, run, args.num_ranks, keys))
        finally:
            if outcomes:
                lines = report(outcomes, args.steps, args.source)
                print("\n".join([*lines, *doubts(source, candidates, args.steps)]))
            shutil.rmtree(folder / "settled" / "checkpoint", ignore_errors=True)
        failed = any(one.failure for one in outcomes)
        if args.to is None and not failed:
            shutil.rmtree(folder)
        else:
            print(f"recipes, logs and metrics: {folder}")
    return int(failed)


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name).strip("_")[:60]
