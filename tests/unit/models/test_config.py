"""Sizes: flavors against published counts and built modules, FLOPs by hand, and what a [model] table may contain."""

from __future__ import annotations

import pytest
import torch

from titan_growth.config.loader import load_recipe
from titan_growth.config.schema.model import ModelConfig, ModelInitConfig
from titan_growth.models.config import DecoderConfig, swiglu_hidden_dim
from titan_growth.models.initial_values import InitScheme
from titan_growth.models.llama import FLAVORS, Decoder, fsdp_units
from titan_growth.models.registry import model_config_of
from titan_growth.tools.errors import Problem
from titan_growth.tools.findings import Findings

TORCHTITAN_SIZES = {
    # dim, layers, heads, kv heads, head dim, hidden, vocabulary, parameters
    "debugmodel": (256, 6, 16, 16, 16, 768, 2048, 6_163_712),
    "8B": (4096, 32, 32, 8, 128, 14336, 128256, 8_030_261_248),
    "70B": (8192, 80, 64, 8, 128, 28672, 128256, 70_553_706_496),
    "405B": (16384, 126, 128, 8, 128, 53248, 128256, 405_853_388_800),
}
"""Of the Llama 3.1 release; parameter counts as published (8.03B, 70.55B, 405.85B; debugmodel 6.16M)."""

GSTACK_SIZES = {
    # dim, layers, heads, kv heads, head dim, hidden, millions of parameters, and those without embedding and head
    "gstack_410M": (1024, 24, 16, 16, 64, 2816, 373.9, 308.3),
    "gstack_1.1B": (2048, 24, 32, 32, 64, 5632, 1364.3, 1233.2),
    "gstack_3B": (2560, 32, 20, 4, 128, 7040, 2397.5, 2233.6),
    "gstack_7B": (4096, 32, 32, 8, 128, 11008, 5933.1, 5671.0),
}
GSTACK_BASES = {"gstack_410M": 142.6, "gstack_1.1B": 439.4, "gstack_3B": 722.3, "gstack_7B": 1679.9}
"""Millions of parameters of the model a quarter as deep."""

TINY = {"flavor": "custom", "dim": 32, "n_layers": 3, "n_heads": 4, "vocab_size": 101}


def config_of(**values: object) -> DecoderConfig:
    config = model_config_of(ModelConfig(**values), found := Findings())  # type: ignore[arg-type]
    assert not found.problems, found.problems
    assert config is not None
    return config


def built_on_meta(config: DecoderConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config, 8)


@pytest.mark.parametrize("flavor", TORCHTITAN_SIZES)
def test_llama_flavors_are_those_of_the_release(flavor: str) -> None:
    config = config_of(flavor=flavor)
    dim, layers, heads, kv_heads, head_dim, hidden, vocab, params = TORCHTITAN_SIZES[flavor]
    assert (config.dim, config.num_layers, config.num_heads, config.num_kv_heads) == (dim, layers, heads, kv_heads)
    assert (config.head_dim, config.hidden_dim, config.vocab_size) == (head_dim, hidden, vocab)
    assert config.num_params == params
    rope = (config.rope_theta, config.rope_scaling_factor, config.rope_low_freq_factor, config.rope_high_freq_factor)
    assert rope == (500000.0, 8.0, 1.0, 4.0)
    assert (config.rope_original_max_seq_len, config.max_seq_len, config.norm_eps) == (8192, 131072, 1e-5)
    assert config.depth_init
    assert not config.tie_word_embeddings


@pytest.mark.parametrize("flavor", GSTACK_SIZES)
def test_gstack_flavors_are_those_of_the_papers_code(flavor: str) -> None:
    config = config_of(flavor=flavor)
    dim, layers, heads, kv_heads, head_dim, hidden, millions, inner = GSTACK_SIZES[flavor]
    assert (config.dim, config.num_layers, config.num_heads, config.num_kv_heads) == (dim, layers, heads, kv_heads)
    assert (config.head_dim, config.hidden_dim, config.vocab_size) == (head_dim, hidden, 32000)
    assert round(config.num_params / 1e6, 1) == millions
    assert round((config.num_params - 2 * 32000 * dim) / 1e6, 1) == inner
    base = config_of(flavor=flavor, n_layers=layers // 4)
    assert round(base.num_params / 1e6, 1) == GSTACK_BASES[flavor]
    assert (config.rope_theta, config.rope_scaling_factor, config.max_seq_len) == (10000.0, 1.0, 2048)


def test_every_flavor_is_tested() -> None:
    assert FLAVORS.keys() == {*TORCHTITAN_SIZES, *GSTACK_SIZES, "custom", "debugmodel_wide"}


@pytest.mark.parametrize("flavor", [name for name in FLAVORS if name != "custom"])
@pytest.mark.parametrize("tied", [False, True])
def test_num_params_is_that_of_the_built_module(flavor: str, tied: bool) -> None:
    config = config_of(flavor=flavor, tie_word_embeddings=tied)
    model = built_on_meta(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_params
    assert sum(parameter.numel() for parameter in model.layers["0"].parameters()) == config.num_layer_params


def test_flops_by_hand() -> None:
    """1 layer, dim 4, 2 query and 1 key/value heads of 2, hidden 8, vocabulary 10, sequence 16."""
    config = config_of(flavor="custom", dim=4, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=8, vocab_size=10)
    # wq 16, wk 8, wv 8, wo 16; w1, w2, w3 32 each; three norms of 4; head 40
    inner = 16 + 8 + 8 + 16 + 3 * 32 + 3 * 4 + 40
    assert config.num_params == inner + 40
    assert config.flops_per_token(16) == 6 * inner + 12 * 1 * 2 * 2 * 16
    tied = config_of(
        flavor="custom", dim=4, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=8, vocab_size=10,
        tie_word_embeddings=True,
    )  # fmt: skip
    assert tied.num_params == inner
    assert tied.flops_per_token(16) == config.flops_per_token(16), "the head's product is computed all the same"


def test_flops_of_8b() -> None:
    """6 x (8,030,261,248 - 525,336,576) + 12 x 32 x 32 x 128 x 8192."""
    assert config_of(flavor="8B").flops_per_token(8192) == 57_914_449_920


def test_head_dim_counts_apart_from_dim() -> None:
    config = config_of(**TINY, head_dim=16, hidden_dim=48)
    assert config.num_layer_params == 4 * 32 * 64 + 3 * 32 * 48 + 2 * 32
    assert sum(p.numel() for p in built_on_meta(config).parameters()) == config.num_params


@pytest.mark.parametrize(
    ("dim", "multiplier", "multiple", "hidden"),
    [(256, None, 256, 768), (4096, 1.3, 1024, 14336), (8192, 1.3, 4096, 28672), (16384, 1.2, 4096, 53248),
     (32, None, 1, 85), (32, 0.5, 1, 42), (32, None, 85, 85), (32, None, 86, 86), (3, None, 256, 256)],
)  # fmt: skip
def test_swiglu_rule(dim: int, multiplier: float | None, multiple: int, hidden: int) -> None:
    assert swiglu_hidden_dim(dim, multiplier, multiple) == hidden


def test_names_are_torchtitans() -> None:
    expected = ["tok_embeddings.weight"]
    for layer in range(3):
        expected += [f"layers.{layer}.attention.{name}.weight" for name in ("wq", "wk", "wv", "wo")]
        expected += [f"layers.{layer}.feed_forward.{name}.weight" for name in ("w1", "w2", "w3")]
        expected += [f"layers.{layer}.attention_norm.weight", f"layers.{layer}.ffn_norm.weight"]
    expected += ["norm.weight", "output.weight"]
    model = built_on_meta(config_of(**TINY))
    assert [name for name, _ in model.named_parameters()] == expected
    assert list(model.state_dict()) == expected, "a buffer is in the checkpoints"


def test_fsdp_units_hold_every_parameter_once_except_a_tied_embedding() -> None:
    for tied in (False, True):
        model = built_on_meta(config_of(**TINY, tie_word_embeddings=tied))
        inside = [id(p) for unit in fsdp_units(model) for module in unit for p in module.parameters()]
        assert len(inside) == len(set(inside))
        left = {name for name, p in model.named_parameters() if id(p) not in inside}
        assert left == ({"tok_embeddings.weight", "norm.weight"} if tied else set())


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({"name": "lama3"}, ["model.name"]),
        ({"flavor": "8b"}, ["model.flavor"]),
        ({"flavor": "custom"}, ["model.dim", "model.n_layers", "model.n_heads", "model.vocab_size"]),
        ({"flavor": "custom", "dim": 32, "n_heads": 4}, ["model.n_layers", "model.vocab_size"]),
        ({**TINY, "n_heads": 5}, ["model.n_heads"]),
        ({**TINY, "n_heads": 32}, ["model.head_dim"]),
        ({**TINY, "head_dim": 3}, ["model.head_dim"]),
        ({**TINY, "n_kv_heads": 3}, ["model.n_kv_heads"]),
        ({**TINY, "n_kv_heads": 8}, ["model.n_kv_heads"]),
        ({**TINY, "hidden_dim": 8, "multiple_of": 4}, ["model.multiple_of"]),
        ({**TINY, "hidden_dim": 8, "ffn_dim_multiplier": 1.5}, ["model.ffn_dim_multiplier"]),
        ({**TINY, "rope_low_freq_factor": 4.0}, ["model.rope_low_freq_factor"]),
        ({**TINY, "n_heads": 5, "n_kv_heads": 3}, ["model.n_heads", "model.n_kv_heads"]),
        ({**TINY, "init": ModelInitConfig(std=0.1)}, ["model.init.std"]),
        ({**TINY, "init": ModelInitConfig(embedding_std=1), "tie_word_embeddings": True}, ["model.init.embedding_std"]),
        ({"flavor": "gstack_7B", "init": ModelInitConfig(std=0.1)}, ["model.init.std"]),
        ({**TINY, "init": ModelInitConfig(scheme="gstack"), "depth_init": False}, ["model.depth_init"]),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_built(values: dict[str, object], keys: list[str]) -> None:
    config = model_config_of(ModelConfig(**values), found := Findings())  # type: ignore[arg-type]
    assert config is None
    assert [problem.key for problem in found.problems] == keys


def test_initial_weights_of_flavors_and_tables() -> None:
    assert config_of(flavor="8B").init == config_of(**TINY).init == InitScheme("torchtitan")
    assert {config_of(flavor=flavor).init for flavor in GSTACK_SIZES} == {InitScheme("gstack")}
    assert config_of(flavor="gstack_7B", init=ModelInitConfig(head_std=0.1)).init == InitScheme("gstack", head_std=0.1)
    recipe = load_recipe(["--model.init.scheme", "normal", "--model.init.std=0.01", "--model.init.writers_std", "0.03"])
    found = model_config_of(recipe.model, Findings())
    assert found is not None
    assert found.init == InitScheme("normal", 0.01, writers_std=0.03)


def test_flavor_suggestion() -> None:
    model_config_of(ModelConfig(flavor="8b"), found := Findings())
    assert found.problems[0].hint == "Did you mean '8B'?"
    assert isinstance(found.problems[0], Problem)


def test_sizes_beside_a_flavor_override_it() -> None:
    config = config_of(flavor="gstack_410M", n_layers=6, multiple_of=128)
    assert (config.num_layers, config.dim, config.hidden_dim) == (6, 1024, 2816)
    assert config_of(flavor="gstack_410M", ffn_dim_multiplier=2.0).hidden_dim == 5632
    assert config_of(flavor="8B", hidden_dim=1024).hidden_dim == 1024
    assert config_of(flavor="8B", dim=2048).head_dim == 64
    assert config_of(**TINY, rope_scaling_factor=1.0, rope_low_freq_factor=4.0).rope_scaling_factor == 1.0
    recipe = load_recipe(["--model.flavor", "8B", "--model.n_layers=4"])
    assert model_config_of(recipe.model, Findings()) == config_of(flavor="8B", n_layers=4)
