"""The rows of one split, with their pictures and embeddings, read in any order.

Legend: B samples of one worker's share of a batch, D features, H W pixels.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import overload

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.data.mends import repair_hint
from pipeline.data.mixture import Mixture
from pipeline.data.order import WINDOW_ROWS
from pipeline.data.shards import ShardPictures
from pipeline.data.token_states import PackedText, read_states
from pipeline.data.training_rows import ShardReader, ShardTable
from pipeline.errors import DataError
from pipeline.pictures.frame import square
from pipeline.pictures.read import PictureError

IMAGE_CACHE_BYTES = 512 << 20
"""Decoded pictures are cached if all of them fit into this many bytes."""


@dataclass
class _OpenShard:
    table: ShardTable
    pictures: ShardPictures | None
    images: NDArray[np.uint8] | None = None
    """Cache of decoded pictures, (N, H, W, 3); None if there is no cache."""
    cached_rows: set[int] = field(default_factory=set[int])
    """Rows of ``images`` that are filled."""


class _Rows:
    """The rows of a batch, of several shards.

    Args:
        tables: The shards' tables.
        order: Places in the batch, (B,), those of the first shard first.
        places: The same, shard by shard.
        rows: Rows in the tables, shard by shard.
    """

    def __init__(
        self,
        tables: Sequence[ShardTable],
        order: NDArray[np.int64],
        places: Sequence[NDArray[np.int64]],
        rows: Sequence[NDArray[np.int64]],
    ) -> None:
        self._tables, self._order, self._places, self._rows = tables, order, places, rows

    def __len__(self) -> int:
        return len(self._order)

    def texts(self, name: str) -> list[str]:
        """A column of texts: gathered by Arrow, and made Python's at once, because that takes most of the time."""
        parts = [table.take(name, rows) for table, rows in zip(self._tables, self._rows, strict=True)]
        inverse = np.empty_like(self._order)
        inverse[self._order] = np.arange(len(self._order))
        return pa.concat_arrays(parts).take(pa.array(inverse)).to_numpy(zero_copy_only=False).tolist()

    def vectors(self) -> Tensor | None:
        """The image embeddings, (B, D); None if the training reads none."""
        vectors: NDArray[np.float16] | None = None
        for table, places, rows in zip(self._tables, self._places, self._rows, strict=True):
            if table.vectors is None:
                return None
            of_shard = table.z_image(rows)
            vectors = np.empty((len(self), of_shard.shape[1]), np.float16) if vectors is None else vectors
            vectors[places] = of_shard
        return None if vectors is None else torch.from_numpy(vectors)

    def text(self) -> PackedText | None:
        """The stored captions; None if the training reads none."""
        states = [table.states for table in self._tables if table.states is not None]
        if not states:
            return None
        rows = [table.state_rows(rows) for table, rows in zip(self._tables, self._rows, strict=True)]
        return read_states(states, rows, self._places)


class _Uids(Sequence[str]):
    """The uids of a batch, or of a part of it, gathered when somebody asks for one.

    Args:
        rows: The rows of the batch.
        places: Their places in it.
    """

    def __init__(self, rows: _Rows, places: range) -> None:
        self._rows, self._places = rows, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> _Uids: ...
    def __getitem__(self, place: int | slice) -> str | _Uids:
        if isinstance(place, slice):
            return _Uids(self._rows, self._places[place])
        return self._texts[self._places[place]]

    @cached_property
    def _texts(self) -> list[str]:
        return self._rows.texts("uid")


class Samples:
    """Random access to the rows of one split, with their pictures and embeddings; small data is cached.

    Args:
        reader: Reader of the rows.
        image_px: Side of the decoded pictures, in pixels; 0 reads no pictures.
        num_threads: Threads that decode; 1 decodes in the calling thread.
        window_rows: Rows in a window of the planned order; two windows stay open.
        weights: Weight of each list of pairs; empty: each is 1.
        num_streams: Streams of the planned order, each with a part of the window.
    """

    def __init__(
        self,
        reader: ShardReader,
        image_px: int,
        *,
        num_threads: int = 1,
        window_rows: int = WINDOW_ROWS,
        weights: Sequence[float] = (),
        num_streams: int = 1,
    ) -> None:
        self.reader = reader
        self.num_rows = sum(reader.shard_rows)
        self.window_rows = window_rows
        self.weights = tuple(weights)
        self.num_streams = num_streams
        self._image_px = image_px
        self._open_shards: OrderedDict[int, Future[_OpenShard]] = OrderedDict()
        """Those that were asked for last, by number; some are still being fetched, by one thread each."""
        # A larger shard is a window of its own, in each stream.
        self._most_open_rows = 2 * max(window_rows, num_streams * max(reader.shard_rows, default=0), 1)
        self._lock = Lock()  # of the table of open shards, for a moment; what is open may be read by several threads
        self._pool = ThreadPoolExecutor(num_threads) if num_threads > 1 else None
        self.row_bytes = image_px * image_px * 3
        """Memory of one decoded picture."""
        self._caches = self.num_rows * self.row_bytes <= IMAGE_CACHE_BYTES

    def batch(self, locations: NDArray[np.int64]) -> Batch:
        """The samples at locations (B, 2) of (shard number, row)."""
        rows, shards = self._find(locations)
        uids = _Uids(rows, range(len(rows)))
        return Batch(
            uids=uids,
            captions=tuple(rows.texts("caption")),
            images=self._images(rows, uids, shards, locations) if self._image_px else None,
            z_image=rows.vectors(),
            text=rows.text(),
        )

    def _find(self, locations: NDArray[np.int64]) -> tuple[_Rows, dict[int, _OpenShard]]:
        """The rows at some locations, and their shards, by number."""
        order = np.argsort(locations[:, 0], kind="stable")
        numbers, firsts = np.unique(locations[order, 0], return_index=True)
        shards = {number: self._open(number) for number in numbers.tolist()}
        places = np.split(order, firsts[1:])
        rows = [locations[of_shard, 1] for of_shard in places]
        return _Rows([shard.table for shard in shards.values()], order, places, rows), shards

    def _images(
        self, rows: _Rows, uids: Sequence[str], shards: dict[int, _OpenShard], locations: NDArray[np.int64]
    ) -> Tensor:
        """The decoded pictures, (B, H, W, 3)."""
        shard_of_row = [shards[number] for number in locations[:, 0].tolist()]
        pictures = zip(shard_of_row, locations[:, 1].tolist(), rows.texts("key"), uids, strict=True)
        arrays = self._pool.map(self._image, pictures) if self._pool else map(self._image, pictures)
        return torch.from_numpy(np.stack(list(arrays)))

    def open_one(self, locations: NDArray[np.int64]) -> None:
        """Open one shard of some locations that is neither open yet nor being opened, if there is one."""
        with self._lock:
            numbers = [n for n in np.unique(locations[:, 0]).tolist() if n not in self._open_shards]
        if numbers:
            self._open(numbers[0])

    def first(self, count: int) -> Batch | None:
        """The first ``count`` rows in order of shard and key, or None if there is no row.

        Of several lists, the first rows of each, as many as its share in the samples of the training.
        """
        if not self.num_rows:
            return None
        shard_rows, shard_lists = self.reader.shard_rows, self.reader.shard_lists
        locations: list[tuple[int, int]] = []
        for number, size in enumerate(Mixture(shard_rows, 0, shard_lists, self.weights).sizes(count)):
            rows = ((s, r) for s, rows in enumerate(shard_rows) if shard_lists[s] == number for r in range(rows))
            locations += itertools.islice(rows, size)
        return self.batch(np.asarray(locations, dtype=np.int64)) if locations else None

    def _open(self, number: int) -> _OpenShard:
        """A shard, which the first thread that asks for it fetches; the others wait for that one and for no other."""
        with self._lock:
            shard = self._open_shards.get(number)
            is_new = shard is None
            if shard is None:
                shard = self._open_shards[number] = Future[_OpenShard]()
            self._open_shards.move_to_end(number)
        if is_new:
            try:
                fetched = self._fetch(number)
                with self._lock:
                    self._open_shards.move_to_end(number)  # it came last, however early it was asked for
                shard.set_result(fetched)
            except BaseException as error:  # those that wait must hear of whatever ends this thread's work
                with self._lock:
                    del self._open_shards[number]
                shard.set_exception(error)
                raise
            self._close_others()
        return shard.result()

    def _fetch(self, number: int) -> _OpenShard:
        name, px = self.reader.shards[number], self._image_px
        table = self.reader.table(name)
        if len(table) != self.reader.shard_rows[number]:
            expected = self.reader.shard_rows[number]
            counts = f"{len(table)} rows of this split, its record says {expected}"
            raise DataError(f"shard {name}: {counts}; {repair_hint(name)}")
        shard = _OpenShard(table, self.reader.pictures(name) if px else None)
        if px and self._caches:
            shard.images = np.empty((len(table), px, px, 3), np.uint8)
        return shard

    def _close_others(self) -> None:
        """Let go of the shards that were not asked for longest, where the open ones have too many rows."""
        with self._lock:
            numbers = [number for number, shard in self._open_shards.items() if shard.done()]
            num_rows = sum(self.reader.shard_rows[number] for number in numbers)
            for number in numbers[:-1]:
                if num_rows <= self._most_open_rows:
                    break
                del self._open_shards[number]
                num_rows -= self.reader.shard_rows[number]

    def _image(self, sample: tuple[_OpenShard, int, str, str]) -> NDArray[np.uint8]:
        shard, row, key, uid = sample
        pictures, images = shard.pictures, shard.images
        assert pictures is not None
        if images is not None and row in shard.cached_rows:
            return images[row]
        try:
            image = square(pictures.decode(key, uid), self._image_px)
        except PictureError as error:
            # The download and the take-in of tars decode every good picture.
            raise DataError(f"{error}: it could be decoded when it was stored; {pictures.repair_hint}") from None
        if images is not None:
            images[row] = image
            shard.cached_rows.add(row)
        return image
