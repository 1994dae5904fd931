"""Reports about checkpoints: what is in one and when it counts, and going on from one."""

from __future__ import annotations

from tests.reported.reports import Report, own

SAVES = [
    Report(
        "PrimeIntellect-ai/prime-rl",
        3399,
        "A parameter that never had a gradient has no moments to save, and the resume misses them.",
        "Moments of all parameters exist before the first step, so they are saved and found again.",
        own("saves", "prime_rl_3399_a_parameter_that_never_had_a_gradient"),
        also=("PrimeIntellect-ai/prime-rl#2676", "NVIDIA-NeMo/Automodel#2779"),
    ),
    Report(
        "pytorch/pytorch",
        192202,
        "Moments of a parameter that was trained and then frozen are dropped on loading, in silence.",
        "They come back, frozen or not.",
        own("saves", "pytorch_192202_moments_of_a_parameter_that_was_frozen_later"),
    ),
    Report(
        "pytorch/pytorch",
        1995,
        "Saving a view writes all of the storage behind it.",
        "A checkpoint of views has the size of the views.",
        own("saves", "pytorch_1995_a_view_is_saved_without_the_rest_of_its_storage"),
        also=("pytorch/pytorch#79400",),
    ),
    Report(
        "NVIDIA/Megatron-LM",
        6858,
        "Random states of ranks are taken for copies of one another, and most ranks resume with another's.",
        "Each rank has an entry of its own, and goes on with the numbers that it would have drawn.",
        own("saves", "megatron_6858_each_rank_gets_its_own_random_state_back"),
    ),
    Report(
        "NVIDIA-NeMo/Automodel",
        2571,
        "A head said to be tied has weights of its own; they are left out of the checkpoint, and the loss jumps.",
        "A tied model resumes bit for bit; over pipeline parts both copies stay equal.",
        (
            *own("saves", "automodel_2571_a_tied_head_after_a_resume"),
            "tests/distributed/test_qwen3.py::test_tied_weights_move_between_meshes",
        ),
        also=("NVIDIA-NeMo/Automodel#2511",),
    ),
    Report(
        "KempnerInstitute/KempnerForge",
        102,
        "A background save counts before it is written, and older checkpoints are removed for it: a crash leaves none.",
        "A checkpoint counts once its manifest is written, and only then others go. One alone cannot be kept.",
        (
            *own("saves", "kempnerforge_102_a_save_that_dies_costs_no_older_checkpoint"),
            "tests/distributed/test_async_saves.py::test_killed_beside_a_background_save_it_resumes_bitwise",
        ),
        also=("KempnerInstitute/KempnerForge#103",),
    ),
    Report(
        "NVIDIA-NeMo/Automodel",
        1040,
        "Saves in the background leave other files than saves that are waited for.",
        "They leave the same files with the same checksums.",
        ("tests/distributed/test_async_saves.py::test_the_checkpoints_are_those_of_saves_that_are_waited_for",),
    ),
    Report(
        "pytorch/torchtitan",
        4191,
        "The folder of a save that crashed has the highest number, and is what a resume loads.",
        "It is passed over, with a line in the log, and the newest whole checkpoint is loaded.",
        (
            *own("saves", "torchtitan_4191_a_save_that_crashed_is_not_the_newest"),
            "tests/unit/checkpoint/test_manager.py::test_remains_of_a_dead_save_are_ignored_and_replaced",
        ),
    ),
    Report(
        "pytorch/torchtitan",
        4197,
        "Abandoned folders count among the checkpoints to keep, so good ones are removed for them.",
        "Only committed ones count. Remains of a save are cleared; folders with other names stay.",
        (
            *own("saves", "torchtitan_4197_abandoned_folders_do_not_count_as_kept"),
            "tests/unit/checkpoint/test_manager.py::test_the_newest_k_committed_and_the_permanent_are_kept",
        ),
    ),
    Report(
        "tdrussell/diffusion-pipe",
        159,
        "After a power cut the newest folders hold empty files, and the run cannot be resumed.",
        "Sizes and checksums are compared, and the newest checkpoint that passes is used.",
        (
            "tests/unit/checkpoint/test_manager.py::test_a_damaged_one_is_passed_over_and_none_left_is_an_error",
            "tests/unit/checkpoint/test_hostile_checkpoints.py::test_a_run_resumes_from_the_older_step",
        ),
    ),
    Report(
        "pytorch/pytorch",
        189308,
        "Loading a distributed checkpoint unpickles its metadata, so it can run anything.",
        "Metadata is read with a list of what may be in it; a checkpoint with more is refused and not run.",
        (
            "tests/unit/checkpoint/test_hostile_checkpoints.py::test_a_hostile_checkpoint_is_refused",
            "tests/unit/checkpoint/test_hostile_checkpoints.py::test_the_bomb_goes_off",
        ),
        also=("huggingface/transformers#43140",),
    ),
]

RESUMES = [
    Report(
        "allenai/OLMo",
        584,
        "Training ends with the first epoch although more tokens were asked for, and a resume in a later epoch wants "
        "its number in the config.",
        "`training.steps` alone ends a run; each epoch has its order, also after a resume within the second.",
        own("resumes", "olmo_584_more_steps_than_an_epoch_has"),
    ),
    Report(
        "NVIDIA-NeMo/Megatron-Bridge",
        3503,
        "On one path counters are restored, and the data begins with the first sample.",
        "Counters and data go on together: from another run's folder, from its own, and after a growth that changes "
        "batch and length.",
        own(
            "resumes",
            "megatron_bridge_3503_data_goes_on_with_the_counters",
            "megatron_bridge_3503_data_goes_on_after_a_growth_that_changes_batch_and_length",
        ),
    ),
    Report(
        "marin-community/levanter",
        726,
        "A flag to start with fresh moments fails.",
        "Weights alone start with fresh ones, everything goes on with the old ones; a growth does as its stage says, "
        "also after one step.",
        own(
            "resumes",
            "levanter_726_moments_are_reset_when_asked",
            "levanter_726_moments_at_a_growth_after_one_step",
        ),
        also=("marin-community/marin#1922",),
    ),
    Report(
        "dexmal/opendm",
        7,
        "By default only weights are saved, and an automatic resume goes on with fresh moments, in silence.",
        "Everything is saved by default, and a checkpoint of weights alone cannot be resumed: the message says so.",
        ("tests/unit/run/test_resume.py::test_weights_alone_cannot_be_resumed",),
    ),
]
