"""The `[growth]` table: how a small model grows into that of `[model]`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from titan_growth.config.duration import Duration
from titan_growth.config.schema.parallelism import ParallelismConfig
from titan_growth.config.schema.schedules import in_steps_or_tokens
from titan_growth.config.section import BadValueError, Section

WIDTHS = {"dim": "dim", "n_heads": "num_heads", "n_kv_heads": "num_kv_heads", "hidden_dim": "hidden_dim"}
"""Recipe key -> field of `DecoderConfig`, for width growth. The width of a head never changes."""

SIZES = {"n_layers": "num_layers", **WIDTHS}
"""The same for all growth."""


class SizesConfig(Section):
    """Sizes of a model; None where not given."""

    n_layers: int | None = Field(None, ge=1)
    """Transformer blocks."""
    dim: int | None = Field(None, ge=1)
    """Width of the residual stream."""
    n_heads: int | None = Field(None, ge=1)
    """Query heads."""
    n_kv_heads: int | None = Field(None, ge=1)
    """Key/value heads."""
    hidden_dim: int | None = Field(None, ge=1)
    """Width of the SwiGLU hidden layer."""

    @property
    def given_sizes(self) -> dict[str, int]:
        """Field of `DecoderConfig` -> size, without those not given."""
        return {field: getattr(self, key) for key, field in SIZES.items() if getattr(self, key) is not None}


class PeakConfig(SizesConfig):
    """Sizes of a model, and the learning rate that it starts with."""

    lr: float | None = Field(None, gt=0)
    """Peak learning rate from there on. Default: optimizer.lr; under lr_policy = "continue" and "rewarm", as before."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps of its warmup (all lr_policies but "continue"). Default: that of [lr_scheduler]."""
    warmup: str | None = None
    """Instead of warmup_steps, with a unit: "2M tokens" or "300 steps"."""

    @field_validator("warmup")
    @classmethod
    def _is_a_count(cls, value: str | None) -> str | None:
        return value if value is None else in_steps_or_tokens(value)

    @model_validator(mode="after")
    def _one_warmup(self) -> PeakConfig:
        if self.warmup is not None and self.warmup_steps is not None:
            raise BadValueError("gives both warmup and warmup_steps", "Give one of the two")
        return self

    @property
    def warmup_key(self) -> str:
        """The key that gives its warmup."""
        return "warmup_steps" if self.warmup is None else "warmup"

    @property
    def own_warmup(self) -> Duration | None:
        """Its length; None for that of `[lr_scheduler]`."""
        if self.warmup is not None:
            return Duration.parse(self.warmup)
        return None if self.warmup_steps is None else Duration(self.warmup_steps, "steps")


class PlannedGrowth(PeakConfig):
    """One growth: when, by which operator, with which moments and learning rate."""

    at: str
    """When to grow, counted from the start of the run: "300 steps", "10M tokens", "3e17 FLOPs", "25%" of the steps,
    "slope 0.02 over 200 steps" (the loss has fallen by less than that), or "auto" (the G_stack paper's law)."""
    operator: str = "stack"
    """Growth operator; "stack" repeats the whole list of layers factor times (G_stack)."""
    factor: int | None = Field(None, ge=2)
    """How many times as many layers, or how many times as wide, as before. Or give the sizes after this growth."""
    layer_map: list[int] | None = None
    """Depth operators: the source of each layer of the grown model, counted from 0, such as [0, 1, 1, 2]. Under "map",
    -1 is a new layer, from its initial distribution."""
    noise: float = Field(0.0, ge=0, le=10)
    """Noise added to copies, as a share of the standard deviation of the tensor's initialisation."""
    rescale_to_depth: bool = False
    """Depth operators: multiply what copied layers write to the residual stream (wo, w2) by sqrt(layers before /
    after), as layers of a deeper model start. Not in the official code."""
    mask_steps: int | None = Field(None, ge=1)
    """random_depth and random_width: steps over which the mask on new parameters opens."""
    options: dict[str, Any] = {}
    """Settings of a plugin's operator."""
    parallelism: ParallelismConfig | None = None
    """The whole [parallelism] table from this growth on, for another mesh. Default: the mesh stays."""
    num_ranks: int | None = Field(None, ge=1)
    """Ranks from this growth on: the run saves and restarts with this number (status 76)."""
    global_batch_size: int | None = Field(None, ge=1)
    """Sequences of a step from this growth on. Default: as before."""
    local_batch_size: int | None = Field(None, ge=1)
    """Sequences of a microbatch from this growth on. Default: as before."""
    seq_len: int | None = Field(None, ge=1)
    """Tokens of a sequence from this growth on; a multiple of training.seq_len. Default: as before."""
    rope_theta: float | None = Field(None, gt=0)
    """Base of the rotary frequencies from this growth on; the last one must be that of [model]. Default: as before."""
    optimizer_state: Literal["reset", "copy", "copy_scaled", "asymmetric"] = "reset"
    """The moments: zero (official G_stack), copied with the weights, copied and scaled as the gradients are (width), or
    kept where the weights are originals and zero elsewhere."""
    optimizer_step: Literal["keep", "reset"] | None = None
    """Adam's step counter, for bias correction. Default: keep it, unless the moments are reset."""
    lr_policy: Literal["restart", "continue", "rewarm", "rewarm_new"] = "restart"
    """restart = warmup again and a decay to the run's end (official G_stack); continue = the ungrown run's curve;
    rewarm = that curve, with a warmup; rewarm_new = with a warmup of the new and copied parameters only."""

    @field_validator("at")
    @classmethod
    def _at_has_a_unit(cls, value: str) -> str:
        Duration.parse(value)
        return value

    @field_validator("layer_map")
    @classmethod
    def _layer_map_lists_layers(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and (not value or min(value) < -1):
            raise BadValueError("must list source layers, counted from 0, or -1 for a new one", "Such as [0, 1, 1, 2]")
        return value

    @model_validator(mode="after")
    def _one_way_to_say_how_large(self) -> PlannedGrowth:
        given = [key for key in ("factor", "layer_map", *SIZES) if getattr(self, key) is not None]
        for one in ("factor", "layer_map"):
            if one in given and len(given) > 1:
                other = next(key for key in given if key != one)
                raise BadValueError(f"gives both {one} and {other}", "Give one of the two")
        if self.optimizer_state == "reset" and self.optimizer_step == "keep":
            # A second moment of zero under an old counter: the first updates reach several times the learning rate.
            raise BadValueError("keeps Adam's step counter and resets the moments", 'Leave out optimizer_step = "keep"')
        return self

    @property
    def when(self) -> Duration:
        """The parsed `at`."""
        return Duration.parse(self.at)

    @property
    def changes_layout(self) -> bool:
        """Whether the run goes on with another mesh or batch."""
        keys = ("parallelism", "num_ranks", "global_batch_size", "local_batch_size", "seq_len")
        return any(getattr(self, key) is not None for key in keys)

    @property
    def keeps_step(self) -> bool:
        """Whether Adam's step counter goes on."""
        return (self.optimizer_step or ("reset" if self.optimizer_state == "reset" else "keep")) == "keep"


class GrowthBase(PeakConfig):
    """The run before its first growth.

    A size that is not given is that of [model], divided by the factors of the stages if all have one.
    """

    n_layers: int | None = Field(None, ge=0)
    """Transformer blocks. 0: only embedding, norm and head."""
    rope_theta: float | None = Field(None, gt=0)
    """Base of the rotary frequencies before the first growth. Default: that of [model]."""


class WatchdogConfig(Section):
    """Whether the loss comes back after a growth."""

    steps: int | None = Field(None, ge=0)
    """Steps after which it must be back; 0 = not watched. Default: twice the warmup, at least 100."""
    max_rise: float = Field(0.1, ge=0)
    """Nats by which the loss on the held-out batch may then exceed that before the growth."""
    action: Literal["warn", "stop", "roll_back"] = "warn"
    """If it is not: warn, end the run, or go back to the small model and grow that many steps later."""
    max_roll_backs: int = Field(1, ge=1)
    """Roll-backs of one growth after which the run ends."""


class GrowthConfig(Section):
    """Growing the model during the run."""

    enable: bool = True
    """false: train the model of [model] from scratch, the honest baseline of the same recipe."""
    base: GrowthBase = GrowthBase()
    watchdog: WatchdogConfig = WatchdogConfig()
    stages: list[PlannedGrowth] = []
    """The growths in their order, as [[growth.stages]]."""

    @property
    def active_stages(self) -> list[PlannedGrowth]:
        """The stages that will happen: none when growth is switched off."""
        return list(self.stages) if self.enable else []

    @property
    def in_tokens(self) -> list[str]:
        """The keys of warmups given in tokens."""
        stages = self.active_stages
        entries: list[tuple[str, PeakConfig]] = [("growth.base", self.base)] if stages else []
        # Under "continue" a warmup has no effect, and checks.py says so.
        entries += [
            (f"growth.stages.{index}", planned)
            for index, planned in enumerate(stages)
            if planned.lr_policy != "continue"
        ]
        warmups = [(f"{key}.warmup", entry.own_warmup) for key, entry in entries]
        return [key for key, warmup in warmups if warmup is not None and warmup.unit == "tokens"]
