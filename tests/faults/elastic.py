"""Every mesh resumes every other mesh's checkpoint: losses and batches against one rank that was never stopped.

    python -m tests.faults.elastic [--only "pp2"]

The matrix of `tests/distributed/test_elastic.py`, whose slow tests assert it, with its figures. Writes
`benchmarks/results/elastic.md`; status 1 when a pair is outside of the tolerance or sees other batches. Takes about
five minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests import conftest  # noqa: E402, F401  (imports what forked ranks need)
from tests.distributed.test_elastic import MESHES, SAVED, STEPS, TOLERANCE, Elastic, Resumed  # noqa: E402
from tests.harness import WarmRanks  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "elastic.md"


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
            for pair in ((source, target) for source in MESHES for target in MESHES):
                if options.only in " -> ".join(pair):
                    found[pair] = elastic.resumed(*pair)
                    print(" -> ".join(pair), found[pair], flush=True)
        finally:
            ranks.close()
    if not options.only:
        RESULT.write_text(page(found))
    return int(not all(resumed.holds for resumed in found.values()))


if __name__ == "__main__":
    sys.exit(main())
