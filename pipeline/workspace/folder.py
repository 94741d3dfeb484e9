"""The files of one folder, which is local or in an object store; only this module knows which.

Every file is written to a temporary name, synced and renamed (in an object store: uploaded whole), so that a reader
never sees half a file.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pipeline.errors import DataError
from pipeline.workspace.cache import Cached, Version, cached_path, has_copy, keep, lookup, temporary_file
from pipeline.workspace.disk import content_of, facts_of, files_below, is_there, patiently, translate_os_errors
from pipeline.workspace.hashing import checksum_of_writing, sha256_of
from pipeline.workspace.objects import file_system, stamp_of
from pipeline.workspace.ranged_file import RangedFile

Json = dict[str, Any]

_TEMPORARY = ".tmp-"
_BLOCK_BYTES = 8 << 20
_SMALL_BYTES = 1 << 20  # fetched whole in the time of one request


class _DiffersError(DataError):
    """A file is not the one that a record describes."""


class Folder:
    """The files of a folder.

    Args:
        uri: A local path, or a URI that fsspec understands.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        files, base = file_system(uri)
        self._files: Any = files
        self._base: str = base
        self._is_local = "://" not in uri
        self._descriptions: dict[str, Json] = {}
        """Of files whose content this object has had in its hands, until `describe` takes them: at the commit of a
        hundred thousand shards, three requests for each record were hours."""

    @property
    def key(self) -> str:
        """The last part of the URI."""
        return self.uri.rpartition("/")[2]

    def __reduce__(self) -> tuple[type["Folder"], tuple[str]]:
        return (type(self), (self.uri,))

    @contextlib.contextmanager
    def write(self, name: str) -> Generator[Path]:
        """A local path to write a file to; leaving the block without an error publishes it under ``name`` at once.

        What ``HashedFile`` writes is not read again for its checksum.

        Raises:
            StepError: If the disk is full or the place cannot be written; nothing is left behind.
        """
        self._descriptions.pop(name, None)
        if not self._is_local:
            with (
                temporary_file(Path(name).name) as temporary,
                checksum_of_writing(temporary) as checksum,
                translate_os_errors(f"{self.uri}/{name}"),
            ):
                yield temporary
                num_bytes = temporary.stat().st_size
                self._upload(temporary, name, num_bytes, checksum(num_bytes) or sha256_of(temporary))
            return
        target = Path(self._base) / name
        with translate_os_errors(str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}-{target.name}")
        try:
            with translate_os_errors(f"{self.uri}/{name}"), checksum_of_writing(temporary) as checksum:
                yield temporary
                num_bytes = _publish(temporary, target)
                if sha256 := checksum(num_bytes):
                    self._descriptions[name] = {"bytes": num_bytes, "sha256": sha256}
        finally:
            with contextlib.suppress(OSError):  # what is left of it is removed by `clear_temporaries`
                _remove(temporary)

    def write_whole(self, name: str, make: Callable[[Path], object]) -> None:
        """As ``write``; the file is made again if storage that is mounted does not take it for a moment.

        Args:
            name: The file.
            make: Writes all of it to a local path, each time it is called.

        Raises:
            StepError: As ``write``, or if the storage takes nothing for minutes.
        """

        def write() -> None:
            with self.write(name) as path:
                make(path)

        patiently(write, f"{self.uri}/{name}", "written")

    def link(self, name: str, uri: str) -> None:
        """Publish a user's file under ``name``: by a link if both are on local disks, else by a copy.

        Raises:
            DataError: If the file cannot be read.
            StepError: If the place cannot be written.
        """
        if self._is_local and "://" not in uri:
            self.remove(name)
            target = Path(self._base) / name
            with translate_os_errors(str(target)):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(Path(uri).resolve())
            return
        files, path = file_system(uri)
        with self.write(name) as copy:
            try:
                files.get_file(path, str(copy))
            except FileNotFoundError:
                raise DataError(f"{uri}: no such file") from None

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a small file whole."""
        if self._is_local:
            self.write_whole(name, lambda path: path.write_bytes(data))
        else:
            self._descriptions.pop(name, None)
            self._files.pipe_file(f"{self._base}/{name}", data)

    def write_json(self, name: str, value: Any) -> None:
        """Write a small JSON file whole, keys sorted."""
        self.write_bytes(name, json_bytes(value))

    def path(self, name: str) -> Path:
        """A local path to read ``name`` from; an object store's file is fetched once for all processes of the machine.

        Raises:
            DataError: If the folder has no such file, or it is not what its record says.
        """
        if not self._is_local:
            return self._cached(name, self._version(name))
        if not self.exists(name):
            raise self._missing(name)
        return Path(self._base) / name

    def path_here(self, name: str) -> Path | None:
        """As ``path``, of a file that need not be fetched; None if this machine has no copy of it.

        Where there is no copy, the store is not asked.
        """
        if not self.reads_parts:
            return self.path(name)
        if not has_copy(f"{self.uri}/{name}"):
            return None
        version = self._version(name)
        return self._cached(name, version) if lookup(f"{self.uri}/{name}", version) else None

    def matching(self, name: str, described: Json) -> Path | None:
        """As ``path``, of a file that is compared with its size and SHA-256 in a record; None if it differs.

        Raises:
            DataError: If the folder has no such file.
        """
        if self._is_local:
            return self.path(name) if self.describe(name) == described else None
        with contextlib.suppress(_DiffersError):
            return self._cached(name, self._version(name), described)
        return None

    def ranged(self, name: str) -> Path | RangedFile:
        """What pyarrow reads parts of ``name`` from: a local path, or a file of an object store, read by ranges.

        Raises:
            DataError: If the folder has no such file.
        """
        if self._is_local:
            return self.path(name)
        version = self._version(name)
        if version.num_bytes <= _SMALL_BYTES or lookup(f"{self.uri}/{name}", version):
            return self._cached(name, version)
        return cast("RangedFile", self._files.open(f"{self._base}/{name}"))

    @property
    def reads_parts(self) -> bool:
        """Whether the folder is in an object store. A web server may know no ranges."""
        return not self._is_local and not self.uri.startswith(("http://", "https://"))

    def read_parts(self, parts: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Parts of files of an object store, (name, start, stop) in bytes: a request each, many at a time.

        Raises:
            DataError: If a file is missing, or ends before its part does.
        """
        try:
            contents = self._files.cat_parts([(f"{self._base}/{name}", start, stop) for name, start, stop in parts])
        except FileNotFoundError:
            names = [name for name, _, _ in parts]
            raise self._missing(min(set(names) - set(self.names()), default=", ".join(names))) from None
        for (name, start, stop), content in zip(parts, contents, strict=True):
            if len(content) < stop - start:
                raise DataError(f"{self.uri}/{name}: truncated at byte {start + len(content)}; {self.mend()}")
        return contents

    def find_bytes(self, name: str) -> bytes | None:
        """The content of a small file, or None if there is none.

        Raises:
            StepError: If the storage does not give it, which is no answer.
        """
        path = f"{self._base}/{name}"
        if self._is_local:
            return content_of(path)
        try:
            return cast("bytes", self._files.cat_file(path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_bytes(self, name: str) -> bytes:
        """The content of a small file.

        Raises:
            DataError: If it is missing.
        """
        content = self.find_bytes(name)
        if content is None:
            raise self._missing(name)
        return content

    def read_many(self, names: Sequence[str]) -> Iterable[bytes]:
        """The contents of small files, many at a time from an object store.

        Raises:
            DataError: If one is missing.
        """
        if self._is_local:
            return map(self.read_bytes, names)
        try:
            return cast("list[bytes]", self._files.cat_files([f"{self._base}/{name}" for name in names]))
        except FileNotFoundError:
            raise self._missing(min(set(names) - set(self.names()), default=", ".join(names))) from None

    def read_json(self, name: str) -> Any:
        """Read a JSON file.

        Raises:
            DataError: If it is missing or malformed.
        """
        return self._parsed(name, self.read_bytes(name))

    def read_jsons(self, names: Sequence[str]) -> list[Any]:
        """Read JSON files, many at a time from an object store.

        Raises:
            DataError: If one is missing or malformed.
        """
        return [self._parsed(name, content) for name, content in zip(names, self.read_many(names), strict=True)]

    def find_json(self, name: str) -> Any:
        """Read a JSON file, or None if there is none.

        Raises:
            DataError: If it is malformed.
        """
        content = self.find_bytes(name)
        return None if content is None else self._parsed(name, content)

    def find_jsons(self, names: Sequence[str]) -> list[Any]:
        """As ``find_json`` of each, many at a time from an object store.

        Raises:
            DataError: If one is malformed.
        """
        paths = [f"{self._base}/{name}" for name in names]
        contents = map(content_of, paths) if self._is_local else self._files.find_files(paths)
        pairs = zip(names, contents, strict=True)
        return [None if content is None else self._parsed(name, content) for name, content in pairs]

    def exists(self, name: str) -> bool:
        """Whether the folder has the file.

        Raises:
            StepError: If the storage does not answer, which is no answer; so of every listing.
        """
        path = f"{self._base}/{name}"
        return is_there(path) if self._is_local else bool(self._files.exists(path))

    def names(self) -> list[str]:
        """Every published file, by its path inside the folder, sorted."""
        return sorted(name for name in self._all_names() if _TEMPORARY not in name)

    def sizes(self) -> dict[str, int]:
        """Bytes of every file, also of those that are being written, by its path inside the folder.

        A link to a user's file counts as nothing, because removing it frees nothing.
        """
        if not self._is_local:
            files = self._files.find(self._base)
            return {path[len(self._base) :].lstrip("/"): int(info["size"]) for path, info in files.items()}
        sizes: dict[str, int] = {}
        for name, entry in files_below(self._base):
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                facts = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(facts.st_mode) or stat.S_ISLNK(facts.st_mode):
                    sizes[name] = 0 if stat.S_ISLNK(facts.st_mode) else facts.st_size
        return sizes

    def stamps(self, folder: str) -> dict[str, str]:
        """What changes when a file is written again, for each published file below a folder inside this one, by name.

        Args:
            folder: Path inside this folder, with a slash at its end.
        """
        below = f"{self._base}/{folder}".rstrip("/")
        if self._is_local:
            facts = {name: facts_of(f"{below}/{name}") for name, _ in files_below(below) if _TEMPORARY not in name}
            return {f"{folder}{name}": f"{one.st_mtime_ns} {one.st_size}" for name, one in facts.items() if one}
        files = self._files.find(below)
        return {path[len(self._base) :].lstrip("/"): stamp_of(info) for path, info in files.items()}

    def remove(self, name: str) -> None:
        """Remove one file if it is there."""
        path = f"{self._base}/{name}"
        with contextlib.suppress(FileNotFoundError):
            if self._is_local:
                patiently(lambda: os.unlink(path), path, "removed")  # noqa: PTH108  (a string, as a URI is)
            else:
                self._files.rm_file(path)

    def remove_all(self, names: Collection[str]) -> None:
        """Remove files, a thousand with one request where the store can."""
        if not names:
            return
        if self._is_local:
            for name in names:
                self.remove(name)
        else:
            self._files.rm_files([f"{self._base}/{name}" for name in names])
            for name in self.sizes().keys() & set(names):  # a store names no file of a batch that it did not remove
                self.remove(name)

    def move(self, name: str, target: "Folder") -> None:
        """Move a file to another folder of the same workspace, in the place of its file of this name."""
        if self._is_local:
            (Path(self._base) / name).replace(Path(target._base) / name)
        else:
            self._files.mv(f"{self._base}/{name}", f"{target._base}/{name}")

    def describe(self, name: str) -> Json:
        """Size in bytes and SHA-256 of one published file; of one that this object uploaded or folded, as it was."""
        description = self._descriptions.pop(name, None)
        return self._described(name) if description is None else description

    def known(self) -> dict[str, Json]:
        """Size and SHA-256 of the files that this object has written and did not describe, by name."""
        return dict(self._descriptions)

    def learn(self, descriptions: Mapping[str, Json]) -> None:
        """Take over what another process, which wrote the files, knows of them."""
        self._descriptions |= descriptions

    def clear_temporaries(self, start: str = "") -> None:
        """Remove what killed writers left behind; call only while no other writer is alive.

        Args:
            start: What the names of their files begin with; a folder in an object store.
        """
        if not self._is_local:
            self._files.abort_uploads(f"{self._base}/{start}".rstrip("/"))
            return
        for name in list(self._all_names()):
            place, temporary, rest = f"/{name}".partition(f"/{_TEMPORARY}")
            if temporary and name.startswith(start):
                path = Path(f"{self._base}{place}{temporary}{rest.partition('/')[0]}")
                patiently(lambda path=path: _remove(path), str(path), "removed")

    def _all_names(self) -> Iterator[str]:
        """Every file, also those that are being written."""
        if self._is_local:
            return (name for name, _ in files_below(self._base))
        return (path[len(self._base) :].lstrip("/") for path in self._files.find(self._base))

    def _parsed(self, name: str, content: bytes) -> Any:
        try:
            return json.loads(content)
        except ValueError as error:
            raise DataError(f"{self.uri}/{name}: not valid JSON ({error}); {self.mend()}") from None

    def _described(self, name: str) -> Json:
        if self._is_local:
            local = self.path(name)
            return patiently(lambda: {"bytes": local.stat().st_size, "sha256": sha256_of(local)}, str(local))
        version = self._version(name)
        cached = lookup(f"{self.uri}/{name}", version)
        if cached is not None:
            return {"bytes": version.num_bytes, "sha256": cached.sha256}
        digest = hashlib.sha256()
        with self._files.open(f"{self._base}/{name}", _BLOCK_BYTES) as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
        return {"bytes": version.num_bytes, "sha256": digest.hexdigest()}

    def _recorded_sha256(self, name: str) -> str:  # noqa: ARG002  (an artifact looks into its records)
        """SHA-256 of a file by its record; empty if there is none."""
        return ""

    def mend(self) -> str:
        """What to do about a damaged file of a finished step, without deleting what a person might need."""
        return f"bring it back from a copy, or move {self.uri} away and run the step again"

    def _missing(self, name: str) -> DataError:
        return DataError(f"{self.uri}: no file {name}; {self.mend()}")

    def _version(self, name: str) -> Version:
        info = self._files.file_info(f"{self._base}/{name}")
        if info is None or info.get("type") == "directory":
            raise self._missing(name)
        return Version(stamp_of(info), int(info["size"]))

    def _upload(self, temporary: Path, name: str, num_bytes: int, sha256: str) -> None:
        """Upload a file; it moves into the cache, so that this machine neither fetches nor reads it again."""
        self._files.put_file(str(temporary), f"{self._base}/{name}")
        self._descriptions[name] = {"bytes": num_bytes, "sha256": sha256}
        version = self._version(name)
        if version.num_bytes == num_bytes:  # else somebody has replaced it already
            keep(f"{self.uri}/{name}", temporary, Cached(version, sha256))

    def _cached(self, name: str, version: Version, described: Json | None = None) -> Path:
        """Fetch a file, and compare it with ``described``, or with its record if that is not given."""

        def check(sha256: str) -> None:
            if described is not None:
                if described != {"bytes": version.num_bytes, "sha256": sha256}:
                    raise _DiffersError(f"{self.uri}/{name}")
                return
            if self._recorded_sha256(name) not in {"", sha256}:
                raise DataError(f"{self.uri}/{name}: does not match its checksum; {self.mend()}")

        def fetch(path: Path) -> None:
            try:
                self._files.get_file(f"{self._base}/{name}", str(path), version.num_bytes)
            except FileNotFoundError:
                raise self._missing(name) from None

        path, sha256 = cached_path(f"{self.uri}/{name}", version, fetch, check)
        if described is not None:  # it was here before, and compared with another record, or with none
            check(sha256)
        return path


def description_of(content: bytes) -> Json:
    """Size in bytes and SHA-256 of a content, as ``Folder.describe`` gives them."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def json_bytes(value: Any) -> bytes:
    """A value as ``Folder.write_json`` writes it."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _publish(temporary: Path, target: Path) -> int:
    """Give a file its name; returns its size in bytes."""
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
        num_bytes = os.fstat(stream.fileno()).st_size
        os.fchmod(stream.fileno(), 0o666 & ~_UMASK)  # safetensors makes files that only their owner may read
    temporary.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return num_bytes


def _umask() -> int:
    """The permissions that new files do not get; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


_UMASK = _umask()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
