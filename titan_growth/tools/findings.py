"""What checks find: problems, which stop a run before it starts, and warnings, which do not.

A check writes to the `Findings` it is given, and returns its value, or None without one. So all problems are reported
together, and no caller drops one unnoticed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from titan_growth.tools.errors import ConfigError, Problem


@dataclass
class Findings:
    """Problems and warnings of a recipe, in the order found."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    def problem(self, key: str, message: str, hint: str = "") -> None:
        """Adds something that must be changed."""
        self.problems.append(Problem(key, message, hint))

    def warn(self, key: str, message: str, hint: str = "") -> None:
        """Adds something that works but is probably unintended."""
        self.warnings.append(Problem(key, message, hint))

    def extend(self, other: Findings) -> None:
        """Adds the findings of another check."""
        self.problems += other.problems
        self.warnings += other.warnings

    def add_problems_of_other_keys(self, other: Findings) -> None:
        """Adds the problems of another check, but for keys that have one already: theirs would follow from it."""
        known = {problem.key for problem in self.problems}
        # An operator that is not known may be that of a plugin that could not be loaded.
        unknown = ("growth.stages",) if "plugins" in known else ()
        self.problems += [
            problem for problem in other.problems if problem.key not in known and not problem.key.startswith(unknown)
        ]

    def raise_if_any(self) -> None:
        """Raises ConfigError with all problems, if there are any."""
        if self.problems:
            raise ConfigError(self.problems)
