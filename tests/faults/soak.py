"""One run, killed 60 times with SIGKILL at random moments, against the same run undisturbed.

    python -m tests.faults.soak [--kills 60] [--through-launcher 8] [--mesh pp] [--async-saves] [--seed 0]

Four ranks train a small model that grows in the middle, onto another mesh. At a random moment, in a step, in a save, in
a removal, in the growth or in the start-up, one random rank or all of them get SIGKILL, and the same run is started
again in the same folder. The first kills are those of a real `run_train.sh` (MAX_RESTARTS=0), which takes some ten
seconds to start; for the others the ranks are forked from this process, through the pieces of the real entry, which
takes one or two. The last life, again `run_train.sh`, is left alone. With `--async-saves` every other start saves
asynchronously. In the end every tensor of the last checkpoint (weights, moments, step counters, random states) and
`metrics.jsonl` without its timings must be, bit for bit, those of the undisturbed run. Writes
`benchmarks/results/soak.md`; status 1 when something differs.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import conftest  # noqa: F401  (imports what forked ranks need)
from tests.faults.broken_runs import RESULTS, TINY, Workshop, differences, last_step
from tests.harness import Ranks
from tests.runs import make_recipe, read_metrics, train

NUM_RANKS = 4
MESHES: dict[str, tuple[str, dict[str, Any]]] = {
    "pp": (
        "pp 2 x fsdp 2, then fsdp 2 x tp 2",
        {
            "parallelism.pipeline_parallel_degree": 2,
            "parallelism.pipeline_parallel_microbatch_size": 1,
            "training.local_batch_size": 4,
            "growth.stages.0.parallelism.tensor_parallel_degree": 2,
        },
    ),
    "fsdp": (
        "fsdp 4, then pp 2 x fsdp 2",
        {
            "training.local_batch_size": 2,
            "growth.stages.0.local_batch_size": 4,
            "growth.stages.0.parallelism.tensor_parallel_degree": 1,
            "growth.stages.0.parallelism.pipeline_parallel_degree": 2,
            "growth.stages.0.parallelism.pipeline_parallel_microbatch_size": 1,
        },
    ),
}
ASYNC = {"checkpoint.async_mode": "async"}
STEPS_A_LIFE = 4
"""On average; checkpoints are closer, so that most lives get on."""
START_UP_SHARE = 0.15
"""Of the kills come some seconds after a start and not after a random step, so that they hit the start-up too."""
LIFE_SECONDS = 120.0


@dataclass
class Soak:
    """One run and its deaths.

    Attributes:
        whole: the folder of the undisturbed run.
        alternates: every other life saves asynchronously.
        deaths: how each life ended: by which mode, which rank or all, and after which step.
        wrong: how the run differs from the undisturbed one in the end.
    """

    shop: Workshop
    whole: Path
    folder: Path
    settings: dict[str, Any]
    kills: int
    random: random.Random
    alternates: bool
    deaths: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def life(self) -> dict[str, Any]:
        """The settings of the next start."""
        saves = ASYNC if self.alternates and len(self.deaths) % 2 else {}
        return {**self.settings, **saves}

    def wait_for_the_moment(self, alive: Callable[[], bool]) -> None:
        """Returns at a random moment, or when the life is over before it."""
        deadline = time.monotonic() + LIFE_SECONDS
        if self.random.random() < START_UP_SHARE:
            until = time.monotonic() + self.random.uniform(0, 4)
        else:
            began, left = last_step(self.folder), self.kills - len(self.deaths)
            pace = (self.settings["training.steps"] - began) / (left + 1)
            steps = 1 + round(self.random.uniform(0, 1.6) * pace)
            # A start cuts the file back to its checkpoint, so it is growing that shows that this life trains.
            lowest = began
            while alive() and time.monotonic() < deadline:
                here = last_step(self.folder)
                lowest = min(lowest, here)
                if here >= began + steps or here > lowest + steps:
                    break
                time.sleep(0.02)
            until = time.monotonic() + self.random.uniform(0, 0.3)
        while alive() and time.monotonic() < until:
            time.sleep(0.01)

    def victims(self, ranks: list[int]) -> tuple[str, list[int]]:
        """All ranks, or a random one."""
        chosen = self.random.randrange(len(ranks))
        return ("all", ranks) if self.random.random() < 0.5 else ("one", [ranks[chosen]])

    def died(self, mode: str, who: str) -> None:
        """Another death."""
        step, saves = last_step(self.folder), "async" if ASYNC.items() <= self.life.items() else "sync"
        self.deaths.append({"mode": mode, "ranks": who, "step": step, "saves": saves})
        print(f"{len(self.deaths)}: {mode}, {saves} saves, {who} killed after step {step}", flush=True)


def killed_through_launcher(soak: Soak) -> None:
    """One life of `run_train.sh`."""
    launched = soak.shop.launch(soak.folder, NUM_RANKS, soak.life, MAX_RESTARTS="0")
    while not (ranks := launched.ranks()) and launched.process.poll() is None:
        time.sleep(0.05)
    soak.wait_for_the_moment(lambda: launched.process.poll() is None)
    ranks = launched.ranks()
    assert ranks, f"ended by itself:\n{launched.wait().screen[-2000:]}"
    who, pids = soak.victims(ranks)
    kill(pids)
    ended = launched.wait()
    assert ended.status == 1, f"status {ended.status}, not 1:\n{ended.screen[-2000:]}"
    assert not ended.survivors, f"{ended.survivors} processes were left"
    soak.died("launcher", who)


def killed_in_forks(soak: Soak) -> None:
    """One life of forked ranks."""
    ranks, over = Ranks(NUM_RANKS), threading.Event()
    who, pids = soak.victims(ranks.pids)
    hit: list[str] = []

    def killer() -> None:
        soak.wait_for_the_moment(lambda: not over.is_set())
        if not over.is_set():
            hit.append(who)
            kill(pids)

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        ranks.run(train, NUM_RANKS, recipe_of(soak), timeout_seconds=LIFE_SECONDS)
    except AssertionError:
        if not hit:
            raise
    finally:
        over.set()
        thread.join()
        ranks.close()
    assert hit, "the run came to its end before its next death: it takes more steps"
    soak.died("forked", who)


def kill(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def recipe_of(soak: Soak) -> Any:
    """The recipe of forked ranks: the same values as on the command line of the launcher."""
    values = {**TINY, **soak.life, "training.dataset_path": str(soak.shop.corpus)}
    return make_recipe(soak.folder, **{key.replace(".", "__"): value for key, value in values.items()})


def play(
    shop: Workshop, mesh: str, *, kills: int, through_launcher: int, alternates: bool = False, seed: int = 0
) -> Soak:
    """Kills a run that many times, the first ones through the launcher, and lets it end."""
    os.environ["TITAN_GROWTH_CACHE"] = str(shop.folder / "cache")  # of forked ranks
    steps = STEPS_A_LIFE * (kills + 1)
    settings = {
        **MESHES[mesh][1],
        "training.steps": steps,
        "growth.stages.0.at": f"{steps // 2} steps",
        "lr_scheduler.warmup_steps": 5,
        "validation.freq": 10,
    }
    whole = shop.whole(NUM_RANKS, settings)
    soak = Soak(
        shop, whole, shop.folder / f"broken-{mesh}", {**TINY, **settings}, kills, random.Random(seed), alternates
    )
    while len(soak.deaths) < kills:
        (killed_through_launcher if len(soak.deaths) < through_launcher else killed_in_forks)(soak)
    last = shop.launch(soak.folder, NUM_RANKS, soak.life).wait()
    assert last.status == 0, last.screen[-2000:]
    soak.wrong = differences(soak.folder, whole)
    return soak


def page(soak: Soak, command: str, mesh: str, seconds: float) -> str:
    """The page."""
    modes = collections.Counter((death["mode"], death["ranks"], death["saves"]) for death in soak.deaths)
    lines = len(read_metrics(soak.folder))
    text = [
        "# One run, killed at random moments",
        "",
        f"`{command}`: {NUM_RANKS} ranks, {MESHES[mesh][0]}, {soak.settings['training.steps']} steps, growth after "
        f"{soak.settings['growth.stages.0.at']}, checkpoints every {soak.settings['checkpoint.interval']}; "
        f"{len(soak.deaths)} times SIGKILL in {seconds / 60:.0f} minutes.",
        "",
        f"All tensors of the last checkpoint and the {lines} lines of `metrics.jsonl` (timings apart) are "
        f"{'**not** those' if soak.wrong else 'bit for bit those'} of the undisturbed run"
        f"{': ' if soak.wrong else '.'}{'; '.join(soak.wrong)}",
        "",
        "| started by | killed | saves | times |",
        "| --- | --- | --- | --- |",
        *(f"| {' | '.join(key)} | {count} |" for key, count in sorted(modes.items())),
        "",
        f"Killed after steps {', '.join(str(death['step']) for death in soak.deaths)}.",
    ]
    return "\n".join(text) + "\n"


def main() -> int:
    """Plays the run; returns 1 when it differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="of both kinds together")
    parser.add_argument("--through-launcher", type=int, default=8, help="of them, those of a real run_train.sh")
    parser.add_argument("--mesh", choices=MESHES, default="pp")
    parser.add_argument("--async-saves", action="store_true", help="in every other start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; kept, and nothing is written. Default: temporary")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        soak = play(
            Workshop((options.folder or Path(temporary)).absolute()),
            options.mesh,
            kills=options.kills,
            through_launcher=options.through_launcher,
            alternates=options.async_saves,
            seed=options.seed,
        )
        command = f"python -m tests.faults.soak {' '.join(sys.argv[1:])}".strip()
        text = page(soak, command, options.mesh, time.monotonic() - began)
    print(text)
    if options.folder is None:
        (RESULTS / "soak.md").write_text(text)
    return int(bool(soak.wrong))


if __name__ == "__main__":
    sys.exit(main())
