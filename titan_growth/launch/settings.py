"""What `run_train.sh` reads from the environment, checked by name before anything is started.

A variable that is misspelled or out of range would otherwise surface minutes later as a rank that hangs or a device
that does not exist. All problems are collected and reported together, each with the name of its variable.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from titan_growth.tools.errors import ConfigError, Problem

CONFIG_OPTION = "--job.config_file"
DEFAULT_CONFIG = "train_configs/debug_model.toml"
DEFAULT_MODULE = "titan_growth.train"
DEFAULT_PORT = 29500
COMM_MODES = ("", "fake_backend")


@dataclass(frozen=True)
class LaunchSettings:
    """One launch: which module, with which recipe, on how many ranks, and whose output is shown."""

    args: tuple[str, ...]
    ranks: int
    devices: int
    log_ranks: tuple[int, ...]
    module: str
    comm_mode: str
    nodes: int
    node_rank: int
    master_addr: str
    master_port: int
    max_restarts: int

    @property
    def world_size(self) -> int:
        return self.ranks * self.nodes

    @property
    def shown(self) -> tuple[int, ...]:
        """Local ranks whose output is shown. A relaunch with fewer ranks may leave none of LOG_RANK: then it is 0."""
        return tuple(rank for rank in self.log_ranks if rank < self.ranks) or (0,)

    @property
    def threads(self) -> int:
        """CPU threads for each rank: the cores this process may use, shared out, so that ranks do not compete."""
        # A container or a scheduler may allow fewer cores than the machine has; macOS cannot tell.
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        return max(1, len(allowed) // self.ranks)


class _Reader:
    """Reads variables and collects what is wrong with them. An empty variable counts as one that is not set."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.problems: list[Problem] = []

    def text(self, name: str, default: str = "") -> str:
        return self._environ.get(name, "").strip() or default

    def integer(self, name: str, default: int, low: int, what: str, example: int, high: int | None = None) -> int:
        text = self.text(name)
        if not text:
            return default
        value = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else -1
        if value < low or (high is not None and value > high):
            self.refuse(name, f"must be {what}, not {text!r}", f"For example: {name}={example}")
            return default
        return value

    def refuse(self, name: str, message: str, hint: str) -> None:
        self.problems.append(Problem(name, message, hint))


def read_settings(
    argv: list[str], environ: Mapping[str, str], checkout: Path, count_devices: Callable[[], int]
) -> LaunchSettings:
    """Settings of this launch, or a `ConfigError` that lists every variable that cannot be used."""
    reader = _Reader(environ)
    nodes = reader.integer("NNODES", 1, 1, "a positive integer", 2)
    comm_mode = _comm_mode(reader)
    node_rank, address, port = _rendezvous(reader, nodes, comm_mode)
    restarts = reader.integer("MAX_RESTARTS", 0, 0, "0 or a positive integer", 1)
    module = _module(reader)
    args = _recipe_args(argv, reader, checkout)
    ranks = reader.integer("NGPU", 0, 1, "a positive integer", 2)
    log_text = reader.text("LOG_RANK", "0")
    if reader.problems:
        raise ConfigError(reader.problems)

    # Counting devices loads torch, which takes seconds: an error above should not have to wait for it.
    devices = count_devices()
    ranks = ranks or max(devices, 1)
    # A dry run starts one process however many ranks it stands for, so it needs no devices.
    if devices and ranks > devices and not comm_mode:
        reader.refuse("NGPU", f"{ranks} ranks but only {devices} CUDA devices here", f"Set NGPU={devices} or less")
    log_ranks = _log_ranks(reader, log_text, ranks)
    if reader.problems:
        raise ConfigError(reader.problems)
    return LaunchSettings(args, ranks, devices, log_ranks, module, comm_mode, nodes, node_rank, address, port, restarts)


def _comm_mode(reader: _Reader) -> str:
    mode = reader.text("COMM_MODE")
    if mode == "local_tensor":
        message = "COMM_MODE=local_tensor is not supported: the ranks of one process would share one model"
        reader.refuse("", message, "Use COMM_MODE=fake_backend for a dry run without ranks")
    elif mode not in COMM_MODES:
        hint = "Leave it unset to train, or set COMM_MODE=fake_backend for a dry run of one step"
        reader.refuse("COMM_MODE", f"there is no mode {mode!r}", hint)
    return mode


def _rendezvous(reader: _Reader, nodes: int, comm_mode: str) -> tuple[int, str, int]:
    """Rank of this node, and where the nodes meet. With one node there is nothing to say: a free port is found."""
    node_rank = reader.integer("NODE_RANK", 0, 0, f"between 0 and NNODES - 1 = {nodes - 1}", 0, high=nodes - 1)
    port = reader.integer("MASTER_PORT", DEFAULT_PORT, 1, "a port between 1 and 65535", DEFAULT_PORT, high=65535)
    address = reader.text("MASTER_ADDR")
    if nodes > 1 and not comm_mode:
        if not address:
            hint = "Set it to the host name of the node with NODE_RANK=0, the same on all nodes"
            reader.refuse("MASTER_ADDR", f"is needed with NNODES={nodes}", hint)
        if not reader.text("NODE_RANK"):
            hint = f"Set it to 0 on the first node, and up to {nodes - 1} on the others"
            reader.refuse("NODE_RANK", f"is needed with NNODES={nodes}", hint)
    return node_rank, address, port


def _module(reader: _Reader) -> str:
    name = reader.text("TRAIN_FILE", DEFAULT_MODULE)
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name) or name.endswith(".py"):
        hint = f"Give the dotted name of a module that can be imported, such as {DEFAULT_MODULE}"
        reader.refuse("TRAIN_FILE", f"{name!r} is not the name of a module", hint)
        return name
    try:
        found = importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        reader.refuse("TRAIN_FILE", f"no module named {name!r}", "Check the name, or put its folder on PYTHONPATH")
    return name


def _log_ranks(reader: _Reader, text: str, ranks: int) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if all(re.fullmatch(r"[0-9]{1,9}", part) and int(part) < ranks for part in parts):
        return tuple(sorted({int(part) for part in parts}))
    what = f"must be local ranks below NGPU={ranks}, separated by commas, not {text!r}"
    reader.refuse("LOG_RANK", what, "For example: LOG_RANK=0")
    return (0,)


def _recipe_args(argv: list[str], reader: _Reader, checkout: Path) -> tuple[str, ...]:
    """The arguments for the training module, with exactly one `--job.config_file`."""
    given = option_value(argv, CONFIG_OPTION)
    name = CONFIG_OPTION if given is not None else "CONFIG_FILE"
    path = given if given is not None else reader.text("CONFIG_FILE", DEFAULT_CONFIG)
    # A recipe named from anywhere is first one of the caller's, then one of those that come with the checkout.
    candidates = [Path(path).expanduser(), checkout / path]
    file = next((candidate for candidate in candidates if path and candidate.is_file()), None)
    folder = next((candidate for candidate in candidates if candidate.is_dir()), None)
    if not path:
        reader.refuse(name, "needs a value", "Give the path of a recipe (a TOML file)")
        file = Path(path)
    elif file is None and folder is not None:
        reader.refuse(name, f"{folder.absolute()} is a folder", "Give the path of a recipe (a TOML file)")
        file = folder
    elif file is None:
        places = " or ".join(dict.fromkeys(str(candidate.absolute()) for candidate in candidates))
        reader.refuse(name, f"no such file: {places}", "Give the path of a recipe (a TOML file)")
        file = Path(path)
    return (CONFIG_OPTION, str(file), *drop_option(argv, CONFIG_OPTION))


def option_value(argv: list[str] | tuple[str, ...], option: str) -> str | None:
    """Value of `--option value` or `--option=value`; the last one counts, as it does for every parser of options."""
    found = None
    for position, word in enumerate(argv):
        if word.startswith(f"{option}="):
            found = word.partition("=")[2]
        elif word == option:
            found = argv[position + 1] if position + 1 < len(argv) else ""
    return found


def drop_option(argv: list[str] | tuple[str, ...], option: str) -> list[str]:
    """The arguments without `--option value` and `--option=value`."""
    kept: list[str] = []
    skip = False
    for word in argv:
        if skip:
            skip = False
        elif word == option:
            skip = True
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return kept


def dump_folder_of(args: tuple[str, ...]) -> Path:
    """`job.dump_folder` as the recipe says, for a launch whose preflight did not leave it. Never fails."""
    folder: object = option_value(args, "--job.dump_folder")
    if folder is None:
        try:
            # tomllib came with Python 3.11; tomli is the same parser for 3.10.
            import tomli

            text = Path(option_value(args, CONFIG_OPTION) or "").read_text(encoding="utf-8")
            folder = tomli.loads(text).get("job", {}).get("dump_folder")
        except (ImportError, OSError, ValueError, AttributeError):
            folder = None
    return Path(folder if isinstance(folder, str) and folder else "./outputs")
