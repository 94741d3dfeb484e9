"""Digests of a user's files, for the keys of steps: what a step reads is part of its key by its content.

A digest is computed once: a cache in the user's home keeps it with the file's size, times and inode, and a file whose
four are the same is not read again. Of a file in an object store, what the store says of its content stands for it.
"""

import contextlib
import hashlib
import os
import sqlite3
import time
from collections.abc import Collection, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path

from pipeline.workspace.files import UserFile, find_files, folder_of, is_remote, look_at, remote_files

_BLOCK_BYTES = 1 << 20
_THREADS = 8
_SORTED_FILES = 1000
_RUN = 10_000
"""Files whose digests are looked up, and computed, together."""
_FRESH_S = 2.0
"""A file that was changed so shortly ago may be changed again within the resolution of its times: it is not cached."""
_TABLE = (
    "CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, size INTEGER, modified INTEGER, changed INTEGER, "
    "inode INTEGER, digest TEXT)"
)

Stat = tuple[int, int, int, int]
"""Size in bytes, times of the last change of content and of the inode in ns, and the inode."""


def fingerprint(uri: str, sizes_only: Collection[str] = ()) -> str:
    """A digest of a user's input: the content of a file; the names and contents of all files of a folder or pattern.

    Of a local folder or pattern, a name is the path from the folder that the person has written out.

    Args:
        uri: Path or URI.
        sizes_only: Suffixes of files whose size stands for their content.

    Raises:
        DataError: If a file or folder cannot be read, or is removed meanwhile; names it.
    """
    digest = hashlib.sha256()
    if is_remote(uri):
        return _fingerprint_of_listing(remote_files(uri))[:16]
    files = find_files(uri)
    if len(files) == 1 and Path(uri.removeprefix("file://")).is_file():
        return _contents([files[0].uri])[0][:16]
    root = folder_of(uri)
    for start in range(0, len(files), _RUN):
        run = files[start : start + _RUN]
        read = [file.uri for file in run if not _has_suffix(file, sizes_only)]
        contents = dict(zip(read, _contents(read), strict=True))
        for file in run:
            content = contents.get(file.uri) or f"{file.num_bytes} {file.stamp}"
            name = file.uri.removeprefix(root).removeprefix("/")  # in the current folder, no slash follows the root
            digest.update(f"/{name}\0{content}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def unseen_files(uri: str, sizes_only: Collection[str] = ()) -> list[str]:
    """Files whose content is not part of ``fingerprint``, because only their size is known."""
    return [
        _printable(file.uri)
        for file in (remote_files(uri) if is_remote(uri) else find_files(uri) if sizes_only else [])
        if _has_suffix(file, sizes_only) or (is_remote(file.uri) and not file.stamp)
    ]


def _fingerprint_of_listing(files: Iterator[UserFile]) -> str:
    """Few files are digested in their order; of more, which a store lists in no order, the digests are added up."""
    entries = (f"{file.uri}\0{file.num_bytes} {file.stamp}\0".encode(errors="surrogateescape") for file in files)
    few = sorted(islice(entries, _SORTED_FILES))
    if len(few) < _SORTED_FILES:
        return hashlib.sha256(b"".join(few)).hexdigest()
    total = sum(int.from_bytes(hashlib.sha256(entry).digest(), "big") for entry in chain(few, entries))
    return hashlib.sha256(str(total).encode()).hexdigest()


def _has_suffix(file: UserFile, suffixes: Collection[str]) -> bool:
    return any(file.uri.endswith(suffix) for suffix in suffixes)


def _contents(paths: list[str]) -> list[str]:
    """SHA-256 of the size and the bytes of each file, from the cache where that is possible."""
    stats = [look_at(path, _stat) for path in paths]
    # SQLite cannot store bytes that are not UTF-8. Two files of one such name are told apart by their inodes.
    names = [_printable(os.path.abspath(path)) for path in paths]  # noqa: PTH100  (resolving a million links is slow)
    with _cache() as cache:
        entries = _read_cache(cache, names)
        missing = [place for place, name in enumerate(names) if entries.get(name, (None,))[0] != stats[place]]
        now_ns = time.time_ns()
        with ThreadPoolExecutor(_THREADS) as threads:
            read = threads.map(lambda place: look_at(paths[place], _digest), missing)
            digests = dict(zip(missing, read, strict=True))
        cacheable = [place for place in missing if now_ns - max(stats[place][1:3]) > _FRESH_S * 1e9]
        _write_cache(cache, [(names[place], *stats[place], digests[place]) for place in cacheable])
    return [digests[place] if place in digests else entries[name][1] for place, name in enumerate(names)]


def _printable(path: str) -> str:
    r"""A path in which bytes that are not UTF-8 are written as ``\udcXX``."""
    return path.encode(errors="backslashreplace").decode()


def _stat(path: str) -> Stat:
    result = Path(path).stat()
    return result.st_size, result.st_mtime_ns, result.st_ctime_ns, result.st_ino


def _digest(path: str) -> str:
    with Path(path).open("rb") as stream:
        digest = hashlib.sha256(str(os.fstat(stream.fileno()).st_size).encode())
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _cache() -> Generator[sqlite3.Connection | None]:
    """The cache, or None where there can be none: then every file is read."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unclip"
    connection = None
    with contextlib.suppress(OSError, sqlite3.Error):
        folder.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(folder / "digests.sqlite", timeout=5)
        connection.execute(_TABLE)
    try:
        yield connection
    finally:
        if connection is not None:
            connection.close()


def _read_cache(cache: sqlite3.Connection | None, names: list[str]) -> dict[str, tuple[Stat, str]]:
    if cache is None or not names:
        return {}
    query = "SELECT path, size, modified, changed, inode, digest FROM digests WHERE path BETWEEN ? AND ?"
    try:
        rows = cache.execute(query, (min(names), max(names))).fetchall()
    except sqlite3.Error:
        return {}
    return {row[0]: ((row[1], row[2], row[3], row[4]), row[5]) for row in rows}


def _write_cache(cache: sqlite3.Connection | None, rows: list[tuple[str | int, ...]]) -> None:
    if cache is not None and rows:
        with contextlib.suppress(sqlite3.Error), cache:
            cache.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?, ?, ?)", rows)
