"""Ranks that disagree stop together, before training starts."""

from __future__ import annotations

import pytest

from tests.harness import run_ranks
from titan_growth.tools.collectives import fail_together, on_rank0, require_agreement
from titan_growth.tools.errors import CheckpointError, ConfigError, RunFolderError, TitanGrowthError


def message_of(kind: type[TitanGrowthError], work, *arguments) -> str:
    with pytest.raises(kind) as caught:
        work(*arguments)
    return str(caught.value)


def disagree(rank: int) -> str:
    require_agreement({"recipe": "a", "corpus": "same"})
    return message_of(ConfigError, require_agreement, {"recipe": "a", "corpus": "other" if rank == 2 else "same"})


def test_a_rank_with_other_data_is_named_on_every_rank() -> None:
    """No rank waits for one that has left."""
    messages = run_ranks(disagree, 3)
    assert len(set(messages)) == 1
    assert "rank 2 has a different corpus from rank 0 (other instead of same)" in messages[0]


def fail_on_rank0(rank: int) -> list[str]:
    def refuse() -> None:
        raise RunFolderError("no")

    def full() -> None:
        raise OSError(28, "No space left on device", "/x")

    return [message_of(RunFolderError, on_rank0, refuse), message_of(TitanGrowthError, on_rank0, full)]


def test_an_error_of_rank_0_reaches_all() -> None:
    """TitanGrowthErrors unchanged, operating system errors as one line."""
    assert run_ranks(fail_on_rank0, 2) == [["no", "No space left on device: /x"]] * 2


def fail_on_rank1(rank: int) -> str:
    fail_together([], CheckpointError)
    return message_of(CheckpointError, fail_together, ["broken"] if rank == 1 else [], CheckpointError)


def test_an_error_of_one_rank_reaches_all() -> None:
    """With the rank's number."""
    assert run_ranks(fail_on_rank1, 2) == ["rank 1: broken"] * 2
