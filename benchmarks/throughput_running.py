"""What each rank of a case of `throughput.py` does and times.

The steps are the trainer's, made of the trainer's own pieces: data loader, engine, optimizer, hooks. A step has three
phases: waiting for data; forward and backward, with the agreement on the number of tokens before it; clipping and the
optimizer. What a rank reports of a timed stretch is a dictionary; a sample has one of each rank.
"""

from __future__ import annotations

import contextlib
import gc
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from titan_growth.checkpoint.history import Progress
from titan_growth.data.prepared import TokenSplit
from titan_growth.engine.build import build
from titan_growth.engine.engine import num_valid_tokens, sum_over_ranks
from titan_growth.engine.optimizer import Optimizer
from titan_growth.engine.pipeline_engine import make_engine
from titan_growth.layout.mesh import Mesh
from titan_growth.metrics.hardware import memory_gib, peak_flops_per_second
from titan_growth.run.data import RunData
from titan_growth.run.plan import RunPlan
from titan_growth.tools.device import Device

PHASES = ("data", "forward_backward", "optimizer")
STEPS_OF_DATA = 16
RankSample = dict[str, Any]


class RunningCase:
    """A case on this rank: built, and ready to train."""

    def __init__(self, plan: RunPlan, device: Device, folder: Path) -> None:
        begin = time.perf_counter()
        recipe = plan.recipe
        self.plan, self.device = plan, device
        self.mesh = Mesh.get(plan.phase.mesh_shape, device.type)
        self.config = plan.growth_plan.chain.configs[0]
        assert recipe.debug.seed is not None, "the common words give a seed"
        model = build(
            self.config,
            family=recipe.model.name,
            mesh=self.mesh,
            stages=plan.phase.stages,
            device=device.torch,
            dtype=getattr(torch, recipe.training.dtype),
            seq_len=recipe.training.seq_len,
            seed=recipe.debug.seed,
        )
        self.engine = make_engine(model, device.torch)
        self.optimizer = Optimizer.of(model, recipe.optimizer, max_norm=recipe.training.max_norm)
        self.data = synthetic_data(plan, self.config.vocab_size, folder).loader(
            recipe, self.mesh, Progress(), recipe.training.seq_len
        )
        self.num_steps = 0
        self.loss = torch.zeros(())
        self.synchronize = torch.get_device_module(device.type).synchronize
        self.facts: RankSample = {"build_seconds": time.perf_counter() - begin}

    def set_up(self) -> RankSample:
        """The first step, which compiles and allocates; then this device's peak while all ranks are busy with it."""
        begin = time.perf_counter()
        self._steps(1)
        self.facts["first_step_seconds"] = time.perf_counter() - begin
        self._wait_for_all()
        dtype = getattr(torch, self.plan.recipe.training.mixed_precision_param)
        peak, source = peak_flops_per_second(self.device.type, self.device.name, dtype)
        self.facts |= {"peak_flops": peak, "peak_source": source}
        return self.facts

    def measure(self, warmup: int, steps: int) -> RankSample:
        """Some steps to get going again after other cases had the machine, then the steps that count."""
        gc.disable()  # as in the trainer's loop
        try:
            self._steps(warmup)
            reset_peak_memory(self.device.type)
            self._wait_for_all()
            begin = time.perf_counter()
            phases = self._steps(steps)
            seconds = time.perf_counter() - begin
            loss = self.loss.item()
            memory = memory_gib(self.device.type)[1]
            if self.device.type != "cpu":
                # Waiting for the device after every phase costs time, so phases have steps of their own.
                phases = self._steps(steps, wait_in_between=True)
        finally:
            gc.enable()
            gc.collect()
        return self.facts | {
            "seconds": seconds,
            "phase_seconds": {name: value / steps for name, value in phases.items()},
            "memory_gib": memory,
            "loss": loss,
            "num_steps": self.num_steps,
        }

    def _steps(self, number: int, *, wait_in_between: bool = False) -> dict[str, float]:
        """Trains; the seconds of each phase in sum (meaningless on a GPU that is not waited for)."""
        phases = dict.fromkeys(PHASES, 0.0)
        mark = time.perf_counter()

        def lap(phase: str) -> None:
            nonlocal mark
            if wait_in_between:
                self.synchronize()
            now = time.perf_counter()
            phases[phase] += now - mark
            mark = now

        for _ in range(number):
            batch = self.data.next_batch()
            lap("data")
            mine = num_valid_tokens(batch) if self.mesh.speaks_for_its_data else 0
            num_tokens = int(sum_over_ranks(torch.tensor(mine)).item())
            self.loss = self.engine.forward_backward(batch, num_tokens)
            lap("forward_backward")
            self.num_steps += 1
            self.optimizer.clip()
            self.optimizer.step(self.plan.schedule(self.num_steps))
            self.engine.model.after_optimizer_step()
            lap("optimizer")
        self.synchronize()
        return phases

    def _wait_for_all(self) -> None:
        self.synchronize()
        sum_over_ranks(torch.zeros(()))

    def close(self) -> None:
        """Lets go of the model."""
        self.data.close()
        del self.engine, self.optimizer
        gc.collect()
        self.device.free_memory()
        # The compiler keeps what it made for each function, and gives up on a function that it has made often.
        torch._dynamo.reset()


def synthetic_data(plan: RunPlan, vocab_size: int, folder: Path) -> RunData:
    """A corpus of random tokens, the same on every rank. Some are frequent, so that there is something to learn."""
    num_tokens = plan.phase.tokens_per_step * STEPS_OF_DATA + 1
    tokens = (np.random.default_rng(0).random(num_tokens) ** 3 * vocab_size).astype("<u4")
    tokens.tofile(folder / "train.bin")
    facts = {
        "num_tokens": num_tokens,
        "num_documents": 0,
        "shards": [{"file": "train.bin", "num_tokens": num_tokens}],
        "index": {"file": "train.idx"},
    }
    corpus: Any = SimpleNamespace(train=TokenSplit("train", folder, facts, "uint32"))
    return RunData(corpus, None)


def reset_peak_memory(device_type: str) -> None:
    """Lets the peak start again from what is in use now."""
    if device_type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # not Linux, or a container that does not allow it: then building counts
            Path("/proc/self/clear_refs").write_text("5")
