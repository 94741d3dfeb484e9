"""A person's folder of many files, here or in an object store, which is never listed whole.

S3 is listed in pages of a thousand names. Other stores, and a disk, give the names of one sub-folder at a time. What
grows is the list of the sub-folders of one folder, which are visited after its files.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DataError
from pipeline.workspace.files import is_remote
from pipeline.workspace.objects import ObjectStore


@dataclass(frozen=True)
class Page:
    """Some entries of one folder; names are sorted, within a page and from page to page."""

    files: list[str]
    """Names of its files."""
    folders: list[str]
    """Names of its sub-folders; an empty name is a folder that no disk can have (``//`` in the names of a store)."""


class Tree:
    """The files of a folder and its sub-folders; hidden ones (``.name``) are left out, as on a disk.

    Files are named by their path from the folder, with slashes.

    Args:
        uri: Path or URI of the folder.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri if uri == "/" else uri.rstrip("/")
        self._store = ObjectStore(self.uri) if is_remote(uri) else None

    def exists(self) -> bool:
        """Whether there is such a folder.

        Raises:
            ConfigError: If the store cannot be reached; says what to set.
        """
        if self._store is None:
            return Path(self.uri).is_dir()
        return (self._store.info(self._store.path) or {}).get("type") == "directory"

    def place(self, name: str) -> str:
        """Path or URI of a file, for people and for readers of files."""
        return f"{self.uri}/{name}" if self._store is not None else str(Path(self.uri) / name)

    def url(self, name: str) -> str:
        """URL of a file: ``file:`` with its links followed, or its URI in the store."""
        return self.place(name) if self._store is not None else Path(self.place(name)).resolve().as_uri()

    def files(self) -> Iterator[str]:
        """Every file, in any order: a store is asked for a thousand with one request, whatever their folders."""
        if self._store is None:
            yield from self._walk("")
            return
        for names in self._listing(self._store, "", deep=True):
            for name in names:
                if not any(part.startswith(".") or not part for part in name.split("/")):
                    yield name

    def pages(self, folder: str = "") -> Iterator[Page]:
        """The entries of one folder, in pieces; a folder that is not there has none.

        Args:
            folder: Its path from the tree's own folder; empty: that one.

        Raises:
            DataError: If the store lists its names in no order.
        """
        if self._store is None:
            yield _local_entries(Path(self.uri) / folder)
            return
        last = ""
        for names in self._listing(self._store, folder, deep=False):
            visible = [name for name in names if not name.startswith(".")]
            files = sorted(name for name in visible if name and not name.endswith("/"))  # without the folder itself
            if files and files[0] < last:
                raise DataError(
                    f"{self.place(folder)}: the store lists its files in no order (S3's directory buckets do); copy "
                    "the folder to another bucket, or put the pictures into shards (*.tar)"
                )
            last = files[-1] if files else last
            yield Page(files, sorted(name[:-1] for name in visible if name.endswith("/")))

    def read(self, names: Sequence[str]) -> list[bytes]:
        """The contents of small files; from a store many at a time.

        Raises:
            OSError: If one cannot be read, or is not there any more.
        """
        if self._store is None:
            return [Path(self.place(name)).read_bytes() for name in names]
        return self._store.cat_files([_joined(self._store.path, name) for name in names])

    def _walk(self, folder: str) -> Iterator[str]:
        for page in self.pages(folder):
            yield from (_joined(folder, name) for name in page.files)
            for name in page.folders:
                yield from self._walk(_joined(folder, name))

    def _listing(self, store: ObjectStore, folder: str, *, deep: bool) -> Iterator[list[str]]:
        """Names from the folder, page by page; those of folders end with a slash."""
        base, start = _joined(store.path, folder), ""
        skipped = len(base.strip("/")) + 1
        while True:
            infos, start = store.page(base, start, deep=deep)
            names = [str(info["name"]).lstrip("/") for info in infos]
            kinds = ["/" if info.get("type") == "directory" else "" for info in infos]
            yield [name[skipped:] + kind for name, kind in zip(names, kinds, strict=True) if len(name) >= skipped]
            if not start:
                return


def _joined(folder: str, name: str) -> str:
    return "/".join(part for part in (folder.rstrip("/"), name) if part)


def _local_entries(folder: Path) -> Page:
    """Files and folders, without hidden ones and without links upwards."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))  # noqa: PTH208  (names alone)
    folders = [name for name in names if (folder / name).is_dir()]
    here = folder.resolve()
    return Page(
        [name for name in names if (folder / name).is_file()],
        [
            name
            for name in folders
            if not ((folder / name).is_symlink() and here.is_relative_to((folder / name).resolve()))
        ],
    )
