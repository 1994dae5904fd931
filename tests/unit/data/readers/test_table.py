"""csv and tsv."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.unit.data.readers.reading import account_of, refusal_of, texts_of


def test_rows_are_documents(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_bytes('\ufeff\r\nid,text\r\n1,"a ""quoted""\r\nline, é"\r\n\r\n2,\r\n3,last'.encode())
    assert texts_of(table) == ['a "quoted"\r\nline, é', "", "last"]
    assert [texts_of(table, start=start) for start in range(4)] == [texts_of(table)[start:] for start in range(4)]
    (tmp_path / "a.tsv").write_text('id\tbody\n1\ta, "b"\n')
    assert texts_of(tmp_path / "a.tsv", text_key="{id}: {body}") == ['1: a, "b"']
    (tmp_path / "records.log").write_text("text\nx\n")
    assert texts_of(tmp_path / "records.log", "csv") == ["x"]


def test_a_field_may_be_longer_than_the_library_allows(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text\n" + "a" * 200_000 + "\n")
    assert [len(text) for text in texts_of(tmp_path / "a.csv")] == [200_000]
    assert csv.field_size_limit() == before, "other readers of the process rely on it"


BROKEN = {
    "id,body\n1,a\n": ":1: no field 'text'; it has: id, body. Set data.text_key to the one that holds the text",
    "id, text\n1,a\n": ":1: no field 'text'; it has: id, ' text'. Set data.text_key to the one that holds the text",
    "text,text\na,b\n": ":1: the header has 'text' 2 times. Give each column its own name",
    "id,text\n1,a\n\n2,b,c\n": ":4: 3 fields where the header has 2. Quote fields",
    'id,text\n1,a\n2,"b\n3,c\n': ":3: the row that begins here is broken (unexpected end of data). Quote fields",
    'id,text\n1,"a" b\n': ":2: the row that begins here is broken (',' expected after '\"'). Quote fields",
}


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_table_names_the_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(content)
    assert refusal_of(tmp_path / "a.csv").startswith(f"a.csv{BROKEN[content]}")


def test_rows_of_another_length_can_be_skipped_and_broken_quotes_cannot(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1,a\n2\n3,c\n")
    assert texts_of(path, on_bad_row="skip") == ["a", "c"]
    assert account_of(path, on_bad_row="skip").left_out["rows without text"].names == [
        "a.csv:3 (1 fields where the header has 2)"
    ]
    path.write_text('id,text\n1,a\n2,"\n')
    assert "the row that begins here is broken" in refusal_of(path, on_bad_row="skip")
    path.write_bytes(b'id,text\n1,a\n2,"\n\xff"\n3,c\n')
    assert refusal_of(path).startswith("a.csv:3: byte offset 16 is not valid UTF-8 (0xff). ")
    assert texts_of(path, on_bad_row="skip") == ["a", "c"]
    path.write_bytes(b"id,te\xffxt\n1,a\n")
    assert refusal_of(path, on_bad_row="skip").startswith("a.csv:1: byte offset 5 is not valid UTF-8 (0xff). ")
