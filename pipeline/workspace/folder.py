"""The files of one folder, which is local or in an object store (local_files.py, stored_files.py).

A reader never sees half a file.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from pipeline.errors import DataError
from pipeline.workspace.disk import patiently
from pipeline.workspace.local_files import TEMPORARY, LocalFiles
from pipeline.workspace.objects import file_system
from pipeline.workspace.ranged_file import RangedFile
from pipeline.workspace.stored_files import StoredFiles

Json = dict[str, Any]
T = TypeVar("T")


class _DiffersError(DataError):
    """A file is not the one that a record describes."""


class Folder:
    """The files of a folder.

    Args:
        uri: A local path, or a URI that fsspec understands.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._files = StoredFiles(uri) if "://" in uri else LocalFiles(file_system(uri)[1])
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
        with self._files.write(name, functools.partial(self._descriptions.__setitem__, name)) as path:
            yield path

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
        if isinstance(self._files, LocalFiles) and "://" not in uri:
            self._files.link(name, Path(uri).resolve())
            return
        files, path = file_system(uri)
        with self.write(name) as copy:
            try:
                files.get_file(path, str(copy))
            except FileNotFoundError:
                raise DataError(f"{uri}: no such file") from None

    def is_link(self, name: str) -> bool:
        """Whether a file is a link to a user's own, see ``link``; else it is a copy, which is the folder's own."""
        return isinstance(self._files, LocalFiles) and self._files.is_link(name)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a small file whole."""
        if isinstance(self._files, LocalFiles):
            self.write_whole(name, lambda path: path.write_bytes(data))
        else:
            self._descriptions.pop(name, None)
            self._files.write_bytes(name, data)

    def write_json(self, name: str, value: Any) -> None:
        """Write a small JSON file whole, keys sorted."""
        self.write_bytes(name, json_bytes(value))

    def path(self, name: str) -> Path:
        """A local path to read ``name`` from; an object store's file is fetched once for all processes of the machine.

        Raises:
            DataError: If the folder has no such file, or it is not what its record says.
        """
        if isinstance(self._files, LocalFiles):
            return self._present(name, self._files.path(name))
        return self._present(name, self._files.path(name, functools.partial(self._check, name)))

    def path_here(self, name: str) -> Path | None:
        """As ``path``, of a file that need not be fetched; None if this machine has no copy of it.

        Where there is no copy, the store is not asked.
        """
        if isinstance(self._files, LocalFiles) or not self._files.knows_ranges:
            return self.path(name)
        return self._files.path_here(name, functools.partial(self._check, name))

    def matching(self, name: str, described: Json) -> Path | None:
        """As ``path``, of a file that is compared with its size and SHA-256 in a record; None if it differs.

        Raises:
            DataError: If the folder has no such file.
        """
        if isinstance(self._files, LocalFiles):
            return self.path(name) if self.describe(name) == described else None

        def compare(description: Json) -> None:
            if description != described:
                raise _DiffersError(f"{self.uri}/{name}")

        with contextlib.suppress(_DiffersError):
            return self._present(name, self._files.path(name, compare, again=True))
        return None

    def ranged(self, name: str) -> Path | RangedFile:
        """What pyarrow reads parts of ``name`` from: a local path, or a file of an object store, read by ranges.

        Raises:
            DataError: If the folder has no such file.
        """
        if isinstance(self._files, LocalFiles):
            return self.path(name)
        return self._present(name, self._files.ranged(name, functools.partial(self._check, name)))

    @property
    def reads_parts(self) -> bool:
        """Whether the folder is in an object store. A web server may know no ranges."""
        return isinstance(self._files, StoredFiles) and self._files.knows_ranges

    def read_parts(self, parts: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Parts of files of an object store, (name, start, stop) in bytes: a request each, many at a time.

        Raises:
            DataError: If a file is missing, or ends before its part does.
        """
        assert isinstance(self._files, StoredFiles)
        try:
            contents = self._files.read_parts(parts)
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
        return self._files.content(name)

    def read_bytes(self, name: str) -> bytes:
        """The content of a small file.

        Raises:
            DataError: If it is missing.
        """
        return self._present(name, self._files.content(name))

    def read_many(self, names: Sequence[str]) -> Iterable[bytes]:
        """The contents of small files, many at a time from an object store.

        Raises:
            DataError: If one is missing.
        """
        return map(self._present, names, self._files.contents(names))

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
        pairs = zip(names, self._files.contents(names), strict=True)
        return [None if content is None else self._parsed(name, content) for name, content in pairs]

    def exists(self, name: str) -> bool:
        """Whether the folder has the file.

        Raises:
            StepError: If the storage does not answer, which is no answer; so of every listing.
        """
        return self._files.exists(name)

    def names(self) -> list[str]:
        """Every published file, by its path inside the folder, sorted."""
        return sorted(name for name in self._files.all_names() if TEMPORARY not in name)

    def sizes(self) -> dict[str, int]:
        """Bytes of every file, also of those that are being written, by its path inside the folder.

        A link to a user's file counts as nothing, because removing it frees nothing.
        """
        return self._files.sizes()

    def stamps(self, folder: str) -> dict[str, str]:
        """What changes when a file is written again, for each published file below a folder inside this one, by name.

        Args:
            folder: Path inside this folder, with a slash at its end.
        """
        return self._files.stamps(folder)

    def remove(self, name: str) -> None:
        """Remove one file if it is there."""
        self._files.remove(name)

    def remove_all(self, names: Collection[str]) -> None:
        """Remove files, a thousand with one request where the store can."""
        if isinstance(self._files, LocalFiles):
            for name in names:
                self.remove(name)
        elif names:
            self._files.remove_all(names)

    def move(self, name: str, target: "Folder") -> None:
        """Move a file to another folder of the same workspace, in the place of its file of this name."""
        self._files.move(name, cast(Any, target._files))

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
        self._files.clear_temporaries(start)

    def _present(self, name: str, value: T | None) -> T:
        if value is None:
            raise self._missing(name)
        return value

    def _check(self, name: str, description: Json) -> None:
        if self._recorded_sha256(name) not in {"", description["sha256"]}:
            raise DataError(f"{self.uri}/{name}: does not match its checksum; {self.mend()}")

    def _parsed(self, name: str, content: bytes) -> Any:
        try:
            return json.loads(content)
        except ValueError as error:
            raise DataError(f"{self.uri}/{name}: not valid JSON ({error}); {self.mend()}") from None

    def _described(self, name: str) -> Json:
        if isinstance(self._files, LocalFiles):
            return self._files.describe(self.path(name))
        return self._present(name, self._files.describe(name))

    def _recorded_sha256(self, name: str) -> str:  # noqa: ARG002  (an artifact looks into its records)
        """SHA-256 of a file by its record; empty if there is none."""
        return ""

    def mend(self) -> str:
        """What to do about a damaged file of a finished step, without deleting what a person might need."""
        return f"bring it back from a copy, or move {self.uri} away and run the step again"

    def _missing(self, name: str) -> DataError:
        return DataError(f"{self.uri}: no file {name}; {self.mend()}")


def description_of(content: bytes) -> Json:
    """Size in bytes and SHA-256 of a content, as ``Folder.describe`` gives them."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def json_bytes(value: Any) -> bytes:
    """A value as ``Folder.write_json`` writes it."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
