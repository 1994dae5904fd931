"""Labels, as the data makes them and the loss reads them."""

from __future__ import annotations

IGNORE_INDEX = -100
"""Label of a position that is not trained on and does not count as a token."""
