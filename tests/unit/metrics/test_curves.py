"""Curves of whole runs: reading them, what a loss has cost, speedup at equal loss, and the picture."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from titan_growth.commands.plot import main as plot_main
from titan_growth.metrics.curves import COSTS, Curve, Point, compare, read_curve, report, weights_of
from titan_growth.tools.errors import ConfigError


def curve(name: str, *points: tuple[float, float]) -> Curve:
    """A curve of (FLOPs, loss) with ten tokens and a tenth of a second for each FLOP."""
    made = [
        Point(step, loss, {"flops": flops, "tokens": 10 * flops, "seconds": flops / 10})
        for step, (flops, loss) in enumerate(points)
    ]
    return Curve(name, tuple(made), ())


def write_run(folder: Path, losses: dict[int, float], *, grows_at: int | None = None, seconds: bool = True) -> Path:
    """A run folder whose steps cost 1 FLOP, 2 tokens and 3 seconds."""
    folder.mkdir()
    lines: list[dict[str, object]] = [{"event": "data", "step": 0, "tokens": 0, "flops": 0, "training_data": {}}]
    for step, loss in losses.items():
        costs = {"step": step, "tokens": 2 * step, "flops": step, **({"seconds": 3.0 * step} if seconds else {})}
        lines += [{**costs, "loss": loss + 1}, {**costs, "validation_loss": loss}]
        if step == grows_at:
            lines.append({"event": "growth", **costs, "from_layers": 3, "to_layers": 12})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def test_a_cost_lies_on_the_line_between_two_validations() -> None:
    one = curve("one", (10, 4.0), (20, 3.0), (40, 2.0))
    assert one.cost_of(3.5, "flops") == 15
    assert one.cost_of(3.5, "tokens") == 150
    assert one.cost_of(2.25, "seconds") == pytest.approx(3.5)
    assert one.cost_of(4.5, "flops") == 10
    assert one.cost_of(2.0, "flops") == 40
    assert one.cost_of(1.9, "flops") is None


def test_a_curve_that_rises_again_has_reached_its_loss_before() -> None:
    one = curve("one", (10, 4.0), (20, 3.0), (30, 3.6), (40, 2.0))
    assert one.best_loss == 2.0
    assert one.cost_of(3.5, "flops") == 15
    assert one.cost_of(2.8, "flops") == pytest.approx(35)


def test_speedup_is_at_the_lowest_loss_that_both_reach() -> None:
    slow, fast = curve("slow", (10, 4.0), (100, 3.0)), curve("fast", (10, 4.0), (50, 2.0))
    found = compare(slow, fast)
    assert found.loss == 3.0
    assert found.costs["flops"] == (100, 30)
    assert found.speedup("flops") == pytest.approx(100 / 30 - 1)
    back = compare(fast, slow)
    assert back.loss == 3.0
    assert back.speedup("tokens") == pytest.approx(0.3 - 1)
    assert "speedup +233.3%" in "\n".join(report([found]))


def test_a_speedup_has_two_factors() -> None:
    """A grown run: a quarter of the FLOPs per token for the first 400 of its 1,000 tokens; the baseline needs 1,080."""
    small, large = 1.0, 4.0
    baseline = Curve("a", points_of((0, 0.0), (1080, 1080 * large)), ())
    grown = Curve("b", points_of((400, 400 * small), (1000, 400 * small + 600 * large)), ())
    found = compare(baseline, grown)
    factors = found.factors()
    assert factors is not None
    assert factors.tokens == pytest.approx(1.08)
    assert factors.cheaper == pytest.approx(1 / (1 - (1 - small / large) * 400 / 1000))
    assert factors.tokens * factors.cheaper == pytest.approx(1 + found.speedup("flops"))
    assert "  x1.54 in FLOPs = x1.08 in tokens, x1.43 by cheaper tokens" in report([found])


def points_of(*costs: tuple[float, float]) -> tuple[Point, ...]:
    """Validations at (tokens, FLOPs), the last of which is the best."""
    return tuple(
        Point(step, 5.0 - step, {"tokens": tokens, "flops": flops}) for step, (tokens, flops) in enumerate(costs)
    )


def test_plot_draws_what_runs_have_written_and_prints_the_speedup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scratch = write_run(tmp_path / "scratch", {10: 4.0, 20: 3.5, 40: 3.0})
    grown = write_run(tmp_path / "run", {10: 4.0, 20: 3.0, 30: 2.9}, grows_at=10)
    for name in ("curves.png", "curves.svg"):
        assert plot_main([str(scratch), f"grown={grown}", "--to", str(tmp_path / name), "--title", "a title"]) == 0
        assert (tmp_path / name).stat().st_size > 5000
    text = (tmp_path / "curves.svg").read_text()
    assert text.count('<g id="axes_') == 3
    printed = capsys.readouterr().out
    assert "grown against scratch, at validation loss 3.0000:" in printed
    for cost, speedup in (("FLOPs", "100.0%"), ("tokens", "100.0%"), ("seconds", "100.0%")):
        assert any(cost in line and f"+{speedup}" in line for line in printed.splitlines())
    read = read_curve("grown", grown)
    assert [(one.step, one.from_layers, one.to_layers) for one in read.growths] == [(10, 3, 12)]


def test_the_picture_says_what_it_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ring of a growth is on its curve in seconds too; numbers in one notation; what is cut off is counted."""
    drawn: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    points = {10: 9.0, **{step: 4.0 - step / 200 for step in range(20, 220, 10)}}
    run = write_run(tmp_path / "run", points, grows_at=40)
    lines = run.joinpath("metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        if entry.get("event") == "growth":
            entry["seconds"] += 1000  # a growth takes its time
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert plot_main([f"a={run}", f"b={run}", "--to", str(tmp_path / "curves.png")]) == 0
    (figure,) = drawn
    curve = read_curve("a", run)
    at_growth = next(point for point in curve.points if point.step == 40)
    for cost, panel in zip(COSTS, figure.axes, strict=True):
        rings = [line for line in panel.lines if line.get_marker() == "o"]
        assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in rings] == [(at_growth.cost[cost], 3.8)] * 2
        labels = [text for text in panel.texts if "layers" in text.get_text()]
        assert [text.xy for text in labels] == [(at_growth.cost[cost], 1.0)] * 2, "above the panel, not on a curve"
        assert len({text.xyann for text in labels}) == 2, "not on one another"
        figure.canvas.draw()
        assert panel.xaxis.get_offset_text().get_text() == ""
        assert all("e" not in tick.get_text() for tick in panel.get_xticklabels())
    assert "4 early validations above" in figure._supxlabel.get_text()
    printed = capsys.readouterr().out
    assert "(4 early validations above" in printed
    assert "they compare runs that had the same machine to themselves" in printed


def test_shadow_weights_have_a_dashed_curve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From their first validation on, in the colour of their run; and their last loss is printed."""
    drawn: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    plain = write_run(tmp_path / "plain", {10: 4.0, 20: 3.0, 30: 2.5})
    averaged = write_run(tmp_path / "averaged", {10: 4.0, 20: 3.0, 30: 2.5})
    lines = [json.loads(line) for line in (averaged / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "validation_loss" in line and line["step"] > 10:
            line["ema_validation_loss"] = line["validation_loss"] - 0.25
    (averaged / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot_main([f"plain={plain}", f"averaged={averaged}", "--to", str(tmp_path / "curves.png")]) == 0
    assert "last validation loss: plain 2.5000, averaged 2.5000 (ema 2.2500)" in capsys.readouterr().out
    panel = drawn[0].axes[0]
    (dashed,) = [line for line in panel.lines if line.get_linestyle() == "--"]
    assert (list(dashed.get_xdata()), list(dashed.get_ydata())) == ([20, 30], [2.75, 2.25])
    assert dashed.get_label() == "averaged, ema"
    assert dashed.get_color() == next(line for line in panel.lines if line.get_label() == "averaged").get_color()
    assert panel.get_ylim()[0] < 2.25, "the lowest point is in the picture"


def test_a_run_without_seconds_loses_only_that_panel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write_run(tmp_path / "old", {10: 4.0, 20: 3.5}, seconds=False)
    new = write_run(tmp_path / "new", {10: 4.0, 20: 3.5})
    assert plot_main([f"old={old}", f"new={new / 'metrics.jsonl'}", f"--to={tmp_path / 'curves.svg'}"]) == 0
    assert (tmp_path / "curves.svg").read_text().count('<g id="axes_') == 2
    printed = capsys.readouterr().out
    assert "old was written by a version that counted no seconds" in printed
    assert "seconds " not in printed.split("old was")[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a=none"], "none: cannot be read (No such file or directory). Name a run's job.dump_folder"),
        (["a=run", "a=run"], "a: is given twice"),
        (["a=run", "--to", "curves.txt"], "--to: curves.txt must end in .png, .svg, .pdf"),
        (["a=run", "--to", "none/curves.png"], "--to: there is no folder none"),
        (["a=run", "--to"], "--to: needs a value"),
        (["--title", "x"], "no run is named. Name at least one, as NAME=FOLDER"),
        (["a=run", "--size", "3"], "--size: is no argument of this command"),
        (["a=run/torn"], "run/torn, line 1: is no line of a run's metrics"),
        (["a=run/one"], "a: run/one has 1 validation, and a curve needs two. Set validation.enable = true"),
    ],
)
def test_wrong_arguments(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run", {10: 4.0, 20: 3.5})
    (run / "torn").write_text('{"step": 1, "validation_loss": 3.0\n')
    (run / "one").write_text('{"step": 1, "tokens": 1, "flops": 1, "validation_loss": 3.0}\n')
    assert plot_main(words) == 2
    assert f"error: {message}" in capsys.readouterr().out


def test_a_curve_of_a_diverged_run_keeps_its_finite_points(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {10: 4.0, 20: 3.5})
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "tokens": 60, "flops": 30, "seconds": 90.0, "validation_loss": null}\n')
    assert [point.step for point in read_curve("run", run).points] == [10, 20]
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="is no text"):
        read_curve("run", run)


def test_the_line_that_a_killed_run_was_writing_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {10: 4.0, 20: 3.5})
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "tokens": 60, "fl')
    assert [point.step for point in read_curve("run", run).points] == [10, 20]


def test_a_folder_with_an_equals_sign_and_a_run_that_took_anothers_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "lr=3e-4", {10: 4.0, 20: 3.5})
    start = '[checkpoint]\ninitial_load_path = "small/step-9"\ninitial_load_model_only = '
    (run / "recipe.toml").write_text(f"{start}true\n")
    assert plot_main([str(run)]) == 0
    said = "lr=3e-4 started from the weights of small/step-9; what those cost is not in its curve"
    assert said in capsys.readouterr().out
    (run / "recipe.toml").write_text(f"{start}false\n")
    assert plot_main([str(run)]) == 0
    assert said not in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    ["[" * 100_000, '{"validation_loss": NaN, "step": 1}', '{"validation_loss": 1, "step": "x"}', "[1]",
     '{"step": 1' + "0" * 5000,
     '{"validation_loss": 1e999, "step": 2}', '{"validation_loss": 1, "step": 1, "flops": 1' + "0" * 400 + "}",
     '{"event": "growth", "step": {}}'],
)  # fmt: skip
def test_lines_of_a_stranger_are_one_problem(line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=r"\A[^\n]*line 1: is no line of a run's metrics\Z"):
        read_curve("run", tmp_path)


def test_a_pipe_is_no_curve(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ConfigError, match=r"cannot be read \(is no file\)"):
        read_curve("run", tmp_path)


@pytest.mark.parametrize("text", ["checkpoint = 3", "x = " + "[" * 10_000, "checkpoint = [1]"])
def test_the_recipe_of_a_stranger_says_nothing_about_weights(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(text + "\n")
    assert weights_of(tmp_path) is None
