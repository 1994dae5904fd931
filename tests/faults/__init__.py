"""Real runs that are broken or moved on purpose, and a verdict on each.

`pytest -m slow tests/faults` asserts the verdicts, `python -m tests.faults.NAME` writes them as a page.
"""
