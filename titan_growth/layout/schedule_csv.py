"""A user's pipeline schedule, read from a file and proven executable before anything starts.

The format is PyTorch's compute-only one: one line per pp rank, comma-separated actions, an empty cell for a pause. An
action is a part, a letter and a microbatch: `0F3` is the forward of microbatch 3 through part 0, `0B3` its full
backward, `0I3` and `0W3` the same backward in two pieces, first for the input and later for the weights.

PyTorch's reader counts actions in sets and trusts the rest: duplicates, trailing garbage and impossible orders pass,
then crash a running job or give wrong gradients. So the file is checked here in full, without torch, and the schedule
is built from what was read (`PipelineLayout.order`): editing the file during a run changes nothing.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from titan_growth.tools.findings import Findings
from titan_growth.tools.location import local_path

KEY = "parallelism.pipeline_parallel_schedule_csv"

_ACTION = re.compile(r"([0-9]{1,6})([FIWB])([0-9]{1,6})")
_NOT_COMPUTE = re.compile(r"[0-9]+(UNSHARD|RESHARD|REDUCE_GRAD|SEND_F|RECV_F|SEND_B|RECV_B)[0-9]*")
_MOST_REPORTED = 5


class Action(NamedTuple):
    """One action of a schedule; `str` gives the file's notation."""

    part: int
    kind: str
    """F forward, B full backward, I backward for the input, W backward for the weights."""
    microbatch: int

    def __str__(self) -> str:
        return f"{self.part}{self.kind}{self.microbatch}"


@dataclass(frozen=True)
class ScheduleFile:
    """A complete, executable schedule."""

    order: tuple[tuple[Action, ...], ...]
    """The actions of each pp rank. Pauses are left out: what a rank waits for follows from the actions."""
    rank_of_part: tuple[int, ...]
    num_microbatches: int


def read_schedule_csv(path: str, pp_degree: int, found: Findings) -> ScheduleFile | None:
    """Reads and checks a schedule for `pp_degree` ranks; None if it cannot be used. Problems name the line."""
    own = Findings()
    rows = _read(path, pp_degree, own)
    # Each check relies on those before it, and would report one mistake again: stop at the first.
    for check in (_check_parts, _check_forwards, _check_backwards, _check_order, _check_progress):
        if not own.problems:
            check(rows, own)
    found.problems += own.problems[:_MOST_REPORTED]
    if (more := len(own.problems) - _MOST_REPORTED) > 0:
        found.problem(KEY, f"{path} has {more} more mistakes like these")
    if own.problems:
        return None
    rank_of_part = _ranks_of_parts(rows)
    placement = tuple(rank_of_part[part] for part in range(len(rank_of_part)))
    num_microbatches = 1 + max(action.microbatch for action in rows[0].actions)
    return ScheduleFile(tuple(tuple(row.actions) for row in rows), placement, num_microbatches)


@dataclass(frozen=True)
class _Row:
    path: str
    line: int
    actions: list[Action] = field(default_factory=list)

    def problem(self, found: Findings, message: str, hint: str = "") -> None:
        """Reports a problem in this line."""
        found.problem(KEY, f"{self.path} line {self.line}: {message}", hint)


def _read(path: str, pp_degree: int, found: Findings) -> list[_Row]:
    """The rows of the file, parsed."""
    cells = _cells(path, found)
    if found.problems:
        return []
    while cells and not any(cells[max(cells)]):
        cells.popitem()  # trailing blank lines
    if len(cells) != pp_degree:
        lines = "1 line" if len(cells) == 1 else f"{len(cells)} lines"
        message = f"{path} has {lines} of actions, but parallelism.pipeline_parallel_degree is {pp_degree}"
        found.problem(KEY, message, "Write one line per pp rank, the first rank first")
        return []
    rows = []
    for line, texts in cells.items():
        rows.append(row := _Row(path, line))
        for text in filter(None, texts):
            if match := _ACTION.fullmatch(text):
                row.actions.append(Action(int(match[1]), match[2], int(match[3])))
            else:
                _report_no_action(row, text, found)
    return rows


def _cells(path: str, found: Findings) -> dict[int, list[str]]:
    """Line number -> its cells."""
    file_path = local_path(path)
    cells: dict[int, list[str]] = {}
    if not file_path.is_file():
        what = "is not a file" if file_path.exists() else "does not exist"
        found.problem(KEY, f"{path} {what}", "Give the path of a schedule, one line of actions per pp rank")
        return cells
    try:
        with file_path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                cells[reader.line_num] = [cell.strip() for cell in row]
    except UnicodeDecodeError:
        found.problem(KEY, f"{path} is not UTF-8 text")
    except csv.Error as error:
        _Row(path, reader.line_num).problem(found, f"is not comma-separated text ({error})")
    except OSError as error:
        found.problem(KEY, f"{path} cannot be read ({error.strerror or error})")
    return cells


def _report_no_action(row: _Row, text: str, found: Findings) -> None:
    """Reports a cell that is not an action."""
    shown = repr(text if len(text) <= 40 else text[:37] + "...")
    if text.startswith("(") or text.endswith("OVERLAP_F_B"):
        hint = "Write its actions into cells of their own; PyTorch runs them one after the other anyway"
        row.problem(found, f"{shown} is an overlapped pair, which is not supported", hint)
    elif _NOT_COMPUTE.fullmatch(text):
        hint = 'Leave only F, I, W and B; PyTorch\'s _dump_csv writes that with format="compute_only"'
        row.problem(found, f"{shown} is not a computation; communication and gathering are added by themselves", hint)
    else:
        hint = "Write the part, a capital F, I, W or B, and the microbatch, such as 0F3; an empty cell is a pause"
        row.problem(found, f"{shown} is not an action", hint)


def _ranks_of_parts(rows: list[_Row]) -> dict[int, int]:
    return {action.part: rank for rank, row in enumerate(rows) for action in row.actions}


def _check_parts(rows: list[_Row], found: Findings) -> None:
    """Every rank has a part, every part has one rank, and no part is missing."""
    row_of_part: dict[int, _Row] = {}
    for rank, row in enumerate(rows):
        if not row.actions:
            row.problem(found, f"pp rank {rank} has no actions")
        for part in sorted({action.part for action in row.actions}):
            first = row_of_part.setdefault(part, row)
            if first is not row:
                message = f"part {part} is on line {first.line} already; all actions of a part are on one pp rank"
                row.problem(found, message)
    missing = next((part for part in range(len(row_of_part)) if part not in row_of_part), None)
    if missing is not None:
        highest = max(row_of_part)
        message = f"names part {highest} but not part {missing}"
        row_of_part[highest].problem(found, message, "Number the parts 0, 1, 2, ... without gaps")


def _check_forwards(rows: list[_Row], found: Findings) -> None:
    """No action is duplicated, and every part has the forward of every microbatch."""
    forwards: dict[int, set[int]] = {}
    for row in rows:
        for action, count in Counter(row.actions).items():
            if count > 1:
                row.problem(found, f"{action} is there more than once")
        for part, kind, microbatch in row.actions:
            forwards.setdefault(part, set()).update([microbatch] if kind == "F" else [])
    num_microbatches = 1 + max((max(numbers, default=-1) for numbers in forwards.values()), default=-1)
    for row in rows:
        for part in sorted({action.part for action in row.actions}):
            missing = next((number for number in range(num_microbatches or 1) if number not in forwards[part]), None)
            if missing is not None:
                message = f"{Action(part, 'F', missing)} is missing"
                row.problem(found, message, "Every part needs the forward of every microbatch")


def _check_backwards(rows: list[_Row], found: Findings) -> None:
    """Every forward has one backward: B, or I and W."""
    for row in rows:
        kinds: dict[tuple[int, int], str] = {}
        for part, kind, microbatch in row.actions:
            kinds[part, microbatch] = kinds.get((part, microbatch), "") + kind
        for (part, microbatch), given in kinds.items():
            backward = "".join(sorted(given.replace("F", "")))
            whole, for_input, for_weights = (Action(part, kind, microbatch) for kind in "BIW")
            if "F" not in given:
                message = f"{part}{given[0]}{microbatch} has no forward {part}F{microbatch}"
            elif backward in ("B", "IW"):
                continue
            elif "B" in backward:
                other = for_input if "I" in backward else for_weights
                message = f"{whole} and {other} are the same backward, whole and in pieces"
            elif backward:
                here, gone = (for_input, for_weights) if backward == "I" else (for_weights, for_input)
                message = f"{here} is there without {gone}"
            else:
                message = f"{part}F{microbatch} has no backward, neither {whole} nor {for_input} and {for_weights}"
            row.problem(found, message)


def _check_order(rows: list[_Row], found: Findings) -> None:
    """Each rank's actions are in an order that its own parts allow."""
    last_part = max(_ranks_of_parts(rows))
    for row in rows:
        place = {action: position for position, action in enumerate(row.actions)}
        for action in row.actions:
            before = {"B": "F", "I": "F", "W": "I"}.get(action.kind)
            needed = action._replace(kind=before) if before else action
            if place[needed] > place[action]:
                row.problem(found, f"{action} comes before {needed}")
        forwards = [action for action in row.actions if action.part == last_part and action.kind == "F"]
        for earlier, later in pairwise(forwards):
            if later.microbatch < earlier.microbatch:
                # PyTorch appends a loss per forward and looks it up by the microbatch's number.
                message = f"{later} comes after {earlier}, but the last part must take the microbatches in order"
                hint = "PyTorch would take another microbatch's loss, and the gradients would be wrong"
                row.problem(found, message, hint)
                break


def _check_progress(rows: list[_Row], found: Findings) -> None:
    """Simulates the schedule: each rank runs its next action as soon as its inputs from other parts are ready."""
    last_part = max(_ranks_of_parts(rows))
    done: set[Action] = set()

    def waits_for(action: Action) -> Action | None:
        """The pending action of an adjacent part that must be done first, or None."""
        if action.kind == "F" and action.part > 0:
            needed = [action._replace(part=action.part - 1)]
        elif action.kind in "BI" and action.part < last_part:
            needed = [Action(action.part + 1, kind, action.microbatch) for kind in "BI"]
        else:
            return None
        present = [other for other in needed if other in row_of]
        return None if any(other in done for other in present) else present[0]

    row_of = {action: row for row in rows for action in row.actions}
    next_place = [0] * len(rows)
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            while next_place[rank] < len(row.actions) and waits_for(row.actions[next_place[rank]]) is None:
                done.add(row.actions[next_place[rank]])
                next_place[rank] += 1
                moved = True
    stuck = {
        row.line: row.actions[place] for row, place in zip(rows, next_place, strict=True) if place < len(row.actions)
    }
    if not stuck:
        return
    # Every stuck line waits for another stuck line: follow them to the cycle, and report that.
    line, seen = min(stuck), list[int]()
    while line not in seen:
        seen.append(line)
        needed = waits_for(stuck[line])
        assert needed is not None, f"{stuck[line]} is stuck but waits for nothing"
        line = row_of[needed].line
    cycle = seen[seen.index(line) :]
    stops = "; ".join(f"line {line} stops at {stuck[line]}, which needs {waits_for(stuck[line])}" for line in cycle)
    first = row_of[stuck[min(cycle)]]
    first.problem(found, f"the schedule cannot be executed, its ranks wait for each other: {stops}")
