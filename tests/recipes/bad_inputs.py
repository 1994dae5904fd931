"""Bad inputs as data: what a user gets wrong, the status it must end with, and a piece of what must be said.

A case is set up in an empty folder with a small good recipe, `recipe.toml`, and a corpus, `corpus.txt`; the run folder
is `run`. Then one thing is made wrong. `test_bad_inputs.py` and `tests/faults/bad_inputs.py` judge the outcome.
"""

from __future__ import annotations

import copy
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli
import tomli_w

from tests.runs import write_corpus

Setup = Callable[[Path, ExitStack], None]

TINY: dict[str, Any] = {
    "job": {"dump_folder": "run"},
    "model": {"flavor": "custom", "dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 258},
    "data": {"tokenizer": "bytes", "validation_fraction": 0.05},
    "training": {
        "dataset_path": "corpus.txt",
        "seq_len": 32,
        "global_batch_size": 8,
        "local_batch_size": 2,
        "steps": 6,
        "mixed_precision_param": "float32",
    },
    "optimizer": {"lr": 1e-2},
    "lr_scheduler": {"warmup_steps": 2},
    "metrics": {"log_freq": 1},
    "checkpoint": {"enable": True, "interval": 2},
    "debug": {"seed": 7},
}
"""A good recipe: a step takes milliseconds."""

STEPS_DONE = 4
"""Steps of the run that the cases with `resumes` go on from; it has step-2 and step-4."""


@dataclass(frozen=True)
class Case:
    """One bad input.

    message: a regular expression that must be found in what is printed.
    flags: words of the command line.
    toml: laid over the good recipe.
    raw: the whole recipe file instead.
    setup: changes the case's folder; what it enters in the stack is left afterwards.
    resumes: the run folder holds a run of `STEPS_DONE` steps.
    trains: the ranks find it, not the preflight.
    goes_on: before it fails the run may rightly add steps, so only what was there must stay.
    keeps: what must stay, by the beginning of its name in the run folder, where that is not everything.
    """

    name: str
    message: str
    flags: str = ""
    toml: str = ""
    raw: bytes | None = None
    environ: dict[str, str] = field(default_factory=dict)
    setup: Setup | None = None
    status: int = 2
    resumes: bool = False
    trains: bool = False
    goes_on: bool = False
    keeps: str = ""

    @property
    def argv(self) -> list[str]:
        return shlex.split(self.flags)

    def recipe(self) -> bytes:
        """The recipe file's content."""
        if self.raw is not None:
            return self.raw
        return tomli_w.dumps(_merged(TINY, tomli.loads(self.toml))).encode()

    @property
    def fragment(self) -> str:
        """What is wrong, in one line: variables, flags, recipe."""
        variables = " ".join(f"{name}={value}" for name, value in self.environ.items())
        recipe = self.toml if self.raw is None else self.raw.decode(errors="replace")
        parts = (variables, self.flags.encode(errors="replace").decode(), "; ".join(recipe.split("\n")).strip("; "))
        return " | ".join(part for part in parts if part) or "(files)"


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


class NotPossibleHereError(Exception):
    """A case cannot be set up on this machine (no right to mount)."""


@contextmanager
def scene(case: Case, folder: Path, template: Path) -> Iterator[Path]:
    """Sets a case up in a new folder. `template` holds corpus.txt and the run that is resumed, as `run`."""
    folder.mkdir(parents=True)
    shutil.copy2(template / "corpus.txt", folder / "corpus.txt")  # with its time, so that it is prepared only once
    (folder / "recipe.toml").write_bytes(case.recipe())
    if case.resumes:
        shutil.copytree(template / "run", folder / "run")
    with ExitStack() as stack:
        if case.setup is not None:
            case.setup(folder, stack)
        yield folder


def environment(case: Case, folder: Path, cache: Path) -> dict[str, str | None]:
    """Changes to the environment; None removes a variable."""
    clean = dict.fromkeys(("NGPU", "LOG_RANK", "COMM_MODE", "NNODES", "NODE_RANK", "MAX_RESTARTS", "TRAIN_FILE"))
    fixed = {"CONFIG_FILE": "recipe.toml", "TITAN_GROWTH_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return {**clean, **fixed, **case.environ}


def make_template(folder: Path) -> Path:
    """The folder that every case's files come from, without the run."""
    folder.mkdir(parents=True, exist_ok=True)
    write_corpus(folder / "corpus.txt", 4000)
    (folder / "recipe.toml").write_text(tomli_w.dumps(TINY))
    return folder


def treasure(folder: Path) -> dict[str, bytes]:
    """What must not be lost: checkpoints, metrics and recipe of the run folder, by name."""
    run = folder / "run"
    if not run.is_dir():
        return {}
    files = [*run.glob("checkpoint/**/*"), run / "metrics.jsonl", run / "recipe.toml"]
    return {str(path.relative_to(run)): path.read_bytes() for path in files if path.is_file()}


def losses(case: Case, before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    """Names of files that are not as they were. A run that goes on may add to its metrics and renew its recipe."""
    lost = []
    for name, content in before.items():
        if not name.startswith(case.keeps) or (case.goes_on and name == "recipe.toml"):
            continue
        same = after.get(name) == content
        if not (same or (case.goes_on and name == "metrics.jsonl" and after.get(name, b"").startswith(content))):
            lost.append(name)
    added = [name for name in after if name not in before and name.endswith("manifest.json")]
    return lost if case.goes_on else lost + added


TRACEBACK = re.compile(r"Traceback|^\s+File \".*\", line \d+|--- Logging error", re.MULTILINE)


def verdict(case: Case, status: int, output: str, folder: Path, before: dict[str, bytes]) -> list[str]:
    """Everything that is not as it should be after a case has been run; empty when all is well."""
    found = []
    if status != case.status:
        found.append(f"status {status} instead of {case.status}")
    if not re.search(case.message, output):
        found.append(f"nothing says {case.message!r}")
    if TRACEBACK.search(output):
        found.append("a traceback")
    if lost := losses(case, before, treasure(folder)):
        found.append(f"changed: {', '.join(lost)}")
    if (folder / "pwned").exists():
        found.append("code from a file was run")
    said = message_lines(output)
    if len(said) != len({line.removeprefix("error: ") for line in said}):
        found.append("a message is said twice")
    return found


def message_lines(output: str) -> list[str]:
    """The lines that report problems: not the log (it has the time in front), not the closing line."""
    lines = [re.sub(r"^\[rank\d+\]:", "", line) for line in output.splitlines()]
    closing = re.compile(r"\d+ problems?; nothing was started|Output of local rank")
    return [line for line in lines if line and not re.match(r"\d\d:\d\d:\d\d  ", line) and not closing.match(line)]


def all_cases() -> list[Case]:
    """Every case, by topic."""
    from tests.recipes import (
        bad_data,
        bad_folders,
        bad_growth,
        bad_machine,
        bad_models,
        bad_parallelism,
        bad_recipes,
        bad_resumes,
        bad_techniques,
    )

    models = (bad_models, bad_parallelism, bad_techniques)
    modules = (bad_recipes, bad_growth, *models, bad_data, bad_folders, bad_resumes, bad_machine)
    cases = [case for module in modules for case in module.CASES]
    names = [case.name for case in cases]
    assert len(names) == len(set(names)), "two cases have one name"
    return cases
