"""A picture is found in a tar by bisection, without reading the tar."""

import json
import os
import random
from pathlib import Path

import pytest

from pipeline.data import shards, tar_files
from pipeline.data.shards import ShardPictures
from pipeline.data.tar_index import ReadBytes, find_in_tar, index_tar
from pipeline.errors import DataError
from tests.tiny.shards import write_tar


def _write(path: Path, keys: list[str], *, seed: int = 0) -> None:
    """Pictures of 0 to 90 kB; one looks like a tar itself."""
    rng, members = random.Random(seed), list[tuple[str, bytes]]()
    for number, key in enumerate(keys):
        picture = rng.randbytes(rng.choice([0, 511, 512, 513, 9_000, 90_000]))
        if number == len(keys) // 2:
            write_tar(path, [("zzz.jpg", b"inside"), ("000.jpg", b"inside")])
            picture = path.read_bytes()
        members += [(f"{key}.jpg", picture), (f"{key}.json", json.dumps({"uid": key}).encode()), (f"{key}.txt", b"x")]
    write_tar(path, members)


def test_every_key_is_found_with_its_files(tmp_path: Path) -> None:
    tar = tmp_path / "00000.tar"
    keys = [f"00000{number:04d}" for number in range(0, 400, 2)]
    _write(tar, keys)
    members, content = index_tar(tar), tar.read_bytes()

    def find(key: str) -> dict[str, tuple[int, int]]:
        return find_in_tar(str(tar), lambda start, stop: content[start:stop], len(content), key)

    results = {key: find(key) for key in keys}
    # The picture that is a tar may lead a search astray; then it finds nothing, never something else.
    assert all(files in ({}, members[key]) for key, files in results.items())
    assert sum(files != {} for files in results.values()) > 0.9 * len(keys)
    assert all(find(key) == {} for key in ("", "000000001", "000000399", "1"))
    pictures = ShardPictures(tar, "00000", indexed=False)
    for key in random.Random(1).sample(keys, len(keys)):
        start, size = members[key]["jpg"]
        assert pictures.read(key, key) == tar.read_bytes()[start : start + size]


def test_one_picture_takes_a_few_reads_of_a_large_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = tmp_path / "00000.tar"
    _write(tar, [f"00000{number:04d}" for number in range(1000)])
    num_bytes, pread = [0], os.pread

    def counted(file: int, size: int, offset: int) -> bytes:
        data = pread(file, size, offset)
        num_bytes[0] += len(data)
        return data

    monkeypatch.setattr(os, "pread", counted)
    monkeypatch.setattr(tar_files, "index_tar", None)
    ShardPictures(tar, "00000", indexed=False).read("000000777", "000000777")
    assert 0 < num_bytes[0] < 0.1 * tar.stat().st_size


def test_a_tar_of_another_order_is_read_by_its_headers(tmp_path: Path) -> None:
    tar = tmp_path / "00000.tar"
    keys = [f"00000{number:04d}" for number in range(60)]
    random.Random(3).shuffle(keys)
    _write(tar, keys)
    pictures = ShardPictures(tar, "00000", indexed=False)
    members = index_tar(tar)
    for key in keys:
        start, size = members[key]["jpg"]
        assert pictures.read(key, key) == tar.read_bytes()[start : start + size]


def test_many_pictures_of_one_tar_read_its_headers_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = tmp_path / "00000.tar"
    keys = [f"00000{number:04d}" for number in range(90)]
    _write(tar, keys)
    pictures, searches = ShardPictures(tar, "00000", indexed=False), [0]

    def counted(name: str, read: ReadBytes, num_bytes: int, key: str) -> dict[str, tuple[int, int]]:
        searches[0] += 1
        return find_in_tar(name, read, num_bytes, key)

    monkeypatch.setattr(shards, "find_in_tar", counted)
    monkeypatch.setattr(shards, "_SEARCHES", 64)
    for key in keys:
        pictures.read(key, key)
    assert searches[0] == 64


def test_a_picture_that_is_cut_off_is_named(tmp_path: Path) -> None:
    tar = tmp_path / "00000.tar"
    _write(tar, ["a", "b"], seed=5)
    start, size = index_tar(tar)["b"]["jpg"]
    with tar.open("r+b") as stream:
        stream.truncate(start + max(0, size - 100))
    with pytest.raises(DataError, match=r"00000.tar: truncated"):
        ShardPictures(tar, "00000", indexed=False).read("b", "b")
