"""Hugging Face folders that are damaged, inconsistent or unsupported are refused in one line.

Every case changes one thing about a valid folder. None may import, start a run, or leave anything behind, and no code
of a folder is ever run.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.hugging_face import edit_config
from titan_growth.commands.import_ import main as import_main
from titan_growth.interchange.safetensors_file import read_header, write_file
from titan_growth.tools.errors import CheckpointError

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 16,
}
LAYER = {
    "input_layernorm": (8,),
    "post_attention_layernorm": (8,),
    **{f"self_attn.{name}_proj": (8, 8) for name in "qkvo"},
    "mlp.gate_proj": (12, 8),
    "mlp.up_proj": (12, 8),
    "mlp.down_proj": (8, 12),
}
SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    "model.norm.weight": (8,),
    "lm_head.weight": (16, 8),
    **{f"model.layers.0.{name}.weight": shape for name, shape in LAYER.items()},
}
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"

Change = Callable[[Path], None]


def good(path: Path) -> Path:
    """A folder of two files, without transformers."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    tensors = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    names = sorted(tensors)
    parts = (names[:6], names[6:])
    for file, part in zip(FILES, parts, strict=True):
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in zip(FILES, parts, strict=True) for name in part}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def config(**values: Any) -> Change:
    return lambda path: edit_config(path, **values)


def index(change: Callable[[dict[str, str]], Any]) -> Change:
    def edit(path: Path) -> None:
        table = json.loads((path / INDEX).read_text())
        change(table["weight_map"])
        (path / INDEX).write_text(json.dumps(table))

    return edit


def header(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Rewrites the header of the first file; its data stays unchanged."""

    def edit(path: Path) -> None:
        data = (path / FILES[0]).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        table = json.loads(data[8 : 8 + length])
        change(table)
        text = json.dumps(table).encode()
        (path / FILES[0]).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return edit


def write(name: str, data: bytes) -> Change:
    return lambda path: (path / name).write_bytes(data) and None


def weights(**tensors: torch.Tensor) -> Change:
    """Puts more tensors into the first file; __ stands for a dot."""

    def edit(path: Path) -> None:
        from safetensors.torch import load_file

        more = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        save_file({**load_file(path / FILES[0]), **more}, path / FILES[0], metadata={"format": "pt"})
        index(lambda table: table.update(dict.fromkeys(more, FILES[0])))(path)

    return edit


def pickled(path: Path) -> None:
    for name in (*FILES, INDEX):
        (path / name).unlink()
    (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")


def linked(path: Path) -> None:
    (path.parent / "secret.json").write_text("{}")
    os.symlink(path.parent / "secret.json", path / "tokenizer_config.json")


def set_in(name: str, **values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda table: table[name].update(values)


E, N = "lm_head.weight", "model.norm.weight"
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

CASES: dict[str, tuple[Change, str]] = {
    "index leaves the folder": (index(lambda t: t.update({E: "../model.safetensors"})), "names the file '../model"),
    "index names an absolute path": (index(lambda t: t.update({E: "/etc/passwd"})), "names the file '/etc/passwd'"),
    "index names another kind": (index(lambda t: t.update({E: "x.bin"})), "names the file 'x.bin'"),
    "index names a missing file": (index(lambda t: t.update({E: "x.safetensors"})), "it has no x.safetensors, which"),
    "index contradicts": (index(lambda t: t.update({N: FILES[0], E: FILES[1]})), "lm_head.weight is in model-00001"),
    "index lacks a tensor": (
        index(lambda t: t.pop(E)),
        "lm_head.weight is in model-00001-of-00002.safetensors, but its model.safetensors.index.json does not list it",
    ),
    "index has too much": (index(lambda t: t.update({"x": FILES[0]})), "has no x, which its model.safetensors.index"),
    "index is no JSON": (write(INDEX, b"{"), f"its {INDEX} is not valid JSON"),
    "index has no map": (write(INDEX, b'{"weight_map": [1]}'), f"its {INDEX} has no weight_map"),
    "index maps to numbers": (index(lambda t: t.update({E: 3})), f"its {INDEX} has no weight_map"),
    "index names a key twice": (write(INDEX, b'{"weight_map": {"a": "b", "a": "c"}}'), "names a key twice"),
    "file cut short": (lambda p: os.truncate(p / FILES[0], 600), "is not a valid safetensors file"),
    "file empty": (write(FILES[0], b""), "a header of 0 bytes in a file of 0"),
    "header huge": (write(FILES[0], struct.pack("<Q", 2**63) + b"{}"), "a header of 9,223,372,036,854,775,808 bytes"),
    "header no JSON": (write(FILES[0], struct.pack("<Q", 4) + b"abcd"), "is not valid JSON"),
    "header deep": (write(FILES[0], struct.pack("<Q", 200_000) + b"[" * 200_000), "is not valid JSON"),
    "header a list": (write(FILES[0], struct.pack("<Q", 2) + b"[]"), "is not a JSON object"),
    "offsets overlap": (header(lambda t: t["model.embed_tokens.weight"].update(t[E])), "overlaps another tensor"),
    "offsets beyond the file": (header(set_in(E, data_offsets=[10**6, 10**6 + 512])), "leaves a gap before it"),
    "offsets backwards": (header(set_in(E, data_offsets=[512, 0])), "which do not fit"),
    "offsets negative": (header(set_in(E, data_offsets=[-512, 0])), "an invalid shape or invalid offsets"),
    "offsets of text": (header(set_in(E, data_offsets=["0", "512"])), "an invalid shape or invalid offsets"),
    "shape absurd": (header(set_in(E, shape=[2**40, 2**40])), "which do not fit"),
    "shape of booleans": (header(set_in(E, shape=[True, 128])), "an invalid shape or invalid offsets"),
    "shape of many dims": (header(set_in(E, shape=[1] * 1000)), "which do not fit"),
    "shape another": (header(set_in(E, shape=[8, 16])), "lm_head.weight is 8 x 16, but its config.json says 16 x 8"),
    "type unknown": (header(set_in(E, dtype="F4")), "has the unknown dtype 'F4'"),
    "type quantised": (
        weights(model__layers__0__input_layernorm__weight=torch.ones(8, dtype=torch.int8)),
        "is stored as torch.int8, which is quantised",
    ),
    "entry no table": (header(lambda t: t.update({E: 3})), "has no entry"),
    "config no JSON": (write("config.json", b"nonsense"), "its config.json is not valid JSON"),
    "config not UTF-8": (write("config.json", b"\xff\xfe"), "its config.json is not valid JSON"),
    "config of another kind": (config(model_type="gpt2"), "the model_type 'gpt2'; known: llama, qwen3"),
    "config without a kind": (config(model_type=None), "the model_type None"),
    "config with a list for a kind": (config(model_type=["llama"]), "the model_type ['llama']"),
    "classifier": (config(architectures=["LlamaForSequenceClassification"]), "its architecture is ['LlamaForSeq"),
    "quantised": (config(quantization_config={"quant_method": "gptq"}), "it is quantised"),
    "activation": (config(hidden_act="gelu"), "hidden_act = 'gelu'; only 'silu'"),
    "attention bias": (config(attention_bias=True), "attention_bias = True; only False"),
    "mlp bias": (config(mlp_bias=True), "mlp_bias = True; only False"),
    "sliding": (config(layer_types=["sliding_attention"]), "not all of its layers have full attention"),
    "rope linear": (config(rope_scaling={"type": "linear", "factor": 2.0}), "scaled by 'linear'; known: default, ll"),
    "rope yarn": (config(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "scaled by 'yarn'"),
    "rope incomplete": (config(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "have no low_freq_factor"),
    "rope unknown key": (config(rope_scaling={**ROPE, "beta": 1}), "have the unknown key 'beta'"),
    "rope by layer": (config(rope_parameters={"full_attention": ROPE}), "not those of one model"),
    "rope no table": (config(rope_scaling="llama3"), "not those of one model"),
    "rope partial": (config(partial_rotary_factor=0.5), "only a part of each head is rotated"),
    "rope factors swapped": (config(rope_scaling={**ROPE, "low_freq_factor": 9.0}), "must be less than"),
    "size missing": (config(hidden_size=None), "its config.json has no hidden_size"),
    "size of text": (config(hidden_size="8"), "is not valid (dim: "),
    "size negative": (config(num_hidden_layers=-1), "is not valid (n_layers: "),
    "size beyond 64 bits": (config(vocab_size=10**30), "is not valid (vocab_size: "),
    "layers absurd": (config(num_hidden_layers=10**12), "has 1,000,000,000,000 layers, its files 12 tensors"),
    "width absurd": (config(hidden_size=2**40), "its config.json says"),
    "vocabulary absurd": (config(vocab_size=2**50), "its config.json says"),
    "heads do not divide": (config(num_attention_heads=3), "does not describe a valid model"),
    "epsilon not finite": (config(rms_norm_eps=float("inf")), "is not valid (norm_eps: "),
    "more layers than there are": (config(num_hidden_layers=2), "it has no model.layers.1.input_layernorm.weight"),
    "nothing": (lambda path: None, ""),
    "bias in the files": (
        weights(model__layers__0__self_attn__q_proj__bias=torch.ones(8)),
        "q_proj.bias, which the",
    ),
    "name of many lines": (
        index(lambda t: t.update({"a\nerror: b\x1b[2J": FILES[0]})),
        "model-00001-of-00002.safetensors has no 'a\\nerror: b\\x1b[2J', which",
    ),
    "name of half a character": (index(lambda t: t.update({"a\ud800": FILES[0]})), "has no 'a\\ud800', which"),
    "file name of half a character": (index(lambda t: t.update({E: "\ud800.safetensors"})), "file '\\ud800.safe"),
    "header name of many lines": (header(lambda t: t.update({"a\nb": t.pop(E)})), "'a\\nb' is in model-00001"),
    "kind of many lines": (config(model_type="a\nb"), "model_type 'a\\nb'; known"),
    "pickled weights": (pickled, "its weights are pickled (pytorch_model.bin)"),
    "no weights": (
        lambda p: [(p / name).unlink() for name in (*FILES, INDEX)] and None,
        "it has neither model.safeten",
    ),
    "no config": (lambda p: (p / "config.json").unlink(), "it has no config.json"),
    "tokenizer leads out": (linked, "its tokenizer_config.json is a link that leads out of it"),
    "tokenizer no JSON": (write("tokenizer.json", b"x"), "its tokenizer.json is not valid JSON"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_written(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = CASES[case]
    monkeypatch.chdir(tmp_path)
    folder = good(tmp_path / "llama")
    change(folder)
    status = import_main(["--from", str(folder), "--to", str(tmp_path / "step-0")])
    out = capsys.readouterr().out
    if not message:
        assert status == 0, out
        return
    assert status == 1, out
    assert out.startswith("error: llama refused: ")
    assert out.count("\n") == 1
    assert message in out
    assert not (tmp_path / "step-0").exists()
    assert not (tmp_path / "ran").exists()


def test_a_single_file_comes_before_an_index(tmp_path: Path) -> None:
    """As in transformers. Old buffers that follow from config.json are ignored."""
    folder = good(tmp_path / "llama")
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert import_main(["--from", str(folder), "--to", str(tmp_path / "step-0")]) == 0
    from tests.hugging_face import stored

    assert stored(tmp_path / "step-0")["norm.weight"].abs().sum() == 0


def test_links_of_a_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    """snapshots/<commit>/NAME leads to blobs/<hash>."""
    (tmp_path / "models--x" / "snapshots").mkdir(parents=True)
    (tmp_path / "models--x" / "blobs").mkdir()
    folder = good(tmp_path / "models--x" / "snapshots" / "0123")
    (folder / "tokenizer_config.json").write_text("{}")
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(tmp_path / "models--x" / "blobs" / str(number))
        os.symlink(f"../../blobs/{number}", file)
    assert import_main(["--from", str(folder), "--to", str(tmp_path / "step-0")]) == 0
    assert not any(path.is_symlink() for path in (tmp_path / "step-0").iterdir())
    assert (tmp_path / "step-0" / "tokenizer_config.json").read_text() == "{}"


def test_what_is_written_the_library_reads(tmp_path: Path) -> None:
    """Types of several widths, an empty tensor, a scalar."""
    from safetensors.torch import load_file

    tensors = {
        "half": torch.arange(3).half(),
        "wide": torch.arange(5).double(),
        "brain": torch.randn(2, 3).bfloat16(),
        "none": torch.empty(0, 4),
        "one": torch.tensor(7.0),
    }
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_file(tmp_path / "x.safetensors", shapes, tensors.__getitem__)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    ours = read_header(tmp_path / "x.safetensors")
    assert {name: (one.dtype, one.shape) for name, one in ours.items()} == shapes
    assert all(one.begin % one.dtype.itemsize == 0 for one in ours.values())
    os.truncate(tmp_path / "x.safetensors", (tmp_path / "x.safetensors").stat().st_size - 1)
    with pytest.raises(CheckpointError, match="its tensors end at byte"):
        read_header(tmp_path / "x.safetensors")
