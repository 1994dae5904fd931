"""Paths and URLs: which is which, and the errors of unusable URLs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import fsspec.registry  # noqa: F401 (patched below)
import pytest
from upath import UPath

from titan_growth.tools.errors import LocationError, TitanGrowthError
from titan_growth.tools.location import is_remote, location


@pytest.mark.parametrize("text", ["a/b.txt", "/a/*.txt", "./a:b", "C:/a", "a:/b", "-://x", "", "a b://c"])
def test_a_path_stays_a_path(text: str) -> None:
    assert not is_remote(text)
    assert location(text) == Path(text)
    assert not is_remote(location(text))


def test_the_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert location("~/corpus") == tmp_path / "corpus"
    assert location("~nobody-here/corpus") == Path("~nobody-here/corpus")


@pytest.mark.parametrize("text", ["memory://bucket/a.txt", "file:///tmp/a.txt", "memory://b/*.txt"])
def test_a_url_becomes_a_upath(text: str) -> None:
    place = location(text)
    assert is_remote(text)
    assert is_remote(place)
    assert isinstance(place, UPath)
    assert not isinstance(place, Path)
    assert str(place) == text


@pytest.mark.parametrize("text", ["nope://bucket/a", "S3://bucket/a", "nope::file:///a"])
def test_an_unknown_scheme(text: str) -> None:
    with pytest.raises(LocationError, match=r"^\S+: unknown scheme '(nope|S3)'\. Use a path, or a URL of s3"):
        location(text)


@pytest.mark.parametrize(("scheme", "module", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gs")])
def test_a_missing_package_names_the_extra(
    scheme: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(TitanGrowthError) as caught:
        location(f"{scheme}://bucket/a")
    assert str(caught.value) == (
        f"{scheme}://bucket/a: {scheme}:// needs a package that is missing. "
        f"Install it: pip install 'titan_growth[{extra}]'"
    )
    assert caught.value.exit_status == 2


def test_other_missing_packages_are_named() -> None:
    if importlib.util.find_spec("adlfs") is not None:
        pytest.skip("adlfs is installed")
    with pytest.raises(LocationError, match=r"az:// needs a package that is missing\. Install it: pip .*adlfs"):
        location("az://c/a")


def test_paths_cost_no_import_of_the_storage_library() -> None:
    code = "import sys; from titan_growth.tools.location import location; location('a'); "
    code += "assert not {'fsspec', 'upath', 'torch'} & set(sys.modules)"
    root = str(Path(__file__).parents[3])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": root})
