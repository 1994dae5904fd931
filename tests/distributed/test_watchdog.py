"""A spike after a growth, injected by a plugin, through the real `run_train.sh`: warning, stop, roll-back."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.runs import BASE, argv_of, read_metrics, write_corpus

ROOT = Path(__file__).parents[2]

SPIKE = '''
"""Multiplies all weights by 20 after a step, the given number of times."""
import os
from pathlib import Path

import torch

from tests.quiet_stage import QuietStage
from titan_growth.stages.order import register_stage

MARKS = Path(os.environ["SPIKE_FOLDER"])
AT, TIMES = int(os.environ["SPIKE_AT"]), int(os.environ["SPIKE_TIMES"])


@register_stage
class Spike(QuietStage):
    name = "spike"

    @torch.no_grad()
    def after_optimizer_step(self, parts, context):
        rank = os.environ["RANK"]
        done = len(list(MARKS.glob(f"{rank}.*")))
        if context.step == AT + 3 * done and done < TIMES:
            (MARKS / f"{rank}.{done}").touch()
            for part in parts:
                for parameter in part.parameters():
                    parameter.mul_(20)
'''


def run(folder: Path, times: int, action: str, **more: Any) -> tuple[int, str]:
    """A run that grows after step 4, with a spike after step 6; (status, output)."""
    folder.mkdir()
    (folder / "spike_plugin.py").write_text(SPIKE)
    (folder / "marks").mkdir()
    values = {
        **BASE,
        "plugins": "spike_plugin",
        "job.dump_folder": str(folder / "run"),
        "training.dataset_path": str(write_corpus(folder / "corpus.txt")),
        "training.steps": 12,
        "checkpoint.enable": True,
        "checkpoint.interval": 2,
        "metrics.enable_tensorboard": False,
        "growth.stages.0.at": "4 steps",
        "growth.stages.0.factor": 2,
        "growth.watchdog.steps": 3,
        "growth.watchdog.max_rise": 1.0,
        "growth.watchdog.action": action,
        **more,
    }
    environment = {
        **os.environ,
        "NGPU": "2",
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "SPIKE_FOLDER": str(folder / "marks"),
        "SPIKE_AT": "6",
        "SPIKE_TIMES": str(times),
    }
    command = [str(ROOT / "run_train.sh"), *argv_of(values)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_spike_is_rolled_back_and_the_run_grows_later(tmp_path: Path) -> None:
    status, output = run(tmp_path / "spike", 1, "roll_back")
    assert status == 0, output
    assert "rolled back to step-4; later checkpoints are kept as rolled-back-6" in output
    folder = tmp_path / "spike" / "run"
    lines = read_metrics(folder)
    steps = [line["step"] for line in lines if "num_layers" in line]
    assert steps == list(range(1, 13)), "the metrics read as one run"
    assert [line["num_layers"] for line in lines if "num_layers" in line] == [2] * 7 + [4] * 5
    assert max(line["loss"] for line in lines if "loss" in line) < 10, "nothing of the spike is left"
    lineage = json.loads((folder / "checkpoint" / "step-12" / "lineage.json").read_text())
    (back,) = lineage["roll_backs"]
    assert (back["step"], back["noticed_at"], back["postponed_to"]) == (4, 7, 7)
    assert back["loss_then"] > back["loss_before"] + 1
    assert [event["step"] for event in lineage["events"]] == [7]


@pytest.mark.slow
def test_a_growth_that_never_recovers_ends_the_run(tmp_path: Path) -> None:
    status, output = run(tmp_path / "spikes", 2, "roll_back")
    assert status == 1, output
    assert "after 1 roll-back. The small model's checkpoint is step-7" in output


@pytest.mark.slow
@pytest.mark.parametrize(("action", "status"), [("warn", 0), ("stop", 1)])
def test_the_other_actions(action: str, status: int, tmp_path: Path) -> None:
    found, output = run(tmp_path / action, 1, action)
    assert found == status, output
    assert "3 steps after growing to 4 layers the loss on the held-out batch is" in output
    assert "nats more, where growth.watchdog.max_rise allows 1" in output
