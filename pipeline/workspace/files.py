"""A user's files, here or in an object store: what is at a path or URI, and reading it.

A path is a local path, or a URI that fsspec understands: ``s3://``, ``gs://``, ``https://``. It may be a pattern with
``*`` and ``**``.
"""

import contextlib
import glob
import os
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from pipeline.workspace.key_ranges import list_all
from pipeline.workspace.objects import ObjectStore, stamp_of

_PATTERN = frozenset("*?[")
_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class UserFile:
    """One file of a user."""

    uri: str
    """Local path, or URI."""
    num_bytes: int
    """Its size; 0 if the server does not say."""
    stamp: str
    """What the store says about its content (its ETag, or its time); empty for a local file."""


def is_remote(uri: str) -> bool:
    """Whether a path names a file of an object store or of a web server."""
    return "://" in uri and not uri.startswith("file://")


def exists(uri: str) -> bool:
    """Whether there is a file or folder, or a file that the pattern matches.

    Raises:
        ConfigError: If a package for this kind of store is missing.
        DataError: If the store does not answer.
    """
    if not is_remote(uri):
        path = _local(uri)
        return Path(path).exists() or bool(_matching(path))
    store = ObjectStore(uri)
    return bool(store.glob(store.path)) if _is_pattern(store) else store.info(store.path) is not None


def find_files(uri: str) -> list[UserFile]:
    """The file, or every file at any depth below a folder or of a pattern, sorted by name; hidden ones are left out.

    Raises:
        ConfigError: If a package for this kind of store is missing.
        DataError: If the store does not answer.
    """
    if is_remote(uri):
        return sorted(remote_files(uri), key=lambda file: file.uri)
    path = _local(uri)
    if Path(path).is_file():
        names = [path]
    elif Path(path).is_dir():
        names = [
            str(Path(folder) / name)
            for folder, folders, files in os.walk(path, followlinks=True)
            if not _drop_hidden(folders)
            for name in files
            if not name.startswith(".")
        ]
    else:
        names = [name for name in _matching(path) if Path(name).is_file()]
    return [UserFile(name, Path(name).stat().st_size, "") for name in sorted(names) if Path(name).is_file()]


def remote_files(uri: str) -> Iterator[UserFile]:
    """``find_files`` of a store, one after the other.

    Of a folder on S3, some thousands are in memory at a time; more than a thousand come in no order.

    Raises:
        ConfigError: If a package for this kind of store is missing.
        DataError: If the store does not answer.
    """
    store = ObjectStore(uri)
    for infos in _remote_infos(store):
        for info in infos:
            name = str(info["name"])
            if not any(part.startswith(".") for part in name[len(store.path) :].split("/")):
                yield UserFile(store.unstrip_protocol(name), int(info.get("size") or 0), stamp_of(info))


def open_file(uri: str) -> IO[bytes]:
    """Open a file for reading.

    Raises:
        OSError: If it cannot be read.
    """
    if not is_remote(uri):
        return Path(_local(uri)).open("rb")
    store = ObjectStore(uri)
    return cast("IO[bytes]", store.open(store.path, _READ_BYTES))


@contextlib.contextmanager
def local_copy(uri: str) -> Generator[Path]:
    """The path of a local file, or of a copy of a remote one that is removed at the end of the block."""
    if not is_remote(uri):
        yield Path(_local(uri))
        return
    with tempfile.TemporaryDirectory(prefix="unclip-") as folder:
        target = Path(folder) / uri.rpartition("/")[2]
        store = ObjectStore(uri)
        store.get_file(store.path, str(target))
        yield target


def _remote_infos(store: ObjectStore) -> Iterator[list[dict[str, Any]]]:
    """What a store says of the file, or of the files of a folder or a pattern."""
    path = store.path
    if _is_pattern(store):
        matching = store.glob(path)
        yield [
            matching[name] | {"name": name} for name in sorted(matching) if matching[name].get("type") != "directory"
        ]
        return
    info = store.info(path)
    if info is None:
        return
    if info.get("type") != "directory":
        yield [info | {"name": path}]
        return
    if store.lists_from_any_name:
        yield from list_all(store, path)
        return
    start = ""
    while True:
        infos, start = store.page(path, start, deep=True)
        yield infos
        if not start:
            return


def _is_pattern(store: ObjectStore) -> bool:
    """Whether a path is a pattern; the name of a file or folder may have brackets, too."""
    return bool(_PATTERN & set(store.path)) and ("*" in store.path or store.info(store.path) is None)


def _matching(pattern: str) -> list[str]:
    """Local names that match a pattern, which may be absolute."""
    return glob.glob(pattern, recursive=True) if _PATTERN & set(pattern) else []  # noqa: PTH207


def _drop_hidden(folders: list[str]) -> bool:
    """Take hidden folders out of a walk, in place; the walk visits the others in order of their names."""
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    return False


def _local(uri: str) -> str:
    return uri.removeprefix("file://")
