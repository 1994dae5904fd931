"""A stage that is on in every run, has no settings and does nothing: plugins of tests derive from it."""

from __future__ import annotations

from typing import ClassVar

from titan_growth.stages.base import BuildContext, ModelParts, PlanContext, Stage


class QuietStage(Stage):
    """Needs a name and the hooks that matter to the test."""

    name: ClassVar[str]

    def enabled(self, context: PlanContext) -> bool:
        return True

    def apply(self, parts: ModelParts, context: BuildContext) -> ModelParts:
        return parts

    def describe(self, context: PlanContext) -> str:
        return f"{self.name}: for a test"
