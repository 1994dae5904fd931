"""What the layers do, on one rank, against the same numbers from plain PyTorch without hooks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.distributed.meshes import QWEN3
from tests.harness import WarmRanks
from tests.runs import make_recipe, trainer_of
from titan_growth.config.schema.recipe import Recipe
from titan_growth.models.registry import family_module

Numbers = dict[str, list[float] | float]


def norm_of(tensors: list[Tensor]) -> float:
    return torch.cat([one.detach().double().flatten() for one in tensors]).norm().item()


def rms(values: list[Tensor]) -> float:
    return torch.cat([one.detach().double().flatten() for one in values]).square().mean().sqrt().item()


def largest(values: list[Tensor]) -> float:
    return max(one.detach().abs().max().item() for one in values)


def in_group(name: str, layer: int | None, group: str) -> bool:
    """Which parameters belong together, written out."""
    if layer is None:
        return name == {"embedding": "tok_embeddings.weight", "norm": "norm.weight", "head": "output.weight"}[group]
    if not name.startswith(f"layers.{layer}."):
        return False
    own = "norms" if "norm" in name else "attention" if ".attention." in name else "feed_forward"
    return group in (own, "layer")


def plain_step(model: Any, apply_rope: Any, batches: list[dict[str, Tensor]]) -> tuple[dict[str, list[Tensor]], float]:
    """Forward and backward of a model by its formulas; (activations by group and layer, the largest logits by layer).

    Gradients are left in the model.
    """
    config = model.config
    seen: dict[str, list[Tensor]] = {}
    logits: dict[int, float] = {}
    num_tokens = sum(int((batch["labels"] >= 0).sum()) for batch in batches)
    for batch in batches:
        num = batch["input"].shape[1]
        cos, sin = model.rope_cos[:num], model.rope_sin[:num]
        x = model.tok_embeddings.weight[batch["input"]]
        seen.setdefault("embedding", []).append(x)
        for layer, block in enumerate(model.layers.values()):
            attention = block.attention
            normed = block.attention_norm(x)
            q, k, v = (
                linear(normed).unflatten(-1, (-1, config.head_dim))
                for linear in (attention.wq, attention.wk, attention.wv)
            )
            if config.qk_norm:
                q, k = attention.q_norm(q), attention.k_norm(k)
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
            groups = config.num_heads // config.num_kv_heads
            k, v = (one.repeat_interleave(groups, dim=2) for one in (k, v))
            scores = torch.einsum("bsnh,btnh->bnst", q, k) / config.head_dim**0.5
            allowed = torch.ones(num, num).tril().bool()
            if "positions" in batch:
                document = (batch["positions"] == 0).cumsum(1)
                allowed = (allowed & (document[:, :, None] == document[:, None, :]))[:, None]
            scores = scores.masked_fill(~allowed, -torch.inf)
            logits[layer] = max(logits.get(layer, -torch.inf), scores.max().item())
            mixed = attention.wo(torch.einsum("bnst,btnh->bsnh", scores.softmax(-1), v).flatten(-2))
            x = x + mixed
            normed_again = block.ffn_norm(x)
            forward = block.feed_forward
            added = forward.w2(F.silu(forward.w1(normed_again)) * forward.w3(normed_again))
            x = x + added
            for group, values in (
                ("attention", [mixed]),
                ("feed_forward", [added]),
                ("norms", [normed, normed_again]),
                ("layer", [x]),
            ):
                seen.setdefault(f"{group}.{layer}", []).extend(values)
        x = model.norm(x)
        seen.setdefault("norm", []).append(x)
        loss = F.cross_entropy(model.output(x).flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        (loss / num_tokens).backward()
    return seen, [logits[layer] for layer in sorted(logits)]


def measured_and_expected(_rank: int, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Numbers]]:
    """(`layers` of the first step's line, the same by hand)."""
    with trainer_of(recipe, 1) as trainer:
        family = family_module(recipe.model.name)
        model = family.Decoder(trainer.runtime.model_config, recipe.training.seq_len)
        model.materialized(torch.device("cpu"))
        weights = {name: one.detach().clone() for name, one in trainer.runtime.tensors(optimizer=False).items()}
        model.load_state_dict(weights)
        upcoming = trainer.runtime.loader(trainer.progress)
        batches = upcoming.next_batch()
        upcoming.close()
        seen, logits = plain_step(model, family.apply_rope, batches)
        trainer.train_step()
        after = trainer.runtime.tensors(optimizer=False)
        parameters = {name: one for name, one in model.named_parameters()}
        num_layers = trainer.runtime.model_config.num_layers

        def norms(tensors: dict[str, Tensor]) -> Numbers:
            def of(layer: int | None, group: str) -> float:
                return norm_of([tensors[name] for name in parameters if in_group(name, layer, group)])

            inside = ("attention", "feed_forward", "norms", "layer")
            found: Numbers = {group: [of(layer, group) for layer in range(num_layers)] for group in inside}
            outside = ("embedding", "norm") if recipe.model.tie_word_embeddings else ("embedding", "norm", "head")
            return found | {group: of(None, group) for group in outside}

        def activations(number: Any) -> Numbers:
            inside = ("attention", "feed_forward", "norms", "layer")
            found: Numbers = {
                group: [number(seen[f"{group}.{layer}"]) for layer in range(num_layers)] for group in inside
            }
            return found | {group: number(seen[group]) for group in ("embedding", "norm")}

        gradient = norms({name: one.grad for name, one in parameters.items() if one.grad is not None})
        weight = norms(weights)
        update = norms({name: after[name].detach() - weights[name] for name in parameters})
        ratio: Numbers = {
            group: [part / whole for part, whole in zip(values, weight[group], strict=True)]
            if isinstance(values, list)
            else values / weight[group]
            for group, values in update.items()
        }
        expected = {
            "gradient_norm": gradient,
            "weight_norm": weight,
            "update_ratio": ratio,
            "activation_rms": activations(rms),
            "activation_max": activations(largest),
            "attention_logit_max": {"attention": logits},
        }
        (line,) = (Path(recipe.job.dump_folder) / "layers.jsonl").read_text().splitlines()
        return json.loads(line)["layers"], expected


MODELS: dict[str, dict[str, Any]] = {
    "llama3": {},
    "llama3, tied head": {"model__tie_word_embeddings": True},
    "llama3, masked documents": {"data__document_mask": True},
    "llama3, clipped": {"training__max_norm": 1e-3},
    "qwen3": QWEN3,
}


@pytest.mark.parametrize("name", MODELS)
def test_one_rank_measures_what_plain_pytorch_computes(name: str, warm_ranks: WarmRanks, tmp_path: Path) -> None:
    """Four accumulated microbatches, so that sums and maxima go over more than one forward pass."""
    settings = {"model__n_layers": 2, "metrics__layers_freq": 1, "metrics__attention_freq": 1, **MODELS[name]}
    recipe = make_recipe(tmp_path / "run", **settings)
    ((found, expected),) = warm_ranks(measured_and_expected, 1, recipe)
    assert found.keys() == expected.keys()
    for metric, by_group in expected.items():
        assert found[metric].keys() == by_group.keys()
        for group, values in by_group.items():
            assert found[metric][group] == pytest.approx(values, rel=2e-5), f"{metric} of {group}"
