"""Parts of the model, their ranks and schedules: what is accepted, what is refused, in which words."""

import subprocess
import sys
import time
from typing import Any

import pytest
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from tests.unit.layout.pipelines import FOUR_LAYERS, laid_out, plan, refused
from titan_growth.layout.pipeline_layout import (
    SCHEDULES,
    Part,
    part_table,
)

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
            "one part per rank, 4. 5 would fit",
        ),
        (
            4, 16, {"per_part": 9, "schedule": "Interleaved1F1B"},
            "pipeline_parallel_layers_per_stage: 9 makes 2 parts of 16 layers + 2 less_layers, but Interleaved1F1B "
            "takes two or more parts per rank, a multiple of 4 from 8 on. Leave it out",
        ),
        (
            4, 16, {"per_part": 100, "schedule": "Interleaved1F1B"},
            "pipeline_parallel_layers_per_stage: 100 makes 1 part of 16 layers + 2 less_layers, but Interleaved1F1B "
            "takes two or more parts per rank, a multiple of 4 from 8 on. Leave it out",
        ),
        (
            2, 8, {"per_part": 2, "schedule": "Interleaved1F1B"},
            "pipeline_parallel_layers_per_stage: 2 makes 5 parts of 8 layers + 2 less_layers, but Interleaved1F1B "
            "takes two or more parts per rank, a multiple of 2 from 4 on. 3 would fit",
        ),
        (
            2, 10, {"per_part": 2, "schedule": "ZBVZeroBubble"},
            "pipeline_parallel_layers_per_stage: 2 makes 6 parts of 10 layers + 2 less_layers, but ZBVZeroBubble takes "
            "exactly two parts per rank, 4. 3 would fit",
        ),
        (
            2, 10, {"per_part": 6, "schedule": "DualPipeV"},
            "pipeline_parallel_layers_per_stage: 6 makes 2 parts of 10 layers + 2 less_layers, but DualPipeV takes "
            "exactly two parts per rank, 4. 3 would fit",
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

DEPTHS = "A run that grows has several depths, and no single list fits all: leave it out for an even split of each"


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
        (FOUR_LAYERS[:3], 4,
         ["has 3 parts, but LoopedBFS takes two or more parts per rank, a multiple of 2 from 4 on"]),
        ([], 4, ["has 0 parts, but LoopedBFS takes two or more parts per rank, a multiple of 2 from 4 on"]),
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
         ["'tok_embeddings' is in part 1, but belongs in part 0, the first",
          "'norm' is in part 2, but belongs in part 3, the last"]),
        ([["tok_embeddings", "layers.1"], ["layers.0"], ["layers.2"], ["layers.3", "norm", "output"]], 4,
         ["part 0 holds layers.1 where layers.0 should follow. Parts hold consecutive layers, in model order"]),
        ([["tok_embeddings", "layers.0", "layers.2"], ["layers.1"], ["layers.3"], ["norm", "output"]], 4,
         ["part 0 holds layers.2 where layers.1 should follow. Parts hold consecutive layers, in model order"]),
    ],
)  # fmt: skip
def test_written_out_splits_that_do_not_fit(names: list[list[str]], num_layers: int, expected: list[str]) -> None:
    messages = refused(2, num_layers, names=names, schedule="LoopedBFS")
    assert messages == [f"module_fqns_per_model_part: {message}" for message in expected]


# ---- Schedules and placement -------------------------------------------------------------------------------------


def test_the_schedules_are_those_of_torch() -> None:
    with pytest.raises(ValueError, match="valid options are") as caught:
        torch_schedules.get_schedule_class("nonesuch")
    for name in SCHEDULES:
        assert repr(name) in str(caught.value)
        single = issubclass(torch_schedules.get_schedule_class(name), torch_schedules.PipelineScheduleSingle)
        assert SCHEDULES[name].single == single
    abstract = {"PipelineScheduleSingle", "PipelineScheduleMulti"}
    assert set(str(caught.value).split("[")[1].strip("]").replace("'", "").split(", ")) == set(SCHEDULES) | abstract


@pytest.mark.parametrize("name", ["1f1b", "GPIPE", "interleaved1f1b", "zbvzerobubble", "DUALPIPEV", "loopedbfs"])
def test_names_in_any_case_become_canonical(name: str) -> None:
    layout = laid_out(2, 8, schedule=name)
    assert layout.schedule in SCHEDULES
    assert layout.schedule.lower() == name.lower()
    assert layout.conditions == SCHEDULES[layout.schedule]
    assert layout.conditions.single == (layout.schedule in ("1F1B", "GPipe"))


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


@pytest.mark.parametrize("pp", [2, 3, 4, 8])
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_parts_lie_where_torch_expects_them(schedule: str, pp: int) -> None:
    for per_rank in (1,) if SCHEDULES[schedule].single else (2,) if SCHEDULES[schedule].v_shaped else (2, 3, 4):
        less = {"first_less": 0, "last_less": 0}
        layout = laid_out(pp, pp * per_rank, batch=4 * pp, schedule=schedule, per_part=1, **less)
        style = "v" if SCHEDULES[schedule].v_shaped else "loop"
        ranks = generate_stage_to_rank_mapping(pp, pp * per_rank, style)
        assert dict(enumerate(layout.rank_of_part)) == ranks
        assert layout.first_rank == 0
        assert layout.last_rank == (0 if style == "v" else pp - 1)
        for rank in range(pp):
            assert [part.index for part in layout.parts_of(rank)] == [part for part in ranks if ranks[part] == rank]


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
        "from titan_growth.tools.findings import Findings; "
        "section = ParallelismConfig(pipeline_parallel_degree=16); "
        "print(plan_pipeline(section, 126, 64, Findings()).num_microbatches); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("64\n", 0), done.stderr
