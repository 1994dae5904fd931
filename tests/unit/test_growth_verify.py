"""The check after a growth finds a single wrong bit, a swapped layer, and numbers that are not finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.harness import run_ranks
from tests.unit.test_checkpoint_manager import manager
from titan_growth.checkpoint.folder import Manifest
from titan_growth.checkpoint.lineage import Progress
from titan_growth.growth.verify import verify_growth
from titan_growth.tools.errors import GrowthError

SOURCE_OF = (0, 1, 0, 1)


def _verify(rank: int, folder: Path) -> None:
    torch.manual_seed(0)
    small = {"tok.weight": torch.randn(4, 3), "layers.0.w": torch.randn(4, 3), "layers.1.w": torch.randn(4, 3)}
    checkpoints = manager(folder)
    manifest = Manifest(Progress(step=1), 2, 1, "1 rank", model_only=False, permanent=True, metrics_offset=0)
    path = checkpoints.save(manifest, small, recipe_toml="", lineage_json="{}").path

    def grown() -> dict[str, torch.Tensor]:
        layers = {f"layers.{i}.w": small[f"layers.{source}.w"].clone() for i, source in enumerate(SOURCE_OF)}
        return {"tok.weight": small["tok.weight"].clone(), **layers}

    def verify(tensors: dict[str, torch.Tensor]) -> int:
        return verify_growth(tensors, SOURCE_OF, lambda wanted: checkpoints.load(path, wanted))

    assert verify(grown()) == 5
    for name in grown():
        wrong = grown()
        wrong[name].view(torch.int32)[3, 2] ^= 1
        source = name if name == "tok.weight" else f"layers.{int(name.split('.')[1]) % 2}.w"
        with pytest.raises(GrowthError, match=f"^the grown model is wrong: {name} differs from its source {source}$"):
            verify(wrong)
    wrong = grown()
    wrong["layers.2.w"], wrong["layers.3.w"] = wrong["layers.3.w"], wrong["layers.2.w"]
    with pytest.raises(GrowthError, match=r"layers\.2\.w differs from its source layers\.0\.w \(and 1 more\)"):
        verify(wrong)

    small["layers.1.w"][0, 0] = float("nan")
    checkpoints.save(manifest, small, recipe_toml="", lineage_json="{}")
    with pytest.raises(GrowthError, match=r"layers\.1\.w of the small model is not finite"):
        verify(grown())


def test_verify_growth(tmp_path: Path) -> None:
    run_ranks(_verify, 1, tmp_path)
