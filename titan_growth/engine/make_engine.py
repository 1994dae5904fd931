"""Chooses the engine of a built model."""

from __future__ import annotations

import torch

from titan_growth.engine.build import BuiltModel
from titan_growth.engine.engine import Engine
from titan_growth.engine.pipeline_engine import PipelineEngine
from titan_growth.stages.pipeline import Pipeline


def make_engine(model: BuiltModel, device: torch.device) -> Engine:
    """The pipeline engine for a pipelined model, the plain one otherwise."""
    for stage in model.stages:
        if isinstance(stage, Pipeline):
            return PipelineEngine(model, stage, device)
    return Engine(model, device)
