"""Damages files of every kind at random and reads them: each is read, or refused with one message.

    python -m tests.faults.fuzz_readers [--cases 5000] [--seed 0]

A case is one small good file with some of its bytes changed, cut, doubled or mixed with another file's. A worker
process reads one after the other; the parent notices one that takes too long or ends the worker. Prints what became of
them; status 1 when anything but a text or a message came of one. Case N of a seed is always the same:

    python -m tests.faults.fuzz_readers --seed 0 --only N
"""

from __future__ import annotations

import argparse
import bz2
import collections
import functools
import gzip
import io
import json
import lzma
import random
import re
import resource
import selectors
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from titan_growth.data.corpora import open_corpus
from titan_growth.data.corpus import CorpusSpec
from titan_growth.data.tokenizers import load_tokenizer, train_sentencepiece
from titan_growth.tools.errors import DataError

LIMIT_SECONDS = 120.0
"""For a case that takes a tenth of a second, on a machine that does other things too."""
_START_SECONDS = 600.0
MEMORY_BYTES = 8 << 30
"""Of the worker's address space. A file of a few KiB that asks for more gets a MemoryError."""
READ, REFUSED, TRACEBACK, HANG, CRASH = "read", "refused", "traceback", "hang", "crash"
ROOT = Path(__file__).parents[2]


@dataclass
class Report:
    """What became of the cases."""

    counts: dict[str, collections.Counter[str]]
    """Kind of file -> outcome -> number."""
    wrong: list[str] = field(default_factory=list)
    """A line for each case that was neither read nor refused."""
    peak_bytes: int = 0
    """Largest resident memory of a worker."""
    slowest_seconds: float = 0.0

    def lines(self) -> list[str]:
        """As a table."""
        outcomes = (READ, REFUSED, TRACEBACK, HANG, CRASH)
        rows = [["file", *outcomes]]
        rows += [[name, *(str(self.counts[name][outcome]) for outcome in outcomes)] for name in sorted(self.counts)]
        total = sum(self.counts.values(), collections.Counter())
        rows.append(["all", *(str(total[outcome]) for outcome in outcomes)])
        facts = f"slowest {self.slowest_seconds:.1f} s, peak memory {self.peak_bytes / 2**20:,.0f} MiB"
        return [*("  ".join(cell.rjust(12) for cell in row) for row in rows), facts, *self.wrong]


# ---- good files ------------------------------------------------------------------------------------------------------

LETTERS = random.Random(0)
TEXTS = ["".join(LETTERS.choices("abcdefghij klmnop é漢", k=300)) for _ in range(12)]


def _json_lines() -> bytes:
    return "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(TEXTS)).encode()


def _table(delimiter: str) -> bytes:
    rows = (delimiter.join((str(number), f'"{text}"')) for number, text in enumerate(TEXTS))
    return "\r\n".join([f"id{delimiter}text", *rows]).encode()


def _parquet(compression: str, *, dictionary: bool) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    columns = {"text": TEXTS, "n": list(range(len(TEXTS))), "more": [{"a": text, "b": [1, 2]} for text in TEXTS]}
    pq.write_table(pa.table(columns), sink, compression=compression, use_dictionary=dictionary, row_group_size=5)
    return sink.getvalue()


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        members = {"a/part.jsonl": _json_lines(), "b/table.csv": _table(","), "picture.jpg": b"\xff\xd8" * 40}
        for number, text in enumerate(TEXTS[:4]):
            members[f"sample{number}.json"] = json.dumps({"text": text}).encode()
            members[f"sample{number}.cls"] = b"1"
        for name, content in {**members, f"{'long/' * 40}é.txt": TEXTS[0].encode()}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def _sentencepiece() -> bytes:
    with tempfile.NamedTemporaryFile(suffix=".txt") as file:
        file.write("\n".join(TEXTS).encode())
        file.flush()
        return train_sentencepiece(open_corpus(CorpusSpec("text", file.name)), 300)


@functools.cache
def good_files() -> dict[str, bytes]:
    """A good file of each kind, small so that every byte counts."""
    import zstandard

    from tests.recipes.bad_data import small_tokenizer  # not at the top: it imports torch, which workers do not need

    text = "\n".join(TEXTS).encode()
    long_window = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, enable_ldm=True)
    return {
        "a.txt": text,
        "a.jsonl": _json_lines(),
        "array.json": json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
        "a.csv": _table(","),
        "a.tsv": _table("\t"),
        "a.tar": _tar(),
        "a.jsonl.gz": gzip.compress(_json_lines(), mtime=0),
        "a.tar.gz": gzip.compress(_tar(), mtime=0),
        "a.txt.bz2": bz2.compress(text),
        "a.jsonl.xz": lzma.compress(_json_lines()),
        "a.jsonl.zst": zstandard.compress(_json_lines()) * 2,
        "long.txt.zst": zstandard.ZstdCompressor(compression_params=long_window).compress(text),
        "snappy.parquet": _parquet("snappy", dictionary=True),
        "gzip.parquet": _parquet("gzip", dictionary=False),
        "zstd.parquet": _parquet("zstd", dictionary=True),
        "plain.parquet": _parquet("none", dictionary=False),
        "tokenizer.json": small_tokenizer(),
        "tokenizer.model": _sentencepiece(),
    }


# ---- damage ----------------------------------------------------------------------------------------------------------

_SPECIAL = [
    *(bytes([byte]) * count for byte in (0, 0x7F, 0x80, 0xFF) for count in (1, 4, 8, 512)),
    b'"',
    b"\\ud800",
    b"[" * 3000,
    b'{"text":' * 3000,
    b"9" * 5000,
    b"\xef\xbb\xbf",
    b"\r",
    b"1e999",
    b"NaN",
]


def damaged(content: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """A file with one to four damages."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(data) + 1)
        length = min(chance.choice((1, 2, 4, 8, 64, 512, 4096)), len(data) - at)
        match chance.randrange(8):
            case 0 if length:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                data[at : at + length] = chance.randbytes(length)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[at : at + length] * chance.choice((1, 2, 20))
            case 5:
                special = chance.choice(_SPECIAL)
                data[at : at + chance.choice((0, len(special)))] = special
            case 6:
                other = chance.choice(others)
                start = chance.randrange(len(other))
                data[at : at + length] = other[start : start + length]
            case _:
                end = data[-chance.randrange(1, 200) :]  # where parquet and xz keep their tables
                for _ in range(chance.randrange(1, 4)):
                    end[chance.randrange(len(end))] = chance.choice((0, 1, 0x7F, 0x80, 0xFF)) if end else 0
                data[len(data) - len(end) :] = end
        if not data:
            break
    return bytes(data)


# ---- the worker ------------------------------------------------------------------------------------------------------


def case_of(seed: int, number: int, folder: Path) -> Path:
    """Writes the file of a case."""
    names = sorted(path.name for path in (folder / "good").iterdir())
    chance = random.Random(f"{seed}-{number}")
    good = {name: (folder / "good" / name).read_bytes() for name in names}
    name = names[number % len(names)]
    path = folder / "case" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(damaged(good[name], list(good.values()), chance))
    return path


def outcome_of(path: Path, number: int) -> tuple[str, str]:
    """Reads a file to its end: (outcome, message)."""
    try:
        if path.name.startswith("tokenizer."):
            tokenizer = load_tokenizer(path)
            tokenizer.decode(tokenizer.encode("some text, é"))
        else:
            on_bad_row = ("stop", "skip")[number // 18 % 2]
            text_key = "{text} {more.a}" if path.suffix == ".parquet" and number % 3 == 0 else "text"
            spec = CorpusSpec("by extension", str(path), text_key=text_key, on_bad_row=on_bad_row, max_bad_rows=5)
            for document in open_corpus(spec).document_parts():
                for part in document:
                    part.encode()
    except DataError as error:
        message = str(error)
        is_one_line = message.isprintable() and len(message) < 3000 and path.name in message
        return (REFUSED if is_one_line else TRACEBACK), message
    except BaseException:
        return TRACEBACK, traceback.format_exc()
    return READ, ""


def work(seed: int, first: int, end: int, folder: Path) -> None:
    """Plays cases and prints a line for each: it begins, and what came of it."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for number in range(first, end):
        path = case_of(seed, number, folder)
        print(json.dumps({"begins": path.name}), flush=True)
        outcome, message = outcome_of(path, number)
        peak = _peak_bytes()
        print(json.dumps({"outcome": outcome, "message": message, "peak": peak}), flush=True)


def _peak_bytes() -> int:
    """Of this process alone: getrusage counts what its parent had, too."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


# ---- the parent ------------------------------------------------------------------------------------------------------


def fuzz(num_cases: int, seed: int, folder: Path) -> Report:
    """Plays cases 0 to `num_cases`."""
    (folder / "good").mkdir(parents=True)
    for name, content in good_files().items():
        (folder / "good" / name).write_bytes(content)
    report = Report(collections.defaultdict(collections.Counter))
    number = 0
    while number < num_cases:
        number = _play(seed, number, num_cases, folder, report)
    return report


def _play(seed: int, first: int, end: int, folder: Path, report: Report) -> int:
    """Plays cases in one worker, until it hangs or dies; returns the next case."""
    command = [sys.executable, "-m", "tests.faults.fuzz_readers", "--worker", str(first), str(end)]
    worker = subprocess.Popen(
        [*command, "--seed", str(seed), "--folder", str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert worker.stdout is not None
    number, name, since = first, "", time.monotonic()
    with worker, selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        while number < end:
            limit = LIMIT_SECONDS if name else _START_SECONDS
            line = worker.stdout.readline() if selector.select(limit) else b"hang"
            if not line.startswith(b"{"):
                worker.kill()
                outcome = HANG if line == b"hang" else CRASH
                report.counts[name][outcome] += 1
                report.wrong.append(f"{outcome}: case {number} ({name})")
                return number + 1
            found = json.loads(line)
            if "begins" in found:
                name, since = found["begins"], time.monotonic()
                continue
            report.slowest_seconds = max(report.slowest_seconds, time.monotonic() - since)
            report.peak_bytes = max(report.peak_bytes, found["peak"])
            report.counts[name][found["outcome"]] += 1
            if found["outcome"] == TRACEBACK:
                report.wrong.append(f"{TRACEBACK}: case {number} ({name}): {found['message']}")
            number += 1
    return number


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="play one case here and show its message")
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.worker:
        work(words.seed, *words.worker, words.folder)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report = fuzz(words.cases if words.only is None else 0, words.seed, folder / "fuzz")
        if words.only is not None:
            print(*outcome_of(case_of(words.seed, words.only, folder / "fuzz"), words.only))
            return 0
    print("\n".join(report.lines()))
    return bool(report.wrong)


if __name__ == "__main__":
    sys.exit(main())
