"""A recipe's values from a TOML file and the command line, merged into one table, with the origin of each key.

Plugins are imported before any other key is looked up, since they add tables. argparse is not used: it must know every
flag beforehand, while plugins, growths by number and misspelt keys come with the words, and it takes no value that
begins with `-`, as `--optimizer.lr -1e-3` does, to be refused like the same value in a file.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_origin

import tomli
from pydantic import BaseModel

from titan_growth.config.fields import annotation_at, parse_text, without_none
from titan_growth.config.plugins import PLUGINS_KEY, import_plugins, recipe_class
from titan_growth.config.schema.recipe import Recipe
from titan_growth.tools.errors import ConfigError, Problem
from titan_growth.tools.findings import Findings
from titan_growth.tools.location import local_path

CONFIG_FILE_KEY = "job.config_file"

_FLAG = re.compile(r"--([^=.]+(?:\.[^=.]+)*)(?:=(.*))?", re.DOTALL)


class _Flag(NamedTuple):
    key: str
    text: str | None
    """None for a bare flag."""


@dataclass
class Sources:
    """The merged values, and the origins of dotted keys as far as they are known."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    found: Findings = field(default_factory=Findings)
    plugins_missing: bool = False
    """Some plugins could not be loaded; an unknown table may be theirs."""

    def origin(self, key: str) -> str:
        """The origin of a key, of the nearest table around it, or of a key in it; empty for a default."""
        around = key
        while around:
            if around in self.origins:
                return self.origins[around]
            around = around.rpartition(".")[0]
        return next((origin for inner, origin in self.origins.items() if inner.startswith(key + ".")), "")

    def _located(self, problem: Problem) -> Problem:
        """The problem with the origin of its key."""
        origin = self.origin(problem.key)
        return Problem(problem.key, f"{problem.message} ({origin})", problem.hint) if origin else problem

    def take(self, found: Findings) -> None:
        """Adds findings, each with the origin of its key."""
        self.found.problems += map(self._located, found.problems)
        self.found.warnings += map(self._located, found.warnings)


def read_sources(argv: list[str]) -> Sources:
    """Reads `--job.config_file`, imports the plugins, and lays every other flag over the file.

    Raises:
        ConfigError: when the file cannot be read or is not TOML; nothing else is reported then.
    """
    sources = Sources()
    flags = _read_flags(argv, sources.found)
    _read_file_and_plugins(flags, sources)
    root = recipe_class()
    for key, text in flags:
        annotation = str if key == CONFIG_FILE_KEY else annotation_at(root, key.split("."))
        if text is None and annotation is not None and without_none(annotation) is not bool:
            sources.found.problem(key, "the flag needs a value", f"Write --{key} VALUE")
        elif key not in (CONFIG_FILE_KEY, PLUGINS_KEY):
            # A bare flag is true; the validator reports unknown keys.
            _set(sources, root, key, parse_text("true" if text is None else text, annotation))
    return sources


def load_named_plugins(argv: list[str]) -> None:
    """Imports the plugins of a command line and its file, and ignores everything else (for `--help`).

    Raises:
        ConfigError: when the file cannot be read or a plugin cannot be imported.
    """
    sources = Sources()
    _read_file_and_plugins(_read_flags(argv, sources.found), sources)
    if problems := [problem for problem in sources.found.problems if problem.key == PLUGINS_KEY]:
        raise ConfigError(problems)


def _read_file_and_plugins(flags: list[_Flag], sources: Sources) -> None:
    given = {key: text for key, text in flags if text is not None}
    if CONFIG_FILE_KEY in given:
        _read_file(local_path(given[CONFIG_FILE_KEY]), sources)
    if PLUGINS_KEY in given:
        _set(sources, Recipe, PLUGINS_KEY, parse_text(given[PLUGINS_KEY], list[str]))
    names = sources.values.get(PLUGINS_KEY, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        sources.plugins_missing = True  # the validator reports the list
        return
    found = Findings()
    import_plugins(names, found)
    sources.take(found)
    sources.plugins_missing = bool(found.problems)


def _read_flags(argv: list[str], found: Findings) -> list[_Flag]:
    flags = []
    words = deque(argv)
    while words:
        word = words.popleft()
        match = _FLAG.fullmatch(word)
        if match is None:
            found.problem("command line", f"unexpected {word!r}", "Write --section.key value")
            continue
        text = match[2]
        if text is None and words and not words[0].startswith("--"):
            text = words.popleft()
        flags.append(_Flag(match[1].replace("-", "_"), text))
    return flags


def _read_file(path: Path, sources: Sources) -> None:
    try:
        text = path.read_bytes().decode("utf-8")
        sources.values = tomli.loads(text)
    except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError) as error:
        raise ConfigError([_unreadable(f"{CONFIG_FILE_KEY} {path}", error)]) from None
    lines = {key: f"{path}:{number}" for key, number in _line_numbers(text).items()}
    sources.origins = {**dict.fromkeys(sources.values, str(path)), **lines}


def _unreadable(where: str, error: Exception) -> Problem:
    if isinstance(error, FileNotFoundError):
        return Problem(where, "no such file", "Give the path of a TOML recipe")
    if isinstance(error, IsADirectoryError):
        return Problem(where, "is a folder", "Give the path of a TOML recipe")
    if isinstance(error, UnicodeDecodeError):
        return Problem(where, f"is not UTF-8 text (byte {error.start})", "Save the recipe as UTF-8")
    if isinstance(error, OSError):
        return Problem(where, f"cannot be read ({error.strerror})")
    return Problem(where, f"is not valid TOML: {error}")


def _line_numbers(text: str) -> dict[str, int]:
    """The line of each table header and key, for messages; approximate for inline tables."""
    lines: dict[str, int] = {}
    counts: Counter[str] = Counter()
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*(\[\[?)\s*([^\]#]+?)\s*\]", line):
            key = section = re.sub("[\"' ]", "", header[2])
            if header[1] == "[[":
                counts[section] += 1
                key = section = f"{section}.{counts[section] - 1}"
        elif assignment := re.match(r"\s*([A-Za-z0-9_\-.\"']+)\s*=", line):
            key = ".".join(filter(None, (section, re.sub("[\"']", "", assignment[1]))))
        else:
            continue
        lines.setdefault(key, number)
    return lines


def _set(sources: Sources, root: type[BaseModel], key: str, value: Any) -> None:
    """Puts a command-line value at its dotted key; makes missing tables, and the next item of a list."""
    *parents, last = key.split(".")
    node: Any = sources.values
    for depth, name in enumerate(parents):
        if isinstance(node, list):
            if name == str(len(node)):
                node.append({})
            if not name.isdigit() or int(name) >= len(node):
                where = ".".join(parents[:depth])
                message = f"there is no item {name} ({where} has {len(node)})"
                sources.found.problem(key, message, "Items are counted from 0")
                return
            node = node[int(name)]
        else:
            annotation = without_none(annotation_at(root, parents[: depth + 1]))
            node = node.setdefault(name, [] if get_origin(annotation) is list else {})
        if not isinstance(node, dict | list):
            sources.found.problem(key, f"{'.'.join(parents[: depth + 1])} is a value, not a table")
            return
    if isinstance(node, list):
        sources.found.problem(key, "names an item of a list, not a key of it", f"Write --{key}.KEY VALUE")
        return
    node[last] = value
    sources.origins[key] = f"--{key}"
