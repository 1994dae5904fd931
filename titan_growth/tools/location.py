"""Paths and URLs in recipes.

Keys that say so take URLs (`s3://bucket/corpus`, `gs://...`, `memory://...`, `file:///...`). A path becomes a
`pathlib.Path`, a URL a `UPath`, which has the same methods but is not a `pathlib.Path`. Nothing is looked up here.
Credentials and endpoints do not belong in a recipe: every fsspec package reads its own environment variables and files.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, cast

from titan_growth.tools.errors import LocationError
from titan_growth.tools.packages import install_line, missing_package

if TYPE_CHECKING:
    from upath import UPath

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(://|::)")
_MODULES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
"""Scheme -> its package, where an extra installs it."""


def is_remote(place: str | Path | UPath) -> bool:
    """Whether a place is a URL (`scheme://...`, file:// included) instead of a path."""
    if isinstance(place, str):
        return _URL.match(place) is not None
    return not isinstance(place, Path)


def local_path(text: str | Path) -> Path:
    """A path, with ~ expanded. A ~ without a home stays, and names nothing: Path.expanduser would fail."""
    return Path(os.path.expanduser(text))


def location(text: str) -> Path | UPath:
    """A Path, with ~ expanded, or for a URL a UPath. Raises LocationError when the URL cannot be used."""
    match = _URL.match(text)
    if match is None:
        return local_path(text)
    scheme = match[1]
    for module in ("fsspec", "upath"):
        if problem := missing_package("", module):
            raise LocationError(f"{text}: {problem.message}", problem.hint)
    # Imported here: recipes without URLs must not pay for it.
    import fsspec
    from upath import UPath

    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        message = f"{text}: {scheme}:// needs a package that is missing"
        raise LocationError(message, _how_to_install(scheme)) from error
    except ValueError as error:
        message = f"{text}: unknown scheme {scheme!r}"
        raise LocationError(message, "Use a path, or a URL of s3, gs, file or memory") from error
    usual = f"Write {scheme}://BUCKET/PATH"
    try:
        place = UPath(text)
        named = place.path
    except ValueError as error:
        raise LocationError(f"{text}: not a usable URL ({error})", usual) from error
    if not named:
        raise LocationError(f"{text}: names no bucket", usual)
    return place


def folder_at(text: str) -> Path:
    """The folder that a text names: a Path, or a UPath, which has the same methods. Raises as `location` does.

    `file://` is a path here: a disk has renames and fsync.
    """
    place = location(text)
    if isinstance(place, Path):
        return place
    return Path(place.path) if place.protocol in ("file", "local") else cast(Path, place)


def same_place(one: Path, other: Path | None) -> bool:
    """Whether two places are the same, links and relative paths resolved. None is no place."""
    if other is None:
        return False
    if is_remote(one) or is_remote(other):
        return str(one) == str(other)
    return one.resolve() == other.resolve()


def _how_to_install(scheme: str) -> str:
    from fsspec.registry import known_implementations

    if scheme in _MODULES:
        return f"Install it: {install_line(_MODULES[scheme])}"
    known = known_implementations.get(scheme, {})
    package = known.get("class", "").split(".")[0]
    if package and package != "fsspec":
        return f"Install it: pip install {package}"
    return f"Install what fsspec asks for: {known.get('err', 'see its documentation')}"
