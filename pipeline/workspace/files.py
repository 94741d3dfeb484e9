"""A user's files, here or in an object store: what is at a path or URI, and reading it.

A path is a local path, or a URI that fsspec understands: ``s3://``, ``gs://``, ``az://``, ``https://``. It may be a
pattern with ``*`` and ``**``.
"""

import contextlib
import glob
import os
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from pipeline.errors import DataError
from pipeline.workspace.key_ranges import list_all
from pipeline.workspace.objects import ObjectStore, stamp_of

_PATTERN = frozenset("*?[")
_READ_BYTES = 8 << 20
_FOLDERS_AHEAD = 16
_OF_A_DISK = "lost+found"
"""Folder at the root of each ext4 disk, for what a repair finds; only the machine's owner may read it."""
Infos = list[dict[str, Any]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class UserFile:
    """One file of a user."""

    uri: str
    """Local path, or URI."""
    num_bytes: int
    """Its size; 0 if the server does not say."""
    stamp: str
    """What the store says about its content (its ETag, or its time); empty for a local file."""


@dataclass(frozen=True)
class LocalEntries:
    """What a local folder holds, by name, sorted; hidden entries (``.name``, a disk's ``lost+found``) are left out."""

    files: list[str] = field(default_factory=list[str])
    """Files."""
    folders: list[str] = field(default_factory=list[str])
    """Sub-folders, without links that lead back: to a folder in which this one lies, by its path or by its links."""
    dead_links: list[str] = field(default_factory=list[str])
    """Links that lead to no file and no folder."""


def local_entries(root: str, folder: str = "") -> LocalEntries:
    """What is in a local folder.

    Args:
        root: The folder that a person has named.
        folder: Path, from there, of the folder to look at.

    Raises:
        DataError: If it cannot be read.
    """
    content, links = LocalEntries(), list[str]()
    place = os.path.join(root, folder)  # noqa: PTH118  (millions of them)
    try:
        with os.scandir(place or ".") as entries:  # which tells the kind of most entries without a call for each
            for entry in entries:
                if entry.name.startswith(".") or entry.name == _OF_A_DISK:
                    continue
                if entry.is_symlink():
                    links.append(entry.name)
                elif entry.is_dir():
                    content.folders.append(entry.name)
                elif entry.is_file():
                    content.files.append(entry.name)
    except OSError as error:
        raise _unreadable(place, error) from None
    _follow(links, root, folder, content)
    for names in (content.files, content.folders, content.dead_links):
        names.sort()
    return content


def _follow(links: list[str], root: str, folder: str, content: LocalEntries) -> None:
    """Add what the links in a folder lead to."""
    if not links:
        return
    above = [os.path.realpath(one) for one in accumulate([root, *folder.split("/")], os.path.join)]
    for name in links:
        link = os.path.join(above[-1], name)  # noqa: PTH118
        if os.path.isfile(link):  # noqa: PTH113  (no error for a link in a circle, and for one that may not be read)
            content.files.append(name)
        elif not os.path.isdir(link):  # noqa: PTH112
            content.dead_links.append(name)
        else:
            target = os.path.join(os.path.realpath(link), "")  # noqa: PTH118
            if not any(f"{one}/".startswith(target) for one in above):
                content.folders.append(name)


def is_remote(uri: str) -> bool:
    """Whether a path names a file of an object store or of a web server."""
    return "://" in uri and not uri.startswith("file://")


def look_at(path: str, look: Callable[[str], T]) -> T:
    """What a look at a local file or folder of a user gives.

    Raises:
        DataError: If it cannot be read, or is gone; names it.
    """
    try:
        return look(path)
    except OSError as error:
        raise _unreadable(path, error) from None


def exists(uri: str) -> bool:
    """Whether there is a file or folder, or a file that the pattern matches.

    Raises:
        ConfigError: If a package for this kind of store is missing.
        DataError: If the store does not answer, or this user may not look there.
    """
    if not is_remote(uri):
        path = _local(uri)
        return look_at(path, lambda path: Path(path).exists()) or bool(_matching(path))
    store = ObjectStore(uri)
    return bool(store.glob(store.path)) if _is_pattern(store) else store.info(store.path) is not None


def find_files(uri: str, dead_links: list[str] | None = None) -> list[UserFile]:
    """The file, or every file at any depth below a folder or of a pattern, sorted by name; hidden ones are left out.

    Args:
        uri: Path or URI.
        dead_links: Receives local links that lead to no file, which are left out.

    Raises:
        ConfigError: If a package for this kind of store is missing.
        DataError: If the store does not answer, or a file or folder cannot be read, or is removed meanwhile.
    """
    if is_remote(uri):
        return sorted(remote_files(uri), key=lambda file: file.uri)
    path = _local(uri)
    names, no_files = look_at(path, _names_at)
    if dead_links is not None:
        dead_links += sorted(no_files)
    return [UserFile(name, look_at(name, os.stat).st_size, "") for name in sorted(names)]


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


def infos_below(store: ObjectStore, folder: str) -> Iterator[Infos]:
    """The files at any depth in a folder of a store that gives a folder whole: folder after folder, in any order.

    In memory are the entries of sixteen folders, which are asked for at a time, and the names of those to come.
    """
    waiting, under_way = [folder.rstrip("/")], deque[tuple[str, Future[tuple[Infos, str]]]]()
    with ThreadPoolExecutor(_FOLDERS_AHEAD) as threads:
        try:
            while waiting or under_way:
                while waiting and len(under_way) < _FOLDERS_AHEAD:
                    under_way.append((waiting[-1], threads.submit(store.page, waiting.pop())))
                place, future = under_way.popleft()
                infos, _ = future.result()
                yield [info for info in infos if info.get("type") != "directory"]
                below = {str(info["name"]).rstrip("/") for info in infos if info.get("type") == "directory"}
                # Some drivers name the folder itself, and a folder without a name that lies in it.
                waiting += [name for name in sorted(below) if name != place and not _hidden(name)]
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def _unreadable(path: str, error: OSError) -> DataError:
    """The message for a user's file or folder that cannot be read."""
    mends: dict[type[OSError], str] = {
        PermissionError: "; allow this user to read it, or name others",
        FileNotFoundError: "; it was there a moment ago: run again when nothing is removed any more",
    }
    return DataError(f"{path}: cannot be read: {error.strerror}{mends.get(type(error), '')}")


def _hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


def _remote_infos(store: ObjectStore) -> Iterator[Infos]:
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
    if store.lists_from_any_name or not store.is_s3:
        yield from (list_all if store.is_s3 else infos_below)(store, path)
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


def _names_at(path: str) -> tuple[list[str], list[str]]:
    """The local files at a path, in a folder or of a pattern, and links that lead to no file."""
    if Path(path).is_file():
        return [path], []
    if not Path(path).is_dir():
        names = _matching(path)
        return [one for one in names if Path(one).is_file()], [one for one in names if not Path(one).exists()]
    files, dead_links = list[str](), list[str]()
    for folder, entries in _walk(path):
        files += [str(Path(path) / folder / name) for name in entries.files]
        dead_links += [str(Path(path) / folder / name) for name in entries.dead_links]
    return files, dead_links


def folder_of(uri: str) -> str:
    """The local folder of the files that a path or a pattern names: the part that a person has written out."""
    path = _local(uri)
    if Path(path).is_dir():
        return str(Path(path))
    parts = path.split("/")
    return "/".join(parts[: next((place for place, part in enumerate(parts) if _PATTERN & set(part)), -1)])


def _matching(pattern: str) -> list[str]:
    """Local names that match a pattern, which may be absolute; for ``**`` links that lead back are not followed."""
    parts = pattern.split("/")
    if "**" not in parts:
        return glob.glob(pattern)  # noqa: PTH207
    place = parts.index("**")
    head, tail = "/".join(parts[:place]) or "/"[:place], "/".join(parts[place + 1 :]) or "*"
    tops = _matching(head) if _PATTERN & set(head) else [head]
    names = set[str]()
    for top in [one for one in tops if Path(one).is_dir()]:
        for folder, _ in _walk(top):
            names.update(_matching(os.path.join(glob.escape(os.path.join(top, folder)), tail)))  # noqa: PTH118
    return list(names)


def _walk(root: str) -> Iterator[tuple[str, LocalEntries]]:
    """Each folder below one, by its path from there, and what is in it; first that one itself."""
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        entries = local_entries(root, folder)
        yield folder, entries
        waiting += [f"{folder}/{name}" if folder else name for name in entries.folders]


def _local(uri: str) -> str:
    return uri.removeprefix("file://")
