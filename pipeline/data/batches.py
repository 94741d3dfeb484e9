"""Batches of one worker in the planned order, starting at any step.

Legend: B samples of this worker's share of a batch, D features, H W pixels.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from threading import Lock
from typing import Any, overload

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from models.rows import concat_rows
from models.text import TextEncoding, padded_length
from pipeline.data.mends import repair_hint
from pipeline.data.mixture import Mixture
from pipeline.data.order import WINDOW_ROWS, SampleOrder, Share
from pipeline.data.shards import ShardPictures
from pipeline.data.token_states import PackedText, read_states
from pipeline.data.training_rows import ShardReader, ShardTable
from pipeline.errors import DataError
from pipeline.pictures.frame import square
from pipeline.pictures.read import PictureError

TextEncoder = Callable[[Sequence[str]], TextEncoding]
IMAGE_CACHE_BYTES = 512 << 20
"""Decoded pictures are cached if all of them fit into this many bytes."""
PREFETCH_BYTES = 256 << 20
"""Batches are read ahead up to this size, at least two and at most 16: enough to ride out a slow one."""
_MOST_AHEAD = 16
_THREADS = 2
"""Threads that read ahead, a batch each: while one copies vectors, which leaves the GIL, the other makes texts."""
_AHEAD_STEPS = 32
"""Steps by which a shard is opened before its first row, one a step: a new window has many shards. In steps of large
batches it is a window: shards of the one after the next would displace those that are read first."""


@dataclass(frozen=True)
class Batch:
    """B samples; a field that a training does not read is None."""

    uids: Sequence[str]
    """Often not yet read: a training needs them only to name a sample."""
    captions: tuple[str, ...]
    images: Tensor | None = None
    """uint8 (B, H, W, 3)."""
    z_image: Tensor | None = None
    """(B, D) in float16, as stored, or in float32, of length one; ``require_z_image`` gives the second."""
    negatives: tuple[str, ...] | None = None
    """Hard negatives of the captions."""
    text: PackedText | None = None
    """The captions as the embed step encoded them, if it stored that."""

    def __len__(self) -> int:
        return len(self.uids)

    @property
    def num_bytes(self) -> int:
        """Memory of its tensors."""
        tensors = sum(tensor.nbytes for tensor in (self.images, self.z_image) if tensor is not None)
        return tensors + (0 if self.text is None else self.text.num_bytes)

    def rows(self, part: slice) -> Batch:
        """Some of the samples; shares their memory."""
        return replace(
            self,
            uids=self.uids[part],
            captions=self.captions[part],
            images=None if self.images is None else self.images[part],
            z_image=None if self.z_image is None else self.z_image[part],
            negatives=None if self.negatives is None else self.negatives[part],
            text=None if self.text is None else self.text.rows(part),
        )

    def encoded(self, encode: TextEncoder) -> TextEncoding:
        """The captions as the frozen CLIP encodes them: stored, or else by ``encode``."""
        return encode(self.captions) if self.text is None else self.text.encoding()

    def require_images(self) -> Tensor:
        """The pictures, for a training that reads them."""
        assert self.images is not None
        return self.images

    def require_z_image(self) -> Tensor:
        """The image embeddings, float32 (B, D) of length one, for a training that reads them.

        They are made where the batch is: the reader would take longer for that than for all else, and send twice the
        bytes to a GPU.
        """
        assert self.z_image is not None
        return self.z_image if self.z_image.dtype == torch.float32 else normalize(self.z_image.float(), dim=-1)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        if device.type == "cpu":
            return self
        tensors = {
            name: tensor.pin_memory().to(device, non_blocking=True)
            for name, tensor in (("images", self.images), ("z_image", self.z_image))
            if tensor is not None
        }
        return replace(self, **tensors, text=None if self.text is None else self.text.to(device))


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


def iterate_batches(
    samples: Samples, order: SampleOrder, share: Share, start_step: int, *, prefetch: bool = False
) -> Generator[Batch]:
    """Yield this worker's batches of steps ``start_step``, ``start_step`` + 1, ... without end.

    Args:
        samples: The rows.
        order: Their planned order.
        share: This worker's part of each batch.
        start_step: First step, 0-based.
        prefetch: Read ahead in threads.
    """
    ahead_steps = max(1, min(_AHEAD_STEPS, samples.window_rows // share.batch_size))

    @lru_cache(2 * _AHEAD_STEPS)  # each is asked for when its shards are opened, and when it is read
    def locations(step: int) -> NDArray[np.int64]:
        first = step * share.batch_size
        return order.locations(first + share.start, first + share.stop)

    def read(step: int) -> Batch:
        batch = samples.batch(locations(step))
        samples.open_one(locations(step + ahead_steps))
        return batch

    step = start_step
    if not prefetch:
        while True:
            yield read(step)
            step += 1
    with ThreadPoolExecutor(_THREADS) as threads:
        first = read(step)
        num_ahead = max(2, min(_MOST_AHEAD, PREFETCH_BYTES // max(1, first.num_bytes)))
        ahead = deque(threads.submit(read, step + 1 + i) for i in range(num_ahead))
        yield first
        while True:
            yield ahead.popleft().result()
            ahead.append(threads.submit(read, step + 1 + num_ahead))
            step += 1


def plan_order(samples: Samples, seed: int, *, where: str, batch_size: int = 1) -> SampleOrder:
    """Plan the order of a training's samples; only with several streams it depends on the size of the global batch.

    Raises:
        DataError: If there are no samples, or too few for the streams.
    """
    if samples.num_rows == 0:
        raise DataError(
            f"{where}: no row to train on in {len(samples.reader.shards)} shards; look at the download's counts"
        )
    reader = samples.reader
    try:
        return SampleOrder(
            reader.shard_rows,
            seed,
            window_rows=samples.window_rows,
            shard_lists=reader.shard_lists,
            weights=samples.weights,
            num_streams=samples.num_streams,
            batch_size=batch_size,
        )
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error


class CaptionTable:
    """Captions encoded by the frozen CLIP: all at once if they are few, else batch by batch.

    One fixed order of encoding gives bit-identical encodings, whichever step a run resumes from.

    Args:
        encode: The text tower, under ``torch.no_grad``.
        captions: Every caption of the training, sorted; None encodes each batch when it is requested.
        batch_size: Captions encoded at a time.
    """

    def __init__(self, encode: TextEncoder, captions: Sequence[str] | None, *, batch_size: int = 256) -> None:
        self._encode = encode
        self._row_of: dict[str, int] = {}
        self._table: TextEncoding | None = None
        if captions:
            parts = [encode(captions[i : i + batch_size]) for i in range(0, len(captions), batch_size)]
            self._table = concat_rows(parts)
            self._row_of = {caption: row for row, caption in enumerate(captions)}

    def __call__(self, captions: Sequence[str]) -> TextEncoding:
        """Encode captions, cut to the length of the longest (rounded up to a multiple of 8 tokens)."""
        table = self._table
        if table is None or any(caption not in self._row_of for caption in captions):
            return self._encode(captions)
        rows = torch.tensor([self._row_of[caption] for caption in captions], device=table.mask.device)
        text: Any = table[rows]
        length = padded_length(int(text.mask.sum(1).max()), text.mask.shape[1])
        return TextEncoding(text.pooled, text.hidden[:, :length], text.mask[:, :length], text.tokens[:, :length])
