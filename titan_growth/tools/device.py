"""The device of this process, chosen when the run starts and passed on as an object."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """A device and what is known about it."""

    type: str
    index: int
    name: str

    @classmethod
    def detect(cls) -> Device:
        """The CUDA device of this local rank, or the CPU."""
        if torch.cuda.is_available():
            index = int(os.environ.get("LOCAL_RANK", "0"))
            torch.cuda.set_device(index)
            return cls("cuda", index, torch.cuda.get_device_name(index))
        return cls("cpu", 0, f"CPU, {torch.get_num_threads()} threads")

    @property
    def torch(self) -> torch.device:
        """As PyTorch's own object."""
        return torch.device(self.type, self.index) if self.type == "cuda" else torch.device("cpu")

    def free_memory(self) -> None:
        """Returns cached blocks to the device; called when a model has been dropped."""
        if self.type == "cuda":
            torch.cuda.empty_cache()
