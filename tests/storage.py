"""A small object store for tests: it speaks fsspec, keeps listings as stores' packages do, and can be made to fail."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

PROTOCOL = "bucket"
LEAST_PART_BYTES = 5 << 20
"""Of a part of an upload, as in S3."""


class BucketFileSystem(AbstractFileSystem):
    """Objects by key, with ETags and cached listings."""

    protocol = PROTOCOL
    objects: dict[str, bytes] = {}
    before_fetch: Callable[[str, int, int], None] = staticmethod(lambda path, start, end: None)
    """Called with path, first byte and end of each range that is asked for; raise here to fail."""
    lose_after: int | None = None
    """Ranges end here without an error, as if the connection had been closed."""
    num_fetched = 0

    @classmethod
    def reset(cls) -> None:
        """An empty store that works."""
        cls.objects, cls.lose_after, cls.num_fetched = {}, None, 0
        cls.before_fetch = staticmethod(lambda path, start, end: None)
        cls.clear_instance_cache()

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache.clear()

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path).strip("/")
        if path not in self.dircache:
            found: dict[str, dict[str, Any]] = {}
            for key, content in list(self.objects.items()):  # others write meanwhile
                if key == path:
                    found[key] = self._facts(key, content)
                elif key.startswith(f"{path}/"):
                    name, slash, _ = key[len(path) + 1 :].partition("/")
                    where = f"{path}/{name}"
                    found[where] = (
                        {"name": where, "size": 0, "type": "directory"} if slash else self._facts(key, content)
                    )
            if not found:
                raise FileNotFoundError(path)
            self.dircache[path] = list(found.values())
        return self.dircache[path] if detail else [facts["name"] for facts in self.dircache[path]]

    @staticmethod
    def _facts(key: str, content: bytes) -> dict[str, Any]:
        tag = hashlib.md5(content).hexdigest()
        return {"name": key, "size": len(content), "type": "file", "ETag": f'"{tag}"'}

    def rm_file(self, path: str) -> None:
        del self.objects[self._strip_protocol(path).strip("/")]
        self.invalidate_cache()

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        source, target = (self._strip_protocol(path).strip("/") for path in (path1, path2))
        self.objects[target] = self.objects[source]
        self.invalidate_cache()

    def rmdir(self, path: str) -> None:
        raise FileNotFoundError(path)  # there are no folders

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        if mode == "wb" and block_size is not None and block_size < LEAST_PART_BYTES:
            raise ValueError(f"Block size must be >= {LEAST_PART_BYTES} bytes")
        return _BucketFile(self, path, mode, block_size or 2**16, **options)


class _BucketFile(AbstractBufferedFile):
    def _initiate_upload(self) -> None:
        self._parts: list[bytes] = []

    def _upload_chunk(self, final: bool = False) -> bool:
        """An object is there when all of it is."""
        self._parts.append(self.buffer.getvalue())
        if final:
            BucketFileSystem.objects[self.path.strip("/")] = b"".join(self._parts)
            self.fs.invalidate_cache()
        return True

    def discard(self) -> None:
        self._parts = []

    def _fetch_range(self, start: int, end: int) -> bytes:
        BucketFileSystem.before_fetch(self.path, start, end)
        content = BucketFileSystem.objects[self.path][start:end]
        if BucketFileSystem.lose_after is not None:
            content = content[: max(0, BucketFileSystem.lose_after - start)]
        BucketFileSystem.num_fetched += len(content)
        return content


def register() -> None:
    """Makes bucket:// known to fsspec."""
    fsspec.register_implementation(PROTOCOL, BucketFileSystem, clobber=True)
