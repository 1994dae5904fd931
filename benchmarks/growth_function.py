"""What every operator does to the function that a model computes: relative change of its logits, in float32.

    python -m benchmarks.growth_function

Small models of both families, tied and not, with weights that are nothing special (norms off 1, no layer like another),
grown by each operator and verified as a run does. Operators that preserve the function must change nothing at all
(depth) or less than 1e-6 (width); how far the others go is measured. Writes `benchmarks/results/growth_function.md`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.unit.growth.test_function import CONFIGS, UNEVEN, deviation, grown, masked

ROOT = Path(__file__).resolve().parents[1]

RESULT = ROOT / "benchmarks" / "results" / "growth_function.md"

CASES: list[tuple[str, dict[str, Any], float | None]] = [
    ("zero_depth x2", {"operator": "zero_depth", "factor": 2}, 0.0),
    ("random_depth x2, mask closed", {"operator": "random_depth", "factor": 2, "mask_steps": 10}, 0.0),
    ("zero_width x2", {"operator": "zero_width", "factor": 2}, 1e-6),
    ("zero_width x1.5", {"operator": "zero_width", **UNEVEN}, 1e-6),
    ("split_width x2", {"operator": "split_width", "factor": 2}, 1e-6),
    ("split_width x3", {"operator": "split_width", "factor": 3}, 1e-6),
    ("random_width x2, mask closed", {"operator": "random_width", "factor": 2, "mask_steps": 10}, 1e-6),
    ("stack x2", {"operator": "stack", "factor": 2}, None),
    ("stack x4", {"operator": "stack", "factor": 4}, None),
    ("interpose x2", {"operator": "interpose", "factor": 2}, None),
    ("middle, 3 -> 5 layers", {"operator": "middle", "n_layers": 5}, None),
    ("map 0 1 1 2", {"operator": "map", "layer_map": [0, 1, 1, 2]}, None),
    ("split_width x2, noise 0.01", {"operator": "split_width", "factor": 2, "noise": 0.01}, None),
    ("split_width x1.5", {"operator": "split_width", **UNEVEN}, None),
    ("random_depth x2, mask open", {"operator": "random_depth", "factor": 2, "mask_steps": 10}, None),
    ("random_width x2, mask open", {"operator": "random_width", "factor": 2, "mask_steps": 10}, None),
]


def measured(case: str, label: str, settings: dict[str, Any]) -> float:
    """The relative change of the logits, in the Euclidean norm."""
    with tempfile.TemporaryDirectory(prefix="growth-function") as folder:
        small, large, growth = grown(Path(folder), case, **settings)
        if "mask_steps" in settings:
            masked(large, case, growth, 100 if "closed" in label else 110)
        return deviation(small, large)


def main() -> int:
    """Measures, writes the page, and returns 1 when an operator does not keep what it declares."""
    rows, failed = [], False
    for label, settings, allowed in CASES:
        changes = [measured(case, label, settings) for case in CONFIGS]
        failed |= allowed is not None and max(changes) > allowed
        declared = "preserves exactly" if allowed == 0 else "does not preserve" if allowed is None else "below 1e-6"
        rows.append(f"| {label} | {declared} | {' | '.join(_number(change) for change in changes)} |")
        print(rows[-1], flush=True)
    head = f"| operator | declares | {' | '.join(CONFIGS)} |"
    text = f"""# What growing does to the function

`python -m benchmarks.growth_function`: relative change of the logits (Euclidean norm, float32) when a small model of 3
layers and width 48 grows. Its weights are nothing special: norms are off 1, and no layer is like another, so layers
that are used twice do more harm here than in a trained model.

{head}
|{" --- |" * (2 + len(CONFIGS))}
{chr(10).join(rows)}

An open mask is no mask: what is new is then at its full strength. An operator that declares to preserve the function is
held to it at every growth of a run, on the held-out loss.
"""
    RESULT.write_text(text)
    return int(failed)


def _number(change: float) -> str:
    return "0" if change == 0 else f"{change:.1e}"


if __name__ == "__main__":
    sys.exit(main())
