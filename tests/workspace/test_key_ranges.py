"""A folder of a store that is listed by several requests at a time has the names that it has, each once."""

import string
import threading
import time
from bisect import bisect_right
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.workspace import objects
from pipeline.workspace.digests import fingerprint
from pipeline.workspace.files import find_files
from pipeline.workspace.key_ranges import _between, list_all
from pipeline.workspace.objects import ObjectStore
from pipeline.workspace.trees import Tree
from tests.s3_server import S3Server

_LETTERS = string.ascii_letters + string.digits + "-_./ ~\u00e9\u4e2d\U0001f600"


class _Store:
    """Lists names as S3 does, by their order in UTF-8, and counts what is asked at a time."""

    def __init__(self, names: list[str], page: int, answer_s: float = 0.0) -> None:
        self._names = sorted(f"bucket/folder/{name}" for name in names)
        self._page = page
        self._answer_s = answer_s
        self._lock = threading.Lock()
        self._num_open = 0
        self.most_open = self.num_pages = self.num_looks = 0

    def page(
        self, path: str, start: str = "", *, after: str = "", deep: bool = False, most: int = 0
    ) -> tuple[list[dict[str, Any]], str]:
        assert (path, deep) == ("bucket/folder", True)
        with self._lock:
            self._num_open += 1
            self.most_open = max(self.most_open, self._num_open)
            self.num_pages, self.num_looks = self.num_pages + (not most), self.num_looks + bool(most)
        time.sleep(self._answer_s)
        first = bisect_right(self._names, start or after)
        some = self._names[first : first + (most or self._page)]
        with self._lock:
            self._num_open -= 1
        return [{"name": name} for name in some], some[-1] if self._names[first + len(some) :] else ""

    def unstrip_protocol(self, path: str) -> str:
        return f"s3://{path}"


def _listed(store: Any) -> list[str]:
    return [
        entry["name"].removeprefix("bucket/folder/")
        for entries in list_all(store, "bucket/folder")
        for entry in entries
    ]


@settings(deadline=None, max_examples=150)
@given(st.sets(st.text(_LETTERS, min_size=1, max_size=6), max_size=60), st.integers(1, 7))
def test_every_name_is_listed_once_whatever_the_names(names: set[str], page: int) -> None:
    assert sorted(_listed(_Store(list(names), page))) == sorted(names)


def test_a_range_that_ends_at_a_name_does_not_grow() -> None:
    class SlowPages(_Store):
        """A name behind a middle is there before the next page."""

        def page(self, *path: str, most: int = 0, **places: Any) -> Any:
            time.sleep(0 if most else 0.01)
            return super().page(*path, most=most, **places)

    # Z is the middle of what is left behind 5, and the last name of a page.
    names = ["0", "5", "C", "Index", "K7", "KV", "P", "R", "X", "Z", "a", "d", "e", "f", "i", "l", "o", "v", "w", "y"]
    assert sorted(_listed(SlowPages(names, 2))) == names


@settings(deadline=None)
@given(st.text(_LETTERS, max_size=5), st.text(_LETTERS, min_size=1, max_size=5))
def test_a_middle_is_between(one: str, other: str) -> None:
    low, high = sorted([one, other])
    if low != high:
        middle = _between(low, high)
        assert not middle or low < middle < high


@pytest.mark.parametrize(
    "names",
    [
        [f"{number:08d}.jpg" for number in range(20_000)],  # one folder
        [f"train/img_{number:06d}.jpg" for number in range(20_000)],
        [f"{folder:03d}/{number:05d}.jpg" for folder in range(50) for number in range(400)],
        [f"{number * 2654435761 % 2**32:08x}.jpg" for number in range(20_000)],
    ],
)
def test_a_long_list_is_asked_for_by_many_requests_at_a_time(names: list[str]) -> None:
    store = _Store(names, 100, answer_s=0.005)
    assert sorted(_listed(store)) == sorted(names)
    assert store.most_open == 16
    assert store.num_pages < 1.5 * 200
    assert store.num_looks <= store.num_pages


def test_a_listing_that_is_given_up_asks_for_no_more() -> None:
    store = _Store([f"{number:05d}" for number in range(10_000)], 10, answer_s=0.001)
    pages = list_all(store, "bucket/folder")  # type: ignore[arg-type]
    assert len(next(pages)) == 10
    pages.close()  # type: ignore[attr-defined]
    num_pages = store.num_pages
    time.sleep(0.05)
    assert store.num_pages <= num_pages + 16


def test_a_store_that_lists_in_no_order_is_refused() -> None:
    class Unordered(_Store):
        def page(self, *_: Any, **__: Any) -> Any:
            return [{"name": "bucket/folder/5"}, {"name": "bucket/folder/9"}], "more"

    with pytest.raises(DataError, match=r"s3://bucket/folder: the store lists its files in no order"):
        _listed(Unordered([], 2))


def test_a_folder_of_many_pages_is_the_same_for_every_reader(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{folder}/{number:02d}.jpg" for folder in ("a", "b b", "\u00e9") for number in range(30)]
    for name in names:
        s3_server.put(
            f"{bucket.removeprefix('s3://')}/folder/{name}".replace(" ", "%20").replace("\u00e9", "%C3%A9"), b"x"
        )
    one_page = fingerprint(f"{bucket}/folder")
    monkeypatch.setattr(objects, "_BATCH", 7)
    s3_server.counted()
    assert sorted(Tree(f"{bucket}/folder").files()) == sorted(names)
    assert 13 <= sum(request.kind == "LIST" for request in s3_server.counted()) < 60
    assert [file.uri.removeprefix(f"{bucket}/folder/") for file in find_files(f"{bucket}/folder")] == sorted(names)
    assert fingerprint(f"{bucket}/folder") == one_page
    monkeypatch.setattr("pipeline.workspace.digests._SORTED_FILES", 50)
    many = {fingerprint(f"{bucket}/folder") for _ in range(5)}
    assert len(many) == 1
    s3_server.put(f"{bucket.removeprefix('s3://')}/folder/a/00.jpg", b"y")
    assert fingerprint(f"{bucket}/folder") not in many
    assert not ObjectStore("s3://mine--use1-az4--x-s3/folder").lists_from_any_name


def test_sub_folders_are_listed_while_one_before_them_is_read(bucket: str, s3_server: S3Server) -> None:
    for number in range(40):
        s3_server.put(f"{bucket.removeprefix('s3://')}/folder/{number:02d}/1.jpg", b"x")
    tree, folders = Tree(f"{bucket}/folder"), [f"{number:02d}" for number in range(40)]
    pages = tree.pages_of(folders)
    s3_server.counted()
    assert next(next(pages)).files == ["1.jpg"]
    time.sleep(0.5)
    assert 2 <= sum(request.kind == "LIST" for request in s3_server.counted()) <= 17
    assert [[page.files for page in one] for one in pages] == [[["1.jpg"]]] * 39
