"""Tokenizers of exported models: `AutoTokenizer` encodes as the run did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks
from tests.hugging_face import edit_config
from tests.runs import make_recipe, train
from tests.unit.data.torchtitan_assets import write_debug_tokenizer
from titan_growth.checkpoint.folder import StepFolder, open_step
from titan_growth.checkpoint.history import Progress
from titan_growth.checkpoint.manifest import Manifest
from titan_growth.commands.export import export_folder
from titan_growth.commands.import_ import main as import_main
from titan_growth.data.corpora import open_corpus
from titan_growth.data.corpus import CorpusSpec
from titan_growth.data.storage import cache_root
from titan_growth.data.tokenizers import BytesTokenizer, Tokenizer, TokenizerSpec, load_or_train, load_tokenizer
from titan_growth.interchange.tokenizer_files import checked_assets, copy_assets, tokenizer_of

TEXTS = ["the model grows\n\n\tfrom 1234 layers ", "  indented, gr\u00fcn \u4f60\u597d \U0001f9ea", "a"]


def _exported(run: Path, target: Path, corpus: Path, **settings: Any) -> Path:
    shutil.copy(corpus, run.parent / "corpus.txt")
    recipe = make_recipe(run, training__steps=1, checkpoint__enable=True, **settings)
    run_ranks(train, 1, 1, recipe)
    print(export_folder(run / "checkpoint" / "step-1", target))
    return target


def _same_tokens(folder: Path, ours: Tokenizer, *, bos: bool = True) -> None:
    import transformers

    exported = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        expected = ours.encode(text)
        assert exported(text, add_special_tokens=False).input_ids == expected
        assert exported(text).input_ids == ([ours.bos_id, *expected] if bos else expected)
        assert exported.decode(expected) == ours.decode(expected)
    assert (exported.bos_token_id, exported.eos_token_id) == (ours.bos_id, ours.eos_id)
    table = json.loads((folder / "config.json").read_text())
    assert (table["bos_token_id"], table["eos_token_id"]) == (ours.bos_id, ours.eos_id)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    lines = (f"the model {number} grows from {number * 7} layers\t gr\u00fcn" for number in range(3000))
    path.write_text("\n".join(lines))
    return path


def test_a_tokenizer_that_was_trained_on_the_corpus(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is found in the cache without the corpus, and AutoTokenizer encodes the same."""
    settings = {"data__tokenizer": "sentencepiece", "model__vocab_size": 320}
    out = _exported(tmp_path / "run", tmp_path / "out", corpus, **settings)
    ours = load_or_train(
        TokenizerSpec("auto", vocab_size=320), open_corpus(CorpusSpec("stdlib", str(tmp_path / "corpus.txt"))), None
    )
    _same_tokens(out, ours)
    assert (out / "tokenizer.model").read_bytes() == ours.files()["tokenizer.model"]
    shutil.rmtree(cache_root() / "tokenizers")
    capsys.readouterr()
    print(export_folder(tmp_path / "run" / "checkpoint" / "step-1", tmp_path / "without"))
    assert "without tokenizer: the recipe names none, and the one it trained is not in the cache" in (
        capsys.readouterr().out
    )


def test_a_tokenizer_json(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tokenizer folder is copied; another tokenizer in its place is noticed."""
    import transformers

    # The export of the bytes tokenizer serves as a third party's tokenizer.json.
    run_ranks(train, 1, 1, make_recipe(tmp_path / "bytes", training__steps=1, checkpoint__enable=True))
    export_folder(tmp_path / "bytes" / "checkpoint" / "step-1", tmp_path / "assets")
    _same_tokens(tmp_path / "assets", BytesTokenizer())
    (tmp_path / "assets" / "chat_template.jinja").write_text("{{ messages }}")
    settings = {"model__hf_assets_path": str(tmp_path / "assets"), "data__tokenizer": "auto"}
    out = _exported(tmp_path / "run", tmp_path / "out", corpus, **settings)
    _same_tokens(out, load_tokenizer(tmp_path / "assets"))
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == "{{ messages }}"
    text = (tmp_path / "assets" / "tokenizer.json").read_text()
    (tmp_path / "assets" / "tokenizer.json").write_text(text + " ")
    print(export_folder(tmp_path / "run" / "checkpoint" / "step-1", tmp_path / "other"))
    assert "is not the one the model was trained with" in capsys.readouterr().out
    assert not (tmp_path / "other" / "tokenizer.json").exists()


def test_the_tokenizer_travels_through_an_import(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "bytes", training__steps=1, checkpoint__enable=True)
    run_ranks(train, 1, 1, recipe)
    first = tmp_path / "first"
    export_folder(tmp_path / "bytes" / "checkpoint" / "step-1", first)
    edit_config(first, eos_token_id=[257, 3])
    assert import_main(["--from", str(first), "--to", str(tmp_path / "step-0")]) == 0
    folder = open_step(tmp_path / "step-0")
    assert folder is not None
    assert folder.recipe_table()["model"]["hf_assets_path"] == str(tmp_path / "step-0")
    assert {"tokenizer.json", "tokenizer_config.json", "config.json"} <= folder.manifest.files.keys()
    export_folder(tmp_path / "step-0", tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == [257, 3]


def test_added_tokens_travel_from_a_folder_of_nothing_but_a_tokenizer(tmp_path: Path) -> None:
    """BOS and EOS stand in tokenizer_config.json only, as in torchtitan's; an import copies the same files."""
    import transformers

    assets = write_debug_tokenizer(tmp_path / "assets")
    ours = load_tokenizer(assets)
    data = {"tokenizer": ours.fingerprint()[:16]}
    manifest = Manifest(Progress(), 1, 1, "", model_only=True, permanent=False, metrics_offset=0, data=data)
    recipe = make_recipe(tmp_path / "run", data__tokenizer="auto", data__tokenizer_path=str(assets))
    exported = tokenizer_of(StepFolder(tmp_path, manifest), recipe, 64)
    assert exported.tokens == {"bos_token_id": 2002, "eos_token_id": 2003}
    for name in ("out", "imported"):
        (tmp_path / name).mkdir()
    exported.write(tmp_path / "out")
    copy_assets(checked_assets(tmp_path / "out"), tmp_path / "imported")
    copy, theirs = load_tokenizer(tmp_path / "imported"), transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (copy.bos_id, copy.eos_id, copy.fingerprint()) == (2002, 2003, ours.fingerprint())
    assert (theirs.bos_token_id, theirs.eos_token_id) == (2002, 2003)
