"""`[data]`: which text of a corpus is trained on, and as which tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from titan_growth.config.section import BadValueError, Section
from titan_growth.tools.template import pieces_of


class DataConfig(Section):
    """Tokenizer and preparation of the corpus."""

    tokenizer: Literal["auto", "sentencepiece", "huggingface", "bytes"] = "auto"
    """auto = by tokenizer_path or model.hf_assets_path, else sentencepiece, trained on the corpus to vocab_size."""
    tokenizer_path: str | None = None
    """A sentencepiece .model, a tokenizer.json, or a folder with one of them; a URL is fetched once into the cache."""
    text_key: str = "text"
    """Column or JSON key that holds the text, also nested ("data.text"); or a template ("{title}: {body}")."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What a row without text does: end the preparation, or be left out and counted."""
    max_bad_rows: int = Field(1000, ge=0)
    """With on_bad_row = "skip": more bad rows than this end the preparation."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    subset: str | None = None
    """Configuration of a Hugging Face dataset."""
    bos: bool = True
    """Put the tokenizer's BOS before each document."""
    eos: bool = True
    """Put the tokenizer's EOS after each document. Where BOS is the same token, it is put once, after each."""
    allow_special_tokens: bool = False
    """Encode text that spells a special token, such as <|endoftext|>, to that token. Default: as any other text."""
    document_mask: bool = False
    """Attention stays inside a document, and positions restart with it."""
    validation_fraction: float = Field(0.01, ge=0, le=0.5)
    """Share of the corpus held out for validation."""
    shuffle: bool = True
    """Visit the blocks of each epoch in a random order fixed by debug.seed."""
    cache_dir: str | None = None
    """Where prepared data is kept, a folder on a disk. Default: $TITAN_GROWTH_CACHE, else the user's cache folder."""

    @field_validator("text_key")
    @classmethod
    def _is_name_or_template(cls, value: str) -> str:
        try:
            pieces_of(value)
        except ValueError as error:
            hint = 'Name a field ("text"), a nested one ("data.text"), or several ("{title}: {body}"); {{ is a brace'
            raise BadValueError(f"{value!r} is no template: {error}", hint) from None
        return value
