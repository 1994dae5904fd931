"""The Qwen3 family: its math against a plain float64 computation, its sizes against the release."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from titan_growth.config.loader import load_recipe
from titan_growth.config.schema.recipe import ModelConfig
from titan_growth.models import llama
from titan_growth.models.config import DecoderConfig
from titan_growth.models.decoder import Split, rope_cache
from titan_growth.models.initialize import init_weights
from titan_growth.models.qwen3 import (
    FLAVORS,
    Decoder,
    apply_rope,
    fsdp_units,
    init_rule,
    tensor_parallel_plan,
)
from titan_growth.models.registry import model_config_of
from titan_growth.tools.findings import Findings
from titan_growth.tools.labels import IGNORE_INDEX

CPU = torch.device("cpu")
CONFIG = DecoderConfig(
    dim=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,  # the heads together are wider than the model
    hidden_dim=40,
    vocab_size=61,
    norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling_factor=1.0,
    qk_norm=True,
)
POSITIONS = torch.cat([torch.arange(length) for length in (5, 1, 7, 3)]).expand(2, -1)
"""Four documents in a row of 16 tokens."""


def built(config: DecoderConfig = CONFIG) -> Decoder:
    """A model in which every term matters: large matrices, norms other than one."""
    model = Decoder(config, 16)
    model.materialized(CPU)
    init_weights([model], lambda name: init_rule(config, name), 0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5, generator=generator))
            elif "tok" not in name:
                parameter.mul_(6)
    return model


def built_on_meta(config: DecoderConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config, 8)


def config_of(**values: object) -> DecoderConfig:
    config = model_config_of(ModelConfig(name="qwen3", **values), found := Findings())  # type: ignore[arg-type]
    assert not found.problems, found.problems
    assert config is not None
    return config


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))


# ---- the math --------------------------------------------------------------------------------------------------------


def reference(weights: Mapping[str, Tensor], config: DecoderConfig, tokens: Tensor, positions: Tensor) -> Tensor:
    """Logits of one sequence, head by head and position by position, in double precision.

    Nothing of the package is used. A query at s sees the keys t <= s with no start of a document in (t, s].
    """
    w = {name: weight.detach().double() for name, weight in weights.items()}
    half = config.head_dim // 2
    frequencies = torch.tensor([1e6 ** (-2 * i / config.head_dim) for i in range(half)], dtype=torch.float64)

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name]

    def rotated(x_SH: Tensor) -> Tensor:
        """x * cos + rotate_half(x) * sin, over tables as wide as the head, as the release writes it."""
        angles = positions[:, None].double() * torch.cat((frequencies, frequencies))
        turned = torch.cat((-x_SH[:, half:], x_SH[:, :half]), dim=-1)
        return x_SH * angles.cos() + turned * angles.sin()

    x = w["tok_embeddings.weight"][tokens]
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}"
        normed = rms(x, f"{prefix}.attention_norm.weight")
        heads = []
        for head in range(config.num_heads):
            kv_head = head * config.num_kv_heads // config.num_heads

            def project(name: str, which: int, x: Tensor = normed, prefix: str = prefix) -> Tensor:
                rows = slice(which * config.head_dim, (which + 1) * config.head_dim)
                return x @ w[f"{prefix}.attention.{name}.weight"][rows].T

            q = rotated(rms(project("wq", head), f"{prefix}.attention.q_norm.weight"))
            k = rotated(rms(project("wk", kv_head), f"{prefix}.attention.k_norm.weight"))
            v = project("wv", kv_head)
            attended = []
            for s in range(len(tokens)):
                start = max((t for t in range(s + 1) if positions[t] == 0), default=0)
                scores = k[start : s + 1] @ q[s] / config.head_dim**0.5
                attended.append(scores.softmax(0) @ v[start : s + 1])
            heads.append(torch.stack(attended))
        x = x + torch.cat(heads, dim=-1) @ w[f"{prefix}.attention.wo.weight"].T
        normed = rms(x, f"{prefix}.ffn_norm.weight")
        gate, up = (normed @ w[f"{prefix}.feed_forward.{name}.weight"].T for name in ("w1", "w3"))
        x = x + (gate * torch.sigmoid(gate) * up) @ w[f"{prefix}.feed_forward.w2.weight"].T
    head_weight = w["output.weight"] if "output.weight" in w else w["tok_embeddings.weight"]
    return rms(x, "norm.weight") @ head_weight.T


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_logits_are_those_of_the_plain_computation(num_kv_heads: int, masked: bool, tied: bool, tokens: Tensor) -> None:
    config = replace(CONFIG, num_kv_heads=num_kv_heads, tie_word_embeddings=tied)
    model = built(config)
    found = model(tokens, POSITIONS if masked else None)
    assert found.shape == (2, 16, 61)
    positions = POSITIONS[0] if masked else torch.arange(16)
    expected = torch.stack([reference(dict(model.named_parameters()), config, row, positions) for row in tokens])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_transformers(tied: bool, tokens: Tensor) -> None:
    """The implementation the released weights are made for; not a dependency, so mostly skipped."""
    transformers = pytest.importorskip("transformers")
    config = replace(CONFIG, tie_word_embeddings=tied)
    model = built(config)
    other = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            hidden_size=config.dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.hidden_dim,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=tied,
            attention_bias=False,
        )
    )
    hf_names = {
        **{"tok_embeddings": "embed_tokens", "norm": "norm", "output": "lm_head"},
        **{"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
        **{f"attention.w{letter}": f"self_attn.{letter}_proj" for letter in "qkvo"},
        **{f"attention.{norm}": f"self_attn.{norm}" for norm in ("q_norm", "k_norm")},
        **{f"feed_forward.{w}": f"mlp.{name}_proj" for w, name in (("w1", "gate"), ("w2", "down"), ("w3", "up"))},
    }
    weights = {}
    for name, weight in model.state_dict().items():
        parts = name.removesuffix(".weight").split(".")
        prefix, module = (".".join(parts[:2]) + ".", ".".join(parts[2:])) if parts[0] == "layers" else ("", parts[0])
        root = "" if module == "output" else "model."
        weights[f"{root}{prefix}{hf_names[module]}.weight"] = weight
    other.load_state_dict(weights)
    torch.testing.assert_close(model(tokens), other(tokens).logits, rtol=1e-4, atol=1e-4)


def test_rope_is_llamas_in_another_order_of_channels() -> None:
    """Channels i and i + H/2 here are llama's neighbours 2i and 2i + 1."""
    x = torch.randn(2, 16, 4, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_cache(CONFIG, 16)
    neighbours = torch.arange(16).view(2, 8).T.flatten()
    found = apply_rope(x, cos, sin)
    torch.testing.assert_close(found[..., neighbours], llama.apply_rope(x[..., neighbours], cos, sin))
    torch.testing.assert_close(found[:, 0], x[:, 0])
    assert not torch.allclose(found[:, 1:], x[:, 1:], atol=1e-2)
    assert apply_rope(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_attention_does_not_depend_on_the_length_of_queries_and_keys(tokens: Tensor) -> None:
    """The purpose of QK-norm: larger wq and wk do not sharpen attention."""
    model = built()
    before = model(tokens)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("wq.weight", "wk.weight")):
                parameter.mul_(10)
    torch.testing.assert_close(model(tokens), before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model.layers["0"].attention.q_norm.weight.mul_(2)
    assert not torch.allclose(model(tokens), before, atol=1e-2)


def test_masked_documents_are_documents_alone(tokens: Tensor) -> None:
    model = built()
    alone = torch.cat([model(piece) for piece in tokens.split([5, 1, 7, 3], dim=1)], dim=1)
    torch.testing.assert_close(model(tokens, POSITIONS), alone, rtol=1e-4, atol=1e-4)


def test_tied_weights_are_one_parameter_with_both_gradients(tokens: Tensor) -> None:
    """Also when the model has been on the meta device, which unties."""
    config = replace(CONFIG, tie_word_embeddings=True)
    with torch.device("meta"):
        tied = Decoder(config, 16)
    tied.to_empty(device="cpu")
    tied.materialized(CPU)
    init_weights([tied], lambda name: init_rule(config, name), 0)
    assert tied.output is not None
    assert tied.tok_embeddings is not None
    assert tied.output.weight is tied.tok_embeddings.weight
    assert "output.weight" not in dict(tied.named_parameters())
    untied = built()
    untied.load_state_dict(tied.state_dict())
    labels = tokens.roll(-1, dims=1).masked_fill(POSITIONS == 0, IGNORE_INDEX)
    losses = [model(tokens, POSITIONS, labels) for model in (tied, untied)]
    assert losses[0].shape == (1,)
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.sum().backward()
    weights = dict(untied.named_parameters())
    both = weights["tok_embeddings.weight"].grad + weights["output.weight"].grad  # type: ignore[operator]
    torch.testing.assert_close(tied.tok_embeddings.weight.grad, both, rtol=1e-4, atol=1e-5)


def test_a_config_that_forgets_the_norms_is_refused() -> None:
    """Its parameter count would not be the model's."""
    with pytest.raises(AssertionError, match="QK-norm"):
        built_on_meta(replace(CONFIG, qk_norm=False))


# ---- sizes -----------------------------------------------------------------------------------------------------------

SIZES = {
    # dim, layers, heads, hidden, tied, parameters, and billions of parameters without embedding and head
    "0.6B": (1024, 28, 16, 3072, True, 596_049_920, 0.44),
    "1.7B": (2048, 28, 16, 6144, True, 1_720_574_976, 1.41),
    "4B": (2560, 36, 32, 9728, True, 4_022_468_096, 3.63),
    "8B": (4096, 36, 32, 12288, False, 8_190_735_360, 6.95),
    "14B": (5120, 40, 40, 17408, False, 14_768_307_200, 13.21),
    "32B": (5120, 64, 64, 25600, False, 32_762_123_264, 31.21),
}
"""The model cards have 0.6B (0.44B), 1.7B (1.4B), 4.0B (3.6B), 8.2B (6.95B), 14.8B (13.2B) and 32.8B (31.2B)."""


@pytest.mark.parametrize("flavor", SIZES)
def test_flavors_are_those_of_the_release(flavor: str) -> None:
    config = config_of(flavor=flavor)
    dim, layers, heads, hidden, tied, params, inner = SIZES[flavor]
    assert (config.dim, config.num_layers, config.num_heads, config.hidden_dim) == (dim, layers, heads, hidden)
    assert (config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 128, 151936)
    assert (config.rope_theta, config.rope_scaling_factor, config.norm_eps) == (1e6, 1.0, 1e-6)
    assert (config.max_seq_len, config.qk_norm, config.tie_word_embeddings) == (40960, True, tied)
    assert config.num_params == params
    assert round((params - config.vocab_size * dim * (1 if tied else 2)) / 1e9, 2) == inner


def test_every_flavor_is_tested() -> None:
    assert FLAVORS.keys() == {*SIZES, "custom", "debugmodel"}


@pytest.mark.parametrize("flavor", [name for name in FLAVORS if name != "custom"])
@pytest.mark.parametrize("tied", [False, True])
def test_num_params_is_that_of_the_built_module(flavor: str, tied: bool) -> None:
    config = config_of(flavor=flavor, tie_word_embeddings=tied)
    model = built_on_meta(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_params
    assert sum(parameter.numel() for parameter in model.layers["0"].parameters()) == config.num_layer_params


def test_a_custom_size_from_the_command_line() -> None:
    argv = "--model.name qwen3 --model.flavor custom --model.dim 32 --model.n_layers 4 --model.n_heads 4"
    argv += " --model.n_kv_heads 2 --model.head_dim 16 --model.vocab_size 258"
    config = model_config_of(load_recipe(argv.split()).model, found := Findings())
    assert not found.problems
    assert config == DecoderConfig(
        dim=32,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        hidden_dim=256,
        vocab_size=258,
        norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling_factor=1.0,
        max_seq_len=40960,
        qk_norm=True,
    )
    model = built_on_meta(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_params
    assert config_of(flavor="8B", dim=2048).head_dim == 128, "the head's width does not follow the model's"


# ---- what the stages read --------------------------------------------------------------------------------------------


def test_names_are_torchtitans() -> None:
    expected = {"tok_embeddings.weight", "norm.weight", "output.weight"}
    for layer in range(2):
        attention = ("wq", "wk", "wv", "wo", "q_norm", "k_norm")
        expected |= {f"layers.{layer}.attention.{name}.weight" for name in attention}
        expected |= {f"layers.{layer}.feed_forward.{name}.weight" for name in ("w1", "w2", "w3")}
        expected |= {f"layers.{layer}.{name}.weight" for name in ("attention_norm", "ffn_norm")}
    assert set(built().state_dict()) == expected


def test_tensor_parallelism_has_a_word_for_every_parameter() -> None:
    model = built()
    plan = tensor_parallel_plan(model)
    owners = {name.removesuffix(".weight") for name, _ in model.named_parameters()}
    assert owners <= plan.keys()
    assert all(model.get_submodule(name) is not None for name in plan)
    by_head = {name for name, split in plan.items() if split is Split.HEADS}
    assert by_head == {f"layers.{layer}.attention.{norm}" for layer in (0, 1) for norm in ("q_norm", "k_norm")}
    del model.layers["0"]
    model.tok_embeddings = None
    assert not [name for name in tensor_parallel_plan(model) if name.startswith(("tok_embeddings", "layers.0"))]


@pytest.mark.parametrize("tied", [False, True])
def test_fsdp_units_hold_every_parameter_once_except_a_tied_embedding(tied: bool) -> None:
    model = built_on_meta(replace(CONFIG, tie_word_embeddings=tied))
    inside = [id(p) for unit in fsdp_units(model) for module in unit for p in module.parameters()]
    assert len(inside) == len(set(inside))
    left = {name for name, p in model.named_parameters() if id(p) not in inside}
    assert left == ({"tok_embeddings.weight", "norm.weight"} if tied else set())


def test_initial_weights() -> None:
    """Head norms start at one like all norms; projections start as llama's."""
    initial = {name: init_rule(CONFIG, name) for name, _ in built().named_parameters()}
    stds = {name: None if values is None else values.std for name, values in initial.items()}
    assert {name for name, std in stds.items() if std is None} == {name for name in stds if "norm" in name}
    assert stds["layers.1.attention.wk.weight"] == 0.02
    assert stds["layers.1.attention.wo.weight"] == 0.02 / 2
    assert stds["tok_embeddings.weight"] == 1.0
    tied = init_rule(replace(CONFIG, tie_word_embeddings=True), "tok_embeddings.weight")
    assert tied is not None
    assert tied.std == CONFIG.dim**-0.5
