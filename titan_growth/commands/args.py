"""The command line of a command: argparse, with one look of `--help`, and a line for every problem at once."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from titan_growth.config.fields import suggestion
from titan_growth.tools.errors import ConfigError, Problem, TitanGrowthError, print_error
from titan_growth.tools.location import is_remote

_WIDTH = 100
_RECIPE_HELP = """\
--job.config_file FILE    The recipe, a TOML file. (default: every key has its default)
--section.key VALUE       Any key of the recipe, laid over the file.
python -m titan_growth train --help lists every key with its text and default."""


def given(text: str) -> str:
    """Any non-empty text."""
    if not text:
        raise ValueError("needs a value")
    return text


def local(text: str) -> str:
    """A path: a URL would become a folder of that name."""
    if is_remote(given(text)):
        raise ValueError(f"must be a path on this machine, got '{text}'")
    return text


def positive(text: str) -> int:
    """A positive whole number."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"expected a positive whole number, got '{text}'")
    return int(text)


def names(text: str) -> list[str]:
    """Names separated by commas."""
    return [name for name in given(text).split(",") if name]


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        """No brackets around values: with `nargs="?"`, a missing value is reported along with all other problems."""
        return str(action.metavar or default_metavar)


class CommandLine:
    """The arguments of one command."""

    def __init__(self, command: str, about: str, *, example: str, statuses: str, recipe: bool = False) -> None:
        """A command line without arguments.

        Args:
            example: what may follow the command.
            statuses: what its exit statuses mean.
            recipe: leave unknown words in `Namespace.recipe`; they set keys of a recipe.
        """
        self.prog, self.recipe = f"python -m titan_growth {command}", recipe
        self.problems: list[Problem] = []
        self._parser = argparse.ArgumentParser(
            prog=self.prog,
            description=textwrap.fill(" ".join(about.split()), _WIDTH),
            epilog=f"example:\n  {self.prog} {example}\n\nexit status: {statuses}",
            formatter_class=partial(_Formatter, max_help_position=28, width=_WIDTH),
            allow_abbrev=False,
            add_help=False,
        )
        self._group = self._parser.add_argument_group("arguments")
        if recipe:
            self._parser.add_argument_group("recipe", _RECIPE_HELP)
        self._flags: list[str] = []
        self._words: list[str] = []
        self._required: dict[str, Problem] = {}
        self._usage: list[str] = []

    def option(
        self,
        flag: str,
        metavar: str,
        text: str,
        convert: Callable[[str], Any] = given,
        *,
        default: Any = None,
        required: bool = False,
        repeated: bool = False,
        dest: str = "",
        key: str = "",
    ) -> None:
        """Adds `--flag VALUE`.

        Args:
            convert: text to value; raises ValueError with a message. A missing value is the empty text.
            repeated: keep every value, not only the last.
            dest: attribute of the namespace (default: the flag).
            key: name in messages (default: the flag).
        """
        dest = dest or flag.removeprefix("--").replace("-", "_")
        if required:
            self._required[dest] = Problem(flag, "is missing")
            self._usage.append(f"{flag} {metavar}")
        if default not in (None, []):
            text += f" (default: {default})"
        self._flags.append(flag)
        self._group.add_argument(
            flag,
            metavar=metavar,
            dest=dest,
            help=text.replace("%", "%%"),
            nargs="?",
            const="",
            type=partial(self._converted, key or flag, convert),
            default=[] if repeated else default,
            action="append" if repeated else "store",
        )

    def switch(self, flag: str, text: str) -> None:
        """Adds `--flag`, which takes no value."""
        self._flags.append(flag)
        self._group.add_argument(flag, help=text, action="store_true")

    def words(self, metavar: str, text: str, *, dest: str, many: bool, missing: Problem | None = None) -> None:
        """Adds positional words: exactly one, or at least one."""
        self._words.append(dest)
        self._required[dest] = missing or Problem(metavar, "is missing")
        self._usage.append(f"{metavar} [{metavar} ...]" if many else metavar)
        self._group.add_argument(dest, metavar=metavar, help=text, nargs="*" if many else "?")

    def source_and_target(self, source: str, target: str) -> None:
        """Adds `--from` and `--to`, both required."""
        self.option("--from", "FOLDER", source, required=True, dest="source")
        self.option("--to", "FOLDER", f"{target} Must not exist, or be empty.", local, required=True, dest="target")

    def plugins(self) -> None:
        """Adds `--plugins`."""
        text = "Modules to load: those of the checkpoint's recipe, and others with operators."
        self.option("--plugins", "a,b", text, names, default=[])

    def recipe_of_another(self) -> None:
        """Adds `--recipe`, for a folder of another program."""
        text = "For a step folder of torchtitan, which has none: a recipe file with its model in [model]."
        self.option("--recipe", "FILE", text, dest="recipe_file")

    def prints_help(self, argv: Sequence[str]) -> bool:
        """Prints the help if the words ask for it, and says whether they do."""
        if "--help" not in argv and "-h" not in argv:
            return False
        some_optional = len(self._flags) + len(self._words) > len(self._required)
        recipe = ["[--job.config_file FILE] [--section.key VALUE ...]"] if self.recipe else []
        self._parser.usage = " ".join([self.prog, *self._usage, *(["[options]"] if some_optional else []), *recipe])
        print(self._parser.format_help(), end="")
        return True

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The values of the words. Those that are wrong are None, and named in `problems`."""
        self.problems.clear()
        parse = self._parser.parse_known_intermixed_args if self._words else self._parser.parse_known_args
        args, rest = parse([self._with_dashes(word) for word in argv])
        if self.recipe:
            args.recipe = rest
        elif unknown := list(self._unknown(rest)):
            self.problems[:] = unknown
            return args
        wrong = {problem.key for problem in self.problems}
        missing = [problem for dest, problem in self._required.items() if not getattr(args, dest)]
        self.problems[:0] = [problem for problem in missing if problem.key not in wrong]
        return args

    def run(self, argv: Sequence[str], body: Callable[[argparse.Namespace], int]) -> int:
        """Prints the help, or calls `body`; turns errors into lines and an exit status."""
        if not argv and self._flags:
            argv = ["--help"]
        if self.prints_help(argv):
            return 0
        try:
            args = self.read(argv)
            if self.problems:
                raise ConfigError(self.problems)
            return body(args)
        except TitanGrowthError as error:
            return print_error(error)

    def command(self, body: Callable[[argparse.Namespace], int]) -> Callable[[list[str]], int]:
        """Decorates the body of a command: makes it the `main(argv)` that `run` is."""
        return lambda argv: self.run(argv, body)

    def _with_dashes(self, word: str) -> str:
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        return f"{flag}{equals}{value}" if flag in self._flags else word

    def _converted(self, key: str, convert: Callable[[str], Any], text: str) -> Any:
        try:
            return convert(text)
        except ValueError as error:
            self.problems.append(Problem(key, str(error)))
            return None

    def _unknown(self, words: Sequence[str]) -> Iterator[Problem]:
        """A problem for each unknown word, except values of unknown options."""
        known = [flag.removeprefix("--") for flag in self._flags]
        for before, word in zip(["", *words], words, strict=False):
            if before.startswith("--") and "=" not in before and not word.startswith("-"):
                continue
            near = suggestion(word.removeprefix("--").partition("=")[0].replace("_", "-"), known)
            yield Problem(word, "is no argument of this command", near or f"{self.prog} --help lists the arguments")
