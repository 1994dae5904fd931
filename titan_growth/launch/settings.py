"""What `run_train.sh` reads from the environment, checked before anything is started.

A variable out of range would otherwise surface minutes later as a rank that hangs or a missing device. All problems are
reported together, each with the name of its variable.
"""

from __future__ import annotations

import importlib.util
import re
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from titan_growth.tools.cores import num_cores
from titan_growth.tools.findings import Findings
from titan_growth.tools.location import local_path

CONFIG_OPTION = "--job.config_file"
DEFAULT_CONFIG = "train_configs/debug_model.toml"
DEFAULT_MODULE = "titan_growth.train"
DEFAULT_PORT = 29500
COMM_MODES = ("", "fake_backend")


@dataclass(frozen=True)
class LaunchSettings:
    """One launch: the module, its arguments, the ranks, and those whose output is shown."""

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
        """Ranks on all nodes."""
        return self.ranks * self.nodes

    @property
    def shown(self) -> tuple[int, ...]:
        """Local ranks whose output is shown: 0 when a relaunch with fewer ranks leaves none of LOG_RANK."""
        return tuple(rank for rank in self.log_ranks if rank < self.ranks) or (0,)

    @property
    def threads(self) -> int:
        """CPU threads of a rank: its share of the cores that this process may use."""
        return max(1, num_cores() // self.ranks)


class _Reader:
    """Reads variables and collects their problems. An empty variable counts as unset."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.found = Findings()

    def text(self, name: str, default: str = "") -> str:
        return self._environ.get(name, "").strip() or default

    def integer(self, name: str, default: int, low: int, what: str, example: int, high: int | None = None) -> int:
        text = self.text(name)
        if not text:
            return default
        value = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else -1
        if value < low or (high is not None and value > high):
            self.found.problem(name, f"must be {what}, not {text!r}", f"For example: {name}={example}")
            return default
        return value


def read_settings(
    argv: list[str], environ: Mapping[str, str], checkout: Path, count_devices: Callable[[], int]
) -> LaunchSettings:
    """The settings of this launch. Raises ConfigError with all problems."""
    reader = _Reader(environ)
    nodes = reader.integer("NNODES", 1, 1, "a positive integer", 2)
    comm_mode = _comm_mode(reader)
    node_rank, address, port = _rendezvous(reader, nodes, comm_mode)
    restarts = reader.integer("MAX_RESTARTS", 0, 0, "0 or a positive integer", 1)
    module = _module(reader)
    args = _recipe_args(argv, reader, checkout)
    ranks = reader.integer("NGPU", 0, 1, "a positive integer", 2)
    log_text = reader.text("LOG_RANK", "0")
    reader.found.raise_if_any()

    # Counting devices loads torch, which takes seconds: errors above need not wait for it.
    devices = count_devices()
    ranks = ranks or max(devices, 1)
    # A dry run is one process, whatever the number of ranks, and needs no devices.
    if devices and ranks > devices and not comm_mode:
        reader.found.problem(
            "NGPU", f"{ranks} ranks but only {devices} CUDA devices here", f"Set NGPU={devices} or less"
        )
    log_ranks = _log_ranks(reader, log_text, ranks)
    reader.found.raise_if_any()
    return LaunchSettings(args, ranks, devices, log_ranks, module, comm_mode, nodes, node_rank, address, port, restarts)


def _comm_mode(reader: _Reader) -> str:
    mode = reader.text("COMM_MODE")
    if mode == "local_tensor":
        message = "COMM_MODE=local_tensor is not supported: the ranks of one process would share one model"
        reader.found.problem("", message, "Use COMM_MODE=fake_backend for a dry run without ranks")
    elif mode not in COMM_MODES:
        hint = "Leave it unset to train, or set COMM_MODE=fake_backend for a dry run of one step"
        reader.found.problem("COMM_MODE", f"there is no mode {mode!r}", hint)
    return mode


def _rendezvous(reader: _Reader, nodes: int, comm_mode: str) -> tuple[int, str, int]:
    """Rank of this node, and where the nodes meet; a single node finds a free port."""
    node_rank = reader.integer("NODE_RANK", 0, 0, f"between 0 and NNODES - 1 = {nodes - 1}", 0, high=nodes - 1)
    port = reader.integer("MASTER_PORT", DEFAULT_PORT, 1, "a port between 1 and 65535", DEFAULT_PORT, high=65535)
    address = reader.text("MASTER_ADDR")
    if nodes > 1 and not comm_mode:
        if not address:
            hint = "Set it to the host name of the node with NODE_RANK=0, the same on all nodes"
            reader.found.problem("MASTER_ADDR", f"is needed with NNODES={nodes}", hint)
        if not reader.text("NODE_RANK"):
            hint = f"Set it to 0 on the first node, and up to {nodes - 1} on the others"
            reader.found.problem("NODE_RANK", f"is needed with NNODES={nodes}", hint)
    return node_rank, address, port


def _module(reader: _Reader) -> str:
    name = reader.text("TRAIN_FILE", DEFAULT_MODULE)
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name) or name.endswith(".py"):
        hint = f"Give the dotted name of a module that can be imported, such as {DEFAULT_MODULE}"
        reader.found.problem("TRAIN_FILE", f"{name!r} is not the name of a module", hint)
        return name
    try:
        found = importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        reader.found.problem(
            "TRAIN_FILE", f"no module named {name!r}", "Check the name, or put its folder on PYTHONPATH"
        )
    return name


def _log_ranks(reader: _Reader, text: str, ranks: int) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if all(re.fullmatch(r"[0-9]{1,9}", part) and int(part) < ranks for part in parts):
        return tuple(sorted({int(part) for part in parts}))
    what = f"must be local ranks below NGPU={ranks}, separated by commas, not {text!r}"
    reader.found.problem("LOG_RANK", what, "For example: LOG_RANK=0")
    return (0,)


def _recipe_args(argv: list[str], reader: _Reader, checkout: Path) -> tuple[str, ...]:
    """The arguments for the training module, with exactly one `--job.config_file`."""
    given = option_value(argv, CONFIG_OPTION)
    name = CONFIG_OPTION if given is not None else "CONFIG_FILE"
    path = given if given is not None else reader.text("CONFIG_FILE", DEFAULT_CONFIG)
    # The caller's recipes come before those of the checkout.
    candidates = [local_path(path), checkout / path]
    file = next((candidate for candidate in candidates if path and candidate.is_file()), None)
    if file is None:
        message = "no such file: " + " or ".join(dict.fromkeys(str(candidate.absolute()) for candidate in candidates))
        if folder := next((candidate for candidate in candidates if candidate.is_dir()), None):
            message = f"{folder.absolute()} is a folder" if path else "needs a value"
        reader.found.problem(name, message, "Give the path of a recipe (a TOML file)")
    return (CONFIG_OPTION, str(file), *drop_option(argv, CONFIG_OPTION))


def option_value(argv: Sequence[str], option: str) -> str | None:
    """Value of `--option value` or `--option=value`, the last one given."""
    value: str | None = _parser(option).parse_known_args(argv)[0].value
    return value


def drop_option(argv: Sequence[str], option: str) -> list[str]:
    """The arguments without the option and its value."""
    return _parser(option).parse_known_args(argv)[1]


def _parser(option: str) -> ArgumentParser:
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(option, dest="value", nargs="?", const="")
    return parser


def dump_folder_of(args: tuple[str, ...]) -> Path:
    """`job.dump_folder` by the recipe, for a launch whose preflight did not set it. Never fails."""
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
