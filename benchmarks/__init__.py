"""Measurements; each script says how to repeat it."""
