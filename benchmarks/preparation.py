"""How fast a corpus is prepared, against the rate of the `tokenizers` library alone on the same text.

    python -m benchmarks.preparation [FILE TOKENIZER_FOLDER] [--mb 16] [--repeats 5] [--cores 1 2] [--memory-mb 200]

FILE is a text file, TOKENIZER_FOLDER has a tokenizer.json. Without them the text is the source of Python's standard
library, repeated with other names in it until it is long enough, and a byte-level BPE of 8,000 tokens is trained on it.

**Rate.** On each number of cores, in turns and in processes of their own: the library encodes the text, from memory, in
pieces of 64 Ki characters, all at once, with the fastest call it has; and the text is prepared as one document, from
the file to shards on the disk with 1% held out, hashes and all. The ratio of the medians must be `LEAST_RATIO` or more.

**Memory.** One document of --memory-mb megabytes is prepared on all of those cores. The peak of the whole process must
be below `MOST_MB`. Nothing else may run meanwhile. Writes `benchmarks/results/preparation.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "preparation.md"
LEAST_RATIO = 0.9
MOST_MB = 400
PIECE_CHARS = 1 << 16
VOCAB_SIZE = 8000
SIDES = ("library", "preparation")


def library(text_file: Path, tokenizer_folder: Path) -> float:
    """Seconds of encoding a text in pieces."""
    import tokenizers

    text = text_file.read_text(encoding="utf-8")
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    began = time.perf_counter()
    pieces = [text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS)]
    num_tokens = sum(len(one.ids) for one in tokenizer.encode_batch_fast(pieces, add_special_tokens=False))
    assert num_tokens > 0
    return time.perf_counter() - began


def preparation(text_file: Path, tokenizer_folder: Path) -> float:
    """Seconds of preparing a text."""
    from titan_growth.data.corpus import CorpusSpec
    from titan_growth.data.preparation import prepare
    from titan_growth.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    with tempfile.TemporaryDirectory(dir=text_file.parent) as cache:
        began = time.perf_counter()
        corpus = CorpusSpec("text", str(text_file))
        prepare(corpus, tokenizer, bos=False, eos=False, validation_fraction=0.01, cache_dir=Path(cache))
        return time.perf_counter() - began


def measured(side: str, num_cores: int, text_file: Path, tokenizer_folder: Path) -> dict[str, float]:
    """Seconds and peak memory in MB of one side, in a process of its own on that many cores."""
    command = [sys.executable, "-m", "benchmarks.preparation", str(text_file), str(tokenizer_folder)]
    done = subprocess.run(
        [*command, "--side", side, "--cores", str(num_cores)], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def _measure_here(side: str, num_cores: int, text_file: Path, tokenizer_folder: Path) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_cores])  # before the library counts cores
    seconds = {"library": library, "preparation": preparation}[side](text_file, tokenizer_folder)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps({"seconds": seconds, "peak_mb": peak_mb}))


def write_text(path: Path, num_bytes: int) -> None:
    """Python's standard library, over and over, with other names each time."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = [path.read_bytes() for path in sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py"))]
    text = b"\n".join(source for source in sources if source.isascii())
    with open(path, "wb") as file:
        number = 0
        while file.tell() < num_bytes:
            renamed = text.replace(b"self", b"me%d" % number).replace(b"name", b"label%d" % number)
            file.write(renamed[: num_bytes - file.tell()])
            number += 1


def write_tokenizer(folder: Path, text_file: Path) -> None:
    """A byte-level BPE, trained on the first megabytes of the text."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    with open(text_file, encoding="utf-8") as file:
        tokenizer.train_from_iterator(file.read(4_000_000).splitlines(keepends=True), trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))


def page(rows: Sequence[Sequence[object]], peak_mb: float | None, memory_mb: int, mb: float, what: str) -> str:
    """The result's page."""
    lines = [
        "# Preparation",
        "",
        f"`python -m benchmarks.preparation`: {what}, {mb:.1f} MB as one document; medians, sides in turns.",
        f"The library encodes pieces of {PIECE_CHARS:,} characters from memory; preparation goes from the file to",
        "shards on the disk.",
        "",
        "| cores | library, MB/s | preparation, MB/s | ratio | peak memory, MB |",
        "| ---: | ---: | ---: | ---: | ---: |",
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
        "",
        f"The ratio is to be at least {LEAST_RATIO}.",
    ]
    if peak_mb is not None:
        lines += ["", f"One document of {memory_mb} MB: peak memory {peak_mb:.0f} MB, to be below {MOST_MB}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measures both sides; returns 1 if a figure is beyond its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("tokenizer_folder", nargs="?", type=Path)
    parser.add_argument("--mb", type=int, default=16, help="length of the text where no file is named")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--memory-mb", type=int, default=200, help="0 leaves that part out")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        _measure_here(args.side, args.cores[0], args.file, args.tokenizer_folder)
        return 0
    if (args.file is None) != (args.tokenizer_folder is None):
        parser.error("name a file and a tokenizer folder, or neither")
    with tempfile.TemporaryDirectory() as folder:
        what = "the text of a file" if args.file else "the source of Python's library, with varying names"
        text_file, tokenizer_folder = args.file, args.tokenizer_folder
        if text_file is None:
            text_file, tokenizer_folder = Path(folder, "text.txt"), Path(folder, "tokenizer")
            write_text(text_file, args.mb * 10**6)
            write_tokenizer(tokenizer_folder, text_file)
        mb = text_file.stat().st_size / 1e6
        rows, is_good = [], True
        for num_cores in args.cores:
            found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
            for _ in range(args.repeats):
                for side in SIDES:
                    found[side].append(measured(side, num_cores, text_file, tokenizer_folder))
            rates = {side: mb / median(one["seconds"] for one in found[side]) for side in SIDES}
            ratio, peak = rates["preparation"] / rates["library"], max(one["peak_mb"] for one in found["preparation"])
            rows.append([num_cores, *(f"{rates[side]:.2f}" for side in SIDES), f"{ratio:.2f}", f"{peak:.0f}"])
            is_good &= ratio >= LEAST_RATIO
            print(*rows[-1], flush=True)
        peak_mb = None
        if args.memory_mb:
            long_file = Path(folder, "long.txt")
            write_text(long_file, args.memory_mb * 10**6)
            peak_mb = measured("preparation", max(args.cores), long_file, tokenizer_folder)["peak_mb"]
            is_good &= peak_mb < MOST_MB
        text = page(rows, peak_mb, args.memory_mb, mb, what)
    args.out.write_text(text)
    print(text)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
