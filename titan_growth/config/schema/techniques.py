"""Tables of single techniques: `[activation_checkpoint]`, `[compile]`, `[quantize.linear.float8]`."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from titan_growth.config.section import BadValueError, Section


class ActivationCheckpointConfig(Section):
    """What is kept for the backward pass, and what is recomputed."""

    mode: Literal["selective", "full", "memory_budget", "none"] = "selective"
    """full = recompute every layer; selective = some layers or operations; memory_budget = let the compiler choose."""
    selective_ac_option: str = "2"
    """Selective: a number k recomputes every k-th layer; "op" keeps the results of the expensive operations (half
    of the matrix products, attention, reductions over ranks) and recomputes the rest."""
    per_op_sac_force_recompute_mm_shapes_by_fqns: list[str] = ["moe.router.gate"]
    """Selective "op": matrix products with weights of the same shape as those of these modules are recomputed too."""
    early_stop: bool = False
    """Stop recomputing a layer once its backward pass has what it needs."""
    memory_budget: float = Field(0.5, ge=0, le=1)
    """memory_budget: share of the activations that may be kept; 0 = as full, 1 = as none. Needs compile.enable."""
    visualize_memory_budget_pareto: bool = False
    """memory_budget: write the compiler's curve of memory against runtime into dump_folder/memory_budget_pareto."""
    preserve_rng_state: bool = True
    """Recompute with the random state of the first computation."""
    determinism_check: Literal["default", "none"] = "default"
    """Compare recomputed shapes and types with the first ones ("default"), or do not ("none")."""
    debug: bool = False
    """On a mismatch, print the operations of both computations."""

    @property
    def per_op(self) -> bool:
        """Whether operations are selected rather than layers."""
        return self.mode == "selective" and self.selective_ac_option == "op"

    @field_validator("selective_ac_option", mode="before")
    @classmethod
    def _number_as_text(cls, value: Any) -> Any:
        """torchtitan wants the number in quotes; without them it means the same."""
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("selective_ac_option")
    @classmethod
    def _op_or_number(cls, value: str) -> str:
        if value != "op" and not re.fullmatch("[1-9][0-9]{0,8}", value):
            raise BadValueError(f"expected \"op\" or a positive integer, got '{value}'", 'For example: "op", or "2"')
        return value


class CompileConfig(Section):
    """torch.compile, one transformer block at a time."""

    enable: bool = False
    """Compile the parts of the computation that components names."""
    components: list[Literal["model", "loss"]] = ["model", "loss"]
    """model = every transformer block, loss = the loss function."""
    backend: str = "inductor"
    """Backend of torch.compile."""

    @property
    def compiles_model(self) -> bool:
        """Whether the transformer blocks are compiled."""
        return self.enable and "model" in self.components


class Float8Config(Section):
    """Matrix products of linear layers in 8-bit floating point, through torchao (model.converters switches it on)."""

    enable_fsdp_float8_all_gather: bool = False
    """Tensorwise: gather FSDP's parameters in Float8."""
    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Tensorwise with Float8 all-gather: one reduction for all scales after each optimizer step."""
    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """Granularity of the scales; rowwise_with_gw_hp keeps weight gradients in high precision. Default: tensorwise."""
    filter_fqns: list[str] = []
    """Linear layers whose name contains one of these stay as they are."""
    emulate: bool = False
    """Emulate Float8 in higher precision. Automatic where the device has no Float8 products."""


class QuantizeLinearConfig(Section):
    """Quantization of linear layers."""

    float8: Float8Config = Float8Config()


class QuantizeConfig(Section):
    """Quantized training."""

    linear: QuantizeLinearConfig = QuantizeLinearConfig()
