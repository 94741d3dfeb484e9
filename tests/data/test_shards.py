"""The only reader of stored pictures: it finds each row by key and checks its uid."""

import contextlib
import gc
import json
import tarfile
import threading
from pathlib import Path

import pytest

from pipeline.data import shards
from pipeline.data.rows import make_uid
from pipeline.data.shards import ShardPictures, StoredPictures
from pipeline.data.tar_index import index_tar
from pipeline.errors import DataError
from pipeline.workspace.store import Artifact
from tests.tiny.shards import make_jpeg, noisy_shard, write_tar


def _uid(number: int, shard: str = "00000") -> str:
    return make_uid(f"http://a/{shard}/{number}.jpg", f"caption {number}")


def test_a_picture_is_read_by_key_and_uid_as_it_is_stored(tmp_path: Path) -> None:
    tar, _ = noisy_shard(tmp_path)
    pictures = StoredPictures(Artifact(str(tmp_path)))
    assert pictures.read("00000", "0000004", _uid(4)) == make_jpeg(4, size=(32, 33))
    assert pictures.decode("00000", "0000004", _uid(4)).size == (32, 33)
    with pytest.raises(DataError, match=f"shard 00000: key 0000002: uid {_uid(2)}: no picture and json of this key"):
        pictures.read("00000", "0000002", _uid(2))
    with pytest.raises(DataError, match=f"key 0000004: uid {_uid(3)}: the row has uid {_uid(4)} in {tar}"):
        pictures.read("00000", "0000004", _uid(3))
    with pytest.raises(DataError, match=r"no file 00007\.tar"):
        pictures.read("00007", "0000702", _uid(2))


def test_a_picture_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    tar, _ = noisy_shard(tmp_path)
    data = bytearray(tar.read_bytes())
    offset = index_tar(tar)["0000004"]["jpg"][0]
    data[offset : offset + 40] = bytes(40)
    tar.write_bytes(data)
    with pytest.raises(DataError, match=f"shard 00000: key 0000004: uid {_uid(4)}: not a picture"):
        ShardPictures(tar, "00000").decode("0000004", _uid(4))


def test_a_damaged_header_of_a_tar_that_was_taken_in_names_the_file_itself(tmp_path: Path) -> None:
    tar, _ = noisy_shard(tmp_path)
    data = bytearray(tar.read_bytes())
    data[124:136] = b"no number ok"
    data[148:156] = b"%06o\0 " % (sum(data[:512]) - sum(data[148:156]) + 8 * ord(" "))
    tar.write_bytes(data)
    link = tmp_path / "link.tar"
    link.symlink_to(tar)
    pictures = ShardPictures(link, "00000", indexed=False)
    with pytest.raises(DataError, match=rf"damaged tar \(header at byte 0\); it is a link to {tar}: bring that file"):
        pictures.read("0000004", _uid(4))


def test_shards_on_this_machine_are_few_for_searches_too(tmp_path: Path) -> None:
    sizes = [
        StoredPictures(Artifact(uri), by_ranges=True)._open.cache_info().maxsize
        for uri in (str(tmp_path), "https://example.com/download", "memory://download")
    ]
    assert sizes == [16, 16, 64]


def test_open_shards_and_their_files_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 2)
    for number in range(6):
        noisy_shard(tmp_path, f"{number:05d}", num_rows=1, failed=())
    pictures, most = StoredPictures(Artifact(str(tmp_path))), 0

    def num_open() -> int:
        count = 0
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # another thread closed it since the listing
                count += str(link.readlink()).startswith(str(tmp_path))
        return count

    for number in range(6):
        shard = f"{number:05d}"
        pictures.read(shard, f"{shard}00", _uid(0, shard))
        most = max(most, num_open())
    assert most == 2
    del pictures
    gc.collect()
    assert num_open() == 0


def test_threads_read_one_shard_at_once(tmp_path: Path) -> None:
    tar, _ = noisy_shard(tmp_path, num_rows=40, failed=())
    pictures, wrong = ShardPictures(tar, "00000"), list[int]()

    def read(start: int) -> None:
        for number in [*range(start, 40), *range(start)]:
            if pictures.read(f"00000{number:02d}", _uid(number)) != make_jpeg(number, size=(32, 32 + number % 3)):
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(start,)) for start in (0, 10, 20, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_index_tar_agrees_with_tarfile(tmp_path: Path) -> None:
    tar, _ = noisy_shard(tmp_path)
    with tarfile.open(tar) as archive:
        spans = {member.name: (member.offset_data, member.size) for member in archive}
    indexed = {f"{key}.{name}": place for key, files in index_tar(tar).items() for name, place in files.items()}
    assert indexed == spans


def test_index_tar_reads_a_tar_of_another_writer(tmp_path: Path) -> None:
    path, name = tmp_path / "a.tar", "k" * 120 + ".json"
    data = json.dumps({"uid": "u"}).encode()
    write_tar(path, [(name, data)], layout=tarfile.GNU_FORMAT)
    [(offset, size)] = index_tar(path)["k" * 120].values()
    assert path.read_bytes()[offset : offset + size] == data


@pytest.mark.parametrize(("at", "value"), [(148, b"zz"), (124, b"zz"), (0, b"\xff")])
def test_index_tar_names_a_damaged_header(at: int, value: bytes, tmp_path: Path) -> None:
    tar, _ = noisy_shard(tmp_path)
    data = bytearray(tar.read_bytes())
    data[at : at + len(value)] = value
    tar.write_bytes(data)
    with pytest.raises(DataError, match=r"00000\.tar: damaged tar \(header at byte 0\)"):
        index_tar(tar)
