"""Parquet: the types of columns that hold text, nested ones, rows that hold none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.data.readers.reading import account_of, refusal_of, texts_of

TEXTS = ["a", "é漢", "a", "", "b"]
COLUMNS: dict[str, Any] = {
    "string": pa.array(TEXTS),
    "large": pa.array(TEXTS, pa.large_string()),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "binary": pa.array([text.encode() for text in TEXTS], pa.binary()),
    "data": pa.array([{"text": text, "inner": {"deep": text.encode()}, "n": 1} for text in TEXTS]),
    "dotted.name": pa.array(TEXTS),
    "number": pa.array(range(5)),
    "list": pa.array([[text] for text in TEXTS]),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    pq.write_table(pa.table(COLUMNS), tmp_path / "a.parquet", row_group_size=2)
    return tmp_path / "a.parquet"


@pytest.mark.parametrize(
    "text_key", ["string", "large", "dictionary", "binary", "data.text", "data.inner.deep", "dotted.name"]
)
def test_every_type_that_holds_text(text_key: str, path: Path) -> None:
    for start in range(6):
        assert texts_of(path, text_key=text_key, start=start) == TEXTS[start:]


def test_a_template_over_columns(path: Path) -> None:
    assert texts_of(path, text_key="{string}/{data.inner.deep}") == [f"{text}/{text}" for text in TEXTS]


def test_columns_that_hold_none(path: Path) -> None:
    assert refusal_of(path, text_key="number") == (
        "a.parquet: the column 'number' holds int64, not strings. Name another one as data.text_key"
    )
    assert "the column 'list' holds list<element: string>, not strings" in refusal_of(path, text_key="list")
    assert refusal_of(path, text_key="data.body") == (
        "a.parquet: no field 'data.body'; it has: string, large, dictionary, binary, data.text, data.inner.deep, "
        "data.n, dotted.name, number, list. Set data.text_key to the one that holds the text"
    )
    assert "no field 'string.x'" in refusal_of(path, text_key="string.x")


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    pq.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "a.parquet"
    )
    assert refusal_of(tmp_path / "a.parquet") == "a.parquet: it has 2 columns 'text'. Give each column its own name"


def test_rows_without_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    values = pa.array([{"text": b"a"}, {"text": None}, None, {"text": b"\xff"}, {"text": b"b"}])
    pq.write_table(pa.table({"data": values}), path, row_group_size=2)
    assert refusal_of(path, text_key="data.text").startswith("a.parquet: row 1: the column 'data.text' is null, ")
    skipping = {"text_key": "data.text", "on_bad_row": "skip"}
    assert texts_of(path, **skipping) == ["a", "b"]
    assert texts_of(path, start=1, **skipping) == ["b"]
    assert account_of(path, **skipping).left_out["rows without text"].names == [
        "a.parquet: row 1 (the column 'data.text' is null, not a string)",
        "a.parquet: row 2 (the column 'data.text' is null, not a string)",
        "a.parquet: row 3 (the column 'data.text' is not valid UTF-8)",
    ]


def test_a_string_column_of_broken_utf8_names_the_row(tmp_path: Path) -> None:
    broken = pa.array([b"a", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    assert refusal_of(tmp_path / "a.parquet").startswith("a.parquet: row 1: the column 'text' is not valid UTF-8. ")


def test_damage_names_the_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"{number:064}" for number in range(1000)]})
    pq.write_table(table, path, row_group_size=500, compression="gzip", use_dictionary=False)
    offset = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[offset + 100 : offset + 200] = bytes(100)
    path.write_bytes(content)
    assert texts_of(path, start=1000) == []
    assert refusal_of(path).startswith("a.parquet: row group 1: truncated or not a parquet file (")
