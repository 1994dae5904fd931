"""`data.text_key`: names, paths and templates; and what happens to rows that hold no text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.readers.reading import account_of, refusal_of, texts_of
from titan_growth.data.content import ContentHashes
from titan_growth.data.corpora import open_corpus
from titan_growth.data.corpus import CorpusSpec
from titan_growth.data.readers.place import BadRowError
from titan_growth.data.readers.text_rule import TextRule

RECORD = {
    "text": "plain",
    "data": {"text": "nested", "more": {"body": "deep"}, "dot.ted": "inner"},
    "top.text": "literal",
    "top": {"text": "shadowed"},
    "title": "T",
    "n": 3,
    "none": None,
}


@pytest.mark.parametrize(
    ("text_key", "expected"),
    [
        ("text", "plain"),
        ("data.text", "nested"),
        ("data.more.body", "deep"),
        ("data.dot.ted", "inner"),
        ("top.text", "literal"),
        ("{title}\n\n{data.text}", "T\n\nnested"),
        ("{title}{title} {{{text}}}", "TT {plain}"),
        ("{top.text}", "literal"),
    ],
)
def test_fields_paths_and_templates(text_key: str, expected: str) -> None:
    assert TextRule(text_key).text_of(RECORD) == expected


@pytest.mark.parametrize(
    ("text_key", "message"),
    [
        (
            "body",
            "no field 'body'; it has: text, data.text, data.more.body, data.dot.ted, top.text, top.text, title",
        ),
        ("data.body", "no field 'data.body'; it has: text, data.text"),
        ("text.x", "no field 'text.x'"),
        ("data", "the field 'data' is an object, not a string. Name another field as data.text_key or repair the row"),
        ("n", "the field 'n' is int, not a string"),
        ("none", "the field 'none' is null, not a string"),
        ("{title} {n}", "the field 'n' is int, not a string"),
    ],
)
def test_records_without_text(text_key: str, message: str) -> None:
    with pytest.raises(BadRowError) as caught:
        TextRule(text_key).text_of(RECORD)
    assert str(caught.value).startswith(message)


GOOD, BAD = (
    ["a", "b", "c"],
    [b"{", b'{"body": "x"}', b'{"text": null}', b'["x"]', b'{"text": "\\udc00"}', b"\xff", b"[" * 9999],
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Good and bad lines in turn."""
    good = [json.dumps({"text": text}).encode() for text in GOOD]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*BAD[:3], good[0], *BAD[3:5], good[1], *BAD[5:], good[2]]))
    return tmp_path / "a.jsonl"


def test_bad_rows_stop_or_are_left_out_and_counted(path: Path) -> None:
    assert refusal_of(path).startswith("a.jsonl:1: broken JSON at column 2 (Expecting property name")
    for start in range(5):
        assert texts_of(path, start=start, on_bad_row="skip") == GOOD[start:]
    bad = account_of(path, on_bad_row="skip").left_out["rows without text"]
    assert bad.count == len(BAD)
    assert [name.split(" (")[0] for name in bad.names] == [f"a.jsonl:{line}" for line in (1, 2, 3, 5, 6)]
    assert bad.names[1] == "a.jsonl:2 (no field 'text'; it has: body)"


def test_more_bad_rows_than_allowed_stop(path: Path) -> None:
    assert texts_of(path, on_bad_row="skip", max_bad_rows=7) == GOOD
    message = refusal_of(path, on_bad_row="skip", max_bad_rows=6)
    assert message.startswith("a.jsonl:9: JSON nested too deeply; this is bad row 7, and data.max_bad_rows is 6. ")
    assert message.endswith(", or raise data.max_bad_rows")
    assert "this is bad row 1, " in refusal_of(path, on_bad_row="skip", max_bad_rows=0)


def fingerprint(path: Path, **settings: Any) -> str:
    return open_corpus(CorpusSpec("by extension", str(path), **settings)).fingerprint(
        ContentHashes(path.parent / "cache")
    )


def test_skipping_makes_another_corpus_of_rows_and_not_of_text(path: Path) -> None:
    assert fingerprint(path, on_bad_row="skip") != fingerprint(path)
    assert fingerprint(path, on_bad_row="skip", max_bad_rows=5) == fingerprint(path, on_bad_row="skip")
    assert fingerprint(path, max_bad_rows=5) == fingerprint(path)
    text = path.with_name("a.txt")
    text.write_text("text")
    assert fingerprint(text, on_bad_row="skip", text_key="body") == fingerprint(text)


def test_a_saved_dataset_has_the_same_rules(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    rows = {"data": [{"text": "a"}, {"text": None}, {"text": "c"}], "title": ["A", "B", None]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    folder = tmp_path / "saved"
    assert refusal_of(folder, text_key="data.text").startswith(
        "saved: row 1: the field 'data.text' is null, not a string"
    )
    assert refusal_of(folder, text_key="data.body").startswith(
        "saved: no field 'data.body'; it has: data.text, title. "
    )
    skipping = {"text_key": "{title}: {data.text}", "on_bad_row": "skip"}
    assert texts_of(folder, **skipping) == ["A: a"]
    assert texts_of(folder, text_key="data.text", on_bad_row="skip", start=1) == ["c"]
    account = account_of(folder, **skipping)
    assert account.left_out["rows without text"].count == 2
    assert account.amounts["dataset"].files == 1
