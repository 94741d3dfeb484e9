"""Files of object stores on this machine's disk: each version is fetched once, for all processes of the machine.

A file is used only while the store names the same version (its ETag, or its time). ``UNCLIP_CACHE`` is the folder, by
default one of this user's in the temporary folder; ``UNCLIP_CACHE_GB`` bounds it, by default to half of what its disk
has free. The files that were not used for longest go first. With ``UNCLIP_CACHE_SHARED=1`` the users of the folder's
group share its files. A recipe sets all three by its table ``[cache]``.

Beside each file ``<name>`` stands ``.<name>.cached``: a line of a fixed length, when the file was used last, in
nanoseconds since the machine started (the time of day may jump, and the times of a file are its owner's to set), and
the version that it is. A process that fetches or removes the file holds a lock on it, so that the others wait, and read
what it fetched.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from pipeline.errors import ConfigError, DataError, StepError
from pipeline.workspace.disk import flock, own_folder, require_own, translate_os_errors
from pipeline.workspace.hashing import sha256_of

_GRACE_S = 60.0
"""A file that was used so recently stays: who asked for its path may not have opened it yet."""
_SHARE_BETWEEN_SCANS = 0.01
_SUFFIX = ".cached"
_PARTIAL = ".partial-"
_NEW = ".new-"
_BLOCK_BYTES = 1 << 20
_FOLDER, _GIGABYTES, _SHARED = "UNCLIP_CACHE", "UNCLIP_CACHE_GB", "UNCLIP_CACHE_SHARED"
_USE_BYTES = 21  # 20 digits and the end of the line
_GROUP_FOLDER, _GROUP_FILE = 0o2770, 0o660

_set_by_recipe: dict[str, str] = {}
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


def use_cache(folder: str, gb: float, *, shared: bool) -> None:
    """Use the cache that a recipe names, in this process and in those that it starts; what is empty stays as it was.

    Args:
        folder: The folder.
        gb: Most gigabytes.
        shared: Whether the users of the folder's group share it.
    """
    named = {_FOLDER: folder, _GIGABYTES: f"{gb:g}" if gb else "", _SHARED: "1" if shared else ""}
    _set_by_recipe.update({name: value for name, value in named.items() if value})
    os.environ.update(_set_by_recipe)


def recipe_variables() -> dict[str, str]:
    """The environment variables of the cache that a recipe names, for processes on other machines."""
    return dict(_set_by_recipe)


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
        StepError: If the disk is full, or has no locks.
    """
    local = _place(uri)
    with translate_os_errors(str(local)), _entry(local) as entry:
        cached = _read(entry)
        is_fresh = cached is not None and version.stamp != "" and cached.version == version
        if cached and is_fresh and local.exists() and local.stat().st_size == version.num_bytes:
            _note_use(entry)
            return local, cached.sha256
        partial = local.with_name(f"{_PARTIAL}{local.name}")  # one at a time: the entry is locked
        partial.unlink(missing_ok=True)  # of a process that was killed, perhaps another user's
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


def is_cached(path: Path) -> bool:
    """Whether a local file is this machine's copy of a file in a store."""
    return path.with_name(f".{path.name}{_SUFFIX}").exists()


def has_copy(uri: str) -> bool:
    """Whether this machine has a copy of a file, of whatever version."""
    return _place(uri).exists()


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
        _make_folder(root)
        with _open_for_all(root / ".lock") as lock:  # nobody takes a new folder, not locked yet, for an abandoned one
            flock(lock, fcntl.LOCK_EX, str(root))
            _remove_abandoned(root)
            folder = root / uuid.uuid4().hex
            _make_folder(folder)
            handle = os.open(folder, os.O_RDONLY)
            flock(handle, fcntl.LOCK_EX, str(root))  # it ends with the process
    try:
        yield folder / name
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def limit_bytes(used_bytes: int, root: Path) -> int:
    """Most bytes that the cache may hold.

    Raises:
        ConfigError: If ``UNCLIP_CACHE_GB`` is no positive number.
    """
    setting = os.environ.get(_GIGABYTES, "")
    if not setting:
        return (shutil.disk_usage(root).free + used_bytes) // 2
    try:
        limit = float(setting) * 1e9
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise ConfigError(f"UNCLIP_CACHE_GB={setting}: write a number of gigabytes, such as 200")
    return int(limit)


def free_bytes() -> int:
    """What is free on the disk of the cache."""
    return shutil.disk_usage(_root()).free


def _root() -> Path:
    setting = os.environ.get(_FOLDER, "")
    if not setting:
        return own_folder("unclip-cache")
    if _is_shared():
        return _require_shared(Path(setting))
    with translate_os_errors(setting):
        Path(setting).mkdir(parents=True, exist_ok=True)
    return require_own(Path(setting) / f"unclip-cache-{os.getuid()}", "set UNCLIP_CACHE to a folder of your own")


def _is_shared() -> bool:
    return os.environ.get(_SHARED, "") == "1"


def _require_shared(folder: Path) -> Path:
    """A folder that a group shares, and nobody else can write: what is in it is used as it is.

    Raises:
        StepError: If it is not one.
    """
    mode = folder.stat().st_mode if folder.is_dir() else 0
    if not mode & stat.S_ISGID or not mode & stat.S_IWGRP or mode & stat.S_IWOTH or not os.access(folder, os.W_OK):
        raise StepError(
            f"{folder}: no folder that a group shares, this user among them; make it once, as its owner: "
            f"install -d -g GROUP -m 2770 {folder}"
        )
    return folder


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    if not _is_shared():
        folder.mkdir(exist_ok=True)
        return
    new = folder.with_name(f"{_NEW}{uuid.uuid4().hex}")
    new.mkdir()
    new.chmod(_GROUP_FOLDER)
    try:
        new.rename(folder)  # so that no other user finds it closed
    except OSError:  # somebody else's is there, and has files
        new.rmdir()


def _open_for_all(path: Path) -> IO[bytes]:
    """Open a file to read and write, which is made if it is not there; whoever uses the cache may do so."""
    if not path.exists() and _is_shared():
        new = path.with_name(f"{_NEW}{uuid.uuid4().hex}")
        os.close(os.open(new, os.O_CREAT | os.O_EXCL))
        new.chmod(_GROUP_FILE)
        with contextlib.suppress(FileExistsError):
            os.link(new, path)  # with its permissions, as a folder
        new.unlink()
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")


def _place(uri: str) -> Path:
    """Where a file lies; the files of a folder lie in one folder, under their own names."""
    folder, _, name = uri.rpartition("/")
    return _root() / hashlib.sha256(folder.encode()).hexdigest()[:24] / name


@contextlib.contextmanager
def _entry(local: Path) -> Generator[IO[bytes]]:
    """The opened and locked entry of a file; a lock on an entry that was removed in the meantime is taken anew."""
    path = local.with_name(f".{local.name}{_SUFFIX}")
    while True:
        _make_folder(local.parent)
        with _open_for_all(path) as entry:
            flock(entry, fcntl.LOCK_EX, str(path.parent.parent))
            if path.exists() and os.fstat(entry.fileno()).st_ino == path.stat().st_ino:
                yield entry
                return


def _read(entry: IO[bytes]) -> Cached | None:
    entry.seek(_USE_BYTES)
    with contextlib.suppress(ValueError, KeyError, TypeError):
        data = json.loads(entry.read())
        return Cached(Version(**data["version"]), data["sha256"])
    return None


def _put(entry: IO[bytes], source: Path, local: Path, cached: Cached) -> None:
    entry.truncate(0)  # killed between these lines, the file counts as unknown
    if _is_shared():
        source.chmod(_GROUP_FILE)
    source.replace(local)
    entry.seek(0)
    entry.write(_use_now() + json.dumps(asdict(cached)).encode())
    entry.flush()


def _note_use(entry: IO[bytes]) -> None:
    entry.seek(0)
    entry.write(_use_now())
    entry.flush()


def _use_now() -> bytes:
    return b"%020d\n" % time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _last_use_ns(path: Path) -> int:
    with path.open("rb") as entry:
        use = entry.read(_USE_BYTES)
    return int(use) if use.strip().isdigit() else 0


def _make_room(new_bytes: int) -> None:
    """Remove the files that were not used for longest, while the cache holds more than it may."""
    global _added_bytes  # noqa: PLW0603  (what this process added, whoever asked for it)
    root = _root()
    _added_bytes += new_bytes
    if _added_bytes < _SHARE_BETWEEN_SCANS * limit_bytes(0, root):
        return
    _added_bytes = 0
    now_ns, entries = time.clock_gettime_ns(time.CLOCK_BOOTTIME), list[tuple[float, int, Path]]()
    for path in root.glob(f"*/.*{_SUFFIX}"):
        local = path.with_name(path.name[1 : -len(_SUFFIX)])
        with contextlib.suppress(FileNotFoundError):
            age_s = (now_ns - _last_use_ns(path)) / 1e9
            age_s = age_s if age_s >= 0 else float("inf")  # used when the machine had not been started anew
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
                flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, str(root))
                shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)
