"""The model's math, against its properties and independent computations."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from titan_growth.models.config import DecoderConfig
from titan_growth.models.decoder import cross_entropy_sum, rope_cache, rope_frequencies
from titan_growth.models.initialize import init_weights
from titan_growth.models.llama import Decoder, apply_rope, init_rule
from titan_growth.tools.labels import IGNORE_INDEX

CPU = torch.device("cpu")
CONFIG = DecoderConfig(
    dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48, vocab_size=61, rope_scaling_factor=1.0
)


def built(config: DecoderConfig, seq_len: int = 16, seed: int = 0) -> Decoder:
    model = Decoder(config, seq_len)
    model.materialized(CPU)
    init_weights([model], lambda name: init_rule(config, name), seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # larger than at the start, so that every term matters
            if "norm" not in name and "tok" not in name:
                parameter.mul_(4)
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))


# ---- rotary embeddings -----------------------------------------------------------------------------------------------


def test_rope_depends_on_distance_only() -> None:
    """<rope(q, m), rope(k, n)> is the same for every m - n."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 64, 1, 8), torch.randn(1, 64, 1, 8)
    q, k = q[:, :1].expand(-1, 64, -1, -1), k[:, :1].expand(-1, 64, -1, -1)
    cos, sin = rope_cache(CONFIG, 64)
    scores = apply_rope(q, cos, sin)[0, :, 0] @ apply_rope(k, cos, sin)[0, :, 0].T
    for distance in (-40, -1, 0, 1, 7, 40):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert scores.diagonal(1)[0] != scores.diagonal(2)[0]
    torch.testing.assert_close(scores[0, 0], (q[0, 0, 0] * k[0, 0, 0]).sum())


def test_rope_rotates_adjacent_pairs_as_complex_numbers() -> None:
    """Meta's formula: view_as_complex(pairs) * exp(i m theta)."""
    torch.manual_seed(0)
    x = torch.randn(2, 16, 4, 8, dtype=torch.float64)
    angles = torch.outer(torch.arange(16, dtype=torch.float64), 500000.0 ** (-torch.arange(0, 8, 2).double() / 8))
    rotation = torch.polar(torch.ones_like(angles), angles)
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotation[None, :, None]).flatten(-2)
    cos, sin = rope_cache(CONFIG, 16)
    torch.testing.assert_close(apply_rope(x.float(), cos, sin), expected.float(), rtol=1e-5, atol=1e-5)
    assert apply_rope(x.bfloat16(), cos, sin).dtype == torch.bfloat16


@pytest.mark.parametrize("head_dim", [64, 128])
def test_llama_3_1_scaling(head_dim: int) -> None:
    """Against Meta's loop over frequencies, in numpy and double precision."""
    config = replace(CONFIG, head_dim=head_dim, rope_scaling_factor=8.0)
    factor, low, high, original = 8.0, 1.0, 4.0, 8192
    expected = []
    for frequency in 1.0 / (500000.0 ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            expected.append(frequency)
        elif wavelength > original / low:
            expected.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            expected.append((1 - smooth) * frequency / factor + smooth * frequency)
    found = rope_frequencies(config).double().numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    plain = rope_frequencies(replace(config, rope_scaling_factor=1.0)).double().numpy()
    ratios = plain / found
    assert ratios[0] == 1.0
    np.testing.assert_allclose(ratios[-1], 8.0, rtol=1e-6)
    assert np.any((ratios > 1.01) & (ratios < 7.9)), "no frequency lies in the blended band"


def test_positions_shift_the_rotation(tokens: torch.Tensor) -> None:
    """The default is one document that starts at 0; each row may have its own positions."""
    model = built(CONFIG)
    plain = model(tokens)
    positions = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(model(tokens, positions), plain, rtol=1e-5, atol=1e-5)
    restarted = positions.clone()
    restarted[1, 5:] -= 5
    found = model(tokens, restarted)
    torch.testing.assert_close(found[0], plain[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1, :5], plain[1, :5], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[1, 5:], plain[1, 5:], atol=1e-2)


# ---- attention -------------------------------------------------------------------------------------------------------


def test_masked_documents_are_documents_alone(tokens: torch.Tensor) -> None:
    model = built(CONFIG)
    lengths = [5, 1, 7, 3]
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    packed = model(tokens, positions)
    alone = torch.cat([model(piece) for piece in tokens.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_a_row_that_starts_inside_a_document(tokens: torch.Tensor) -> None:
    """Positions that do not start at 0 form a document of their own, up to the next 0."""
    model = built(CONFIG)
    positions = torch.cat([torch.arange(3, 9), torch.arange(10)]).expand(2, -1)
    found = model(tokens, positions)
    torch.testing.assert_close(found[:, 6:], model(tokens[:, 6:]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:, :6], model(tokens[:, :6]), rtol=1e-4, atol=1e-4)  # rope is relative


@pytest.mark.parametrize("masked", [False, True])
def test_no_position_sees_the_future(masked: bool, tokens: torch.Tensor) -> None:
    model = built(CONFIG)
    positions = torch.arange(16).expand(2, -1) if masked else None
    before = model(tokens, positions)
    for cut in (1, 8, 15):
        changed = tokens.clone()
        changed[:, cut:] = (changed[:, cut:] + 1) % CONFIG.vocab_size
        after = model(changed, positions)
        torch.testing.assert_close(after[:, :cut], before[:, :cut], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(after[:, cut:], before[:, cut:], atol=1e-2)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_grouped_heads_are_repeated_heads(num_kv_heads: int, tokens: torch.Tensor) -> None:
    """GQA equals multi-head attention whose key and value heads are copies within each group."""
    grouped = built(replace(CONFIG, num_kv_heads=num_kv_heads))
    full = built(replace(CONFIG, num_kv_heads=4))
    state = grouped.state_dict()
    for name in list(state):
        if name.endswith(("wk.weight", "wv.weight")):
            heads = state[name].unflatten(0, (num_kv_heads, 8))
            state[name] = heads.repeat_interleave(4 // num_kv_heads, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(tokens), full(tokens), rtol=1e-4, atol=1e-4)


def test_a_block_by_hand(tokens: torch.Tensor) -> None:
    """The whole model written out with explicit softmax, SiLU and RMS."""
    config = replace(CONFIG, num_layers=1, num_kv_heads=4)
    model = built(config)
    w = dict(model.named_parameters())

    def rms(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]

    x = w["tok_embeddings.weight"][tokens]
    normed = rms(x, "layers.0.attention_norm.weight")
    q, k, v = (
        (normed @ w[f"layers.0.attention.{name}.weight"].T).view(2, 16, 4, 8).transpose(1, 2)
        for name in ("wq", "wk", "wv")
    )
    cos, sin = rope_cache(config, 16)
    q, k = (apply_rope(t.transpose(1, 2), cos, sin).transpose(1, 2) for t in (q, k))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(~torch.ones(16, 16).tril().bool(), -torch.inf)
    attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 16, 32)
    x = x + attended @ w["layers.0.attention.wo.weight"].T
    normed = rms(x, "layers.0.ffn_norm.weight")
    gate = normed @ w["layers.0.feed_forward.w1.weight"].T
    up = normed @ w["layers.0.feed_forward.w3.weight"].T
    x = x + (gate * torch.sigmoid(gate) * up) @ w["layers.0.feed_forward.w2.weight"].T
    expected = rms(x, "norm.weight") @ w["output.weight"].T
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-4)


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_with_labels_the_model_gives_the_sum_of_losses(tokens: torch.Tensor) -> None:
    """In nats, in float32, over the positions that have a label; document positions are respected."""
    model = built(CONFIG)
    positions = torch.cat([torch.arange(length) for length in (5, 11)]).expand(2, -1)
    labels = tokens.roll(-1, dims=1)
    labels[:, 4] = IGNORE_INDEX
    labels[1, 10:] = IGNORE_INDEX
    log_probabilities = model(tokens, positions).double().log_softmax(-1)
    wanted = [(row, place) for row in (0, 1) for place in range(16) if labels[row, place] != IGNORE_INDEX]
    assert len(wanted) == 15 + 9
    expected = -sum(log_probabilities[row, place, labels[row, place]] for row, place in wanted)
    found = model(tokens, positions, labels)
    assert found.shape == (1,)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-5)
    logits = model(tokens, positions).bfloat16()
    assert cross_entropy_sum(logits, labels).dtype == torch.float32
    assert cross_entropy_sum(logits, torch.full_like(labels, IGNORE_INDEX)).item() == 0.0


def test_tied_head_is_the_embedding(tokens: torch.Tensor) -> None:
    config = replace(CONFIG, tie_word_embeddings=True)
    with torch.device("meta"):
        model = Decoder(config, 16)
    model.to_empty(device="cpu")  # unties
    model.materialized(CPU)
    assert model.output is not None
    assert model.tok_embeddings is not None
    assert model.output.weight is model.tok_embeddings.weight
    assert "output.weight" not in dict(model.named_parameters())
    init_weights([model], lambda name: init_rule(config, name), 0)
    untied = built(CONFIG)
    untied.load_state_dict({**model.state_dict(), "output.weight": model.tok_embeddings.weight.detach().clone()})
    torch.testing.assert_close(model(tokens), untied(tokens))
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    F.cross_entropy(untied(tokens).flatten(0, 1), tokens.flatten()).backward()
    assert untied.tok_embeddings is not None
    assert untied.output is not None
    both = untied.tok_embeddings.weight.grad + untied.output.weight.grad  # type: ignore[operator]
    torch.testing.assert_close(model.tok_embeddings.weight.grad, both, rtol=1e-4, atol=1e-6)


def test_parts_compose_to_the_whole(tokens: torch.Tensor) -> None:
    """A pipeline part is the model with some modules set to None; names do not change."""
    whole, first, last = built(CONFIG), built(CONFIG), built(CONFIG)
    del first.layers["1"]
    first.norm = first.output = None
    del last.layers["0"]
    last.tok_embeddings = None
    names = {name for name, _ in whole.named_parameters()}
    assert {name for part in (first, last) for name, _ in part.named_parameters()} == names
    torch.testing.assert_close(last(first(tokens)), whole(tokens))


def test_a_longer_sequence_than_built_for_is_refused(tokens: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match="sequence of 16 tokens in a model built for 8"):
        built(CONFIG, seq_len=8)(tokens)


def test_rope_tables_stay_in_float32_and_out_of_checkpoints() -> None:
    """Also in a bfloat16 model: 3 digits of a cosine are too few."""
    with torch.device("meta"):
        model = Decoder(CONFIG, 16).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.materialized(CPU)
    cos, sin = rope_cache(CONFIG, 16)
    assert torch.equal(model.rope_cos, cos)
    assert torch.equal(model.rope_sin, sin)
    assert model.norm is not None
    assert model.norm.weight.dtype == torch.bfloat16
    assert not [name for name in model.state_dict() if "rope" in name]
    assert [name for name, _ in model.named_buffers()] == ["rope_cos", "rope_sin"]
