"""Running one case of bad input, in this process or through the real ./run_train.sh."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from tests.recipes.bad_inputs import Case, environment, scene, treasure, verdict

CHECKOUT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 180


def through_run_train(case: Case, folder: Path, template: Path, cache: Path) -> tuple[int, str, list[str]]:
    """(status, all output, what is not as it should be) of the real ./run_train.sh."""
    with scene(case, folder, template):
        before = treasure(folder)
        changes = environment(case, folder, cache)
        environ = {name: value for name, value in {**os.environ, **changes}.items() if value is not None}
        command = [str(CHECKOUT / "run_train.sh"), *case.argv]
        end = subprocess.run(
            command, cwd=folder, env=environ, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_SECONDS
        )
        output = (end.stdout + end.stderr).decode(errors="replace")
        return end.returncode, output, verdict(case, end.returncode, output, folder, before)


def shortened(output: str, folder: Path) -> str:
    """The output without paths of this machine and without the time of day."""
    text = output.replace(str(folder.resolve()), "...").replace(str(folder), "...").replace(str(CHECKOUT), "CHECKOUT")
    text = re.sub(r"^\[rank\d+\]:", "", text, flags=re.MULTILINE)
    return re.sub(r"process \d+ on [^\s.]+", "process N on HOST", text)
