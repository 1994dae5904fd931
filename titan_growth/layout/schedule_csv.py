"""A pipeline schedule of the user's own, read from a file and proven to run before anything is started.

The format is PyTorch's compute-only one: one line a pp rank, comma-separated actions, an empty cell where the rank
pauses. An action is a part, a letter and a microbatch: `0F3` is the forward of microbatch 3 through part 0, `0B3` its
whole backward, `0I3` and `0W3` the same backward in two pieces, first for the input and later for the weights.

PyTorch's own reader counts actions in sets and trusts the rest: a doubled action, trailing garbage or an order that it
cannot work in pass, and end in a crash or in wrong gradients on a running job. So the file is checked here in full, by
a reader that needs no torch, and the schedule is made from what was read (`PipelineLayout.order`): a file that is
edited while a run lasts does not change it.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from titan_growth.tools.errors import Problem

KEY = "parallelism.pipeline_parallel_schedule_csv"

_ACTION = re.compile(r"([0-9]{1,6})([FIWB])([0-9]{1,6})")
_NOT_COMPUTE = re.compile(r"[0-9]+(UNSHARD|RESHARD|REDUCE_GRAD|SEND_F|RECV_F|SEND_B|RECV_B)[0-9]*")
_MOST_REPORTED = 5


class Action(NamedTuple):
    """One action of a schedule; its text is that of the file."""

    part: int
    kind: str
    """F forward, B whole backward, I backward for the input, W backward for the weights."""
    microbatch: int

    def __str__(self) -> str:
        return f"{self.part}{self.kind}{self.microbatch}"


@dataclass(frozen=True)
class ScheduleFile:
    """A schedule that is complete and can be executed."""

    order: tuple[tuple[Action, ...], ...]
    """The actions of each pp rank, without the pauses: what a rank waits for follows from the actions."""
    rank_of_part: tuple[int, ...]
    num_microbatches: int


def read_schedule_csv(path: str, pp_degree: int) -> tuple[ScheduleFile | None, list[Problem]]:
    """Reads and checks a schedule for so many pp ranks; None and what is wrong, by line, when it cannot be used."""
    rows, problems = _read(path, pp_degree)
    # Each check relies on those before it, and one mistake would be told several times over: stop at the first.
    for check in (_check_parts, _check_forwards, _check_backwards, _check_order, _check_progress):
        if problems:
            break
        problems = check(path, rows)
    if len(problems) > _MOST_REPORTED:
        more = Problem(KEY, f"{path} has {len(problems) - _MOST_REPORTED} more mistakes like these")
        problems = [*problems[:_MOST_REPORTED], more]
    if problems:
        return None, problems
    rank_of_part = _ranks_of_parts(rows)
    placement = tuple(rank_of_part[part] for part in range(len(rank_of_part)))
    num_microbatches = 1 + max(action.microbatch for action in rows[0].actions)
    return ScheduleFile(tuple(tuple(row.actions) for row in rows), placement, num_microbatches), []


@dataclass(frozen=True)
class _Row:
    line: int
    actions: list[Action]


def _problem(path: str, line: int, message: str, hint: str = "") -> Problem:
    return Problem(KEY, f"{path} line {line}: {message}", hint)


def _read(path: str, pp_degree: int) -> tuple[list[_Row], list[Problem]]:
    """The rows of the file, parsed."""
    file_path = Path(path).expanduser()
    if not file_path.is_file():
        what = "is not a file" if file_path.exists() else "does not exist"
        return [], [Problem(KEY, f"{path} {what}", "Give the path of a schedule, one line of actions a pp rank")]
    cells: list[tuple[int, list[str]]] = []
    try:
        with file_path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                cells.append((reader.line_num, [cell.strip() for cell in row]))
    except UnicodeDecodeError:
        return [], [Problem(KEY, f"{path} is not UTF-8 text")]
    except csv.Error as error:
        return [], [_problem(path, reader.line_num, f"is not comma-separated text ({error})")]
    except OSError as error:
        return [], [Problem(KEY, f"{path} cannot be read ({error.strerror or error})")]
    while cells and not any(cells[-1][1]):
        cells.pop()  # blank lines at the end, which editors leave
    if len(cells) != pp_degree:
        lines = "1 line" if len(cells) == 1 else f"{len(cells)} lines"
        message = f"{path} has {lines} of actions, but parallelism.pipeline_parallel_degree is {pp_degree}"
        return [], [Problem(KEY, message, "Write one line a pp rank, the first rank first")]
    rows, problems = [], []
    for line, texts in cells:
        rows.append(_Row(line, []))
        for text in filter(None, texts):
            if match := _ACTION.fullmatch(text):
                rows[-1].actions.append(Action(int(match[1]), match[2], int(match[3])))
            else:
                problems.append(_problem(path, line, *_why_not_an_action(text)))
    return rows, problems


def _why_not_an_action(text: str) -> tuple[str, str]:
    """(message, hint) for a cell that is not an action."""
    shown = repr(text if len(text) <= 40 else text[:37] + "...")
    if text.startswith("(") or text.endswith("OVERLAP_F_B"):
        hint = "Write its actions into cells of their own; PyTorch runs them one after the other anyway"
        return f"{shown} is an overlapped pair, which is not supported", hint
    if _NOT_COMPUTE.fullmatch(text):
        hint = 'Leave only F, I, W and B; PyTorch\'s _dump_csv writes that with format="compute_only"'
        return f"{shown} is not a computation; communication and gathering are added by themselves", hint
    hint = "Write the part, a capital F, I, W or B, and the microbatch, such as 0F3; an empty cell is a pause"
    return f"{shown} is not an action", hint


def _ranks_of_parts(rows: list[_Row]) -> dict[int, int]:
    return {action.part: rank for rank, row in enumerate(rows) for action in row.actions}


def _check_parts(path: str, rows: list[_Row]) -> list[Problem]:
    """Every rank has a part, every part one rank, and no part is left out."""
    problems = []
    line_of_part: dict[int, int] = {}
    for rank, row in enumerate(rows):
        if not row.actions:
            problems.append(_problem(path, row.line, f"pp rank {rank} has no actions"))
        for part in sorted({action.part for action in row.actions}):
            first = line_of_part.setdefault(part, row.line)
            if first != row.line:
                message = f"part {part} is on line {first} already; all actions of a part are on one pp rank"
                problems.append(_problem(path, row.line, message))
    missing = next((part for part in range(len(line_of_part)) if part not in line_of_part), None)
    if missing is not None:
        highest = max(line_of_part)
        message = f"names part {highest} but not part {missing}"
        problems.append(_problem(path, line_of_part[highest], message, "Number the parts 0, 1, 2, ... without gaps"))
    return problems


def _check_forwards(path: str, rows: list[_Row]) -> list[Problem]:
    """No action is there twice, and every part has the forward of every microbatch."""
    problems = []
    forwards: dict[int, set[int]] = {}
    for row in rows:
        twice = [action for action, count in Counter(row.actions).items() if count > 1]
        problems += [_problem(path, row.line, f"{action} is there more than once") for action in twice]
        for part, kind, microbatch in row.actions:
            forwards.setdefault(part, set()).update([microbatch] if kind == "F" else [])
    num_microbatches = 1 + max((max(found, default=-1) for found in forwards.values()), default=-1)
    for row in rows:
        for part in sorted({action.part for action in row.actions}):
            missing = next((number for number in range(num_microbatches or 1) if number not in forwards[part]), None)
            if missing is not None:
                message = f"{Action(part, 'F', missing)} is missing"
                problems.append(_problem(path, row.line, message, "Every part needs the forward of every microbatch"))
    return problems


def _check_backwards(path: str, rows: list[_Row]) -> list[Problem]:
    """Every forward has one backward: B, or I and W."""
    problems = []
    for row in rows:
        kinds: dict[tuple[int, int], str] = {}
        for part, kind, microbatch in row.actions:
            kinds[part, microbatch] = kinds.get((part, microbatch), "") + kind
        for (part, microbatch), found in kinds.items():
            backward = "".join(sorted(found.replace("F", "")))
            whole, for_input, for_weights = (Action(part, kind, microbatch) for kind in "BIW")
            if "F" not in found:
                message = f"{part}{found[0]}{microbatch} has no forward {part}F{microbatch}"
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
            problems.append(_problem(path, row.line, message))
    return problems


def _check_order(path: str, rows: list[_Row]) -> list[Problem]:
    """A rank's own actions come in an order that its own parts allow."""
    problems = []
    last_part = max(_ranks_of_parts(rows))
    for row in rows:
        place = {action: position for position, action in enumerate(row.actions)}
        for action in row.actions:
            before = {"B": "F", "I": "F", "W": "I"}.get(action.kind)
            needed = action._replace(kind=before) if before else action
            if place[needed] > place[action]:
                problems.append(_problem(path, row.line, f"{action} comes before {needed}"))
        forwards = [action for action in row.actions if action.part == last_part and action.kind == "F"]
        for earlier, later in pairwise(forwards):
            if later.microbatch < earlier.microbatch:
                # PyTorch appends a loss per forward and looks it up by the microbatch's number.
                message = f"{later} comes after {earlier}, but the last part must take the microbatches in order"
                hint = "PyTorch would take another microbatch's loss, and the gradients would be wrong"
                problems.append(_problem(path, row.line, message, hint))
                break
    return problems


def _check_progress(path: str, rows: list[_Row]) -> list[Problem]:
    """Runs the schedule: every rank does its next action as soon as what that needs from other parts is done."""
    last_part = max(_ranks_of_parts(rows))
    done: set[Action] = set()

    def waits_for(action: Action) -> Action | None:
        """The action of a neighbouring part that must be done first, and is not."""
        if action.kind == "F" and action.part > 0:
            needed = [action._replace(part=action.part - 1)]
        elif action.kind in "BI" and action.part < last_part:
            needed = [Action(action.part + 1, kind, action.microbatch) for kind in "BI"]
        else:
            return None
        there = [other for other in needed if other in line_of]
        return None if any(other in done for other in there) else there[0]

    line_of = {action: row.line for row in rows for action in row.actions}
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
        return []
    # Whoever waits does so for a line that waits too: follow that until it comes round, and tell the circle.
    line, seen = min(stuck), list[int]()
    while line not in seen:
        seen.append(line)
        needed = waits_for(stuck[line])
        assert needed is not None, f"{stuck[line]} is stuck but waits for nothing"
        line = line_of[needed]
    circle = seen[seen.index(line) :]
    told = "; ".join(f"line {line} stops at {stuck[line]}, which needs {waits_for(stuck[line])}" for line in circle)
    return [_problem(path, min(circle), f"the schedule cannot be executed, its ranks wait for each other: {told}")]
