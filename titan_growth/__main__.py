"""`python -m titan_growth COMMAND`: dispatch, and nothing else."""

from __future__ import annotations

import sys

from titan_growth.tools.packages import require_core
from titan_growth.version import __version__

USAGE = """usage: python -m titan_growth COMMAND [--job.config_file FILE] [--section.key value ...]

commands:
  train   train in this process (one rank); run_train.sh starts many
  plan    what a recipe comes to on --world-size N ranks, without data or devices
  check   check a recipe and prepare its data without training; WORLD_SIZE is the number of ranks
  grow    grow a checkpoint on disk, in one process and bounded memory
  import  make a step folder of a Hugging Face folder
  export  make a Hugging Face folder of a step folder
  verify  whether checkpoints are whole: every file, every tensor
  lineage what a checkpoint has come from: growths, sources, meshes, losses
  probe   try several growths of a checkpoint for a few steps each, and rank them
  plot    validation loss of runs against FLOPs, tokens and seconds, and the speedup at equal loss
  launch  what run_train.sh calls: check, start the ranks, report how it ended

python -m titan_growth train --help lists every key of a recipe.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if command == "--version":
        print(__version__)
        return 0
    require_core()
    if command == "train":
        from titan_growth.train import main as train

        return train(rest)
    if command == "plan":
        from titan_growth.commands.plan import main as plan

        return plan(rest)
    if command == "check":
        from titan_growth.commands.check import main as check

        return check(rest)
    if command == "grow":
        from titan_growth.commands.grow import main as grow

        return grow(rest)
    if command == "import":
        from titan_growth.commands.import_ import main as import_

        return import_(rest)
    if command == "export":
        from titan_growth.commands.export import main as export

        return export(rest)
    if command == "verify":
        from titan_growth.commands.verify import main as verify

        return verify(rest)
    if command == "lineage":
        from titan_growth.commands.lineage import main as lineage

        return lineage(rest)
    if command == "probe":
        from titan_growth.commands.probe.command import main as probe

        return probe(rest)
    if command == "plot":
        from titan_growth.commands.plot import main as plot

        return plot(rest)
    if command == "launch":
        from titan_growth.launch.launcher import main as launch

        return launch(rest)
    print(f"error: unknown command {command!r}\n\n{USAGE}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
