"""Sizes that do not fit: the model, the batch, the ranks."""

from __future__ import annotations

from tests.recipes.bad_inputs import Case

_RAW_CUSTOM = b'[model]\nflavor = "custom"\ndim = 32\n'

CASES = [
    Case(
        "heads do not divide dim",
        r"model\.n_heads: 5 heads do not divide model\.dim = 32",
        toml="[model]\nn_heads = 5\nn_kv_heads = 5",
    ),
    Case(
        "kv heads do not divide heads",
        r"model\.n_kv_heads: 3 key/value heads do not divide",
        toml="[model]\nn_kv_heads = 3",
    ),
    Case("odd head_dim", r"model\.head_dim: 7 is odd", toml="[model]\nhead_dim = 7"),
    Case(
        "odd derived head_dim",
        r"model\.head_dim: 1 \(model\.dim / model\.n_heads\) is odd",
        toml="[model]\nn_heads = 32\nn_kv_heads = 32",
    ),
    Case(
        "unknown flavor",
        r"model\.flavor: unknown flavor '8b'; known: .*Did you mean '8B'",
        toml='[model]\nflavor = "8b"',
    ),
    Case(
        "unknown family",
        r"model\.name: unknown model family 'lama3'.*Did you mean 'llama3'",
        toml='[model]\nname = "lama3"',
    ),
    Case(
        "custom flavor without sizes",
        r"(?s)model\.n_layers: is missing.*model\.vocab_size: is missing",
        raw=_RAW_CUSTOM,
    ),
    Case(
        "hidden_dim and multiple_of",
        r"model\.multiple_of: conflicts with model\.hidden_dim",
        toml="[model]\nhidden_dim = 64\nmultiple_of = 32",
    ),
    Case(
        "seq_len beyond the model",
        r"training\.seq_len: 32 is more than model\.max_seq_len = 16",
        toml="[model]\nmax_seq_len = 16",
    ),
    Case("dim 0", r"model\.dim: must be at least 1, got 0", toml="[model]\ndim = 0"),
    Case("rope factors", r"model\.rope_low_freq_factor: must be less than", toml="[model]\nrope_low_freq_factor = 5.0"),
    Case(
        "model larger than memory",
        r"a checkpoint \(weights and moments\) needs \d+\.\d+ GiB, but only .* are free",
        toml="[model]\ndim = 262144\nn_layers = 1000\nn_heads = 64\nn_kv_heads = 64",
    ),
    Case(
        "batch not a multiple of local",
        r"global_batch_size: 9 is not a multiple of training\.local_batch_size 2",
        toml="[training]\nglobal_batch_size = 9",
    ),
    Case(
        "batch 0",
        r"global_batch_size: must be -1 \(derive it\) or at least 1",
        toml="[training]\nglobal_batch_size = 0",
    ),
    Case(
        "batch not a multiple of the ranks",
        r"global_batch_size: 8 is not a multiple of .* x data-parallel degree 3 = 6",
        environ={"NGPU": "3"},
    ),
    Case(
        "shard degree 0",
        r"data_parallel_shard_degree: must be -1 .* got 0",
        toml="[parallelism]\ndata_parallel_shard_degree = 0",
    ),
    Case(
        "shard degree beyond the ranks",
        r"dp_replicate 1 x dp_shard 4 = 4, but there is 1 rank.*NGPU",
        toml="[parallelism]\ndata_parallel_shard_degree = 4",
    ),
    Case(
        "replicate degree does not divide",
        r"data_parallel_replicate_degree: 2 does not divide the 3 ranks",
        toml="[parallelism]\ndata_parallel_replicate_degree = 2",
        environ={"NGPU": "3"},
    ),
]
