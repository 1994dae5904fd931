"""Commands and recipes on the pages: every program, option, key and file exists; the cheap ones are run."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tomli
import tomli_w

from tests.unit.docs.pages import ROOT, Block, blocks, is_generated, name_of, pages
from titan_growth.__main__ import main
from titan_growth.config.fields import annotation_at, section_names
from titan_growth.config.loader import load_recipe
from titan_growth.config.schema.recipe import Recipe
from titan_growth.config.torchtitan_keys import NEUTRAL
from titan_growth.tools.errors import ConfigError

VARIABLES = set(re.findall(r"\b[A-Z][A-Z_]{3,}\b", (ROOT / "run_train.sh").read_text())) | {"PYTHONPATH"}
"""What the header of run_train.sh names."""
WORDS = [
    "train",
    "plan",
    "check",
    "grow",
    "average",
    "branch",
    "import",
    "export",
    "verify",
    "lineage",
    "probe",
    "plot",
    "launch",
]
WORDS += ["coordinate_check"]
DEFAULT = "train_configs/debug_model.toml"
OTHER_PROGRAMS = {"vllm", "lm_eval", "ruff", "mypy", "pytest", "pip"}
"""Not ours: their arguments are not checked."""
NOT_KEYS = ("metrics.jsonl", "model.safetensors", "optimizer.state")
"""File and tensor names that look like keys."""
JOB_SCRIPT = "#!/bin/bash"
"""A whole script: test_clusters_page.py runs it."""


@dataclass
class Command:
    """One line of a block, taken apart."""

    text: str
    program: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def recipe_words(self) -> list[str] | None:
        """The recipe keys of a command that takes a whole recipe, else None."""
        program = self.program
        if program[0] == "./run_train.sh" or program[:2] == ["./setup.sh", "train"]:
            words = program[1 if program[0] == "./run_train.sh" else 2 :]
        elif self.word in ("train", "plan", "check", "coordinate_check"):
            words = self.rest
        elif program[0] == "torchrun" and " -m titan_growth" in self.text:
            words = program[program.index("-m") + 2 :]
        else:
            return None
        words = words[: words.index("--help")] if "--help" in words else words
        if program[0] in ("./run_train.sh", "./setup.sh") and "--job.config_file" not in words:
            words = ["--job.config_file", self.environment.get("CONFIG_FILE", DEFAULT), *words]
        return words

    @property
    def word(self) -> str | None:
        """`plan` of `titan_growth plan`."""
        start = self._start_of_word
        return self.program[start] if start else None

    @property
    def rest(self) -> list[str]:
        """What follows the word."""
        return self.program[(self._start_of_word or 0) + 1 :]

    @property
    def _start_of_word(self) -> int | None:
        if self.program[0] == "titan_growth":
            return 1
        return 3 if self.program[:3] == ["python", "-m", "titan_growth"] else None


def commands_of(text: str) -> list[Command]:
    """The commands of a block, without comments, continued lines joined."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        environment = {}
        if words[:1] == ["export"]:
            words = words[1:]
        while words and re.match(r"[A-Z_]+=", words[0]):
            name, _, environment[name] = words.pop(0).partition("=")
        if words[:2] == ["./setup.sh", "in-env"]:
            words = words[2:]
        if words or environment:
            commands.append(Command(line.strip(), words or ["true"], environment))
    return commands


BLOCKS = [block for block in blocks("bash") if not block.text.startswith(JOB_SCRIPT)]
COMMANDS = [(block, command) for block in BLOCKS for command in commands_of(block.text)]
TABLES = blocks("toml")


def test_there_is_something_to_check() -> None:
    assert len(COMMANDS) > 40
    assert len(TABLES) > 5


@pytest.mark.parametrize(("block", "command"), COMMANDS, ids=[f"{block}: {c.text[:60]}" for block, c in COMMANDS])
def test_command(block: Block, command: Command) -> None:
    assert command.environment.keys() <= VARIABLES
    check_program(command)
    words = command.recipe_words
    if words is not None:
        check_recipe_words(without_plugins(own_options(command, words)))
    elif command.word:
        check_options(command.word, command.rest)


@pytest.mark.parametrize("block", TABLES, ids=str)
def test_recipe(block: Block, tmp_path: Path) -> None:
    """What a fragment leaves out is that of the default recipe."""
    table = tomli.loads(block.text)
    if "plugins" in table:
        assert f"`{table['plugins'][0]}.py`" in (ROOT / block.page).read_text()
        return  # the tests of both pages load their example and train with it
    recipe = tomli.loads((ROOT / DEFAULT).read_text())
    for name, section in table.items():
        recipe[name] = section if name in ("model", "growth", "lr_scheduler") else {**recipe.get(name, {}), **section}
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe))
    check_recipe_words(["--job.config_file", str(path)])


@pytest.mark.parametrize("page", [page for page in pages() if not is_generated(page)], ids=name_of)
def test_keys_named_in_the_text_exist(page: Path) -> None:
    tables = "|".join(section_names(Recipe))
    named = re.findall(rf"`(?:--)?((?:{tables})(?:\.\w+)+)\b", page.read_text())
    wrong = {key for key in named if annotation_at(Recipe, key.replace(".N.", ".0.").split(".")) is None}
    assert {key for key in wrong if not key.startswith(NOT_KEYS) and key not in NEUTRAL} == set()


def test_extras_named_on_the_pages_exist() -> None:
    extras = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        name
        for page in pages()
        for group in re.findall(r"(?:titan_growth|'\.)\[([\w,]+)\]", page.read_text())
        for name in group.split(",")
    }
    assert "all" in named
    assert named <= extras.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("titan_growth fly --to moon", "fly"),
        ("titan_growth verify --fast", "--fast"),
        ("./run_train.sh --training.stepz 3", "stepz"),
        ("./run_train.sh --training.steps many", "many"),
        ("CONFIG_FILE=train_configs/gone.toml ./run_train.sh", "gone.toml"),
        ("NGPUS=8 ./run_train.sh", "NGPUS"),
        ("python benchmarks/gone.py", "gone.py"),
        ("python benchmarks/saving.py --gone", "--gone"),
        ("titan_growth probe --from x --operator stack -- --parallelism.gone 2", "gone"),
        ("torchrun --nproc-per-node 2 -m titan_growth.trane", "trane"),
        ("sl -a", "sl"),
    ],
)
def test_a_wrong_command_is_found(text: str, message: str) -> None:
    (command,) = commands_of(text)
    with pytest.raises((AssertionError, ConfigError), match=re.escape(message)):
        test_command(Block("page", 1, "bash", text), command)


def check_program(command: Command) -> None:
    """Whether the program, script or module is there, with its options."""
    program = command.program
    if command.word:
        assert command.word in WORDS
    elif program[0] in ("./run_train.sh", "true", "export", *OTHER_PROGRAMS):
        return
    elif program[0] == "./setup.sh":
        assert program[1] in ("train", "test")
    elif command.recipe_words is not None:
        module = program[program.index("-m") + 1]
        assert importlib.util.find_spec(module), module
    elif program[0] in ("python", "torchrun"):
        check_script([word for word in program[1:] if word != "--nproc-per-node"])
    else:
        raise AssertionError(f"unknown program {program[0]}")


def check_script(words: list[str]) -> None:
    """A script of the checkout, by its path or as a module; its options are written in its source."""
    words = [word for word in words if not word.isdigit()]
    script = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
    if not (ROOT / script).is_file():
        script = script.removesuffix(".py") + "/__main__.py"
    assert (ROOT / script).is_file(), words
    source = (ROOT / script).read_text()
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        assert f'"{option}"' in source, option


def check_options(word: str, words: list[str]) -> None:
    """Options are those that --help lists; words after -- are recipe keys."""
    if "--" in words:
        check_recipe_words(words[words.index("--") + 1 :])
        words = words[: words.index("--")]
    known = help_of(word).replace("_", "-")
    for option in (given.split("=")[0] for given in words if given.startswith("--")):
        assert re.search(rf"{option.replace('_', '-')}\b", known), option


@functools.cache
def help_of(word: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        assert main([word, "--help"]) == 0
    return out.getvalue()


def own_options(command: Command, words: list[str]) -> list[str]:
    """The recipe's words: the command's own options (--world-size N), which have no dot, are looked up in its help."""
    kept, rest = [], iter(words)
    for word in rest:
        name = word.split("=")[0]
        if word.startswith("--") and "." not in name and name != "--plugins":
            check_options(command.word or "train", [name])
            if "=" not in word:
                next(rest)
        else:
            kept.append(word)
    return kept


def without_plugins(words: list[str]) -> list[str]:
    """Words without those of a plugin's table, which is not loaded here."""
    if "--plugins" not in words:
        return words
    at = words.index("--plugins")
    plugin, words = words[at + 1], words[:at] + words[at + 2 :]
    kept, rest = [], iter(words)
    for word in rest:
        if word.startswith(f"--{plugin}."):
            if not word.endswith(".enable"):
                next(rest)
        else:
            kept.append(word)
    return kept


def check_recipe_words(words: list[str]) -> None:
    """Raises ConfigError for an unknown key, a bad value, or a recipe that is not there."""
    if "recipe.toml" in words:  # the reader's own
        words = [DEFAULT if word == "recipe.toml" else word for word in words]
    try:
        load_recipe([str(ROOT / word) if word.startswith("train_configs/") else word for word in words])
    except ConfigError as error:
        if not all("needs a package that is missing" in problem.message for problem in error.problems):
            raise


# What is cheap enough is run as it stands, on a run of a few steps.

TINY = shlex.split(
    "--model.dim 32 --training.seq_len 32 --training.global_batch_size 8 --training.local_batch_size 4 "
    "--training.mixed_precision_param float32 --data.tokenizer bytes --validation.steps 1"
)
RUNNABLE = ("plan", "check", "grow", "import", "export", "verify", "lineage", "probe", "plot")
PRELUDE = (
    f'set -e\ntitan_growth() {{ "{sys.executable}" -m titan_growth "$@"; }}\npython() {{ "{sys.executable}" "$@"; }}\n'
)


def run(folder: Path, text: str) -> None:
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "VIRTUAL_ENV": sys.prefix,
        "TITAN_GROWTH_CACHE": str(folder / "cache"),
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-c", PRELUDE + text], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout with two finished runs in it, and an exported model under another name."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("run_train.sh", "train_configs"):
        (folder / name).symlink_to(ROOT / name)
    tiny = f"{shlex.join(TINY)} --training.steps 200"  # beyond the growth of the default recipe
    run(folder, f"./run_train.sh {tiny}")
    run(folder, f"./run_train.sh --growth.enable false --job.dump_folder outputs/scratch {tiny}")
    run(folder, "titan_growth export --from outputs/debug_model/checkpoint/step-160 --to Llama-3.2-1B")
    return folder


RUN = [
    (block, command) for block, command in COMMANDS if command.word in RUNNABLE and "recipe.toml" not in command.text
]
RUN = [(block, command) for block, command in RUN if "--plugins" not in command.program]
"""Those with a plugin are run by test_plugin_stage.py."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_cheap_commands_run(place: Path) -> None:
    """One after another, as a reader types them; a later one on the same page uses what an earlier one made."""
    for block in BLOCKS:
        for folder in ("exported", "outputs/grown", "imported", "grown"):
            run(place, f"rm -rf {folder}")
        for at, command in RUN:
            if at == block:
                run(place, command.text)


TRAININGS = [
    (block, command)
    for block, command in COMMANDS
    if command.program[0] == "./run_train.sh" and not {"--help", "--plugins"} & set(command.program)
    if "CONFIG_FILE" not in command.environment
]


MADE_BEFORE = {
    "averaged/step-5000": (
        f"./run_train.sh --job.dump_folder outputs/run --growth.enable false {shlex.join(TINY)} --training.steps 4"
        " --checkpoint.interval 2",
        "titan_growth average --from outputs/run --last 2 --to averaged/step-5000",
    )
}
"""What a training starts from -> the commands that make such a thing; the page makes it of a longer run."""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("block", "command"), TRAININGS, ids=[f"{b}: {c.text[:60]}" for b, c in TRAININGS])
def test_trainings_run(block: Block, command: Command, tmp_path: Path) -> None:
    """The same words on a model of a few thousand parameters for a few steps."""
    for name in ("run_train.sh", "train_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for commands in (made for path, made in MADE_BEFORE.items() if path in command.program):
        for made in commands:
            run(tmp_path, made)
    words = shlex.join([*TINY, "--training.steps", "4", "--growth.stages.0.at", "2 steps"])
    environment = " ".join(f"{name}={value}" for name, value in command.environment.items())
    run(tmp_path, f"{environment} {shlex.join(command.program)} {words}")
