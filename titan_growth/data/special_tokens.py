"""Special tokens: what the files beside a tokenizer.json say of them, and how often a text spells them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_growth.tools.errors import DataError

CONFIG_NAME = "tokenizer_config.json"
COMPANIONS = (CONFIG_NAME, "special_tokens_map.json")
"""Read beside a tokenizer.json, the first with precedence."""

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Role:
    """What the files say of a role such as bos_token: nothing, that there is none, or its text."""

    is_named: bool
    text: str | None = None
    where: Path | None = None
    """The file that has the text."""


class Companions:
    """The files beside a tokenizer.json. Raises DataError for what cannot be read."""

    def __init__(self, folder: Path, files: Mapping[str, bytes]) -> None:
        self._settings = {folder / name: _object(folder / name, files[name]) for name in COMPANIONS if name in files}

    def role(self, name: str) -> Role:
        """The first text that a file has for a role. Raises DataError for one that is no text."""
        is_named = False
        for where, settings in self._settings.items():
            is_named = is_named or name in settings
            token = settings.get(name)
            if token is not None:
                return Role(True, _content(where, f"its {name}", token), where)
        return Role(is_named)

    def added_tokens(self) -> list[dict[str, Any]]:
        """`added_tokens_decoder` of tokenizer_config.json in the order of its ids: text and flags of each token.

        The ids are the file's own: a token that the tokenizer lacks gets the next free one, with every library.
        Raises DataError for an entry that is none.
        """
        found = {}
        for where, settings in self._settings.items():
            table = settings.get("added_tokens_decoder") if where.name == CONFIG_NAME else None
            if table is not None and not isinstance(table, dict):
                raise DataError(f"{where}: its added_tokens_decoder is no JSON object. Repair or remove the file")
            for number, entry in (table or {}).items():
                what = f"its added_tokens_decoder[{number!r}]"
                if not number.isdecimal() or not isinstance(entry, dict):
                    raise DataError(f"{where}: {what} is not an id with a token. Repair or remove the file")
                flags = {flag: entry[flag] for flag in _FLAGS if flag in entry}
                if not all(isinstance(value, bool) for value in flags.values()):
                    raise DataError(f"{where}: {what} has a flag that is not true or false. Repair or remove the file")
                found[int(number)] = {"content": _content(where, what, entry), **flags}
        return [found[number] for number in sorted(found)]


def _object(where: Path, data: bytes) -> dict[str, Any]:
    try:
        settings = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: broken JSON ({error}). Repair or remove the file") from error
    if not isinstance(settings, dict):
        raise DataError(f"{where}: not a JSON object. Repair or remove the file")
    return settings


def _content(where: Path, what: str, token: Any) -> str:
    """The text of a token, written as a string or as an object that has it as `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or not text:
        shown = json.dumps(token)[:80]
        raise DataError(f"{where}: {what} is {shown}, not the text of a token. Repair or remove the file")
    return text


class SpellingCounter:
    """Counts in one document, given part by part, how often its text spells a special token.

    Occurrences that overlap count once. How the document is divided does not change the count.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        longest_first = sorted(set(texts), key=lambda text: (-len(text), text))
        self.overlap = len(longest_first[0]) - 1 if longest_first else 0
        """How many characters of what follows a part have to be known."""
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._beginnings = sorted({text[:2] for text in longest_first})
        self._taken = 0

    def begin(self) -> None:
        """Begin another document."""
        self._taken = 0

    def count(self, part: str, following: str) -> int:
        """Occurrences that begin in the next part of the document; `following` is what comes after it."""
        start, self._taken = self._taken, max(0, self._taken - len(part))
        if self._pattern is None:
            return 0
        text = part + following[: self.overlap]
        if not any(beginning in text for beginning in self._beginnings):
            return 0
        found = 0
        for match in self._pattern.finditer(text, start):
            if match.start() >= len(part):
                break
            found += 1
            self._taken = max(0, match.end() - len(part))
        return found
