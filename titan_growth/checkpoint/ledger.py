"""The ledger of a checkpoint folder: the steps that the run has committed and not removed itself.

Without a manifest, a step whose save died looks like one whose manifest was lost. `ledger.json`, beside the step
folders, tells them apart. A step enters it after its manifest is written, and leaves it before its folder is touched.
So a valid manifest counts whatever the ledger says, and a step of the ledger that cannot be read is damage.

A run writes its ledger before its first step: an empty one says that nothing was ever committed. Rank 0 only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from titan_growth.checkpoint.manifest import unsealed
from titan_growth.checkpoint.untrusted.files import text_of
from titan_growth.checkpoint.untrusted.json_types import STRICT, Count, from_json, table_of_json
from titan_growth.checkpoint.untrusted.pickles import RefusedError
from titan_growth.tools.errors import CheckpointError
from titan_growth.tools.files import free_name, move_folder, write_atomic
from titan_growth.tools.sealed import sealed

LEDGER = "ledger.json"


@dataclass(frozen=True)
class Ledger:
    """The content of `ledger.json`."""

    __pydantic_config__ = STRICT

    steps: tuple[Count, ...] = ()
    """Committed, and not removed by the run."""
    started_fresh: bool = False
    """The run has obeyed `checkpoint.start_fresh`: the same command goes on from now on."""

    def to_json(self) -> str:
        """The text of the file, with its own checksum."""
        return sealed({"format": 1, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """Raises RefusedError if it is not a ledger, or was changed."""
        table = unsealed(table_of_json(text))
        if table.pop("format", None) != 1:
            raise RefusedError("written by another version")
        return from_json(cls, json.dumps(table))


def read_ledger(root: Path) -> Ledger | None:
    """The ledger of a checkpoint folder; None when there is none.

    Raises:
        CheckpointError: when there is one that cannot be read.
    """
    try:
        text = text_of(root / LEDGER)
        return None if text is None else Ledger.from_json(text)
    except RefusedError as error:
        raise CheckpointError(f"{LEDGER} cannot be read ({error})") from None


class LedgerFile:
    """The ledger of a run's checkpoint folder, for the process that writes it: rank 0 of the run that has the lock.

    It is kept in memory too, so that a file lost or damaged during the run is whole again with the next commit.

    Raises:
        OSError: from every method, when the file cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._ledger: Ledger | None = None

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps committed, and not removed by the run."""
        if self._ledger is None:
            self._ledger = read_ledger(self.root) or Ledger()
        return self._ledger.steps

    def begin(self, steps: Iterable[int], *, started_fresh: bool) -> None:
        """Writes the ledger of a run that starts with these steps. What stands in its place is replaced."""
        path = self.root / LEDGER
        if path.is_dir():
            move_folder(path, free_name(self.root / f"damaged-{LEDGER}"))
        self._write(Ledger(tuple(sorted(steps)), started_fresh))

    def enter(self, step: int) -> None:
        """Call once the manifest of a step is written."""
        self._keep({*self.steps, step})

    def strike(self, steps: Iterable[int]) -> None:
        """Call before the folders of these steps are removed or renamed."""
        self._keep(set(self.steps) - set(steps))

    def _keep(self, steps: set[int]) -> None:
        if steps != set(self.steps):
            assert self._ledger is not None, "read by `steps`"
            self._write(replace(self._ledger, steps=tuple(sorted(steps))))

    def _write(self, ledger: Ledger) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        write_atomic(self.root / LEDGER, ledger.to_json())
        self._ledger = ledger
