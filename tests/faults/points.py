"""A plugin that breaks a run at an exact point: `--plugins tests.faults.points`, `TITAN_FAULT` in the environment.

    TITAN_FAULT=point:step:rank:action     shards:6:1:kill: rank 1 gets SIGKILL while it writes its shard of step-6

Without the variable the module does nothing, so the same recipe, plugin included, is that of the unbroken run. A fault
happens once in all processes that share the folder `TITAN_FAULT_CONTROL`: a run that its launcher starts again, or that
goes back, is not broken again. Points in a step are hooks of a stage; points in a save or a removal are calls to the
operating system, recognised by the path they are about, so they say nothing about who calls and from which thread.

`preflight`, `import`
    The launcher, a rank, reads the recipe; the rank has no signal handlers yet. The step is ignored.
`build`
    A model is about to be composed; the step is the number of builds before in this process: 1 is that of a growth.
`forward`, `backward`, `update`
    Before the forward pass of the step, between gradients and update, after the update.
`save`, `shards`, `metadata`, `commit`, `committed`
    The step is that of the checkpoint: before its folder is made, after the first tensors of a shard, when shards and
    `.metadata` are there, before and after `manifest.json` gets its name.
`behind`
    As `shards`, but later: the run has trained on, and is between gradients and update of the next step.
`retention`, `half_removed`
    The manifest, the first shard of the old checkpoint of that step has been removed.
`read`, `grown`
    Some tensors of the grown model have been read; it has been verified. The step is ignored.

The rank is a number or `all`. Actions can be joined by `+`:

`kill`, `stop`, `term`, `kill_launcher`
    SIGKILL or SIGSTOP to the rank; SIGTERM or SIGKILL to the launcher.
`wait`
    Until somebody makes the file `go` in the control folder.
`fill-N`, `fill_for-N`, `immutable`
    Fill the disk under `TITAN_FAULT_FOLDER` but for N bytes, or for N milliseconds; chattr +i on its checkpoint folder.
`nan_gradient`, `nan_data`
    One element of a gradient, or of what a token is embedded as, is not a number.
`clock-N`
    The clock of tests/faults/clock.c goes N seconds back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tests.quiet_stage import QuietStage
from titan_growth.stages.base import BuildContext, ModelParts, PlanContext
from titan_growth.stages.order import register_stage

TENSORS_BEFORE = 5
"""How many tensors are in a shard, and how many have been read of a grown model, when it is half done."""
ON_RANK_0 = ("metadata", "commit", "committed", "retention", "half_removed", "save")
"""Points that only rank 0 comes to, whoever is the victim."""


@dataclass(frozen=True)
class Fault:
    """What `TITAN_FAULT` says."""

    point: str
    step: int
    rank: str
    actions: tuple[str, ...]

    @classmethod
    def from_environment(cls) -> Fault | None:
        words = os.environ.get("TITAN_FAULT", "").split(":")
        if words == [""]:
            return None
        point, step, rank, actions = words
        return cls(point, int(step or 0), rank, tuple(actions.split("+")))


FAULT = Fault.from_environment()
RANK = os.environ.get("RANK") if "TORCHELASTIC_RUN_ID" in os.environ else None
"""None in the launcher."""
CONTROL = Path(os.environ.get("TITAN_FAULT_CONTROL", "."))


class _State:
    step = 0
    parts: ModelParts = []
    builds = 0
    calls = 0
    poison: str | None = None


def at(point: str, step: int = 0) -> None:
    """The process has come to a point; breaks what is to be broken here."""
    if FAULT is None or FAULT.point != point or (FAULT.step and FAULT.step != step):
        return
    if point != "preflight" and point not in ON_RANK_0 and FAULT.rank not in ("all", RANK):
        return
    try:
        os.close(os.open(CONTROL / "fired", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    (CONTROL / "when").write_text(f"{time.clock_gettime(time.CLOCK_MONOTONIC)} {_State.step}")
    for action in FAULT.actions:
        name, _, value = action.partition("-")
        ACTIONS[name](int(value or 0))


# ---- what is done ------------------------------------------------------------------------------------------------


def victims() -> list[int]:
    """Processes of the ranks to be hit, this one last."""
    assert FAULT is not None
    me, launcher, found = os.getpid(), os.getppid(), {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(entry.name)
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            environ = (entry / "environ").read_bytes().split(b"\0") if parent == launcher else []
            if ranks := [word[5:].decode() for word in environ if word.startswith(b"RANK=")]:
                found[pid] = ranks[0]
    return sorted((pid for pid, rank in found.items() if FAULT.rank in ("all", rank)), key=lambda pid: pid == me)


def signal_victims(number: int) -> Callable[[int], None]:
    def act(_: int) -> None:
        for pid in victims():
            os.kill(pid, number)

    return act


def signal_launcher(number: int) -> Callable[[int], None]:
    return lambda _: os.kill(os.getpid() if RANK is None else os.getppid(), number)


def wait(_: int) -> None:
    (CONTROL / "waiting").touch()
    while not (CONTROL / "go").exists():
        time.sleep(0.02)


def fill(num_bytes_left: int) -> None:
    """Fills the file system of the run for good, then gives some of it back."""
    with open(Path(os.environ["TITAN_FAULT_FOLDER"]).parent / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(512))
        file.truncate(max(0, file.tell() - num_bytes_left))


def fill_for(milliseconds: int) -> None:
    """Fills the file system of the run, and makes room again a little later."""
    fill(0)
    filler = Path(os.environ["TITAN_FAULT_FOLDER"]).parent / "filler"
    subprocess.Popen(["sh", "-c", f'sleep {milliseconds / 1000}; rm "$0"', filler], start_new_session=True)


def immutable(_: int) -> None:
    subprocess.run(["chattr", "+i", Path(os.environ["TITAN_FAULT_FOLDER"]) / "checkpoint"], check=True)


def set_clock_back(seconds: int) -> None:
    """For all processes of the run that have the clock of clock.c."""
    with open(os.environ["FAULT_CLOCK"], "r+b", buffering=0) as file:
        file.write(struct.pack("q", -seconds))


def poison_gradient(_: int) -> None:
    """One element of one gradient is not a number, as after a fault of the hardware."""
    for part in _State.parts:
        for parameter in part.parameters():
            if parameter.grad is not None and local(parameter.grad).numel():
                local(parameter.grad).view(-1)[0] = float("nan")
                return
    raise AssertionError("no gradient on this rank")


def poison_data(_: int) -> None:
    """What one token of the next microbatch is embedded as is not a number; tokens themselves are integers."""

    def hook(module: Any, inputs: Any, output: Any) -> None:
        handle.remove()
        local(output).detach().view(-1)[0] = float("nan")

    embedding = next(part.tok_embeddings for part in _State.parts if part.tok_embeddings is not None)
    handle = embedding.register_forward_hook(hook)


def local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


ACTIONS: dict[str, Callable[[int], None]] = {
    "kill": signal_victims(signal.SIGKILL),
    "stop": signal_victims(signal.SIGSTOP),
    "term": signal_launcher(signal.SIGTERM),
    "kill_launcher": signal_launcher(signal.SIGKILL),
    "wait": wait,
    "fill": fill,
    "fill_for": fill_for,
    "immutable": immutable,
    "nan_gradient": poison_gradient,
    "nan_data": poison_data,
    "clock": set_clock_back,
}


# ---- where it is done --------------------------------------------------------------------------------------------


@register_stage
class FaultPoints(QuietStage):
    """The points of a step."""

    name: ClassVar[str] = "fault_points"
    after: ClassVar[tuple[str, ...]] = ("pipeline",)

    def enabled(self, context: PlanContext) -> bool:
        return FAULT is not None

    def apply(self, parts: ModelParts, context: BuildContext) -> ModelParts:
        _State.builds += 1
        if FAULT is not None and FAULT.point == "build" and FAULT.step == _State.builds - 1:
            at("build", FAULT.step)
        return parts

    def before_step(self, parts: ModelParts, context: BuildContext) -> None:
        _State.step, _State.parts = context.step, parts
        at("forward", context.step)

    def after_backward(self, parts: ModelParts, context: BuildContext) -> None:
        at("backward", _State.step)
        if FAULT is not None and FAULT.point == "behind" and _State.step == FAULT.step + 1:
            (CONTROL / f"behind-{RANK}").touch()
            deadline = time.monotonic() + 20
            while not (CONTROL / "fired").exists():
                assert time.monotonic() < deadline, "no save was under way when the next step came"
                time.sleep(0.01)
            time.sleep(1)  # the signal is on its way

    def after_optimizer_step(self, parts: ModelParts, context: BuildContext) -> None:
        at("update", _State.step)

    def describe(self, context: PlanContext) -> str:
        return f"fault_points: {os.environ.get('TITAN_FAULT')}"


STEP_OF = re.compile(r"/step-(\d+)(?:/(.*))?$")


def watch_files() -> None:
    """Turns calls to the operating system about step folders into points."""

    def wrapped(name: str, before: dict[str, str], after: dict[str, str], argument: int = 0) -> None:
        original = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            path = args[argument]
            if (folder := kwargs.get("dir_fd")) is not None:
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fspath(path))
            match = STEP_OF.search(os.fspath(path)) if isinstance(path, str | os.PathLike) else None
            step, file = (int(match[1]), match[2] or "") if match else (0, "-")
            kind = "*.distcp" if file.endswith(".distcp") else file
            if kind in before:
                at(before[kind], step)
            result = original(*args, **kwargs)
            if kind in after:
                at(after[kind], step)
            return result

        setattr(os, name, call)

    wrapped("mkdir", {"": "save"}, {})
    wrapped("replace", {"recipe.toml": "metadata", "manifest.json": "commit"}, {"manifest.json": "committed"}, 1)
    wrapped("unlink", {}, {"manifest.json": "retention", "*.distcp": "half_removed"})


def open_shard() -> int:
    """The step of the checkpoint of which this process has a shard open; 0 if it has none."""
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            path = os.readlink(f"/proc/self/fd/{entry}")
            if path.endswith(".distcp") and (match := STEP_OF.search(path)):
                return int(match[1])
    return 0


def watch_tensors() -> None:
    """Points in the middle of writing a shard, of reading a grown model, and at its end."""
    import torch

    from titan_growth import grower as growing
    from titan_growth.growth import read

    def after_some(owner: Any, name: str, then: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            then(*args)
            return original(*args, **kwargs)

        setattr(owner, name, call)

    def half_written(_: Any, file: Any, *__: Any) -> None:
        step = open_shard()
        if FAULT is None or step != FAULT.step:
            return
        _State.calls += 1
        if _State.calls != TENSORS_BEFORE + 1:
            return
        for buffered in (file, getattr(file, "_file", None)):
            if hasattr(buffered, "flush"):
                buffered.flush()  # what is written so far is in the file
        if FAULT.point == "behind":
            deadline = time.monotonic() + 20
            while not (CONTROL / f"behind-{RANK}").exists():
                assert time.monotonic() < deadline, "the run does not train on while it saves"
                time.sleep(0.01)
            at("behind", step)
        at("shards", step)

    def half_read(*_: Any) -> None:
        _State.calls += 1
        if _State.calls == TENSORS_BEFORE + 1:
            at("read")

    if FAULT is not None and FAULT.point in ("shards", "behind"):
        after_some(torch, "save", half_written)
    if FAULT is not None and FAULT.point == "read":
        after_some(read, "place", half_read)
    after_some(growing, "check_preserved", lambda *_: at("grown"))


if FAULT is not None and RANK is None:
    at("preflight")
elif FAULT is not None:
    at("import")
    watch_files()
    watch_tensors()
