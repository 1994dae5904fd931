"""Which engine runs a built model."""

from __future__ import annotations

import torch

from titan_growth.engine.build import BuiltModel
from titan_growth.engine.engine import Engine
from titan_growth.engine.pipeline_engine import PipelineEngine
from titan_growth.stages.pipeline import Pipeline


def make_engine(model: BuiltModel, device: torch.device) -> Engine:
    """The pipeline's engine for a model in parts, the plain one for a whole model."""
    for stage in model.stages:
        if isinstance(stage, Pipeline):
            return PipelineEngine(model, stage, device)
    return Engine(model, device)
