"""`python -m titan_growth launch`: the launcher under its own help; that of `run_train.sh` is the recipe's."""

from __future__ import annotations

from titan_growth.launch.launcher import main as launch

_HELP = """usage: python -m titan_growth launch [--job.config_file FILE] [--section.key VALUE ...]

Checks a recipe, prepares its data, starts the ranks with torchrun and waits for them: what run_train.sh calls.

environment:
  NGPU          ranks of this machine (default: the GPUs present, or 1)
  MAX_RESTARTS  how often a failed rank is restarted (default: 0)
  LOG_RANK      ranks whose output is shown (default: 0)
  COMM_MODE     fake_backend or local_tensor: a dry run
  NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
                for several machines, as in torchrun

exit status: 0 done, 1 failed, 2 bad recipe, 75 saved, run again, 76 saved, wants another number of ranks

python -m titan_growth train --help lists every key with its text and default."""


def main(argv: list[str]) -> int:
    """Prints the help, or launches a run; returns the exit status."""
    if argv in (["--help"], ["-h"]):
        print(_HELP)
        return 0
    return launch(argv)
