"""Every mesh resumes every other mesh's checkpoint: losses and batches against one rank that was never stopped.

    python -m tests.faults.elastic [--only "pp2"]

Each mesh trains three steps and saves; each mesh then resumes each of these checkpoints for three more. All losses must
be those of one rank that was never stopped, and the hashes of the global batches one and the same sequence. Writes
`benchmarks/results/elastic.md`; status 1 when a pair is outside of the tolerance or sees other batches. Takes about
five minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import conftest  # noqa: F401  (imports what forked ranks need)
from tests.distributed.meshes import Case, mesh
from tests.faults.broken_runs import RESULTS
from tests.harness import WarmRanks
from tests.runs import make_recipe, read_metrics, relative_difference, train
from titan_growth.checkpoint.folder import open_step

MESHES: dict[str, Case] = {
    "1 rank": mesh(),
    "fsdp2": mesh(shard=2),
    "fsdp4": mesh(shard=4),
    "fsdp8": mesh(shard=8),
    "hsdp 2x2": mesh(replicate=2, shard=2),
    "fsdp2 x tp2": mesh(shard=2, tp=2),
    "pp2 x tp2": mesh(pp=2, tp=2),
    "pp2 x fsdp2": mesh(pp=2, shard=2),
    "pp2 x fsdp2 x tp2": mesh(pp=2, shard=2, tp=2),
}
PAIRS = [(source, target) for source in MESHES for target in MESHES]
QUICK = [("fsdp2", "pp2 x tp2")]
"""Tested by default, in `tests/distributed`."""
SAVED, STEPS = 3, 6
TOLERANCE = 1e-5
"""Relative, of the losses, in float32."""
COMMON: dict[str, Any] = {
    "checkpoint__enable": True,
    "checkpoint__interval": SAVED,
    "debug__log_batch_hash": True,
    "lr_scheduler__total_steps": STEPS,
}

Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Resumed:
    """A run on two meshes beside the unbroken one on one rank."""

    difference: float
    """The largest relative one of a loss."""
    one_sequence: bool
    """The hashes of the global batches are those of the unbroken run."""

    @property
    def holds(self) -> bool:
        return self.one_sequence and self.difference <= TOLERANCE


class Elastic:
    """Runs of the matrix, each made once; `settings` are for all of them."""

    def __init__(self, folder: Path, ranks: WarmRanks, **settings: Any) -> None:
        self.folder = folder
        self.ranks = ranks
        self.settings = {**COMMON, **settings}

    def train(self, folder: Path, name: str, steps: int) -> None:
        case = MESHES[name]
        recipe = make_recipe(folder, **self.settings, **case.layout, training__steps=steps)
        self.ranks(train, case.num_ranks, case.num_ranks, recipe, timeout_seconds=180)

    def saved(self, name: str) -> Path:
        """A run that has been saved on a mesh."""
        folder = self.folder / f"{name} saved"
        if not folder.exists():
            self.train(folder, name, SAVED)
        return folder

    def unbroken(self) -> Lines:
        """All steps on one rank, in one go."""
        folder = self.folder / "unbroken"
        if not folder.exists():
            self.train(folder, "1 rank", STEPS)
        return steps_of(folder)

    def resumed(self, source: str, target: str) -> Resumed:
        """Goes on with a mesh's checkpoint on another mesh."""
        folder = self.folder / f"{source} to {target}"
        shutil.copytree(self.saved(source), folder)
        self.train(folder, target, STEPS)
        found, expected = steps_of(folder), self.unbroken()
        last = open_step(folder / "checkpoint" / f"step-{STEPS}")
        assert last is not None
        assert last.manifest.num_ranks == MESHES[target].num_ranks
        assert [line["step"] for line in found] == list(range(1, STEPS + 1))
        assert len({line["batch_hash"] for line in expected}) == STEPS, "all batches are different"
        return Resumed(
            max(relative_difference(*pair, "loss") for pair in zip(found, expected, strict=True)),
            [line["batch_hash"] for line in found] == [line["batch_hash"] for line in expected],
        )


def steps_of(folder: Path) -> Lines:
    """The lines of training steps."""
    return [line for line in read_metrics(folder) if "loss" in line]


def page(found: dict[tuple[str, str], Resumed]) -> str:
    """The page: a row for each mesh that saved, a column for each that went on."""
    largest = max(resumed.difference for resumed in found.values())
    lines = [
        "# Resuming on another mesh",
        "",
        f"`python -m tests.faults.elastic`: {SAVED} steps on the mesh of the row, saved, and {STEPS - SAVED} more on",
        "the mesh of the column, the small model of `tests/runs.py` in float32. The figures are the largest relative",
        f"difference of a loss to one rank that was never stopped; the tolerance is {TOLERANCE:g}. In",
        f"{sum(resumed.one_sequence for resumed in found.values())} of {len(found)} pairs the hashes of the {STEPS}",
        f"global batches are one and the same sequence; the largest difference is {largest:.1e}.",
        "",
        f"| saved on | {' | '.join(MESHES)} |",
        "|" + " --- |" * (len(MESHES) + 1),
    ]
    for source in MESHES:
        cells = [
            f"{found[source, target].difference:.1e}" + ("" if found[source, target].holds else " **no**")
            for target in MESHES
        ]
        lines.append(f"| {source} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs the pairs; returns 1 when one of them does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="pairs whose name (`fsdp2 -> tp2`) holds this; writes nothing")
    options = parser.parse_args()
    found: dict[tuple[str, str], Resumed] = {}
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["TITAN_GROWTH_CACHE"] = f"{temporary}/cache"
        ranks = WarmRanks()
        try:
            elastic = Elastic(Path(temporary), ranks)
            for pair in PAIRS:
                if options.only in " -> ".join(pair):
                    found[pair] = elastic.resumed(*pair)
                    print(" -> ".join(pair), found[pair], flush=True)
        finally:
            ranks.close()
    if not options.only:
        (RESULTS / "elastic.md").write_text(page(found))
    return int(not all(resumed.holds for resumed in found.values()))


if __name__ == "__main__":
    sys.exit(main())
