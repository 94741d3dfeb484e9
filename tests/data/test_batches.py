import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray

from models.text import TextEncoding
from pipeline.data.batch import CaptionTable
from pipeline.data.batches import iterate_batches, plan_order
from pipeline.data.order import Share
from pipeline.data.samples import Samples
from pipeline.data.tar_index import index_tar
from pipeline.data.training_rows import ShardReader, ShardTable
from pipeline.errors import DataError, StepError
from tests.tiny.shards import write_download, write_embed


def _samples(tmp_path: Path, *, num_threads: int = 1) -> Samples:
    download = write_download(tmp_path / "download")
    return Samples(
        ShardReader(download, write_embed(tmp_path / "embed", download), "train"), 16, num_threads=num_threads
    )


def test_workers_share_the_global_batches_of_one(tmp_path: Path) -> None:
    samples = _samples(tmp_path)
    order = plan_order(samples, 0, where="test")
    alone = [tuple(b.uids) for b in islice(iterate_batches(samples, order, Share(4), 0), 9)]
    for world_size in (2, 3):
        shares = [Share(4, rank, world_size) for rank in range(world_size)]
        uids = [[tuple(b.uids) for b in islice(iterate_batches(samples, order, share, 0), 9)] for share in shares]
        assert [sum(parts, ()) for parts in zip(*uids, strict=True)] == alone


def test_batches_continue_from_any_step_with_and_without_prefetch(tmp_path: Path) -> None:
    samples = _samples(tmp_path, num_threads=2)
    order = plan_order(samples, 0, where="test")
    whole = list(islice(iterate_batches(samples, order, Share(3), 0), 12))
    for prefetch in (False, True):
        stream = iterate_batches(samples, order, Share(3), 5, prefetch=prefetch)
        rest = list(islice(stream, 7))
        stream.close()
        for one, two in zip(whole[5:], rest, strict=True):
            assert list(one.uids) == list(two.uids)
            assert torch.equal(one.require_images(), two.require_images())
            assert torch.equal(one.require_z_image(), two.require_z_image())


def test_parts_of_a_batch_keep_their_uids(tmp_path: Path) -> None:
    samples = _samples(tmp_path)
    batch = samples.batch(np.array([[1, 3], [0, 5], [1, 0], [0, 2]]))
    tables = [samples.reader.table(name) for name in samples.reader.shards]
    uids = [tables[shard].columns["uid"][row].as_py() for shard, row in ((1, 3), (0, 5), (1, 0), (0, 2))]
    assert list(batch.uids) == uids
    part = batch.rows(slice(1, 4))
    assert (list(part.uids), list(part.rows(slice(1, 2)).uids), part.uids[-1]) == (uids[1:], uids[2:3], uids[3])
    assert (len(part), len(part.captions)) == (3, 3)


def test_batches_are_the_same_when_pictures_are_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = _samples(tmp_path)
    monkeypatch.setattr("pipeline.data.samples.IMAGE_CACHE_BYTES", 0)
    uncached = Samples(cached.reader, 16)
    order = plan_order(cached, 0, where="test")
    pairs = zip(
        iterate_batches(cached, order, Share(4), 0), iterate_batches(uncached, order, Share(4), 0), strict=False
    )
    for one, two in islice(pairs, 8):
        assert torch.equal(one.require_images(), two.require_images())


def test_batches_are_read_ahead_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = _samples(tmp_path)
    order, num_read = plan_order(samples, 0, where="test"), list[int]()
    read = samples.batch
    monkeypatch.setattr(samples, "batch", lambda locations: num_read.append(1) or read(locations))
    for size, expected in ((1, 2), (5 * read(order.locations(0, 3)).num_bytes, 5), (1 << 40, 16)):
        monkeypatch.setattr("pipeline.data.batches.PREFETCH_BYTES", size)
        num_read.clear()
        stream = iterate_batches(samples, order, Share(3), 0, prefetch=True)
        next(stream)
        stream.close()  # waits for what is under way
        assert len(num_read) == 1 + expected


def test_the_shards_of_the_next_window_are_opened_before_it_begins(tmp_path: Path) -> None:
    """16 rows of two shards, each a window of its own."""
    download = write_download(tmp_path / "download")
    reader = ShardReader(download, write_embed(tmp_path / "embed", download), "train")
    samples = Samples(reader, 16, window_rows=8)
    order = plan_order(samples, 0, where="test")
    first = {int(number) for number in order.locations(0, 8)[:, 0]}
    assert len(first) == 1
    stream = iterate_batches(samples, order, Share(2), 0)  # a window is four steps
    uids = next(stream).uids
    next(stream)
    assert set(uids) <= set(reader.table(reader.shards[first.pop()]).columns["uid"].to_pylist())
    assert len(samples._open_shards) == 2  # pyright: ignore[reportPrivateUsage]


def _noting_reader(num_shards: int, opened: list[str]) -> Any:
    """A reader of shards of eight rows, which notes the names of those that are opened."""

    def table(name: str) -> ShardTable:
        opened.append(name)
        columns = {column: [f"{name}-{row}" for row in range(8)] for column in ("uid", "key", "caption")}
        return ShardTable(name, pa.table(columns))

    shards = [f"{number:05d}" for number in range(num_shards)]
    return SimpleNamespace(shards=shards, shard_rows=[8] * num_shards, shard_lists=[0] * num_shards, table=table)


@pytest.mark.parametrize(("window_rows", "batch_size"), [(16, 8), (2, 4)])
def test_no_shard_is_opened_twice_in_an_epoch(window_rows: int, batch_size: int) -> None:
    """Windows of two shards and of one, which is larger than a window; in steps of large batches."""
    names = list[str]()
    samples = Samples(_noting_reader(8, names), 0, window_rows=window_rows)
    order = plan_order(samples, 0, where="test")
    uids = [uid for batch in islice(iterate_batches(samples, order, Share(batch_size), 0), 6) for uid in batch.uids]
    assert len(set(uids)) == 6 * batch_size
    assert len(names) == len(set(names))


class _SlowShard:
    """The first shard of some, which is being fetched until it is let go on."""

    def __init__(self, reader: Any, error: Exception | None = None) -> None:
        self.begun, self.goes_on, self.done = threading.Event(), threading.Event(), list[str]()
        self.num_begun = 0
        self._read, self._error = reader.table, error
        reader.table = self._table

    def _table(self, name: str) -> ShardTable:
        if name == "00000":
            self.num_begun += 1
            self.begun.set()
            assert self.goes_on.wait(10)
            if self._error is not None:
                raise self._error
        table = self._read(name)
        self.done.append(name)
        return table


def _rows_of(*shards: int) -> NDArray[np.int64]:
    """The first row of each of some shards."""
    return np.array([[shard, 0] for shard in shards])


def test_a_shard_that_is_being_fetched_holds_up_no_other_one() -> None:
    reader = _noting_reader(4, list[str]())
    samples, slow = Samples(reader, 0), _SlowShard(reader)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(samples.batch, _rows_of(0))
        assert slow.begun.wait(10)
        assert samples.batch(_rows_of(1, 2)).captions == ("00001-0", "00002-0")
        samples.open_one(_rows_of(0, 1, 2, 3))  # one of them is under way, two are open
        slow.goes_on.set()
        assert first.result().captions == ("00000-0",)
    assert slow.done == ["00001", "00002", "00003", "00000"]


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Is released by each thread that waits for a shard which another one fetches."""
    semaphore = threading.Semaphore(0)

    class Shard(Future[Any]):
        def result(self, timeout: float | None = None) -> Any:
            semaphore.release()
            return super().result(timeout)

    monkeypatch.setattr("pipeline.data.samples.Future", Shard)
    return semaphore


def test_a_shard_is_fetched_once_for_all_threads_that_wait_for_it(waiting: threading.Semaphore) -> None:
    opened = list[str]()
    reader = _noting_reader(2, opened)
    samples, slow = Samples(reader, 0), _SlowShard(reader)
    with ThreadPoolExecutor(3) as threads:
        batches = [threads.submit(samples.batch, _rows_of(0, 1)) for _ in range(3)]
        assert slow.begun.wait(10)
        assert all(waiting.acquire(timeout=10) for _ in range(2))
        slow.goes_on.set()
        assert {batch.result().captions for batch in batches} == {("00000-0", "00001-0")}
    assert sorted(opened) == ["00000", "00001"]


def test_a_shard_that_could_not_be_fetched_fails_all_that_wait_and_is_fetched_when_it_is_asked_for_again(
    waiting: threading.Semaphore,
) -> None:
    reader = _noting_reader(2, list[str]())
    read = reader.table
    samples, slow = Samples(reader, 0), _SlowShard(reader, StepError("away"))
    with ThreadPoolExecutor(2) as threads:
        batches = [threads.submit(samples.batch, _rows_of(0)) for _ in range(2)]
        assert slow.begun.wait(10)
        assert waiting.acquire(timeout=10)
        slow.goes_on.set()
        assert [type(batch.exception()) for batch in batches] == [StepError, StepError]
    assert slow.num_begun == 1
    reader.table = read
    assert samples.batch(_rows_of(0)).captions == ("00000-0",)


def test_a_shard_that_came_late_is_not_the_first_that_is_let_go() -> None:
    reader, opened = _noting_reader(4, list[str]()), list[str]()
    samples, slow = Samples(reader, 0, window_rows=8), _SlowShard(reader)  # two shards stay open
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(samples.batch, _rows_of(0))
        assert slow.begun.wait(10)
        samples.batch(_rows_of(1, 2))
        slow.goes_on.set()
        assert first.result().captions == ("00000-0",)
    reader.table = lambda name: opened.append(name) or slow._table(name)
    for shard in (0, 2, 1):
        samples.batch(_rows_of(shard))
    assert opened == ["00001"]


def test_workers_of_two_machines_open_the_shards_of_their_own_streams() -> None:
    """Each shard once in an epoch, but for one that both divide and a few of the next epoch; with one stream twice."""
    opened = list[str]()
    reader = _noting_reader(40, opened)
    num_reads = list[int]()
    for num_streams in (1, 2):
        opened.clear()
        uids = list[str]()
        for rank in range(2):
            samples = Samples(reader, 0, window_rows=36, num_streams=num_streams)
            order = plan_order(samples, 0, where="test", batch_size=4)
            batches = iterate_batches(samples, order, Share(4, rank, 2), 0)
            uids += [uid for batch in islice(batches, 80) for uid in batch.uids]
        assert len(set(uids)) == 320
        num_reads.append(len(opened))
    assert num_reads[0] >= 80
    assert num_reads[1] <= 41 + 2 * 4


def test_a_record_that_counts_other_rows_is_refused(tmp_path: Path) -> None:
    samples = _samples(tmp_path)
    samples.reader.shard_rows[1] -= 1
    with pytest.raises(DataError, match="shard 00001: 8 rows of this split, its record says 7"):
        samples.batch(np.array([[1, 0]]))


def test_plan_order_refuses_a_split_without_rows(tmp_path: Path) -> None:
    samples = Samples(ShardReader(write_download(tmp_path / "download"), None, "nothing"), 16)
    assert samples.first(4) is None
    with pytest.raises(DataError, match="decoder: no row to train on"):
        plan_order(samples, 0, where="decoder")
    few = Samples(ShardReader(write_download(tmp_path / "few"), None, "train"), 16, num_streams=4)
    with pytest.raises(DataError, match=r"decoder: .* rows are too few for num_streams = 4: it needs 32"):
        plan_order(few, 0, where="decoder", batch_size=8)


def _encode(captions: Sequence[str]) -> TextEncoding:
    """A stand-in for the text tower: hidden states are letter codes, and L is the longest caption of the batch."""
    length = -(-max(map(len, captions)) // 8) * 8
    hidden, mask = torch.zeros(len(captions), length, 1), torch.zeros(len(captions), length, dtype=torch.bool)
    for row, caption in enumerate(captions):
        hidden[row, : len(caption), 0] = torch.tensor([float(ord(letter)) for letter in caption])
        mask[row, : len(caption)] = True
    return TextEncoding(hidden.sum(1), hidden, mask, hidden[..., 0].long())


def test_caption_table_gives_what_the_tower_gives() -> None:
    captions = [letter * (3 + 5 * i) for i, letter in enumerate("abcdef")]
    table = CaptionTable(_encode, captions, batch_size=2)
    for requested in (["ccc" + "c" * 10, "aaa"], ["unknown", "aaa"], captions):
        encodings, expected = table(requested), _encode(requested)
        assert torch.equal(encodings.hidden, expected.hidden)
        assert torch.equal(encodings.mask, expected.mask)
        assert torch.equal(encodings.pooled, expected.pooled)


def test_a_picture_that_is_damaged_since_it_was_stored_is_named_with_what_to_do(tmp_path: Path) -> None:
    download = write_download(tmp_path / "download")
    samples = Samples(ShardReader(download, None, "train"), 16)
    name = samples.reader.shards[0]
    tar, table = download.path(f"{name}.tar"), samples.reader.table(name)
    key = table.columns["key"][2].as_py()
    offset, size = index_tar(tar)[key]["png"]
    data = bytearray(tar.read_bytes())
    data[offset : offset + size] = bytes(size)
    tar.write_bytes(data)
    samples.batch(np.array([[0, 1]]))
    message = rf"key {key}: .*: not a picture .*: it could be decoded when it was stored; bring it back from a copy"
    with pytest.raises(DataError, match=message):
        samples.batch(np.array([[0, 2]]))
