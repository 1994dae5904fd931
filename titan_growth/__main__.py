"""`python -m titan_growth COMMAND`: the table of commands."""

from __future__ import annotations

import importlib
import sys

from titan_growth.tools.packages import require_core
from titan_growth.version import __version__

COMMANDS = {
    "train": "train in this process (one rank); run_train.sh starts many",
    "plan": "show what a recipe resolves to on --world-size N ranks, without data or devices",
    "check": "check a recipe and prepare its data without training; WORLD_SIZE is the number of ranks",
    "grow": "grow a checkpoint on disk, in one process and bounded memory",
    "average": "write the mean of the weights of a run's last checkpoints",
    "branch": "write the recipe of a cool-down from a checkpoint of a run's stable phase",
    "import": "make a step folder of a Hugging Face folder",
    "export": "make a Hugging Face folder of a step folder",
    "verify": "check that checkpoints are complete: every file, every tensor",
    "lineage": "show the history of a checkpoint: growths, sources, meshes, losses",
    "probe": "try several growths of a checkpoint for a few steps each, and rank them",
    "plot": "plot validation loss of runs against FLOPs, tokens and seconds; the speedup at equal loss",
    "coordinate_check": "how activations depend on width and depth in the first steps (muP, CompleteP)",
    "launch": "what run_train.sh calls: check, start the ranks, report how it ended",
}
"""Command -> its line in the help."""

_ELSEWHERE = {
    "train": "titan_growth.train",
    "import": "titan_growth.commands.import_",
    "launch": "titan_growth.launch.command",
    "probe": "titan_growth.commands.probe.command",
}
"""Modules of commands that are not `titan_growth.commands.<word>`."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    command, words = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(_help())
        return 0
    if command == "--version":
        print(__version__)
        return 0
    if command not in COMMANDS:
        return _unknown(command)
    require_core()
    module = importlib.import_module(_ELSEWHERE.get(command, f"titan_growth.commands.{command}"))
    status: int = module.main(words)
    return status


def _help() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: python -m titan_growth COMMAND [arguments]",
            "",
            "commands:",
            *(f"  {command:{width}}  {text}" for command, text in COMMANDS.items()),
            "",
            "python -m titan_growth COMMAND --help lists the arguments of a command; for train, every key of a recipe.",
        ]
    )


def _unknown(command: str) -> int:
    from titan_growth.config.fields import suggestion

    hint = suggestion(command, COMMANDS) or "python -m titan_growth --help lists the commands"
    print(f"error: unknown command {command!r}. {hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
