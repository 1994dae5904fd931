"""torch.compile, one transformer block at a time.

Blocks are alike, so the compiler compiles one and all reuse it. Compiling `block.forward`, not the whole model, leaves
FSDP's hooks outside, where they gather and free parameters between blocks.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from titan_growth.config.messages import suggestion
from titan_growth.config.schema.recipe import JobConfig
from titan_growth.config.schema.techniques import ActivationCheckpointConfig, CompileConfig
from titan_growth.stages.activation_checkpoint import Checkpointed
from titan_growth.stages.base import BuildContext, ModelParts, PlanContext, Stage
from titan_growth.stages.order import register_stage
from titan_growth.tools.errors import Problem
from titan_growth.tools.torch_private import compile_with_hooks, set_memory_budget


@register_stage
@dataclass
class Compile(Stage):
    """Compiled blocks and loss."""

    name: ClassVar[str] = "compile"
    after: ClassVar[tuple[str, ...]] = (
        "pipeline",
        "float8",
        "tensor_parallel",
        "context_parallel",
        "chunked_loss",
        "z_loss",
        "growth_mask",
        "activation_checkpoint",
    )

    compile: CompileConfig
    activation_checkpoint: ActivationCheckpointConfig
    job: JobConfig

    def enabled(self, context: PlanContext) -> bool:
        return self.compile.enable

    def check(self, context: PlanContext) -> Iterator[Problem]:
        backends = torch.compiler.list_backends(exclude_tags=())
        if self.compile.backend not in backends:
            # PyTorch has two dozen, most of them for its own tests.
            hint = suggestion(self.compile.backend, backends) or 'Use "inductor", or "aot_eager" without a compiler'
            yield Problem("compile.backend", f"there is no backend '{self.compile.backend}'", hint)
        elif self.compile.backend == "inductor" and context.device_type == "cpu" and not _has_compiler():
            message = "inductor needs a C++ compiler on a CPU, and there is none"
            yield Problem("compile.backend", message, 'Install g++, set CXX, or use backend = "aot_eager"')

    def apply(self, parts: ModelParts, context: BuildContext) -> ModelParts:
        self._set_memory_budget()
        # Blocks share compiled code, which by default ignores hooks: a masked block would run the code of an unmasked
        # one, even of the model before a growth, so this is set from the first model on.
        compile_with_hooks()
        for part in parts:
            if "model" in self.compile.components:
                for block in part.layers.values():
                    self._compile_block(block, context)
            if "loss" in self.compile.components:
                part.loss = self._compiled(part.loss, fullgraph=False)
        return parts

    def _compile_block(self, block: nn.Module, context: BuildContext) -> None:
        checkpointed = block.forward
        if isinstance(checkpointed, Checkpointed) and context.mesh_shape.tp > 1:
            # The compiler cannot trace recomputation with DTensors, so checkpointing wraps the compiled block.
            checkpointed.function = self._compiled(checkpointed.function)
        else:
            block.forward = self._compiled(block.forward)

    def _compiled(self, function: Callable[..., Any], *, fullgraph: bool = True) -> Callable[..., Any]:
        return torch.compile(function, backend=self.compile.backend, fullgraph=fullgraph)

    def _set_memory_budget(self) -> None:
        """The budget is process-wide, so every build sets it, also back to "keep everything"."""
        section = self.activation_checkpoint
        if section.mode != "memory_budget":
            set_memory_budget(None)
            return
        folder = None
        if section.visualize_memory_budget_pareto:
            folder = os.path.join(self.job.dump_folder, "memory_budget_pareto")
            os.makedirs(folder, exist_ok=True)
        set_memory_budget(section.memory_budget, folder)

    def describe(self, context: PlanContext) -> str:
        what = {"model": "blocks", "loss": "loss"}
        return f"compile: {' and '.join(what[part] for part in self.compile.components)} with {self.compile.backend}"


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)
