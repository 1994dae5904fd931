"""Schedule files: what is read, what is refused, and that PyTorch's runtime takes the same."""

import csv
import random
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from tests.unit.layout.pipelines import FOUR_LAYERS, fake_stages, laid_out, plan, refused
from titan_growth.layout.pipeline_layout import (
    SCHEDULES,
    ScheduleConditions,
    part_table,
)
from titan_growth.layout.schedule_csv import KEY, Action, read_schedule_csv
from titan_growth.tools.findings import Findings


def torch_order(schedule: str, pp: int, per_rank: int, num_microbatches: int) -> dict[int, list[Any]]:
    """The compute actions of PyTorch's schedule, overlapped pairs one after the other."""
    v_shaped = SCHEDULES[schedule].v_shaped
    ranks = generate_stage_to_rank_mapping(pp, pp * per_rank, "v" if v_shaped else "loop")
    stages = fake_stages(pp * per_rank, pp, ranks.values())
    # The order that 1F1B shows for its last rank (it runs another) starts at microbatch 1. Interleaved1F1B with one
    # part per rank is the same schedule.
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
    assert not layout.conditions.single
    assert (layout.parts, layout.rank_of_part) == (built_in.parts, built_in.rank_of_part)
    assert layout.num_microbatches == num_microbatches
    assert layout.conditions == ScheduleConditions(conditions.splits_backward, conditions.v_shaped, single=False)
    found = [[str(action) for action in actions] for actions in layout.order]
    assert found == [[str(action) for action in order[rank] if action is not None] for rank in range(pp)]
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
    messages = refused(2, 8, 4, csv=path)
    assert messages[0] == (
        f"pipeline_parallel_schedule_csv: {path} line 1: '0UNSHARD' is not a computation; communication and gathering "
        "are added by themselves. Leave only F, I, W and B; PyTorch's _dump_csv writes that with "
        'format="compute_only"'
    )
    assert len(messages) == 6
    assert "more mistakes like these" in messages[-1]


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
        ("", ["has 0 lines of actions, but parallelism.pipeline_parallel_degree is 2. Write one line per pp rank, the "
              "first rank first"]),
        ("0F0,0B0\n", ["has 1 line of actions, but parallelism.pipeline_parallel_degree is 2. Write one line per pp "
                       "rank, the first rank first"]),
        (GOOD + "2F0,2B0\n", ["has 3 lines of actions, but parallelism.pipeline_parallel_degree is 2. Write one line "
                              "per pp rank, the first rank first"]),
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


def test_only_ranks_that_wait_for_each_other_are_reported(tmp_path: Path) -> None:
    rows = [["0F0", "0B0", "0F1", "0B1"], ["1F0", "1B0", "1F1", "1B1"], ["2F0", "2F1", "2B0", "2B1"]]
    path = write_rows(tmp_path / "schedule.csv", rows)
    (message,) = refused(3, 8, 2, csv=path)
    assert message.endswith(
        "line 2: the schedule cannot be executed, its ranks wait for each other: "
        "line 2 stops at 1B0, which needs 2B0; line 3 stops at 2F1, which needs 1F1"
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    key = "pipeline_parallel_schedule_csv"
    hint = "Give the path of a schedule, one line of actions per pp rank"
    assert refused(2, 8, csv=str(tmp_path / "none.csv")) == [f"{key}: {tmp_path}/none.csv does not exist. {hint}"]
    assert refused(2, 8, csv=str(tmp_path)) == [f"{key}: {tmp_path} is not a file. {hint}"]
    path = tmp_path / "schedule.csv"
    path.write_bytes(b"0F0,\xff\n")
    assert refused(2, 8, csv=str(path)) == [f"{key}: {path} is not UTF-8 text"]
    path.write_text("0F0,0B0\n" + "1" * 200_000 + "\n")
    (message,) = refused(2, 8, csv=str(path))
    assert message.startswith(f"{key}: {path} line 2: is not comma-separated text (field larger than field limit")


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
        file = read_schedule_csv(write_rows(path, rows), 2, found := Findings())
        assert (file is None) == bool(found.problems), round_
        assert all(problem.key == KEY for problem in found.problems)
        if change in ("drop", "double", "letter"):
            assert file is None, (round_, change, rows)
        if file is not None:
            accepted += 1
            assert torch_runtime(str(path), 2, file.rank_of_part, file.num_microbatches)
        elif "cannot be executed" in found.problems[0].message:
            with pytest.raises(AssertionError, match="Malformed compute schedule"):
                torch_runtime(str(path), 2, generate_stage_to_rank_mapping(
                    2, 2 * per_rank, "v" if SCHEDULES[schedule].v_shaped else "loop").values(), 4)  # fmt: skip
    assert 20 < accepted < 200


def test_a_large_file_is_checked_at_once(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "schedule.csv", torch_order("InterleavedZeroBubble", 16, 2, 128).values())
    start = time.monotonic()
    assert laid_out(16, 126, 128, csv=path)
    assert time.monotonic() - start < 3
