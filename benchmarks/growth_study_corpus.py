"""The text that the growth study reads: which packages, in which versions, with which content.

It is the text of an environment made by `./setup.sh test`, whose versions `constraints.txt` fixes. One package more
or less changes the tokens, so each end keeps the fingerprint of the tokens that it was trained on, and ends of two
corpora are not compared.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from benchmarks.arms import ROOT
from titan_growth.config.loader import load_recipe
from titan_growth.data.content import ContentHashes
from titan_growth.data.installed import SitePackagesCorpus, package_of
from titan_growth.data.storage import cache_root
from titan_growth.models.registry import vocab_size_of
from titan_growth.run.data import prepare_run_data

LISTING = ROOT / "benchmarks" / "results" / "growth_study_corpus.json"


def prepared_tokens(recipe_file: Path) -> str:
    """Prepares what the study reads, or finds it prepared: the fingerprint of the tokens, training and held out."""
    recipe = load_recipe(["--job.config_file", str(recipe_file)])
    found = prepare_run_data(recipe, vocab_size_of(recipe.model), progress=True).fingerprints()
    facts = [found[name] for name in ("corpus", "tokenizer", "validation")]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def packages() -> list[dict[str, Any]]:
    """Each package of the corpus, held out or not, with a hash of the names and hashes of its files."""
    corpus = SitePackagesCorpus()
    held_out = corpus.held_out_packages
    distributions = importlib.metadata.packages_distributions()
    files: dict[str, list[tuple[str, str]]] = {}
    for name, sha256 in corpus.contents(ContentHashes(cache_root(None))).items():
        files.setdefault(package_of(name), []).append((name, sha256))
    return [
        {
            "package": package,
            "versions": sorted({importlib.metadata.version(one) for one in distributions.get(package, [])}),
            "held_out": package in held_out,
            "num_files": len(found),
            "sha256": hashlib.sha256(json.dumps(found).encode()).hexdigest(),
        }
        for package, found in sorted(files.items())
    ]


def write_listing(tokens: str) -> None:
    """Writes the packages beside the results; `python -m benchmarks.growth_study --files` prints each file."""
    lines = ",\n".join(json.dumps(one) for one in packages())
    head = json.dumps({"tokens": tokens, "python": platform.python_version()})[1:-1]
    LISTING.write_text(f'{{{head}, "packages": [\n{lines}\n]}}\n', encoding="utf-8")


def print_files() -> None:
    """SHA-256 and name of every file that the corpus is made of, as `sha256sum` prints them."""
    for name, sha256 in SitePackagesCorpus().contents(ContentHashes(cache_root(None))).items():
        print(f"{sha256}  {name}")
