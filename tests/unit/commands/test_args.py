"""The command lines of all commands: one look of the help, one way to refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from titan_growth.__main__ import COMMANDS, main
from titan_growth.commands.args import CommandLine, positive

OWN = {
    "grow": "--from --to --operator --factor --layer-map --n-layers --dim --n-heads --n-kv-heads --hidden-dim --noise "
    "--rescale-to-depth --optimizer-state --optimizer-step --rope-theta --options --seed --recipe --plugins",
    "branch": "--from --steps --to --plugins",
    "import": "--from --to",
    "export": "--from --to --dtype --weights --recipe --plugins",
    "average": "--from --last --to --plugins",
    "verify": "--recipe --plugins FOLDER",
    "lineage": "STEP_FOLDER",
    "probe": "--from --recipe --settle --operator --stage --steps --num-ranks --to --plugins --factor --layer-map "
    "--n-layers --dim --n-heads --n-kv-heads --hidden-dim --noise --rescale-to-depth --optimizer-state "
    "--optimizer-step --rope-theta --options --mask-steps --lr-policy --lr --warmup-steps --warmup "
    "--global-batch-size --local-batch-size --seq-len",
    "plot": "NAME=RUN --to --frontier --layers --title",
    "coordinate_check": "--widths --depths --steps --batch-size --seq-len --to --json --job.config_file --section.key",
    "plan": "--world-size --device --job.config_file --section.key",
    "check": "--rehash --job.config_file --section.key",
}
"""Command -> all its arguments."""


def test_every_command_is_covered() -> None:
    assert set(OWN) == COMMANDS.keys() - {"train", "launch"}, "train and launch print the keys of a recipe"


@pytest.mark.parametrize("command", OWN)
def test_help_names_every_argument(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["-h"], ["--bogus", "--help"]):
        assert main([command, *words]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: python -m titan_growth {command} ")
        named = [line.split()[0] for line in text.splitlines() if line.startswith("  ") and line.split()]
        assert [name for name in OWN[command].split() if name not in named] == []
        assert f"\nexample:\n  python -m titan_growth {command} " in text
        assert "\nexit status: 0 " in text


@pytest.mark.parametrize("command", OWN)
def test_help_describes_no_other_arguments(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    named = {line.split()[0] for line in lines if line.startswith("  --")}
    assert named == {name for name in OWN[command].split() if name.startswith("--")}


@pytest.mark.parametrize("command", OWN)
@pytest.mark.parametrize("words", [["--bogus_word"], ["--bogus_word=3"], ["--bogus_word", "3"]])
def test_an_unknown_option_is_refused(
    command: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command, *words]) == 2
    printed = capfd.readouterr()
    errors = [line for line in (printed.out + printed.err).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "bogus_word" in errors[0]
    assert "usage:" not in printed.out + printed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("one --num-ranks 3 two", {"num_ranks": 3, "words": ["one", "two"]}),
        ("--num_ranks=3 one", {"num_ranks": 3, "words": ["one"]}),
        ("--num_ranks 3 --num-ranks=4 one", {"num_ranks": 4}),
        ("one --name a --name=b-_c", {"names": ["a", "b-_c"], "num_ranks": 1}),
        ("one --name -1", {"names": ["-1"]}),
        ("--num-ran 3 one", "--num-ran: is no argument of this command. Did you mean 'num-ranks'?"),
        ("one --zzz 3", "--zzz: is no argument of this command. python -m titan_growth some --help lists"),
        ("one --zzz 3 -y", "-y: is no argument of this command"),
        ("one --num-ranks", "--num-ranks: expected a positive whole number, got ''"),
        ("one --name --num-ranks x", "--name: needs a value\nerror: --num-ranks: expected a positive whole number"),
        ("--num_ranks 0", "WORDS: is missing\nerror: --num-ranks: expected a positive whole number, got '0'"),
    ],
)
def test_words_are_read(words: str, expected: Any, capsys: pytest.CaptureFixture[str]) -> None:
    line = CommandLine("some", "", example="", statuses="")
    line.words("WORDS", "", dest="words", many=True)
    line.option("--num-ranks", "N", "", positive, default=1)
    line.option("--name", "NAME", "", repeated=True, dest="names")
    found: dict[str, Any] = {}
    status = line.run(words.split(), lambda args: found.update(vars(args)) or 0)
    if isinstance(expected, str):
        assert status == 2
        assert f"error: {expected}" in capsys.readouterr().out
    else:
        assert status == 0
        assert {name: found[name] for name in expected} == expected


def test_the_words_of_a_recipe_are_left_to_it() -> None:
    line = CommandLine("some", "", example="", statuses="", recipe=True)
    line.option("--world-size", "N", "", positive)
    words = "--training.steps -5 --world_size=2 --compile.enable --a_b.c=d --job.description"
    args = line.read([*words.split(), "--x y"])
    assert line.problems == []
    assert args.world_size == 2
    assert args.recipe == [*words.replace("--world_size=2 ", "").split(), "--x y"]


def test_a_plan_asks_the_environment_for_ranks(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert main(["plan"]) == 2
    assert (
        "error: --world-size or WORLD_SIZE: expected a number of ranks, at least 1, got 'many'"
        in capsys.readouterr().err
    )
    assert main(["plan", "--world-size", "2"]) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["plan"]) == 0
    assert capsys.readouterr().out.count("= 2 ranks") == 2


def test_commands_are_looked_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grwo"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'grwo'. Did you mean 'grow'?\n"
    assert main(["zzz"]) == 2
    assert "python -m titan_growth --help lists the commands" in capsys.readouterr().err
    for words in ([], ["--help"], ["help"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        assert all(f"\n  {command} " in text and line in text for command, line in COMMANDS.items())


def test_the_list_of_commands_needs_no_library() -> None:
    code = "import sys; from titan_growth.__main__ import main; main([]); print({'torch', 'pydantic'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.endswith("set()\n")
