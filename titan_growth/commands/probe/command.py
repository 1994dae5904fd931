"""`python -m titan_growth probe`: which growth is best for this checkpoint? Try several for a few steps each.

Every candidate is a real run: the checkpoint is taken into a folder of its own (its shards as links), the candidate is
written into its recipe as the next growth, and the launcher starts it on as many ranks as asked for. So whatever a run
can do can be probed, on the mesh it will have: every operator and map, masks and learned growths, policies for moments
and learning rate. All candidates go on at the same batch and on the same learning rate schedule, which stays laid out
to the end of the run that the checkpoint is from, or to the end of the probe where that is later. The small model goes
on as well, for comparison.
"""

from __future__ import annotations

import shutil
import signal
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from titan_growth.commands.args import CommandLine, positive
from titan_growth.commands.growth_args import add_settings, settings_of
from titan_growth.commands.probe.candidates import SHARED, candidates_of, doubts, key_problems
from titan_growth.commands.probe.report import Outcome, report
from titan_growth.commands.probe.runs import carried_out, prepared, work_folder
from titan_growth.commands.source import open_source
from titan_growth.config.plugins import load_plugins
from titan_growth.tools.errors import ConfigError


def command_line() -> CommandLine:
    """The arguments of `probe`."""
    line = CommandLine(
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
    ranks = "Ranks to run on, on this machine. The mesh is that of the checkpoint's recipe."
    target = "Keep recipes, logs and metrics of the candidates there. Must not exist, or be empty."
    line.option("--from", "FOLDER", "A committed step folder with moments.", required=True, dest="source")
    line.option("--operator", "NAME", "A candidate. Give it several times.", repeated=True)
    line.option("--stage", "TOML", "A candidate with settings of its own. Give it several times.", repeated=True)
    line.option("--steps", "K", "Steps after each growth.", positive, default=50)
    line.option("--num-ranks", "N", ranks, positive, default=1)
    line.option("--to", "FOLDER", target)
    line.plugins()
    add_settings(line, SHARED)
    return line


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    end = argv.index("--") if "--" in argv else len(argv)
    words, keys = argv[:end] or ["--help"], argv[end + 1 :]
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return command_line().run(words, partial(_probe, keys=keys))
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}")
        return 1
    except KeyboardInterrupt:
        print("stopped")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _probe(args: Namespace, keys: list[str]) -> int:
    if problems := list(key_problems(keys)):
        raise ConfigError(problems)
    load_plugins(args.plugins)
    source = open_source(Path(args.source), args.plugins)
    candidates = candidates_of(args.operator, args.stage, settings_of(args, SHARED), source)
    steps, num_ranks, wanted = args.steps, args.num_ranks, args.to
    outcomes: list[Outcome] = []
    with work_folder(wanted, source) as folder:
        # All of them are prepared and checked before any is started.
        runs = [
            prepared(
                source,
                one,
                folder / f"{number}-{_file_name(one.name)}",
                steps=steps,
                num_ranks=num_ranks,
                keys=keys,
                plugins=args.plugins,
            )
            for number, one in enumerate(candidates)
        ]
        try:
            for run in runs:
                print(f"{run.name}: {steps} steps on {num_ranks} rank{'s' if num_ranks > 1 else ''} ...", flush=True)
                outcomes.append(carried_out(source, run, num_ranks, keys))
        finally:
            if outcomes:
                print("\n".join(report(outcomes, steps, str(source.folder.path))))
                for line in doubts(source, candidates, steps):
                    print(line)
        failed = any(outcome.failure for outcome in outcomes)
        if wanted is None and not failed:
            shutil.rmtree(folder)
        else:
            print(f"recipes, logs and metrics: {folder}")
    return int(failed)


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name).strip("_")[:60]
