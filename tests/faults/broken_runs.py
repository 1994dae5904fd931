"""Runs that are broken on purpose: how they are started, and whether they leave what an unbroken run leaves.

The run is small: a few seconds after its start it has trained twelve steps, grown after five of them onto another
mesh, validated, and saved five checkpoints, of which two have been removed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import time
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness import PATIENCE
from tests.runs import BASE, argv_of, read_metrics, without_timings, write_corpus

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
"""Where the pages are."""
STEPS, INTERVAL, GROWTH = 12, 3, 5
TINY: dict[str, Any] = {
    **BASE,
    "training.steps": STEPS,
    "checkpoint.enable": True,
    "checkpoint.interval": INTERVAL,
    "checkpoint.keep_latest_k": 2,
    "validation.enable": True,
    "validation.freq": 4,
    "validation.steps": 1,
    "validation.local_batch_size": 4,
    "debug.log_batch_hash": True,
    "growth.stages.0.at": f"{GROWTH} steps",
    "growth.stages.0.factor": 2,
    "growth.stages.0.optimizer_state": "asymmetric",
    "growth.stages.0.parallelism.tensor_parallel_degree": 2,
}
"""Saves 3, 5 (the way back of the growth, kept), 6, 9 and 12; 3 is removed when 9 has been saved."""
MESHES: dict[int, dict[str, Any]] = {
    2: {},
    4: {
        "parallelism.pipeline_parallel_degree": 2,
        "parallelism.pipeline_parallel_microbatch_size": 1,
        "training.local_batch_size": 4,
    },
}
"""By number of ranks: fsdp 2, then tp 2; pp 2 x fsdp 2, then fsdp 2 x tp 2."""

LIMIT_SECONDS = 150.0
"""No run takes longer than this, however it is broken."""
MARK = "TITAN_FAULTS_RUN"


@dataclass
class Ended:
    """What a run showed and ended with."""

    status: int
    screen: str
    seconds: float
    survivors: int = 0
    """Processes of it that were still there when its launcher had ended and some seconds had passed."""

    @property
    def lines(self) -> list[str]:
        """What was on the screen, without the clock in front."""
        text = re.sub(r"(?m)^(\[rank\d+\]:)?(\d\d:\d\d:\d\d  )?", "", self.screen)
        return [line.rstrip() for line in text.splitlines() if line.strip()]

    @property
    def resumed_from(self) -> int:
        """The step of the checkpoint; 0 for a run that started from scratch."""
        found = re.findall(r"resumed from .*step-(\d+)", self.screen)
        return int(found[-1]) if found else 0


class Launched:
    """A `run_train.sh` under way, with these values on its command line; its screen goes to a file in `screens`."""

    def __init__(
        self, folder: Path, num_ranks: int, values: dict[str, Any], environ: dict[str, str], screens: Path
    ) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        words = argv_of({**values, "job.dump_folder": str(folder)})
        environ = {**environ, "NGPU": str(num_ranks), MARK: self.mark}
        screens.mkdir(parents=True, exist_ok=True)
        self.output = screens / f"{self.mark}.txt"
        with open(self.output, "w") as screen:
            self.process = subprocess.Popen(
                [str(ROOT / "run_train.sh"), *words], cwd=ROOT, env=environ, stdout=screen, stderr=screen
            )
        self.began = time.monotonic()

    def processes(self, word: bytes = b"") -> list[int]:
        """Processes of this run that are alive, and have a word in their command line or environment."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                if state != "Z" and self.mark.encode() in text and word in text:
                    found.append(int(entry.name))
        return found

    def ranks(self) -> list[int]:
        """Processes of the ranks, in no order."""
        return self.processes(b"TORCHELASTIC_RUN_ID=")

    def kill_all(self) -> None:
        """Ends what is left of the run."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait(self, limit_seconds: float = LIMIT_SECONDS) -> Ended:
        """Returns when the launcher and all ranks have ended; fails, and ends them, when that takes too long."""
        limit_seconds *= PATIENCE
        try:
            status = self.process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            self.kill_all()
            status = self.process.wait()
            screen = self.output.read_text(errors="replace")
            return Ended(status, f"{screen}\n(still running after {limit_seconds:g} s)", limit_seconds)
        seconds = time.monotonic() - self.began
        deadline = time.monotonic() + 15  # ranks whose launcher was killed save and leave
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill_all()
        return Ended(status, self.output.read_text(errors="replace"), seconds, len(left))


class Workshop:
    """A folder with a corpus, a cache of prepared data, and unbroken runs to compare with, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.corpus = write_corpus(folder / "corpus.txt")
        self.recipe = folder / "recipe.toml"
        self.recipe.write_text("# every key is on the command line\n")
        self._whole: dict[str, Path] = {}

    def launch(self, folder: Path, num_ranks: int, settings: dict[str, Any] | None = None, **environ: str) -> Launched:
        """Starts `run_train.sh` with the small recipe and some changes; those may bring a mesh of their own."""
        settings = settings or {}
        mesh = {} if settings.keys() & MESHES[4].keys() else MESHES[num_ranks]
        values = {**TINY, "training.dataset_path": str(self.corpus), **mesh, **settings}
        environ = {
            **os.environ,
            "CONFIG_FILE": str(self.recipe),
            "TITAN_GROWTH_CACHE": str(self.folder / "cache"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",  # more threads take sums in another order, and forked ranks have one
            **environ,
        }
        return Launched(folder, num_ranks, values, environ, self.folder / "screens")

    def whole(self, num_ranks: int, settings: dict[str, Any]) -> Path:
        """The folder of a run that nobody touched."""
        key = json.dumps([num_ranks, settings], sort_keys=True)
        if key not in self._whole:
            folder = self.folder / "whole" / f"{num_ranks}-{len(self._whole)}"
            ended = self.launch(folder, num_ranks, settings).wait()
            assert ended.status == 0, f"the unbroken run ended with {ended.status}:\n{ended.screen}"
            self._whole[key] = folder
        return self._whole[key]


def last_step(folder: Path) -> int:
    """The last step in metrics.jsonl, 0 when there is none."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return 0
    steps = [0]
    for line in lines:
        with contextlib.suppress(ValueError):  # the last line of a run that was killed may be half a line
            steps.append(int(json.loads(line)["step"]))
    return max(steps)


def last_checkpoint(folder: Path) -> Path:
    """The step folder with the highest number."""
    return max((folder / "checkpoint").glob("step-*"), key=lambda path: int(path.name[5:]))


def tensors_of(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a checkpoint: weights, both moments, step counters, random states.

    Tensors and not files are compared, because `.metadata` holds what differs between two saves of the same tensors.
    """
    import torch
    import torch.distributed.checkpoint as dcp

    from titan_growth.checkpoint.reader import SafeReader

    reader = SafeReader(checkpoint)
    entries = reader.tensor_entries()
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
    return {
        name: hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }


def differences(found: Path, expected: Path) -> list[str]:
    """How a run differs from the unbroken one: metrics without timings, and every tensor of the last checkpoint."""
    wrong = []
    lines, other = (without_timings(read_metrics(folder)) for folder in (found, expected))
    if lines != other:
        first = next((n for n, pair in enumerate(zip(lines, other, strict=False)) if pair[0] != pair[1]), -1)
        wrong.append(f"metrics.jsonl has {len(lines)} lines instead of {len(other)}, the first other one is {first}")
    last, last_expected = last_checkpoint(found), last_checkpoint(expected)
    if last.name != last_expected.name:
        return [*wrong, f"the last checkpoint is {last.name}, not {last_expected.name}"]
    tensors, reference = tensors_of(last), tensors_of(last_expected)
    assert len(reference) > 100, "weights, moments and counters of the grown model"
    if tensors.keys() != reference.keys():
        wrong.append(f"{len(tensors)} tensors instead of {len(reference)}")
    other_bits = sorted(name for name in tensors.keys() & reference.keys() if tensors[name] != reference[name])
    if other_bits:
        wrong.append(f"{len(other_bits)} tensors have other bits, as {other_bits[0]}")
    return wrong
