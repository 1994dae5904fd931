"""JSON lines and JSON arrays: what is read, and where it is said to be broken."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.unit.data.readers.reading import refusal_of, texts_of
from titan_growth.data.readers import json_values, utf8

LONG_INTEGER = "9" * 5000


def test_an_integer_that_nobody_reads_may_be_long(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text(f'{{"text": "a", "n": {LONG_INTEGER}}}\n{{"text": "b", "n": [-{LONG_INTEGER}, 1.5]}}\n')
    assert texts_of(lines) == ["a", "b"]
    array = tmp_path / "a.json"
    array.write_text(f'[{{"text": "a", "n": {LONG_INTEGER}}}, {{"text": "b"}}]')
    assert texts_of(array) == ["a", "b"]
    lines.write_text(f'{{"text": {LONG_INTEGER}}}\n')
    assert refusal_of(lines).startswith("a.jsonl:1: the field 'text' is float, not a string. ")


ARRAYS = [
    ("[]", []),
    (" \n[ ]\n ", []),
    ('[{"text":"a"}]', ["a"]),
    ('\ufeff\n[\n {"text": "é漢", "more": [1, 23, {"x": "]},["}]},\r\n{"text": "\\u00e9\\""}\t]\n', ["é漢", 'é"']),
    (
        json.dumps([{"text": str(number) * number, "n": number} for number in range(40)]),
        [str(n) * n for n in range(40)],
    ),
]


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 1 << 20])
def test_an_array_is_read_whatever_the_chunks(
    chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_values, "CHUNK_BYTES", chunk_bytes)
    for number, (content, expected) in enumerate(ARRAYS):
        path = tmp_path / f"{number}.json"
        path.write_text(content, encoding="utf-8", newline="")
        assert texts_of(path) == expected
        assert [texts_of(path, start=start) for start in range(3)] == [expected[start:] for start in range(3)]


BROKEN_ARRAYS = {
    '[{"text": "a"}, {"text": "b"': r"element 2: broken JSON (Expecting ',' delimiter)",
    '[{"text": "a"}, 12': "element 2: broken JSON (no comma follows)",
    '[{"text": "a"}, 12, {"text": "b"}]': "element 2: int instead of an object",
    '[{"text": "a"} {"text": "b"}]': "element 1: broken JSON (no comma follows)",
    '[{"text": "a"},]': "element 2: broken JSON (Expecting value)",
    '[{"text": "a"}]]': "text follows the end of the JSON array",
    '[{"text": "a", "text": "\\ud800"}]': "element 1: the field 'text' has a lone surrogate at character 0",
}


@pytest.mark.parametrize("content", BROKEN_ARRAYS)
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_a_broken_array_names_the_element(
    content: str, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_values, "CHUNK_BYTES", chunk_bytes)
    (tmp_path / "a.json").write_text(content)
    assert refusal_of(tmp_path / "a.json").startswith(f"a.json: {BROKEN_ARRAYS[content]}")


def test_a_record_without_an_end_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utf8, "LONGEST_RECORD_BYTES", 1 << 20)
    monkeypatch.setattr(json_values, "LONGEST_RECORD_BYTES", 1 << 20)
    line, array = tmp_path / "a.jsonl.gz", tmp_path / "a.json.gz"
    line.write_bytes(gzip.compress(b'{"text": "fine"}\n{"text": "' + b"a" * (1 << 24)))
    assert refusal_of(line).startswith("a.jsonl.gz:2: a line of more than 1 MiB. ")
    array.write_bytes(gzip.compress(b'[{"text": "fine"}, {"text": "' + b"a" * (1 << 24)))
    assert refusal_of(array).startswith("a.json.gz: element 2: an element of a JSON array of more than 1 MiB. ")


def test_a_byte_order_mark_alone_is_no_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf")
    assert texts_of(tmp_path / "a.jsonl") == []


def test_lines_end_where_json_lines_end(tmp_path: Path) -> None:
    """Other line ends of Unicode are text."""
    text = "a\u2028b\x85c\x0bd"
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"text": text}, ensure_ascii=False).encode() + b"\r\n\r\n  \n" + b'{"text": ""}'
    )
    assert texts_of(tmp_path / "a.jsonl") == [text, ""]
