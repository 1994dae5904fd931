"""`[averages]`: averages of the weights over the run."""

from __future__ import annotations

from pydantic import Field

from titan_growth.config.section import Section


class AveragesConfig(Section):
    """Averages of the weights over the run. Not a section of torchtitan."""

    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Keep an exponential moving average of the weights, in float32: each step back counts this much less, 0.999 for
    example; 0 = none. It is validated beside the weights, saved, grown with them, and exported on demand."""
