"""The embed step: computes z_image and z_text of every good row of a shard."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.clip import FrozenClip, load_clip
from pipeline.data.rows import embeddings_schema
from pipeline.data.selection import Selection
from pipeline.data.shards import Sample, read_samples
from pipeline.data.vectors import ROW_GROUP_ROWS, WRITER_OPTIONS, to_arrow
from pipeline.errors import DataError
from pipeline.pictures import PictureError, Pixels, decode, square


class Embedder:
    """Embeds shards with CLIP, which is loaded once for each worker.

    Args:
        folder: The clip step's artifact, a folder in open_clip's local-dir layout.
        batch_size: Pictures in one forward pass.
        device: Torch device of the network.
        selection: Rows to embed; None: all.

    Raises:
        DataError: If the folder holds no readable CLIP.
    """

    def __init__(self, folder: Path, batch_size: int, device: str = "cpu", selection: Selection | None = None) -> None:
        try:
            self._clip = FrozenClip(load_clip(folder)).to(device)
        except ValueError as error:
            raise DataError(f"embed: {error}") from error
        self._batch_size = batch_size
        self._select = None if selection is None else selection.of

    def __call__(self, tar: Path, parquet: Path, shard: str, target: Path) -> Counter[str]:
        """Embed one shard of the download step.

        Args:
            tar: Pictures of the shard.
            parquet: Table of the shard.
            shard: Name of the shard.
            target: Parquet file to write, in ``rows.embeddings_schema``, sorted by key.

        Returns:
            Numbers of rows: ``in`` (good rows of the download that the filter keeps) = ``ok`` + ``corrupt``.

        Raises:
            DataError: If the shard is damaged, or tar and table do not belong together; names shard, row and uid.
        """
        counts: Counter[str] = Counter({"in": 0, "ok": 0, "corrupt": 0})
        schema = embeddings_schema(self._clip.dims.embed_dim)
        with pq.ParquetWriter(target, schema, **WRITER_OPTIONS) as writer:
            inputs = self._decode(read_samples(tar, parquet, shard, self._select), counts)
            batches = [self._embed(batch, schema) for batch in _batches(inputs, self._batch_size)]
            writer.write_table(pa.Table.from_batches(batches, schema), row_group_size=ROW_GROUP_ROWS)
        return counts

    def _decode(self, samples: Iterator[Sample], counts: Counter[str]) -> Iterator["_ClipInput"]:
        for sample in samples:
            counts["in"] += 1
            try:
                image = decode(sample.picture, where=sample.key)
            except PictureError:
                counts["corrupt"] += 1
                continue
            counts["ok"] += 1
            yield _ClipInput(sample, square(image, self._clip.image_px))

    def _embed(self, batch: list["_ClipInput"], schema: pa.Schema) -> pa.RecordBatch:
        z_image = self._clip.encode_image(torch.from_numpy(np.stack([item.pixels for item in batch])))
        z_text = self._clip.encode_text([item.sample.caption for item in batch]).z_text
        columns: list[Any] = [
            pa.array([getattr(item.sample, name) for item in batch], pa.string())
            for name in ("uid", "key", "url", "caption", "split")
        ]
        columns += [to_arrow(z.cpu().numpy()) for z in (z_image, z_text)]
        return pa.RecordBatch.from_arrays(columns, schema=schema)


@dataclass
class _ClipInput:
    sample: Sample
    pixels: Pixels
    """(px, px, 3), CLIP's input size."""


def _batches(items: Iterator["_ClipInput"], size: int) -> Iterator[list["_ClipInput"]]:
    while batch := list(itertools.islice(items, size)):
        yield batch
