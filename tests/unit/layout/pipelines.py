"""Pipelines for tests: planned from short words, and as PyTorch sees them.

What PyTorch says about a schedule is asked of PyTorch itself: its classes are built around objects that only look like
stages, because their constructors check everything and run nothing.
"""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from titan_growth.config.schema.recipe import ParallelismConfig
from titan_growth.layout.pipeline_layout import (
    PipelineLayout,
    plan_pipeline,
)
from titan_growth.tools.errors import Problem
from titan_growth.tools.findings import Findings

SHORT = {
    "schedule": "pipeline_parallel_schedule",
    "csv": "pipeline_parallel_schedule_csv",
    "per_part": "pipeline_parallel_layers_per_stage",
    "names": "module_fqns_per_model_part",
    "first_less": "pipeline_parallel_first_stage_less_layers",
    "last_less": "pipeline_parallel_last_stage_less_layers",
    "microbatch": "pipeline_parallel_microbatch_size",
}
FOUR_LAYERS = [["tok_embeddings", "layers.0"], ["layers.1"], ["layers.2"], ["layers.3", "norm", "output"]]


def plan(
    pp: int, num_layers: int, batch: int = 64, **settings: Any
) -> tuple[PipelineLayout | None, list[Problem], list[Problem]]:
    section = ParallelismConfig(pipeline_parallel_degree=pp, **{SHORT[name]: value for name, value in settings.items()})
    found = Findings()
    return plan_pipeline(section, num_layers, batch, found), found.problems, found.warnings


def laid_out(pp: int, num_layers: int, batch: int = 64, **settings: Any) -> PipelineLayout:
    layout, problems, _ = plan(pp, num_layers, batch, **settings)
    assert layout is not None, problems
    assert not problems
    return layout


def refused(pp: int, num_layers: int, batch: int = 64, **settings: Any) -> list[str]:
    layout, problems, warnings = plan(pp, num_layers, batch, **settings)
    assert layout is None
    assert problems
    assert not warnings
    return [str(problem).removeprefix("parallelism.") for problem in problems]


def fake_stages(num_parts: int, pp: int, rank_of_part: Iterable[int]) -> list[Any]:
    """What the constructors of PyTorch's schedules look at, for the parts of pp rank 0."""
    return [
        SimpleNamespace(stage_index=part, num_stages=num_parts, group_size=pp, group_rank=0, submod=None)
        for part, rank in enumerate(rank_of_part)
        if rank == 0
    ]
