"""Reports about what becomes of a corpus: special tokens, tiny sources, vocabularies, and where its files lie."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import tokenizers

from tests.reported.corpora import split_of, write_jsonl
from tests.runs import make_recipe
from titan_growth.data.blocks import BlockDataset
from titan_growth.data.corpus import CorpusSpec
from titan_growth.data.preparation import prepare
from titan_growth.data.prepared import TokenSplit
from titan_growth.data.tokenizers import BytesTokenizer, HuggingFaceTokenizer
from titan_growth.run.data import prepare_run_data
from titan_growth.run.inputs import changes_since
from titan_growth.tools.errors import DataError

BOS, EOS = BytesTokenizer.bos_id, BytesTokenizer.eos_id


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TITAN_GROWTH_CACHE", str(tmp_path / "cache"))


def documents_of(split: TokenSplit) -> list[list[int]]:
    starts = split.document_starts(0, split.num_tokens).tolist()
    tokens = split.read(0, split.num_tokens).tolist()
    return [tokens[start:stop] for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True)]


def tokenizer_that_adds_bos(folder: Path) -> HuggingFaceTokenizer:
    """As Llama's and Mistral's: the post-processor puts BOS before every text."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "one": 3, "two": 4}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.add_special_tokens(["<s>", "</s>"])
    assert made.encode("one two").ids == [0, 3, 4]
    folder.mkdir()
    (folder / "tokenizer.json").write_text(made.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return HuggingFaceTokenizer(folder)


def test_levanter_574_a_tokenizer_that_adds_bos_itself(tmp_path: Path) -> None:
    tokenizer = tokenizer_that_adds_bos(tmp_path / "tokenizer")
    write_jsonl(tmp_path / "corpus" / "a.jsonl", ["one two", "two"])
    spec = CorpusSpec("json", str(tmp_path / "corpus"))
    with_bos = prepare(spec, tokenizer, bos=True, eos=True, validation_fraction=0.0).train
    assert documents_of(with_bos) == [[0, 3, 4, 1], [0, 4, 1]]
    without = prepare(spec, tokenizer, bos=False, eos=True, validation_fraction=0.0).train
    assert documents_of(without) == [[3, 4, 1], [4, 1]]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_datatrove_345_asking_for_eos_does_not_drop_bos(bos: bool, eos: bool, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus" / "a.jsonl", ["ab", "c"])
    split = split_of(tmp_path / "corpus", bos=bos, eos=eos)
    assert documents_of(split) == [[BOS] * bos + text + [EOS] * eos for text in ([97, 98], [99])]


def test_marin_5034_a_cache_without_bos_is_another_corpus(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus" / "a.jsonl", ["some text " * 50])
    made = {}
    for bos in (True, False, True):
        recipe = make_recipe(tmp_path / "run", training__dataset_path=str(tmp_path / "corpus"), data__bos=bos)
        made[bos] = prepare_run_data(recipe, 258, progress=False)
        assert (made[bos].corpus.train.read(0, 1).tolist() == [BOS]) == bos
    assert made[True].corpus.folder != made[False].corpus.folder


def test_megatron_705_a_tiny_source_is_used_up(tmp_path: Path) -> None:
    for name, text in {"a": "large source " * 40, "m": "#", "z": "another large source " * 40}.items():
        write_jsonl(tmp_path / "corpus" / f"{name}.jsonl", [text])
    blocks = BlockDataset(split_of(tmp_path / "corpus"), 8, document_mask=False, seed=0, shuffle=True)
    for epoch in range(5):
        tokens = [blocks[epoch * blocks.num_blocks + at]["input"].tolist() for at in range(blocks.num_blocks)]
        assert sum(row.count(ord("#")) for row in tokens) == 1, "once an epoch, in each epoch"


def test_lit_llama_306_more_tokens_than_the_model_has_rows(tmp_path: Path) -> None:
    tokenizer = tokenizer_that_adds_bos(tmp_path / "tokenizer")
    write_jsonl(tmp_path / "corpus" / "a.jsonl", ["one two " * 50])
    words = {"training__dataset_path": str(tmp_path / "corpus"), "data__tokenizer": "huggingface"}
    recipe = make_recipe(tmp_path / "run", **words, data__tokenizer_path=str(tmp_path / "tokenizer"))
    with pytest.raises(DataError, match=r"has 5 tokens, more than the model's vocabulary of 4\. Raise the model's"):
        prepare_run_data(recipe, 4, progress=False)
    assert tokenizer.vocab_size == 5
    assert prepare_run_data(recipe, 5, progress=False).corpus.train.num_tokens > 0


def test_olmo_core_617_the_corpus_has_moved_since(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "here" / "corpus" / "a.jsonl", ["some text " * 50])

    def data_at(folder: Path) -> dict[str, str]:
        recipe = make_recipe(tmp_path / "run", training__dataset_path=str(folder))
        return prepare_run_data(recipe, 258, progress=False).fingerprints()

    before = data_at(source.parent)
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(source.parent, moved)
    os.utime(moved / source.name, (1, 1))
    shutil.rmtree(source.parent)
    assert changes_since(before, data_at(moved), "step-4").problems == []
    (moved / source.name).write_text((moved / source.name).read_text().replace("some", "same"))
    (problem,) = changes_since(before, data_at(moved), "step-4").problems
    assert "was trained with another corpus" in str(problem)


def test_veomni_330_order_of_the_files_in_a_folder(tmp_path: Path) -> None:
    names = ["b.jsonl", "a.jsonl", "c/a.jsonl", "B.jsonl", "c/z.jsonl", "10.jsonl", "9.jsonl"]
    streams = []
    for folder, order in ((tmp_path / "one", names), (tmp_path / "other", names[::-1])):
        for name in order:
            write_jsonl(folder / "corpus" / name, [f"text of {name}"])
        streams.append(documents_of(split_of(folder / "corpus")))
    assert streams[0] == streams[1]
    texts = [BytesTokenizer().decode(document) for document in streams[0]]
    assert texts == [f"text of {name}" for name in sorted(names)]
