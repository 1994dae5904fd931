"""z-loss and softcap: every mesh and every way of computing the loss gives what one rank computes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.meshes import MESHES, ONE_RANK
from tests.distributed.test_parity import Trained, assert_agrees_with_one_rank

SETTINGS: dict[str, Any] = {
    "training__steps": 3,
    "model__n_layers": 2,
    "training__z_loss_weight": 0.1,
    "model__logit_softcap": 2.0,
    "validation__enable": True,
    "validation__freq": 3,
    "validation__steps": 1,
}
"""A thousand times the usual weight, so that a wrong share of the z-loss shows in the gradient norm, and a cap that
bends most logits."""

SOME = ("tp2, odd vocabulary", "tp2, chunked loss, odd vocabulary", "cp2", "pp2, chunked loss")


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in MESHES]
)
def test_meshes_agree_with_one_rank(name: str, trained: Trained) -> None:
    """Gradient norm to 1e-5 at the first step, and the z-loss as closely as the loss."""
    settings = {key: value for key, value in SETTINGS.items() if key not in MESHES[name].model}
    lines = assert_agrees_with_one_rank(MESHES[name], trained, **settings)
    expected = trained(1, **settings, **MESHES[name].model, **ONE_RANK.layout)
    for line, reference in zip(lines[:3], expected[:3], strict=True):
        assert line["z_loss"] == pytest.approx(reference["z_loss"], rel=1e-5 if line["step"] == 1 else 1e-4)


def test_the_loss_stays_the_cross_entropy(trained: Trained) -> None:
    """The first loss is that without a z-loss, bit for bit; gradients are others, and log Z gets smaller."""
    lines = trained(1, **SETTINGS, **ONE_RANK.layout)
    plain = trained(1, **SETTINGS | {"training__z_loss_weight": 0.0}, **ONE_RANK.layout)
    assert lines[0]["loss"] == plain[0]["loss"]
    assert lines[0]["grad_norm"] != pytest.approx(plain[0]["grad_norm"], rel=1e-3)
    assert lines[2]["z_loss"] < lines[0]["z_loss"]
    assert "z_loss" not in plain[0]
    assert lines[-1]["validation_loss"] == pytest.approx(lines[2]["loss"], rel=0.1), "validation has no z-loss"


def test_the_cap_is_part_of_the_model(trained: Trained) -> None:
    lines = trained(1, **SETTINGS, **ONE_RANK.layout)
    plain = trained(1, **SETTINGS | {"model__logit_softcap": 1e6}, **ONE_RANK.layout)
    without = {key: value for key, value in SETTINGS.items() if key != "model__logit_softcap"}
    uncapped = trained(1, **without, **ONE_RANK.layout)
    assert plain[0]["loss"] == pytest.approx(uncapped[0]["loss"], rel=1e-6)
    assert lines[0]["loss"] != pytest.approx(uncapped[0]["loss"], rel=1e-2)
    assert lines[-1]["validation_loss"] != pytest.approx(uncapped[-1]["validation_loss"], rel=1e-3)
    assert lines[0]["flops"] == uncapped[0]["flops"]


def test_accumulation_divides_by_the_tokens_of_the_global_batch(trained: Trained) -> None:
    settings = SETTINGS | {"data__document_mask": True, "data__bos": True}
    whole, parts = (trained(1, **settings, training__local_batch_size=size) for size in (8, 2))
    for line, reference in zip(parts[:3], whole[:3], strict=True):
        for key in ("loss", "z_loss", "grad_norm"):
            assert line[key] == pytest.approx(reference[key], rel=1e-5)
