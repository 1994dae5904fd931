"""Parts of the model, their ranks, microbatches and schedule files: what is accepted, what is refused, in which words.

What PyTorch says about a schedule is asked of PyTorch itself: its classes are built around objects that only look like
stages, because their constructors check everything and run nothing.
"""

from __future__ import annotations

import csv
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from titan_growth.config.schema.recipe import ParallelismConfig
from titan_growth.layout.pipeline_layout import (
    SCHEDULES,
    Part,
    PipelineLayout,
    ScheduleConditions,
    part_table,
    plan_pipeline,
    schedule_conditions,
)
from titan_growth.layout.schedule_csv import KEY, Action, read_schedule_csv
from titan_growth.tools.errors import Problem

SHORT = {
    "schedule": "pipeline_parallel_schedule",
    "csv": "pipeline_parallel_schedule_csv",
    "per_part": "pipeline_parallel_layers_per_stage",
    "names": "module_fqns_per_model_part",
    "first_less": "pipeline_parallel_first_stage_less_layers",
    "last_less": "pipeline_parallel_last_stage_less_layers",
    "microbatch": "pipeline_parallel_microbatch_size",
}


def plan(
    pp: int, num_layers: int, batch: int = 64, **settings: Any
) -> tuple[PipelineLayout | None, list[Problem], list[Problem]]:
    section = ParallelismConfig(pipeline_parallel_degree=pp, **{SHORT[name]: value for name, value in settings.items()})
    return plan_pipeline(section, num_layers, batch)


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


# ---- The split ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pp", "num_layers", "settings", "sizes"),
    [
        (2, 4, {}, [2, 2]),
        (2, 5, {}, [3, 2]),
        (2, 1, {}, [1, 0]),  # the last part has only the norm and the head
        (2, 2, {"first_less": 2, "last_less": 0}, [0, 2]),  # the first part has only the embedding
        (2, 1, {"first_less": 0, "last_less": 1}, [1, 0]),
        (4, 5, {}, [1, 2, 2, 0]),
        (4, 6, {}, [1, 2, 2, 1]),
        (4, 16, {}, [4, 5, 4, 3]),
        (4, 16, {"first_less": 0, "last_less": 0}, [4, 4, 4, 4]),
        (16, 126, {}, [7] + [8] * 14 + [7]),
        (8, 126, {"schedule": "Interleaved1F1B"}, [7] + [8] * 14 + [7]),
        (4, 30, {"schedule": "Interleaved1F1B", "per_part": 4}, [3, 4, 4, 4, 4, 4, 4, 3]),
        (4, 16, {"per_part": 5}, [4, 5, 4, 3]),
        (4, 28, {"schedule": "LoopedBFS", "per_part": 2, "first_less": 2, "last_less": 2}, [0] + [2] * 14 + [0]),
        (3, 20, {"schedule": "DualPipeV"}, [3, 4, 4, 4, 3, 2]),
    ],
)
def test_even_splits(pp: int, num_layers: int, settings: dict[str, Any], sizes: list[int]) -> None:
    layout = laid_out(pp, num_layers, **settings)
    assert [len(part.layers) for part in layout.parts] == sizes
    assert [layer for part in layout.parts for layer in part.layers] == list(range(num_layers))


def test_every_even_split_is_fair() -> None:
    """All layers once and in order; before the less-layers are taken, sizes differ by one and the first have more."""
    accepted = 0
    for pp in (2, 3, 4, 8):
        for num_layers in (1, 2, 3, 4, 5, 7, 8, 12, 31, 32, 126):
            for first_less in (0, 1, 2, 3):
                for last_less in (0, 1, 2, 3):
                    for schedule in ("GPipe", "LoopedBFS", "ZBVZeroBubble"):
                        less = {"first_less": first_less, "last_less": last_less}
                        layout, problems, _ = plan(pp, num_layers, schedule=schedule, **less)
                        num_parts = pp if schedule == "GPipe" else 2 * pp
                        share, left_over = divmod(num_layers + first_less + last_less, num_parts)
                        fits = share > 0 and first_less <= share + (left_over > 0) and last_less <= share
                        assert (layout is not None) == fits
                        if layout is None:
                            assert problems
                            continue
                        accepted += 1
                        assert [layer for part in layout.parts for layer in part.layers] == list(range(num_layers))
                        sizes = [len(part.layers) for part in layout.parts]
                        sizes[0] += first_less
                        sizes[-1] += last_less
                        assert sizes == sorted(sizes, reverse=True)
                        assert sizes[0] - sizes[-1] <= 1
                        assert [part.index for part in layout.parts] == list(range(num_parts))
                        assert [part.first for part in layout.parts] == [True] + [False] * (num_parts - 1)
                        assert [part.last for part in layout.parts] == [False] * (num_parts - 1) + [True]
    assert accepted > 1000


@pytest.mark.parametrize(
    ("pp", "num_layers", "settings", "expected"),
    [
        (
            4, 16, {"per_part": 4},
            "pipeline_parallel_layers_per_stage: 4 makes 5 parts of 16 layers + 2 less_layers, but 1F1B takes exactly "
            "one part a rank, 4. 5 would fit",
        ),
        (
            4, 16, {"per_part": 9, "schedule": "Interleaved1F1B"},
            "pipeline_parallel_layers_per_stage: 9 makes 2 parts of 16 layers + 2 less_layers, but Interleaved1F1B "
            "takes two or more parts a rank, a multiple of 4 from 8 on. Leave it out",
        ),
        (
            4, 16, {"per_part": 100, "schedule": "Interleaved1F1B"},
            "pipeline_parallel_layers_per_stage: 100 makes 1 part of 16 layers + 2 less_layers, but Interleaved1F1B "
            "takes two or more parts a rank, a multiple of 4 from 8 on. Leave it out",
        ),
        (
            2, 8, {"per_part": 2, "schedule": "Interleaved1F1B"},
            "pipeline_parallel_layers_per_stage: 2 makes 5 parts of 8 layers + 2 less_layers, but Interleaved1F1B "
            "takes two or more parts a rank, a multiple of 2 from 4 on. 3 would fit",
        ),
        (
            2, 10, {"per_part": 2, "schedule": "ZBVZeroBubble"},
            "pipeline_parallel_layers_per_stage: 2 makes 6 parts of 10 layers + 2 less_layers, but ZBVZeroBubble takes "
            "exactly two parts a rank, 4. 3 would fit",
        ),
        (
            2, 10, {"per_part": 6, "schedule": "DualPipeV"},
            "pipeline_parallel_layers_per_stage: 6 makes 2 parts of 10 layers + 2 less_layers, but DualPipeV takes "
            "exactly two parts a rank, 4. 3 would fit",
        ),
        (
            8, 5, {},
            "pipeline_parallel_degree: makes 8 parts: more pipeline parts than layers plus the first and last parts' "
            "less_layers, 5 + 1 + 1 = 7. Use fewer parts, or a deeper model",
        ),
        (
            2, 3, {"schedule": "LoopedBFS", "first_less": 0, "last_less": 0},
            "pipeline_parallel_degree: makes 4 parts: more pipeline parts than layers plus the first and last parts' "
            "less_layers, 3 + 0 + 0 = 3. Use fewer parts, or a deeper model",
        ),
        (
            4, 8, {"first_less": 5},
            "pipeline_parallel_first_stage_less_layers: 5 is more than the 4 layers of the first part when 8 layers "
            "+ 6 less_layers are split over 4 parts. At most 4 would fit",
        ),
        (
            4, 8, {"last_less": 4},
            "pipeline_parallel_last_stage_less_layers: 4 is more than the 3 layers of the last part when 8 layers "
            "+ 5 less_layers are split over 4 parts. At most 3 would fit",
        ),
    ],
)  # fmt: skip
def test_splits_that_do_not_fit(pp: int, num_layers: int, settings: dict[str, Any], expected: str) -> None:
    assert refused(pp, num_layers, **settings) == [expected]


def test_both_less_layers_can_be_too_many() -> None:
    first, last = refused(4, 1, first_less=10, last_less=10)
    assert first.startswith("pipeline_parallel_first_stage_less_layers: 10 is more than the 6 layers of the first part")
    assert last.startswith("pipeline_parallel_last_stage_less_layers: 10 is more than the 5 layers of the last part")


@pytest.mark.parametrize("which", ["first_less", "last_less"])
@pytest.mark.parametrize(("pp", "num_layers"), [(2, 1), (3, 4), (4, 8), (5, 31), (8, 126)])
def test_the_offered_less_layers_are_the_most_that_fit(pp: int, num_layers: int, which: str) -> None:
    message = refused(pp, num_layers, **{which: 10**6, "schedule": "GPipe"})[-1] if pp > 2 else ""
    if not message:  # two parts: whatever one displaces, the other takes
        assert laid_out(pp, num_layers, **{which: num_layers})
        return
    fits = int(message.rpartition("At most ")[2].split()[0])
    assert laid_out(pp, num_layers, schedule="GPipe", **{which: fits})
    assert plan(pp, num_layers, schedule="GPipe", **{which: fits + 1})[0] is None


@pytest.mark.parametrize("value", [10**12, 2**62])
@pytest.mark.parametrize("name", ["first_less", "last_less", "per_part", "microbatch"])
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_absurd_numbers_are_refused_at_once(name: str, value: int, schedule: str) -> None:
    start = time.monotonic()
    assert refused(4, 32, **{name: value, "schedule": schedule})
    assert refused(4, 32, **{"per_part": 1, name: value, "schedule": schedule})
    assert time.monotonic() - start < 1


# ---- Written-out splits ------------------------------------------------------------------------------------------

FOUR_LAYERS = [["tok_embeddings", "layers.0"], ["layers.1"], ["layers.2"], ["layers.3", "norm", "output"]]
DEPTHS = "A run that grows has several depths, which no one list fits: leave it out for an even split of each"


def test_a_written_out_split() -> None:
    names = [["layers.1", "tok_embeddings", "layers.0"], ["output", "norm", "layers.2"]]
    layout = laid_out(2, 3, names=names)
    assert layout.parts == (Part(0, (0, 1), True, False), Part(1, (2,), False, True))
    looped = laid_out(2, 4, names=FOUR_LAYERS, schedule="LoopedBFS")
    assert looped.rank_of_part == (0, 1, 0, 1)
    assert [part.layers for part in looped.parts] == [(0,), (1,), (2,), (3,)]
    ends = laid_out(2, 2, names=[["tok_embeddings"], ["layers.0", "layers.1", "norm", "output"]])
    assert [part.layers for part in ends.parts] == [(), (0, 1)]


@pytest.mark.parametrize(
    ("names", "num_layers", "expected"),
    [
        (FOUR_LAYERS[:3], 4, ["has 3 parts, but LoopedBFS takes two or more parts a rank, a multiple of 2 from 4 on"]),
        ([], 4, ["has 0 parts, but LoopedBFS takes two or more parts a rank, a multiple of 2 from 4 on"]),
        (FOUR_LAYERS, 3, ["unknown 'layers.3'; the model has 3 layers (layers.0 to layers.2), tok_embeddings, norm and "
                          f"output. {DEPTHS}"]),
        (FOUR_LAYERS, 10, ["lacks 'layers.4', 'layers.5', 'layers.6', 'layers.7' and 2 more; the model has 10 layers. "
                           f"{DEPTHS}"]),
        ([["tok_embeddings", "layers.0"], ["layers.1"], ["layers.02"], ["layers.3", "norm", "output"]], 4,
         ["unknown 'layers.02'; the model has 4 layers (layers.0 to layers.3), tok_embeddings, norm and output. "
          f"{DEPTHS}", f"lacks 'layers.2'; the model has 4 layers. {DEPTHS}"]),
        ([["tok_embedding", "layers.0"], ["layers.1"], ["layers.2"], ["layers.3", "norm"]], 4,
         ["unknown 'tok_embedding'; the model has 4 layers (layers.0 to layers.3), tok_embeddings, norm and output. "
          "Did you mean 'tok_embeddings'?", "lacks 'tok_embeddings', 'output'; the model has 4 layers"]),
        ([["tok_embeddings", "layers.0"], ["layers.1", "layers.0"], ["layers.2"], ["layers.3", "norm", "output"]], 4,
         ["holds 'layers.0' more than once"]),
        ([["tok_embeddings", "layers.0"], ["layers.1", "layers.2"], [], ["layers.3", "norm", "output"]], 4,
         ["part 2 is empty (parts count from 0)"]),
        ([["layers.0"], ["layers.1", "tok_embeddings"], ["layers.2", "norm"], ["layers.3", "output"]], 4,
         ["'tok_embeddings' is in part 1, but belongs into part 0, the first",
          "'norm' is in part 2, but belongs into part 3, the last"]),
        ([["tok_embeddings", "layers.1"], ["layers.0"], ["layers.2"], ["layers.3", "norm", "output"]], 4,
         ["part 0 holds layers.1 where layers.0 should follow. Parts hold consecutive layers, in model order"]),
        ([["tok_embeddings", "layers.0", "layers.2"], ["layers.1"], ["layers.3"], ["norm", "output"]], 4,
         ["part 0 holds layers.2 where layers.1 should follow. Parts hold consecutive layers, in model order"]),
    ],
)  # fmt: skip
def test_written_out_splits_that_do_not_fit(names: list[list[str]], num_layers: int, expected: list[str]) -> None:
    told = refused(2, num_layers, names=names, schedule="LoopedBFS")
    assert told == [f"module_fqns_per_model_part: {message}" for message in expected]


# ---- Schedules and placement -------------------------------------------------------------------------------------


def test_the_schedules_are_those_of_torch() -> None:
    with pytest.raises(ValueError, match="valid options are") as caught:
        torch_schedules.get_schedule_class("nonesuch")
    for name in SCHEDULES:
        assert repr(name) in str(caught.value)
        single = issubclass(torch_schedules.get_schedule_class(name), torch_schedules.PipelineScheduleSingle)
        assert schedule_conditions(name).single == single
    abstract = {"PipelineScheduleSingle", "PipelineScheduleMulti"}
    assert set(str(caught.value).split("[")[1].strip("]").replace("'", "").split(", ")) == set(SCHEDULES) | abstract


@pytest.mark.parametrize("name", ["1f1b", "GPIPE", "interleaved1f1b", "zbvzerobubble", "DUALPIPEV", "loopedbfs"])
def test_names_in_any_case_become_canonical(name: str) -> None:
    layout = laid_out(2, 8, schedule=name)
    assert layout.schedule in SCHEDULES
    assert layout.schedule.lower() == name.lower()
    assert layout.conditions == schedule_conditions(name) == SCHEDULES[layout.schedule]
    assert layout.is_single == (layout.schedule in ("1F1B", "GPipe"))


KNOWN = "GPipe, 1F1B, Interleaved1F1B, LoopedBFS, InterleavedZeroBubble, ZBVZeroBubble, DualPipeV"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Interleave1F1B", f"unknown schedule 'Interleave1F1B'; the schedules are {KNOWN}. Did you mean "
                           "'Interleaved1F1B'?"),
        ("csv", f"unknown schedule 'csv'; the schedules are {KNOWN}"),
        ("", f"unknown schedule ''; the schedules are {KNOWN}"),
        ("PipelineScheduleSingle", "PipelineScheduleSingle is only the base class of schedules and cannot run itself. "
                                   f"Choose one of {KNOWN}"),
        ("pipelineschedulemulti", "pipelineschedulemulti is only the base class of schedules and cannot run itself. "
                                  f"Choose one of {KNOWN}"),
    ],
)  # fmt: skip
def test_names_that_are_no_schedule(name: str, expected: str) -> None:
    assert refused(2, 8, schedule=name) == [f"pipeline_parallel_schedule: {expected}"]
    with pytest.raises(ValueError, match="schedule"):
        schedule_conditions(name)


@pytest.mark.parametrize("pp", [2, 3, 4, 8])
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_parts_lie_where_torch_expects_them(schedule: str, pp: int) -> None:
    for per_rank in (1,) if SCHEDULES[schedule].single else (2,) if SCHEDULES[schedule].v_shaped else (2, 3, 4):
        less = {"first_less": 0, "last_less": 0}
        layout = laid_out(pp, pp * per_rank, batch=4 * pp, schedule=schedule, per_part=1, **less)
        style = "v" if SCHEDULES[schedule].v_shaped else "loop"
        theirs = generate_stage_to_rank_mapping(pp, pp * per_rank, style)
        assert dict(enumerate(layout.rank_of_part)) == theirs
        assert layout.first_rank == 0
        assert layout.last_rank == (0 if style == "v" else pp - 1)
        for rank in range(pp):
            assert [part.index for part in layout.parts_of(rank)] == [part for part in theirs if theirs[part] == rank]


def test_descriptions() -> None:
    layout = laid_out(4, 16, schedule="Interleaved1F1B")
    assert part_table(layout) == [
        "pp 0: part 0 (tok_embeddings, layers 0-1), part 4 (layers 9-10)",
        "pp 1: part 1 (layers 2-4), part 5 (layers 11-12)",
        "pp 2: part 2 (layers 5-6), part 6 (layers 13-14)",
        "pp 3: part 3 (layers 7-8), part 7 (layer 15, norm, output)",
    ]
    assert part_table(laid_out(2, 1)) == ["pp 0: part 0 (tok_embeddings, layer 0)", "pp 1: part 1 (norm, output)"]
    assert part_table(laid_out(2, 4, schedule="ZBVZeroBubble", first_less=2)) == [
        "pp 0: part 0 (tok_embeddings), part 3 (norm, output)",
        "pp 1: part 1 (layers 0-1), part 2 (layers 2-3)",
    ]


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; from titan_growth.config.schema.recipe import ParallelismConfig; "
        "from titan_growth.layout.pipeline_layout import *; "
        "print(plan_pipeline(ParallelismConfig(pipeline_parallel_degree=16), 126, 64)[0].num_microbatches); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("64\n", 0), done.stderr


# ---- Microbatches ------------------------------------------------------------------------------------------------


def fake_stages(num_parts: int, pp: int, rank_of_part: Iterable[int]) -> list[Any]:
    """What the constructors of PyTorch's schedules look at, for the parts of pp rank 0."""
    return [
        SimpleNamespace(stage_index=part, num_stages=num_parts, group_size=pp, group_rank=0, submod=None)
        for part, rank in enumerate(rank_of_part)
        if rank == 0
    ]


def torch_schedule(layout: PipelineLayout, pp: int, num_microbatches: int) -> Any:
    kind = torch_schedules.get_schedule_class(layout.schedule)
    stages = fake_stages(len(layout.parts), pp, layout.rank_of_part)
    return kind(stages[0] if layout.is_single else stages, num_microbatches)


@pytest.mark.parametrize("per_rank", [1, 2, 3])
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_torch_takes_and_refuses_the_same_microbatches(schedule: str, per_rank: int) -> None:
    """For ranks x parts x microbatches, its constructor and we agree; so do both about parts a rank."""
    for pp in (2, 3, 4, 6):
        conditions = SCHEDULES[schedule]
        if (per_rank == 1) != conditions.single or (per_rank != 2 and conditions.v_shaped):
            continue
        less = {"first_less": 0, "last_less": 0, "per_part": 1}
        whole = laid_out(pp, pp * per_rank, 12 * pp, schedule=schedule, **less)
        verdicts = set()
        for num_microbatches in range(1, 6 * pp):
            layout, problems, warnings = plan(pp, pp * per_rank, 3 * num_microbatches, schedule=schedule, microbatch=3,
                                              **less)  # fmt: skip
            try:
                torch_schedule(whole, pp, num_microbatches)
            except ValueError as error:
                refusal = str(error)
            else:
                refusal = ""
            if refusal:
                assert "icrobatches" in refusal
                assert layout is None
                assert [problem.key for problem in problems] == ["training.local_batch_size"]
                assert_offer_fits(problems[0], pp, pp * per_rank, schedule=schedule, microbatch=3, **less)
            else:
                assert layout is not None
                assert layout.num_microbatches == num_microbatches
                too_few = num_microbatches < pp * per_rank
                assert [problem.key for problem in warnings] == ["training.local_batch_size"] * too_few
            verdicts.add(layout is not None)
        assert (False in verdicts) == (schedule not in ("GPipe", "LoopedBFS", "ZBVZeroBubble"))


def assert_offer_fits(problem: Problem, pp: int, num_layers: int, **settings: Any) -> None:
    batches, and_size, _ = problem.hint.partition(", and so would")
    offered = [int(word) for word in batches.split() if word.isdigit()]
    assert offered
    if and_size:
        batch = int(problem.message.split()[0])
        assert laid_out(pp, num_layers, batch, **settings | {"microbatch": 1})
    for batch in offered:
        assert laid_out(pp, num_layers, batch, **settings)


@pytest.mark.parametrize("schedule", ["ZBVZeroBubble", "DualPipeV"])
@pytest.mark.parametrize("per_rank", [1, 3])
def test_torch_refuses_other_numbers_of_parts_for_v_schedules(schedule: str, per_rank: int) -> None:
    stages = fake_stages(2 * per_rank, 2, [part % 2 for part in range(2 * per_rank)])
    with pytest.raises(ValueError, match="exactly 2 stages per rank"):
        torch_schedules.get_schedule_class(schedule)(stages, 8)
    assert refused(2, 2 * per_rank, schedule=schedule, per_part=1, first_less=0, last_less=0)


SMALLER = ", and so would parallelism.pipeline_parallel_microbatch_size 1"


@pytest.mark.parametrize(
    ("pp", "batch", "settings", "expected"),
    [
        (4, 3, {}, "training.local_batch_size: 3 makes 3 microbatches of 1, but 1F1B needs at least as many as parts, "
                   "4. 4 would fit"),
        (4, 6, {"microbatch": 2}, "training.local_batch_size: 6 makes 3 microbatches of 2, but 1F1B needs at least as "
                                  f"many as parts, 4. 8 would fit{SMALLER}"),
        (2, 3, {"schedule": "DualPipeV"}, "training.local_batch_size: 3 makes 3 microbatches of 1, but DualPipeV needs "
                                          "at least as many as parts, 4. 4 would fit"),
        (4, 1, {}, "training.local_batch_size: 1 makes 1 microbatch of 1, but 1F1B needs at least as many as parts, 4. "
                   "4 would fit"),
        (4, 9, {"schedule": "Interleaved1F1B"},
         "training.local_batch_size: 9 makes 9 microbatches of 1, but Interleaved1F1B takes them in 2 rounds "
         "(9 // pp 4) of equally many. 8 or 12 would fit"),
        (3, 14, {"schedule": "interleavedzerobubble", "microbatch": 2},
         "training.local_batch_size: 14 makes 7 microbatches of 2, but InterleavedZeroBubble takes them in 2 rounds "
         "(7 // pp 3) of equally many. 12 or 18 would fit"),
        (2, 8, {"microbatch": 3}, "pipeline_parallel_microbatch_size: 3 does not divide training.local_batch_size 8. "
                                  "1 would fit"),
        (2, 12, {"microbatch": 8}, "pipeline_parallel_microbatch_size: 8 does not divide training.local_batch_size 12. "
                                   "4 would fit"),
        (2, 4, {"microbatch": 8}, "pipeline_parallel_microbatch_size: 8 does not divide training.local_batch_size 4. "
                                  "4 would fit"),
    ],
)  # fmt: skip
def test_batches_that_do_not_fit(pp: int, batch: int, settings: dict[str, Any], expected: str) -> None:
    assert refused(pp, 32, batch, **settings) == [expected]


def test_independent_problems_are_told_together() -> None:
    told = refused(2, 32, 8, microbatch=3, schedule="nonesuch")
    assert [message.split(":")[0] for message in told] == [
        "pipeline_parallel_microbatch_size", "pipeline_parallel_schedule"]  # fmt: skip
    told = refused(2, 32, 8, microbatch=3, per_part=1)
    assert [message.split(":")[0] for message in told] == [
        "pipeline_parallel_microbatch_size", "pipeline_parallel_layers_per_stage"]  # fmt: skip


def test_warnings() -> None:
    _, _, warnings = plan(4, 16, 6, schedule="LoopedBFS", microbatch=2)
    assert [str(warning) for warning in warnings] == [
        "training.local_batch_size: 6 makes 3 microbatches for 8 pipeline parts; with fewer microbatches than parts, "
        "ranks wait for each other most of the time. 16 would be the least for 8 microbatches"
    ]
    _, _, warnings = plan(2, 4, names=[FOUR_LAYERS[0] + FOUR_LAYERS[1], FOUR_LAYERS[2] + FOUR_LAYERS[3]], per_part=7)
    assert [str(warning) for warning in warnings] == [
        "parallelism.pipeline_parallel_layers_per_stage: is not used: parallelism.module_fqns_per_model_part is the "
        "split"
    ]
    assert plan(4, 16)[2] == []


# ---- Schedule files ----------------------------------------------------------------------------------------------


def torch_order(schedule: str, pp: int, per_rank: int, num_microbatches: int) -> dict[int, list[Any]]:
    """The compute actions of PyTorch's schedule, overlapped pairs one after the other."""
    v_shaped = SCHEDULES[schedule].v_shaped
    ranks = generate_stage_to_rank_mapping(pp, pp * per_rank, "v" if v_shaped else "loop")
    stages = fake_stages(pp * per_rank, pp, ranks.values())
    # The order that 1F1B shows for its last rank (it runs another) starts at microbatch 1. Interleaved1F1B with one
    # part a rank is the same schedule.
    kind = torch_schedules.get_schedule_class("Interleaved1F1B" if schedule == "1F1B" else schedule)
    order = kind(stages[0] if schedule == "GPipe" else stages, num_microbatches).pipeline_order
    return {
        rank: [
            one
            for action in actions
            for one in (action.sub_actions if action is not None and action.sub_actions else [action])
            if one is None or one.is_compute_op  # single schedules list REDUCE_GRAD too
        ]
        for rank, actions in order.items()
    }


def write_rows(path: Path, rows: Iterable[Iterable[Any]]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["" if cell is None else str(cell) for cell in row] for row in rows])
    return str(path)


def torch_runtime(path: str, pp: int, rank_of_part: Iterable[int], num_microbatches: int) -> Any:
    """PyTorch's runtime with the file loaded and lowered, as an engine would."""
    ranks = list(rank_of_part)
    runtime = torch_schedules._PipelineScheduleRuntime(fake_stages(len(ranks), pp, ranks), num_microbatches)
    runtime._load_csv(path)
    return runtime


@pytest.mark.parametrize("num_microbatches", [4, 8, 10])
@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_files_of_torchs_own_schedules(tmp_path: Path, schedule: str, pp: int, num_microbatches: int) -> None:
    conditions = SCHEDULES[schedule]
    if schedule == "DualPipeV":
        num_microbatches = max(num_microbatches, 2 * pp)
    order = torch_order(schedule, pp, 1 if conditions.single else 2, num_microbatches)
    path = write_rows(tmp_path / "schedule.csv", order.values())
    layout = laid_out(pp, 32, num_microbatches, csv=path)
    built_in = laid_out(pp, 32, num_microbatches, schedule=schedule)
    assert layout.schedule == "csv"
    assert not layout.is_single
    assert (layout.parts, layout.rank_of_part) == (built_in.parts, built_in.rank_of_part)
    assert layout.num_microbatches == num_microbatches
    assert layout.conditions == ScheduleConditions(conditions.splits_backward, conditions.v_shaped, single=False)
    told = [[str(action) for action in actions] for actions in layout.order]
    assert told == [[str(action) for action in order[rank] if action is not None] for rank in range(pp)]
    runtime = torch_runtime(path, pp, layout.rank_of_part, num_microbatches)
    assert runtime.stage_index_to_group_rank == dict(enumerate(layout.rank_of_part))


def test_a_dump_of_torch_is_read_in_its_compute_only_format(tmp_path: Path) -> None:
    schedule = torch_schedules.ScheduleInterleaved1F1B(fake_stages(4, 2, [0, 1, 0, 1]), 4)
    path = str(tmp_path / "schedule.csv")
    schedule._dump_csv(path, format="compute_only")
    assert laid_out(2, 8, 4, csv=path).rank_of_part == (0, 1, 0, 1)
    schedule._dump_csv(path)  # the default has communication in it, which the default of _load_csv does not read
    with pytest.raises(ValueError, match="Expected compute-only schedule"):
        torch_runtime(path, 2, [0, 1, 0, 1], 4)
    told = refused(2, 8, 4, csv=path)
    assert told[0] == (
        f"pipeline_parallel_schedule_csv: {path} line 1: '0UNSHARD' is not a computation; communication and gathering "
        "are added by themselves. Leave only F, I, W and B; PyTorch's _dump_csv writes that with "
        'format="compute_only"'
    )
    assert len(told) == 6
    assert "more mistakes like these" in told[-1]


GOOD = "0F0,0F1,,0B0,0B1\n,1F0,1B0,1F1,1B1\n"


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        GOOD + "\n,,\n  \n",  # blank lines at the end
        "\ufeff" + GOOD,  # as a spreadsheet saves it
        GOOD.replace("\n", "\r\n"),
        GOOD.replace(",", " , "),
        GOOD.replace("0F0", '"0F0"').rstrip(),
        "0F0,0F1,0I0,0W0,0B1\n1F0,1F1,1B0,1I1,1W1\n",  # a backward each in its own way
        "0F0,0F1,0I1,0I0,0W0,0W1\n1F0,1F1,1B1,1B0\n",
    ],
)
def test_files_in_all_their_spellings(tmp_path: Path, text: str) -> None:
    path = tmp_path / "schedule.csv"
    path.write_bytes(text.encode())
    layout = laid_out(2, 8, 2, csv=str(path))
    assert (layout.rank_of_part, layout.num_microbatches) == ((0, 1), 2)
    assert layout.order[0][:2] == (Action(0, "F", 0), Action(0, "F", 1))
    assert layout.conditions == ScheduleConditions(splits_backward="I" in text)


def test_a_file_places_parts_as_it_likes(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "schedule.csv", [["0F0", "1F0", "1B0", "0B0"], ["2F0", "2B0"]])
    layout = laid_out(2, 7, 1, csv=path)
    assert layout.rank_of_part == (0, 0, 1)
    assert layout.conditions == ScheduleConditions(v_shaped=True)  # neighbours on one rank
    assert part_table(layout) == [
        "pp 0: part 0 (tok_embeddings, layers 0-1), part 1 (layers 2-4)",
        "pp 1: part 2 (layers 5-6, norm, output)",
    ]
    path = write_rows(tmp_path / "schedule.csv", [["1F0", "1B0"], ["0F0", "2F0", "2B0", "0B0"]])
    layout = laid_out(2, 7, 1, csv=path)
    assert (layout.rank_of_part, layout.first_rank, layout.last_rank) == ((1, 0, 1), 1, 1)
    assert torch_runtime(path, 2, layout.rank_of_part, 1)


GRAMMAR = "Write the part, a capital F, I, W or B, and the microbatch, such as 0F3; an empty cell is a pause"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["has 0 lines of actions, but parallelism.pipeline_parallel_degree is 2. Write one line a pp rank, the "
              "first rank first"]),
        ("0F0,0B0\n", ["has 1 line of actions, but parallelism.pipeline_parallel_degree is 2. Write one line a pp "
                       "rank, the first rank first"]),
        (GOOD + "2F0,2B0\n", ["has 3 lines of actions, but parallelism.pipeline_parallel_degree is 2. Write one line a "
                              "pp rank, the first rank first"]),
        ("\n0F0,0B0\n", ["line 1: pp rank 0 has no actions"]),
        ("0F0,0f1\n1F0,1G0,1F0x\n", [f"line 1: '0f1' is not an action. {GRAMMAR}",
                                     f"line 2: '1G0' is not an action. {GRAMMAR}",
                                     f"line 2: '1F0x' is not an action. {GRAMMAR}"]),
        ("0F\n1F-1\n", [f"line 1: '0F' is not an action. {GRAMMAR}", f"line 2: '1F-1' is not an action. {GRAMMAR}"]),
        ("0F0;0B0\n1F0;1B0\n", [f"line 1: '0F0;0B0' is not an action. {GRAMMAR}",
                                f"line 2: '1F0;1B0' is not an action. {GRAMMAR}"]),
        ("0F0,0SEND_F0,0B0\n1F0,1B0\n",
         ["line 1: '0SEND_F0' is not a computation; communication and gathering are added by themselves. Leave only "
          'F, I, W and B; PyTorch\'s _dump_csv writes that with format="compute_only"']),
        ("0F0,(0F1;0B0)OVERLAP_F_B\n1F0,1B0\n",
         ["line 1: '(0F1;0B0)OVERLAP_F_B' is an overlapped pair, which is not supported. Write its actions into cells "
          "of their own; PyTorch runs them one after the other anyway"]),
        ("0F0,0B0,1F0\n1F0,1B0\n",
         ["line 2: part 1 is on line 1 already; all actions of a part are on one pp rank"]),
        ("0F0,0B0\n3F0,3B0\n",
         ["line 2: names part 3 but not part 1. Number the parts 0, 1, 2, ... without gaps"]),
        ("0F0,0B0,0F0\n1F0,1B0\n", ["line 1: 0F0 is there more than once"]),
        ("0F0,0F1,0B0,0B1\n1F1,1B1\n",
         ["line 2: 1F0 is missing. Every part needs the forward of every microbatch"]),
        ("0F1,0F2,0B1,0B2\n1F1,1B1,1F2,1B2\n",
         ["line 1: 0F0 is missing. Every part needs the forward of every microbatch",
          "line 2: 1F0 is missing. Every part needs the forward of every microbatch"]),
        ("0F999999,0B0\n1F0,1B0\n",
         ["line 1: 0F0 is missing. Every part needs the forward of every microbatch",
          "line 2: 1F1 is missing. Every part needs the forward of every microbatch"]),
        ("0B0\n1B0\n", ["line 1: 0F0 is missing. Every part needs the forward of every microbatch",
                        "line 2: 1F0 is missing. Every part needs the forward of every microbatch"]),
        ("0F0,0B0\n1F0\n", ["line 2: 1F0 has no backward, neither 1B0 nor 1I0 and 1W0"]),
        ("0F0,0B0,0B7\n1F0,1B0\n", ["line 1: 0B7 has no forward 0F7"]),
        ("0F0,0I0\n1F0,1W0\n", ["line 1: 0I0 is there without 0W0", "line 2: 1W0 is there without 1I0"]),
        ("0F0,0B0,0W0\n1F0,1B0,1I0\n", ["line 1: 0B0 and 0W0 are the same backward, whole and in pieces",
                                        "line 2: 1B0 and 1I0 are the same backward, whole and in pieces"]),
        ("0B0,0F0\n1F0,1B0\n", ["line 1: 0B0 comes before 0F0"]),
        ("0F0,0W0,0I0\n1I0,1F0,1W0\n", ["line 1: 0W0 comes before 0I0", "line 2: 1I0 comes before 1F0"]),
        ("0F0,0F1,0B0,0B1\n1F1,1F0,1B0,1B1\n",
         ["line 2: 1F0 comes after 1F1, but the last part must take the microbatches in order. PyTorch would take "
          "another microbatch's loss, and the gradients would be wrong"]),
        ("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n",
         ["line 1: the schedule cannot be executed, its ranks wait for each other: line 1 stops at 0B0, which needs "
          "1B0; line 2 stops at 1F1, which needs 0F1"]),
        ("2F0,0F0,2B0,0B0\n1F0,1I0,1W0\n",
         ["line 1: the schedule cannot be executed, its ranks wait for each other: line 1 stops at 2F0, which needs "
          "1F0; line 2 stops at 1F0, which needs 0F0"]),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(tmp_path: Path, text: str, expected: list[str]) -> None:
    path = tmp_path / "schedule.csv"
    path.write_text(text)
    assert refused(2, 8, 2, csv=str(path)) == [f"pipeline_parallel_schedule_csv: {path} {line}" for line in expected]


def test_only_ranks_that_wait_for_each_other_are_told(tmp_path: Path) -> None:
    rows = [["0F0", "0B0", "0F1", "0B1"], ["1F0", "1B0", "1F1", "1B1"], ["2F0", "2F1", "2B0", "2B1"]]
    path = write_rows(tmp_path / "schedule.csv", rows)
    (told,) = refused(3, 8, 2, csv=path)
    assert told.endswith(
        "line 2: the schedule cannot be executed, its ranks wait for each other: "
        "line 2 stops at 1B0, which needs 2B0; line 3 stops at 2F1, which needs 1F1"
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    key = "pipeline_parallel_schedule_csv"
    hint = "Give the path of a schedule, one line of actions a pp rank"
    assert refused(2, 8, csv=str(tmp_path / "none.csv")) == [f"{key}: {tmp_path}/none.csv does not exist. {hint}"]
    assert refused(2, 8, csv=str(tmp_path)) == [f"{key}: {tmp_path} is not a file. {hint}"]
    path = tmp_path / "schedule.csv"
    path.write_bytes(b"0F0,\xff\n")
    assert refused(2, 8, csv=str(path)) == [f"{key}: {path} is not UTF-8 text"]
    path.write_text("0F0,0B0\n" + "1" * 200_000 + "\n")
    (told,) = refused(2, 8, csv=str(path))
    assert told.startswith(f"{key}: {path} line 2: is not comma-separated text (field larger than field limit")


def test_a_file_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "schedule.csv", [["0F0", "0B0"], ["1F0", "1B0"]])

    def denied(*_args: Any, **_kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert refused(2, 8, csv=path) == [f"pipeline_parallel_schedule_csv: {path} cannot be read (Permission denied)"]


def test_a_path_under_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "schedule.csv", [["0F0", "0B0"], ["1F0", "1B0"]])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert laid_out(2, 8, 1, csv="~/schedule.csv")


def test_a_file_has_to_agree_with_the_rest_of_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "schedule.csv"
    path.write_text(GOOD)
    assert refused(2, 8, 12, csv=str(path), microbatch=2) == [
        f"pipeline_parallel_schedule_csv: {path} has 2 microbatches, but training.local_batch_size 12 in microbatches "
        "of 2 makes 6. A training.local_batch_size of 4 would fit"
    ]
    assert refused(2, 8, 2, csv=str(path), per_part=2) == [
        "pipeline_parallel_layers_per_stage: 2 makes 5 parts of 8 layers + 2 less_layers, but "
        "parallelism.pipeline_parallel_schedule_csv has 2. 5 would fit"
    ]
    assert refused(2, 4, 2, csv=str(path), names=FOUR_LAYERS) == [
        "module_fqns_per_model_part: has 4 parts, but parallelism.pipeline_parallel_schedule_csv has 2"
    ]
    assert laid_out(2, 8, 2, csv=str(path), per_part=5)
    assert laid_out(2, 1, 2, csv=str(path), names=[["tok_embeddings"], ["layers.0", "norm", "output"]])
    assert refused(2, 1, 2, csv=str(path), first_less=0, last_less=0) == [
        "pipeline_parallel_schedule_csv: makes 2 parts: more pipeline parts than layers plus the first and last parts' "
        "less_layers, 1 + 0 + 0 = 1. Use fewer parts, or a deeper model"
    ]
    assert plan(2, 8, 2, csv=str(path), schedule="1f1b")[2] == []
    _, problems, warnings = plan(2, 8, 2, csv=str(path), schedule="DualPipeV")
    assert not problems
    assert [str(warning) for warning in warnings] == [
        "parallelism.pipeline_parallel_schedule: DualPipeV is not used: parallelism.pipeline_parallel_schedule_csv is "
        "the schedule"
    ]


def test_torch_takes_losses_by_place(tmp_path: Path) -> None:
    """Why the last part's forwards must be in order: the loss of microbatch 0 is the first one, whosever it is."""
    path = write_rows(tmp_path / "schedule.csv", [["0F0", "0F1", "0B0", "0B1"], ["1F1", "1F0", "1B0", "1B1"]])
    assert torch_runtime(path, 2, [0, 1], 2)  # it has nothing against the file
    runtime = torch_schedules._PipelineScheduleRuntime(fake_stages(2, 2, [0, 1]), 2, loss_fn=lambda y, target: target)
    last: Any = SimpleNamespace(is_last=True)
    for microbatch in (1, 0):
        runtime._maybe_compute_loss(last, None, ["loss of 0", "loss of 1"], microbatch)
    assert runtime._maybe_get_loss(last, 0) == "loss of 1"


def test_what_is_accepted_runs_and_what_is_broken_is_refused(tmp_path: Path) -> None:
    """Schedules with a random change: never an exception, and what we accept PyTorch's runtime lowers."""
    chance = random.Random(0)
    path = tmp_path / "schedule.csv"
    accepted = 0
    for round_ in range(300):
        schedule = chance.choice(sorted(SCHEDULES))
        per_rank = 1 if SCHEDULES[schedule].single else 2
        order = torch_order(schedule, 2, per_rank, 4)
        rows = [[str(action) for action in actions if action is not None] for actions in order.values()]
        row = chance.choice(rows)
        place = chance.randrange(len(row))
        change = chance.choice(["swap", "drop", "double", "move", "letter"])
        if change == "swap" and place:
            row[place - 1 : place + 1] = row[place - 1 : place + 1][::-1]
        elif change == "drop":
            del row[place]
        elif change == "double":
            row.insert(place, row[place])
        elif change == "move":
            row.insert(chance.randrange(len(row)), row.pop(place))
        else:
            row[place] = row[place].translate(str.maketrans("FBIW", "BFWI"))
        file, problems = read_schedule_csv(write_rows(path, rows), 2)
        assert (file is None) == bool(problems), round_
        assert all(problem.key == KEY for problem in problems)
        if change in ("drop", "double", "letter"):
            assert file is None, (round_, change, rows)
        if file is not None:
            accepted += 1
            assert torch_runtime(str(path), 2, file.rank_of_part, file.num_microbatches)
        elif "cannot be executed" in problems[0].message:
            with pytest.raises(AssertionError, match="Malformed compute schedule"):
                torch_runtime(str(path), 2, generate_stage_to_rank_mapping(
                    2, 2 * per_rank, "v" if SCHEDULES[schedule].v_shaped else "loop").values(), 4)  # fmt: skip
    assert 20 < accepted < 200


def test_a_large_file_is_checked_at_once(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "schedule.csv", torch_order("InterleavedZeroBubble", 16, 2, 128).values())
    start = time.monotonic()
    assert laid_out(16, 126, 128, csv=path)
    assert time.monotonic() - start < 3
