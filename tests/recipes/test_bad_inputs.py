"""Every bad input ends with one message that says what to do, the right status, no traceback, and nothing lost.

By default the cases are judged in this process, through the launcher with the real preflight, and two through the real
./run_train.sh; those that only the ranks can find train in a forked process. `tests/faults/test_bad_inputs.py` runs all
through ./run_train.sh.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.recipes import bad_inputs, judge
from tests.recipes.bad_inputs import Case, NotPossibleHereError, environment, scene, treasure, verdict
from titan_growth.commands import check as preflight
from titan_growth.launch import launcher as launch

CASES = bad_inputs.all_cases()
REAL = ("unknown key", "corpus missing")
"""Judged by default through ./run_train.sh too: one by the recipe, one by the data."""


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad-inputs-cache")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The files that every case starts from; its run is made by a forked process."""
    folder = bad_inputs.make_template(tmp_path_factory.mktemp("bad-inputs") / "template")
    run = Case("the run to resume", "saved", flags=f"--training.steps {bad_inputs.STEPS_DONE}", status=0)
    status, output = in_fork(run, folder, cache)
    assert status == 0, output
    assert (folder / f"run/checkpoint/step-{bad_inputs.STEPS_DONE}/manifest.json").is_file()
    return folder


def in_process(case: Case, folder: Path, cache: Path, trained: Callable[[list[str]], int] | None = None) -> int:
    """The status of the launcher, whose ranks are replaced by `trained` (or not to be reached at all)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in environment(case, folder, cache).items():
            if value is None:
                patch.delenv(name, raising=False)
            else:
                patch.setenv(name, value)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", launch.DUMP_FOLDER_VARIABLE):
            patch.delenv(name, raising=False)

        def checked(argv: list[str]) -> int:
            status = preflight.main(argv)
            if status != launch.DONE:
                return status
            assert trained is not None, "the preflight found nothing"
            os.environ.pop("WORLD_SIZE")
            os._exit(trained(argv))

        return launch.main(case.argv, checked)


def in_fork(case: Case, folder: Path, cache: Path) -> tuple[int, str]:
    """(status, output) of launcher, preflight and one rank in a forked process."""
    log = folder.parent / f"{folder.name}.log"
    child = os.fork()
    if child == 0:
        status = 99
        try:
            with open(log, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                status = in_process_unbuffered(case, folder, cache)
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, log.read_text(errors="replace")


def in_process_unbuffered(case: Case, folder: Path, cache: Path) -> int:
    """In the forked process: pytest's capture is left behind, and the rank's own entry is called."""
    import sys

    from titan_growth import train

    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    return in_process(case, folder, cache, train.main)


@pytest.mark.parametrize("case", [case for case in CASES if not case.trains], ids=lambda case: case.name)
def test_preflight(case: Case, tmp_path: Path, template: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        with scene(case, tmp_path / "case", template) as folder:
            before = treasure(folder)
            capfd.readouterr()
            status = in_process(case, folder, cache)
            output = "".join(capfd.readouterr())
            assert not verdict(case, status, output, folder, before), output
    except NotPossibleHereError as reason:
        pytest.skip(str(reason))


IN_FORK = [case for case in CASES if case.trains and "NGPU" not in case.environ and "disk full for" not in case.name]


@pytest.mark.parametrize("case", IN_FORK, ids=lambda case: case.name)
def test_rank(case: Case, tmp_path: Path, template: Path, cache: Path) -> None:
    try:
        with scene(case, tmp_path / "case", template) as folder:
            before = treasure(folder)
            status, output = in_fork(case, folder, cache)
            assert not verdict(case, status, output, folder, before), output
    except NotPossibleHereError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("case", [case for case in CASES if case.name in REAL], ids=lambda case: case.name)
def test_run_train(case: Case, tmp_path: Path, template: Path, cache: Path) -> None:
    _, output, found = judge.through_run_train(case, tmp_path / "case", template, cache)
    assert not found, output


def test_the_recipe_that_the_cases_spoil_is_good(tmp_path: Path, template: Path, cache: Path) -> None:
    """Otherwise a case could fail for another reason than its own."""
    case = Case("good", "saved .*step-6", status=0, trains=True)
    with scene(case, tmp_path / "case", template) as folder:
        status, output = in_fork(case, folder, cache)
        assert not [found for found in verdict(case, status, output, folder, {}) if "manifest" not in found], output


def test_the_judge_sees_what_is_wrong(tmp_path: Path) -> None:
    """The checks above would be worth nothing if `verdict` let a defect pass."""
    case = Case("example", r"steps: must be at least 1", status=2)
    run = tmp_path / "run" / "checkpoint" / "step-2"
    run.mkdir(parents=True)
    (run / "manifest.json").write_text("{}")
    before = treasure(tmp_path)
    good = "12:00:00  preparing\nerror: steps: must be at least 1, got 0\n1 problem; nothing was started."
    assert verdict(case, 2, good, tmp_path, before) == []
    assert verdict(case, 1, good, tmp_path, before) == ["status 1 instead of 2"]
    assert verdict(case, 2, "error: steps: is wrong", tmp_path, before) == ["nothing says 'steps: must be at least 1'"]
    assert verdict(case, 2, f"{good}\nTraceback (most recent call last):", tmp_path, before) == ["a traceback"]
    assert verdict(
        case, 2, good.replace("1 problem", "error: steps: must be at least 1, got 0\n1 problem"), tmp_path, before
    ) == ["a message is said twice"]
    (tmp_path / "pwned").touch()
    assert verdict(case, 2, good, tmp_path, before) == ["code from a file was run"]
    (tmp_path / "pwned").unlink()
    (run / "manifest.json").write_text("{ }")
    assert verdict(case, 2, good, tmp_path, before) == ["changed: checkpoint/step-2/manifest.json"]


def test_there_are_many_and_their_messages_are_specific() -> None:
    assert len(CASES) >= 60
    assert not [case.name for case in CASES if re.search(case.message, "error: something is wrong with key or file")]


def test_mount_leaves_nothing_behind() -> None:
    mounts = subprocess.run(["mount"], capture_output=True, text=True).stdout
    assert "bad-inputs" not in mounts
