"""The device of this process."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


def present_device_type() -> str:
    """ "cuda" or "cpu", without a context on a device that the ranks will want."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Device:
    """A device, chosen once at start-up."""

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
        """As PyTorch's object."""
        return torch.device(self.type, self.index) if self.type == "cuda" else torch.device("cpu")

    def free_memory(self) -> None:
        """Returns cached blocks to the device, after a model was dropped."""
        if self.type == "cuda":
            torch.cuda.empty_cache()
