"""The report of a plan: model, mesh, batch, stages, which rank holds how many bytes of what, and how the run grows.

Everything follows from the recipe and a number of ranks. All numbers are exact unless a line says otherwise;
`layout/shards.py` has the arithmetic of the shares. The report is text for people, and a golden test for every shipped
recipe: it names no absolute paths and no times.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from titan_growth.commands.plan_advice import remarks, worth
from titan_growth.config.schema.recipe import Recipe
from titan_growth.engine.parameter_groups import SizedModel, treatments
from titan_growth.growth.schedule import ends_of_phases
from titan_growth.layout.pipeline_layout import part_table, plan_pipeline
from titan_growth.layout.pipeline_parts import Part
from titan_growth.layout.shards import EMBEDDING, HEAD, LAYER, NORM, ModelShards, Parameter
from titan_growth.models.config import DecoderConfig
from titan_growth.models.parametrization import Factors
from titan_growth.models.registry import family_module
from titan_growth.models.roles import bare_name
from titan_growth.optimizers.base import optimizer_named
from titan_growth.run.batch_schedule import batch_lines, rate_lines
from titan_growth.run.phases import Phase
from titan_growth.run.plan import RunPlan, stage_lines
from titan_growth.tools.findings import Findings
from titan_growth.tools.text import many, sources

SHADOW_BYTES = 4
"""Of an element of the weights that a stage keeps beside the model's: they are float32."""


def report_lines(plan: RunPlan, device_type: str, start: Sequence[str] = ()) -> list[str]:
    """The long description of a plan; `start` says where the run stands."""
    family = family_module(plan.recipe.model.name)
    depths = [ModelShards(phase.config, family, phase.mesh_shape) for phase in plan.phases]
    blocks = [
        [plan.recipe.job.description, *start],
        _model(plan, depths[-1]),
        _batch(plan),
        _parameter_groups(plan, depths[-1]),
        *_stages(plan, device_type),
        _growth(plan),
        *(_ranks(phase, shards, phase.shadows(device_type)) for phase, shards in zip(plan.phases, depths, strict=True)),
        _checkpoints(plan, depths, plan.phases[0].shadows(device_type)),
    ]
    return [line for block in blocks if block for line in ("", *block)][1:]


def _stages(plan: RunPlan, device_type: str) -> Iterator[list[str]]:
    """The stages of the first phase, and those of each later one that has others."""
    shown = stage_lines(plan.phases[0], device_type)
    yield shown
    for number, phase in enumerate(plan.phases[1:], start=1):
        lines = stage_lines(phase, device_type)
        if plan.growth_plan.planned[number - 1].changes_layout and lines != shown:
            shape = str(phase.mesh_shape)
            yield [f"after {many(number, 'growth')}, on {shape}, {lines[0]}", *lines[1:]]
            shown = lines


def _model(plan: RunPlan, shards: ModelShards) -> list[str]:
    config, seq_len = shards.config, plan.phases[-1].recipe.training.seq_len
    head = "tied head" if config.tie_word_embeddings else f"head {shards.numel(HEAD):,}"
    which = " in the end" if plan.growth_plan.planned else ""
    return [
        f"model: {plan.recipe.model.name} {plan.recipe.model.flavor}{which}",
        f"  dim {config.dim}, {config.num_layers} layers, {config.num_heads} query heads of {config.head_dim}, "
        f"{config.num_kv_heads} key/value heads, hidden_dim {config.hidden_dim}, vocabulary {config.vocab_size}",
        f"  parameters: {shards.num_params:,}",
        f"    = embedding {shards.numel(EMBEDDING):,} + {config.num_layers} layers x {shards.numel(LAYER):,} "
        f"+ norm {shards.numel(NORM):,} + {head}",
        f"  FLOPs per token: {config.flops_per_token(seq_len):,} (forward and backward, {seq_len} tokens a sequence)",
        *_parametrization(config),
    ]


def _parametrization(config: DecoderConfig) -> list[str]:
    """The factors of the forward pass; nothing under the standard parametrisation."""
    if config.mup is None:
        return []
    depth = config.mup.num_layers
    name, layers = ("muP", "") if depth is None else ("CompleteP", f" and {many(depth, 'layer')}")
    return [f"  {name} from dim {config.mup.dim}{layers}: {Factors.of(config)}"]


def _batch(plan: RunPlan) -> list[str]:
    training, shape, steps = plan.recipe.training, plan.phase.mesh_shape, plan.phase.num_accumulation_steps
    *_, (_, last) = timeline(plan)
    fewer = "at most " if plan.recipe.data.document_mask else ""
    return [
        f"mesh: {shape} = {many(shape.num_ranks, 'rank')}" if shape.num_ranks > 1 else "mesh: 1 rank",
        f"batch: {training.global_batch_size} sequences of {training.seq_len} tokens a step = "
        f"{plan.phase.tokens_per_step:,} tokens",
        f"  = {many(shape.dp_degree, 'data-parallel rank')} x local batch {training.local_batch_size} x "
        f"{many(steps, 'accumulation step')}",
        *batch_lines(training),
        f"run: {many(training.steps, 'step')}, {fewer}{last.tokens:,} tokens, {fewer}{last.flops:.4e} FLOPs",
        *rate_lines(training, plan.schedule, [stretch.last_step for _, stretch in timeline(plan)][:-1]),
    ]


def _parameter_groups(plan: RunPlan, shards: ModelShards) -> list[str]:
    """How many parameters the optimizer treats in which way; nothing when it treats all alike."""
    section = plan.recipe.optimizer
    kind = optimizer_named(section.name)
    plain = not section.groups and section.weight_decay_on == "all" and shards.config.mup is None
    if plain and len(kind.rules) == 1:
        return []
    model = SizedModel(shards.config, family_module(plan.recipe.model.name).ROLES)
    alike: dict[str, list[Parameter]] = {}
    for how, ones in treatments(section, shards.parameters(), model).items():
        for one in ones:
            rule = f"{kind.rule_of(one.name, len(one.shape)).name}, " if len(kind.rules) > 1 else ""
            alike.setdefault(f"{rule}{how}", []).append(one)
    lines = [f"parameter groups (lr {section.lr:g}, weight decay {section.weight_decay:g}):"]
    for described, ones in alike.items():
        names = ", ".join(dict.fromkeys(bare_name(one.name) for one in ones))
        count = f"{sum(one.numel for one in ones):,} parameters in {many(len(ones), 'tensor')}"
        lines.append(f"  {described}: {count}: {names}")
    return lines


# ---- growth ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stretch:
    """How far a phase of the run goes."""

    last_step: int
    """Its last step; the model grows before the next one."""
    tokens: int
    """Target positions trained on until then, from the start of the run; masked ones are counted."""
    flops: int
    """FLOPs until then."""


def timeline(plan: RunPlan) -> Iterator[tuple[Phase, Stretch]]:
    """The phases of a run with their ends: a growth comes after the first step that has reached its count.

    One that waits for a slope is taken to come as early as it can.
    """
    paces = [phase.pace for phase in plan.phases]
    ends = ends_of_phases(plan.growth_plan.points, paces, plan.recipe.training.steps)
    for phase, end in zip(plan.phases, ends, strict=True):
        yield phase, Stretch(end.step, end.tokens, end.flops)


def _growth(plan: RunPlan) -> list[str]:
    """The timeline: the depths, how long each lasts, and the growths between them."""
    if not plan.growth_plan.planned:
        return []
    lines = ["growth (tokens and FLOPs are counted from the start of the run):"]
    for index, (event, (phase, stretch)) in enumerate(zip([*plan.growth_lines(), ""], timeline(plan), strict=True)):
        config = phase.config
        waits = index < len(plan.growth_plan.points) and plan.growth_plan.points[index].unit == "slope"
        lines += [
            f"  {many(config.num_layers, 'layer')}: {config.num_params:,} parameters, "
            f"{config.flops_per_token(phase.recipe.training.seq_len):,} FLOPs per token",
            f"    until step {stretch.last_step:,}{' or later' if waits else ''}: {stretch.tokens:,} tokens, "
            f"{stretch.flops:.4e} FLOPs",
            *([f"  {event}"] if event else []),
        ]
        if event and plan.growth_plan.chain.maps[index].layers != tuple(range(config.num_layers)):
            lines.append(f"    layers from {sources(plan.growth_plan.chain.maps[index].layers)}")
    if plan.recipe.data.document_mask:
        lines.append("  (data.document_mask leaves some positions out, so tokens and FLOPs are upper bounds)")
    wrapped = (textwrap.wrap(text, 118, initial_indent="  ", subsequent_indent="    ") for text in _advice(plan))
    return [*lines, *itertools.chain.from_iterable(wrapped)]


def _advice(plan: RunPlan) -> Iterator[str]:
    """What the growths are worth, and what is known about such ones. A slope is left out: its step is not known."""
    phases, stretches = zip(*timeline(plan), strict=True)
    if any(point.unit == "slope" for point in plan.growth_plan.points):
        return
    last = phases[-1]
    yield worth(stretches[-1].tokens, stretches[-1].flops, last.config.flops_per_token(last.recipe.training.seq_len))
    grown_at, tokens = [one.last_step for one in stretches[:-1]], [one.tokens for one in stretches[:-1]]
    models = [phase.config for phase in phases]
    for remark in remarks(plan.growth_plan.planned, models, grown_at, tokens, plan.schedule):
        yield f"note: {remark}"


# ---- ranks -----------------------------------------------------------------------------------------------------------


def _ranks(phase: Phase, shards: ModelShards, shadows: Sequence[str]) -> list[str]:
    """Which ranks hold which parts of the model of one phase, and how many bytes that is."""
    config, shape, recipe = shards.config, phase.mesh_shape, phase.recipe
    table, parts_of = _pipeline(phase)
    moments, size = shards.moments(recipe.optimizer), _bytes_per_value(recipe)
    rows: list[tuple[str, ...]] = [
        ("pp", "ranks", "layers", "parameters of a rank", "weights", "gradients", "moments", *shadows, "sum")
    ]
    largest = 0
    each = shape.num_ranks // shape.pp
    for place, parts in enumerate(parts_of):
        held = shards.held(parts)
        share = f"{held.most:,}" if held.least == held.most else f"{held.least:,} to {held.most:,}"
        ranks = f"{place * each}-{(place + 1) * each - 1}" if each > 1 else str(place)
        num_layers = sum(len(part.layers) for part in parts)
        num_bytes = [held.most * size, held.most * size, moments.held(parts).most * size]
        num_bytes += [held.most * SHADOW_BYTES] * len(shadows)
        largest = max(largest, sum(num_bytes))
        cells = (_gib(number) for number in (*num_bytes, sum(num_bytes)))
        rows.append((str(place), ranks, str(num_layers), share, *cells))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    dtype = recipe.training.dtype
    where = " in host memory" if recipe.training.enable_cpu_offload else ""
    return [
        f"ranks at {many(config.num_layers, 'layer')} (GiB of {dtype}{where} on the ranks that hold most"
        f"{f'; {name} of float32' if (name := ', '.join(shadows)) and dtype != 'float32' else ''}):",
        *table,
        *("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows),
        f"  largest: {_gib(largest)} GiB; activations and gathered parameters come on top",
    ]


def _pipeline(phase: Phase) -> tuple[list[str], list[tuple[Part, ...]]]:
    """(lines about schedule and parts, the parts of each pp rank)."""
    config = phase.config
    if phase.mesh_shape.pp == 1:
        return [], [(Part(0, tuple(range(config.num_layers)), first=True, last=True),)]
    recipe = phase.recipe
    found = Findings()
    layout = plan_pipeline(recipe.parallelism, config.num_layers, recipe.training.local_batch_size, found)
    assert layout is not None, f"the pipeline was not checked: {found.problems}"
    lines = [
        f"  schedule {layout.schedule}, {many(layout.num_microbatches, 'microbatch')} of "
        f"{many(recipe.parallelism.pipeline_parallel_microbatch_size, 'sequence')} in each accumulation step",
        *(f"  {line}" for line in part_table(layout)),
    ]
    return lines, [layout.parts_of(place) for place in range(phase.mesh_shape.pp)]


def _checkpoints(plan: RunPlan, depths: list[ModelShards], shadows: Sequence[str]) -> list[str]:
    """What a checkpoint takes on disk: weights and moments in the type that they are trained in, and shadow weights."""
    section, size = plan.recipe.checkpoint, _bytes_per_value(plan.recipe)
    if not section.enable or section.load_only:
        return ["checkpoints: none are saved"]
    weights = [shards.num_stored * (size + SHADOW_BYTES * len(shadows)) for shards in depths]
    moments = [shards.moments(plan.recipe.optimizer).num_stored * size for shards in depths]
    sizes = " -> ".join(_gib(sum(both)) for both in zip(weights, moments, strict=True))
    last, beside = _gib(weights[-1]), "".join(f", {kind}" for kind in shadows)
    kept = f"the newest {section.keep_latest_k} are kept" if section.keep_latest_k else "all are kept"
    and_growths = ", and those of growths" if plan.growth_plan.planned and section.keep_latest_k else ""
    return [
        f"checkpoints: {sizes} GiB each on disk (weights{beside} and moments), every {many(section.interval, 'step')}; "
        f"{kept}{and_growths}",
        *([f"  the last one has the weights{beside} only: {last} GiB"] if section.last_save_model_only else []),
    ]


def _bytes_per_value(recipe: Recipe) -> int:
    return 2 if recipe.training.dtype == "bfloat16" else 4


def _gib(num_bytes: int) -> str:
    """Without the unit, for tables."""
    return f"{num_bytes / 2**30:,.3f}"
