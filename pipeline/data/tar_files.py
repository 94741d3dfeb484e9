"""The tar of a shard: on this machine, or in an object store, from which only what is read is fetched."""

import os
import weakref
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from pipeline.data.shard_tables import Places
from pipeline.data.tar_index import Members, index_tar
from pipeline.errors import DataError, StepError
from pipeline.workspace.disk import patiently
from pipeline.workspace.ranged_file import RangedFile
from pipeline.workspace.store import Artifact
from pipeline.workspace.store_errors import is_beyond_end

T = TypeVar("T")


class LocalTar:
    """A tar on this machine; its one file handle is closed when the object is garbage-collected.

    What its storage does not give for a moment is read again for minutes.

    Args:
        path: The tar.

    Raises:
        StepError: If the storage does not give it, also after minutes, or gives another tar that was put in its place;
            so of every read.
    """

    def __init__(self, path: Path) -> None:
        self.file: Path | str = path
        """What messages and ``repair_hint`` call it."""
        self._path = path
        self._handle, self._facts = patiently(self._open, str(path))
        weakref.finalize(self, os.close, self._handle)

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return self._facts[0]

    def read(self, start: int, stop: int) -> bytes:
        """Bytes of it; fewer where it ends."""
        return self._patiently(lambda: os.pread(self._handle, stop - start, start))

    def picture(self, key: str, uid: str) -> bytes | None:  # noqa: ARG002  (its headers are at hand)
        """None: see ``FarTar.picture``."""
        return None

    def is_right(self, key: str, uid: str, picture: bytes) -> bool:  # noqa: ARG002  (it was compared as a whole)
        """True: see ``FarTar.is_right``."""
        return True

    def members(self) -> Members:
        """Its index, by all headers."""
        return patiently(lambda: index_tar(self._path), str(self._path))

    def _patiently(self, action: Callable[[], T]) -> T:
        """As ``patiently``, of an action on the handle, behind which the file is opened anew where it has failed."""

        def act() -> T:
            try:
                return action()
            except OSError:
                handle, facts = self._open()
                try:  # the handle keeps its number: other threads may be reading by it
                    if facts != self._facts:  # the places that were found in the other one say nothing of it
                        raise StepError(f"{self._path}: was written again since it was opened; run again") from None
                    os.dup2(handle, self._handle, inheritable=False)
                finally:
                    os.close(handle)
                raise

        return patiently(act, str(self._path))

    def _open(self) -> tuple[int, tuple[int, int]]:
        """A handle of the file; and its size and the time of its last change, by which it is known again."""
        handle = os.open(self._path, os.O_RDONLY)
        try:
            facts = os.fstat(handle)
        except OSError:
            os.close(handle)
            raise
        return handle, (facts.st_size, facts.st_mtime_ns)


class FarTar:
    """A tar in an object store.

    Args:
        download: The download step's artifact.
        shard: Name of the shard.
        stream: The tar.

    Raises:
        DataError: If the shard's table is missing or damaged, and of every read if the tar is gone by then.
    """

    def __init__(self, download: Artifact, shard: str, stream: RangedFile) -> None:
        self.file: Path | str = f"{download.uri}/{shard}.tar"
        """What messages and ``repair_hint`` call it."""
        self._download = download
        self._shard = shard
        self._stream = stream
        self._places = self._read_places()

    @cached_property
    def num_bytes(self) -> int:
        """Its size."""
        return self._stream.seek(0, os.SEEK_END)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes of it, by one request; fewer where it ends."""
        if start >= stop:
            return b""
        try:
            [data] = self._stream.read_ranges([start], [stop])
        except FileNotFoundError:
            raise DataError(f"{self.file}: is gone since it was opened; is the download being made anew?") from None
        except StepError as error:
            if error.__cause__ is None or not is_beyond_end(error.__cause__):
                raise
            return b""
        return data

    def picture(self, key: str, uid: str) -> bytes | None:
        """The picture of a row, by one request, from where the shard's table says that it lies.

        None if the table does not say it, or if something else lies there.
        """
        for _ in range(2):
            place = self._places.find(key)
            if place is None:
                return None
            data = self.read(place.picture_offset, place.picture_offset + place.picture_bytes)
            if place.holds(uid, data):
                return data
            self._places = self._read_places()  # `forget` may have written the shard again since
        return None

    def is_right(self, key: str, uid: str, picture: bytes) -> bool:
        """Whether a picture that was found by its headers is what the table says, as far as the table says anything.

        Nothing has compared the tar with the checksum of its record, as is done where it is fetched whole.
        """
        place = self._places.find(key)
        return place is None or place.holds(uid, picture)

    def members(self) -> Members:
        """Its index, by all headers: it is fetched whole."""
        return index_tar(self._download.path(f"{self._shard}.tar"))

    def _read_places(self) -> Places:
        return Places(self._download.path(f"{self._shard}.parquet"))
