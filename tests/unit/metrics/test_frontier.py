"""Ends of runs, lines through them, and the distances between: on curves whose speedup is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from titan_growth.__main__ import main
from titan_growth.metrics.curves import read_curve
from titan_growth.metrics.frontier import Side, distances
from titan_growth.tools.errors import ConfigError

BUDGETS = (1e12, 2e12, 4e12, 8e12)


def write(folder: Path, flops: float, loss: float, *, last_lr: float = 1e-4, per_token: float = 1e6) -> Path:
    """A run that ends with this loss after these FLOPs."""
    folder.mkdir(parents=True)
    lines = []
    for step, share in ((5, 0.5), (10, 1.0)):
        cost = {"flops": flops * share, "tokens": flops * share / per_token, "seconds": flops * share / 1e9}
        lines.append({"step": step, "loss": loss, "lr": 1e-3 if share < 1 else last_lr, **cost})
        lines.append({"step": step, "validation_loss": loss + (1 - share), **cost})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def loss_of(flops: float) -> float:
    return 4.0 - 0.3 * math.log(flops / 1e12)


def side(root: Path, name: str, *, cheaper: float = 1.0, budgets: tuple[float, ...] = BUDGETS) -> list[str]:
    """Words for the runs of a side that needs `cheaper` times fewer FLOPs for every loss."""
    return [f"{name}={write(root / f'{name}-{flops:g}', flops, loss_of(flops * cheaper))}" for flops in budgets]


def curves(words: list[str]) -> list:
    return [read_curve(*(word.partition("=")[0], Path(word.partition("=")[2]))) for word in words]


def test_distances_are_those_of_the_lines(tmp_path: Path) -> None:
    scratch = Side.of("scratch", curves(side(tmp_path, "scratch")))
    grown = Side.of("grown", curves(side(tmp_path, "grown", cheaper=1.5)))
    found = distances(scratch, grown, "flops")
    assert [one.speedup for one in found] == pytest.approx([0.5] * 4)
    assert [one.extrapolated for one in found] == [False, False, False, True]
    assert scratch.line("flops").slope == pytest.approx(0.3)
    assert scratch.line("flops").deviation == pytest.approx(0, abs=1e-9)


def test_a_line_through_ends_that_scatter(tmp_path: Path) -> None:
    """Least squares: an end off the line moves it by its share, and the deviation says so."""
    ends = [write(tmp_path / str(flops), flops, loss_of(flops) + (0.04 if flops == 2e12 else 0)) for flops in BUDGETS]
    line = Side.of("scratch", [read_curve("scratch", folder) for folder in ends]).line("flops")
    assert 0.015 < line.deviation < 0.02
    assert line.slope == pytest.approx(0.3 + 0.04 * 0.1 / math.log(2), rel=1e-6)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "frontier.png"
    words = [*side(tmp_path, "scratch"), *side(tmp_path, "grown", cheaper=1.5, budgets=BUDGETS[:2])]
    assert main(["plot", "--frontier", *words, "--to", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("scratch: 4 ends, 4.0000 to 3.3762; 0.2079 nats for each doubling of FLOPs, 0.0000 off it")
    assert "  speedup in FLOPs: +50.0%, +50.0%; mean +50.0%" in lines
    assert "  speedup in seconds: +50.0%, +50.0%; mean +50.0%" in lines
    assert picture.stat().st_size > 10_000


def test_an_end_at_a_high_rate_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = side(tmp_path, "scratch")
    late = write(tmp_path / "late", 3e12, 3.5, last_lr=8e-4)
    assert main(["plot", "--frontier", *words, f"scratch={late}"]) == 0
    assert f"scratch ({late}) ends at 80% of its peak learning rate: its end is not annealed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("budgets", "losses", "message"),
    [
        ((1e12,), (4.0,), "has 1 run of one budget, and a line needs two budgets"),
        ((1e12, 1e12), (4.0, 3.9), "has 2 runs of one budget"),
        ((1e12, 2e12), (3.5, 3.6), "do not fall with flops: 3.5000, 3.6000"),
    ],
)
def test_what_has_no_line_is_refused(
    budgets: tuple[float, ...], losses: tuple[float, ...], message: str, tmp_path: Path
) -> None:
    folders = [write(tmp_path / str(at), *end) for at, end in enumerate(zip(budgets, losses, strict=True))]
    with pytest.raises(ConfigError, match=message):
        Side.of("scratch", [read_curve("scratch", folder) for folder in folders]).line("flops")


def test_one_name_twice_needs_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", *side(tmp_path, "scratch")]) == 2
    assert "scratch: is given twice. With --frontier, runs of one name are a side" in capsys.readouterr().out
