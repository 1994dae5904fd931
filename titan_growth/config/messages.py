"""What the validator found, as messages that a user can act on.

Every message names the dotted key, what is wrong with which value, and the nearest key or choice. The loader adds the
origin; otherwise files and command line get the same text.
"""

from __future__ import annotations

from typing import Any

from titan_growth.config.fields import annotation_at, leaves, section_names, section_of, suggestion, type_text
from titan_growth.config.plugins import PLUGINS_KEY, recipe_class
from titan_growth.tools.errors import Problem

MOVED = {
    "model.tokenizer_path": "data.tokenizer_path",
    "training.seed": "debug.seed",
    "training.deterministic": "debug.deterministic",
    "training.compile": "compile.enable",
    "training.max_seq_len": "training.seq_len",
    "training.batch_size": "training.local_batch_size",
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.initial_load_model_weights_only": "checkpoint.initial_load_model_only",
    "checkpoint.last_save_model_weights_only": "checkpoint.last_save_model_only",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "job.print_args": "job.print_config",
    "model.num_layers": "model.n_layers",
    "model.num_heads": "model.n_heads",
    "model.num_kv_heads": "model.n_kv_heads",
    "model.n_kv_head": "model.n_kv_heads",
    "growth.enabled": "growth.enable",
}
"""Older or likely spellings -> the key meant."""


def unknown_key(key: str, value: Any) -> Problem:
    """The problem for an unknown key; its value tells a section from a key outside all sections."""
    section, _, name = key.rpartition(".")
    if key in MOVED:
        return Problem(key, "unknown key", f"Did you mean {MOVED[key]!r}?")
    root = recipe_class()
    model = section_of(annotation_at(root, section.split(".")) if section else root)
    if model is None:
        return Problem(key, f"unknown section [{section}]", "See --help for the sections")
    if name == PLUGINS_KEY:
        return Problem(key, f"unknown key in [{section}]", "plugins is outside all sections: write it before the first")
    # The same key in another table is a better guess than a similar one in this table.
    elsewhere = [leaf for leaf, _ in leaves(root) if leaf.rpartition(".")[2] == name]
    near = f"Did you mean {elsewhere[0]!r}?" if elsewhere else suggestion(name, model.model_fields)
    if section:
        return Problem(key, f"unknown key in [{section}]", near or "See --help for the keys")
    if isinstance(value, dict):
        return Problem(key, "unknown section", near or f"The sections are {', '.join(section_names(root))}")
    return Problem(key, "is outside all sections", near or "See --help for the keys")


def problem_of(key: str, details: Any) -> Problem:
    """One entry of pydantic's `ValidationError.errors()` as a `Problem`."""
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    got = f"got {_show(value)}"
    expected = {
        "int_type": "expected an integer",
        "int_from_float": "expected an integer",
        "float_type": "expected a number",
        "finite_number": "expected a finite number",
        "bool_type": "expected true or false",
        "string_type": "expected a string",
        "list_type": "expected a list",
        "dict_type": "expected a table",
        "model_type": "expected a table",
    }.get(kind)
    if expected:
        hint = ""
        if kind == "string_type" and not isinstance(value, dict | list):
            is_point = key.endswith(".at") and not isinstance(value, bool)
            hint = f'Write "{value} steps" or "{value} tokens"' if is_point else f'Write "{value}" in quotes'
        return Problem(key, f"{expected}, {got}", hint)
    annotation = annotation_at(recipe_class(), key.split("."))
    if kind == "missing":
        return Problem(key, f"is missing; expected {type_text(annotation)}")
    if kind == "literal_error":
        choices = [choice.strip().strip('"') for choice in type_text(annotation).split("|")]
        allowed = ", ".join(repr(choice) for choice in choices)
        return Problem(key, f"must be one of {allowed}, {got}", suggestion(str(value), choices))
    bounds = {"greater_than_equal": "ge", "greater_than": "gt", "less_than_equal": "le", "less_than": "lt"}
    if kind in bounds:
        words = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}[bounds[kind]]
        return Problem(key, f"must be {words} {context[bounds[kind]]:g}, {got}")
    if kind == "value_error":
        return Problem(key, str(context["error"]), getattr(context["error"], "hint", ""))
    return Problem(key, f"{details['msg'].lower()}, {got}")


def _show(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else f"'{value}'" if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
