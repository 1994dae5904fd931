"""Waits for storage are marked: the heartbeat would take them for a hang."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from titan_growth.checkpoint import reader, retention, steps
from titan_growth.checkpoint.ledger import LedgerFile
from titan_growth.checkpoint.reader import SafeReader
from titan_growth.checkpoint.retention import Retention
from titan_growth.checkpoint.saving import Saver
from titan_growth.config.schema.recipe import CheckpointConfig
from titan_growth.liveness.waits import LAST_SAVE, STORAGE, wait_of


class Watch:
    """What the creating thread waits for, as seen from another thread."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.seen = ""

    def __call__(self, *args: Any) -> None:
        end = time.monotonic() + 5
        while not self.seen and time.monotonic() < end:
            self.seen = wait_of(self.thread)

    def beside(self) -> threading.Thread:
        """A thread that ends once the wait for it is marked."""
        thread = threading.Thread(target=self)
        thread.start()
        return thread


@pytest.mark.parametrize(("call", "expected"), [(Saver.wait, STORAGE), (Saver.close, LAST_SAVE)])
def test_waiting_for_a_save_in_the_background_is_marked(tmp_path: Path, call: Any, expected: str) -> None:
    saver = Saver(CheckpointConfig(enable=False), ledger := LedgerFile(tmp_path), Retention(ledger, 0))
    watch = Watch()
    saver._thread = watch.beside()
    call(saver)
    assert watch.seen == expected
    assert wait_of(watch.thread) == ""


def test_waiting_for_removals_is_marked(tmp_path: Path) -> None:
    watch = Watch()
    remover = Retention(LedgerFile(tmp_path), 1)
    remover._remover = watch.beside()
    remover.wait()
    assert watch.seen == STORAGE


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_reading_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step-5"
    dcp.save({"w": torch.ones(3)}, checkpoint_id=path, no_dist=True)
    opened = SafeReader(path)
    (chunk,) = opened.chunks()["w"]
    for module, name, call in (
        (reader, "find_values", lambda: opened.read_chunk(chunk)),
        (reader, "find_values", lambda: opened.check_chunks([chunk])),
        (steps, "read_ledger", lambda: steps.committed_steps(tmp_path)),
        (retention, "move_folder", lambda: retention.set_aside(tmp_path, [5], "damaged")),
    ):
        watch = Watch()
        original = getattr(module, name)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *given, watch=watch, original=original: (watch(), original(*given))[1])
            call()
        assert watch.seen == STORAGE
        assert wait_of(watch.thread) == ""
