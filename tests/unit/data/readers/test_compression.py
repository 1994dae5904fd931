"""Compressed files: long windows, bombs, and more than one stream in a file."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from pathlib import Path

import pytest
import zstandard

from tests.unit.data.readers.reading import refusal_of, texts_of
from titan_growth.data.readers import compression
from titan_growth.data.readers.compression import decompressed


def long_window(content: bytes, log: int) -> bytes:
    """What `zstd --long=LOG` writes from a pipe, where the size is unknown."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=log, hash_log=10, chain_log=10)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(content) + compressor.flush()


@pytest.mark.parametrize("log", [27, 28, 31])
def test_a_long_window_is_read(log: int, tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"one ") + long_window(b"two", log))
    assert zstandard.get_frame_parameters(long_window(b"two", log)).window_size == 1 << log
    assert texts_of(path) == ["one two"]


def test_a_long_window_that_the_memory_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "available_bytes", lambda: 1 << 30)
    path = tmp_path / "a.txt.zst"
    path.write_bytes(long_window(b"a", 31))
    assert refusal_of(path) == (
        "a.txt.zst: it was compressed with zstd --long=31, so reading it takes 2.00 GiB of memory, and 1.00 GiB are "
        "free. Free some, or compress it again without --long: zstd -dc --long=31 FILE | zstd -o NEW"
    )
    path.write_bytes(long_window(b"a", 30))
    assert texts_of(path) == ["a"]


BOMB_BYTES = 1 << 27
BOMBS = {".zst": zstandard.compress, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_a_bomb_comes_out_in_small_pieces(suffix: str) -> None:
    stream = decompressed(io.BufferedReader(io.BytesIO(BOMBS[suffix](bytes(BOMB_BYTES), 1))), suffix)  # type: ignore[arg-type]
    raw, total = stream.raw, 0
    while True:
        chunk = next(raw._chunks, None)  # type: ignore[attr-defined]
        if chunk is None:
            break
        assert len(chunk) <= 1 << 26
        total += len(chunk)
    assert total == BOMB_BYTES


@pytest.mark.parametrize("suffix", BOMBS)
def test_streams_one_after_the_other_are_one_text(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(BOMBS[suffix](b"one ") + BOMBS[suffix](b"two"))
    assert texts_of(path) == ["one two"]
    path.write_bytes(BOMBS[suffix](b"one ") + BOMBS[suffix](b"two" * 100)[:-3])
    assert "the compressed data is truncated or damaged" in refusal_of(path)


@pytest.mark.parametrize("suffix", BOMBS)
def test_a_damaged_second_stream_is_not_the_end(suffix: str, tmp_path: Path) -> None:
    """Parallel compressors write many streams. The library's readers of bz2 and xz would leave out the rest."""
    path = tmp_path / f"a.txt{suffix}"
    first, second = BOMBS[suffix](b"one "), BOMBS[suffix](b"two")
    path.write_bytes(first + second)
    assert texts_of(path) == ["one two"]
    for rest in (b"\xff" + second[1:], second[:2], second[:-3], b"garbage"):
        path.write_bytes(first + rest)
        assert "the compressed data is truncated or damaged (" in refusal_of(path)


def test_xz_may_be_padded(tmp_path: Path) -> None:
    content = lzma.compress(b"one ") + bytes(8) + lzma.compress(b"two") + bytes(4)
    (tmp_path / "a.txt.xz").write_bytes(content)
    assert texts_of(tmp_path / "a.txt.xz") == ["one two"]
