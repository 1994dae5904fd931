"""Reading one file as a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from titan_growth.data.account import Account
from titan_growth.data.corpora import open_corpus
from titan_growth.data.corpus import CorpusSpec
from titan_growth.tools.errors import DataError


def texts_of(path: Path, dataset: str = "by extension", start: int = 0, **settings: Any) -> list[str]:
    """The documents of a file or folder, from number `start` on."""
    return list(open_corpus(CorpusSpec(dataset, str(path), **settings)).documents(start))


def account_of(path: Path, dataset: str = "by extension", **settings: Any) -> Account:
    """The account of a file or folder that has been read to its end."""
    corpus = open_corpus(CorpusSpec(dataset, str(path), **settings))
    account = corpus.account()
    for document in corpus.document_parts(0, account):
        for _ in document:
            pass
    return account


def refusal_of(path: Path, dataset: str = "by extension", **settings: Any) -> str:
    """The one line with which a file is refused, without the folder that it is in."""
    with pytest.raises(DataError) as caught:
        texts_of(path, dataset, **settings)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(f"{path}"), message
    return message.removeprefix(f"{path.parent}/")
