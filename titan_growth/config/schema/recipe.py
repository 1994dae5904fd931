"""The recipe: one pydantic model per TOML table, with torchtitan 0.2.2's key names.

A field's text names torchtitan's default where it differs. `checks.py` checks several tables together; what needs the
mesh or the model is checked in `run/plan.py`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from titan_growth.config.schema.averages import AveragesConfig
from titan_growth.config.schema.data import DataConfig
from titan_growth.config.schema.growth import GrowthConfig
from titan_growth.config.schema.model import ModelConfig
from titan_growth.config.schema.optimizer import OptimizerConfig
from titan_growth.config.schema.parallelism import ParallelismConfig
from titan_growth.config.schema.schedules import BatchSizeConfig, LRSchedulerConfig
from titan_growth.config.schema.stability import StabilityConfig
from titan_growth.config.schema.techniques import ActivationCheckpointConfig, CompileConfig, QuantizeConfig
from titan_growth.config.section import Section


class JobConfig(Section):
    """Where a run writes, and what it calls itself."""

    dump_folder: str = "./outputs"
    """Folder of everything the run writes. The same folder resumes the run."""
    description: str = "default job"
    """Free text, printed at the start and kept in the saved recipe."""
    print_config: bool = False
    """Print the effective recipe as TOML at the start."""
    save_config_file: str | None = None
    """Also write the effective recipe as JSON under this name in dump_folder (it is always saved as recipe.toml)."""
    time_limit_seconds: int | None = Field(None, ge=1)
    """Save and end with status 75 after the step that passes this time since launch. Not a key of torchtitan."""


class ProfilingConfig(Section):
    """Traces and memory snapshots."""

    enable_profiling: bool = False
    """Record torch.profiler traces, one folder per recorded iteration."""
    save_traces_folder: str = "profile_traces"
    """Folder of the traces, inside dump_folder."""
    profile_freq: int = Field(10, ge=1)
    """A trace every this many steps; at least profiler_warmup + profiler_active."""
    profiler_active: int = Field(1, ge=1)
    """Steps recorded in each trace."""
    profiler_warmup: int = Field(3, ge=0)
    """Steps traced and thrown away before each recording."""
    enable_memory_snapshot: bool = False
    """Record the CUDA allocator's history; refused on a CPU."""
    save_memory_snapshot_folder: str = "memory_snapshot"
    """Folder of the snapshots, inside dump_folder."""


class MetricsConfig(Section):
    """What is logged, how often, and where to."""

    log_freq: int = Field(10, ge=1)
    """Log the first step, every log_freq-th and the last."""
    enable_tensorboard: bool = False
    """Write TensorBoard events (metrics.jsonl is always written)."""
    disable_color_printing: bool = False
    """No colour, not even on a terminal."""
    save_tb_folder: str = "tb"
    """Folder of the TensorBoard events, inside dump_folder."""
    save_for_all_ranks: bool = False
    """Write TensorBoard events on every rank (in rank_N) instead of on rank 0 only."""
    enable_wandb: bool = False
    """Log to Weights & Biases too; needs the wandb extra."""
    layers_freq: int = Field(0, ge=0)
    """Every layers_freq-th step, write gradients, weights, updates and activations by layer to layers.jsonl; 0 for
    never."""
    attention_freq: int = Field(0, ge=0)
    """Every attention_freq-th step, write the largest attention logit of each layer to layers.jsonl; 0 for never."""


class DataloaderConfig(Section):
    """Passed to torchdata's StatefulDataLoader."""

    num_workers: int = Field(0, ge=0)
    """Worker processes per rank; 0 loads in the training process."""
    persistent_workers: bool = False
    """Has no effect: the order of samples never ends, so workers live as long as the run in any case."""
    pin_memory: bool = False
    """Copy batches into page-locked memory (CUDA)."""
    prefetch_factor: int | None = Field(None, ge=1)
    """Batches each worker loads ahead; needs num_workers > 0."""


class TrainingConfig(Section):
    """Length, batch and precision of the run, and its corpus."""

    dataset: str = "stdlib"
    """Corpus: "stdlib" (the text of Python's own library), "site_packages" (that of installed packages but for those
    of "site_packages_held_out"), a format of dataset_path ("text", "json", "csv", "tsv", "parquet", "tar"), or a
    Hugging Face dataset name. torchtitan's default is c4_test."""
    dataset_path: str | None = None
    """File, folder or glob of the corpus, as a path or URL (s3://...): txt, md, py, jsonl, parquet; gz and zst too."""
    local_batch_size: int = Field(8, ge=1)
    """Sequences per data-parallel rank in one forward pass."""
    global_batch_size: int = Field(-1, ge=-1)
    """Sequences per optimizer step, by gradient accumulation; -1 = local_batch_size x first data-parallel degree."""
    batch_schedule: list[BatchSizeConfig] = []
    """Later sizes of the batch, in their order, as [[training.batch_schedule]]. The learning rate then goes by tokens:
    lr_scheduler's numbers mean the tokens of that many planned steps. Not a key of torchtitan."""
    seq_len: int = Field(2048, ge=1)
    """Tokens per sequence."""
    max_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this global norm."""
    steps: int = Field(10000, ge=1)
    """Optimizer steps of the whole run, all depths together."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Type of parameters, gradients and moments."""
    enable_cpu_offload: bool = False
    """FSDP keeps parameters, gradients and moments in host memory (CUDA)."""
    loss_chunk_tokens: int = Field(0, ge=0)
    """Positions per chunk of head and loss, to never hold all logits of a batch; 0 = all. Not a key of torchtitan."""
    z_loss_weight: float = Field(0.0, ge=0)
    """Weight of log(Z)^2 of each token's logits in the training loss; 0 = none, PaLM has 1e-4. `loss` in metrics and
    validation stays the cross-entropy, and `z_loss` is a metric of its own. Not a key of torchtitan."""
    mixed_precision_param: Literal["auto", "bfloat16", "float32"] = "bfloat16"
    """Type of the computation: FSDP casts parameters to it, on one rank autocast does. auto = decided at the first
    start by what the device does fast: bfloat16 on CUDA and on CPUs with AMX, else float32."""
    mixed_precision_reduce: Literal["float32"] = "float32"
    """Type of gradient reductions."""
    gc_freq: int = Field(50, ge=1)
    """Python's garbage collector runs only every this many steps, on all ranks at once."""
    dataloader: DataloaderConfig = DataloaderConfig()

    @property
    def mixes_precision(self) -> bool:
        """Whether the computation has another type than the parameters."""
        return self.mixed_precision_param != self.dtype


class CheckpointConfig(Section):
    """Saving and loading."""

    enable: bool = False
    """Save checkpoints, and resume from the newest one in the folder."""
    folder: str = "checkpoint"
    """Folder of the step-N folders, inside dump_folder; or a URL (s3://bucket/run, gs://, file://)."""
    interval: int = Field(500, ge=1)
    """Save every this many steps, and at the last step."""
    initial_load_path: str | None = None
    """Step folder or Hugging Face folder to start a new run from; ignored, with a warning, once it has a checkpoint."""
    initial_load_in_hf: bool = False
    """Insist that initial_load_path is a Hugging Face folder. Optional: a folder is recognised by its files."""
    initial_load_model_only: bool = True
    """Load only the weights from initial_load_path; false: optimizer state, counters and data cursor too."""
    last_save_model_only: bool = False
    """Save only the weights at the last step. Such a checkpoint cannot be resumed. torchtitan's default is true."""
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """async: a save copies the tensors to host memory, and writes while training goes on; one at a time.
    async_with_pinned_mem: into page-locked memory, without waiting for the copies (CUDA)."""
    save_retries: int = Field(2, ge=0)
    """Retries of a failed save, after 1, 2, 4, ... seconds, before the run ends. Not a key of torchtitan."""
    keep_latest_k: int = Field(10, ge=0)
    """Keep this many committed checkpoints, 0 = all. Those taken at a growth are kept besides."""
    permanent_interval: int = Field(0, ge=0)
    """Keep the checkpoints of every this many steps for good, 0 = none. Not a key of torchtitan."""
    load_step: int = Field(-1, ge=-1)
    """Go back to this step once, instead of resuming from the newest; later checkpoints are kept as superseded-N."""
    start_fresh: bool = False
    """Start from scratch once, though there is an earlier run, which is kept aside. Not a key of torchtitan."""
    enable_first_step_checkpoint: bool = False
    """Save after the first step too, to find out early whether saving works."""
    load_only: bool = False
    """Load, but never save (growth is then refused)."""


class ValidationConfig(Section):
    """Loss on held-out text; the same sequences for every mesh."""

    enable: bool = False
    """Validate every freq steps and at the last step."""
    dataset: str | None = None
    """Another corpus, as in training.dataset. Default: held out of the training one (torchtitan: c4_validation)."""
    dataset_path: str | None = None
    """File, folder or glob of that corpus, as a path or a URL."""
    local_batch_size: int = Field(8, ge=1)
    """Sequences per rank in one forward pass."""
    seq_len: int | None = Field(None, ge=1)
    """Tokens per sequence. Default: training.seq_len (torchtitan: 2048)."""
    freq: int = Field(10, ge=1)
    """Validate every this many steps."""
    steps: int = Field(-1, ge=-1)
    """Batches of local_batch_size sequences of all ranks together, whatever the mesh; -1 = the whole set."""


class CommConfig(Section):
    """Process groups."""

    init_timeout_seconds: int = Field(300, ge=1)
    """Time limit of collectives until the first step is done."""
    train_timeout_seconds: int = Field(100, ge=1)
    """Time limit of collectives afterwards. A rank that hangs for longer ends the run (docs/guide/failures.md)."""
    trace_buf_size: int = Field(20000, ge=0)
    """Entries of NCCL's flight recorder, 0 = off (CUDA)."""
    save_traces_folder: str = "comm_traces"
    """Folder of the flight recorder's dumps, inside dump_folder."""
    save_traces_file_prefix: str = "rank_"
    """File name prefix of those dumps."""
    mode: Literal["default", "fake_backend"] = "default"
    """fake_backend: a dry run of rank 0 in one process. The others send zeros or copies, so its loss means nothing."""


class DebugConfig(Section):
    """Reproducibility."""

    seed: int | None = Field(None, ge=0, lt=2**63)
    """Seed of weights and data order. Default: drawn once and kept with the run."""
    deterministic: bool = False
    """Only deterministic algorithms, or an error."""
    deterministic_warn_only: bool = False
    """Warn instead of an error where there is no deterministic algorithm."""
    log_batch_hash: bool = False
    """Put a hash of each global batch into metrics.jsonl."""
    sdc_check_interval: int = Field(0, ge=0)
    """Every this many steps one microbatch (under a pipeline, one pass through it) is trained on twice, and the bits of
    loss and gradients are compared on every rank; 0 = never. On CUDA it needs deterministic. Not a key of torchtitan.
    """
    sdc_check_action: Literal["stop", "warn"] = "stop"
    """A difference, which is silent data corruption: stop = end the run; warn = go on with the second pass."""


class Recipe(Section):
    """The whole recipe, one field per TOML table."""

    plugins: list[str] = []
    """Modules to import at the start: they add stages, with tables of their own (docs/extending/adding_a_stage.md)."""
    job: JobConfig = JobConfig()
    profiling: ProfilingConfig = ProfilingConfig()
    metrics: MetricsConfig = MetricsConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_scheduler: LRSchedulerConfig = LRSchedulerConfig()
    training: TrainingConfig = TrainingConfig()
    parallelism: ParallelismConfig = ParallelismConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    activation_checkpoint: ActivationCheckpointConfig = ActivationCheckpointConfig()
    compile: CompileConfig = CompileConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    validation: ValidationConfig = ValidationConfig()
    comm: CommConfig = CommConfig()
    debug: DebugConfig = DebugConfig()
    data: DataConfig = DataConfig()
    stability: StabilityConfig = StabilityConfig()
    averages: AveragesConfig = AveragesConfig()
    growth: GrowthConfig = GrowthConfig()
