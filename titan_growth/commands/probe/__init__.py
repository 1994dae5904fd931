"""`titan_growth probe`: several growths of one checkpoint, each trained for a few steps, ranked."""

from titan_growth.commands.probe.command import main

__all__ = ["main"]
