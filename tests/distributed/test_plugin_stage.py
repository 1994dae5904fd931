"""The example of docs/extending/adding_a_stage.md: taken from the page, loaded as a plugin, and trained.

The page promises that one file is enough for a table, flags, help, checks, a line in the plan and a place in the order,
and that the stage is there on every mesh, after a growth, and on a resume.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import harness
from tests.forked import ended
from tests.runs import (
    BASE,
    argv_of,
    assert_parity,
    make_recipe,
    read_metrics,
    train,
    trainer_of,
    without_timings,
    write_corpus,
)
from titan_growth.__main__ import main
from titan_growth.commands import plan as plan_report
from titan_growth.config import plugins
from titan_growth.config.loader import inspect_recipe
from titan_growth.config.plugins import load_plugins
from titan_growth.config.schema.recipe import Recipe
from titan_growth.run.plan import plan_run, stage_lines
from titan_growth.stages import order
from titan_growth.stages.order import registered_stages, resolve_order
from titan_growth.tools.errors import ConfigError
from titan_growth.tools.findings import Findings
from titan_growth.train import main as train_main

PAGE = Path(__file__).parents[2] / "docs" / "extending" / "adding_a_stage.md"

CAP = 0.1
LOWEST = math.log(1 + 257 * math.exp(-2 * CAP))
"""With logits between -CAP and CAP no model of 258 tokens has a loss below this."""

CAPPED = {"plugins": "logit_cap", "logit_cap__enable": True, "logit_cap__cap": CAP}
GROWING = {
    "training__steps": 8,
    "checkpoint__enable": True,
    "checkpoint__interval": 2,
    "growth__stages": '[{at = "4 steps", factor = 2}]',
}

Write = Callable[[str, str], str]

run_ranks = functools.partial(harness.run_ranks, timeout_seconds=250)


def blocks(language: str) -> list[str]:
    """The code blocks of the page."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [text for its, text in found if its == language]


@pytest.fixture(autouse=True)
def _registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Private registries with the built-in stages in them."""
    monkeypatch.setattr(order, "_REGISTRY", dict(registered_stages()))
    monkeypatch.setattr(plugins, "_TABLES", {})
    monkeypatch.setattr(plugins, "_extended", functools.cache(plugins._extended.__wrapped__))


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on Python's path, for this process and those it starts."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))
    monkeypatch.setenv("PYTHONPATH", path)
    return folder


@pytest.fixture
def write(modules: Path) -> Iterator[Write]:
    """Writes modules that are importable until the end of the test."""

    def written(name: str, text: str) -> str:
        (modules / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return name

    yield written
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(modules)):
            del sys.modules[name]


@pytest.fixture
def example(write: Write) -> str:
    """The page's example as a module."""
    (text,) = blocks("python")
    return write("logit_cap", text)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


# ---- table, flags, help ----------------------------------------------------------------------------------------------


def test_its_table_is_validated_like_any_other(example: str, tmp_path: Path) -> None:
    """Types, bounds and typos, with the line of the file or the flag."""
    path = tmp_path / "recipe.toml"
    path.write_text('plugins = ["logit_cap"]\n[logit_cap]\nenable = 1\ncapp = 3.0\n')
    inspect_recipe(["--job.config_file", str(path), "--logit_cap.cap", "high"], found := Findings())
    assert sorted(map(str, found.problems)) == [
        "logit_cap.cap: expected a number, got 'high' (--logit_cap.cap)",
        f"logit_cap.capp: unknown key in [logit_cap] ({path}:4). Did you mean 'cap'?",
        f"logit_cap.enable: expected true or false, got 1 ({path}:3)",
    ]
    inspect_recipe(["--plugins", "logit_cap", "--logit_cap.cap", "0"], found := Findings())
    (low,) = found.problems
    assert str(low) == "logit_cap.cap: must be greater than 0, got 0.0 (--logit_cap.cap)"


def test_the_recipe_on_the_page_is_one(example: str, tmp_path: Path) -> None:
    first, whole = blocks("toml")
    for text in (first, whole):
        path = tmp_path / "recipe.toml"
        path.write_text(text)
        recipe = inspect_recipe(["--job.config_file", str(path)], found := Findings())
        assert recipe is not None
        assert (recipe.plugins, found.problems, found.warnings) == (["logit_cap"], [], [])
    assert plugins.table_of(recipe, "logit_cap").cap == 20


def test_help_lists_it(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_main(["--plugins", "logit_cap", "--help", "logit_cap"]) == 0
    assert capsys.readouterr().out.strip().split("\n\n")[-1] == (
        "[logit_cap]  Logits that cannot grow without bound.\n"
        "  --logit_cap.enable  (true | false; default false)\n"
        "      Cap the logits.\n"
        "  --logit_cap.cap  (number; default 30.0)\n"
        "      No logit is farther from 0 than this."
    )


# ---- check, plan, order ----------------------------------------------------------------------------------------------


def planned(*words: str, num_ranks: int = 2) -> tuple[list[str], list[str], list[str]]:
    """(lines of the plan, problems, warnings), without devices."""
    recipe = inspect_recipe([*argv_of(BASE), "--plugins", "logit_cap", *words], found := Findings())
    assert recipe is not None
    assert not found.problems
    plan = plan_run(recipe, found := Findings(), num_ranks=num_ranks, device_type="cuda")
    return (stage_lines(plan.phase, "cuda") if plan else []), [*map(str, found.problems)], [*map(str, found.warnings)]


def test_check_and_warnings_are_reported(example: str) -> None:
    _, problems, warnings = planned("--logit_cap.enable", "--training.loss_chunk_tokens", "64")
    assert problems == [
        "logit_cap.enable: needs logits, and with training.loss_chunk_tokens there are none. "
        "Set training.loss_chunk_tokens = 0"
    ]
    assert warnings == []
    _, problems, warnings = planned("--logit_cap.enable", f"--logit_cap.cap={CAP}")
    assert problems == []
    assert warnings == [f"logit_cap.cap: 0.1 keeps the loss above {LOWEST:.2f}, whatever is learned"]
    assert planned("--training.loss_chunk_tokens", "64")[1:] == ([], []), "it is off, so nothing is in its way"


def test_the_plan_has_its_line_and_its_place(example: str) -> None:
    lines, _, _ = planned("--logit_cap.enable", "--logit_cap.cap=20", "--training.mixed_precision_param=bfloat16")
    text = next(block for block in blocks("") if block.startswith("stages:"))
    assert [line.replace("1 x 2 ranks", "1 x 8 ranks") for line in lines] == text.splitlines()
    assert planned()[0][0] == "stages: fsdp", "a plugin that is only loaded does nothing"
    assert planned("--logit_cap.enable", "--compile.enable", num_ranks=1)[0][0] == "stages: logit_cap -> compile"


def test_its_place_does_not_depend_on_what_is_imported_first(example: str, modules: Path) -> None:
    """In its own process the plugin is imported first; here the built-in stages were."""
    load_plugins(["logit_cap"])
    order = resolve_order(registered_stages())
    assert order[order.index("logit_cap") - 1] == "float8"
    code = "import logit_cap; from titan_growth.stages.order import *; print(*resolve_order(registered_stages()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == order, result.stderr
    named = re.search(r"The built-in order is (.*?) \(\[composition", PAGE.read_text(), re.DOTALL)
    assert named is not None
    assert re.findall(r"`(\w+)`", named[1]) == [name for name in order if name != "logit_cap"]


# ---- training --------------------------------------------------------------------------------------------------------


def test_it_holds_on_two_ranks_and_through_a_growth(example: str, tmp_path: Path) -> None:
    """Without it the loss falls below what capped logits allow, before and after the growth; with it, never."""
    run_ranks(train, 2, 2, make_recipe(tmp_path / "plain", **GROWING))
    run_ranks(train, 2, 2, make_recipe(tmp_path / "loaded", **GROWING, plugins="logit_cap"))
    run_ranks(train, 2, 2, make_recipe(tmp_path / "capped", **GROWING, **CAPPED))
    plain, capped = losses(tmp_path / "plain"), losses(tmp_path / "capped")
    assert without_timings(read_metrics(tmp_path / "loaded")) == without_timings(read_metrics(tmp_path / "plain"))
    assert plain[3] < LOWEST - 0.1
    assert plain[7] < LOWEST - 0.1
    assert min(capped) > LOWEST
    assert capped[-1] < capped[0] - 0.05, "it learns nothing"
    (growth,) = [line for line in read_metrics(tmp_path / "capped") if "event" in line]
    assert growth["to_layers"] == 4
    assert min(growth["loss_before"], growth["loss_after"]) > LOWEST, "it is not there in an evaluation"


MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp": (2, {}),
    "tp": (2, {"parallelism__tensor_parallel_degree": 2}),
    "pp": (2, {"parallelism__pipeline_parallel_degree": 2}),
    "cp": (2, {"parallelism__context_parallel_degree": 2}),
    "compile": (1, {"compile__enable": True, "compile__backend": "aot_eager", "activation_checkpoint__mode": "full"}),
}


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_computes_the_same(name: str, example: str, tmp_path: Path) -> None:
    """As the page asks of a stage: 1e-5 at the first step, 1e-4 over a few, float32."""
    same = {**CAPPED, "training__steps": 3}
    num_ranks, settings = MESHES[name]
    run_ranks(train, 1, 1, make_recipe(tmp_path / "one", **same))
    run_ranks(train, num_ranks, num_ranks, make_recipe(tmp_path / "other", **same, **settings))
    assert_parity(read_metrics(tmp_path / "other"), read_metrics(tmp_path / "one"))


@pytest.mark.slow
def test_a_resume_leaves_the_lines_of_an_unbroken_run(
    example: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Past a growth; a change of its table is logged and takes effect, and so does leaving it out."""
    run_ranks(train, 2, 2, make_recipe(tmp_path / "whole", **GROWING, **CAPPED))
    for steps in (6, 8):
        changed = {**GROWING, "training__steps": steps, "lr_scheduler__total_steps": 8}
        run_ranks(train, 2, 2, make_recipe(tmp_path / "run", **changed, **CAPPED))
    kept = [[line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line] for name in ("run", "whole")]
    assert kept[0] == kept[1]
    for more, expected in (
        ({**CAPPED, "logit_cap__cap": 0.2}, "changed since step-8: logit_cap.cap = 0.2 (was 0.1)"),
        ({}, 'changed since step-8: plugins = [] (was ["logit_cap"])'),
    ):
        recipe = make_recipe(tmp_path / "run", **{**GROWING, "training__steps": 9}, **more)
        assert expected in run_ranks(startup_log, 1, 1, recipe)[0]


def startup_log(rank: int, num_ranks: int, recipe: Recipe) -> list[str]:
    """What starting a trainer logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("titan_growth")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    with trainer_of(recipe, num_ranks):
        return lines


# ---- hooks -----------------------------------------------------------------------------------------------------------

PROBE = """
import contextlib
from tests.quiet_stage import QuietStage
from titan_growth.stages.order import register_stage

events = []

@register_stage
class Probe(QuietStage):
    name = "probe"

    def apply(self, parts, context):
        assert all(p.is_meta for part in parts for p in part.parameters())
        events.append(f"apply {len(parts)} {context.model_config.num_layers}")
        return parts

    def prepare_microbatch(self, microbatch, context):
        events.append(f"prepare {len(microbatch['input'])}")
        return microbatch

    @contextlib.contextmanager
    def train_context(self, context):
        events.append("enter")
        yield
        events.append("leave")

    def after_backward(self, parts, context):
        assert all(p.grad is not None for part in parts for p in part.parameters())
        events.append("after_backward")

    def after_optimizer_step(self, parts, context):
        assert all(p.grad is None for part in parts for p in part.parameters())
        events.append("after_optimizer_step")
"""


def events_of(rank: int, num_ranks: int, recipe: Recipe) -> list[str]:
    train(rank, num_ranks, recipe)
    return sys.modules["probe"].events


@pytest.mark.parametrize("settings", [{}, {"parallelism__pipeline_parallel_degree": 2}], ids=["plain", "pp"])
def test_hooks_are_called_when_the_page_says(settings: dict[str, Any], write: Write, tmp_path: Path) -> None:
    """Per microbatch, per step, per build; a stage without settings needs no table."""
    write("probe", PROBE)
    num_ranks = 2 if settings else 1
    options = {**GROWING, "training__steps": 2, "growth__stages": '[{at = "1 steps", factor = 2}]', **settings}
    options |= {"plugins": "probe", "training__local_batch_size": 4, "growth__watchdog__steps": 0}
    validation = {"validation__enable": True, "validation__freq": 2, "validation__local_batch_size": 2}
    validation |= {"validation__steps": 1}
    forward = ["prepare 4", "enter", "leave"]
    step = [*forward, *forward, "after_backward", "after_optimizer_step"]
    held_out = ["prepare 2", "enter", "leave"]
    for found in run_ranks(events_of, num_ranks, num_ranks, make_recipe(tmp_path / "run", **options, **validation)):
        assert found == ["apply 1 2", *step, *held_out, *held_out, "apply 1 4", *held_out, *step, *held_out]


# ---- the real entry --------------------------------------------------------------------------------------------------


def command_ended(*words: str) -> tuple[int, str]:
    """(status, output) of a command of the package, in a process that finds the plugin on Python's path."""
    status, output = ended(lambda: main([*words]), folder=Path.cwd(), environ=dict(os.environ))
    assert "Traceback" not in output, output
    return status, output


def test_check_and_train_find_it(example: str, tmp_path: Path) -> None:
    """Two steps, from a recipe in a file."""
    write_corpus(tmp_path / "corpus.txt")
    (tmp_path / "recipe.toml").write_text(f'plugins = ["logit_cap"]\n[logit_cap]\nenable = true\ncap = {CAP}\n')
    values = {**BASE, "training.steps": 2, "training.dataset_path": str(tmp_path / "corpus.txt")}
    words = ["--job.config_file", str(tmp_path / "recipe.toml"), *argv_of(values)]
    words += ["--job.dump_folder", str(tmp_path / "run")]
    status, output = command_ended("check", *words)
    assert status == 0, output
    assert f"logit_cap.cap: 0.1 keeps the loss above {LOWEST:.2f}" in output
    status, output = command_ended("train", *words)
    assert status == 0, output
    assert "stages: logit_cap\n" in output
    assert "logit_cap: logits between -0.1 and 0.1" in output
    assert len(losses(tmp_path / "run")) == 2
    assert min(losses(tmp_path / "run")) > LOWEST
    assert 'plugins = [\n    "logit_cap",\n]' in (tmp_path / "run" / "recipe.toml").read_text()


WRONG = [
    ('name: ClassVar[str] = "logit_cap"', 'name: ClassVar[str] = "fsdp"', "logit_cap cannot be used: "
     "logit_cap.LogitCap: 'fsdp' is the name of a stage of titan_growth itself. Give it another name"),
    ('"float8")', '"flaot8")', "the stage 'logit_cap' must come after 'flaot8', which is not a stage. "
     "Did you mean 'float8'?"),
    ('("pipeline", "float8")', '"float8"', "logit_cap cannot be used: logit_cap.LogitCap: `after` must be a tuple"),
    ('table: ClassVar[str] = "logit_cap"', 'table: ClassVar[str] = "model"', "logit_cap cannot be used: "
     "model: is a key of the recipe itself"),
    ("def describe", "def described", "logit_cap cannot be used: logit_cap.LogitCap: lacks describe"),
    ("from typing", "from typin", "importing logit_cap failed with ModuleNotFoundError: No module named 'typin'"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), WRONG, ids=["name", "after", "string", "table", "method", "import"])
def test_what_is_wrong_is_one_message(
    old: str, new: str, message: str, example: str, write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """From the launcher's preflight as from `plan`, with status 2 and before anything has started."""
    from titan_growth.commands.check import main as check

    (text,) = blocks("python")
    assert old in text
    write("logit_cap", text.replace(old, new, 1))
    words = [*argv_of(BASE), "--plugins", "logit_cap", "--job.dump_folder", str(tmp_path / "run")]
    for command in (check, plan_report.main):
        assert command(words) == 2
        output = "".join(capfd.readouterr())
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert errors[0].startswith(f"error: plugins: {message}")
    assert not (tmp_path / "run").exists()


def test_loading_twice_and_two_of_a_name(example: str, write: Write) -> None:
    """A second import replaces the stage; another module with the same stage is refused, naming both."""
    load_plugins(["logit_cap", "logit_cap"])
    del sys.modules["logit_cap"]
    load_plugins(["logit_cap"])
    assert list(registered_stages()).count("logit_cap") == 1
    write("another", blocks("python")[0])
    with pytest.raises(ConfigError) as caught:
        load_plugins(["another"])
    assert str(caught.value) == (
        "plugins: another cannot be used: another.LogitCap: logit_cap.LogitCap is called 'logit_cap' already. "
        "Give one of the two another name"
    )
