"""layers.jsonl: its lines, where a resume cuts it, its curves, and the picture of a metric."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.unit.metrics.test_boards import read_back
from titan_growth.commands.plot import main as plot_main
from titan_growth.metrics.boards import TensorBoardSink
from titan_growth.metrics.layer_curves import read_layer_curves
from titan_growth.metrics.layers import LayersRecord, offset_after
from titan_growth.metrics.sinks import JsonlSink
from titan_growth.models.layer_groups import ByGroup, LayerGroups
from titan_growth.models.qwen3 import ROLES
from titan_growth.tools.errors import ConfigError

LAYERS: dict[str, ByGroup] = {
    "gradient_norm": {"attention": [1.0, 2.0], "embedding": 0.5},
    "activation_rms": {"layer": [1.0, math.nan], "norm": math.inf},
}


def record(step: int = 4, layers: dict[str, ByGroup] = LAYERS) -> LayersRecord:
    made = LayersRecord.of(layers, None)
    return LayersRecord(step=step, tokens=8, flops=16, seconds=1.0, layers=made.layers)


def write_run(folder: Path, *, grows_at: int = 0, steps: int = 6) -> Path:
    """A run with one metric of two layers, and four after the growth."""
    folder.mkdir()
    lines: list[dict[str, Any]] = []
    for step in range(2, steps + 1, 2):
        num_layers = 4 if grows_at and step > grows_at else 2
        ratios = [0.001 * (layer + 1) for layer in range(num_layers)]
        lines.append({"step": step, "layers": {"update_ratio": {"attention": ratios, "embedding": 0.01 * step}}})
    growth = {"event": "growth", "step": grows_at, "from_layers": 2, "to_layers": 4}
    (folder / "layers.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "metrics.jsonl").write_text(f"{json.dumps(growth)}\n" if grows_at else "")
    return folder


def test_a_line_has_seven_digits_and_null_for_what_is_not_finite() -> None:
    made = LayersRecord.of(LAYERS | {"update_ratio": {"attention": [1 / 3, 2e-9 / 3]}}, None)
    line = json.loads(made.to_line())
    assert list(line) == ["step", "tokens", "flops", "seconds", "layers"]
    assert line["layers"]["activation_rms"] == {"layer": [1.0, None], "norm": None}
    assert line["layers"]["update_ratio"]["attention"] == [0.3333333, 6.666667e-10]


def test_tensorboard_has_a_curve_for_each_number(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.record(record())
    sink.close()
    found = read_back(tmp_path)
    assert found["layers_gradient_norm/attention.001"] == [(4, 2.0)]
    assert found["layers_gradient_norm/embedding"] == [(4, 0.5)]
    assert math.isnan(found["layers_activation_rms/norm"][0][1])
    assert len(found) == 6


def test_a_resume_keeps_the_lines_up_to_its_step(tmp_path: Path) -> None:
    path = tmp_path / "layers.jsonl"
    sink = JsonlSink(path)
    for step in (2, 4, 6):
        sink.record(record(step))
    sink.close()
    lines = path.read_bytes().splitlines(keepends=True)
    assert [offset_after(path, step) for step in (1, 2, 3, 5, 9)] == [
        sum(map(len, lines[:count])) for count in (0, 1, 1, 2, 3)
    ]
    path.write_bytes(lines[0] + b"no line\n" + lines[1])
    assert offset_after(path, 9) == len(lines[0])
    path.write_bytes(lines[0] + lines[1][:-1])
    assert offset_after(path, 9) == len(lines[0]), "the last line is torn"
    assert offset_after(tmp_path / "nowhere.jsonl", 9) == 0


def test_slots_hold_every_group_of_a_family() -> None:
    groups = LayerGroups.of(ROLES, 3)
    assert groups.in_layer == ("attention", "feed_forward", "norms", "layer")
    assert groups.around == ("embedding", "norm", "head")
    slots = [groups.slot_of(ROLES, f"layers.{layer}.{name}") for layer in range(3) for name in
             ("attention.wq.weight", "feed_forward.w2.weight", "attention.q_norm.weight")]  # fmt: skip
    assert slots == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert groups.slot_of(ROLES, "output.weight") == groups.num_slots - 1
    table = groups.by_group(list(range(groups.num_slots)))
    assert table["norms"] == [2, 6, 10]
    assert table["layer"] == [3, 7, 11]
    assert table["head"] == 14


@pytest.mark.parametrize("wanted", ["update_ratio", "update_ratio.attention", "update_ratio.embedding"])
def test_plot_draws_layers_over_steps(wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, picture = write_run(tmp_path / "run", grows_at=4), tmp_path / "layers.png"
    curves = read_layer_curves(run, wanted)
    assert (curves.steps, curves.growths) == ((2, 4, 6), (4,))
    if wanted != "update_ratio.embedding":
        assert [len(row) for row in curves.groups["attention"]] == [2, 2, 4]
    assert plot_main([str(run), "--layers", wanted, "--to", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"drawn: {picture}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "update_ration", "--to", "x.png"], "no metric 'update_ration'. Did you mean 'update_ratio'"),
        (["--layers", "update_ratio.head", "--to", "x.png"], "no metric 'update_ratio.head'"),
        (["--layers", "update_ratio"], "--layers: draws a picture. Name its file with --to"),
        (["--layers", "update_ratio", "--frontier", "--to", "x.png"], "--layers: draws one run"),
        (["other=run", "--layers", "update_ratio", "--to", "x.png"], "--layers: draws one run"),
    ],
)
def test_plot_says_what_it_cannot_draw(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    assert plot_main(["run", *words]) == 2
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "layers.jsonl: cannot be read .*Name the job.dump_folder of a run with metrics.layers_freq"),
        ("", "no metric 'x'. The run has measured none yet"),
        ('{"step": 1}\n', "layers.jsonl, line 1: is no line of a run's metrics"),
        ('{"step": 1, "layers": {"x": {"y": ["z"]}}}\n', "line 1: is no line"),
        ('{"step": 1, "layers": {"x": {"y": [null]}}}\n', "no value of x is finite"),
    ],
)
def test_a_file_that_holds_nothing_to_draw(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "layers.jsonl").write_text(text)
    from titan_growth.commands.plot_layers import draw_layers

    with pytest.raises(ConfigError, match=message):
        draw_layers(read_layer_curves(tmp_path, "x"), tmp_path / "x.png")
