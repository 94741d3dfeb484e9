"""Lists what is below a folder of S3 by several requests at a time.

One request tells a thousand names and where the next ones start, so that a hundred million names, a request behind the
other, take hours. Here a range of names that one request does not end is cut while it is listed: a small request looks
for a name behind the middle of what is left, as the letters go, and from there on the names are a range of their own.
If there is none, the range ends at the middle, and is cut nearer to what it has. No range has more than one such
request under way beside its own, so that they are at most as many as without them.

In memory are the pages of the requests under way, whatever the number of names.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from pipeline.errors import DataError

if TYPE_CHECKING:
    from pipeline.workspace.objects import Json, ObjectStore

_REQUESTS = 16
_BEFORE_FIRST, _LAST_ASCII, _LAST = 0x1F, 0x7F, 0x10FFFF
_SURROGATES = range(0xD800, 0xE000)


def list_all(store: ObjectStore, folder: str) -> Iterator[list[Json]]:
    """The files below a folder of S3 at any depth, as ``ObjectStore.page`` describes them, up to a thousand at a time.

    Yields:
        Entries sorted by name; the lists come in no order.

    Raises:
        DataError: If the store lists its names in no order.
    """
    with ThreadPoolExecutor(_REQUESTS) as threads:
        try:
            yield from _Listing(store, folder, threads).lists()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


@dataclass(eq=False)
class _Range:
    """Names that are still to be listed: those after ``start``, up to ``stop``."""

    start: str = ""
    stop: str = ""
    """Empty: up to the last."""
    middle: str = ""
    """Behind it a name is looked for; empty: none is."""

    def cut(self, name: str) -> _Range | None:
        """End at the middle; returns the range behind it if that has names.

        Args:
            name: The first name behind the middle; empty: there is none.
        """
        middle, self.middle = self.middle, ""
        if self.start >= middle:  # they were listed meanwhile
            return None
        rest = _Range(middle, self.stop) if name and not (self.stop and name > self.stop) else None
        self.stop = middle
        return rest


class _Listing:
    """The requests of one listing; only the thread that iterates changes anything.

    Args:
        store: The store.
        folder: Path of the folder.
        threads: Make the requests.
    """

    def __init__(self, store: ObjectStore, folder: str, threads: ThreadPoolExecutor) -> None:
        self._store = store
        self._folder = folder
        self._threads = threads
        self._pages: dict[Future[tuple[list[Json], str]], _Range] = {}
        self._looks: dict[Future[tuple[list[Json], str]], _Range] = {}
        """Requests for one name behind the middle of a range."""
        self._long: dict[_Range, None] = {}
        """Ranges that one request has not ended."""
        self._list(_Range())

    def lists(self) -> Iterator[list[Json]]:
        """Entries as they come."""
        while self._pages:
            done, _ = wait([*self._pages, *self._looks], return_when=FIRST_COMPLETED)
            for future in done:
                if future in self._looks:
                    self._cut(self._looks.pop(future), future.result()[0])
                else:
                    yield self._take(self._pages.pop(future), *future.result())
            self._look()

    def _list(self, one: _Range, token: str = "") -> None:
        page = self._threads.submit(self._store.page, self._folder, token, after=one.start, deep=True)
        self._pages[page] = one

    def _take(self, one: _Range, entries: list[Json], more: str) -> list[Json]:
        """The entries of a page that are of its range, which goes on if it has more."""
        if entries and entries[0]["name"] <= one.start:
            folder = self._store.unstrip_protocol(self._folder)
            raise DataError(f"{folder}: the store lists its files in no order; copy the folder to another bucket")
        own = [entry for entry in entries if not one.stop or entry["name"] <= one.stop]
        self._long.pop(one, None)
        one.start = own[-1]["name"] if own else one.start
        if more and len(own) == len(entries) and one.start != one.stop:
            self._long[one] = None
            self._list(one, more)
        return own

    def _cut(self, one: _Range, entries: list[Json]) -> None:
        rest = one.cut(entries[0]["name"] if entries else "")
        if rest is not None and one in self._long:
            self._list(rest)

    def _look(self) -> None:
        """Look for names behind the middle of ranges, as long as there may be more requests."""
        top = f"{self._folder.strip('/')}/"
        for one in self._long:
            if len(self._pages) + len(self._looks) >= _REQUESTS:
                return
            if one.middle:
                continue
            ends = [one.stop] if one.stop else [f"{top}{chr(_LAST_ASCII)}", f"{top}{chr(_LAST)}"]
            one.middle = _between(one.start, next(end for end in ends if end > one.start))
            if one.middle:
                look = self._threads.submit(self._store.page, self._folder, after=one.middle, deep=True, most=1)
                self._looks[look] = one


def _between(low: str, high: str) -> str:
    """A text behind ``low`` and before ``high``, about halfway by the first letter that differs; empty if it has none.

    Texts are compared by code points, which is the order of their bytes in UTF-8.
    """
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(low, high, strict=False)))
    first = ord(low[shared]) if shared < len(low) else _BEFORE_FIRST
    middle = (first + ord(high[shared])) // 2
    if middle > first:
        return "" if middle in _SURROGATES else low[:shared] + chr(middle)
    if shared == len(low):
        return ""
    for place in range(shared + 1, len(low) + 1):  # between the rest of the lower one and the last with its letter
        letter = ord(low[place]) if place < len(low) else _BEFORE_FIRST
        if letter < _LAST_ASCII - 1:
            return low[:place] + chr((letter + _LAST_ASCII + 1) // 2)
    raise AssertionError("the end of a text comes before every letter")
