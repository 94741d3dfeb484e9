"""Batches in the planned order, for one worker, from any step on.

Legend: B samples of this worker's share of a batch, D features, H W pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.rows import concat_rows
from models.text import TextEncoding
from pipeline.data.order import SampleOrder, worker_slice
from pipeline.data.shards import ShardPictures
from pipeline.data.training_rows import ShardReader, ShardTable
from pipeline.errors import DataError
from pipeline.pictures import square

TextEncoder = Callable[[Sequence[str]], TextEncoding]
IMAGE_CACHE_BYTES = 512 << 20
"""Decoded pictures are kept when all of them take no more than this."""
_PREFETCH_BATCHES = 2
_OPEN_ROWS = 400_000  # two windows of the planned order


@dataclass(frozen=True)
class Batch:
    """B samples as the data holds them; what a training does not read is None."""

    uids: tuple[str, ...]
    captions: tuple[str, ...]
    images: Tensor | None = None
    """uint8 (B, H, W, 3)."""
    z_image: Tensor | None = None
    """float32 (B, D), of length one."""

    def __len__(self) -> int:
        return len(self.uids)

    def require_images(self) -> Tensor:
        """The pictures, which this training was set up to read."""
        assert self.images is not None
        return self.images

    def require_z_image(self) -> Tensor:
        """The image embeddings, which this training was set up to read."""
        assert self.z_image is not None
        return self.z_image

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        if device.type == "cpu":
            return self
        moved = {
            name: tensor.pin_memory().to(device, non_blocking=True)
            for name, tensor in (("images", self.images), ("z_image", self.z_image))
            if tensor is not None
        }
        return replace(self, **moved)


@dataclass
class _OpenShard:
    table: ShardTable
    pictures: ShardPictures | None
    images: NDArray[np.uint8] | None = None
    """Decoded pictures, (N, H, W, 3), where they are kept."""
    decoded: set[int] = field(default_factory=set[int])
    """Rows of ``images`` that are filled."""


class Samples:
    """Rows of one split by place, each with its picture and embedding; keeps what it has read while it is small.

    Args:
        reader: Where the rows are.
        image_px: Side of the decoded pictures, in pixels; 0 reads none.
        num_threads: Threads that decode; 1 decodes where it is called.
    """

    def __init__(self, reader: ShardReader, image_px: int, *, num_threads: int = 1) -> None:
        self.reader = reader
        self.num_rows = sum(reader.shard_rows)
        self._image_px = image_px
        self._open_shards: OrderedDict[int, _OpenShard] = OrderedDict()
        self._open_rows = 0
        self._pool = ThreadPoolExecutor(num_threads) if num_threads > 1 else None
        self._caches = self.num_rows * image_px * image_px * 3 <= IMAGE_CACHE_BYTES

    def batch(self, places: NDArray[np.int64]) -> Batch:
        """The samples at places (B, 2) of (shard number, row)."""
        rows = [(self._open(int(shard)), int(row)) for shard, row in places]
        images = z_image = None
        if self._image_px:
            decoded = self._pool.map(self._image, rows) if self._pool else map(self._image, rows)
            images = torch.from_numpy(np.stack(list(decoded)))
        vectors = [opened.table.z_image[row] for opened, row in rows if opened.table.z_image is not None]
        if vectors:
            z_image = torch.nn.functional.normalize(torch.from_numpy(np.stack(vectors)).float(), dim=-1)
        return Batch(
            uids=tuple(opened.table.uids[row] for opened, row in rows),
            captions=tuple(opened.table.captions[row] for opened, row in rows),
            images=images,
            z_image=z_image,
        )

    def first(self, count: int) -> Batch | None:
        """The first ``count`` rows in order of shard and key, or None where there is no row."""
        places = [(s, r) for s, rows in enumerate(self.reader.shard_rows) for r in range(min(rows, count))][:count]
        return self.batch(np.asarray(places, dtype=np.int64)) if places else None

    def _open(self, number: int) -> _OpenShard:
        if number in self._open_shards:
            self._open_shards.move_to_end(number)
            return self._open_shards[number]
        shard, px = self.reader.shards[number], self._image_px
        table = self.reader.table(shard)
        opened = _OpenShard(table, self.reader.pictures(shard) if px else None)
        if px and self._caches:
            opened.images = np.empty((len(table), px, px, 3), np.uint8)
        self._open_shards[number] = opened
        self._open_rows += len(table)
        while self._open_rows > _OPEN_ROWS and len(self._open_shards) > 1:
            _, dropped = self._open_shards.popitem(last=False)
            self._open_rows -= len(dropped.table)
        return opened

    def _image(self, place: tuple[_OpenShard, int]) -> NDArray[np.uint8]:
        opened, row = place
        table, pictures, images = opened.table, opened.pictures, opened.images
        assert pictures is not None
        if images is not None and row in opened.decoded:
            return images[row]
        image = square(pictures.decode(table.keys[row], table.uids[row]), self._image_px)
        if images is not None:
            images[row] = image
            opened.decoded.add(row)
        return image


@dataclass(frozen=True)
class Share:
    """Which part of the global batches a worker takes."""

    batch_size: int
    """Global batch, in samples."""
    rank: int = 0
    world_size: int = 1


def iterate_batches(
    samples: Samples, order: SampleOrder, share: Share, start_step: int, *, prefetch: bool = False
) -> Generator[Batch]:
    """This worker's batches of steps ``start_step``, ``start_step`` + 1, ...; never ends.

    Args:
        samples: The rows.
        order: Their planned order.
        share: Which of them are this worker's.
        start_step: First step, 0-based.
        prefetch: Read ahead in a thread of its own.
    """

    def read(step: int) -> Batch:
        start, stop = worker_slice(step, share.batch_size, share.rank, share.world_size)
        return samples.batch(order.places(start, stop))

    step = start_step
    if not prefetch:
        while True:
            yield read(step)
            step += 1
    with ThreadPoolExecutor(1) as thread:
        ahead: list[Future[Batch]] = [thread.submit(read, step + i) for i in range(_PREFETCH_BATCHES)]
        while True:
            yield ahead.pop(0).result()
            ahead.append(thread.submit(read, step + _PREFETCH_BATCHES))
            step += 1


def plan_order(samples: Samples, seed: int, *, where: str) -> SampleOrder:
    """The order of a training's samples.

    Raises:
        DataError: If there is none.
    """
    if samples.num_rows == 0:
        raise DataError(
            f"{where}: no row to train on in {len(samples.reader.shards)} shards; look at the download's counts"
        )
    return SampleOrder(samples.reader.shard_rows, seed)


class CaptionTable:
    """Encodings of captions by the frozen CLIP: of all of them at once where they are few, else batch by batch.

    Encoding all in one fixed order keeps every encoding the same to the last bit, whichever step a run resumes from.

    Args:
        encode: The text tower, under ``torch.no_grad``.
        captions: Every caption of the training, sorted; None encodes each batch when it comes.
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
        """Encode captions, cut to the longest of them (a multiple of 8 tokens)."""
        table = self._table
        if table is None or any(caption not in self._row_of for caption in captions):
            return self._encode(captions)
        rows = torch.tensor([self._row_of[caption] for caption in captions], device=table.mask.device)
        found: Any = table[rows]
        longest = int(found.mask.sum(1).max())
        length = min(found.mask.shape[1], -(-longest // 8) * 8)
        return TextEncoding(found.pooled, found.hidden[:, :length], found.mask[:, :length], found.tokens[:, :length])
