"""Packages that may be missing, and how to install them.

Every run needs the core: entry points call `require_core` before they import anything else. The others are extras,
checked where a recipe or command needs one, and never imported at module level.
"""

from __future__ import annotations

import importlib.util
import sys

from titan_growth.tools.errors import ConfigError, Problem

CORE = {
    "torch": "torch>=2.13,<2.16",
    "torchdata": "torchdata~=0.11.0",
    "tensorboard": "tensorboard>=2.16",
    "tomli": "tomli>=2.0",
    "tomli_w": "tomli-w>=1.0",
    "sentencepiece": "sentencepiece>=0.2",
    "tokenizers": "tokenizers>=0.20",
    "pydantic": "pydantic>=2.9,<3",
    "safetensors": "safetensors>=0.4.3",
    "numpy": "numpy>=1.26",
    "filelock": "filelock>=3.13",
    "tqdm": "tqdm>=4.66",
    "zstandard": "zstandard>=0.22",
}
"""Module -> its requirement in pyproject.toml."""

EXTRAS = {
    "matplotlib": "plot",
    "torchao": "float8",
    "datasets": "hub",
    "pyarrow": "hub",
    "fsspec": "remote",
    "upath": "remote",
    "wandb": "wandb",
    "s3fs": "s3",
    "gcsfs": "gs",
}
"""Module -> the extra of pyproject.toml that installs it."""

_NAMES = {"upath": "universal_pathlib", "tomli_w": "tomli-w"}
"""Module -> its package, where the names differ."""


def is_installed(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    if sys.modules.get(module) is not None:
        return True
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def install_line(module: str) -> str:
    """The command that installs an optional package."""
    return f"pip install 'titan_growth[{EXTRAS[module]}]'"


def missing_package(key: str, module: str, alternative: str = "") -> Problem | None:
    """The problem of a key that needs an optional package, or None when it is installed.

    Args:
        alternative: what to do instead, such as "set it to false".
    """
    if is_installed(module):
        return None
    message = f"needs the package {_NAMES.get(module, module)}, which is not installed"
    return Problem(key, message, f"Run {install_line(module)}" + (f", or {alternative}" if alternative else ""))


def require_core() -> None:
    """Ends the process with a message and status 2 when core packages are missing."""
    missing = [module for module in CORE if not is_installed(module)]
    if not missing:
        return
    names = ", ".join(_NAMES.get(module, module) for module in missing)
    verb = "is" if len(missing) == 1 else "are"
    requirements = " ".join(f"'{CORE[module]}'" for module in missing)
    hint = f"Run pip install {requirements}, or ./setup.sh train, which installs everything"
    print(f"error: {names} {verb} not installed for {sys.executable}. {hint}", file=sys.stderr)
    # Every rank prints it: torchrun may kill the others first.
    sys.exit(ConfigError.exit_status)
