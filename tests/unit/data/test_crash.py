"""Preparation by processes that are killed, and by several at once. Every process here is a real one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import titan_growth

ROOT = Path(titan_growth.__file__).parents[1]

# argv: cache, corpus, what to die at ("append", "replace", "commit"; "" for not at all), at which call of it.
PROGRAM = """
import logging, os, signal, sys
from pathlib import Path
from titan_growth.data import preparation, shard_writer, windows
from titan_growth.data.corpus import CorpusSpec
from titan_growth.data.tokenizers import TokenizerSpec

logging.basicConfig(level=logging.INFO, format="%(message)s")
cache, corpus, event, count = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])

def dying(function, target=None):
    def wrapper(*arguments):
        global count
        count -= target is None or Path(arguments[1]).name == target
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return wrapper

if event:
    preparation._BATCH_WINDOWS = 3  # many small batches, so that there is something to die between
windows.WHOLE_CHARS, windows.SEGMENT_CHARS = 10_000, 5_000  # so that the long documents are many windows
if event == "append":
    shard_writer.SplitWriter.append = dying(shard_writer.SplitWriter.append)
if event == "replace":
    os.replace = dying(os.replace, "journal.json")
if event == "commit":
    os.replace = dying(os.replace, "meta.json")
ready, go = Path(corpus + ".ready"), Path(corpus + ".go")
ready.with_name(f"{ready.name}{os.getpid()}").touch()
while not go.exists():
    pass
preparation.prepare(
    CorpusSpec("c4", corpus), TokenizerSpec("bytes"), bos=True, eos=True, validation_fraction=0.1,
    cache_dir=cache, shard_tokens=5_000,
)
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Short documents, an empty one, long ones that are cut, in a few files; about 250 KB."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = [f"document {number} " + "word " * (number % 40) for number in range(400)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, ""]))
    for name in ("b.txt", "c.txt"):
        (folder / name).write_text("".join(f"{name} line {number}\n" for number in range(6000)))
    (tmp_path / "corpus.go").touch()
    return folder


def start(cache: Path, corpus: Path, event: str = "", count: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(cache), str(corpus), event, str(count)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def content(cache: Path) -> dict[str, bytes]:
    """The files of the one prepared folder."""
    folders = [path for path in (cache / "prepared").iterdir() if path.is_dir()]
    assert len(folders) == 1
    return {path.name: path.read_bytes() for path in folders[0].iterdir()}


def finish(process: subprocess.Popen[str]) -> str:
    log = process.communicate(timeout=60)[1]
    assert process.returncode == 0, log
    return log


def test_killed_preparations_end_with_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    finish(start(tmp_path / "whole", corpus))
    expected = content(tmp_path / "whole")
    assert {"meta.json", "train-00010.bin", "validation-00000.bin", "train.idx"} <= set(expected)
    assert "journal.json" not in expected

    # In one cache, one death after another: before anything is safe, between journals, while a journal is being put in
    # place, and in the middle of a cut document.
    killed, resumed_at = tmp_path / "killed", []
    deaths = [
        ("append", 30),
        ("append", 150),
        ("replace", 2),
        ("append", 190),
        ("replace", 3),
        ("append", 25),
        ("replace", 2),
    ]
    for event, count in deaths:
        process = start(killed, corpus, event, count)
        log = process.communicate(timeout=60)[1]
        assert process.returncode == -signal.SIGKILL, log
        assert "meta.json" not in content(killed)
        resumed_at += [int(line.split()[-1]) for line in log.splitlines() if line.startswith("continuing")]
    assert resumed_at == sorted(resumed_at)
    assert len(set(resumed_at)) >= 3
    assert resumed_at[-1] >= 401
    log = finish(start(killed, corpus))
    assert "continuing an interrupted preparation" in log
    assert content(killed) == expected


def test_death_before_the_commit_mark_is_not_taken_for_finished(corpus: Path, tmp_path: Path) -> None:
    finish(start(tmp_path / "whole", corpus))
    process = start(tmp_path / "killed", corpus, "commit", 1)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    left = content(tmp_path / "killed")
    assert "meta.json" not in left
    assert "tokenizer.bytes" in left
    finish(start(tmp_path / "killed", corpus))
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_damaged_journal_or_shard_means_starting_over(corpus: Path, tmp_path: Path) -> None:
    finish(start(tmp_path / "whole", corpus))
    for number, damage in enumerate((b"{", None)):
        cache = tmp_path / f"cache{number}"
        start(cache, corpus, "append", 400).communicate(timeout=60)
        journal = next(cache.glob("prepared/*/journal.json"))
        if damage is None:
            os.truncate(journal.with_name("train-00000.bin"), 10)
        else:
            journal.write_bytes(damage)
        assert "cannot be continued" in finish(start(cache, corpus))
        assert content(cache) == content(tmp_path / "whole")


def test_processes_at_once_do_the_work_once(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.go").unlink()
    processes = [start(tmp_path / "cache", corpus) for _ in range(3)]
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("corpus.ready*"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (tmp_path / "corpus.go").touch()
    logs = [finish(process) for process in processes]
    assert sum("preparing " in log for log in logs) == 1
    assert sum("prepared " in log for log in logs) == 1
    finish(start(tmp_path / "whole", corpus))
    assert content(tmp_path / "cache") == content(tmp_path / "whole")
