"""A user's files, here or in an object store: what is at a path or URI, and reading it.

A path is a local path, or a URI that fsspec understands: ``s3://``, ``gs://``, ``https://``. It may be a pattern with
``*`` and ``**``.
"""

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from pipeline.errors import DataError
from pipeline.workspace.store import file_system

_STAMPS = ("ETag", "etag", "md5Hash", "checksum", "generation", "LastModified", "last_modified", "updated", "mtime")
_PATTERN = frozenset("*?[")


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
    return bool(find_files(uri))


def find_files(uri: str) -> list[UserFile]:
    """The file, or every file at any depth below a folder or of a pattern, sorted by name; hidden ones are left out.

    Raises:
        ConfigError: If a package for this kind of store is missing.
        DataError: If the store does not answer.
    """
    if is_remote(uri):
        return _find_remote(uri)
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


def open_file(uri: str) -> IO[bytes]:
    """Open a file for reading.

    Raises:
        OSError: If it cannot be read.
    """
    if not is_remote(uri):
        return Path(_local(uri)).open("rb")
    files, path = file_system(uri)
    return cast("IO[bytes]", files.open(path, "rb"))


@contextlib.contextmanager
def local_copy(uri: str) -> Generator[Path]:
    """The path of a local file, or of a copy of a remote one that is removed at the end of the block."""
    if not is_remote(uri):
        yield Path(_local(uri))
        return
    with tempfile.TemporaryDirectory(prefix="unclip-") as folder:
        target = Path(folder) / uri.rpartition("/")[2]
        with open_file(uri) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
        yield target


def _find_remote(uri: str) -> list[UserFile]:
    files, path = file_system(uri)
    try:
        if _PATTERN & set(path):
            infos: dict[str, Any] = files.glob(path, detail=True)
        else:
            infos = {path: files.info(path)}
            if infos[path].get("type") == "directory":
                infos = files.find(path, detail=True)
    except FileNotFoundError as error:
        if isinstance(error.__cause__, OSError):  # a web server that does not answer
            raise DataError(f"{uri}: cannot be looked at: {error.__cause__}") from None
        return []
    except Exception as error:  # noqa: BLE001  (each store has exceptions of its own)
        raise DataError(f"{uri}: cannot be looked at: {type(error).__name__}: {error}") from None
    names = [name for name, info in infos.items() if info.get("type") != "directory"]
    visible = [name for name in names if not any(part.startswith(".") for part in name[len(path) :].split("/"))]
    return [
        UserFile(
            str(files.unstrip_protocol(name)),
            int(infos[name].get("size") or 0),
            " ".join(f"{key}={infos[name][key]}" for key in _STAMPS if infos[name].get(key)),
        )
        for name in sorted(visible)
    ]


def _matching(pattern: str) -> list[str]:
    """Local names that match a pattern, which may be absolute."""
    return glob.glob(pattern, recursive=True) if _PATTERN & set(pattern) else []  # noqa: PTH207


def _drop_hidden(folders: list[str]) -> bool:
    """Take hidden folders out of a walk, in place; the walk visits the others in order of their names."""
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    return False


def _local(uri: str) -> str:
    return uri.removeprefix("file://")
