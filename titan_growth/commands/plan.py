"""`python -m titan_growth plan`: the run plan, what a recipe resolves to on N ranks.

Nothing is started or written, and neither corpora nor devices are looked at, so a plan for 512 GPUs is made on a
laptop. A tokenizer that the recipe names is loaded if it is here, and refused as at a start. A run that is in the
recipe's folder already is planned from its newest checkpoint, as a start would do it; only the bytes of its shards are
not read.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from titan_growth.commands.args import CommandLine
from titan_growth.commands.check import report_problems
from titan_growth.commands.plan_report import report_lines
from titan_growth.config.loader import dry_run_of, inspect_recipe
from titan_growth.run.plan import plan_run
from titan_growth.tools.errors import ConfigError, TitanGrowthError
from titan_growth.tools.findings import Findings
from titan_growth.tools.logs import say, setup_logging
from titan_growth.tools.run_folder import RunFolder
from titan_growth.tools.text import many

if TYPE_CHECKING:
    from titan_growth.run.start import RunStart

DEVICES = ("cuda", "cpu")


def command_line() -> CommandLine:
    """The arguments of `plan`."""
    line = CommandLine(
        "plan",
        """Prints what the recipe resolves to on N ranks, or everything that is wrong with it. Starts nothing, and
        needs no GPU and no data. A tokenizer that the recipe names is loaded if it is on this machine.""",
        example="--world-size 512 --job.config_file train_configs/llama3_405b.toml",
        statuses="0 a plan, 2 problems",
        recipe=True,
    )
    ranks, key = "Ranks of the run; without it, $WORLD_SIZE counts.", "--world-size or WORLD_SIZE"
    device = f"{' or '.join(DEVICES)}: what the run will have; this machine need not have it."
    line.option("--world-size", "N", ranks, _num_ranks, default=os.environ.get("WORLD_SIZE", "1"), key=key)
    line.option("--device", "NAME", device, _device, default=DEVICES[0])
    return line


def main(argv: list[str]) -> int:
    """Prints the plan of a recipe; returns 0, or 2 when there is none."""
    line = command_line()
    if line.prints_help(argv):
        return 0
    setup_logging(0)
    try:
        report = _report(line, argv)
    except ConfigError as error:
        report_problems(error)
        return error.exit_status
    except TitanGrowthError as error:
        say(f"error: {error}")
        return ConfigError.exit_status
    with contextlib.suppress(BrokenPipeError):  # the reader had seen enough, as in `plan ... | head`
        print("\n".join(report), flush=True)
        return 0
    os._exit(0)


def _num_ranks(text: str) -> int:
    if not (text.isdecimal() and 0 < int(text) < 2**31):
        raise ValueError(f"expected a number of ranks, at least 1, got '{text}'")
    return int(text)


def _device(text: str) -> str:
    if text not in DEVICES:
        raise ValueError(f"must be one of {', '.join(DEVICES)}, got '{text}'")
    return text


def _report(line: CommandLine, argv: list[str]) -> list[str]:
    """The report of a recipe, and of the run that its folder holds; warnings are printed on the way.

    Raises:
        ConfigError: with all problems of the command line, the recipe, and the recipe on this number of ranks.
        CheckpointError: when the folder holds a run that cannot go on.
        DataError: when the tokenizer does not suit the recipe.
    """
    # Not at the top: --help and a typo in a recipe need not wait for torch.
    from titan_growth.run.start import Finished, Site, resolve

    args = line.read(argv)
    found = Findings([*line.problems])
    recipe = inspect_recipe(args.recipe, found)
    for warning in found.warnings:
        say(f"warning: {warning}")
    if recipe is None:
        raise ConfigError(found.problems)
    recipe = dry_run_of(recipe)
    if found.problems:
        # With defaults for wrong arguments, the plan's problems would be about the defaults.
        if not line.problems:
            plan_run(recipe, more := Findings(), num_ranks=args.world_size, device_type=args.device, elsewhere=True)
            found.add_problems_of_other_keys(more)
        raise ConfigError(found.problems)
    folder = RunFolder(recipe.job.dump_folder)
    folder.require_no_file()
    site = Site(folder, args.world_size, args.device, elsewhere=True)
    start = resolve(recipe, site, reads_shards=lambda checkpoint, now: False)
    if isinstance(start, Finished):
        return [f"{start.message} (a plan does not read its shards)"]
    for text in (*start.passed_over, *map(str, start.warnings)):
        say(f"warning: {text}")
    return report_lines(start.plan, args.device, start_lines(start))


def start_lines(start: RunStart) -> list[str]:
    """What the run would start from, what it has decided by itself, and its tokenizer.

    Raises:
        DataError: when the tokenizer does not suit the recipe.
    """
    from titan_growth.run.data import planned_tokenizer

    lines = []
    if start.checkpoint is not None:
        manifest = start.checkpoint.manifest
        step, steps = manifest.progress.step, start.plan.recipe.training.steps
        done = f"step {step:,} of {steps:,}, {many(manifest.num_layers, 'layer')}"
        lines = [f"goes on from {start.checkpoint.path.name}: {done}", *start.changes]
    lines += start.decided
    return [*lines, *planned_tokenizer(start.plan.recipe)]
