"""What the launcher reads from the environment, and which variables it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from titan_growth.launch.settings import LaunchSettings, drop_option, dump_folder_of, option_value, read_settings
from titan_growth.tools.errors import ConfigError


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    checkout = tmp_path / "checkout"
    (checkout / "train_configs").mkdir(parents=True)
    (checkout / "train_configs" / "debug_model.toml").write_text("[job]\ndump_folder = 'from_recipe'\n")
    caller = tmp_path / "caller"
    caller.mkdir()
    (caller / "mine.toml").write_text("")
    monkeypatch.chdir(caller)
    return checkout


def read(checkout: Path, *argv: str, devices: int = 0, **environ: str) -> LaunchSettings:
    environ.setdefault("TRAIN_FILE", "json.tool")
    return read_settings(list(argv), environ, checkout, lambda: devices)


def test_defaults(checkout: Path) -> None:
    settings = read(checkout, NGPU="", LOG_RANK="")
    assert (settings.ranks, settings.nodes, settings.log_ranks, settings.max_restarts) == (1, 1, (0,), 0)
    assert settings.args == ("--job.config_file", str(checkout / "train_configs/debug_model.toml"))
    assert dump_folder_of(settings.args) == Path("from_recipe")
    assert read(checkout, devices=4).ranks == 4


def test_callers_folder_comes_first_and_the_argument_beats_the_variable(checkout: Path) -> None:
    (checkout / "mine.toml").write_text("")
    assert read(checkout, CONFIG_FILE="mine.toml").args == ("--job.config_file", "mine.toml")
    settings = read(checkout, "--a.b", "1", "--job.config_file=mine.toml", CONFIG_FILE="absent.toml")
    assert settings.args == ("--job.config_file", "mine.toml", "--a.b", "1")


@pytest.mark.parametrize(
    ("environ", "name", "expected"),
    [
        ({"NGPU": "two"}, "NGPU", "'two'"),
        ({"NGPU": "0"}, "NGPU", "positive"),
        ({"NGPU": "3", "devices": "2"}, "NGPU", "only 2 CUDA devices"),
        ({"LOG_RANK": "0,x"}, "LOG_RANK", "'0,x'"),
        ({"LOG_RANK": "2", "NGPU": "2"}, "LOG_RANK", "below NGPU=2"),
        ({"CONFIG_FILE": "absent.toml"}, "CONFIG_FILE", "absent.toml"),
        ({"COMM_MODE": "local_tensor"}, "COMM_MODE=local_tensor is not supported", "fake_backend"),
        ({"COMM_MODE": "gossip"}, "COMM_MODE", "'gossip'"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR", "NNODES=2"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK", "NNODES=2"),
        ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"}, "NODE_RANK", "NNODES - 1 = 1"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT", "65535"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS", "'-1'"),
        ({"TRAIN_FILE": "train.py"}, "TRAIN_FILE", "not the name of a module"),
        ({"TRAIN_FILE": "no_such.module"}, "TRAIN_FILE", "no_such.module"),
    ],
)
def test_refused_by_name(checkout: Path, environ: dict[str, str], name: str, expected: str) -> None:
    devices = int(environ.pop("devices", "0"))
    with pytest.raises(ConfigError) as refused:
        read(checkout, devices=devices, **environ)
    assert str(refused.value).startswith(name)
    assert expected in str(refused.value)
    assert refused.value.exit_status == 2
    assert len(refused.value.problems) == 1


def test_all_problems_at_once(checkout: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        read(checkout, NGPU="x", NNODES="x", MAX_RESTARTS="x")
    assert [problem.key for problem in refused.value.problems] == ["NNODES", "MAX_RESTARTS", "NGPU"]


def test_dry_run_needs_neither_devices_nor_other_nodes(checkout: Path) -> None:
    settings = read(checkout, NGPU="64", NNODES="2", COMM_MODE="fake_backend", devices=1)
    assert settings.world_size == 128


def test_threads_share_the_cores_this_process_may_use(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    assert read(checkout, NGPU="4").threads == 3
    assert read(checkout, NGPU="40").threads == 1


def test_options_in_both_spellings() -> None:
    argv = ["--a", "1", "--b=2", "--a=3", "--c"]
    assert option_value(argv, "--a") == "3"
    assert option_value(argv, "--d") is None
    assert drop_option(argv, "--a") == ["--b=2", "--c"]
    assert dump_folder_of(("--job.dump_folder=here",)) == Path("here")
    assert dump_folder_of(("--job.config_file", "/absent.toml")) == Path("./outputs")
