"""A person's folder of many files, here or in an object store, which is never listed whole.

S3 is listed in pages of a thousand names, of several sub-folders or ranges of names at a time. Other stores, and a
disk, give a sub-folder at once: of one with very many files their drivers hold about a kilobyte for each. What grows
besides is the list of the sub-folders of one folder, which are visited after its files.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from pipeline.errors import DataError
from pipeline.workspace.files import infos_below, is_remote, local_entries
from pipeline.workspace.key_ranges import list_all
from pipeline.workspace.objects import ObjectStore

_RUN = 1000
_BEFORE, _IN_FILES, _IN_SUBFOLDER, _BEHIND = "before", "files", "sub-folder", "behind"
_END = "\U0010ffff"
_FOLDERS_AHEAD, _PAGES_AHEAD = 16, 64
"""Pages of folders that are listed before their turn: a million names, about a hundred megabytes."""


@dataclass(frozen=True)
class Page:
    """Some entries of one folder; names are sorted, within a page and from page to page."""

    files: list[str]
    """Names of its files."""
    folders: list[str]
    """Names of its sub-folders; an empty name is a folder that no disk can have (``//`` in the names of a store)."""
    dead_links: list[str] = field(default_factory=list[str])
    """Names of links that lead to no file."""


@dataclass(frozen=True)
class Stretch:
    """A part of a tree, in the order in which it is read: sorted, the files of a folder before its sub-folders."""

    first: str = ""
    """Path where it begins; empty: at the beginning."""
    stop: str = ""
    """Path before which it ends; empty: at the end."""
    is_flat: bool = False
    """Whether the folder in which it begins has no sub-folders, which would be listed together with all its files."""

    def files(self, folder: str) -> tuple[str, str] | None:
        """First name, and name to stop before (empty: no limit), of a folder's own files; None: it has none of them."""
        first, stop = _seen_from(folder, self.first), _seen_from(folder, self.stop)
        if first in {_BEHIND, _IN_SUBFOLDER} or (stop == _BEFORE and self.stop):
            return None
        return (
            self.first.rpartition("/")[2] if first == _IN_FILES else "",
            self.stop.rpartition("/")[2] if stop == _IN_FILES else "",
        )

    def folders(self, folder: str) -> tuple[str, str] | None:
        """First and last name (empty: no limit) of a folder's sub-folders; None: it has none of them."""
        first, stop = _seen_from(folder, self.first), _seen_from(folder, self.stop)
        if first == _BEHIND or (stop in {_BEFORE, _IN_FILES} and self.stop):
            return None
        if self.is_flat and folder == self.first.rpartition("/")[0]:
            return None
        skipped = len(folder) + 1 if folder else 0
        return (
            self.first[skipped:].partition("/")[0] if first == _IN_SUBFOLDER else "",
            self.stop[skipped:].partition("/")[0] if stop == _IN_SUBFOLDER else "",
        )

    def has(self, file: str) -> bool:
        """Whether a file is part of it."""
        folder, _, name = file.rpartition("/")
        files = self.files(folder)
        return files is not None and files[0] <= name < (files[1] or _END)

    def has_some_of(self, folder: str) -> bool:
        """Whether a file in a folder, or below it, may be part of it."""
        return self.files(folder) is not None or self.folders(folder) is not None

    def has_all_of(self, folder: str) -> bool:
        """Whether every file in a folder and below it is part of it."""
        return self.files(folder) == self.folders(folder) == ("", "")


WHOLE = Stretch()


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

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        if self._store is None:
            return Path(self.place(name)).is_file()
        return (self._store.file_info(_joined(self._store.path, name)) or {"type": "none"}).get(
            "type", "file"
        ) == "file"

    def place(self, name: str) -> str:
        """Path or URI of a file, for people and for readers of files."""
        return f"{self.uri}/{name}" if self._store is not None else str(Path(self.uri) / name)

    def url(self, name: str) -> str:
        """URL of a file: ``file:`` with its links followed, or its URI in the store."""
        return self.place(name) if self._store is not None else Path(self.place(name)).resolve().as_uri()

    def files(self) -> Iterator[str]:
        """Every file, in any order."""
        return chain.from_iterable(self.runs())

    def runs(self) -> Iterator[list[str]]:
        """Every file, up to a thousand neighbours at a time, in any order.

        A store is asked for a thousand with one request, whatever their folders.
        """
        if self._store is None:
            names = self._walk("")
            while run := list(islice(names, _RUN)):
                yield run
            return
        for names in self._all_names(self._store):
            yield [name for name in names if not any(part.startswith(".") or not part for part in name.split("/"))]

    def pages(self, folder: str = "", stretch: Stretch = WHOLE) -> Iterator[Page]:
        """The entries of one folder, in pieces; a folder that is not there has none.

        Args:
            folder: Its path from the tree's own folder; empty: that one.
            stretch: The part of the tree whose entries are wanted.

        Raises:
            DataError: If the store lists its names in no order.
        """
        files, folders = stretch.files(folder), stretch.folders(folder)
        for page in self._pages(folder, stretch):
            own, dead_links = (
                [] if files is None else [name for name in names if files[0] <= name < (files[1] or _END)]
                for names in (page.files, page.dead_links)
            )
            below = (
                [] if folders is None else [one for one in page.folders if folders[0] <= one <= (folders[1] or _END)]
            )
            yield Page(own, below, dead_links)

    def _pages(self, folder: str, stretch: Stretch) -> Iterator[Page]:
        if self._store is None:
            entries = local_entries(self.uri, folder)
            yield Page(entries.files, entries.folders, entries.dead_links)
            return
        last = ""
        for names in self._listing(self._store, folder, *_names_to_list(folder, stretch), deep=False):
            visible = [name for name in names if not name.startswith(".")]
            files = sorted(name for name in visible if name and not name.endswith("/"))  # without the folder itself
            if files and files[0] < last:
                raise DataError(
                    f"{self.place(folder)}: the store lists its files in no order (S3's directory buckets do); copy "
                    "the folder to another bucket, or put the pictures into shards (*.tar)"
                )
            last = files[-1] if files else last
            yield Page(files, sorted(name[:-1] for name in visible if name.endswith("/")))

    def pages_of(self, folders: Sequence[str], stretch: Stretch = WHOLE) -> Iterator[Iterator[Page]]:
        """``pages`` of several folders, in their order; a store lists the next ones while one is read.

        Args:
            folders: Their paths from the tree's own folder.
            stretch: As for ``pages``.

        Raises:
            DataError: As ``pages``.
        """
        if self._store is None or len(folders) < 2:
            yield from (self.pages(folder, stretch) for folder in folders)
            return
        with ThreadPoolExecutor(_FOLDERS_AHEAD) as threads:
            ahead: deque[tuple[Iterator[Page], Future[list[Page]]]] = deque()
            for place in range(len(folders) + _FOLDERS_AHEAD):
                if place < len(folders):
                    pages = self.pages(folders[place], stretch)
                    ahead.append((pages, threads.submit(lambda pages=pages: list(islice(pages, _PAGES_AHEAD)))))
                if place >= _FOLDERS_AHEAD and ahead:
                    pages, first = ahead.popleft()
                    yield chain(first.result(), pages)

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

    def _all_names(self, store: ObjectStore) -> Iterator[list[str]]:
        """Names of all files from the tree's own folder, in any order."""
        if store.is_s3 and not store.lists_from_any_name:
            yield from self._listing(store, "", "", "", deep=True)
            return
        skipped = len(store.path.strip("/")) + 1
        for infos in (list_all if store.is_s3 else infos_below)(store, store.path):
            yield [str(info["name"]).lstrip("/")[skipped:] for info in infos]

    def _listing(self, store: ObjectStore, folder: str, first: str, last: str, *, deep: bool) -> Iterator[list[str]]:
        """Names from the folder, page by page; those of folders end with a slash.

        Args:
            store: The store.
            folder: The folder.
            first: A name: those before it may be left out.
            last: A name: those behind it may be left out.
            deep: Whether the files of sub-folders are listed, and not the sub-folders.
        """
        base, start = _joined(store.path, folder), ""
        skipped = len(base.strip("/")) + 1
        after = f"{base.strip('/')}/{first}" if first and store.lists_from_any_name else ""
        while True:
            infos, start = store.page(base, start, after=after, deep=deep)
            names = [str(info["name"]).lstrip("/") for info in infos]
            kinds = ["/" if info.get("type") == "directory" else "" for info in infos]
            yield [name[skipped:] + kind for name, kind in zip(names, kinds, strict=True) if len(name) >= skipped]
            if not start or (last and names and names[-1][skipped:] > last):
                return


def in_reading_order(path: str) -> list[tuple[bool, str]]:
    """What paths are sorted by so that they stand in the order of a stretch."""
    *folders, name = path.split("/")
    return [*((True, folder) for folder in folders), (False, name)]


def _seen_from(folder: str, path: str) -> str:
    """Where a path is, seen from a folder: in its files or sub-folders, or before or behind all of both.

    No path is before everything.
    """
    if not path:
        return _BEFORE
    if not folder or path.startswith(f"{folder}/"):
        rest = path[len(folder) + 1 :] if folder else path
        return _IN_SUBFOLDER if "/" in rest else _IN_FILES
    return _BEFORE if in_reading_order(path) < [(True, part) for part in folder.split("/")] else _BEHIND


def _names_to_list(folder: str, stretch: Stretch) -> tuple[str, str]:
    """The first and the last name (empty: no limit) that S3 is to list of a folder for a stretch.

    Its files and folders are listed together, the folders with a slash behind their names: ``a/`` comes after ``a-b/``.
    """
    files, folders = stretch.files(folder), stretch.folders(folder)
    if files is not None and folders is not None:
        return "", ""
    if folders is not None:
        first, last = folders
        return first, max((f"{last[:length]}/" for length in range(1, len(last) + 1)), default="")
    return files or ("", "")


def _joined(folder: str, name: str) -> str:
    return "/".join(part for part in (folder.rstrip("/"), name) if part)
