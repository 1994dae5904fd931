"""The table that ends a preparation: what was read, by kind, and what was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from titan_growth.data.account import Account, table
from titan_growth.data.corpus import CorpusSpec
from titan_growth.data.listing import OTHER_KINDS
from titan_growth.data.preparation import prepare
from titan_growth.data.prepared import PreparedCorpus
from titan_growth.data.shard_writer import SplitWriter
from titan_growth.data.tokenizers import BytesTokenizer
from titan_growth.tools.errors import DataError

ROWS = {"on_bad_row": "skip"}


def prepared(path: Path, cache: Path, **settings: Any) -> PreparedCorpus:
    return prepare(
        CorpusSpec("by extension", str(path), **settings),
        BytesTokenizer(),
        bos=True,
        eos=True,
        validation_fraction=0.1,
        cache_dir=cache,
        shard_tokens=500,
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Kinds in turn, so that documents of one are not next to each other; bad rows; what is no text."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(6):
        lines = [json.dumps({"text": f"row {row} " * row}) for row in range(20)]
        lines.insert(number, "{")
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
        (folder / f"{number}.txt").write_text(f"text {number} " * 40)
    (folder / "a.csv").write_text("text\none\n\ntwo\n")
    for name in "abcdefg":
        (folder / f"{name}.png").touch()
    (folder / "README.md").write_text("card")
    return folder


def test_the_table(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "titan_growth")
    found = prepared(corpus, tmp_path / "cache", **ROWS)
    account = found.meta["account"]
    amounts = {row["kind"]: row for row in account["kinds"]}
    assert {kind: (row["files"], row["documents"]) for kind, row in amounts.items()} == {
        "csv": (1, 2),
        "json": (6, 6 * 19),  # the document of row 0 is empty
        "text": (6, 6),
    }
    assert amounts["csv"]["tokens"] == len("one") + len("two") + 4
    assert amounts["csv"]["bytes"] == (corpus / "a.csv").stat().st_size
    splits = found.meta["splits"].values()
    assert sum(row["tokens"] for row in amounts.values()) == sum(split["num_tokens"] for split in splits)
    lines = [record.message for record in caplog.records if record.message.startswith("data: ")]
    assert lines == [f"data: {line}" for line in table(account)]
    assert [line.split()[1] for line in lines[:5]] == ["kind", "csv", "json", "text", "all"]
    assert lines[5:] == [
        'data: left out, dataset cards (dataset = "text", or a glob that names them, reads them): README.md',
        "data: left out, of no known kind: a.png, b.png, c.png, d.png, e.png and 2 others",
        "data: left out, rows without text: "
        + ", ".join(f"{number}.jsonl:{number + 1} ({BROKEN})" for number in range(5))
        + " and 1 other",
    ]
    caplog.clear()
    assert prepared(corpus, tmp_path / "cache", **ROWS).meta["account"] == account


BROKEN = "broken JSON at column 2 (Expecting property name enclosed in double quotes)"


@pytest.mark.parametrize("num_writes", [40, 90, 120])
def test_a_preparation_that_is_continued_ends_with_the_same_table(
    num_writes: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("titan_growth.data.preparation._BATCH_WINDOWS", 3)
    expected = prepared(corpus, tmp_path / "whole", **ROWS).meta
    append, count = SplitWriter.append, 0

    def dying(writer: SplitWriter, tokens: list[int]) -> None:
        nonlocal count
        count += 1
        if count == num_writes:
            raise KeyboardInterrupt
        append(writer, tokens)

    monkeypatch.setattr(SplitWriter, "append", dying)
    with pytest.raises(KeyboardInterrupt):
        prepared(corpus, tmp_path / "killed", **ROWS)
    (journal,) = (tmp_path / "killed" / "prepared").glob("*/journal.json")
    assert json.loads(journal.read_text())["position"]["document"] > 0
    assert prepared(corpus, tmp_path / "killed", **ROWS).meta == expected


def test_a_corpus_without_a_good_row_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\n{"body": "b"}\n')
    reason = r"no field 'text'; it has: body"
    first, second = (rf"a\.jsonl:{number} \({reason}\)" for number in (1, 2))
    with pytest.raises(
        DataError,
        match=rf"holds no text to train on \(left out, rows without text: {first}, {second}\)\. Use another",
    ):
        prepared(tmp_path / "a.jsonl", tmp_path / "cache", **ROWS)


def test_a_table_of_before_names_what_is_left_out_now(corpus: Path, tmp_path: Path) -> None:
    before = prepared(corpus, tmp_path / "cache", **ROWS).meta["account"]
    for name in "abcdefg":
        (corpus / f"{name}.png").unlink()
    (corpus / "new.pdf").touch()
    after = prepared(corpus, tmp_path / "cache", **ROWS).meta["account"]
    changed = {"reason": OTHER_KINDS, "count": 1, "names": ["new.pdf"]}
    assert after["left_out"] == [changed if entry["reason"] == OTHER_KINDS else entry for entry in before["left_out"]]
    assert after == {**before, "left_out": after["left_out"]}


def test_a_lower_limit_of_bad_rows_holds_for_what_is_prepared_already(corpus: Path, tmp_path: Path) -> None:
    before = prepared(corpus, tmp_path / "cache", **ROWS)
    assert prepared(corpus, tmp_path / "cache", **ROWS, max_bad_rows=6).folder == before.folder
    with pytest.raises(DataError, match=r"corpus .*: holds 6 rows without text, and data\.max_bad_rows is 5\. Repair"):
        prepared(corpus, tmp_path / "cache", **ROWS, max_bad_rows=5)


def test_counts_of_another_listing_are_not_taken_over() -> None:
    account = Account()
    account.add_files("text", [3])
    with pytest.raises(ValueError, match="other kinds"):
        account.restore({"json": [1, 2]})
    account.restore({"text": [1, 2]})
    assert account.state() == {"text": [1, 2]}
