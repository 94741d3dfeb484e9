"""The embed step: computes z_image and z_text of every good row of a shard.

Pictures are decoded and captions tokenised a chunk at a time, ahead of the network, by ``Decoders``: threads of this
process, or other processes. Until then pictures stay encoded, so a chunk on its way is small. One ``Embedder`` may take
several shards at once, from several threads: while one shard is read or written, another keeps the network busy.
"""

import contextlib
import itertools
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline.clip.files import NO_IMAGE_TOWER, load_clip
from pipeline.clip.frozen import FrozenClip
from pipeline.data.chunks import CHUNK_ROWS, Chunk, DecodedChunk, Decoders, ThreadDecoders
from pipeline.data.rows import embeddings_schema
from pipeline.data.selection import Selection
from pipeline.data.shard_tables import splits_of
from pipeline.data.shards import ShardPictures, good_samples
from pipeline.data.token_states import (
    EmptyCaption,
    PackedText,
    are_finite,
    pack,
    states_file,
    states_schema,
    to_rows,
    write_states,
)
from pipeline.data.vectors import to_arrow, write_embeddings
from pipeline.errors import DataError
from pipeline.recipe.sections import EmbedConfig
from pipeline.workspace.store import Artifact

WriteStates = Callable[[pa.Array, PackedText], None]
"""Writes the token states of the rows with some uids."""
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class EmbeddedShard:
    """The rows of one shard."""

    table: pa.Table
    """The embedded rows, in ``rows.embeddings_schema``, sorted by key."""
    failures: list[dict[str, str]]
    """The other rows, sorted by key: ``uid``, ``key``, ``url``, ``reason`` and ``detail``."""

    @property
    def counts(self) -> Counter[str]:
        """Numbers of rows: ``in`` (good rows of the download that the filter keeps) = ``ok`` + ``corrupt``."""
        num_ok, num_corrupt = self.table.num_rows, len(self.failures)
        return Counter({"in": num_ok + num_corrupt, "ok": num_ok, "corrupt": num_corrupt})

    @property
    def splits(self) -> dict[str, int]:
        """Embedded rows by split."""
        return splits_of(self.table)


class Embedder:
    """Embeds shards with CLIP, which is loaded once for each worker; several threads may call it at once.

    Args:
        folder: The clip step's artifact, a folder in open_clip's local-dir layout.
        config: The recipe's section.
        decoders: What decodes; None: threads of this process.
        selection: Rows to embed; None: all.

    Raises:
        DataError: If the folder holds no readable CLIP.
    """

    def __init__(
        self,
        folder: Path,
        config: EmbedConfig,
        decoders: Decoders | None = None,
        selection: Selection | None = None,
    ) -> None:
        self._device = torch.device(config.resources.accelerator)
        try:
            clip = load_clip(folder)
        except ValueError as error:
            raise DataError(f"embed: {error}") from error
        if not clip.has_images:
            raise DataError(f"embed: {folder}: {NO_IMAGE_TOWER}")
        self._clip = FrozenClip(clip).to(self._device)
        if config.compiled:
            self._clip.compile_towers()
        self._config = config
        self._decoders = decoders or ThreadDecoders(self._clip.clip.inputs)
        self._turn = threading.Lock()
        self._of_thread = threading.local()
        self._selection = selection
        self._schema: pa.Schema | None = None
        if config.token_states:
            self._schema = states_schema(EmptyCaption(self._clip.dims, self._clip.encode_text([""])))

    def write(self, tar: Path, parquet: Path, shard: str, output: Artifact) -> tuple[EmbeddedShard, list[str]]:
        """Embed one shard and publish its files; returns their names, too. The other arguments are those of a call."""
        names = [f"{shard}.parquet"]
        with contextlib.ExitStack() as stack:
            states: Path | None = None
            if self._schema is not None:  # published last, so that no token states are without the rows that name them
                names.append(states_file(shard))
                states = stack.enter_context(output.write(names[1]))
            target = stack.enter_context(output.write(names[0]))
            result = self(tar, parquet, shard, states)
            write_embeddings([result.table], target, result.table.schema)
        return result, names

    def __call__(self, tar: Path, parquet: Path, shard: str, states: Path | None = None) -> EmbeddedShard:
        """Embed one shard of the download step.

        Args:
            tar: Pictures of the shard.
            parquet: Table of the shard.
            shard: Name of the shard.
            states: File for the token states, if the recipe wants them.

        Raises:
            DataError: If the shard is damaged, or tar and table do not belong together; names shard, row and uid.
        """
        rows, pictures = good_samples(tar, parquet, shard)
        rows = rows if self._selection is None else self._selection.of(rows, shard)
        starts = range(0, rows.num_rows, self._config.batch_size)
        batches = [rows.slice(start, self._config.batch_size) for start in starts]
        chunks = [_chunks(batch, pictures) for batch in batches]
        decoded = self._decode(itertools.chain.from_iterable(chunks))
        with self._stream(), self._states_writer(states) as write:
            results = [
                self._embed(batch, list(itertools.islice(decoded, len(parts))), write)
                for batch, parts in zip(batches, chunks, strict=True)
            ]
        schema = embeddings_schema(self._clip.dims.embed_dim)
        return EmbeddedShard(
            pa.concat_tables([schema.empty_table(), *(good for good, _ in results)]),
            [failure for _, failures in results for failure in failures],
        )

    def _decode(self, chunks: Iterator[Chunk]) -> Iterator[DecodedChunk]:
        """Decode chunks ahead, in order."""
        waiting: deque[Callable[[], DecodedChunk]] = deque()
        for chunk in chunks:
            waiting.append(self._decoders.submit(chunk))
            if len(waiting) > self._decoders.num_ahead:
                yield waiting.popleft()()
        while waiting:
            yield waiting.popleft()()

    @contextlib.contextmanager
    def _states_writer(self, path: Path | None) -> Generator[WriteStates | None]:
        """Writes the token states of some uids to a file; None if they are not wanted."""
        if path is None or self._schema is None:
            yield None
            return
        schema = self._schema
        with write_states(path, schema) as writer:
            yield lambda uids, packed: writer.write_batch(to_rows(uids, packed, schema))

    def _embed(
        self, rows: pa.Table, parts: list[DecodedChunk], write: WriteStates | None
    ) -> tuple[pa.Table, list[dict[str, str]]]:
        good: list[int] = []
        reasons: dict[int, tuple[str, str]] = {}
        for first, part in zip(itertools.count(0, CHUNK_ROWS), parts, strict=False):
            good += [first + row for row in part.good]
            reasons |= {first + row: reason for row, reason in part.failures.items()}
        z_image, z_text, states = self._encode(parts, with_states=write is not None)
        finite = np.asarray(np.isfinite(z_image).all(1) & np.isfinite(z_text).all(1))
        if states is not None:
            finite &= are_finite(states)
        for row in np.flatnonzero(~finite):
            reasons[good[row]] = ("embedding is not finite", f"precision {self._config.precision}")
        table = rows.take(pa.array(np.array(good, np.int64)[finite]))
        z_image, z_text = z_image[finite], z_text[finite]
        if write is not None and states is not None:
            write(table["uid"].combine_chunks(), states.select(finite))
        columns: list[Any] = [
            *table.combine_chunks().columns,
            pa.array((z_image * z_text).sum(1), pa.float32()),
            to_arrow(z_image),
            to_arrow(z_text),
        ]
        failed = sorted(reasons)
        identity = rows.take(pa.array(failed, pa.int64())).select(["uid", "key", "url"]).to_pylist()
        causes = [dict(zip(("reason", "detail"), reasons[row], strict=True)) for row in failed]
        return (
            pa.table(columns, schema=embeddings_schema(self._clip.dims.embed_dim)),
            [row | cause for row, cause in zip(identity, causes, strict=True)],
        )

    def _encode(
        self, parts: list[DecodedChunk], *, with_states: bool
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], PackedText | None]:
        """z_image and z_text (N, D) of a batch, of length one, and the token states if they are wanted."""
        if not any(len(part.good) for part in parts):
            empty = np.zeros((0, self._clip.dims.embed_dim), np.float32)
            return empty, empty, None
        pixels = torch.cat([torch.from_numpy(part.pixels).to(self._device) for part in parts])
        tokens = torch.from_numpy(np.concatenate([part.tokens for part in parts]))
        dtype = _AUTOCAST.get(self._config.precision)
        with self._turns(), torch.autocast(self._device.type, dtype, enabled=dtype is not None):
            z_image = self._clip.encode_image(pixels)
            if with_states:
                text = self._clip.encode_tokens(tokens)
                z_text, states = text.z_text, pack(text, self._clip.dims.context_length)
            else:
                z_text, states = self._clip.embed_tokens(tokens), None
        return z_image.float().cpu().numpy(), z_text.float().cpu().numpy(), states

    @contextlib.contextmanager
    def _turns(self) -> Generator[None]:
        """On the CPU one shard at a time, which has all threads; on a GPU each thread has a stream of its own."""
        with self._turn if self._device.type == "cpu" else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def _stream(self) -> Generator[None]:
        if self._device.type == "cpu":
            yield
            return
        if not hasattr(self._of_thread, "stream"):  # one for each thread, because torch keeps free memory by stream
            self._of_thread.stream = torch.cuda.Stream()
        with torch.cuda.stream(self._of_thread.stream):
            yield


def _chunks(rows: pa.Table, pictures: ShardPictures) -> list[Chunk]:
    chunks: list[Chunk] = []
    for start in range(0, rows.num_rows, CHUNK_ROWS):
        part = rows.slice(start, CHUNK_ROWS)
        keys, uids, captions = (part.column(name).to_pylist() for name in ("key", "uid", "caption"))
        chunks.append(Chunk(pictures, keys, uids, captions))
    return chunks
