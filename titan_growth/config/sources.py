"""Where a recipe's values come from: a TOML file and the command line, merged into one table that knows its origins.

The plugins that either of them names are imported on the way, before any other key is looked up: their tables count.

The command line is read by hand because `--a.b v`, `--a.b=v`, `--flag true` and a bare `--flag` must all work, items of
`[[growth.stages]]` are reached by number, and a bad value must get the very message that a file gets; argparse-based
readers decide types (and complain) before the validator sees anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin

import tomli
from pydantic import BaseModel

from titan_growth.config.fields import annotation_at, parse_text, without_none
from titan_growth.config.plugins import PLUGINS_KEY, import_plugins, recipe_class
from titan_growth.config.schema.recipe import Recipe
from titan_growth.tools.errors import ConfigError, Problem
from titan_growth.tools.findings import Findings

CONFIG_FILE_KEY = "job.config_file"

_Flag = tuple[str, str | None, str]
"""Key, text behind it (None: nothing), and the flag as it is written in messages."""


@dataclass
class Sources:
    """The merged values, and for each dotted key the place it came from."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    found: Findings = field(default_factory=Findings)
    config_file: Path | None = None
    plugins_missing: bool = False
    """Not all plugins could be loaded, so that an unknown table may be one of theirs."""

    def origin(self, key: str) -> str:
        """The origin of a key, of the nearest table around it, or of what is in it; empty for a default."""
        around = key
        while around:
            if around in self.origins:
                return self.origins[around]
            around = around.rpartition(".")[0]
        return next((origin for inner, origin in self.origins.items() if inner.startswith(key + ".")), "")

    def located(self, problem: Problem) -> Problem:
        """The problem with the place that its key's value came from."""
        origin = self.origin(problem.key)
        return Problem(problem.key, f"{problem.message} ({origin})", problem.hint) if origin else problem

    def take(self, found: Findings) -> None:
        """Adds findings, each with the place that its key's value came from."""
        self.found.problems += map(self.located, found.problems)
        self.found.warnings += map(self.located, found.warnings)


def read_sources(argv: list[str]) -> Sources:
    """Reads `--job.config_file`, imports the plugins, and then lays every other flag over the file.

    Raises:
        ConfigError: when the file cannot be read or is not TOML (nothing else can be said then).
    """
    sources = Sources()
    flags = _read_flags(argv, sources)
    _read_file_and_plugins(flags, sources)
    root = recipe_class()
    for key, text, flag in flags:
        annotation = str if key == CONFIG_FILE_KEY else annotation_at(root, key.split("."))
        if text is None and annotation is not None and without_none(annotation) is not bool:
            sources.found.problem(key, "the flag needs a value", f"Write --{key} VALUE")
        elif key not in (CONFIG_FILE_KEY, PLUGINS_KEY):
            # A bare flag is true; when its key is unknown, it gets that message later.
            _set(sources, root, key, parse_text("true" if text is None else text, annotation), flag)
    return sources


def load_named_plugins(argv: list[str]) -> None:
    """Imports the plugins of a command line and its file, and reads nothing else of them (for `--help`).

    Raises:
        ConfigError: when the file cannot be read or a plugin cannot be imported.
    """
    sources = Sources()
    _read_file_and_plugins(_read_flags(argv, sources), sources)
    if problems := [problem for problem in sources.found.problems if problem.key == PLUGINS_KEY]:
        raise ConfigError(problems)


def _read_file_and_plugins(flags: list[_Flag], sources: Sources) -> None:
    config_files = [text for key, text, _ in flags if key == CONFIG_FILE_KEY and text is not None]
    if config_files:
        _read_file(Path(config_files[-1]).expanduser(), sources)
    for key, text, flag in flags:
        if key == PLUGINS_KEY and text is not None:
            _set(sources, Recipe, key, parse_text(text, annotation_at(Recipe, [key])), flag)
    names = sources.values.get(PLUGINS_KEY, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        sources.plugins_missing = True  # the validator says what is wrong with the list
        return
    found = Findings()
    import_plugins(names, found)
    sources.take(found)
    sources.plugins_missing = bool(found.problems)


def _read_flags(argv: list[str], sources: Sources) -> list[_Flag]:
    flags: list[_Flag] = []
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if not word.startswith("--") or len(word) == 2:
            sources.found.problem("command line", f"unexpected {word!r}", "Write --section.key value")
            continue
        name, has_value, text = word[2:].partition("=")
        key = name.replace("-", "_")
        if not all(key.split(".")):
            sources.found.problem("command line", f"unexpected {word!r}", "Write --section.key value")
            continue
        if has_value:
            flags.append((key, text, f"--{key}"))
        elif position < len(argv) and not argv[position].startswith("--"):
            flags.append((key, argv[position], f"--{key}"))
            position += 1
        else:
            flags.append((key, None, f"--{key}"))
    return flags


def _read_file(path: Path, sources: Sources) -> None:
    where = f"{CONFIG_FILE_KEY} {path}"
    try:
        text = path.read_bytes().decode("utf-8")
        table = tomli.loads(text)
    except FileNotFoundError:
        raise ConfigError([Problem(where, "no such file", "Give the path of a TOML recipe")]) from None
    except IsADirectoryError:
        raise ConfigError([Problem(where, "is a folder", "Give the path of a TOML recipe")]) from None
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text (byte {error.start})"
        raise ConfigError([Problem(where, message, "Save the recipe as UTF-8")]) from None
    except OSError as error:
        raise ConfigError([Problem(where, f"cannot be read ({error.strerror})")]) from None
    except tomli.TOMLDecodeError as error:
        raise ConfigError([Problem(where, f"is not valid TOML: {error}")]) from None
    sources.config_file = path
    sources.values = table
    _note_origins(table, "", str(path), _line_numbers(text), sources.origins)


def _note_origins(
    table: Any, prefix: str, path: str, lines: dict[str, int], origins: dict[str, str], around: str = ""
) -> None:
    """`around` is the origin of the table itself: inside an inline table it is the best that is known."""
    items = table.items() if isinstance(table, dict) else enumerate(table)
    for name, value in items:
        key = f"{prefix}{name}"
        origins[key] = f"{path}:{lines[key]}" if key in lines else around or path
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            _note_origins(value, key + ".", path, lines, origins, origins[key])


def _line_numbers(text: str) -> dict[str, int]:
    """The line of each table header and of each key below it; approximate for inline tables, and only for messages."""
    lines: dict[str, int] = {}
    counts: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*(\[\[?)\s*([^\]#]+?)\s*\]", line)
        assignment = re.match(r"\s*([A-Za-z0-9_\-.\"']+)\s*=", line)
        if header:
            section = header[2].replace('"', "").replace("'", "").replace(" ", "")
            if header[1] == "[[":
                index = counts.get(section, 0)
                counts[section] = index + 1
                section = f"{section}.{index}"
            lines.setdefault(section, number)
        elif assignment:
            key = assignment[1].replace('"', "").replace("'", "")
            lines.setdefault(f"{section}.{key}" if section else key, number)
    return lines


def _set(sources: Sources, root: type[BaseModel], key: str, value: Any, flag: str) -> None:
    """Puts one command-line value at its dotted key; tables, and the next item of a list, are made on the way."""
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
    sources.origins[key] = flag
