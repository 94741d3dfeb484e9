"""The files of a folder in an object store, each uploaded whole; this machine's cache has copies of some."""

import contextlib
import hashlib
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from pipeline.errors import StepError
from pipeline.workspace.cache import Cached, Version, cached_path, has_copy, keep, lookup, temporary_file
from pipeline.workspace.disk import translate_os_errors
from pipeline.workspace.hashing import checksum_of_writing, sha256_of
from pipeline.workspace.objects import ObjectStore, stamp_of
from pipeline.workspace.ranged_file import RangedFile

Json = dict[str, Any]

_BLOCK_BYTES = 8 << 20
_SMALL_BYTES = 1 << 20  # fetched whole in the time of one request


class _GoneError(Exception):
    """The store has no such file any more."""


class StoredFiles:
    """The files of a folder in an object store, by their path in it; ``Folder`` says what each method does.

    Args:
        uri: The folder.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._store = ObjectStore(uri)
        self._base = self._store.path

    @contextlib.contextmanager
    def write(self, name: str, note: Callable[[Json], None]) -> Generator[Path]:
        """A path to write a file to, which is uploaded at the end of the block; ``note`` gets what it is.

        It moves into the cache, so that this machine neither fetches nor reads it again.
        """
        with (
            temporary_file(Path(name).name) as temporary,
            checksum_of_writing(temporary) as checksum,
            translate_os_errors(f"{self._uri}/{name}"),
        ):
            yield temporary
            num_bytes = temporary.stat().st_size
            sha256 = checksum(num_bytes) or sha256_of(temporary)
            self._store.put_file(str(temporary), f"{self._base}/{name}")
            note({"bytes": num_bytes, "sha256": sha256})
            version = self._version(name)
            if version is None:
                raise StepError(f"{self._uri}/{name}: is gone since its upload; another process removes files here")
            if version.num_bytes == num_bytes:  # else somebody has replaced it already
                keep(f"{self._uri}/{name}", temporary, Cached(version, sha256))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Upload a small file."""
        self._store.pipe_file(f"{self._base}/{name}", data)

    def create(self, name: str, data: bytes) -> bool:
        """Upload a small file if there is none; False if there is one."""
        return self._store.create(f"{self._base}/{name}", data)

    def path(self, name: str, check: Callable[[Json], None], *, again: bool = False) -> Path | None:
        """The path of this machine's copy of a file, which is fetched if need be; None if there is no file.

        Args:
            name: The file.
            check: Raises a DataError if a file of this size and SHA-256 is not the right one.
            again: Whether a copy that is here already is checked, too.
        """
        version = self._version(name)
        return version and self._fetched(name, version, check, again=again)

    def path_here(self, name: str, check: Callable[[Json], None]) -> Path | None:
        """As ``path``, without fetching the file; None also if this machine has no copy of it."""
        version = self._version(name) if has_copy(f"{self._uri}/{name}") else None
        return self._fetched(name, version, check) if version and self._is_cached(name, version) else None

    def ranged(self, name: str, check: Callable[[Json], None]) -> Path | RangedFile | None:
        """As ``path``, or if that would take long, a file that is read by ranges."""
        version = self._version(name)
        if version and (version.num_bytes <= _SMALL_BYTES or self._is_cached(name, version)):
            return self._fetched(name, version, check)
        return version and cast("RangedFile", self._store.open(f"{self._base}/{name}"))

    @property
    def knows_ranges(self) -> bool:
        """Whether parts of files can be read; a web server may know no ranges."""
        return not self._uri.startswith(("http://", "https://"))

    def read_parts(self, parts: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Parts of files.

        Raises:
            FileNotFoundError: If a file is not there.
        """
        return self._store.cat_parts([(f"{self._base}/{name}", start, stop) for name, start, stop in parts])

    def content(self, name: str) -> bytes | None:
        """The content of a small file; None if there is none."""
        try:
            return self._store.cat_file(f"{self._base}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def contents(self, names: Sequence[str]) -> list[bytes | None]:
        """As ``content`` of each, many at a time."""
        return self._store.find_files([f"{self._base}/{name}" for name in names])

    def exists(self, name: str) -> bool:
        """Whether there is a file."""
        return self._store.exists(f"{self._base}/{name}")

    def all_names(self) -> Iterator[str]:
        """Every file."""
        return iter(self._found())

    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return {name: int(info["size"]) for name, info in self._found().items()}

    def stamps(self, folder: str) -> dict[str, str]:
        """What the store says of the content of each file below a folder in this one."""
        return {name: stamp_of(info) for name, info in self._found(folder).items()}

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        self._store.rm_file(f"{self._base}/{name}")

    def remove_all(self, names: Collection[str]) -> None:
        """Remove files, a thousand with one request where the store can."""
        self._store.rm_files([f"{self._base}/{name}" for name in names])
        for name in self.sizes().keys() & set(names):  # a store names no file of a batch that it did not remove
            self.remove(name)

    def move(self, name: str, target: "StoredFiles") -> None:
        """Move a file to another folder."""
        self._store.mv(f"{self._base}/{name}", f"{target._base}/{name}")

    def describe(self, name: str) -> Json | None:
        """Size and SHA-256 of a file, which is read if this machine has no copy of it; None if there is none."""
        version = self._version(name)
        if version is None:
            return None
        cached = lookup(f"{self._uri}/{name}", version)
        if cached is not None:
            return {"bytes": version.num_bytes, "sha256": cached.sha256}
        digest = hashlib.sha256()
        with self._store.open(f"{self._base}/{name}", _BLOCK_BYTES) as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
        return {"bytes": version.num_bytes, "sha256": digest.hexdigest()}

    def clear_temporaries(self, start: str) -> None:
        """Give up uploads in parts that killed writers began below a folder in this one."""
        self._store.abort_uploads(f"{self._base}/{start}".rstrip("/"))

    def _found(self, folder: str = "") -> dict[str, Json]:
        files = self._store.find(f"{self._base}/{folder}".rstrip("/"))
        return {path[len(self._base) :].lstrip("/"): info for path, info in files.items()}

    def _version(self, name: str) -> Version | None:
        info = self._store.file_info(f"{self._base}/{name}")
        if info is None or info.get("type") == "directory":
            return None
        return Version(stamp_of(info), int(info["size"]))

    def _is_cached(self, name: str, version: Version) -> bool:
        return lookup(f"{self._uri}/{name}", version) is not None

    def _fetched(
        self, name: str, version: Version, check: Callable[[Json], None], *, again: bool = False
    ) -> Path | None:
        def check_digest(sha256: str) -> None:
            check({"bytes": version.num_bytes, "sha256": sha256})

        def fetch(path: Path) -> None:
            try:
                self._store.get_file(f"{self._base}/{name}", str(path), version.num_bytes)
            except FileNotFoundError:
                raise _GoneError from None

        try:
            path, sha256 = cached_path(f"{self._uri}/{name}", version, fetch, check_digest)
        except _GoneError:  # removed since it was looked at
            return None
        if again:
            check_digest(sha256)
        return path
