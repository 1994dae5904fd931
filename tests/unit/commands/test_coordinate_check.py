"""The coordinate check: activations of the first steps against width and depth, by parametrisation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from titan_growth.commands.coordinate_check import main
from titan_growth.commands.coordinates import GROUPS, Coordinates, Scan, sized
from titan_growth.config.schema.model import ModelConfig
from titan_growth.models.registry import model_config_of
from titan_growth.optimizers.base import elementwise_width_factor
from titan_growth.optimizers.muon import MuonRule
from titan_growth.tools.findings import Findings

STEPS = 4
MODEL = {"dim": 64, "n_heads": 4, "hidden_dim": 192, "vocab_size": 512}
BASE: dict[str, dict[str, int]] = {
    "standard": {},
    "mup": {"mup.base_dim": 64},
    "completep": {"mup.base_dim": 64, "mup.base_n_layers": 2},
}
Exponents = dict[tuple[str, str, str], float]


def words_of(**model: object) -> list[str]:
    return [word for key, value in model.items() for word in (f"--model.{key}", str(value))]


@pytest.fixture(scope="module")
def exponents(tmp_path_factory: pytest.TempPathFactory) -> Exponents:
    """(parametrisation, axis, group) -> the power of the size that the change after four steps goes with."""
    folder, found = tmp_path_factory.mktemp("checks"), {}
    for name, base in BASE.items():
        table = folder / f"{name}.json"
        words = [*words_of(parametrization=name, **base, **MODEL), "--optimizer.lr", "1e-2", "--json", str(table)]
        sizes = ["--widths", "64,128,256", "--depths", "2,4,8", "--seq-len", "32", "--steps", str(STEPS)]
        assert main([*sizes, *words]) == 0
        for raw in json.loads(table.read_text())["scans"]:
            coordinates = [[Coordinates(**step) for step in of_size] for of_size in raw.pop("coordinates")]
            scan = Scan(**raw, coordinates=coordinates)
            for group in GROUPS:
                found[name, scan.axis, group] = scan.exponent("change", group, STEPS)
    return found


@pytest.mark.parametrize("name", ["mup", "completep"])
@pytest.mark.parametrize("group", GROUPS)
def test_widths_change_alike(name: str, group: str, exponents: Exponents) -> None:
    """They do not grow. What shrinks towards its limit (the SwiGLU at 64 channels, initial logits) shrinks slowly."""
    assert -0.5 < exponents[name, "width", group] < 0.15
    if group in ("embedding", "attention", "residual"):
        assert abs(exponents[name, "width", group]) < 0.15


def test_under_the_standard_parametrisation_width_counts(exponents: Exponents) -> None:
    for group, least in {"attention": 0.4, "mlp": 1.5, "residual": 0.8, "logits": 0.5}.items():
        assert exponents["standard", "width", group] > least, group


def test_depths_change_alike_under_completep(exponents: Exponents) -> None:
    for group in GROUPS:
        assert abs(exponents["completep", "depth", group]) < 0.2, group
        assert exponents["mup", "depth", group] == pytest.approx(exponents["standard", "depth", group], abs=0.02)
    assert exponents["standard", "depth", "residual"] > 0.25
    assert exponents["standard", "depth", "attention"] < -0.25


def muon_exponents(table: Path) -> dict[str, float]:
    """Group -> the power of the width that its change after four steps of Muon goes with, under muP.

    On 16 tokens, fewer than any of the widths: of more, an update of a narrow matrix cannot tell one from another.
    """
    words = [*words_of(parametrization="mup", **BASE["mup"], **MODEL), "--optimizer.name", "Muon"]
    sizes = ["--widths", "64,128,256", "--depths", "2,3", "--batch-size", "1", "--seq-len", "16"]
    assert main([*sizes, *words, "--optimizer.lr", "1e-2", "--steps", str(STEPS), "--json", str(table)]) == 0
    raw = json.loads(table.read_text())["scans"][0]
    coordinates = [[Coordinates(**step) for step in of_size] for of_size in raw.pop("coordinates")]
    return {group: Scan(**raw, coordinates=coordinates).exponent("change", group, STEPS) for group in GROUPS}


def test_widths_change_alike_under_muon(tmp_path: Path) -> None:
    for group, exponent in muon_exponents(tmp_path / "own.json").items():
        assert abs(exponent) < 0.15, group


def test_the_factor_of_adam_is_not_that_of_muon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 / n makes the updates of wide matrices too small, by the root of n."""
    monkeypatch.setattr(MuonRule, "width_factor", staticmethod(elementwise_width_factor))
    found = muon_exponents(tmp_path / "adam.json")
    assert found["attention"] < -0.3
    assert found["mlp"] < -0.4


def test_exponents_and_models() -> None:
    config = model_config_of(ModelConfig(dim=64, n_heads=8, n_kv_heads=2, head_dim=16), Findings())
    assert config is not None
    wide = sized(config, 96, 3)
    assert not isinstance(wide, str)
    assert (wide.dim, wide.num_heads, wide.num_kv_heads, wide.head_dim, wide.num_layers) == (96, 12, 3, 16, 3)
    assert wide.hidden_dim == config.hidden_dim * 96 / 64
    assert isinstance(sized(config, 80, 3), str)
    values = [0.1, 0.2, 0.4]
    points = [[Coordinates(0, 1.0, {"mlp": value}, {"mlp": 0.0})] for value in values]
    scan = Scan("width", "1 layer", [4, 16, 64], points)
    assert scan.exponent("rms", "mlp", 0) == pytest.approx(0.5)
    assert math.isnan(scan.exponent("change", "mlp", 0))


def test_a_picture_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--widths", "32,64", "--depths", "1,2", "--steps", "1", "--seq-len", "8", "--to", str(tmp_path / "x.png")]
    assert main([*words, *words_of(**MODEL)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("standard, AdamW, lr 0.0008\nwidth, 1 layer: root mean square")
    assert "\ndepth, dim 32: root" in out
    assert (tmp_path / "x.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--widths", "64"], "expected at least two sizes, smallest first"),
        (["--widths", "24,64"], "a width of 24 has no whole number of heads"),
        (["--model.parametrization", "mup"], "model.mup.base_dim"),
        (["--optimizer.name", "Muonn"], "optimizer.name"),
        (["--model.dimm", "3"], "model.dimm"),
    ],
)
def test_what_is_wrong_is_named(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, *words_of(**MODEL)]) == 2
    assert expected in "".join(capsys.readouterr())
