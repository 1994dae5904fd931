"""Breaks real runs in every way that we know, and judges what the user sees, what is lost, and what comes of the run.

    python -m tests.faults.injected                    # the whole table, about an hour on two cores
    python -m tests.faults.injected --quick            # one point of each fault, about eight minutes
    python -m tests.faults.injected --only "SIGTERM"   # rows whose name matches; writes no page
    python -m tests.faults.injected --only "SIGTERM" --into part.jsonl    # rows of a part, for --played part.jsonl
    python -m tests.faults.injected --list

Every run is `run_train.sh` with a small model (`broken_runs.py`) that grows and changes its mesh on the way. Faults at
an exact point are put there by a plugin (`points.py`) that every run names in its recipe, the unbroken one too.
Then the same command is given again. A row fails when the status or the message is another one than it should be, when
a traceback is on the screen, when a process stays behind, when more is lost than it may be, or when the run does not
leave what an unbroken run leaves: `metrics.jsonl` without its timings, and every tensor of the last checkpoint, bit for
bit. Disks are really full (a tmpfs of 24 MiB), folders really read-only (a bind mount) or immutable (`chattr +i`); that
needs root on Linux, and rows that a machine cannot play are listed as such. Writes `benchmarks/results/faults.md` and
`faults.json`; status 1 when a row fails.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.faults.broken_runs import INTERVAL, RESULTS, Workshop
from tests.faults.rows import NotPossibleHereError, Outcome, Row
from tests.faults.table import ROWS

LONGEST_CELL = 300
IN_THE_NAME = ("row", "fault", "point", "ranks", "ok")


def play(row: Row, shop: Workshop, base: Path) -> dict[str, Any]:
    """One row's line of the table."""
    base.mkdir()
    began = time.monotonic()
    entry: dict[str, Any] = {"fault": row.fault, "point": row.point, "ranks": row.ranks}
    try:
        outcome = row.play(shop, base)
    except NotPossibleHereError as reason:
        return {**entry, "sees": f"not possible here: {reason}", "ok": None, "wrong": []}
    except Exception as error:  # a run that left nothing to compare, for one: the other rows still count
        outcome = Outcome("", -1, wrong=[f"{type(error).__name__}: {error}"])
    entry |= {"sees": shortened(outcome.sees, base), "status": outcome.status, "lost": outcome.lost}
    entry |= {"bitwise": outcome.bitwise, "ok": not outcome.wrong, "wrong": outcome.wrong}
    return {**entry, "seconds": round(time.monotonic() - began)}


def figures_of(entry: dict[str, Any]) -> dict[str, Any]:
    """What the row's name does not say."""
    return {key: value for key, value in entry.items() if key not in IN_THE_NAME}


def shortened(text: str, base: Path) -> str:
    """The screen's lines without this machine's folders and process numbers."""
    text = re.sub(rf"{re.escape(str(base))}(/disk)?", "...", text)
    text = re.sub(r"pid \d+ on [^\s)]+", "pid N on HOST", text)
    text = re.sub(r"in use by process \d+ on \S+\.", "in use by process N on HOST.", text)
    return text if len(text) <= LONGEST_CELL else f"{text[: LONGEST_CELL // 2]} ... {text[-LONGEST_CELL // 2 :]}"


def cell(value: Any) -> str:
    """A value as a table cell."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return str(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*")


def page(entries: list[dict[str, Any]], command: str) -> str:
    """The page."""
    played = [entry for entry in entries if entry["ok"] is not None]
    equal = [entry for entry in played if entry.get("bitwise")]
    most = max((entry["lost"] for entry in played if entry["lost"] is not None), default=0)
    lines = [
        "# What happens to a run when something breaks",
        "",
        f"`{command}`: {len(played)} rows, each a real `run_train.sh` that was broken at that point and started again;",
        f"{sum(entry['ok'] for entry in played)} of them came out as they should. After {len(equal)} of them",
        "`metrics.jsonl` (timings apart) and every tensor of the last checkpoint are, bit for bit, those of a run that",
        f"nothing happened to. Checkpoints are {INTERVAL} steps apart; at most {most} steps were lost in any row. Rows",
        "without `bitwise` either left batches out, as their policy says, or were not to go on. The small run has 12",
        "steps, checkpoints at 3, 5, 6, 9 and 12 of which the last two and that of the growth are kept, and grows at",
        "step 5 from fsdp 2 to tp 2 (on 4 ranks from pp 2 x fsdp 2 to fsdp 2 x tp 2).",
        "",
        "| fault | point | ranks | the user sees | status | steps lost | bitwise |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in entries:
        flaw = f" **{cell('; '.join(entry['wrong']))}**" if entry["wrong"] else ""
        values = [cell(entry.get(key)) for key in ("fault", "point", "ranks")]
        values += [f"{cell(entry['sees'])}{flaw}", *(cell(entry.get(key)) for key in ("status", "lost", "bitwise"))]
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def unmount_below(folder: Path) -> None:
    """Takes away what a row that was interrupted has left mounted or immutable."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((mount for mount in mounts if mount.startswith(str(folder))), reverse=True):
        subprocess.run(["umount", mount], check=False)
    subprocess.run(["chattr", "-R", "-f", "-i", folder], check=False, capture_output=True)


def main() -> int:
    """Plays the rows; returns 1 when one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="rows whose name holds this regular expression; writes nothing")
    parser.add_argument("--quick", action="store_true", help="one point of each fault; writes nothing")
    parser.add_argument("--played", type=Path, nargs="+", default=[], help="files of rows that are not played again")
    parser.add_argument("--into", type=Path, help="a file for the rows that are played, a line each as they come")
    parser.add_argument("--list", action="store_true", help="the names of the rows")
    parser.add_argument("--folder", type=Path, help="where to work; kept, with all screens. Default: a temporary one")
    options = parser.parse_args()
    rows = [row for row in ROWS if not options.only or re.search(options.only, row.name)]
    rows = [row for row in rows if row.quick or not options.quick]
    if options.list:
        print("\n".join(f"{row.name}{' (quick)' if row.quick else ''}" for row in rows))
        return 0
    known = {entry["row"]: entry for path in options.played for entry in map(json.loads, path.read_text().splitlines())}
    entries = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        shop = Workshop(folder)
        try:
            for number, row in enumerate(rows):
                base = folder / f"row-{number}-{time.strftime('%H%M%S')}"
                if row.name in known:
                    entries.append(known[row.name])
                    continue
                entries.append({"row": row.name, **play(row, shop, base)})
                if options.into is not None:
                    with options.into.open("a") as file:
                        file.write(json.dumps(entries[-1]) + "\n")
                word = {None: "--  ", True: "ok  ", False: "BAD "}[entries[-1]["ok"]]
                print(f"{word}{row.name}: {figures_of(entries[-1])}", flush=True)
        finally:
            unmount_below(folder)
    if not (options.only or options.quick):
        (RESULTS / "faults.json").write_text(json.dumps(entries, indent=1) + "\n")
        (RESULTS / "faults.md").write_text(page(entries, "python -m tests.faults.injected"))
    bad = [entry for entry in entries if entry["ok"] is False]
    print(f"{len(entries)} rows, {len(bad)} not as they should be")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
