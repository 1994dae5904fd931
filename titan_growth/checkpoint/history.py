"""A run's counters and its lineage of growths.

Both are plain JSON beside the tensors of each checkpoint, read before the model is built: that is how a resumed run
knows its depth.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from titan_growth.checkpoint.untrusted.json_types import STRICT, Count, Number, Text, from_json
from titan_growth.checkpoint.untrusted.pickles import RefusedError


@dataclass(frozen=True)
class Progress:
    """Counters of a run. They never restart, not even at a growth."""

    __pydantic_config__ = STRICT

    step: Count = 0
    tokens: Count = 0
    """Target positions trained on, over all ranks."""
    flops: Count = 0
    """Training FLOPs, each step at its own depth."""
    samples: Count = 0
    """The data cursor: sequences consumed of the global order."""

    def learned(self, *, tokens: int, flops: int, samples: int) -> Progress:
        """The counters after a batch of a growth's learning phase, which is not a step of the run."""
        return replace(self, tokens=self.tokens + tokens, flops=self.flops + flops, samples=self.samples + samples)

    def advanced(self, *, tokens: int, flops: int, samples: int) -> Progress:
        """The counters one step later."""
        return replace(self.learned(tokens=tokens, flops=flops, samples=samples), step=self.step + 1)


@dataclass(frozen=True, kw_only=True)
class GrowthEvent:
    """A growth of the run."""

    __pydantic_config__ = STRICT

    step: Count
    tokens: Count
    flops: Count
    operator: Text
    stage: dict[str, Any]
    """The recipe's table, without defaults."""
    from_sizes: dict[Text, Count]
    """Model sizes before, by recipe key."""
    to_sizes: dict[Text, Count]
    layer_map: tuple[Count | None, ...]
    """Source layer of each layer; None for a newly initialised one."""
    source: Text
    """The checkpoint folder read, relative to the run's checkpoint folder."""
    mesh: Text
    """Of the grown model; the small model's is in the source's manifest."""
    num_ranks: Count
    loss_before: Number | None
    """On a fixed held-out batch; None for a growth on disk, which has no batch."""
    loss_after: Number | None = None
    seconds: Number | None = None
    """From the small model's last step to the grown model's first, save and verification included."""
    learning: dict[Text, Number] | None = None
    """Of a learned growth's learning phase: steps, first and last loss."""
    bytes_read: Count = 0
    """Over all ranks, without verification."""

    @property
    def from_layers(self) -> int:
        """Depth before."""
        return self.from_sizes["n_layers"]

    @property
    def to_layers(self) -> int:
        """Depth after."""
        return self.to_sizes["n_layers"]

    @classmethod
    def from_dict(cls, table: Any) -> GrowthEvent:
        """Raises RefusedError if the table is not an event."""
        if isinstance(table, dict) and "source_of" in table:  # the first version, which grew depth only
            stage = {key: table.get(key) for key in ("factor", "optimizer_state", "lr_policy")}
            sizes = {f"{side}_sizes": {"n_layers": table.get(f"{side}_layers")} for side in ("from", "to")}
            others = {key: value for key, value in table.items() if key not in (*stage, *_FIRST_VERSION)}
            table = {**others, "stage": stage, **sizes, "layer_map": table["source_of"], "num_ranks": 0}
        event = from_json(cls, json.dumps(table))
        if any("n_layers" not in sizes for sizes in (event.from_sizes, event.to_sizes)):
            raise RefusedError("a growth without n_layers")
        return event


_FIRST_VERSION = ("source_of", "from_layers", "to_layers")


@dataclass(frozen=True, kw_only=True)
class RollBack:
    """A growth that the watchdog rolled back."""

    __pydantic_config__ = STRICT

    growth: Count
    """Index of the growth, from 0."""
    step: Count
    """The step it happened at."""
    noticed_at: Count
    loss_before: Number
    loss_then: Number
    postponed_to: Count
    """The first step at which the run may grow again."""


@dataclass(frozen=True, kw_only=True)
class BadStep:
    """A step skipped or rolled back (`titan_growth.run.stability`)."""

    __pydantic_config__ = STRICT

    step: Count
    action: Literal["skip", "roll_back"]
    reason: Text
    to_samples: Count
    """The data cursor after its batch."""
    from_step: Count | None = None
    """Of the checkpoint rolled back to."""
    from_samples: Count | None = None
    """The data cursor of that checkpoint; the data between the two cursors is skipped."""


@dataclass(frozen=True, kw_only=True)
class StabilityState:
    """The history that new steps are judged against."""

    __pydantic_config__ = STRICT

    events: list[BadStep] = field(default_factory=list)
    """Of the whole run."""
    window: list[tuple[Number, Number]] = field(default_factory=list)
    """Loss and gradient norm of the last good steps."""


@dataclass(frozen=True)
class Lineage:
    """The growths of a run, oldest first."""

    events: tuple[GrowthEvent, ...] = ()
    """Growths of this run's recipe."""
    ancestors: tuple[GrowthEvent, ...] = ()
    """Growths before this run: on disk, and in the runs it descends from."""
    roll_backs: tuple[RollBack, ...] = ()
    parents: tuple[Text, ...] = ()
    """Step folders whose whole state a run has gone on from in a folder of its own, oldest first."""
    averaged: tuple[Text, ...] = ()
    """Step folders whose weights these are the mean of, oldest first."""

    def grown(self, event: GrowthEvent) -> Lineage:
        """The lineage after one more growth."""
        return replace(self, events=(*self.events, event))

    def postponed_to(self, growth: int) -> int:
        """The first step at which a growth may happen after its roll-backs; 0 if there were none."""
        return max((one.postponed_to for one in self.roll_backs if one.growth == growth), default=0)

    @property
    def grown_at(self) -> list[int]:
        """The steps of the growths."""
        return [event.step for event in self.events]

    def postponed_by(self, growth: int) -> int:
        """The number of steps a growth was postponed by when it was last rolled back; 0 if it never was."""
        return max((one.postponed_to - one.step for one in self.roll_backs if one.growth == growth), default=0)

    def to_json(self) -> str:
        """The text of `lineage.json`."""
        table = asdict(self)
        for key in ("parents", "averaged"):
            if not table[key]:
                del table[key]  # as before there were any
        return json.dumps({"ancestors": table.pop("ancestors"), **table}, indent=1) + "\n"

    @classmethod
    def from_dict(cls, table: Any) -> Lineage:
        """Raises RefusedError if the table is not a lineage."""
        if not isinstance(table, dict) or "events" not in table:
            raise RefusedError("it is not a lineage")
        lists = [table.get(key, []) for key in ("events", "ancestors", "roll_backs", "parents", "averaged")]
        events, ancestors, roll_backs, parents, averaged = lists
        names_only = all(isinstance(one, list) for one in lists) and all(
            isinstance(one, str) for one in (*parents, *averaged)
        )
        if not names_only:
            raise RefusedError("it is not a lineage")
        return cls(
            tuple(GrowthEvent.from_dict(event) for event in events),
            tuple(GrowthEvent.from_dict(event) for event in ancestors),
            tuple(from_json(RollBack, json.dumps(one)) for one in roll_backs),
            tuple(parents),
            tuple(averaged),
        )
