"""Cutting the model into pipeline parts: evenly, or as the recipe writes it out.

Arithmetic on layer numbers; see `pipeline_layout.py` for where the parts go. It must not import torch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice

from titan_growth.config.messages import suggestion
from titan_growth.config.schema.recipe import ParallelismConfig
from titan_growth.tools.errors import Problem

LAYERS_PER_PART = "parallelism.pipeline_parallel_layers_per_stage"
NAMES = "parallelism.module_fqns_per_model_part"


@dataclass(frozen=True)
class Part:
    """A chunk of the model."""

    index: int
    """Its place in the model."""
    layers: tuple[int, ...]
    """Global layer ids, ascending; a first or last part may have none."""
    first: bool
    """Holds `tok_embeddings`."""
    last: bool
    """Holds `norm` and `output`."""

    def describe(self) -> str:
        """What it holds, such as `tok_embeddings, layers 0-3`."""
        held = ["tok_embeddings"] if self.first else []
        if len(self.layers) == 1:
            held.append(f"layer {self.layers[0]}")
        elif self.layers:
            held.append(f"layers {self.layers[0]}-{self.layers[-1]}")
        return ", ".join(held + (["norm", "output"] if self.last else []))


def cut_evenly(
    section: ParallelismConfig, num_layers: int, num_parts: int, key: str
) -> tuple[tuple[Part, ...], list[Problem]]:
    """Parts of equally many layers, where the embedding and the head count as the layers that they displace."""
    first_less = section.pipeline_parallel_first_stage_less_layers
    last_less = section.pipeline_parallel_last_stage_less_layers
    effective = num_layers + first_less + last_less
    if num_parts > effective:
        message = (
            f"makes {num_parts} parts: more pipeline parts than layers plus the first and last parts' less_layers, "
            f"{num_layers} + {first_less} + {last_less} = {effective}"
        )
        return (), [Problem(key, message, "Use fewer parts, or a deeper model")]
    share, left_over = divmod(effective, num_parts)
    problems = []
    for which, less, most in (("first", first_less, share + (left_over > 0)), ("last", last_less, share)):
        if less > most:
            message = (
                f"{less} is more than the {many(most, 'layer')} of the {which} part when {num_layers} layers "
                f"+ {first_less + last_less} less_layers are split over {num_parts} parts"
            )
            # The largest x with x <= the part's share of (the others + x) layers: the first part's share is rounded up.
            fits = (effective - less) // (num_parts - 1) + (which == "first")
            hint = f"At most {fits} would fit" if key != LAYERS_PER_PART else ""
            problems.append(Problem(f"parallelism.pipeline_parallel_{which}_stage_less_layers", message, hint))
    if problems:
        return (), problems
    sizes = [share + (index < left_over) for index in range(num_parts)]
    sizes[0] -= first_less
    sizes[-1] -= last_less
    layers = iter(range(num_layers))
    return _parts([tuple(islice(layers, size)) for size in sizes]), []


def _parts(layers: list[tuple[int, ...]]) -> tuple[Part, ...]:
    return tuple(Part(index, held, index == 0, index == len(layers) - 1) for index, held in enumerate(layers))


def cut_by_name(names: list[list[str]], num_layers: int) -> tuple[tuple[Part, ...], list[Problem]]:
    """The parts that a recipe writes out."""
    layer_of = {f"layers.{layer}": layer for layer in range(num_layers)}
    belongs = {"tok_embeddings": 0, "norm": len(names) - 1, "output": len(names) - 1}
    given = Counter(name for part in names for name in part)
    growing = "A run that grows has several depths, which no one list fits: leave it out for an even split of each"
    problems = []
    if unknown := [name for name in given if name not in layer_of and name not in belongs]:
        there = f"{many(num_layers, 'layer')} (layers.0 to layers.{num_layers - 1}), tok_embeddings, norm and output"
        hint = growing if unknown[0].startswith("layers.") else suggestion(unknown[0], belongs)
        problems.append(Problem(NAMES, f"unknown {_quoted(unknown)}; the model has {there}", hint))
    if twice := [name for name, times in given.items() if times > 1]:
        problems.append(Problem(NAMES, f"holds {_quoted(twice)} more than once"))
    if missing := [name for name in [*layer_of, *belongs] if name not in given]:
        message = f"lacks {_quoted(missing)}; the model has {many(num_layers, 'layer')}"
        problems.append(Problem(NAMES, message, growing if missing[0] in layer_of else ""))
    problems += [
        Problem(NAMES, f"part {index} is empty (parts count from 0)") for index, part in enumerate(names) if not part
    ]
    if problems:
        return (), problems
    for index, part in enumerate(names):
        for name in part:
            if belongs.get(name, index) != index:
                message = f"{name!r} is in part {index}, but belongs into part {belongs[name]}"
                problems.append(Problem(NAMES, f"{message}, the {'first' if name == 'tok_embeddings' else 'last'}"))
    held = [tuple(sorted(layer_of[name] for name in part if name in layer_of)) for part in names]
    placed = [(layer, index) for index, layers in enumerate(held) for layer in layers]
    for expected, (layer, index) in enumerate(placed):
        if layer != expected:
            message = f"part {index} holds layers.{layer} where layers.{expected} should follow"
            problems.append(Problem(NAMES, message, "Parts hold consecutive layers, in model order"))
            break
    return ((), problems) if problems else (_parts(held), [])


def many(number: int, word: str) -> str:
    """`1 layer`, `2 layers`, `2 batches`."""
    plural = f"{word}es" if word.endswith("ch") else f"{word}s"
    return f"1 {word}" if number == 1 else f"{number} {plural}"


def _quoted(names: list[str]) -> str:
    """The first few names."""
    shown = ", ".join(repr(name) for name in names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
