"""What a check finds: problems, which stop a run before it starts, and warnings, which do not.

A function that may find something takes the `Findings` to write to and returns its value, or None where there is none.
So everything that is wrong is reported at once, and no caller can drop a problem without saying so.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from titan_growth.tools.errors import ConfigError, Problem


@dataclass
class Findings:
    """Problems and warnings of a recipe, in the order in which they were found."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    def problem(self, key: str, message: str, hint: str = "") -> None:
        """Adds something that must be changed."""
        self.problems.append(Problem(key, message, hint))

    def warn(self, key: str, message: str, hint: str = "") -> None:
        """Adds something that works, but is probably not meant."""
        self.warnings.append(Problem(key, message, hint))

    def extend(self, other: Findings) -> None:
        """Adds all that another check has found."""
        self.problems += other.problems
        self.warnings += other.warnings

    def raise_if_any(self) -> None:
        """Raises ConfigError with all problems, if there are any."""
        if self.problems:
            raise ConfigError(self.problems)
