"""Files of object stores on this machine's disk: each version is fetched once, for all processes of the machine.

A file is used only while the store names the same version (its ETag, or its time). ``UNCLIP_CACHE`` is the folder, by
default one of this user's in the temporary folder; ``UNCLIP_CACHE_GB`` bounds it, by default to half of what its disk
has free. The files that were not used for longest go first.

Beside each file ``<name>`` stands ``.<name>.cached`` with the version that it is. A process that fetches or removes the
file holds a lock on it, so that the others wait, and read what it fetched. The time of this entry is when the file was
used last, in seconds since the machine started: the time of day may jump.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from pipeline.errors import ConfigError, DataError
from pipeline.workspace.disk import own_folder, require_own, translate_os_errors

_GRACE_S = 60.0
"""A file that was used so recently stays: who asked for its path may not have opened it yet."""
_SHARE_BETWEEN_SCANS = 0.01
_SUFFIX = ".cached"
_PARTIAL = ".partial-"
_BLOCK_BYTES = 1 << 20

_added_bytes = float("inf")
"""Bytes that this process has added since it last looked at the size of the cache; the first time it looks at once."""


@dataclass(frozen=True)
class Version:
    """One version of a file."""

    stamp: str
    """What the store says of its content; empty: nothing, so that it cannot be told from the next one."""
    num_bytes: int


@dataclass(frozen=True)
class Cached:
    """A version that lies in the cache."""

    version: Version
    sha256: str


def cached_path(
    uri: str, version: Version, fetch: Callable[[Path], None], check: Callable[[str], None]
) -> tuple[Path, str]:
    """The local path of one version of a file, and its SHA-256; the first process that needs it fetches it.

    The others wait.

    Args:
        uri: The file.
        version: The version that the store has now.
        fetch: Writes the file to a path.
        check: Raises DataError if this SHA-256 is not the one that a record holds.

    Raises:
        DataError: If what was fetched is not what the store or the record says.
        StepError: If the disk is full.
    """
    local = _place(uri)
    with translate_os_errors(str(local)), _entry(local) as entry:
        cached = _read(entry)
        is_fresh = cached is not None and version.stamp != "" and cached.version == version
        if cached and is_fresh and local.exists() and local.stat().st_size == version.num_bytes:
            _note_use(entry)
            return local, cached.sha256
        partial = local.with_name(f"{_PARTIAL}{local.name}")  # one at a time: the entry is locked
        fetch(partial)
        fetched_bytes, sha256 = partial.stat().st_size, sha256_of(partial)
        if fetched_bytes != version.num_bytes:
            partial.unlink()
            raise DataError(f"{uri}: {fetched_bytes} bytes came, the store has {version.num_bytes}; run again")
        try:
            check(sha256)
        except DataError:
            partial.unlink()
            raise
        _put(entry, partial, local, Cached(version, sha256))
    _make_room(fetched_bytes)
    return local, sha256


def keep(uri: str, local_file: Path, cached: Cached) -> None:
    """Move a file that was just uploaded into the cache, so that nobody on this machine fetches it."""
    local = _place(uri)
    with _entry(local) as entry:
        _put(entry, local_file, local, cached)
    _make_room(cached.version.num_bytes)


def lookup(uri: str, version: Version) -> Cached | None:
    """What is known of a version that lies in the cache; None if it does not."""
    local = _place(uri)
    if not version.stamp or not local.exists():
        return None
    with _entry(local) as entry:
        cached = _read(entry)
    return cached if cached is not None and cached.version == version else None


@contextlib.contextmanager
def temporary_file(name: str) -> Generator[Path]:
    """A path on the cache's disk for a file that is written before it is uploaded; removed at the end of the block.

    What a killed process leaves there is removed with the next file that is written.
    """
    root = _root() / "writing"
    with translate_os_errors(str(root)):
        root.mkdir(exist_ok=True)
        with (root / ".lock").open("w") as lock:  # nobody takes a new folder, not locked yet, for an abandoned one
            fcntl.flock(lock, fcntl.LOCK_EX)
            _remove_abandoned(root)
            folder = root / uuid.uuid4().hex
            folder.mkdir()
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)  # it ends with the process
    try:
        yield folder / name
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def sha256_of(path: Path) -> str:
    """SHA-256 of a local file, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def limit_bytes(used_bytes: int, root: Path) -> int:
    """Most bytes that the cache may hold.

    Raises:
        ConfigError: If ``UNCLIP_CACHE_GB`` is no positive number.
    """
    setting = os.environ.get("UNCLIP_CACHE_GB", "")
    if not setting:
        return (shutil.disk_usage(root).free + used_bytes) // 2
    try:
        limit = float(setting) * 1e9
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise ConfigError(f"UNCLIP_CACHE_GB={setting}: write a number of gigabytes, such as 200")
    return int(limit)


def _root() -> Path:
    setting = os.environ.get("UNCLIP_CACHE", "")
    if not setting:
        return own_folder("unclip-cache")
    with translate_os_errors(setting):
        Path(setting).mkdir(parents=True, exist_ok=True)
    return require_own(Path(setting) / f"unclip-cache-{os.getuid()}", "set UNCLIP_CACHE to a folder of your own")


def _place(uri: str) -> Path:
    """Where a file lies; the files of a folder lie in one folder, under their own names."""
    folder, _, name = uri.rpartition("/")
    return _root() / hashlib.sha256(folder.encode()).hexdigest()[:24] / name


@contextlib.contextmanager
def _entry(local: Path) -> Generator[IO[bytes]]:
    """The opened and locked entry of a file; a lock on an entry that was removed in the meantime is taken anew."""
    path = local.with_name(f".{local.name}{_SUFFIX}")
    while True:
        local.parent.mkdir(exist_ok=True)
        with path.open("a+b") as entry:
            fcntl.flock(entry, fcntl.LOCK_EX)
            if path.exists() and os.fstat(entry.fileno()).st_ino == path.stat().st_ino:
                yield entry
                return


def _read(entry: IO[bytes]) -> Cached | None:
    entry.seek(0)
    with contextlib.suppress(ValueError, KeyError, TypeError):
        data = json.loads(entry.read())
        return Cached(Version(**data["version"]), data["sha256"])
    return None


def _put(entry: IO[bytes], source: Path, local: Path, cached: Cached) -> None:
    entry.truncate(0)  # killed between these lines, the file counts as unknown
    source.replace(local)
    entry.write(json.dumps(asdict(cached)).encode())
    entry.flush()
    _note_use(entry)


def _note_use(entry: IO[bytes]) -> None:
    now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    os.utime(entry.fileno(), ns=(now_ns, now_ns))


def _make_room(new_bytes: int) -> None:
    """Remove the files that were not used for longest, while the cache holds more than it may."""
    global _added_bytes  # noqa: PLW0603  (what this process added, whoever asked for it)
    root = _root()
    _added_bytes += new_bytes
    if _added_bytes < _SHARE_BETWEEN_SCANS * limit_bytes(0, root):
        return
    _added_bytes = 0
    now, entries = time.clock_gettime(time.CLOCK_BOOTTIME), list[tuple[float, int, Path]]()
    for path in root.glob(f"*/.*{_SUFFIX}"):
        local = path.with_name(path.name[1 : -len(_SUFFIX)])
        with contextlib.suppress(FileNotFoundError):
            age_s = now - path.stat().st_mtime
            # Used when the machine had not been started anew, or by a release that noted the time of day.
            age_s = age_s if age_s >= 0 else float("inf")
            entries.append((age_s, local.stat().st_size, local))
    used = sum(num_bytes for _, num_bytes, _ in entries)
    limit = limit_bytes(used, root)
    for age_s, num_bytes, local in sorted(entries, reverse=True):
        if used <= limit or age_s < _GRACE_S:
            return
        with contextlib.suppress(OSError), _entry(local):
            local.unlink(missing_ok=True)
            local.with_name(f".{local.name}{_SUFFIX}").unlink(missing_ok=True)
            used -= num_bytes


def _remove_abandoned(root: Path) -> None:
    for folder in root.iterdir():
        if folder.is_dir():
            handle = os.open(folder, os.O_RDONLY)
            with contextlib.suppress(BlockingIOError):  # its writer is alive
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)
