"""Splits the model into pipeline parts, evenly or as the recipe lists them.

Arithmetic on layer numbers; `pipeline_layout.py` places the parts. Must not import torch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice

from titan_growth.config.messages import suggestion
from titan_growth.config.schema.recipe import ParallelismConfig
from titan_growth.tools.findings import Findings
from titan_growth.tools.text import many

LAYERS_PER_PART = "parallelism.pipeline_parallel_layers_per_stage"
NAMES = "parallelism.module_fqns_per_model_part"


@dataclass(frozen=True)
class Part:
    """A pipeline part."""

    index: int
    """In model order."""
    layers: tuple[int, ...]
    """Global layer ids, ascending; the first or last part may have none."""
    first: bool
    """Holds `tok_embeddings`."""
    last: bool
    """Holds `norm` and `output`."""

    def describe(self) -> str:
        """Its content, such as `tok_embeddings, layers 0-3`."""
        held = ["tok_embeddings"] if self.first else []
        if len(self.layers) == 1:
            held.append(f"layer {self.layers[0]}")
        elif self.layers:
            held.append(f"layers {self.layers[0]}-{self.layers[-1]}")
        return ", ".join(held + (["norm", "output"] if self.last else []))


def cut_evenly(
    section: ParallelismConfig, num_layers: int, num_parts: int, key: str, found: Findings
) -> tuple[Part, ...] | None:
    """Parts with equal numbers of layers; the embedding and the head count as their `less_layers`.

    Args:
        key: of the setting that determines the number of parts.
    """
    first_less = section.pipeline_parallel_first_stage_less_layers
    last_less = section.pipeline_parallel_last_stage_less_layers
    effective = num_layers + first_less + last_less
    if num_parts > effective:
        message = (
            f"makes {num_parts} parts: more pipeline parts than layers plus the first and last parts' less_layers, "
            f"{num_layers} + {first_less} + {last_less} = {effective}"
        )
        found.problem(key, message, "Use fewer parts, or a deeper model")
        return None
    share, left_over = divmod(effective, num_parts)
    fits_all = True
    for which, less, most in (("first", first_less, share + (left_over > 0)), ("last", last_less, share)):
        if less > most:
            message = (
                f"{less} is more than the {many(most, 'layer')} of the {which} part when {num_layers} layers "
                f"+ {first_less + last_less} less_layers are split over {num_parts} parts"
            )
            # The largest x with x <= the part's share of (the others + x) layers; the first part's share rounds up.
            fits = (effective - less) // (num_parts - 1) + (which == "first")
            hint = f"At most {fits} would fit" if key != LAYERS_PER_PART else ""
            found.problem(f"parallelism.pipeline_parallel_{which}_stage_less_layers", message, hint)
            fits_all = False
    if not fits_all:
        return None
    sizes = [share + (index < left_over) for index in range(num_parts)]
    sizes[0] -= first_less
    sizes[-1] -= last_less
    layers = iter(range(num_layers))
    return _parts([tuple(islice(layers, size)) for size in sizes])


def _parts(layers: list[tuple[int, ...]]) -> tuple[Part, ...]:
    return tuple(Part(index, held, index == 0, index == len(layers) - 1) for index, held in enumerate(layers))


def cut_by_name(names: list[list[str]], num_layers: int, found: Findings) -> tuple[Part, ...] | None:
    """The parts that a recipe lists by name."""
    own = Findings()
    layer_of = {f"layers.{layer}": layer for layer in range(num_layers)}
    _check_names(names, layer_of, own)
    held = [tuple(sorted(layer_of[name] for name in part if name in layer_of)) for part in names]
    if not own.problems:
        _check_order(names, held, own)
    found.extend(own)
    return None if own.problems else _parts(held)


def _ends(num_parts: int) -> dict[str, int]:
    """Module name -> its part, for the modules besides the layers."""
    return {"tok_embeddings": 0, "norm": num_parts - 1, "output": num_parts - 1}


def _check_names(names: list[list[str]], layer_of: dict[str, int], found: Findings) -> None:
    """Every module is there once, and no part is empty."""
    num_layers, belongs = len(layer_of), _ends(len(names))
    given = Counter(name for part in names for name in part)
    growing = "A run that grows has several depths, and no single list fits all: leave it out for an even split of each"
    if unknown := [name for name in given if name not in layer_of and name not in belongs]:
        there = f"{many(num_layers, 'layer')} (layers.0 to layers.{num_layers - 1}), tok_embeddings, norm and output"
        hint = growing if unknown[0].startswith("layers.") else suggestion(unknown[0], belongs)
        found.problem(NAMES, f"unknown {_quoted(unknown)}; the model has {there}", hint)
    if twice := [name for name, times in given.items() if times > 1]:
        found.problem(NAMES, f"holds {_quoted(twice)} more than once")
    if missing := [name for name in [*layer_of, *belongs] if name not in given]:
        message = f"lacks {_quoted(missing)}; the model has {many(num_layers, 'layer')}"
        found.problem(NAMES, message, growing if missing[0] in layer_of else "")
    for index, part in enumerate(names):
        if not part:
            found.problem(NAMES, f"part {index} is empty (parts count from 0)")


def _check_order(names: list[list[str]], held: list[tuple[int, ...]], found: Findings) -> None:
    """Everything is in the part that it belongs into, layers in model order."""
    belongs = _ends(len(names))
    for index, part in enumerate(names):
        for name in part:
            if belongs.get(name, index) != index:
                message = f"{name!r} is in part {index}, but belongs in part {belongs[name]}"
                found.problem(NAMES, f"{message}, the {'first' if name == 'tok_embeddings' else 'last'}")
    placed = [(layer, index) for index, layers in enumerate(held) for layer in layers]
    for expected, (layer, index) in enumerate(placed):
        if layer != expected:
            message = f"part {index} holds layers.{layer} where layers.{expected} should follow"
            found.problem(NAMES, message, "Parts hold consecutive layers, in model order")
            break


def _quoted(names: list[str]) -> str:
    """The first few names."""
    shown = ", ".join(repr(name) for name in names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
