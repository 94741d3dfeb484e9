"""What a tracking server is to receive, on disk until it has received it.

A run appends records, whatever the server does; a thread delivers them in order. ``outbox.jsonl`` holds one record a
line, ``sent`` the number of its bytes that were delivered. After a kill between delivery and that note a record is
delivered twice, so each says the same at its second delivery: its times and its names are its own.
"""

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]

RECORDS = "outbox.jsonl"
SENT = "sent"
_LOCK = "delivery.lock"
_COMPACT_BYTES = 1 << 20


class Outbox:
    """Records in a local folder, for any number of processes that append, and one that delivers.

    Args:
        folder: Where the files are; made when missing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._records, self._sent, self._lock = folder / RECORDS, folder / SENT, folder / _LOCK
        self._thread_lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes that are not delivered yet."""
        size = self._records.stat().st_size if self._records.exists() else 0
        return size - self._offset(size)

    @property
    def may_wait(self) -> bool:
        """Whether something is not delivered yet, or storage does not say at the moment."""
        try:
            return self.num_bytes > 0
        except OSError:
            return True

    @property
    def num_records(self) -> int:
        """Records that are not delivered yet; reads them."""
        return count_waiting(self._records, self._sent) if self.num_bytes else 0

    def append(self, records: Sequence[Json]) -> None:
        """Add records at the end, whole.

        Raises:
            OSError: If the disk is full or cannot be written.
        """
        lines = "".join(f"{json.dumps(record)}\n" for record in records).encode()
        with self._exclusive() as file:
            end = os.lseek(file, 0, os.SEEK_END)
            if end and os.pread(file, 1, end - 1) != b"\n":  # a writer was killed in the middle of a line
                lines = b"\n" + lines
            try:
                while lines:
                    lines = lines[os.write(file, lines) :]
            except OSError:
                os.ftruncate(file, end)
                raise

    def read(self, limit: int) -> list[tuple[Json | None, int]]:
        """The next records that are not delivered, at most ``limit``, each with the offset after it.

        A line that a killed writer left half-written is None.
        """
        if not self.num_bytes:
            return []
        records: list[tuple[Json | None, int]] = []
        with self._records.open("rb") as file:
            offset = self._offset(self._records.stat().st_size)
            file.seek(offset)
            while len(records) < limit:
                line = file.readline()
                if not line.endswith(b"\n"):
                    break
                offset += len(line)
                records.append((_parsed(line), offset))
        return records

    def mark_sent(self, offset: int) -> None:
        """Say that all before ``offset`` is delivered; an outbox of which all is delivered shrinks to nothing.

        Raises:
            OSError: If the disk is full or cannot be written: what is delivered is read again.
        """
        self._write_offset(offset)
        if offset >= _COMPACT_BYTES and not self.num_bytes:
            self.compact()

    def compact(self) -> None:
        """Remove the records if all are delivered."""
        with self._exclusive() as file:
            size = os.fstat(file).st_size
            if size and self._offset(size) == size:
                self._write_offset(0)  # first: after a kill between the two, all is delivered once more
                os.ftruncate(file, 0)

    @contextlib.contextmanager
    def delivering(self) -> Generator[bool]:
        """Whether this process delivers, inside a block; another one may."""
        with self._lock.open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    @contextlib.contextmanager
    def _exclusive(self) -> Generator[int]:
        """The records' file, for one thread of one process."""
        with self._thread_lock:
            file = os.open(self._records, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
            finally:
                os.close(file)

    def _offset(self, size: int) -> int:
        """Bytes that are delivered."""
        return _read_offset(self._sent, size)

    def _write_offset(self, offset: int) -> None:
        new = self._sent.with_suffix(".new")
        new.write_text(str(offset))
        new.replace(self._sent)


def count_waiting(records: Path, sent: Path | None) -> int:
    """Records of an outbox's two files that are not delivered yet.

    Args:
        records: The file of the records.
        sent: The file of the bytes that are delivered; None: nothing is.
    """
    with records.open("rb") as file:
        file.seek(_read_offset(sent, os.fstat(file.fileno()).st_size) if sent else 0)
        return sum(1 for _ in file)


def _read_offset(sent: Path, size: int) -> int:
    """Bytes of a file of ``size`` bytes that are delivered."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        offset = int(sent.read_text())
        return offset if offset <= size else 0  # of an older file
    return 0


def _parsed(line: bytes) -> Json | None:
    try:
        return json.loads(line)
    except ValueError:
        return None
