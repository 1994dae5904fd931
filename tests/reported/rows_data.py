"""Reports about data: order and position of samples, tokens, corpora."""

from __future__ import annotations

from tests.reported.reports import Report, own

ROWS = [
    Report(
        "allenai/OLMo",
        650,
        "A resume sets the position to start at, and nothing clears it: each later epoch starts there too.",
        "The position is one number that counts over all epochs; the epochs after a resume are whole.",
        own("epochs", "olmo_650_start_index_after_a_resume"),
        also=("NVIDIA-NeMo/Megatron-Bridge#4601",),
    ),
    Report(
        "Lightning-AI/litgpt",
        1712,
        "The loader is restored before it is made to cycle, so later epochs repeat what was left of the first.",
        "An epoch is computed from its number, not from where a process began to read.",
        own("epochs", "litgpt_1712_epochs_after_a_resume_near_the_end_of_one"),
    ),
    Report(
        "pytorch/torchtitan",
        1357,
        "A checkpoint from the end of an epoch loses the position, and the data starts over.",
        "The next epoch begins, in its own order.",
        own("epochs", "torchtitan_1357_saved_at_the_end_of_an_epoch"),
    ),
    Report(
        "NVIDIA-NeMo/Speech",
        7221,
        "A run that has used up its data crashes on a resume, in a check of the sampler.",
        "It goes on with the next epoch, after any number of epochs, shuffled or not.",
        own("epochs", "nemo_speech_7221_resumed_when_the_data_is_used_up"),
    ),
    Report(
        "huggingface/accelerate",
        4071,
        "Skipping the batches of a resumed epoch resets the epoch's number, so the rest comes in another order.",
        "The rest of a later epoch comes in that epoch's order.",
        own("epochs", "accelerate_4071_order_within_a_later_epoch"),
    ),
    Report(
        "huggingface/datasets",
        7447,
        "With workers that persist, all epochs after a resume are as short as the rest of the first.",
        "Workers are handed numbers of samples without end; epochs are whole with any of their settings.",
        own("epochs", "datasets_7447_workers_that_persist_over_epochs"),
    ),
    Report(
        "huggingface/datasets",
        8295,
        "After one resume the saved position stands still, so the second resume begins with the first sample.",
        "A run resumed again and again sees what an unbroken one sees.",
        own("epochs", "datasets_8295_resumed_twice"),
    ),
    Report(
        "huggingface/datasets",
        3423,
        "Each worker of a loader streams the whole corpus, so samples come as often as there are workers.",
        "Two workers give each block of an epoch once, in the order without workers.",
        own("epochs", "datasets_3423_workers_do_not_repeat_samples"),
    ),
    Report(
        "allenai/OLMo",
        182,
        "A position in batches is another one once the batch size has changed.",
        "The position counts sequences; the next batch of any size begins behind the last sequence seen.",
        own("epochs", "olmo_182_resumed_with_another_batch_size"),
    ),
    Report(
        "pytorch/torchtitan",
        811,
        "A checkpoint of 8 ranks does not load on 16: the loader has no state for the new ones.",
        "8, then 16, then 4, then 1 ranks see the batches of one run that was never stopped.",
        (
            *own("epochs", "torchtitan_811_resumed_on_more_ranks_and_on_fewer"),
            "tests/distributed/test_elastic.py::test_some_of_the_matrix",
        ),
        also=("NVIDIA-NeMo/Megatron-Bridge#5637",),
    ),
    Report(
        "PrimeIntellect-ai/prime-rl",
        1035,
        "Workers of different ranks have read ahead by different amounts, and one rank's lead is saved for all.",
        "What is saved is what was handed out, and it is equal on all ranks, however far they read ahead.",
        own("epochs", "prime_rl_1035_ranks_that_load_ahead_agree_on_the_position"),
    ),
    Report(
        "pytorch/pytorch",
        141069,
        "One rank runs out of samples; the others wait in a collective until it times out.",
        "A rank's share of each batch is computed, so all have equally many batches, without end.",
        own("epochs", "pytorch_141069_no_rank_runs_out_of_data"),
    ),
    Report(
        "pytorch/torchtitan",
        1618,
        "Validation on the whole set ends at different batches on different ranks, and hangs.",
        "Ranks without a sequence of their own get one without labels; each sequence counts once.",
        (
            *own("epochs", "torchtitan_1618_validation_on_more_ranks_than_sequences"),
            *own("parallel", "torchtitan_1618_a_validation_set_smaller_than_the_ranks"),
            "tests/unit/data/test_loader.py::test_validation_is_the_same_set_for_every_degree",
        ),
        also=("pytorch/torchtitan#4807",),
    ),
    Report(
        "NVIDIA-NeMo/Megatron-Bridge",
        5987,
        "Validation moves through its set from one pass to the next, and begins anew after a resume.",
        "Each pass takes the same sequences, so there is no position to lose.",
        own("epochs", "megatron_bridge_5987_validation_does_not_move_on"),
    ),
    Report(
        "NVIDIA-NeMo/RL",
        239,
        "All epochs come in one order.",
        "Each epoch visits every block once, in an order of its own.",
        ("tests/unit/data/test_blocks.py::test_each_epoch_visits_every_block_once_in_its_own_order",),
    ),
    Report(
        "marin-community/levanter",
        574,
        "BOS is put before each document although the tokenizer does that itself.",
        "Tokenizers are asked for plain tokens; `data.bos` and `data.eos` alone decide, and each comes once.",
        own("tokens", "levanter_574_a_tokenizer_that_adds_bos_itself"),
    ),
    Report(
        "huggingface/datatrove",
        345,
        "Asking for EOS replaces the rule that put BOS, which is then missing.",
        "All four combinations of BOS and EOS give what they say.",
        own("tokens", "datatrove_345_asking_for_eos_does_not_drop_bos"),
    ),
    Report(
        "marin-community/marin",
        5034,
        "Caches from before and after a change of the tokenizer's code differ by BOS, and are taken for one another.",
        "BOS and EOS are part of a cached corpus's name, and a resume on another corpus is refused.",
        (
            *own("tokens", "marin_5034_a_cache_without_bos_is_another_corpus"),
            "tests/unit/run/test_resume.py::test_what_makes_it_another_run_is_refused",
        ),
    ),
    Report(
        "NVIDIA/Megatron-LM",
        705,
        "A source with a tiny weight is asked for more samples than it has: IndexError in the middle of a run.",
        "Sources are not weighted yet: files are joined, and a tiny one comes once in each epoch.",
        own("tokens", "megatron_705_a_tiny_source_is_used_up"),
    ),
    Report(
        "Lightning-AI/lit-llama",
        306,
        "A tokenizer with more tokens than the embedding has rows aborts in a CUDA kernel.",
        "It is refused before anything starts, with both numbers.",
        own("tokens", "lit_llama_306_more_tokens_than_the_model_has_rows"),
    ),
    Report(
        "allenai/OLMo-core",
        617,
        "A run cannot be resumed after its corpus has moved: the fingerprint holds paths.",
        "A corpus is known by its content: moved or with other times it is the same, with a changed letter it is not.",
        (
            *own("tokens", "olmo_core_617_the_corpus_has_moved_since"),
            "tests/unit/run/test_inputs.py::"
            "test_another_corpus_of_equal_names_sizes_and_times_is_refused_and_a_moved_one_is_not",
        ),
    ),
    Report(
        "NVIDIA-NeMo/RL",
        2519,
        "A resume with another dataset skips as many samples of it as were seen of the first, in silence.",
        "It is refused, and the message names the corpus that the checkpoint was trained on.",
        (
            "tests/unit/run/test_inputs.py::"
            "test_another_corpus_of_equal_names_sizes_and_times_is_refused_and_a_moved_one_is_not",
        ),
    ),
    Report(
        "ByteDance-Seed/VeOmni",
        330,
        "Files of a folder come in the order of the file system, which is another one on another machine.",
        "They come in the order of their names, whatever order they were made in.",
        own("tokens", "veomni_330_order_of_the_files_in_a_folder"),
        also=("huggingface/datasets#3857", "pytorch/pytorch#70103"),
    ),
]
