"""Microbatches of a pipeline: which batches fit, and that PyTorch agrees."""

from typing import Any

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from tests.unit.layout.pipelines import FOUR_LAYERS, fake_stages, laid_out, plan, refused
from titan_growth.layout.pipeline_layout import (
    SCHEDULES,
    PipelineLayout,
)
from titan_growth.tools.errors import Problem


def torch_schedule(layout: PipelineLayout, pp: int, num_microbatches: int) -> Any:
    kind = torch_schedules.get_schedule_class(layout.schedule)
    stages = fake_stages(len(layout.parts), pp, layout.rank_of_part)
    return kind(stages[0] if layout.conditions.single else stages, num_microbatches)


@pytest.mark.parametrize("per_rank", [1, 2, 3])
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_torch_takes_and_refuses_the_same_microbatches(schedule: str, per_rank: int) -> None:
    """For ranks x parts x microbatches, its constructor and we agree; so do both about parts per rank."""
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
         "training.local_batch_size: 9 makes 9 microbatches of 1, but Interleaved1F1B takes them in 2 equal rounds "
         "(9 // pp 4). 8 or 12 would fit"),
        (3, 14, {"schedule": "interleavedzerobubble", "microbatch": 2},
         "training.local_batch_size: 14 makes 7 microbatches of 2, but InterleavedZeroBubble takes them in 2 equal "
         "rounds (7 // pp 3). 12 or 18 would fit"),
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


def test_independent_problems_are_reported_together() -> None:
    messages = refused(2, 32, 8, microbatch=3, schedule="nonesuch")
    assert [message.split(":")[0] for message in messages] == [
        "pipeline_parallel_microbatch_size", "pipeline_parallel_schedule"]  # fmt: skip
    messages = refused(2, 32, 8, microbatch=3, per_part=1)
    assert [message.split(":")[0] for message in messages] == [
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
