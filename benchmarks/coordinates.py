"""Coordinate check: do activations, and what four steps change in them, depend on the width and the depth?

    python -m benchmarks.coordinates

Llama blocks with heads of 16 channels, widths 64 to 512 at 2 layers and depths 2 to 32 at width 64, by
`titan_growth coordinate_check` on random tokens. Writes `benchmarks/results/coordinates.json`, `.md` and a picture for
each of two parametrisations; a minute in all.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.arms import ROOT, write
from titan_growth.commands.coordinate_check import main as coordinate_check
from titan_growth.commands.coordinates import GROUPS, Coordinates, Scan

RESULT = ROOT / "benchmarks" / "results" / "coordinates.json"
COMMAND = "python -m benchmarks.coordinates"
MODEL = ["--model.flavor", "debugmodel", "--model.vocab_size", "1024"]
SIZES = ["--widths", "64,128,256,512", "--depths", "2,4,8,16,32"]
MUP = ["--model.parametrization", "mup", "--model.mup.base_dim", "64"]
COMPLETEP = ["--model.parametrization", "completep", "--model.mup.base_dim", "64", "--model.mup.base_n_layers", "2"]
MUON = ["--optimizer.name", "Muon"]
LR = "1e-2"
CASES: dict[str, list[str]] = {
    "standard": [],
    "muP": MUP,
    "CompleteP": COMPLETEP,
    "standard, Muon": MUON,
    "muP, Muon": [*MUP, *MUON],
    "CompleteP, Muon": [*COMPLETEP, *MUON],
}
PICTURES = ("standard", "CompleteP")


def main() -> int:
    """Checks every case."""
    runs: list[dict[str, Any]] = []
    for name, words in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "scans.json"
            picture = ["--to", str(RESULT.with_name(f"coordinates_{name.lower()}.png"))] if name in PICTURES else []
            given = [*MODEL, *SIZES, "--optimizer.lr", LR, *words, "--json", str(file), *picture]
            assert coordinate_check(given) == 0
            runs += [_exponents(name, table) for table in json.loads(file.read_text(encoding="utf-8"))["scans"]]
    result = write(RESULT, COMMAND, runs)
    RESULT.with_suffix(".md").write_text(page(result), encoding="utf-8")
    return 0


def _exponents(name: str, table: dict[str, Any]) -> dict[str, Any]:
    """The powers of the size with which a scan's numbers go after its last step."""
    coordinates = [[Coordinates(**step) for step in steps] for steps in table["coordinates"]]
    scan = Scan(table["axis"], table["fixed"], table["sizes"], coordinates)
    last = len(coordinates[0]) - 1
    exponents = {kind: {group: scan.exponent(kind, group, last) for group in GROUPS} for kind in ("rms", "change")}
    return {"case": name, "axis": scan.axis, "fixed": scan.fixed, "sizes": list(scan.sizes), **exponents}


def page(result: dict[str, Any]) -> str:
    """Exponents of sizes and changes, over width and over depth."""
    parts = [
        "# Coordinate check",
        f"`{result['command']}`, torch {result['torch']}, lr {LR}: with which power of the width and of the depth "
        "activations go (their root mean square), and the change in them after four steps. Under the right "
        "parametrisation none is far above 0. Negative ones fade: initial logits shrink with N^-1/2 and give way to "
        "what is learned. Those of the SwiGLU of muP under Muon follow the number of tokens: with 16 of them "
        "(`--batch-size 1 --seq-len 16`), for 256 here, the change goes with -0.08.",
    ]
    for axis in ("width", "depth"):
        runs = [run for run in result["runs"] if run["axis"] == axis]
        sizes = f"{axis} {runs[0]['sizes'][0]} to {runs[0]['sizes'][-1]}, {runs[0]['fixed']}"
        for kind, title in (("rms", "activations"), ("change", "their change")):
            lines = [f"| {sizes}: {title} | {' | '.join(GROUPS)} |", "|" + " --- |" * (1 + len(GROUPS))]
            lines += [
                f"| {run['case']} | {' | '.join(f'{run[kind][group]:+.2f}' for group in GROUPS)} |" for run in runs
            ]
            parts.append("\n".join(lines))
    parts += [f"![{name}: every step](coordinates_{name.lower()}.png)" for name in PICTURES]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
