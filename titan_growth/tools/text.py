"""How messages show numbers and untrusted text."""

from __future__ import annotations

from collections.abc import Sequence


def many(number: int, word: str) -> str:
    """`1 layer`, `2 layers`, `1,000 batches`."""
    plural = f"{word}es" if word.endswith("ch") else f"{word}s"
    return f"{number:,} {word if number == 1 else plural}"


def gib(num_bytes: int) -> str:
    """`1.50 GiB`, or MiB below a tenth of one."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 / 10 else f"{num_bytes / 2**20:.1f} MiB"


def sources(layers: Sequence[int | None], num_shown: int = 40) -> str:
    """`0 1 1 2`, `0 new 1 new`: the source of each layer. In a long list, runs are drawn together: `0-31 0-31`."""
    words: list[str] = []
    at = 0
    while at < len(layers):
        first, end = layers[at], at + 1
        while first is not None and end < len(layers) and layers[end] == first + end - at:
            end += 1
        end = end if end - at >= 4 and len(layers) > 24 else at + 1
        words.append("new" if first is None else str(first) if end == at + 1 else f"{first}-{layers[end - 1]}")
        at = end
    if len(words) > num_shown:
        words = [*words[: num_shown - 4], "...", *words[-4:]]
    return " ".join(words)


def one_line(text: str, max_length: int = 2000) -> str:
    """Untrusted text as one printable line, without control characters."""
    shown = "".join(
        letter if letter.isprintable() else " " if letter.isspace() else letter.encode("unicode_escape").decode()
        for letter in text[:max_length]
    )
    shown = " ".join(shown.split())
    return shown if len(text) <= max_length else shown + "..."


def some(names: Sequence[str], num_shown: int = 5) -> str:
    """`a, b and 3 more`: the first names, on one line."""
    shown = ", ".join(one_line(name, 200) for name in names[:num_shown])
    return shown if len(names) <= num_shown else f"{shown} and {len(names) - num_shown:,} more"
