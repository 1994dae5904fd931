"""Initial weights: the same bits on every mesh, the right spread, seeded by global name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.harness import run_ranks
from titan_growth.models.config import DecoderConfig
from titan_growth.models.initial_values import InitialValues, InitScheme
from titan_growth.models.initialize import ROWS_PER_BLOCK, init_weights
from titan_growth.models.llama import Decoder, init_rule

CONFIG = DecoderConfig(
    dim=36, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=6, hidden_dim=90, vocab_size=2 * ROWS_PER_BLOCK + 19
)
"""Uneven sizes: a vocabulary of just over two blocks, rows that do not divide over 4 ranks."""


def initialised(config: DecoderConfig, seed: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    model = Decoder(config, 8).to(dtype)
    init_weights([model], lambda name: init_rule(config, name), seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


LAYOUTS = {
    "rows": ((Shard(0),), 1),
    "columns": ((Shard(1),), 1),
    "replicated": ((Replicate(),), 1),
    "columns x rows": ((Shard(1), Shard(0)), 2),
    "rows x rows": ((Shard(0), Shard(0)), 2),
    "replicated x rows": ((Replicate(), Shard(0)), 2),
}


def sharded_equals_slices(rank: int, num_ranks: int, layout: str) -> int:
    """Shards an uninitialised model, initialises the shards and compares them with slices of the whole."""
    placements, num_axes = LAYOUTS[layout]
    shape = (num_ranks,) if num_axes == 1 else (2, num_ranks // 2)
    mesh = init_device_mesh("cpu", shape)
    model = Decoder(CONFIG, 8)
    for name, parameter in list(model.named_parameters()):
        module_name, _, leaf = name.rpartition(".")
        own = tuple(Replicate() if isinstance(p, Shard) and p.dim >= parameter.dim() else p for p in placements)
        sharded = distribute_tensor(torch.full_like(parameter, float("nan")), mesh, own)
        setattr(model.get_submodule(module_name), leaf, nn.Parameter(sharded))
    init_weights([model], lambda name: init_rule(CONFIG, name), 3)
    num_partial = 0
    for name, whole in initialised(CONFIG).items():
        found = model.get_parameter(name)
        assert isinstance(found, DTensor)
        expected = distribute_tensor(whole, mesh, found.placements)
        assert torch.equal(found.to_local(), expected.to_local()), f"{name} on rank {rank}"
        num_partial += found.to_local().shape != whole.shape
    return num_partial


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_are_slices_of_the_whole(layout: str, num_ranks: int) -> None:
    counts = run_ranks(sharded_equals_slices, num_ranks, num_ranks, layout)
    if layout not in ("replicated",) and not (layout == "replicated x rows" and num_ranks == 2):
        assert min(counts) >= 16, "nothing was sharded"


def test_an_empty_shard_is_left_alone() -> None:
    """5 rows over 4 ranks leave one rank without any."""
    assert run_ranks(_five_rows, 4) == [2, 2, 1, 0]


def _five_rows(rank: int) -> int:
    layer = nn.Linear(3, 5, bias=False)
    mesh = init_device_mesh("cpu", (4,))
    layer.weight = nn.Parameter(distribute_tensor(torch.zeros(5, 3), mesh, (Shard(0),)))
    init_weights([layer], lambda name: InitialValues(1.0), 0)
    assert bool((layer.weight.to_local() != 0).all())
    return layer.weight.to_local().shape[0]


def test_spread_is_that_of_the_rule() -> None:
    config = replace(CONFIG, dim=128, hidden_dim=512, vocab_size=1024, head_dim=64, num_layers=3)
    found = initialised(config)
    for name, values in found.items():
        initial = init_rule(config, name)
        if initial is None:
            assert torch.equal(values, torch.ones_like(values)), name
            continue
        std = initial.std
        assert values.abs().max() <= 3 * std, f"{name} is not truncated at three deviations"
        assert values.abs().max() > 2.5 * std, f"{name} is truncated too early"
        assert values.std().item() == pytest.approx(0.9866 * std, rel=0.02), name  # of a normal cut at 3
        assert abs(values.mean().item()) < 0.03 * std


@pytest.mark.parametrize(
    ("name", "depth_init", "expected"),
    [
        ("tok_embeddings.weight", True, 1.0),
        ("output.weight", True, 36**-0.5),
        ("norm.weight", True, None),
        ("layers.1.attention_norm.weight", True, None),
        ("layers.1.ffn_norm.weight", True, None),
        *((f"layers.1.attention.{name}.weight", True, 0.02) for name in ("wq", "wk", "wv")),
        ("layers.1.feed_forward.w1.weight", True, 0.02),
        *((f"layers.0.{name}.weight", True, 0.02 / 2**0.5) for name in ("attention.wo", "feed_forward.w2")),
        *((f"layers.1.{name}.weight", True, 0.02 / 4**0.5) for name in ("attention.wo", "feed_forward.w3")),
        *((f"layers.7.{name}.weight", True, 0.02 / 16**0.5) for name in ("attention.wo", "feed_forward.w2")),
        *((f"layers.0.{name}.weight", False, 0.02 / 16**0.5) for name in ("attention.wo", "feed_forward.w2")),
        *((f"layers.7.{name}.weight", False, 0.02 / 16**0.5) for name in ("attention.wo", "feed_forward.w3")),
    ],
)
def test_init_rule(name: str, depth_init: bool, expected: float | None) -> None:
    """torchtitan's: 0.02, with 0.02 / sqrt(2 * depth) for what writes to the residual stream (and w3)."""
    config = replace(CONFIG, num_layers=8, depth_init=depth_init)
    assert init_rule(config, name) == (expected if expected is None else (pytest.approx(expected, rel=1e-12), False))


def test_a_tied_embedding_starts_as_a_head() -> None:
    tied = replace(CONFIG, tie_word_embeddings=True)
    assert init_rule(tied, "tok_embeddings.weight") == (pytest.approx(36**-0.5), False)


SCHEMES = {
    "normal": (
        InitScheme("normal", 0.1),
        {"tok_embeddings": 0.1, "output": 0.1, "layers.3.attention.wq": 0.1, "layers.3.feed_forward.w3": 0.1,
         "layers.3.attention.wo": 0.1 / 8**0.5, "layers.3.feed_forward.w2": 0.1 / 8**0.5},
    ),
    "small": (
        InitScheme("small"),
        {"tok_embeddings": 1 / 6, "output": 1 / 6, "layers.3.attention.wq": 0.02,
         "layers.3.feed_forward.w3": 0.02 / 8**0.5, "layers.3.attention.wo": 0.02 / 8**0.5},
    ),
    "a deviation of each group": (
        InitScheme("normal", 0.1, embedding_std=0.2, head_std=0.3, readers_std=0.4, writers_std=0.5),
        {"tok_embeddings": 0.2, "output": 0.3, "layers.3.attention.wv": 0.4, "layers.3.feed_forward.w3": 0.4,
         "layers.3.attention.wo": 0.5 / 8**0.5},
    ),
    "torchtitan with a smaller embedding": (
        InitScheme(embedding_std=0.02, readers_std=0.04),
        {"tok_embeddings": 0.02, "output": 1 / 6, "layers.3.attention.wq": 0.04,
         "layers.3.feed_forward.w3": 0.04 / 8**0.5, "layers.3.attention.wo": 0.02 / 8**0.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes(name: str) -> None:
    scheme, expected = SCHEMES[name]
    config = replace(CONFIG, num_layers=8, init=scheme)
    found = {parameter: init_rule(config, f"{parameter}.weight") for parameter in expected}
    assert found == {parameter: (pytest.approx(std), False) for parameter, std in expected.items()}
    assert init_rule(config, "layers.3.ffn_norm.weight") is None


def test_a_scheme_without_the_layers_own_depth() -> None:
    """GPT-2's: 1 / sqrt(2 L) for all layers alike."""
    config = replace(CONFIG, num_layers=8, depth_init=False, init=InitScheme("normal"))
    for layer in (0, 7):
        assert init_rule(config, f"layers.{layer}.attention.wo.weight") == (pytest.approx(0.02 / 4), False)


def test_the_papers_scheme_is_pytorchs_own_initialisation() -> None:
    """Against `nn.Linear` and `nn.Embedding`, which initialise themselves: other numbers, the same spread."""
    config = replace(CONFIG, dim=120, hidden_dim=512, vocab_size=1024, head_dim=20, init=InitScheme("gstack"))
    fresh = dict(Decoder(config, 8).named_parameters())
    for name, values in initialised(config).items():
        expected = fresh[name].detach()
        assert values.std().item() == pytest.approx(expected.std().item(), rel=0.03, abs=1e-6), name
        if "tok_embeddings" not in name:
            assert values.abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.02), name


def test_a_deeper_model_begins_with_the_same_layers() -> None:
    """Names carry the global layer id, so depth does not move the numbers (with depth_init, which names the layer)."""
    shallow, deep = initialised(CONFIG), initialised(replace(CONFIG, num_layers=5))
    assert shallow.keys() < deep.keys()
    for name, values in shallow.items():
        assert torch.equal(values, deep[name]), name


def test_layers_parameters_blocks_and_seeds_differ() -> None:
    found = initialised(CONFIG)
    assert not torch.equal(found["layers.0.attention.wq.weight"], found["layers.1.attention.wq.weight"])
    assert not torch.equal(found["layers.0.attention.wk.weight"], found["layers.0.attention.wv.weight"])
    table = found["tok_embeddings.weight"]
    assert not torch.equal(table[:ROWS_PER_BLOCK], table[ROWS_PER_BLOCK : 2 * ROWS_PER_BLOCK])
    assert torch.unique(table, dim=0).shape == table.shape
    other = initialised(CONFIG, seed=4)
    assert not torch.equal(table, other["tok_embeddings.weight"])
    assert torch.equal(table, initialised(CONFIG)["tok_embeddings.weight"])


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    first, state = initialised(CONFIG), torch.get_rng_state()
    torch.manual_seed(2)
    second = initialised(CONFIG)
    assert all(torch.equal(first[name], second[name]) for name in first)
    model = Decoder(CONFIG, 8)
    before = torch.get_rng_state()
    init_weights([model], lambda name: init_rule(CONFIG, name), 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(state, before)


def test_bfloat16_weights_are_the_rounded_float32_ones() -> None:
    whole, rounded = initialised(CONFIG), initialised(CONFIG, dtype=torch.bfloat16)
    assert all(torch.equal(rounded[name], whole[name].bfloat16()) for name in whole)
