"""Resuming what cannot be resumed, and starting from what is not a checkpoint."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from contextlib import ExitStack
from pathlib import Path

from tests.recipes.bad_data import TEXT, small_tokenizer, writes
from tests.recipes.bad_inputs import Case, Setup
from tests.runs import WORDS

CHECKPOINTS = "run/checkpoint"


class _Hostile:
    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (open, ("pwned", "w"))


def _hostile(folder: Path, _: ExitStack) -> None:
    (folder / "stranger").mkdir()
    (folder / "stranger/.metadata").write_bytes(pickle.dumps(_Hostile()))


def damaged(*names: str, how: str = "truncate") -> Setup:
    """Damages files of the run's checkpoints."""

    def setup(folder: Path, _: ExitStack) -> None:
        for name in names:
            path = folder / CHECKPOINTS / name
            content = path.read_bytes()
            if how == "truncate":
                path.write_bytes(content[: len(content) // 2])
            elif how == "flip":
                middle = len(content) // 2
                path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
            else:
                path.unlink()

    return setup


def _bad_manifest(text: str) -> Setup:
    def setup(folder: Path, _: ExitStack) -> None:
        for step in (2, 4):
            (folder / CHECKPOINTS / f"step-{step}/manifest.json").write_text(text)

    return setup


def _stranger(folder: Path, _: ExitStack) -> None:
    """A checkpoint to start from: the existing run's, which then counts as another program's."""
    shutil.move(folder / "run", folder / "other")


def _other_corpus(folder: Path, _: ExitStack) -> None:
    generator = random.Random(1)
    (folder / "corpus.txt").write_text(" ".join(generator.choice(WORDS) for _ in range(4000)))


def _twin_corpus(folder: Path, _: ExitStack) -> None:
    """Another text of the same size under the same time."""
    path = folder / "corpus.txt"
    status = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _plain(folder: Path, _: ExitStack) -> None:
    (folder / "plain").mkdir()


SHARDS = ("step-2/__0_0.distcp", "step-4/__0_0.distcp")
FROM = "--checkpoint.initial_load_path"
OTHER = "other/checkpoint/step-4"

RESUME = [
    Case(
        "resume: other width",
        r"model \(dim\): step-4 was written with 32, .* says 64\. Name another",
        flags="--model.dim 64",
        resumes=True,
    ),
    Case(
        "resume: other depth",
        r"model \(num_layers\): step-4 was written with 4, .* says 8",
        flags="--model.n_layers 8",
        resumes=True,
    ),
    Case(
        "resume: other seed",
        r"debug\.seed: step-4 was written with 7, the recipe says 8",
        flags="--debug.seed 8",
        resumes=True,
    ),
    Case(
        "resume: other seq_len",
        r"training\.seq_len: step-4 was written with 32, .* says 64",
        flags="--training.seq_len 64",
        resumes=True,
    ),
    Case(
        "resume: other optimizer",
        r'optimizer\.name: step-4 was written with "AdamW"',
        flags="--optimizer.name Adam",
        resumes=True,
    ),
    Case(
        "resume: other start of growth",
        r"growth\.stages: step-4 has 4 layers, .* do not lead to its model",
        toml='[[growth.stages]]\nat = "5 steps"\nfactor = 2',
        resumes=True,
    ),
    Case(
        "resume: other data",
        r"training\.dataset: step-4 was trained with another corpus .*Use that again",
        setup=_other_corpus,
        resumes=True,
    ),
    Case(
        "resume: other data of equal size and time",
        r"training\.dataset: step-4 was trained with another corpus .*Use that again",
        setup=_twin_corpus,
        resumes=True,
    ),
    Case(
        "resume: other corpus",
        r"training\.dataset: step-4 was trained with another corpus",
        flags="--training.dataset_path b.txt",
        setup=writes("b.txt", TEXT.encode()),
        resumes=True,
    ),
    Case(
        "resume: other tokenizer",
        r"data\.tokenizer: step-4 was trained with another tokenizer",
        flags="--data.tokenizer huggingface --data.tokenizer_path a.json --data.bos true",
        setup=writes("a.json", small_tokenizer),
        resumes=True,
    ),
    Case(
        "resume: no such step",
        r"checkpoint\.load_step: there is no usable step-3 in",
        flags="--checkpoint.load_step 3",
        resumes=True,
    ),
    Case(
        "resume: step damaged",
        r"no usable step-2 .*__0_0\.distcp has .* bytes instead of",
        flags="--checkpoint.load_step 2",
        setup=damaged(SHARDS[0]),
        resumes=True,
    ),
]

DAMAGE = [
    Case(
        "all shards truncated",
        r"step-4 refused: __0_0\.distcp has .* bytes instead of .*another job\.dump_folder",
        setup=damaged(*SHARDS),
        resumes=True,
    ),
    Case(
        "all shards with one flipped bit",
        r"none can be used: step-4 refused: __0_0\.distcp does not match its checksum",
        setup=damaged(*SHARDS, how="flip"),
        resumes=True,  # of checkpoints this small the preflight reads every byte
    ),
    Case(
        "all shards missing",
        r"step-4 refused: __0_0\.distcp is missing",
        setup=damaged(*SHARDS, how="remove"),
        resumes=True,
    ),
    Case(
        "manifests not JSON",
        r"step-4 refused: manifest\.json is not valid",
        setup=_bad_manifest("{ nonsense }\n"),
        resumes=True,
    ),
    Case(
        "manifests of another kind",
        r"step-4 refused: manifest\.json is not valid",
        setup=_bad_manifest('["a"]{}\n'),
        resumes=True,
    ),
    Case(
        "manifests empty objects",
        r"step-4 refused: manifest\.json is not valid",
        setup=_bad_manifest("{}\n"),
        resumes=True,
    ),
    Case(
        "stored recipe flipped",
        r"step-4 refused: recipe\.toml does not match its checksum",
        flags="--checkpoint.load_step 4",
        setup=damaged("step-4/recipe.toml", how="flip"),
        resumes=True,
    ),
    Case(
        "stored lineage flipped",
        r"step-4 refused: lineage\.json does not match its checksum",
        flags="--checkpoint.load_step 4",
        setup=damaged("step-4/lineage.json", how="flip"),
        resumes=True,
    ),
]

BACK = dict(resumes=True, status=0, trains=True, goes_on=True, keeps="checkpoint/step-2")
FALLBACK = [
    Case(
        "newest checkpoint truncated",
        r"(?s)step-4 refused: __0_0\.distcp has .*resumed from \S+step-2",
        setup=damaged(SHARDS[1]),
        **BACK,
    ),
    Case(
        "newest checkpoint with a flipped bit",
        r"(?s)step-4 refused: .* checksum.*resumed from \S+step-2",
        setup=damaged(SHARDS[1], how="flip"),
        **BACK,
    ),
    Case(
        "newest recipe with a flipped bit",
        r"(?s)step-4 refused: recipe\.toml.*resumed from \S+step-2",
        setup=damaged("step-4/recipe.toml", how="flip"),
        **BACK,
    ),
    Case(
        "newest checkpoint without a manifest",
        r"resumed from \S+step-2",
        setup=damaged("step-4/manifest.json", how="remove"),
        **BACK,
    ),
]

INITIAL = [
    Case(
        "initial checkpoint missing", r"checkpoint\.initial_load_path nowhere: no such folder", flags=f"{FROM} nowhere"
    ),
    Case(
        "initial checkpoint is a plain folder",
        r"plain: is not a checkpoint \(it has no \.metadata\)",
        flags=f"{FROM} plain",
        setup=_plain,
    ),
    Case(
        "initial checkpoint is a run folder",
        r"other: is not a checkpoint.*step-N",
        flags=f"{FROM} other",
        setup=_stranger,
        resumes=True,
    ),
    Case(
        "initial checkpoint hostile",
        r"stranger refused: its metadata asks for \w+\.open",
        flags=f"{FROM} stranger",
        setup=_hostile,
    ),
    Case(
        "initial checkpoint nonsense",
        r"stranger refused: .*(invalid load key|cannot be read|not)",
        flags=f"{FROM} stranger",
        setup=writes("stranger/.metadata", b"\x00nonsense"),
    ),
    Case(
        "initial checkpoint of another width",
        r"step-4 refused: it is of another model: .* is 258 x 32 there and 258 x 64 here",
        flags=f"{FROM} {OTHER} --model.dim 64",
        setup=_stranger,
        resumes=True,
    ),
    Case(
        "initial checkpoint of another depth",
        r"step-4 refused: it is of another model: has no layers\.4",
        flags=f"{FROM} {OTHER} --model.n_layers 8",
        setup=_stranger,
        resumes=True,
    ),
    Case(
        "initial state without a manifest",
        r"has no manifest, so its counters are not known",
        flags=f"{FROM} {OTHER} --checkpoint.initial_load_model_only false",
        setup=lambda folder, stack: (_stranger(folder, stack), (folder / OTHER / "manifest.json").unlink()),
        resumes=True,
    ),
]

CASES = RESUME + DAMAGE + FALLBACK + INITIAL
