"""`[stability]`: what to do about a step whose numbers are not finite, or far above those before it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from titan_growth.config.section import Section


class StabilityConfig(Section):
    """Steps that went wrong. Not a section of torchtitan.

    Any other setting than the defaults waits for the device in every step, to look at loss and gradient norm.
    """

    nonfinite: Literal["stop", "skip", "roll_back"] = "stop"
    """A loss or gradient norm that is NaN or infinite: stop = end the run (noticed at the next logged or saved step);
    skip = do not update the weights; roll_back = continue from the last checkpoint, past the data since."""
    spike: Literal["ignore", "warn", "skip", "roll_back"] = "ignore"
    """A loss or gradient norm far above those of the last steps: likewise, or only warn."""
    spike_sigmas: float = Field(6.0, gt=0)
    """Standard deviations above the mean of the window beyond which a value is a spike."""
    spike_window: int = Field(128, ge=8)
    """Steps that loss and gradient norm are compared with, from a quarter of them on; restarts at a growth."""
    max_events: int = Field(10, ge=1)
    """Skipped and rolled back steps of the whole run; the next one ends it with an error that lists them."""

    @property
    def acts(self) -> bool:
        """Whether the weights may be kept from moving."""
        return self.nonfinite != "stop" or self.spike in ("skip", "roll_back")

    @property
    def looks(self) -> bool:
        """Whether the numbers of every step are looked at."""
        return self.acts or self.spike == "warn"

    @property
    def rolls_back(self) -> list[str]:
        """The keys that ask for roll-backs."""
        return [key for key in ("nonfinite", "spike") if getattr(self, key) == "roll_back"]
