"""The growth plan of a run: which model it starts from, when it grows, and into what.

`chain.py` works out the models; here is when one becomes the next. All is validated as a whole before anything starts.
At run time the plan's only memory is the lineage: the number of growths that have happened.
"""

from __future__ import annotations

from dataclasses import dataclass

from titan_growth.checkpoint.lineage import Lineage, Progress
from titan_growth.config.growth_schema import Growth, GrowthStage
from titan_growth.growth.chain import Chain, chain_of
from titan_growth.growth.operators import GrowthMap
from titan_growth.models.config import ModelConfig
from titan_growth.tools.errors import Problem, TrainingError


@dataclass(frozen=True)
class GrowthPlan:
    """The growths of a run in their order, and when each of them comes."""

    chain: Chain
    stages: tuple[GrowthStage, ...]

    @property
    def configs(self) -> tuple[ModelConfig, ...]:
        """The models of the run in their order."""
        return self.chain.configs

    def map_after(self, num_growths: int) -> GrowthMap:
        """The growth that comes after so many others."""
        return self.chain.maps[num_growths]

    def config_after(self, num_growths: int) -> ModelConfig:
        """The model after so many growths."""
        return self.configs[num_growths]

    def due(self, progress: Progress, lineage: Lineage) -> GrowthStage | None:
        """The stage to carry out now: the next one, once its count has been reached."""
        done = len(lineage.events)
        if done == len(self.stages):
            return None
        when = self.stages[done].when
        count = progress.step if when.unit == "steps" else progress.tokens
        return self.stages[done] if count >= when.value else None

    def remaining(self, lineage: Lineage) -> tuple[GrowthStage, ...]:
        """Stages that have not happened."""
        return self.stages[len(lineage.events) :]

    def require_complete(self, progress: Progress, lineage: Lineage) -> None:
        """Raises TrainingError when a run that has come to its last step is not at its target."""
        for stage in self.remaining(lineage):
            num_layers = self.config_after(len(lineage.events)).num_layers
            raise TrainingError(
                f"the growth at {stage.when} never came: the run ended with {progress.tokens:,} tokens at "
                f"{num_layers} layers. Raise training.steps to go on"
            )


def plan_growth(section: Growth, target: ModelConfig) -> tuple[GrowthPlan | None, list[Problem]]:
    """The plan of a recipe, or what is wrong with it."""
    chain, problems = chain_of(section, target)
    return (GrowthPlan(chain, tuple(section.active_stages)) if chain is not None else None), problems


def timing_problems(
    section: Growth, *, steps: int, tokens_per_step: int, progress: Progress | None = None, num_growths: int = 0
) -> list[Problem]:
    """Stages that would come too late or out of order, once the batch size is known.

    Args:
        progress: where the run has come to; None at its start.
        num_growths: stages that have happened, which are not asked about again.
    """
    progress = progress or Progress()
    problems, previous = [], progress.step - 1
    for index, stage in enumerate(section.active_stages):
        if index < num_growths:
            continue
        when = stage.when
        left = when.value - (progress.step if when.unit == "steps" else progress.tokens)
        step = progress.step + max(0, left if when.unit == "steps" else -(-left // tokens_per_step))
        key = f"growth.stages.{index}.at"
        if step >= steps:
            message = f'"{stage.at}" is not before the last step ({steps:,} steps of {tokens_per_step:,} tokens)'
            hint = "Grow earlier or train longer; growth.enable = false trains the target model from scratch"
            problems.append(Problem(key, message, hint))
        elif step <= previous:
            message = f'"{stage.at}" (step {step:,}) is not after the growth before it (step {previous:,})'
            problems.append(Problem(key, message, "Stages are in the order they happen"))
        previous = step
    return problems
