"""Bad recipes: the file, the keys, the types, the command line."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from tests.recipes.bad_inputs import Case


def _loop(folder: Path, _: ExitStack) -> None:
    (folder / "loop.toml").symlink_to("loop.toml")


FILE = [
    Case("recipe missing", r"CONFIG_FILE: no such file: .*nowhere\.toml", environ={"CONFIG_FILE": "nowhere.toml"}),
    Case("recipe missing (flag)", r"--job\.config_file: no such file", flags="--job.config_file nowhere.toml"),
    Case("recipe is a folder", r"CONFIG_FILE: .* is a folder\. Give", environ={"CONFIG_FILE": "."}),
    Case("recipe unreadable", r"CONFIG_FILE: .*loop\.toml", environ={"CONFIG_FILE": "loop.toml"}, setup=_loop),
    Case("recipe path empty", r"--job\.config_file: needs a value", flags="--job.config_file="),
    Case("recipe flag without value", r"--job\.config_file: needs a value", flags="--job.config_file"),
    Case("recipe not UTF-8", r"recipe\.toml: is not UTF-8 text \(byte 13\)", raw=b'[job]\nfoo = "\xff"'),
    Case("TOML syntax", r"recipe\.toml: is not valid TOML: .*line 2", raw=b"[training]\nsteps = = 3\n"),
    Case("TOML key twice", r"is not valid TOML: Cannot overwrite a value", raw=b"[training]\nsteps = 3\nsteps = 4\n"),
    Case("section is a value", r"training: expected a table, got 3", raw=b"training = 3\n"),
    Case("section is a list", r"training: expected a table, got \[", raw=b"[[training]]\nsteps = 3\n"),
    Case("recipe is YAML", r"is not valid TOML", raw=b"training:\n  steps: 3\n"),
    Case("top-level key", r"steps: is outside all sections.*Did you mean 'training.steps'", raw=b"steps = 3\n"),
]

KEYS = [
    Case(
        "unknown key", r"training\.stepz: unknown key in \[training\].*Did you mean 'steps'", toml="[training]\nstepz=3"
    ),
    Case("unknown key (flag)", r"training\.stepz: unknown key.*--training\.stepz", flags="--training.stepz 3"),
    Case("unknown section", r"trainning: unknown section.*Did you mean 'training'", toml="[trainning]\nsteps = 3"),
    Case("unknown empty section", r"foo: unknown section.*The sections are job, ", toml="[foo]"),
    Case("key in the wrong section", r"model\.seq_len: unknown key.*training\.seq_len", toml="[model]\nseq_len = 32"),
    Case(
        "old torchtitan key", r"training\.batch_size: .*training\.local_batch_size", toml="[training]\nbatch_size = 2"
    ),
    Case("several problems at once", r"(?s)beta3.*stepz.*2 problems", toml="[training]\nstepz=3\n[optimizer]\nbeta3=1"),
    Case("string for integer", r"training\.steps: expected an integer, got '10'", toml='[training]\nsteps = "10"'),
    Case("number for integer", r"training\.steps: expected an integer, got 2\.5", toml="[training]\nsteps = 2.5"),
    Case("boolean for integer", r"training\.steps: expected an integer, got true", toml="[training]\nsteps = true"),
    Case(
        "integer for string", r'job\.dump_folder: expected a string, got 3.*"3" in quotes', toml="[job]\ndump_folder=3"
    ),
    Case("integer for boolean", r"checkpoint\.enable: expected true or false, got 1", toml="[checkpoint]\nenable = 1"),
    Case("word for boolean", r"checkpoint\.enable: expected true or false, got 'yes'", flags="--checkpoint.enable yes"),
    Case("list for integer", r"training\.steps: expected an integer, got \[1, 2\]", toml="[training]\nsteps = [1, 2]"),
    Case("word for number", r"optimizer\.lr: expected a number, got 'fast'", flags="--optimizer.lr fast"),
    Case("lr infinite", r"optimizer\.lr: expected a finite number, got inf", toml="[optimizer]\nlr = inf"),
    Case("lr not a number", r"optimizer\.lr: expected a finite number, got nan", flags="--optimizer.lr nan"),
    Case("lr negative", r"optimizer\.lr: must be greater than 0, got -0\.1", toml="[optimizer]\nlr = -0.1"),
    Case("beta out of range", r"optimizer\.beta2: must be less than 1, got 1\.5", toml="[optimizer]\nbeta2 = 1.5"),
    Case("steps 0", r"training\.steps: must be at least 1, got 0", toml="[training]\nsteps = 0"),
    Case("steps negative (flag)", r"training\.steps: must be at least 1, got -5", flags="--training.steps -5"),
    Case(
        "steps enormous",
        r"training\.steps: 9+ does not fit into 64 bits",
        flags="--training.steps 99999999999999999999",
    ),
    Case(
        "bad literal",
        r"lr_scheduler\.decay_type: must be one of 'linear', 'sqrt', 'cosine', got 'step'",
        toml='[lr_scheduler]\ndecay_type = "step"',
    ),
    Case(
        "unknown optimizer",
        r"optimizer\.name: unknown optimizer 'SGD'; known: Adam, AdamW, Muon",
        toml='[optimizer]\nname = "SGD"',
    ),
    Case(
        "Muon's option under AdamW",
        r"optimizer\.options\.momentum: is no option of 'AdamW'\. Remove it",
        toml="[optimizer]\noptions = {momentum = 0.9}",
    ),
    Case(
        "Muon's momentum out of range",
        r"optimizer\.options: momentum must be at least 0 and less than 1, got 1\.5",
        toml='[optimizer]\nname = "Muon"\noptions = {momentum = 1.5}',
    ),
    Case(
        "copies of no layers",
        r"growth\.stages\.0: copies layers, and the model has none by then\. Use random_depth with n_layers, or map",
        toml='[growth.base]\nn_layers = 0\n\n[[growth.stages]]\nat = "1 steps"\nn_layers = 4\n\n[model]\nn_layers = 4',
    ),
    Case("NUL in a path", r"training\.dataset_path: .*NUL", toml='[training]\ndataset_path = "a\\u0000b"'),
    Case("NUL in the folder", r"job\.dump_folder: .*NUL", toml='[job]\ndump_folder = "a\\u0000b"'),
    Case("flag without value", r"training\.steps: the flag needs a value", flags="--training.steps"),
    Case(
        "flag before a flag", r"training\.steps: the flag needs a value", flags="--training.steps --checkpoint.enable"
    ),
    Case("stray word", r"command line: unexpected 'fast'", flags="fast"),
    Case("one dash", r"command line: unexpected '-training.steps'.*--section\.key", flags="-training.steps 3"),
    Case("flag deeper than a value", r"training\.steps is a value, not a table", flags="--training.steps.more 3"),
    Case("flag for a whole section", r"training: expected a table, got 3", flags="--training 3"),
    Case("flag for a stage without at", r"growth\.stages\.0\.at: is missing", flags="--growth.stages.0.factor 2"),
    Case(
        "flag that is not UTF-8",
        r"job\.description: 'caf\\udce9' is not UTF-8 text",
        flags="--job.description caf\udce9",
    ),
    Case("empty dump_folder", r"job\.dump_folder: must name a folder", toml='[job]\ndump_folder = ""'),
    Case(
        "checkpoint.folder outside",
        r"checkpoint\.folder: must name a folder inside",
        toml='[checkpoint]\nfolder="../x"',
    ),
    Case(
        "keep_latest_k 1",
        r"checkpoint\.keep_latest_k: must be 0 \(all\) or at least 2",
        toml="[checkpoint]\nkeep_latest_k=1",
    ),
    Case(
        "profile_freq too small",
        r"profiling\.profile_freq: 3 is less than warmup \+ active = 4",
        toml="[profiling]\nenable_profiling = true\nprofile_freq = 3",
    ),
    Case(
        "layers_freq negative",
        r"metrics\.layers_freq: must be at least 0, got -1",
        toml="[metrics]\nlayers_freq = -1",
    ),
    Case(
        "attention_freq a word",
        r"metrics\.attention_freq: expected an integer, got 'often'",
        flags="--metrics.attention_freq often",
    ),
    Case(
        "save_config_file over layers.jsonl",
        r"job\.save_config_file: must be a file name of its own, got 'layers\.jsonl'",
        toml='[job]\nsave_config_file = "layers.jsonl"',
    ),
    Case("seed negative", r"debug\.seed: must be at least 0, got -1", toml="[debug]\nseed = -1"),
    Case("seed enormous", r"debug\.seed: 9+ does not fit", toml="[debug]\nseed = 99999999999999999999"),
    Case(
        "validation without data",
        r"data\.validation_fraction: 0 holds nothing out",
        toml="[data]\nvalidation_fraction=0\n[validation]\nenable=true",
    ),
    Case(
        "workers for prefetch",
        r"prefetch_factor: needs .*num_workers",
        toml="[training.dataloader]\nprefetch_factor = 2",
    ),
]

CASES = FILE + KEYS
