"""titan_growth: distributed pre-training of language models that grow mid-run."""

from titan_growth.version import __version__

__all__ = ["__version__"]
