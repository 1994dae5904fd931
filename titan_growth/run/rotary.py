"""Is Llama 3.1's scaling of the rotary frequencies on? What `model.rope_scaling_factor` stands for when it is left out.

The scaling stretches a trained model's context. For a model that only ever sees sequences shorter than the context it
would stretch, it does nothing but slow the low frequencies: no gain and no loss that can be measured at 256 tokens
(benchmarks/results/initial_weights.md), and an export that claims what the model cannot do. So a new run leaves it off
there. Weights that were trained elsewhere keep what they were trained with,
and a run keeps what it was started with.
"""

from __future__ import annotations

from dataclasses import dataclass

from titan_growth.checkpoint.folder import open_step
from titan_growth.config.schema.model import ModelConfig
from titan_growth.interchange.folder import is_hugging_face, open_folder
from titan_growth.models.config import DecoderConfig
from titan_growth.models.registry import model_config_of
from titan_growth.run.vet import recipe_of
from titan_growth.tools.errors import TitanGrowthError
from titan_growth.tools.findings import Findings
from titan_growth.tools.location import folder_at

KEY = "model.rope_scaling_factor"
_SAYS_HOW = ("rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_max_seq_len")


@dataclass(frozen=True)
class RopeScaling:
    """The factor of a run, and why it is not the model's own."""

    factor: float | None = None
    """None for what the `[model]` table says, or its flavor."""
    reason: str = ""
    """Empty when there is nothing to say."""

    def __str__(self) -> str:
        return f"{KEY} is {self.factor:g}: {self.reason}"


def is_left_open(model: ModelConfig) -> bool:
    """Whether a `[model]` table says nothing about the scaling."""
    return all(getattr(model, key) is None for key in _SAYS_HOW)


def decide_rope_scaling(
    model: ModelConfig, *, before: ModelConfig | None, longest_seq_len: int, initial_path: str | None
) -> RopeScaling:
    """The scaling of a run whose recipe leaves it open; nothing is decided where any of its keys is given.

    Args:
        before: the table of an earlier start. One without a factor is of a time when the flavor alone decided.
        longest_seq_len: tokens of the longest sequence that the run trains or validates on.
        initial_path: what its weights are loaded from, if they are.
    """
    if not is_left_open(model):
        return RopeScaling(model.rope_scaling_factor)
    if before is not None and before.name == model.name:
        return RopeScaling(before.rope_scaling_factor)
    config = model_config_of(model, Findings())
    if config is None:
        return RopeScaling()
    if initial_path is not None:
        loaded = _stored_model(initial_path)
        if loaded is None or loaded.rope_scaling_factor == config.rope_scaling_factor:
            return RopeScaling()
        return RopeScaling(loaded.rope_scaling_factor, "what checkpoint.initial_load_path was trained with")
    original = config.rope_original_max_seq_len
    if config.rope_scaling_factor == 1 or longest_seq_len >= original:
        return RopeScaling()
    why = f"no sequence is longer than {longest_seq_len:,} tokens, and it is for models of {original:,} or more"
    return RopeScaling(1.0, f"{why} (torchtitan scales by {config.rope_scaling_factor:g})")


def _stored_model(place: str) -> DecoderConfig | None:
    """The model of a folder, where the folder says; what is wrong with it is reported when it is loaded."""
    try:
        path = folder_at(place)
        if is_hugging_face(path):
            return open_folder(path).config
        step = open_step(path)
        return model_config_of(recipe_of(step).model, Findings()) if step is not None else None
    except (TitanGrowthError, OSError):
        return None
