"""Reports about meshes: what a loss is divided by, gradients and their norm, and weights."""

from __future__ import annotations

from tests.reported.reports import Report, own

PARITY = "tests/distributed/test_parity.py::test_three_steps_agree_with_one_rank"

ROWS = [
    Report(
        "pytorch/torchtitan",
        2972,
        "Under a pipeline the loss is divided by the tokens after the backward pass: gradients are as many times too "
        "large.",
        "Each token's loss is divided before. Under all seven schedules, with uneven labels, gradients are those of "
        "one rank.",
        own("parallel", "torchtitan_2972_pipelines_with_uneven_labels"),
        also=("pytorch/torchtitan#4194",),
    ),
    Report(
        "pytorch/torchtitan",
        1733,
        "A pipeline that accumulates scales what it has accumulated anew with each part.",
        "Accumulated or not, the gradients are those of one rank.",
        (
            *own("parallel", "torchtitan_1733_pipelines_that_accumulate"),
            "tests/distributed/test_parity.py::test_gradient_accumulation_changes_nothing",
        ),
        also=("NVIDIA-NeMo/Automodel#3530",),
    ),
    Report(
        "huggingface/transformers",
        35203,
        "Microbatches with few labels weigh as much as those with many.",
        "Eight microbatches with different numbers of labels have the gradients of one.",
        own("parallel", "transformers_35203_accumulation_with_uneven_labels"),
        also=("huggingface/transformers#34191", "meta-pytorch/torchtune#1875", "pytorch/torchtitan#2206"),
    ),
    Report(
        "NVIDIA-NeMo/Automodel",
        3359,
        "A loss beside the main one is not divided by the accumulation: the sum of means depends on the microbatches.",
        "There is one loss, and no mean of means: microbatches without a label, on two ranks, change nothing.",
        own("parallel", "automodel_3359_microbatches_without_a_label"),
        also=("NVIDIA/Megatron-LM#1652",),
    ),
    Report(
        "pytorch/torchtitan",
        1759,
        "The validation loss is divided by the accumulation steps of training.",
        "It is the same with one and with four.",
        own("parallel", "torchtitan_1759_validation_loss_under_accumulation"),
    ),
    Report(
        "NVIDIA/Megatron-LM",
        673,
        "Whether context parallelism divides gradients once or twice is a matter of dispute.",
        "The sum over ranks is the whole gradient; two and four ranks have that of one.",
        (
            *own("parallel", "trl_6843_documents_stay_apart_under_context_parallelism"),
            PARITY,
        ),
    ),
    Report(
        "pytorch/torchtitan",
        3412,
        "In a chunked loss under tensor parallelism a part of a gradient is taken for the whole.",
        "Every gradient is that of the plain loss on one rank, with chunks that do not divide the sequence.",
        (
            *own("parallel", "torchtitan_3412_chunked_loss_under_tensor_parallelism"),
            "tests/distributed/test_gradients.py::test_chunked_loss_has_the_gradients_of_the_plain_one",
        ),
        also=("pytorch/torchtitan#3418",),
    ),
    Report(
        "pytorch/torchtitan",
        3329,
        "With tensor and context parallelism together the logged loss is halved.",
        "It is that of one rank, with documents that end within a rank's share.",
        own("parallel", "torchtitan_3329_logged_loss_of_tensor_and_context_parallelism"),
        also=("pytorch/torchtitan#3280",),
    ),
    Report(
        "huggingface/trl",
        6843,
        "Under context parallelism packed documents see one another: the mask is dropped, in silence.",
        "Loss and gradients are those of one rank with the mask.",
        own("parallel", "trl_6843_documents_stay_apart_under_context_parallelism"),
    ),
    Report(
        "pytorch/pytorch",
        144530,
        "Schedules that split the backward pass skip the hooks that reduce gradients over replicas.",
        "Three such schedules with two replicas each have the gradients of one rank.",
        own("parallel", "pytorch_144530_split_backward_passes_are_reduced_over_replicas"),
    ),
    Report(
        "pytorch/torchtitan",
        1232,
        "The log of a pipeline shows a loss of -1, unless the last rank is the one that is looked at.",
        "Every rank knows the loss, and rank 0 logs it.",
        (*own("parallel", "torchtitan_2972_pipelines_with_uneven_labels"), PARITY),
        also=("pytorch/torchtitan#547", "pytorch/torchtitan#550"),
    ),
    Report(
        "pytorch/torchtitan",
        4312,
        "Under a pipeline the norm that clips depends on how the model is split.",
        "On five meshes it is the norm of the gathered gradients, summed in float64, and clipping uses it.",
        own("parallel", "torchtitan_4312_norm_of_the_whole_gradients"),
        also=("pytorch/torchtitan#649", "pytorch/torchtitan#596"),
    ),
    Report(
        "pytorch/torchtitan",
        4135,
        "The norm of bfloat16 gradients is rounded to bfloat16, so it depends on how they are split.",
        "Squares are summed in float64: any order and any split give one norm.",
        own("parallel", "torchtitan_4135_norm_of_bfloat16_gradients_however_they_are_split"),
        also=("pytorch/pytorch#194033",),
    ),
    Report(
        "NVIDIA-NeMo/RL",
        3788,
        "Gradients that every tensor-parallel rank holds count once for each of them in the norm.",
        "They count once.",
        own("parallel", "nemo_rl_3788_replicated_gradients_count_once"),
        also=("ROCm/TransformerEngine#715",),
    ),
    Report(
        "pytorch/torchtitan",
        2318,
        "With replicas the norm is larger, by the number of ranks, than with shards.",
        "Two replicas, two shards and two by two have the norm of one rank.",
        (*own("parallel", "torchtitan_2318_norm_with_replicas"), PARITY),
    ),
    Report(
        "NVIDIA/Megatron-LM",
        1754,
        "With a vocabulary that the tensor-parallel degree does not divide, the loss goes another way.",
        "An odd vocabulary on two ranks has the losses of one rank.",
        (PARITY, "tests/distributed/test_parity.py::test_ten_steps_agree_with_one_rank"),
    ),
    Report(
        "allenai/OLMo-core",
        679,
        "Interleaved parts of one rank share a seed, and start with equal weights.",
        "Weights are drawn by name: every mesh starts with those of one rank, and no two layers are equal.",
        (
            *own("parallel", "olmo_core_679_parts_of_one_rank_start_differently"),
            "tests/unit/models/test_initialize.py::test_shards_are_slices_of_the_whole",
        ),
        also=("pytorch/pytorch#139304", "Modalities/modalities#426"),
    ),
]

RESHARDING = [
    Report(
        "NVIDIA/Megatron-LM",
        2769,
        "The two halves of a fused SwiGLU weight are mixed up when it is read on other ranks, and the loss jumps.",
        "The halves are two parameters. With 91 rows, that nothing divides, 8, then 1, then 3 ranks have the losses "
        "of one.",
        own("resharding", "megatron_2769_swiglu_weights_on_another_number_of_ranks"),
        also=("NVIDIA/Megatron-LM#5714",),
    ),
    Report(
        "NVIDIA/Megatron-LM",
        5265,
        "Moments of a shard with an odd number of rows cannot be saved.",
        "Three ranks save them, and they are those of one rank.",
        own("resharding", "megatron_5265_moments_of_odd_shards"),
        also=("NVIDIA/Megatron-LM#5346", "NVIDIA/Megatron-LM#4423"),
    ),
]
