"""Reports about schedules and hyper-parameters, and about settings."""

from __future__ import annotations

from tests.reported.reports import Report, own

SCHEDULES = [
    Report(
        "pytorch/torchtitan",
        1010,
        "A schedule without decay divides by zero.",
        "It stays at the peak, with any warmup and any shape of decay.",
        own("schedules", "torchtitan_1010_no_decay_at_all"),
        also=("allenai/OLMo-core#655",),
    ),
    Report(
        "pytorch/torchtitan",
        1261,
        "Steps are counted off by one: the warmup is not the one asked for, or the first step has a rate of zero.",
        "The first and the last step learn, and the peak is reached, whatever the lengths.",
        own("schedules", "torchtitan_1261_every_step_learns_and_the_peak_is_reached"),
    ),
    Report(
        "mosaicml/composer",
        1077,
        "A warmup as long as the run crashes at the last step.",
        "The run ends at the peak.",
        own("schedules", "composer_1077_warmup_as_long_as_the_run"),
        also=("karpathy/nanoGPT#691", "huggingface/transformers#47285"),
    ),
    Report(
        "deepspeedai/DeepSpeed",
        771,
        "A warmup of 0 or 1 steps divides by the logarithm of it.",
        "The first step has the peak rate.",
        own("schedules", "deepspeed_771_warmup_of_no_step_and_of_one"),
    ),
    Report(
        "pytorch/torchtitan",
        2326,
        "A run that is cut short to try something decays early: its schedule is as long as the run.",
        "`lr_scheduler.total_steps` keeps the long run's schedule, with and without a stable phase.",
        own("schedules", "torchtitan_2326_a_short_run_with_the_schedule_of_a_long_one"),
        also=("pytorch/torchtitan#2340",),
    ),
    Report(
        "NVIDIA-NeMo/Automodel",
        763,
        "After a resume the learning rate is that of step 0.",
        "The rate follows from the step and the growths before it. Resumed three times, before and after a growth, "
        "under each policy, a run has the rates of an unbroken one.",
        own("schedules", "automodel_763_learning_rate_over_resumes"),
        also=("pytorch/torchtitan#275", "THUDM/slime#1547"),
    ),
    Report(
        "NVIDIA-NeMo/Automodel",
        3882,
        "The first step after a resume uses the old weight decay: it is written before it is restored.",
        "Hyper-parameters are not part of a checkpoint; the recipe's hold from the first step on.",
        own("schedules", "automodel_3882_weight_decay_of_the_recipe_in_the_first_step_after_a_resume"),
        also=("NVIDIA/Megatron-LM#7468",),
    ),
    Report(
        "OpenNMT/OpenNMT-py",
        1911,
        "A learning rate changed for the resume is ignored: the checkpoint's comes back.",
        "It takes effect, and a line in the log says what it was.",
        (
            "tests/distributed/test_resume.py::test_a_changed_learning_rate_takes_effect",
            "tests/distributed/test_elastic.py::test_what_has_changed_takes_effect_and_is_logged",
        ),
        also=("pytorch/examples#816",),
    ),
]

SIGNALS = [
    Report(
        "NVIDIA-NeMo/Megatron-Bridge",
        5068,
        "SIGTERM sets a flag that nobody reads while saving on a signal is off; the run goes on until it is killed.",
        "It stops after the step. Without checkpoints it ends as a failure that says that nothing was saved.",
        own("resumes", "megatron_bridge_5068_a_signal_without_checkpoints_is_not_swallowed"),
    ),
    Report(
        "KempnerInstitute/KempnerForge",
        177,
        "With workers that load data, SIGTERM to all processes loses the last save: the workers die of it first.",
        "Mended for this report: workers leave stop signals to their rank, which saves and ends with status 75.",
        own(
            "signals",
            "kempnerforge_177_workers_outlive_the_signals_that_stop_a_run",
            "kempnerforge_177_a_signal_to_all_processes_of_a_run",
        ),
    ),
    Report(
        "pytorch/pytorch",
        8976,
        "A worker that the kernel has killed ends the run with a traceback from some other place.",
        "Mended for this report: one line says which process is gone and what to lower. It is no lost rank.",
        own(
            "signals",
            "pytorch_8976_a_worker_that_was_killed_is_told_from_a_lost_rank",
            "pytorch_8976_a_run_whose_worker_was_killed_says_so",
        ),
    ),
    Report(
        "NVIDIA/nccl",
        1260,
        "A collective times out on all ranks but one, and nothing says which one did not come.",
        "The rank that is frozen or behind is named, with its step and the function that it is in.",
        (
            "tests/distributed/test_failures.py::test_a_frozen_rank_is_named_and_ended",
            "tests/distributed/test_failures.py::test_a_rank_that_is_behind_is_named_with_its_step",
        ),
        also=("NVIDIA/nccl#1324",),
    ),
    Report(
        "kyutai-labs/pocket-tts",
        262,
        "One step that is not finite spoils all weights; the run goes on, and its saves push out the good ones.",
        "Nothing that is not finite is saved: the run ends, skips the step or goes back, as the recipe says.",
        (
            "tests/distributed/test_stability.py::test_a_bad_step_without_a_remedy_ends_the_run",
            "tests/distributed/test_stability.py::test_a_skipped_step_leaves_only_its_line",
            "tests/distributed/test_stability.py::test_a_roll_back_continues_past_the_data",
        ),
    ),
]

CONFIG = [
    Report(
        "pytorch/torchtitan",
        1176,
        "A boolean that is true in the file cannot be set to false on the command line.",
        "Every boolean takes `--x false` and `--x=false`, and a bare `--x` for true. `--no_x` is refused with the way "
        "to say it.",
        own(
            "settings",
            "torchtitan_1176_a_boolean_of_the_file_is_changed_by_a_flag",
            "torchtitan_1176_negated_flags_are_refused_by_name",
        ),
        also=("pytorch/torchtitan#1178",),
    ),
    Report(
        "pytorch/pytorch",
        134052,
        "Schedules that split the backward pass do not reduce FSDP's gradients.",
        'They do where parameters stay gathered; `fsdp_reshard_after_forward = "always"` is refused with each.',
        own("settings", "pytorch_134052_split_backward_passes_and_resharded_parameters"),
    ),
    Report(
        "NVIDIA-NeMo/Speech",
        4541,
        "After a resume TensorBoard counts from 0 again.",
        "Lines after the checkpoint are cut off, and the run reads as one: bit for bit that of an unbroken one.",
        ("tests/distributed/test_resume.py::test_an_interrupted_run_is_bitwise_an_unbroken_one",),
        also=("Lightning-AI/pytorch-lightning#13163", "wandb/wandb#1040"),
    ),
    Report(
        "huggingface/transformers",
        41156,
        "After a resume all tokens of the run are divided by the seconds since: rates are far too high at first.",
        "Rates are those of the steps since the last line, and what remains is estimated from them.",
        (
            "tests/unit/metrics/test_throughput.py::test_metrics_rates_are_those_of_the_window_only",
            "tests/unit/metrics/test_throughput.py::test_metrics_eta_is_smoothed_by_steps_not_by_windows",
        ),
        also=("hiyouga/LlamaFactory#7415",),
    ),
]
