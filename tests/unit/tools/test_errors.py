"""Errors that carry their details, also between ranks."""

from __future__ import annotations

import pickle

import pytest

from titan_growth.tools.errors import CheckpointError, RefusedCheckpointError


def test_a_refused_checkpoint_names_folder_and_reason() -> None:
    error = RefusedCheckpointError("step-5", "its recipe\ncannot be read")
    assert str(error) == "step-5 refused: its recipe cannot be read"
    assert (error.folder, error.reason) == ("step-5", "its recipe cannot be read")


@pytest.mark.parametrize("error", [RefusedCheckpointError("step-5", "it is empty"), CheckpointError("it is empty")])
def test_checkpoint_errors_travel_between_ranks(error: CheckpointError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
    assert copy.reason == "it is empty"
