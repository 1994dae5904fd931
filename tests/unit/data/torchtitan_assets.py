"""A tokenizer folder as torchtitan's debug recipe expects it: BOS and EOS stand in tokenizer_config.json only."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers as hf

BOS, EOS = 2002, 2003
"""Their ids with `transformers` and with torchtitan."""


def write_debug_tokenizer(folder: Path) -> Path:
    """2,000 pieces, two tokens more in tokenizer.json, and two that tokenizer_config.json has under ids of its own."""
    folder.mkdir(parents=True)
    pieces = {letter: number for number, letter in enumerate(sorted(hf.pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for first in list(pieces):
        for second in "abcdefgh":
            if len(pieces) < 2000:
                merges.append((first, second))
                pieces[first + second] = len(pieces)
    tokenizer = hf.Tokenizer(hf.models.BPE(pieces, merges))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|image|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {"128000": {"content": "<|bos|>", **flags}, "128001": {"content": "<|eos|>", **flags}}
    config = {"added_tokens_decoder": added, "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
