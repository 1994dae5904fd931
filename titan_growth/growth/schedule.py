"""The growth plan of a run: which model it starts from, when it grows, and into what.

The recipe names the final model; the plan divides its depth by the factors of the stages. It is validated as a whole
before anything starts. At run time its only memory is the lineage: the number of growths that have happened.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from titan_growth.checkpoint.lineage import Lineage, Progress
from titan_growth.config.growth_schema import Growth, GrowthStage
from titan_growth.config.messages import suggestion
from titan_growth.growth.operators import operators
from titan_growth.models.config import ModelConfig
from titan_growth.tools.errors import Problem, TrainingError


@dataclass(frozen=True)
class GrowthPlan:
    """The models of a run in their order, and the stages between them."""

    configs: tuple[ModelConfig, ...]
    stages: tuple[GrowthStage, ...]

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
    stages = section.active_stages
    known = operators()
    problems = [
        Problem(
            f"growth.stages.{index}.operator",
            f"unknown operator '{stage.operator}'; known: {', '.join(known)}",
            suggestion(stage.operator, known),
        )
        for index, stage in enumerate(stages)
        if stage.operator not in known
    ]
    factor = prod(stage.factor for stage in stages)
    if target.num_layers % factor:
        factors = " x ".join(str(stage.factor) for stage in stages)
        product = f"{factors} = {factor}" if len(stages) > 1 else factors
        problems.append(
            Problem(
                "growth.stages",
                f"the growth factor {product} does not divide the target's {target.num_layers} layers",
                "Choose factors whose product divides model.n_layers",
            )
        )
    if problems:
        return None, problems
    configs = [replace(target, num_layers=target.num_layers // factor)]
    for stage in stages:
        configs.append(known[stage.operator].grow(configs[-1], stage.factor))
    assert configs[-1] == target, "the chain of growths does not end at the target"
    return GrowthPlan(tuple(configs), tuple(stages)), []


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
