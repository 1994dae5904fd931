"""Corpora that every machine has: the standard library is in test_corpora.py."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from titan_growth.data.corpora import open_corpus
from titan_growth.data.corpus import Corpus, CorpusSpec
from titan_growth.data.installed import held_out_of
from titan_growth.data.near_duplicates import NearDuplicates
from titan_growth.tools.errors import DataError


def lines(seed: int, count: int = 200) -> list[str]:
    drawn = random.Random(seed)
    return ["    " * drawn.randrange(4) + f"name_{drawn.randrange(10**9)} = {drawn.random()}" for _ in range(count)]


def text_of(corpus: Corpus) -> list[str]:
    return list(corpus.documents())


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One large package and 60 small ones, of 2 files each, beside what is no text of a package."""
    files = {"large/a.py": lines(1, 4000), "large/b.md": lines(2, 4000), "large/c.so": ["no text"]}
    for number in range(60):
        files[f"small{number}/a.py"], files[f"small{number}/b.rst"] = lines(10 + number, 90), lines(100 + number, 90)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join(content), encoding="utf-8")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    return tmp_path


def test_held_out_packages_are_whole_small_and_not_trained_on(packages: Path) -> None:
    held_out, trained_on = (text_of(open_corpus(CorpusSpec(f"site_packages{end}"))) for end in ("_held_out", ""))
    assert not set(held_out) & set(trained_on)
    assert len(held_out) + len(trained_on) == 122
    assert len(held_out) % 2 == 0
    total = sum(map(len, held_out + trained_on))
    assert 0.02 <= sum(map(len, held_out)) / total < 0.04
    assert "\n".join(lines(1, 4000)) in trained_on
    again = open_corpus(CorpusSpec("site_packages"))
    assert list(again.documents(start=7)) == trained_on[7:]


def test_a_copy_of_held_out_text_is_not_trained_on(packages: Path) -> None:
    copied = text_of(open_corpus(CorpusSpec("site_packages_held_out")))[0]
    (packages / "large" / "vendored.py").write_text(copied + "\nedited = True", encoding="utf-8")
    corpus = open_corpus(CorpusSpec("site_packages"))
    account = corpus.account()
    texts = ["".join(parts) for parts in corpus.document_parts(0, account)]
    assert not any(copied in text for text in texts)
    assert account.left_out["near-duplicates of files before them"].names == ["large/vendored.py"]


def test_what_tells_of_the_environment_is_no_package(packages: Path) -> None:
    """The finder of an editable installation has the path of a checkout in it; pip comes with Python."""
    before = text_of(open_corpus(CorpusSpec("site_packages")))
    (packages / "__editable___mine_0_1_finder.py").write_text("MAPPING = {'mine': '/home/me/mine'}\n", encoding="utf-8")
    (packages / "pip").mkdir()
    (packages / "pip" / "__init__.py").write_text("\n".join(lines(3)), encoding="utf-8")
    assert text_of(open_corpus(CorpusSpec("site_packages"))) == before


def test_nothing_to_hold_out_is_refused(packages: Path) -> None:
    for path in packages.glob("small*/*"):
        path.unlink()
    with pytest.raises(DataError, match=r'none with text can be held out.*Use dataset = "stdlib"'):
        open_corpus(CorpusSpec("site_packages"))


@pytest.mark.parametrize(("edited", "is_new"), [(0, False), (5, False), (20, False), (80, True), (100, True)])
def test_near_duplicates_by_the_share_of_edited_lines(edited: int, is_new: bool) -> None:
    """A changed line changes the five runs that it lies in: 20 spread over 200 lines leave about 57 % of the runs."""
    seen = NearDuplicates()
    original = lines(1)
    assert seen.is_new("\n".join(original))
    changed = list(original)
    for number, place in enumerate(random.Random(edited).sample(range(200), edited)):
        changed[place] = f"changed {number}"
    assert seen.is_new("\n".join(changed)) is is_new


def test_indentation_and_empty_lines_make_no_new_text() -> None:
    seen = NearDuplicates()
    assert seen.is_new("a\nb")
    assert not seen.is_new("\n  a\n\n\tb\n")
    assert seen.is_new("a\nc")


def test_what_is_held_out_does_not_depend_on_order() -> None:
    sizes = {f"p{number}": 100 + number for number in range(300)}
    assert held_out_of(sizes) == held_out_of(dict(reversed(sizes.items())))
    assert held_out_of({"one": 5, "two": 5}) == frozenset()


def test_a_name_that_is_no_utf_8_is_no_obstacle() -> None:
    """Linux gives such bytes as lone surrogates."""
    names = [os.fsdecode(b"na\xffme"), *(f"p{number}" for number in range(200))]
    assert held_out_of(dict.fromkeys(names, 100))
