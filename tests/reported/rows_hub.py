"""Reports about Hugging Face folders."""

from __future__ import annotations

from tests.reported.reports import Report, own

ROWS = [
    Report(
        "huggingface/transformers",
        42612,
        "A folder says that its head is tied and holds another head: the embedding takes its place, in silence.",
        "Mended for this report: the folder is refused, and a tied recipe that leaves a head out says so.",
        own(
            "hub",
            "transformers_42612_a_head_of_its_own_in_a_tied_folder",
            "transformers_42612_a_head_that_a_tied_recipe_leaves_out",
        ),
    ),
    Report(
        "Lightning-AI/litgpt",
        1727,
        "A tied model is exported with the weight that was not trained.",
        "The export says that it is tied, and `transformers` computes the logits of the source.",
        own("hub", "litgpt_1727_a_tied_model_comes_out_tied"),
    ),
    Report(
        "marin-community/marin",
        7156,
        "An export has rotary settings for new versions of `transformers` only; older ones use defaults, in silence.",
        "Both places are written, and either gives the same logits.",
        own("hub", "marin_7156_rotary_settings_for_older_and_newer_readers"),
    ),
    Report(
        "huggingface/nanotron",
        188,
        "A conversion drops the base of the rotary embedding.",
        "It is taken over: logits agree with those of the folder, and would not with the usual base.",
        own("hub", "nanotron_188_rotary_base_of_the_folder"),
    ),
    Report(
        "pytorch/torchtitan",
        335,
        "Channels are paired in another way than in `transformers`: converted weights load, and compute nonsense.",
        "Rows of queries and keys are reordered both ways; logits agree with `transformers`, bytes come back.",
        (
            "tests/unit/interchange/test_folders.py::test_in_and_out_again",
            "tests/distributed/test_interchange.py::test_the_first_loss_is_that_of_transformers",
        ),
        also=("pytorch/torchtitan#1441",),
    ),
]
