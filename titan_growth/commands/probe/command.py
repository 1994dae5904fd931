"""`python -m titan_growth probe`: which growth is best for this checkpoint? Try several for a few steps each.

    python -m titan_growth probe --from outputs/checkpoint/step-5000 --steps 100 --factor 2 \\
        --operator stack --operator interpose --operator zero_depth --lr-policy continue

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
from pathlib import Path
from typing import Any

from titan_growth.commands.args import open_source, parse_words
from titan_growth.commands.probe.candidates import SHARED, candidates_of, doubts, key_problems
from titan_growth.commands.probe.report import Outcome, report
from titan_growth.commands.probe.runs import carried_out, prepared, work_folder
from titan_growth.config.plugins import load_plugins
from titan_growth.tools.errors import ConfigError, Problem, TitanGrowthError, print_error

USAGE = """usage: python -m titan_growth probe --from STEP_FOLDER --operator NAME [--operator NAME ...] [-- RECIPE KEYS]

Grows a checkpoint by several operators or maps, trains each result for K steps from the same batch on, and ranks them
by the validation loss they come to (by the loss of the last batch, where the recipe validates nothing).

  --from FOLDER       a committed step folder with moments
  --steps K           steps after each growth; default 50
  --operator NAME     a candidate; give it several times
  --stage TOML        a candidate with settings of its own: --stage 'operator = "map", layer_map = [0, 0, 1, 2]'
  --factor N          and all other settings of [[growth.stages]] (--optimizer-state copy, --lr-policy continue,
                      --warmup-steps 10, --mask-steps 40, --noise 0.1, ...): of every candidate that does not set them
  --num-ranks N       ranks to run on, on this machine; default 1. The mesh is that of the checkpoint's recipe
  --to FOLDER         keep recipes, logs and metrics of the candidates there; must not exist, or be empty
  --plugins a,b       modules to load: those of the checkpoint's recipe, and others with operators of your own

What follows -- goes to every run; keys that change how it is computed, and not what:
  -- --parallelism.tensor_parallel_degree 2 --training.local_batch_size 4

Exit status: 0 all candidates ran, 1 one or more failed, 2 wrong arguments, 130 interrupted.
"""

_OWN = ("from", "steps", "stage", "num_ranks", "to", "plugins")


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    if not argv or argv[0] in ("--help", "-h"):
        print(USAGE, end="")
        return 0
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _probe(argv)
    except TitanGrowthError as error:
        return print_error(error)
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


def _probe(argv: list[str]) -> int:
    position = argv.index("--") if "--" in argv else len(argv)
    words, keys = argv[:position], argv[position + 1 :]
    given = parse_words(words, (*_OWN, *SHARED), command="probe")
    steps, num_ranks = (_count(given, name, default) for name, default in (("steps", 50), ("num_ranks", 1)))
    problems = list(key_problems(keys)) + ([] if "from" in given else [Problem("--from", "is missing")])
    if problems:
        raise ConfigError(problems)
    plugins = [name for name in given.get("plugins", [""])[-1].split(",") if name]
    load_plugins(plugins)
    source = open_source(Path(given["from"][-1]), plugins)
    candidates = candidates_of(given, source)
    wanted = given["to"][-1] if "to" in given else None
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
                plugins=plugins,
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


def _count(given: dict[str, list[str]], name: str, default: int) -> int:
    text = given.get(name, [str(default)])[-1]
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError([Problem(f"--{name.replace('_', '-')}", f"expected a positive whole number, got '{text}'")])
    return int(text)


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name).strip("_")[:60]
