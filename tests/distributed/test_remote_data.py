"""Runs whose corpora and tokenizer are named by URLs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec

from tests.harness import WarmRanks
from tests.recipes.bad_data import small_tokenizer
from tests.runs import make_recipe, read_metrics, train, without_timings, write_corpus, write_documents


def test_a_run_by_urls_is_the_run_by_paths(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """Corpus, validation corpus and tokenizer from memory://, then, resumed, from file://: no number changes.

    Each kind has its own cache, empty at first, so both ranks try to prepare and fetch at once.
    """
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes(small_tokenizer())
    files = [tokenizer, write_corpus(tmp_path / "corpus.txt"), write_documents(tmp_path / "held_out.jsonl", 500)]
    memory = fsspec.filesystem("memory")
    for path in files:
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())

    def trained(name: str, root: str, steps: int) -> list[dict[str, Any]]:
        recipe = make_recipe(
            tmp_path / name,
            data__cache_dir=str(tmp_path / f"cache-{root.partition(':')[0].strip('/').replace('/', '-')}"),
            data__tokenizer="auto",
            data__tokenizer_path=f"{root}/tokenizer.json",
            training__dataset_path=f"{root}/corpus.txt",
            training__steps=steps,
            validation__enable=True,
            validation__dataset_path=f"{root}/held_out.jsonl",
            validation__freq=2,
            checkpoint__enable=True,
            checkpoint__interval=2,
            lr_scheduler__decay_ratio=0.0,
        )
        warm_ranks(train, 2, 2, recipe)
        return without_timings(read_metrics(tmp_path / name))

    by_path = trained("path", str(tmp_path), 4)
    assert [line["step"] for line in by_path if "validation_loss" in line] == [2, 4]
    assert trained("urls", "memory://bucket", 2) == [line for line in by_path if line["step"] <= 2]
    assert trained("urls", f"file://{tmp_path}", 4) == by_path
    memory.store.clear()
