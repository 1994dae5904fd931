"""Which files a corpus has, and what is said of those that it leaves out."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path

import pytest

from tests.unit.data.readers.reading import account_of, refusal_of, texts_of
from titan_growth.data.corpora import open_corpus
from titan_growth.data.corpus import CorpusSpec
from titan_growth.data.listing import CARDS, EMPTY, MARKUP, OTHER_KINDS, find_files
from titan_growth.data.walk import AGAIN, DANGLING, FOLDERS, HIDDEN, LOOP, NOT_REGULAR, Search
from titan_growth.tools.errors import DataError


def put(folder: Path, *names: str) -> None:
    """Text files that hold their own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def left_out(path: Path | str, dataset: str = "by extension") -> dict[str, list[str]]:
    return {reason: entry.names for reason, entry in account_of(Path(path), dataset).left_out.items()}


def test_links_out_of_the_folder_are_followed_and_it_is_said(tmp_path: Path) -> None:
    corpus, outside = tmp_path / "corpus", tmp_path / "outside"
    put(outside, "a.txt", "sub/b.txt")
    put(tmp_path, "c.txt")
    corpus.mkdir()
    (corpus / "linked").symlink_to(outside)
    (corpus / "file.txt").symlink_to(tmp_path / "c.txt")
    assert texts_of(corpus) == ["c.txt", "a.txt", "sub/b.txt"]
    assert [file.name for file in find_files(corpus, None).files] == ["file.txt", "linked/a.txt", "linked/sub/b.txt"]
    account = account_of(corpus)
    assert (account.followed.count, account.followed.names) == (2, ["file.txt", "linked"])
    assert not account.left_out
    assert texts_of(Path(f"{corpus}/**/*.txt")) == ["c.txt", "a.txt", "sub/b.txt"]


def test_loops_and_copies_are_left_out_by_name(tmp_path: Path) -> None:
    corpus, outside = tmp_path / "corpus", tmp_path / "outside"
    put(corpus, "a.txt", "sub/b.txt", "sub/deep/c.txt")
    put(outside, "d.txt")
    (corpus / "sub" / "deep" / "up").symlink_to("..")
    (corpus / "root").symlink_to(corpus)
    (corpus / "above").symlink_to(tmp_path)
    (corpus / "itself").symlink_to("itself")
    (corpus / "gone.txt").symlink_to("nowhere.txt")
    (corpus / "copy.txt").symlink_to("a.txt")
    (corpus / "again").symlink_to("sub/deep")
    (corpus / "one").symlink_to(outside)
    (corpus / "two").symlink_to(outside)
    (outside / "back").symlink_to(outside)
    os.mkfifo(corpus / "pipe.txt")
    assert texts_of(corpus) == ["a.txt", "d.txt", "sub/b.txt", "sub/deep/c.txt"]
    assert left_out(corpus) == {
        LOOP: ["above", "itself", "one/back", "root", "sub/deep/up"],
        AGAIN: ["again", "copy.txt", "two"],
        DANGLING: ["gone.txt"],
        NOT_REGULAR: ["pipe.txt"],
    }
    # A glob may match only one of several ways to a file, and none counts twice.
    assert texts_of(Path(f"{corpus}/**/*.txt")) == ["a.txt", "d.txt", "sub/b.txt", "sub/deep/c.txt"]
    assert texts_of(Path(f"{corpus}/ag*/**/*.txt")) == ["sub/deep/c.txt"]
    assert texts_of(Path(f"{corpus}/*/*.txt")) == ["sub/deep/c.txt", "d.txt", "a.txt", "sub/b.txt"]


def test_a_download_of_a_hub_with_its_store_of_blobs(tmp_path: Path) -> None:
    """snapshots/ holds links to blobs/, whose files have no extension; in the cache a dot begins the store's name."""
    for store in ("blobs", ".blobs"):
        corpus = tmp_path / store.strip(".") / store
        put(corpus, f"{store}/0123", f"{store}/4567")
        snapshot = corpus / "snapshots" / "main"
        snapshot.mkdir(parents=True)
        (snapshot / "a.txt").symlink_to(f"../../{store}/0123")
        (snapshot / "b.txt").symlink_to(f"../../{store}/4567")
        assert texts_of(corpus) == [f"{store}/0123", f"{store}/4567"]
        assert account_of(corpus).followed.count == 0


def test_a_folder_with_nothing_to_read_says_what_there_is(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    put(corpus, "a.pdf", "b.png", "page.html", ".git/c.txt")
    (corpus / "root").symlink_to(corpus)
    assert refusal_of(corpus).startswith(
        f"corpus: no file of a known kind ({MARKUP}: page.html; hidden: .git/; {LOOP}: root; "
        f"{OTHER_KINDS}: a.pdf, b.png)"
    )
    os.mkfifo(tmp_path / "pipe.txt")
    assert refusal_of(tmp_path / "pipe.txt").startswith("pipe.txt: no regular file. ")


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_folders_that_a_glob_matches_are_left_out_by_name(scheme: str, tmp_path: Path) -> None:
    put(tmp_path, "a.txt", "sub/b.txt")
    spec = CorpusSpec("by extension", f"{scheme}{tmp_path}/*")
    assert list(open_corpus(spec).documents()) == ["a.txt"]
    assert {reason: entry.names for reason, entry in open_corpus(spec).account().left_out.items()} == {FOLDERS: ["sub"]}
    assert list(open_corpus(CorpusSpec("by extension", f"{scheme}{tmp_path}/*/**")).documents())[-1] == "sub/b.txt"
    with pytest.raises(DataError) as caught:
        open_corpus(CorpusSpec("by extension", f"{scheme}{tmp_path}/s*"))
    assert f"{tmp_path}/s*: the glob matches no file ({FOLDERS}: sub). " in str(caught.value)


def test_a_link_that_cannot_be_followed_is_no_loop(tmp_path: Path) -> None:
    put(tmp_path, "corpus/a.txt")
    (tmp_path / "corpus" / "far").symlink_to("x" * 300)  # a name that no file system has
    message = refusal_of(tmp_path / "corpus")
    assert message == "corpus: cannot be read (File name too long). Check the file and its disk"


def test_files_of_no_bytes_that_should_have_some(tmp_path: Path) -> None:
    put(tmp_path, "a.txt")
    for name in ("b.txt", "c.jsonl", "d.csv", "e.parquet", "f.tar", "g.jsonl.zst"):
        (tmp_path / name).touch()
    assert texts_of(tmp_path) == ["a.txt", ""]
    assert left_out(tmp_path) == {EMPTY: ["e.parquet", "f.tar", "g.jsonl.zst"]}


def test_links_between_many_folders(tmp_path: Path) -> None:
    for one in range(8):
        put(tmp_path, f"{one}/a.txt")
        for other in {*range(8)} - {one}:
            (tmp_path / f"{one}/{other}").symlink_to(f"../{other}")
    assert len(texts_of(tmp_path)) == 8
    with pytest.raises(DataError, match="links lead to one folder on over 100 ways; name a folder, no glob"):
        texts_of(Path(f"{tmp_path}/**/*.txt"))


PATTERNS = ["**", "**/*.txt", "*/**/*.txt", "**/b*/*", "**/.h/*.txt", "**/**", "sub/**", "**/x", "s*/**/c.t[xy]t"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_recursive_glob_matches_what_the_library_says(pattern: str, tmp_path: Path) -> None:
    names = ["a.txt", "sub/b.txt", "sub/bb/c.txt", "sub/bb/cc/d.txt", ".h/e.txt", "sub/.h/f.txt", "sub/.i.txt"]
    put(tmp_path, *names)
    search = Search(tmp_path)
    search.walk_matching(Path(pattern).parts)
    found = glob.glob(f"{tmp_path}/{pattern}", recursive=True)
    expected = {os.path.relpath(path, tmp_path) for path in found if os.path.isfile(path)}
    assert {one.name for one in search.candidates} == expected


def test_html_and_xml_are_not_taken_for_text(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", "b.html", "c.XML.gz", "d.svg")
    assert left_out(tmp_path) == {MARKUP: ["b.html", "c.XML.gz", "d.svg"]}
    assert 'train on the markup with dataset = "text"' in refusal_of(tmp_path / "b.html")
    assert texts_of(tmp_path / "b.html", "text") == ["b.html"]
    for content in ("<!DOCTYPE html>\n<p>", " \n<HTML>", "\ufeff<?xml version='1.0'?>"):
        (tmp_path / "a.txt").write_text(content)
        assert refusal_of(tmp_path / "a.txt").startswith("a.txt: holds HTML or XML, not plain text. Extract its text")
        assert texts_of(tmp_path / "a.txt", "text") == [content.removeprefix("\ufeff")]
    (tmp_path / "a.txt").write_text("<p> is how HTML begins a paragraph")
    assert len(texts_of(tmp_path / "a.txt")) == 1


def test_a_dataset_card_is_no_document_unless_asked_for(tmp_path: Path) -> None:
    put(tmp_path, "README.md", "sub/LICENSE.txt", "notes.md", ".gitattributes")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "document"}))
    assert texts_of(tmp_path) == ["document", "notes.md"]
    cards = ["README.md", "dataset_infos.json", "sub/LICENSE.txt"]
    assert left_out(tmp_path) == {CARDS: cards, HIDDEN: [".gitattributes"]}
    assert texts_of(tmp_path, "json") == ["document"]
    assert texts_of(tmp_path, "text") == ["README.md", "notes.md", "sub/LICENSE.txt"]
    assert texts_of(Path(f"{tmp_path}/*.md")) == ["README.md", "notes.md"]
    assert texts_of(tmp_path / "README.md") == ["README.md"]
    (tmp_path / "data.jsonl").unlink()
    assert texts_of(tmp_path) == ["README.md", "notes.md", "sub/LICENSE.txt"]


def test_a_chain_of_many_folders_is_walked(tmp_path: Path) -> None:
    name = "/".join(["d"] * 300) + "/a.txt"
    put(tmp_path, name)
    assert texts_of(tmp_path) == [name]


@pytest.mark.parametrize("name", ["a\nb.txt", "a  b.txt", "é\udcff.txt"])
def test_odd_names(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("text")
    assert texts_of(tmp_path) == ["text"]
