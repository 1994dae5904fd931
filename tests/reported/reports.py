"""The register of public bug reports that are tried here; `python -m tests.reported_page` makes a page of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """One report, and what happens here.

    project: `owner/name` of a public repository; number: of its issue or pull request.
    there: what goes wrong there. here: what happens here.
    tests: `file::function` of the tests that show it.
    also: reports of the same fault, as `owner/name#number`.
    """

    project: str
    number: int
    there: str
    here: str
    tests: tuple[str, ...]
    also: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As people write it."""
        return f"{self.project}#{self.number}"


def own(file: str, *functions: str) -> tuple[str, ...]:
    """Ids of tests in this folder."""
    return tuple(f"tests/reported/test_{file}.py::test_{function}" for function in functions)


def areas() -> dict[str, list[Report]]:
    """All reports by area, in the order of the page."""
    from tests.reported import rows_checkpoints, rows_data, rows_hub, rows_parallel, rows_settings

    return {
        "Data": rows_data.ROWS,
        "Checkpoints": rows_checkpoints.SAVES,
        "Going on": rows_checkpoints.RESUMES,
        "Meshes": rows_parallel.ROWS,
        "Other meshes": rows_parallel.RESHARDING,
        "Hugging Face folders": rows_hub.ROWS,
        "Schedules and hyper-parameters": rows_settings.SCHEDULES,
        "Recipes and metrics": rows_settings.CONFIG,
        "Signals, hangs and failures": rows_settings.SIGNALS,
    }
