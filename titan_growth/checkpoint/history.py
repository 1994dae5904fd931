"""What a run has done so far: its counters, and the growths behind it.

Both are plain JSON beside the tensors of each checkpoint. They are read before a model is built, so a resumed run knows
its depth; and reading them runs nothing.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from titan_growth.checkpoint.untrusted.json_types import STRICT, Count, Number, Text, from_json
from titan_growth.checkpoint.untrusted.pickles import RefusedError


@dataclass(frozen=True)
class Progress:
    """Counters of a run. They never restart, not at a growth either."""

    __pydantic_config__ = STRICT

    step: Count = 0
    tokens: Count = 0
    """Target positions trained on, by all ranks together."""
    flops: Count = 0
    """Training FLOPs at the depth of each moment."""
    samples: Count = 0
    """The data cursor: sequences of the global order consumed."""

    def learned(self, *, tokens: int, flops: int, samples: int) -> Progress:
        """The counters after a batch of a growth's learning phase, which is no step of the run."""
        return replace(self, tokens=self.tokens + tokens, flops=self.flops + flops, samples=self.samples + samples)

    def advanced(self, *, tokens: int, flops: int, samples: int) -> Progress:
        """The counters one step later."""
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + tokens,
            flops=self.flops + flops,
            samples=self.samples + samples,
        )


@dataclass(frozen=True, kw_only=True)
class GrowthEvent:
    """One growth that has happened."""

    __pydantic_config__ = STRICT

    step: Count
    tokens: Count
    flops: Count
    operator: Text
    stage: dict[str, Any]
    """The stage as the recipe has it, defaults left out."""
    from_sizes: dict[Text, Count]
    """Sizes of the model before, by recipe key."""
    to_sizes: dict[Text, Count]
    layer_map: tuple[Count | None, ...]
    """Source layer of each layer; None for a layer that started anew."""
    source: Text
    """Checkpoint folder that the grown model was read from, relative to the run's checkpoint folder."""
    mesh: Text
    """Of the grown model; the source's manifest has that of the small one."""
    num_ranks: Count
    loss_before: Number | None
    """On a fixed held-out batch; None for a growth on disk, which has no batch."""
    loss_after: Number | None = None
    seconds: Number | None = None
    """From the small model's last step to the grown one's first, save and verification included."""
    learning: dict[Text, Number] | None = None
    """Steps, first and last loss of the learning phase of a growth that is learned."""
    bytes_read: Count = 0
    """By all ranks together, verification apart."""

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
        """Raises RefusedError when the table is not an event."""
        if isinstance(table, dict) and "source_of" in table:  # as the first version wrote it, which knew depth only
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
    """A growth that the watchdog has taken back."""

    __pydantic_config__ = STRICT

    growth: Count
    """Its number, from 0."""
    step: Count
    """When it had happened."""
    noticed_at: Count
    loss_before: Number
    loss_then: Number
    postponed_to: Count
    """The step from which on the run may grow again."""


@dataclass(frozen=True, kw_only=True)
class BadStep:
    """A step that was skipped or rolled back (`titan_growth.run.stability`)."""

    __pydantic_config__ = STRICT

    step: Count
    action: Literal["skip", "roll_back"]
    reason: Text
    to_samples: Count
    """The data cursor after its batch."""
    from_step: Count | None = None
    """Of the checkpoint that the run went back to."""
    from_samples: Count | None = None
    """The data cursor of that checkpoint; what lies between the two was passed over."""


@dataclass(frozen=True, kw_only=True)
class StabilityState:
    """What later steps are judged by."""

    __pydantic_config__ = STRICT

    events: list[BadStep] = field(default_factory=list)
    """Of the whole run."""
    window: list[tuple[Number, Number]] = field(default_factory=list)
    """Loss and gradient norm of the last steps that counted."""


@dataclass(frozen=True)
class Lineage:
    """The growths of a run, oldest first."""

    events: tuple[GrowthEvent, ...] = field(default=())
    """Of this run: its recipe lists them."""
    ancestors: tuple[GrowthEvent, ...] = field(default=())
    """Of what the run started from: growths on disk, and those of the runs before them."""
    roll_backs: tuple[RollBack, ...] = field(default=())

    def grown(self, event: GrowthEvent) -> Lineage:
        """The lineage one growth later."""
        return replace(self, events=(*self.events, event))

    def postponed_to(self, growth: int) -> int:
        """The step before which a growth may not happen, because it has been taken back."""
        return max((one.postponed_to for one in self.roll_backs if one.growth == growth), default=0)

    @property
    def grown_at(self) -> list[int]:
        """The steps of the growths."""
        return [event.step for event in self.events]

    def postponed_by(self, growth: int) -> int:
        """By how many steps a growth was put off when it was last taken back; 0 if it never was."""
        return max((one.postponed_to - one.step for one in self.roll_backs if one.growth == growth), default=0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "ancestors": [asdict(event) for event in self.ancestors],
            "events": [asdict(event) for event in self.events],
            "roll_backs": [asdict(one) for one in self.roll_backs],
        }

    def to_json(self) -> str:
        """The text of `lineage.json`."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_dict(cls, table: Any) -> Lineage:
        """Raises RefusedError when the table is not a lineage."""
        if not isinstance(table, dict) or "events" not in table:
            raise RefusedError("it is no lineage")
        events, ancestors, roll_backs = (table.get(key, []) for key in ("events", "ancestors", "roll_backs"))
        if not (isinstance(events, list) and isinstance(ancestors, list) and isinstance(roll_backs, list)):
            raise RefusedError("it is no lineage")
        return cls(
            tuple(GrowthEvent.from_dict(event) for event in events),
            tuple(GrowthEvent.from_dict(event) for event in ancestors),
            tuple(from_json(RollBack, json.dumps(one)) for one in roll_backs),
        )
