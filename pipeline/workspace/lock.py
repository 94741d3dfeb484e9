"""One writer at a time in a place.

On a local disk a lock ends with its process. In an object store it is a file that its owner writes again every few
seconds; one that was not written for a while belongs to nobody, and the next writer breaks it. Ages are taken by the
store's clock alone, so that a machine's wrong clock changes nothing.

Each owner has a file with a number of its own, ``<number>.json`` in the lock's folder; the highest number holds the
lock. To take it is to create the next number, which a store allows to one of all who try.
"""

import contextlib
import fcntl
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import IO, Any

from pipeline.errors import StepError
from pipeline.workspace.disk import flock, translate_os_errors
from pipeline.workspace.objects import ObjectStore
from pipeline.workspace.store import Workspace

BEAT_S = 10.0
EXPIRY_S = 60.0
_CLOCK = "clock"
_USES = "uses"


class Lock:
    """A lock that is held."""

    def check(self) -> None:
        """Make sure that it is still held; call it before anything is committed.

        Raises:
            StepError: If another process took it, because this one was silent for too long.
        """


def locked(at: str, place: str, warn: Callable[[str], None]) -> contextlib.AbstractContextManager[Lock]:
    """Let one process write to a place.

    Args:
        at: Path of the lock's file, or URI of the lock's folder in an object store.
        place: What is locked, for messages.
        warn: Receives a sentence if the lock of a dead process is broken.

    Raises:
        StepError: If another process has the lock, or the file system has no locks.
    """
    return _locked_in_store(at, place, warn) if "://" in at else _locked_here(Path(at), place)


def locked_workspace(workspace: Workspace, warn: Callable[[str], None]) -> contextlib.AbstractContextManager[Lock]:
    """Let one run, or one change of an index, write to a workspace; see ``locked``."""
    return locked(f"{workspace.root}/.lock", f"{workspace.root}: another run is using this workspace", warn)


def in_use(workspace: Workspace, artifacts: Sequence[str]) -> contextlib.AbstractContextManager[Lock]:
    """Say inside a block that artifacts are being read, so that `unclip gc` leaves them.

    Args:
        workspace: The workspace.
        artifacts: ``step/key`` of each.
    """
    at = f"{workspace.root}/{_USES}/{uuid.uuid4().hex}"
    if workspace.is_local:
        return _locked_here(Path(at), "", artifacts)
    return _locked_in_store(at, "", lambda _: None, artifacts)


def used_artifacts(workspace: Workspace) -> dict[str, str]:
    """``step/key`` of each artifact that a living process reads, with the process; what dead ones left is removed."""
    used: dict[str, str] = {}
    for name in workspace.keys(_USES):
        at = f"{workspace.root}/{_USES}/{name}"
        data = _use_here(Path(at)) if workspace.is_local else _use_in_store(ObjectStore(at))
        used |= dict.fromkeys(data.get("artifacts", []), str(data.get("owner", "")))
    return used


def holder_of(workspace: Workspace) -> str:
    """The living process that holds a workspace: a run, or a change of its index; empty if there is none."""
    if not workspace.is_local:
        _, owner, age_s = _newest(ObjectStore(f"{workspace.root}/.lock"))
        return owner if age_s < EXPIRY_S else ""
    return _use_here(Path(workspace.root) / ".lock", remove=False).get("owner", "")


def _taken(lock: IO[str], where: str) -> bool:
    """Take a lock; again after a moment, because `status` looks at it by taking it for an instant."""
    for wait_s in (0.05, 0.05, None):
        try:
            flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, where)
        except BlockingIOError:
            if wait_s:
                time.sleep(wait_s)
        else:
            return True
    return False


def _use_here(file: Path, *, remove: bool = True) -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError), file.open() as lock:
        try:
            # Shared: NFS gives an exclusive lock to a file that is open for writing alone.
            flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB, str(file.parent))
        except BlockingIOError:
            owner, _, artifacts = lock.read().partition("\n")
            return {"owner": owner, "artifacts": artifacts.split()}
        if remove:
            file.unlink()
    return {}


def _use_in_store(store: ObjectStore) -> dict[str, Any]:
    number, owner, age_s = _newest(store)
    if owner and age_s < EXPIRY_S:
        return json.loads(store.cat_file(f"{store.path}/{number}.json"))
    for path in store.find(store.path):
        store.rm_file(path)
    return {}


@contextlib.contextmanager
def _locked_here(file: Path, place: str, artifacts: Sequence[str] = ()) -> Generator[Lock]:
    while True:
        with translate_os_errors(str(file.parent)):
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = file.open("a+")
        with lock:
            if not _taken(lock, str(file.parent)):
                lock.seek(0)
                raise StepError(f"{place} ({lock.read().strip()}); wait for it")
            if not _is_at(file, lock):  # it was removed before it was locked, as one that a dead process left
                continue
            lock.truncate(0)
            with translate_os_errors(str(file.parent)):
                os.write(lock.fileno(), "\n".join([_owner(), *artifacts]).encode())
            yield Lock()
            return


def _is_at(file: Path, opened: IO[str]) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.fstat(opened.fileno()).st_ino == file.stat().st_ino
    return False


@contextlib.contextmanager
def _locked_in_store(
    folder: str, place: str, warn: Callable[[str], None], artifacts: Sequence[str] = ()
) -> Generator[Lock]:
    store = ObjectStore(folder)
    number, owner, age_s = _newest(store)
    if owner and age_s < EXPIRY_S:
        raise StepError(f"{place} ({owner}, last heard {age_s:.0f} s ago); wait for it, or for {EXPIRY_S:.0f} s")
    lock = _StoreLock(store, place, number + 1, artifacts)
    is_taken = not store.create(lock.path, lock.content())
    if not is_taken and max(_numbers(store)) > number + 1:  # others have held, and removed, this number since we looked
        store.rm_file(lock.path)
        is_taken = True
    if is_taken:
        raise StepError(f"{place}: it was taken at this moment; wait for it")
    if owner:
        warn(f"{place} ({owner}) was silent for {age_s:.0f} s: it counts as dead, and its lock is broken")
    lock.start(number)
    try:
        yield lock
    finally:
        lock.release()


class _StoreLock(Lock):
    """A lock in an object store, written again by a thread."""

    def __init__(self, store: ObjectStore, place: str, number: int, artifacts: Sequence[str]) -> None:
        self._store, self._place, self._number = store, place, number
        self.path = f"{store.path}/{number}.json"
        self._beat_at = _boot_time()
        self._is_lost = False
        self._owner, self._token = _owner(), uuid.uuid4().hex
        self._artifacts = list(artifacts)
        self._beats = 0
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def content(self, owner: str | None = None) -> bytes:
        """The lock's file; an empty owner releases it."""
        self._beats += 1
        name = self._owner if owner is None else owner
        facts = {"owner": name, "beats": self._beats, "token": self._token, "artifacts": self._artifacts}
        return json.dumps(facts).encode()

    def start(self, previous: int) -> None:
        """Remove what the owners before left, and begin to write."""
        for number in _numbers(self._store):
            if number <= previous:
                self._store.rm_file(f"{self._store.path}/{number}.json")
        self._thread.start()

    def check(self) -> None:
        """See ``Lock.check``."""
        if _boot_time() - self._beat_at > EXPIRY_S / 2:
            self._beat()
        if self._is_lost:
            raise StepError(
                f"{self._place}: this run was silent for too long, and the other one took over; it has stopped"
            )

    def release(self) -> None:
        """Leave the lock to the next owner; the number stays, so that numbers never begin anew."""
        self._released.set()
        self._thread.join()
        if not self._is_lost:
            self._store.pipe_file(self.path, self.content(owner=""))

    def _keep(self) -> None:
        while not self._released.wait(BEAT_S):
            with contextlib.suppress(Exception):  # the store is away: the lock is held as long as nobody else takes it
                self._beat()

    def _beat(self) -> None:
        if max(_numbers(self._store), default=0) > self._number:
            self._is_lost = True
        else:
            self._store.pipe_file(self.path, self.content())
            self._beat_at = _boot_time()


def _newest(store: ObjectStore) -> tuple[int, str, float]:
    """Number of the newest lock, its owner, and how long ago it wrote; no owner if the lock is free."""
    number = max(_numbers(store), default=0)
    if not number:
        return 0, "", 0.0
    path, clock = f"{store.path}/{number}.json", f"{store.path}/{_CLOCK}"
    try:
        data: dict[str, Any] = json.loads(store.cat_file(path))
        written_at = store.modified(path)
    except FileNotFoundError:  # it was broken at this moment
        return _newest(store)
    store.pipe_file(clock, b"")
    return number, str(data.get("owner", "")), store.modified(clock) - written_at


def _numbers(store: ObjectStore) -> list[int]:
    names = [path.rpartition("/")[2].removesuffix(".json") for path in store.find(store.path)]
    return [int(name) for name in names if name.isdigit()]


def _owner() -> str:
    return f"process {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}"


def _boot_time() -> float:
    """Seconds since the machine started, with the time that it slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
