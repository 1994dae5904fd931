"""All rows of the fault table."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.broken_runs import INTERVAL
from tests.faults.rows import (
    Row,
    clock_that_can_be_set,
    damaged,
    flip_bit,
    full_from_the_start,
    in_newest,
    injected,
    read_only,
    small_disk,
    truncate,
    two_runs,
)

ASYNC = {"checkpoint.async_mode": "async"}
AGAIN = r"run the (same )?command again"
KILLED = r"was killed by signal 9 \(SIGKILL\); run the same command again"
SAVED = r"stopped at step \d+ and saved; run the same command again"
NOT_BEGUN = r"stopped by SIGTERM before training began; run the same command again"
POINTS = {
    "build:0": "start-up",
    "forward": "mid-step, before the forward pass",
    "backward": "mid-step, gradients computed",
    "update": "mid-step, weights updated",
    "save": "mid-save, nothing written",
    "shards": "mid-save, a shard half written",
    "metadata": "mid-save, shards and metadata written",
    "commit": "mid-save, all but the manifest",
    "committed": "mid-save, manifest just written",
    "behind": "mid-async-save, the next step under way",
    "retention": "mid-retention, manifest removed",
    "half_removed": "mid-retention, old checkpoint half removed",
    "build:1": "mid-growth, small model gone",
    "read": "mid-growth, half read",
    "grown": "mid-growth, verified",
}


def words(where: str) -> str:
    """A fault's point in words: `shards:6:1:kill` -> `mid-save, a shard half written (step 6)`."""
    point, step = where.split(":")[:2]
    return POINTS[f"build:{step}"] if point == "build" else POINTS[point] + (f" (step {step})" if step else "")


def killed(where: str, *, ranks: int = 2, quick: bool = False, allowed: int = INTERVAL, **more: Any) -> Row:
    """A row of SIGKILL."""
    victim = where.split(":")[2]
    fault = "kill -9 of all ranks" if victim == "all" else "kill -9 of one rank"
    who = "" if victim == "all" else f", rank {victim}"
    who += ", asynchronous saves" if more.get("settings") == ASYNC else ""
    more.setdefault("sees", KILLED)
    return injected(fault, words(where) + who, f"{where}:kill", ranks=ranks, quick=quick, allowed=allowed, **more)


KILLS = [
    killed("forward:10:1"),
    killed("backward:9:0"),
    killed("backward:9:1", quick=True),
    killed("backward:9:all", quick=True),
    killed("update:8:0"),
    killed("update:2:all"),
    killed("save:6:0"),
    killed("shards:6:0"),
    killed("shards:6:1", quick=True),
    killed("shards:9:all"),
    killed("metadata:6:1"),
    killed("commit:6:0"),
    killed("commit:9:all"),
    killed("commit:5:1"),
    killed("committed:9:0"),
    killed("retention:3:0"),
    killed("half_removed:3:0", quick=True),
    killed("half_removed:3:all"),
    killed("build:1:1"),
    killed("read::0"),
    killed("grown::all"),
    killed("backward:9:2", ranks=4),
    killed("shards:6:3", ranks=4),
    killed("half_removed:3:0", ranks=4),
    killed("read::1", ranks=4),
    injected(
        "kill -9 of one rank",
        "mid-step, MAX_RESTARTS=1",
        "backward:9:1:kill",
        status=0,
        sees="resumed from",
        environ=lambda base: {"MAX_RESTARTS": "1"},
    ),
    injected(
        "kill -9 of the launcher",
        "mid-step",
        "backward:9:0:kill_launcher",
        status=-9,
        sees="step 8/12",  # what the ranks say goes through the launcher
        allowed=0,
        quick=True,
    ),
    injected("kill -9 of the launcher", "mid-save", "shards:6:0:kill_launcher", status=-9, sees="step 6/12", allowed=0),
]
LATE = 2 * INTERVAL
"""Steps that an asynchronous save may cost: it was under way, so the one before it counts."""
ASYNC_KILLS = [
    killed("behind:6:0", settings=ASYNC, allowed=LATE),
    killed("behind:6:1", settings=ASYNC, allowed=LATE, quick=True),
    killed("behind:9:all", settings=ASYNC, allowed=LATE),
    killed("shards:9:1", settings=ASYNC, allowed=LATE),
    killed("commit:6:0", settings=ASYNC, allowed=LATE),
    killed("committed:9:all", settings=ASYNC, allowed=LATE),
    killed("half_removed:3:0", settings=ASYNC, allowed=LATE),
    killed("behind:9:2", ranks=4, settings=ASYNC, allowed=LATE),
]


def terminated(where: str, *, status: int = 75, sees: str = SAVED, quick: bool = False, **more: Any) -> Row:
    """A row of SIGTERM: nothing is lost."""
    settings = more.pop("settings", {})
    name = {"preflight": "start-up, recipe being checked", "import": "start-up, ranks importing"}
    point = name.get(where.split(":")[0]) or words(where)
    point += " and saving asynchronously" if settings else ""
    return injected(
        "SIGTERM", point, f"{where}:term", status=status, sees=sees, allowed=0, quick=quick, settings=settings, **more
    )


TERMS = [
    terminated("preflight::0", sees=NOT_BEGUN),
    terminated("import::1", sees=NOT_BEGUN),
    terminated("build:0:0", sees=AGAIN),
    terminated("forward:1:0"),
    terminated("backward:8:1", quick=True),
    terminated("update:8:0"),
    terminated("shards:6:0"),
    terminated("commit:9:0"),
    terminated("half_removed:3:0"),
    terminated("commit:5:0"),
    terminated("build:1:0"),
    terminated("read::1"),
    terminated("grown::0"),
    terminated("backward:12:0", status=0, sees="finished: step 12/12"),
    terminated("backward:8:3", ranks=4),
    terminated("read::2", ranks=4),
    terminated("behind:6:0", settings=ASYNC),
]


FULL = r"error: .*(No space left on device|it needs .*, but only .* free)"
"""The second when a save is tried again."""


def make_room(folder: Path) -> None:
    (folder.parent / "filler").unlink(missing_ok=True)


def full(where: str, *, sees: str = FULL, **more: Any) -> Row:
    """A row of a disk that is full from a point on."""
    left = where.split(":")[3].partition("-")[2]
    point = f"{words(where)}, {int(left):,} bytes left"
    return injected("disk full", point, where, sees=sees, place=small_disk, mend=make_room, **more)


DISKS = [
    full_from_the_start(),
    full("save:6:0:fill-100000", sees=r"step-6 was not saved: it needs .*only .* free"),
    full("shards:6:0:fill-0", quick=True),
    full("shards:9:1:fill-50000"),
    full("metadata:6:0:fill-0"),
    full("commit:9:0:fill-0"),
    full("backward:8:0:fill-0"),
    full("grown::0:fill-0"),
    full("behind:6:1:fill-0", settings=ASYNC, allowed=LATE),
    injected(
        "disk full",
        "for 2 seconds, mid-save",
        "shards:6:0:fill_for-2000",
        status=0,
        sees="Trying again",
        place=partial(small_disk),
        mend=make_room,
    ),
]


def mutable(folder: Path) -> None:
    subprocess.run(["chattr", "-i", folder / "checkpoint"], check=True)


NOT_PERMITTED = r"was not saved: Operation not permitted"
FOLDERS = [
    read_only(resumes=False),
    read_only(resumes=True),
    *(
        injected(
            "checkpoint folder that can no more be written",
            f"at the save of step {step}",
            f"save:{step}:0:immutable",
            sees=NOT_PERMITTED,
            mend=mutable,
            quick=step == 9,
        )
        for step in (6, 9)
    ),
]


def shard(rank: int) -> Callable[[Path], Path]:
    return lambda step: step / f"__{rank}_0.distcp"


def every_shard(checkpoints: Path) -> None:
    for path in checkpoints.glob("step-*/__1_0.distcp"):
        flip_bit(path, share=0.5)


def flipped(name: str, *, quick: float | str = "", places: tuple[float | str, ...]) -> list[Row]:
    """Rows of one bit of a file of the newest checkpoint: at shares of the file, or behind texts."""
    rows = []
    for place in places:
        text = isinstance(place, str)
        point = f"{name}, behind `{place.strip()}`" if isinstance(place, str) else f"{name}, at {place:.0%} of it"
        given: dict[str, Any] = {"after": str(place).encode()} if text else {"share": place}
        damage = in_newest(lambda step, given=given: flip_bit(step / name, **given))
        rows.append(damaged("flipped bit", point, damage, sees="step-9 refused", quick=place == quick))
    return rows


DAMAGES = [
    damaged("truncated shard", "one byte", in_newest(lambda step: truncate(shard(0)(step), 1)), sees="step-9 refused"),
    damaged(
        "truncated shard",
        "half of it",
        in_newest(lambda step: truncate(shard(1)(step), 500_000)),
        sees=r"step-9 refused: __1_0.distcp has [\d,]+ bytes instead of",
        quick=True,
    ),
    damaged(
        "truncated shard",
        "to nothing",
        in_newest(lambda step: truncate(shard(1)(step), shard(1)(step).stat().st_size)),
        sees="step-9 refused",
    ),
    *flipped("__0_0.distcp", places=(0.0, 0.5, 1.0), quick=0.5),
    *flipped("__1_0.distcp", places=(0.1, 0.9)),
    *flipped(".metadata", places=(0.0, 0.3, 0.99), quick=0.3),
    *flipped("recipe.toml", places=(0.2, "n_layers = "), quick="n_layers = "),
    *flipped("lineage.json", places=('"step": ', 0.9), quick='"step": '),
    *flipped(
        "manifest.json",
        places=(0.0, '"step": ', '"tokens": ', '"samples": ', '"metrics_offset": ', '"num_ranks": ', '"sha256": "'),
        quick='"samples": ',
    ),
    damaged(
        "missing shard",
        "rank 1's",
        in_newest(lambda step: shard(1)(step).unlink()),
        sees="step-9 refused: __1_0.distcp is missing",
        quick=True,
    ),
    damaged("missing shard", ".metadata", in_newest(lambda step: (step / ".metadata").unlink()), sees="step-9 refused"),
    damaged("deleted newest checkpoint", "all of it", in_newest(shutil.rmtree), sees="from .*step-6", quick=True),
    damaged(
        "deleted newest checkpoint",
        "its manifest",
        in_newest(lambda step: (step / "manifest.json").unlink()),
        sees="from .*step-6",
    ),
    damaged("flipped bit", "a shard of every checkpoint", every_shard, sees="none can be used", status=2, quick=True),
    damaged(
        "missing shard",
        "of every checkpoint",
        lambda checkpoints: [path.unlink() for path in checkpoints.glob("step-*/__0_0.distcp")] and None,
        sees="none can be used",
        status=2,
    ),
]

TIMEOUT_SECONDS = 8
HANGS = [
    injected(
        "a rank hangs (SIGSTOP)",
        f"{words(where)}, rank {where.split(':')[2]}",
        f"{where}:stop",
        settings={"comm.train_timeout_seconds": TIMEOUT_SECONDS, **settings},
        sees=AGAIN,
        within_seconds=TIMEOUT_SECONDS + 45,
        allowed=LATE if settings else INTERVAL,
        quick=where == "backward:9:1",
    )
    for where, settings in (
        ("backward:9:1", {}),
        ("backward:8:0", {}),
        ("shards:9:1", {}),  # not in step 6: the first step after a growth has the time limit of the start
        ("commit:9:0", {}),
        ("behind:9:1", ASYNC),
    )
]


def not_a_number(policy: str, action: str, step: int, *, quick: bool = False, **more: Any) -> Row:
    """A row of NaN under a policy of `[stability]`; the table of a run without one is left out."""
    settings = {} if policy == "default" else {"stability.nonfinite": policy}
    where = "a gradient" if action == "nan_gradient" else "the activations of one token"
    point = "backward" if action == "nan_gradient" else "forward"
    return injected(
        "NaN",
        f"in {where} of rank 0 at step {step}, policy {policy}",
        f"{point}:{step}:0:{action}",
        settings=settings,
        quick=quick,
        **more,
    )


NANS = [
    row
    for action in ("nan_gradient", "nan_data")
    for row in (
        not_a_number("default", action, 4, sees=r"error: step 4: (loss|gradient)", quick=action == "nan_gradient"),
        not_a_number("stop", action, 8, sees=r"step 8\b.*(nan|NaN|not finite)"),
        not_a_number("skip", action, 8, status=0, sees=r"step 8\b.*skip", allowed=0, bitwise=False),
        not_a_number("roll_back", action, 8, status=0, sees=r"(roll|went) back|rolled back", bitwise=False),
    )
]

CLOCKS = [
    injected(
        "clock set back",
        "a day, mid-step",
        "backward:9:0:clock-86400",
        status=0,
        sees="finished: step 12/12",
        environ=clock_that_can_be_set,
        allowed=0,
    ),
    injected(
        "clock set back",
        "a day, then kill -9 of all ranks",
        "backward:8:all:clock-86400+kill",
        sees=KILLED,
        environ=clock_that_can_be_set,
        quick=True,
    ),
    injected(
        "clock set back",
        "an hour, mid-save",
        "shards:6:0:clock-3600",
        status=0,
        sees="finished: step 12/12",
        environ=clock_that_can_be_set,
        allowed=0,
    ),
]

TWO = [
    two_runs("the first is in a step", "backward:9:0:wait", quick=True),
    two_runs("the first is in a save", "commit:6:0:wait"),
    two_runs("both are started at once", None),
]

ROWS: list[Row] = [
    *KILLS,
    *ASYNC_KILLS,
    *TERMS,
    *DISKS,
    *FOLDERS,
    *DAMAGES,
    *HANGS,
    *NANS,
    *CLOCKS,
    *TWO,
]
