"""What stands in a key for a user's files: every byte of them, read once."""

import errno
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline.errors import DataError
from pipeline.workspace import digests
from pipeline.workspace.digests import fingerprint, unseen_files
from pipeline.workspace.files import exists, find_files
from tests.tiny.storage import fail_calls


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, without the wait for files to settle."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_FRESH_S", -3600)
    return tmp_path / "cache/unclip/digests.sqlite"


def _reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read from now on."""
    paths: list[str] = []
    digest = digests._digest

    def noted(path: str) -> str:
        paths.append(Path(path).name)
        return digest(path)

    monkeypatch.setattr(digests, "_digest", noted)
    return paths


def test_a_change_in_the_middle_of_a_large_file_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    with file.open("wb") as stream:
        stream.truncate(70 << 20)
    before = fingerprint(str(file))
    with file.open("r+b") as stream:
        stream.seek(35 << 20)
        stream.write(b"x")
    assert fingerprint(str(file)) != before


@pytest.mark.parametrize("name", ["a.txt", "sub/b.txt"])
def test_a_changed_sidecar_of_the_same_length_is_seen(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    for path in (folder / "a.txt", folder / "sub/b.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a red cat")
    before = fingerprint(str(folder))
    (folder / name).write_text("a red dog")
    assert fingerprint(str(folder)) != before
    (folder / name).write_text("a red cat")
    assert fingerprint(str(folder)) == before
    (folder / name).rename(folder / "c.txt")
    assert fingerprint(str(folder)) != before


@pytest.mark.parametrize("pattern", ["", "/*/*.jpg", "/**/*.jpg", "/**"])
@pytest.mark.parametrize("num_files", [1, 2])
def test_a_sub_folder_of_another_name_is_seen_also_if_all_files_are_in_it(
    num_files: int, pattern: str, tmp_path: Path
) -> None:
    """The pairs of a folder have its names in their URLs."""
    for number in range(num_files):
        path = tmp_path / f"set/2024/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    before = fingerprint(f"{tmp_path}/set{pattern}")
    (tmp_path / "set/2024").rename(tmp_path / "set/archive")
    assert fingerprint(f"{tmp_path}/set{pattern}") != before
    (tmp_path / "set/archive").rename(tmp_path / "set/2024")
    (tmp_path / "set").rename(tmp_path / "moved")
    assert fingerprint(f"{tmp_path}/moved{pattern}") == before


@pytest.mark.parametrize("relative", [".", "./", "*.csv", "[ab].csv", "./*.csv", "**/*.csv", "sub", "sub/*", "../list"])
def test_a_relative_path_has_the_digest_of_the_absolute_one(
    relative: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job gets absolute paths: with another digest it would begin another pipeline."""
    for name in ("a.csv", "b.csv", "sub/c.csv", "sub/d.csv"):
        (tmp_path / "list" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "list" / name).write_text(name)
    monkeypatch.chdir(tmp_path / "list")
    assert fingerprint(relative) == fingerprint(str(Path(relative).absolute()))


def test_a_moved_folder_is_the_same_and_its_times_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one/a.txt").write_text("a")
    before = fingerprint(str(tmp_path / "one"))
    os.utime(tmp_path / "one/a.txt", (0, 0))
    assert fingerprint(str(tmp_path / "one")) == before
    (tmp_path / "one").rename(tmp_path / "two")
    assert fingerprint(str(tmp_path / "two")) == before


def test_the_digest_of_a_folder_does_not_depend_on_how_many_files_are_looked_up_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests of a release before: the key of a step stays what it was."""
    for name in ("b/1", "b-/1", "b/c d/2", "b.txt", "b/.hidden"):
        (tmp_path / "list" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "list" / name).write_text(name)
    for num_files in (1, 2, 10_000):
        monkeypatch.setattr(digests, "_RUN", num_files)
        assert fingerprint(str(tmp_path / "list")) == "b7df53b24cd51f8e"
        assert fingerprint(str(tmp_path / "list/b")) == "2db22c4edf905a0b"


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "list"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / name).write_text(name)
    reads = _reads(monkeypatch)
    first = fingerprint(str(folder))
    assert sorted(reads) == ["a", "b", "c"]
    reads.clear()
    assert fingerprint(str(folder)) == first
    assert reads == []
    (folder / "b").write_text("B")
    assert fingerprint(str(folder)) != first
    assert reads == ["b"]


def test_a_file_that_keeps_its_time_and_size_is_seen_by_the_time_of_its_inode(tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_text("cat")
    before, times = fingerprint(str(file)), file.stat()
    file.write_text("dog")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint(str(file)) != before


def test_a_name_that_is_not_utf8_is_cached_as_others_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    names = [b"caf\xe9.jpg", b"caf\xc3\xa9.jpg", b"caf\\udce9.jpg", b"a.jpg"]
    for name in names:
        (folder / os.fsdecode(name)).write_bytes(name)
    reads = _reads(monkeypatch)
    before = fingerprint(str(folder))
    assert len(reads) == 4
    reads.clear()
    assert fingerprint(str(folder)) == before
    assert {os.fsencode(name) for name in reads} <= {names[0], names[2]}  # they have one name in the cache
    (folder / os.fsdecode(names[0])).write_bytes(b"changed")
    assert fingerprint(str(folder)) != before


def test_a_file_that_has_just_changed_is_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_FRESH_S", 2.0)
    (tmp_path / "list.csv").write_text("cat")
    fingerprint(str(tmp_path / "list.csv"))
    reads = _reads(monkeypatch)
    fingerprint(str(tmp_path / "list.csv"))
    assert reads == ["list.csv"]


@pytest.mark.parametrize("damage", ["garbage", "folder", "read-only"])
def test_a_cache_that_cannot_be_used_costs_time_and_nothing_else(damage: str, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "list.csv").write_text("cat")
    before = fingerprint(str(tmp_path / "list.csv"))
    cache.unlink()
    if damage == "garbage":
        cache.write_bytes(b"no database" * 100)
    elif damage == "folder":
        cache.mkdir()
    else:
        cache.parent.rmdir()
        cache.parent.write_text("a file in the place of the folder")
    assert fingerprint(str(tmp_path / "list.csv")) == before


def test_the_cache_is_one_row_a_file(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "list.csv").write_text("cat")
    for _ in range(3):
        fingerprint(str(tmp_path / "list.csv"))
        (tmp_path / "list.csv").write_text(str(time.time_ns()))
    with sqlite3.connect(cache) as rows:
        assert rows.execute("SELECT count(*) FROM digests").fetchone() == (1,)


def test_files_of_an_object_store_are_known_by_what_it_says_of_them() -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/digests/a.csv", b"one")
    before = fingerprint("memory://digests")
    store.pipe("/digests/b.csv", b"two")
    assert fingerprint("memory://digests") != before
    assert unseen_files("memory://digests") == ["memory:///digests/a.csv", "memory:///digests/b.csv"]
    store.rm("/digests", recursive=True)


def test_files_known_by_their_size_are_said(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "0.tar").write_bytes(b"1")
    (folder / "0.parquet").write_bytes(b"1")
    before = fingerprint(str(folder), (".tar",))
    (folder / "0.tar").write_bytes(b"2")
    assert fingerprint(str(folder), (".tar",)) == before
    (folder / "0.parquet").write_bytes(b"2")
    assert fingerprint(str(folder), (".tar",)) != before
    assert unseen_files(str(folder), (".tar",)) == [str(folder / "0.tar")]


@pytest.mark.parametrize("path", ["list", "list/b.csv", "list/*.csv"])
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EACCES, "Permission denied; allow this user to read it, or name others"),
        (
            errno.ENOENT,
            "No such file or directory; it was there a moment ago: run again when nothing is removed any more",
        ),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    code: int, words: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "list").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"list/{name}.csv").write_text(name)
    with monkeypatch.context() as patch:
        fail_calls(patch, "open", code=code, times=100, ends=("b.csv",))
        with pytest.raises(DataError, match=rf"^{tmp_path}/list/b\.csv: cannot be read: {words}$"):
            fingerprint(f"{tmp_path}/{path}")
    _remove_at_a_look(monkeypatch, "b.csv")
    with pytest.raises(DataError, match=rf"^{tmp_path}/list/b\.csv: cannot be read: No such file.*a moment ago"):
        fingerprint(f"{tmp_path}/list")


def _remove_at_a_look(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let a file be removed before its size is looked at, when the folder is listed."""
    stat = os.stat

    def remove(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith(name):
            Path(path).unlink(missing_ok=True)
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", remove)


def test_a_place_that_this_user_may_not_look_at_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "list.csv"
    path.write_text("cat")
    fail_calls(monkeypatch, "stat", code=errno.EACCES, times=100, ends=("list.csv",))
    for look in (exists, find_files, fingerprint):
        with pytest.raises(DataError, match=rf"^{path}: cannot be read: Permission denied; allow this user"):
            look(str(path))
