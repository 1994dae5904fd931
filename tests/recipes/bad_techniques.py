"""Float8, checkpointing, compile, chunked loss, plugins: combinations that cannot be."""

from __future__ import annotations

import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

from tests.recipes.bad_data import writes
from tests.recipes.bad_inputs import Case, Setup

FLOAT8 = '[model]\nconverters = ["quantize.linear.float8"]\n'
FITS = f"{FLOAT8}vocab_size = 272\n[quantize.linear.float8]\n"
"""Every size is a multiple of 16."""


def _few_programs(folder: Path, _: ExitStack) -> None:
    """A folder with what ./run_train.sh needs, and no compiler."""
    (folder / "bin").mkdir()
    for name in ("bash", "dirname", "readlink"):
        found = shutil.which(name)
        assert found is not None, f"there is no {name}"
        (folder / "bin" / name).symlink_to(found)
    python = folder / "bin" / "python3"
    python.write_text(f'#!{shutil.which("bash")}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)


PRECISION = [
    Case(
        "Float8: sizes",
        r'model\.converters: .* multiples of 16, but the model has output \(32 -> 258\)\. .*filter_fqns: \["output"\]',
        toml=FLOAT8,
    ),
    Case(
        "Float8: sizes on a tensor-parallel rank",
        r"multiples of 16 on each tensor-parallel rank, but the model has wk \(32 -> 8\), wv \(32 -> 8\)",
        toml=f"{FITS}[parallelism]\ntensor_parallel_degree = 2",
        environ={"NGPU": "2"},
    ),
    Case(
        "Float8: chunked loss with a Float8 head",
        r'filter_fqns: with training\.loss_chunk_tokens the head .* cannot be a Float8 layer\. Add "output" to it',
        toml=f"{FITS}[training]\nloss_chunk_tokens = 16",
    ),
    Case(
        "Float8: unknown recipe",
        r"recipe_name: must be one of 'tensorwise', 'rowwise', 'rowwise_with_gw_hp', got 'row'.*'rowwise'",
        toml=f'{FITS}recipe_name = "row"',
    ),
    Case(
        "Float8: rowwise gathered",
        r"enable_fsdp_float8_all_gather: needs .*recipe_name = 'tensorwise', got 'rowwise'",
        toml=f'{FITS}recipe_name = "rowwise"\nenable_fsdp_float8_all_gather = true',
    ),
    Case(
        "Float8: scales without gathering",
        r"precompute_float8_dynamic_scale_for_fsdp: needs .*enable_fsdp_float8_all_gather = true",
        toml=f"{FITS}precompute_float8_dynamic_scale_for_fsdp = true",
    ),
    Case(
        "Float8: tokens",
        r"training\.seq_len: Float8 needs microbatches of a multiple of 16 tokens, and 2 x 28 makes 56\. ",
        toml=f"{FITS}[training]\nseq_len = 28",
    ),
    Case(
        "Float8: filter of torchtitan only",
        r'filter_fqns: "auto_filter_small_kn" is not supported',
        toml=f'{FITS}filter_fqns = ["auto_filter_small_kn"]',
    ),
    Case(
        "converter unknown",
        r"model\.converters: unknown converter 'quantize\.linear\.float9'.*quantize\.linear\.float8",
        toml='[model]\nconverters = ["quantize.linear.float9"]',
    ),
    Case(
        "converter of torchtitan only",
        r"model\.converters: 'quantize\.linear\.mx' is not supported",
        toml='[model]\nconverters = ["quantize.linear.mx"]',
    ),
    Case(
        "float32 over bfloat16",
        r"mixed_precision_param: float32 conflicts with training\.dtype = bfloat16",
        toml='[training]\ndtype = "bfloat16"\nmixed_precision_param = "float32"',
    ),
    Case(
        "reduction in bfloat16",
        r"mixed_precision_reduce: must be one of 'float32', got 'bfloat16'",
        toml='[training]\nmixed_precision_reduce = "bfloat16"',
    ),
    Case("chunk negative", r"loss_chunk_tokens: must be at least 0, got -1", toml="[training]\nloss_chunk_tokens = -1"),
]

CHECKS = [
    Case(
        "QK-clip: negative threshold",
        r"optimizer\.qk_clip: must be at least 0, got -1",
        toml="[optimizer]\nqk_clip = -1.0",
    ),
    Case(
        "QK-clip: no interval",
        r"optimizer\.qk_clip_interval: must be at least 1, got 0",
        toml="[optimizer]\nqk_clip = 100.0\nqk_clip_interval = 0",
    ),
    Case(
        "QK-clip: a model with QK-norm",
        r"optimizer\.qk_clip: scales wq and wk, on whose size attention does not depend in a model with QK-norm\. ",
        toml='[model]\nname = "qwen3"\nhead_dim = 16\n[optimizer]\nqk_clip = 100.0',
    ),
    Case(
        "QK-clip: frozen queries",
        r"optimizer\.qk_clip: would scale layers\.0\.attention\.wq\.weight, which the group '\*wq\.weight' freezes\. ",
        toml='[optimizer]\nqk_clip = 100.0\n[[optimizer.groups]]\npattern = "*wq.weight"\nfrozen = true',
    ),
    Case(
        "SDC check: negative interval",
        r"debug\.sdc_check_interval: must be at least 0, got -1",
        toml="[debug]\nsdc_check_interval = -1",
    ),
    Case(
        "SDC check: unknown action",
        r"debug\.sdc_check_action: must be one of 'stop', 'warn', got 'stopp' .*Did you mean 'stop'",
        toml='[debug]\nsdc_check_action = "stopp"',
    ),
]

CHECKPOINTING = [
    Case(
        "checkpointing: unknown mode",
        r"activation_checkpoint\.mode: must be one of .*, got 'selektive' .*Did you mean 'selective'",
        toml='[activation_checkpoint]\nmode = "selektive"',
    ),
    Case(
        "checkpointing: every 0th layer",
        r'selective_ac_option: expected "op" or a positive integer, got \'0\'',
        toml='[activation_checkpoint]\nmode = "selective"\nselective_ac_option = "0"',
    ),
    Case(
        "checkpointing: memory budget without compile",
        r"mode: 'memory_budget' leaves the choice to the compiler, so it needs compile\.enable = true",
        toml='[activation_checkpoint]\nmode = "memory_budget"',
    ),
    Case(
        "checkpointing: memory budget, only the loss compiled",
        r"mode: 'memory_budget' leaves the choice to the compiler",
        toml='[activation_checkpoint]\nmode = "memory_budget"\n[compile]\nenable = true\ncomponents = ["loss"]',
    ),
    Case(
        "checkpointing: budget beyond 1",
        r"memory_budget: must be at most 1, got 1\.5",
        toml='[activation_checkpoint]\nmode = "memory_budget"\nmemory_budget = 1.5\n[compile]\nenable = true',
    ),
    Case(
        "checkpointing: single operations, compiled, tensor parallel",
        r'selective_ac_option: "op" does not work inside compiled layers under tensor parallelism',
        toml='[activation_checkpoint]\nmode = "selective"\nselective_ac_option = "op"\n[compile]\nenable = true\n'
        "[parallelism]\ntensor_parallel_degree = 2",
        environ={"NGPU": "2"},
    ),
]

COMPILE = [
    Case(
        "compile: unknown backend",
        r"compile\.backend: there is no backend 'inducktor'\. Did you mean 'inductor'",
        toml='[compile]\nenable = true\nbackend = "inducktor"',
    ),
    Case(
        "compile: nothing to compile",
        r'compile\.components: is empty, but compile\.enable is true .*Name "model"',
        toml="[compile]\nenable = true\ncomponents = []",
    ),
    Case(
        "compile: unknown component",
        r"compile\.components\.0: must be one of 'model', 'loss', got 'modle' .*Did you mean 'model'",
        toml='[compile]\nenable = true\ncomponents = ["modle"]',
    ),
    Case(
        "compile: no C++ compiler",
        r"compile\.backend: inductor needs a C\+\+ compiler .*aot_eager",
        toml="[compile]\nenable = true",
        environ={"PATH": "bin", "CXX": ""},
        setup=_few_programs,
    ),
]

TORCHTITAN = [
    Case(
        "page-locked memory on a CPU",
        r"checkpoint\.async_mode: page-locked memory needs CUDA",
        toml='[checkpoint]\nenable = true\nasync_mode = "async_with_pinned_mem"',
    ),
    Case(
        "optimizer step in the backward pass",
        r"early_step_in_backward: true is not supported",
        toml="[optimizer]\nearly_step_in_backward = true",
    ),
    Case("fault tolerance", r"fault_tolerance\.enable: true is not supported", toml="[fault_tolerance]\nenable = true"),
    Case("wandb", r"metrics\.enable_wandb: needs the package wandb", toml="[metrics]\nenable_wandb = true"),
    Case(
        "memory snapshot on a CPU",
        r"enable_memory_snapshot: memory snapshots exist on CUDA only",
        toml="[profiling]\nenable_memory_snapshot = true",
    ),
]

STAGE = """from dataclasses import dataclass
from pydantic import Field
from titan_growth.config.section import Section
from titan_growth.stages.base import Stage
from titan_growth.stages.order import register_stage
from titan_growth.tools.errors import Problem


class Table(Section):
    level: int = Field(0, ge=0)


@register_stage
@dataclass
class Mine(Stage):
    name = "mine"
    after = ("pipeline",)
    table = "mine"
    settings = Table

    mine: Table

    def enabled(self, context):
        return self.mine.level > 0

    def check(self, context):
        depth = context.model_config.num_layers
        if self.mine.level > depth:
            yield Problem("mine.level", f"{self.mine.level} is more than the model's {depth} layers")

    def apply(self, parts, context):
        return parts

    def describe(self, context):
        return "mine: does nothing"
"""


def plugin(name: str, text: str) -> Setup:
    """A module in the case's folder, which is on Python's path, and what importing it leaves behind."""

    def setup(folder: Path, stack: ExitStack) -> None:
        from titan_growth.config import plugins
        from titan_growth.stages import order

        writes(f"{name}.py", text.encode())(folder, stack)
        # Only for a launcher in this process; another one starts in the folder.
        order.registered_stages()
        for registry in (plugins._TABLES, order._REGISTRY):
            stack.callback(registry.update, dict(registry))
            stack.callback(registry.clear)
        stack.callback(sys.modules.pop, name, None)
        sys.path.insert(0, str(folder))
        stack.callback(sys.path.remove, str(folder))

    return setup


MINE = {"setup": plugin("my_stage", STAGE), "flags": "--plugins my_stage"}

PLUGINS = [
    Case("plugin missing", r"plugins: there is no module nowhere \(.*PYTHONPATH", raw=b'plugins = ["nowhere"]\n'),
    Case("plugins not a list", r"plugins: expected a list, got 'my_stage'", raw=b'plugins = "my_stage"\n'),
    Case("plugin is a path", r"plugins: '\./my_stage\.py' is not the name", flags="--plugins ./my_stage.py"),
    Case(
        "plugin that fails",
        r"plugins: importing my_stage failed with ZeroDivisionError: division by zero .*shows where",
        flags="--plugins my_stage",
        setup=plugin("my_stage", "1 / 0\n"),
    ),
    Case(
        "plugin that ends the program",
        r"plugins: importing my_stage failed with SystemExit: 0",
        flags="--plugins my_stage",
        setup=plugin("my_stage", "raise SystemExit(0)\n"),
    ),
    Case(
        "plugin with a stage of our name",
        r"plugins: my_stage cannot be used: my_stage\.Mine: 'fsdp' is the name of a stage of titan_growth itself",
        flags="--plugins my_stage",
        setup=plugin("my_stage", STAGE.replace('name = "mine"', 'name = "fsdp"')),
    ),
    Case(
        "plugin with a table of our name",
        r"plugins: my_stage cannot be used: training: is a key of the recipe itself",
        flags="--plugins my_stage",
        setup=plugin("my_stage", STAGE.replace('table = "mine"', 'table = "training"')),
    ),
    Case(
        "plugin after a stage that is not there",
        r"plugins: the stage 'mine' must come after 'pipelin', which is not a stage\. Did you mean 'pipeline'",
        flags="--plugins my_stage",
        setup=plugin("my_stage", STAGE.replace('("pipeline",)', '("pipelin",)')),
    ),
    Case(
        "plugin that is no stage",
        r"plugins: my_stage cannot be used: my_stage\.Mine: lacks describe",
        flags="--plugins my_stage",
        setup=plugin("my_stage", STAGE.replace("def describe", "def descibe")),
    ),
    Case("plugin's table: unknown key", r"mine\.levle: .*Did you mean 'level'", toml="[mine]\nlevle = 1", **MINE),
    Case(
        "plugin's table: wrong type", r"mine\.level: expected an integer, got 'a'", toml='[mine]\nlevel = "a"', **MINE
    ),
    Case("plugin's own check", r"mine\.level: 5 is more than the model's 4 layers", toml="[mine]\nlevel = 5", **MINE),
    Case("plugin's table without the plugin", r"mine: unknown section", toml="[mine]\nlevel = 1"),
]

CASES = PRECISION + CHECKS + CHECKPOINTING + COMPILE + TORCHTITAN + PLUGINS
