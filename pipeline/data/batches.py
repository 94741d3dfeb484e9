"""Batches of one worker in the planned order, starting at any step.

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
from pipeline.data.order import SampleOrder, Share
from pipeline.data.shards import ShardPictures
from pipeline.data.training_rows import ShardReader, ShardTable
from pipeline.errors import DataError
from pipeline.pictures import square

TextEncoder = Callable[[Sequence[str]], TextEncoding]
IMAGE_CACHE_BYTES = 512 << 20
"""Decoded pictures are cached if all of them fit into this many bytes."""
_PREFETCH_BATCHES = 2
_OPEN_ROWS = 400_000  # two windows of the planned order


@dataclass(frozen=True)
class Batch:
    """B samples; a field that a training does not read is None."""

    uids: tuple[str, ...]
    captions: tuple[str, ...]
    images: Tensor | None = None
    """uint8 (B, H, W, 3)."""
    z_image: Tensor | None = None
    """float32 (B, D), of length one."""
    negatives: tuple[str, ...] | None = None
    """Hard negatives of the captions."""

    def __len__(self) -> int:
        return len(self.uids)

    def rows(self, part: slice) -> Batch:
        """Some of the samples; shares their memory."""
        return replace(
            self,
            uids=self.uids[part],
            captions=self.captions[part],
            images=None if self.images is None else self.images[part],
            z_image=None if self.z_image is None else self.z_image[part],
            negatives=None if self.negatives is None else self.negatives[part],
        )

    def require_images(self) -> Tensor:
        """The pictures, for a training that reads them."""
        assert self.images is not None
        return self.images

    def require_z_image(self) -> Tensor:
        """The image embeddings, for a training that reads them."""
        assert self.z_image is not None
        return self.z_image

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        if device.type == "cpu":
            return self
        tensors = {
            name: tensor.pin_memory().to(device, non_blocking=True)
            for name, tensor in (("images", self.images), ("z_image", self.z_image))
            if tensor is not None
        }
        return replace(self, **tensors)


@dataclass
class _OpenShard:
    table: ShardTable
    pictures: ShardPictures | None
    images: NDArray[np.uint8] | None = None
    """Cache of decoded pictures, (N, H, W, 3); None if there is no cache."""
    cached_rows: set[int] = field(default_factory=set[int])
    """Rows of ``images`` that are filled."""


class Samples:
    """Random access to the rows of one split, with their pictures and embeddings; small data is cached.

    Args:
        reader: Reader of the rows.
        image_px: Side of the decoded pictures, in pixels; 0 reads no pictures.
        num_threads: Threads that decode; 1 decodes in the calling thread.
    """

    def __init__(self, reader: ShardReader, image_px: int, *, num_threads: int = 1) -> None:
        self.reader = reader
        self.num_rows = sum(reader.shard_rows)
        self._image_px = image_px
        self._open_shards: OrderedDict[int, _OpenShard] = OrderedDict()
        self._open_rows = 0
        self._pool = ThreadPoolExecutor(num_threads) if num_threads > 1 else None
        self.row_bytes = image_px * image_px * 3
        """Memory of one decoded picture."""
        self._caches = self.num_rows * self.row_bytes <= IMAGE_CACHE_BYTES

    def batch(self, locations: NDArray[np.int64]) -> Batch:
        """The samples at locations (B, 2) of (shard number, row)."""
        rows = [(self._open(int(number)), int(row)) for number, row in locations]
        images = z_image = None
        if self._image_px:
            arrays = self._pool.map(self._image, rows) if self._pool else map(self._image, rows)
            images = torch.from_numpy(np.stack(list(arrays)))
        vectors = [shard.table.z_image[row] for shard, row in rows if shard.table.z_image is not None]
        if vectors:
            z_image = torch.nn.functional.normalize(torch.from_numpy(np.stack(vectors)).float(), dim=-1)
        return Batch(
            uids=tuple(shard.table.uids[row] for shard, row in rows),
            captions=tuple(shard.table.captions[row] for shard, row in rows),
            images=images,
            z_image=z_image,
        )

    def first(self, count: int) -> Batch | None:
        """The first ``count`` rows in order of shard and key, or None if there is no row."""
        locations = [(s, r) for s, rows in enumerate(self.reader.shard_rows) for r in range(min(rows, count))][:count]
        return self.batch(np.asarray(locations, dtype=np.int64)) if locations else None

    def _open(self, number: int) -> _OpenShard:
        if number in self._open_shards:
            self._open_shards.move_to_end(number)
            return self._open_shards[number]
        name, px = self.reader.shards[number], self._image_px
        table = self.reader.table(name)
        shard = _OpenShard(table, self.reader.pictures(name) if px else None)
        if px and self._caches:
            shard.images = np.empty((len(table), px, px, 3), np.uint8)
        self._open_shards[number] = shard
        self._open_rows += len(table)
        while self._open_rows > _OPEN_ROWS and len(self._open_shards) > 1:
            _, oldest = self._open_shards.popitem(last=False)
            self._open_rows -= len(oldest.table)
        return shard

    def _image(self, location: tuple[_OpenShard, int]) -> NDArray[np.uint8]:
        shard, row = location
        table, pictures, images = shard.table, shard.pictures, shard.images
        assert pictures is not None
        if images is not None and row in shard.cached_rows:
            return images[row]
        image = square(pictures.decode(table.keys[row], table.uids[row]), self._image_px)
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
        prefetch: Read ahead in a separate thread.
    """

    def read(step: int) -> Batch:
        first = step * share.batch_size
        return samples.batch(order.locations(first + share.start, first + share.stop))

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
    """Plan the order of a training's samples.

    Raises:
        DataError: If there are no samples.
    """
    if samples.num_rows == 0:
        raise DataError(
            f"{where}: no row to train on in {len(samples.reader.shards)} shards; look at the download's counts"
        )
    return SampleOrder(samples.reader.shard_rows, seed)


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
        longest = int(text.mask.sum(1).max())
        length = min(text.mask.shape[1], -(-longest // 8) * 8)
        return TextEncoding(text.pooled, text.hidden[:, :length], text.mask[:, :length], text.tokens[:, :length])
