"""What a run has done so far: its counters, and the growths behind it.

Both are plain JSON beside the tensors of each checkpoint. They are read before a model is built, so a resumed run knows
its depth; and reading them runs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from titan_growth.config.growth_schema import GrowthStage


@dataclass(frozen=True)
class Progress:
    """Counters of a run. They never restart, not at a growth either."""

    step: int = 0
    tokens: int = 0
    """Target positions trained on, by all ranks together."""
    flops: int = 0
    """Training FLOPs at the depth of each moment."""
    samples: int = 0
    """The data cursor: sequences of the global order consumed."""

    def advanced(self, *, tokens: int, flops: int, samples: int) -> Progress:
        """The counters one step later."""
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + tokens,
            flops=self.flops + flops,
            samples=self.samples + samples,
        )


@dataclass(frozen=True)
class GrowthEvent:
    """One growth that has happened."""

    step: int
    tokens: int
    flops: int
    operator: str
    factor: int
    optimizer_state: str
    lr_policy: str
    from_layers: int
    to_layers: int
    source: str
    """Checkpoint folder that the grown model was read from, relative to the run's checkpoint folder."""
    source_of: tuple[int, ...]
    """Source layer of each layer."""
    mesh: str
    loss_before: float
    loss_after: float

    @classmethod
    def begin(
        cls,
        stage: GrowthStage,
        progress: Progress,
        *,
        source: str,
        source_of: Sequence[int],
        from_layers: int,
        mesh: str,
        loss_before: float,
    ) -> GrowthEvent:
        """The event of a growth that is under way; its loss afterwards is not known yet."""
        return cls(
            step=progress.step,
            tokens=progress.tokens,
            flops=progress.flops,
            operator=stage.operator,
            factor=stage.factor,
            optimizer_state=stage.optimizer_state,
            lr_policy=stage.lr_policy,
            from_layers=from_layers,
            to_layers=len(source_of),
            source=source,
            source_of=tuple(source_of),
            mesh=mesh,
            loss_before=loss_before,
            loss_after=math.nan,
        )


@dataclass(frozen=True)
class Lineage:
    """The growths of a run, oldest first."""

    events: tuple[GrowthEvent, ...] = field(default=())

    @property
    def grown_at(self) -> list[int]:
        """The steps of the growths."""
        return [event.step for event in self.events]

    def to_dict(self) -> dict[str, Any]:
        return {"events": [asdict(event) for event in self.events]}

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> Lineage:
        return cls(tuple(GrowthEvent(**{**event, "source_of": tuple(event["source_of"])}) for event in table["events"]))
