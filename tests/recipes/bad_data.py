"""Bad corpora, tokenizers and caches."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.recipes.bad_inputs import Case, Setup

TEXT = "the model grows from a few layers into many and goes on learning\n" * 200


def writes(name: str, content: bytes | Callable[[], bytes]) -> Setup:
    """Puts a file into the case's folder."""

    def setup(folder: Path, _: ExitStack) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content())

    return setup


def makes_folder(name: str) -> Setup:
    """Makes an empty folder."""
    return lambda folder, _: (folder / name).mkdir()


def _parquet() -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": [TEXT] * 5}), file)
    return file.getvalue()[:-300]


def _tar() -> bytes:
    import io
    import tarfile

    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = len(TEXT)
        archive.addfile(info, io.BytesIO(TEXT.encode()))
    return file.getvalue()[:5000]


def _word_tokenizer(num_words: int = 600) -> bytes:
    words = {f"word{number}": number for number in range(num_words)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "word0"}
    table = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    return json.dumps({**nothing, **table}).encode()


def small_tokenizer() -> bytes:
    """A byte-level tokenizer.json as small as the bytes tokenizer, with BOS and EOS, of other tokens."""
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=258, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([], trainer)
    return model.to_str().encode()


def _loop(folder: Path, _: ExitStack) -> None:
    (folder / "loop.txt").symlink_to("loop.txt")


def _links_back(folder: Path, _: ExitStack) -> None:
    (folder / "hollow").mkdir()
    (folder / "hollow" / "again").symlink_to("..")


LINE = json.dumps({"text": TEXT}).encode() + b"\n"
AUTO = '[data]\ntokenizer = "auto"\n'

CORPUS = [
    Case("corpus missing", r"nowhere\.txt: does not exist\. Set", flags="--training.dataset_path nowhere.txt"),
    Case("corpus glob without a match", r"the glob matches no file", flags="--training.dataset_path 'no*.txt'"),
    Case(
        "corpus file empty",
        r"empty\.txt: empty \(0 bytes",
        flags="--training.dataset_path empty.txt",
        setup=writes("empty.txt", b""),
    ),
    Case(
        "corpus folder empty",
        r"hollow: no file of a known kind",
        flags="--training.dataset_path hollow",
        setup=makes_folder("hollow"),
    ),
    Case(
        "corpus of an unknown kind",
        r"a\.pdf: no file of a known kind",
        flags="--training.dataset_path a.pdf",
        setup=writes("a.pdf", b"%PDF"),
    ),
    Case(
        "corpus only line breaks",
        r"the train split has 4 tokens, fewer than one block of seq_len \+ 1 = 33",
        flags="--training.dataset_path a.txt",
        setup=writes("a.txt", b"\n\n"),
    ),
    Case(
        "corpus not UTF-8",
        r"a\.txt: byte offset 3 is not valid UTF-8",
        flags="--training.dataset_path a.txt",
        setup=writes("a.txt", b"abc\xff" * 9),
    ),
    Case(
        "corpus link in a circle",
        r"loop\.txt: does not exist \(links to nothing: loop\.txt\)\. Set",
        flags="--training.dataset_path loop.txt",
        setup=_loop,
    ),
    Case(
        "corpus path too long",
        r"a{20}.*: cannot be read \(File name too long\)",
        flags=f"--training.dataset_path {'a' * 300}.txt",
    ),
    Case(
        "JSON line broken",
        r"a\.jsonl:2: broken JSON",
        flags="--training.dataset_path a.jsonl",
        setup=writes("a.jsonl", LINE + b'{"text": \n'),
    ),
    Case(
        "JSON without the key",
        r"a\.jsonl:1: no field 'body'; it has: text",
        flags="--training.dataset_path a.jsonl --data.text_key body",
        setup=writes("a.jsonl", LINE),
    ),
    Case(
        "JSON array cut off",
        r"a\.json: element 2: broken JSON",
        flags="--training.dataset_path a.json",
        setup=writes("a.json", b'[{"text": "a"}, {"text": "b"\n'),
    ),
    Case(
        "JSON array of strings",
        r"a\.json: element 1: str instead of an object",
        flags="--training.dataset_path a.json",
        setup=writes("a.json", b'["a", "b"]\n'),
    ),
    Case(
        "JSON text is an integer of 5,000 digits",
        r"a\.jsonl:1: the field 'text' is float, not a string",
        flags="--training.dataset_path a.jsonl",
        setup=writes("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n"),
    ),
    Case(
        "JSON without the nested key",
        r"a\.jsonl:1: no field 'data\.body'; it has: data\.text\. Set data\.text_key",
        flags="--training.dataset_path a.jsonl --data.text_key data.body",
        setup=writes("a.jsonl", b'{"data": {"text": "a"}}\n'),
    ),
    Case(
        "text key is no template",
        r"data\.text_key: '\{title' is no template: .*Name a field",
        flags="--data.text_key '{title'",
    ),
    Case(
        "more bad rows than allowed",
        r"a\.jsonl:3: broken JSON .*this is bad row 2, and data\.max_bad_rows is 1\. .*raise data\.max_bad_rows",
        flags="--training.dataset_path a.jsonl --data.on_bad_row skip --data.max_bad_rows 1",
        setup=writes("a.jsonl", LINE + b'{"text": null}\n{\n'),
    ),
    Case(
        "every row is bad",
        r"holds no text to train on \(left out, rows without text: a\.jsonl:1 \(.*\)\. Use another",
        flags="--training.dataset_path a.jsonl --data.on_bad_row skip",
        setup=writes("a.jsonl", b'{"text": null}\n'),
    ),
    Case(
        "table without the column",
        r"a\.csv:1: no field 'text'; it has: id, body\. Set data\.text_key",
        flags="--training.dataset_path a.csv",
        setup=writes("a.csv", b"id,body\n1,a\n"),
    ),
    Case(
        "table with a quote that does not end",
        r"a\.csv:2: the row that begins here is broken",
        flags="--training.dataset_path a.csv",
        setup=writes("a.csv", b'text\n"a\nb\n'),
    ),
    Case(
        "tar truncated",
        r"a\.tar: .*(truncated|unexpected end of data)",
        flags="--training.dataset_path a.tar",
        setup=writes("a.tar", _tar),
    ),
    Case(
        "HTML by its extension",
        r"page\.html: no file of a known kind \(HTML or XML \(extract its text first",
        flags="--training.dataset_path page.html",
        setup=writes("page.html", b"<html><p>text</p></html>"),
    ),
    Case(
        "HTML that is called text",
        r"a\.txt: holds HTML or XML, not plain text\. Extract its text first",
        flags="--training.dataset_path a.txt",
        setup=writes("a.txt", b"<!DOCTYPE html>\n<html><p>text</p></html>"),
    ),
    Case(
        "folder of links that lead back",
        r"hollow: no file of a known kind \(links back to a folder that they lie in: again\)",
        flags="--training.dataset_path hollow",
        setup=_links_back,
    ),
    Case(
        "JSON text is a number",
        r"the field 'text' is int, not a string",
        flags="--training.dataset_path a.jsonl",
        setup=writes("a.jsonl", b'{"text": 3}\n'),
    ),
    Case(
        "gzip truncated",
        r"a\.txt\.gz: the compressed data is truncated",
        flags="--training.dataset_path a.txt.gz",
        setup=writes("a.txt.gz", gzip.compress(TEXT.encode())[:-20]),
    ),
    Case(
        "gzip that is none",
        r"a\.txt\.gz: the compressed data is truncated or damaged \(Not a gzipped file",
        flags="--training.dataset_path a.txt.gz",
        setup=writes("a.txt.gz", b"plain text\n" * 99),
    ),
    Case(
        "parquet truncated",
        r"a\.parquet: truncated or not a parquet file",
        flags="--training.dataset_path a.parquet",
        setup=writes("a.parquet", _parquet),
    ),
    Case(
        "corpus shorter than a sequence",
        r"the train split has 12 tokens, fewer than one block of seq_len \+ 1 = 33; use a shorter",
        flags="--training.dataset_path a.txt",
        setup=writes("a.txt", b"ten bytes."),
    ),
    Case(
        "validation split too short",
        r"validation: .*raise data\.validation_fraction",
        toml="[validation]\nenable = true\nseq_len = 9000",
    ),
    Case(
        "validation corpus missing",
        r"nowhere\.txt: does not exist",
        toml='[validation]\nenable = true\ndataset_path = "nowhere.txt"',
    ),
    Case(
        "corpus URL: unknown scheme",
        r"training\.dataset_path: nope://bucket/a\.txt: unknown scheme 'nope'.*\. Use a path",
        flags="--training.dataset_path nope://bucket/a.txt",
    ),
    Case(
        "corpus URL: nothing there",
        r"training\.dataset_path: file:///nowhere/a\.txt: does not exist\. Name",
        flags="--training.dataset_path file:///nowhere/a.txt",
    ),
    Case(
        "validation corpus URL: no match",
        r"validation\.dataset_path: file:///nowhere/\*\.txt: the glob matches no file",
        toml='[validation]\nenable = true\ndataset_path = "file:///nowhere/*.txt"',
    ),
    Case("format without a path", r"dataset 'json': needs files to read", raw=b'[training]\ndataset = "json"\n'),
    Case(
        "Hugging Face out of reach",
        r"dataset 'c4': cannot be loaded from the Hugging Face hub.*stdlib",
        raw=b'[training]\ndataset = "c4"\n',
    ),
    Case(
        "dataset is not a name",
        r"dataset '/etc/passwd': cannot be loaded",
        raw=b'[training]\ndataset = "/etc/passwd"\n',
    ),
]

TOKENIZER = [
    Case(
        "tokenizer URL: nothing there",
        r"data\.tokenizer_path: file:///nowhere/a\.json: does not exist\. Check the URL",
        toml=AUTO + 'tokenizer_path = "file:///nowhere/a.json"',
    ),
    Case(
        "tokenizer missing", r"tokenizer .*nowhere\.json: does not exist", toml=AUTO + 'tokenizer_path = "nowhere.json"'
    ),
    Case(
        "tokenizer folder empty",
        r"the folder holds no tokenizer\.json",
        toml=AUTO + 'tokenizer_path = "hollow"',
        setup=makes_folder("hollow"),
    ),
    Case(
        "tokenizer.json that is none",
        r"a\.json: not a Hugging Face tokenizer\.json",
        toml=AUTO + 'tokenizer_path = "a.json"',
        setup=writes("a.json", b"{}"),
    ),
    Case(
        "tokenizer.model that is none",
        r"a\.model: not a SentencePiece model",
        toml=AUTO + 'tokenizer_path = "a.model"',
        setup=writes("a.model", b"nonsense"),
    ),
    Case("tokenizer of an unknown kind", r"its kind cannot be told", toml=AUTO + 'tokenizer_path = "corpus.txt"'),
    Case(
        "tokenizer larger than the model",
        r"it has 600 tokens, more than the model's vocabulary of 258",
        toml=AUTO + 'tokenizer_path = "a.json"',
        setup=writes("a.json", _word_tokenizer),
    ),
    Case(
        "tokenizer without BOS",
        r"it has no BOS token\. .*data\.bos = false",
        toml=AUTO + 'tokenizer_path = "a.json"\n[model]\nvocab_size = 600',
        setup=writes("a.json", _word_tokenizer),
    ),
    Case(
        "bytes tokenizer with a path", r"data\.tokenizer_path: conflicts with", toml='[data]\ntokenizer_path = "a.json"'
    ),
    Case(
        "tokenizer larger than the corpus allows",
        r"too small for a vocab_size of 100,000\. The largest possible is \d+",
        toml=AUTO + "[model]\nvocab_size = 100000",
    ),
    Case(
        "vocabulary too small to train",
        r"vocab_size 100 is too small\. Use at least 262",
        toml=AUTO + "[model]\nvocab_size = 100",
    ),
    Case(
        "vocabulary smaller than bytes",
        r"it has 258 tokens, more than the model's vocabulary of 100",
        toml="[model]\nvocab_size = 100",
    ),
    Case(
        "assets folder missing",
        r"tokenizer .*nowhere: does not exist",
        toml=AUTO + '[model]\nhf_assets_path = "nowhere"',
    ),
]

CACHE = [
    Case(
        "cache is a file",
        r"cache .*corpus\.txt: cannot be written \(.*data\.cache_dir",
        toml='[data]\ncache_dir = "corpus.txt"',
    ),
    Case(
        "cache at a URL",
        r"data\.cache_dir: s3://bucket/cache is a URL, but .*Name a folder",
        toml='[data]\ncache_dir = "s3://bucket/cache"',
    ),
    Case(
        "cache at a URL of the environment",
        r"TITAN_GROWTH_CACHE: memory://cache is a URL, but .*Name a folder",
        environ={"TITAN_GROWTH_CACHE": "memory://cache"},
    ),
    Case(
        "cache under a file",
        r"cache .*: cannot be written \(Not a directory\)",
        environ={"TITAN_GROWTH_CACHE": "corpus.txt/cache"},
    ),
    Case("cache not writable", r"cache .*: cannot be written", environ={"TITAN_GROWTH_CACHE": "/proc/cache"}),
]

CASES = CORPUS + TOKENIZER + CACHE
