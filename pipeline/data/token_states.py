"""Captions as the frozen CLIP encodes them, stored by the embed step for the trainings that read them.

`<shard>.tokens.arrow` is an uncompressed Arrow IPC file: a reader maps it into memory, and copies the rows that it
wants and nothing else. Its metadata holds what a network takes from CLIP besides: its sizes and the empty caption.
Legend: N rows of a shard, B captions of a batch, T tokens of all of them, L of the longest, D joint space, W text
width.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.clip_config import END_TOKEN, START_TOKEN, ClipDims
from models.text import NUM_NULL_TOKENS, TextEncoding, padded_length
from pipeline.data.mends import repair_hint
from pipeline.data.shard_tables import name_of, undamaged
from pipeline.data.vectors import to_arrow
from pipeline.errors import DataError
from pipeline.workspace.hashing import HashedFile

pc: Any = pyarrow.compute  # its functions are created at import, so a type checker does not know them
_DIMS, _POOLED, _HIDDEN = b"clip_dims", b"empty_pooled", b"empty_hidden"


def states_file(shard: str) -> str:
    """Name of the token states of a shard in the embed step's artifact."""
    return f"{shard}.tokens.arrow"


@dataclass(frozen=True)
class PackedText:
    """Captions one after another without padding, in float16; they are on the CPU until ``to`` moves them."""

    pooled: Tensor
    """(B, D), before it is made of length one."""
    hidden: Tensor
    """(T, W) states of the tokens after the final layer norm."""
    tokens: Tensor
    """(T,) token ids, int32."""
    lengths: Tensor
    """(B,) tokens of each caption, int64, always on the CPU."""
    context_length: int

    @property
    def num_bytes(self) -> int:
        """Memory of its tensors."""
        return self.pooled.nbytes + self.hidden.nbytes + self.tokens.nbytes + self.lengths.nbytes

    def rows(self, part: slice) -> PackedText:
        """Some of the captions; shares their memory."""
        start, stop, _ = part.indices(len(self.lengths))
        first = int(self.lengths[:start].sum())
        of_part = slice(first, first + int(self.lengths[start:stop].sum()))
        return PackedText(
            self.pooled[part], self.hidden[of_part], self.tokens[of_part], self.lengths[part], self.context_length
        )

    def select(self, keep: NDArray[np.bool_]) -> PackedText:
        """Those of the captions that are kept, (B,)."""
        if keep.all():
            return self
        of_caption = torch.from_numpy(keep)
        of_token = torch.repeat_interleave(of_caption, self.lengths)
        return PackedText(
            self.pooled[of_caption],
            self.hidden[of_token],
            self.tokens[of_token],
            self.lengths[of_caption],
            self.context_length,
        )

    def to(self, device: torch.device) -> PackedText:
        """The same captions on a GPU."""
        pooled, hidden, tokens = (
            tensor.pin_memory().to(device, non_blocking=True) for tensor in (self.pooled, self.hidden, self.tokens)
        )
        return PackedText(pooled, hidden, tokens, self.lengths, self.context_length)

    def encoding(self) -> TextEncoding:
        """What ``FrozenText.encode_text`` gives of these captions, rounded to float16; zero at padding."""
        size, device = len(self.lengths), self.hidden.device
        length = padded_length(int(self.lengths.max()), self.context_length)
        mask = torch.arange(length) < self.lengths[:, None]  # (B, L)
        places = mask.flatten().nonzero()[:, 0].to(device)  # (T,), counted on the CPU, so that no GPU is waited for
        hidden = torch.zeros(size * length, self.hidden.shape[1], device=device)
        tokens = torch.zeros(size * length, dtype=torch.int64, device=device)
        return TextEncoding(
            pooled=self.pooled.float(),
            hidden=hidden.index_copy_(0, places, self.hidden.float()).view(size, length, -1),
            mask=mask.to(device),
            tokens=tokens.index_copy_(0, places, self.tokens.long()).view(size, length),
        )


def pack(text: TextEncoding, context_length: int) -> PackedText:
    """Captions as they are stored."""
    mask, pooled = text.mask, text.pooled.half().cpu()
    hidden, tokens = text.hidden[mask].half().cpu(), text.tokens[mask].int().cpu()
    return PackedText(pooled, hidden, tokens, mask.sum(1).cpu(), context_length)


def are_finite(packed: PackedText) -> NDArray[np.bool_]:
    """Whether all numbers of each caption are, (B,)."""
    finite = torch.isfinite(packed.pooled).all(1).numpy()
    is_bad = ~torch.isfinite(packed.hidden).all(1)
    finite[torch.repeat_interleave(torch.arange(len(finite)), packed.lengths)[is_bad].numpy()] = False
    return finite


@dataclass(frozen=True)
class EmptyCaption:
    """What a network takes from the frozen CLIP when it is created."""

    dims: ClipDims
    text: TextEncoding
    """The encoding of "", in float32."""


def states_schema(empty: EmptyCaption) -> pa.Schema:
    """Columns of the file, and in its metadata the empty caption."""
    dims, text = empty.dims, empty.text
    sizes = {name: getattr(dims, name) for name in ("embed_dim", "text_width", "context_length")}
    metadata = {
        _DIMS: json.dumps(sizes).encode(),
        _POOLED: text.pooled.float().cpu().numpy().tobytes(),
        _HIDDEN: text.hidden[:, :NUM_NULL_TOKENS].float().contiguous().cpu().numpy().tobytes(),
    }
    return pa.schema(
        [
            ("uid", pa.string()),
            ("pooled", pa.list_(pa.float16(), dims.embed_dim)),
            ("tokens", pa.list_(pa.int32())),
            ("hidden", pa.list_(pa.list_(pa.float16(), dims.text_width))),
        ],
        metadata=metadata,
    )


@contextlib.contextmanager
def write_states(path: Path, schema: pa.Schema) -> Generator[pa.ipc.RecordBatchFileWriter]:
    """A writer of record batches of ``to_rows``; the same batches give the same bytes."""
    with HashedFile(path) as stream, pa.ipc.new_file(stream, schema) as writer:
        yield writer


def to_rows(uids: pa.Array, packed: PackedText, schema: pa.Schema) -> pa.RecordBatch:
    """Captions as rows of a file."""
    offsets = pa.array(np.concatenate([[0], packed.lengths.numpy().cumsum()]).astype(np.int32))
    tokens = pa.ListArray.from_arrays(offsets, pa.array(packed.tokens.numpy()))
    hidden = pa.ListArray.from_arrays(offsets, to_arrow(packed.hidden.numpy()))
    return pa.record_batch([uids, to_arrow(packed.pooled.numpy()), tokens, hidden], schema=schema)


def read_empty(source: Path | IO[bytes]) -> EmptyCaption:
    """The empty caption of a file, of which nothing but the footer is read.

    Raises:
        DataError, StepError: As ``undamaged``.
    """
    with _named(source):
        metadata: dict[bytes, bytes] = undamaged(lambda: _read_metadata(source), source)
        dims = _dims_of(metadata)
        pooled, hidden = (
            torch.from_numpy(np.frombuffer(metadata[name], np.float32).copy()) for name in (_POOLED, _HIDDEN)
        )
        mask = torch.ones(1, NUM_NULL_TOKENS, dtype=torch.bool)
        tokens = torch.tensor([[START_TOKEN, END_TOKEN]])
        return EmptyCaption(dims, TextEncoding(pooled[None], hidden.view(1, NUM_NULL_TOKENS, -1), mask, tokens))


def copy_states(source: Path, target: Path, uids: pa.Array) -> None:
    """Write the rows of some uids alone to another file.

    Raises:
        DataError, StepError: As ``undamaged``.
    """
    schema, batches = _read_batches(source)
    with write_states(target, schema) as writer:
        for rows in batches:
            writer.write_batch(rows.filter(pc.is_in(rows.column("uid"), value_set=uids)))


class StoredStates:
    """The captions of one shard, mapped into memory and read row by row.

    Args:
        path: The file.

    Raises:
        DataError, StepError: As ``undamaged``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        schema, batches = _read_batches(path)
        self.dims = _dims_of(schema.metadata)
        self._uids = pa.chunked_array([rows.column("uid") for rows in batches], pa.string()).combine_chunks()
        offsets = [rows.column("hidden").offsets.to_numpy() for rows in batches]
        self._pooled = [_numbers(rows.column("pooled")).reshape(-1, self.dims.embed_dim) for rows in batches]
        self._tokens = [rows.column("tokens").values.to_numpy() for rows in batches]
        self._hidden = [_numbers(rows.column("hidden").values).reshape(-1, self.dims.text_width) for rows in batches]
        sizes = [rows.num_rows for rows in batches]
        self._batches = np.repeat(np.arange(len(sizes)), sizes)
        self._places = np.concatenate([np.zeros(0, np.int64), *map(np.arange, sizes)]).astype(np.int64)
        self._starts = np.concatenate([np.zeros(0, np.int32), *(part[:-1] for part in offsets)])
        self.lengths = np.concatenate([np.zeros(0, np.int32), *map(np.diff, offsets)])
        """(N,) tokens of each row."""

    def find(self, uids: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
        """The rows of some uids.

        Raises:
            DataError: If one has no row.
        """
        rows = pc.index_in(uids, value_set=self._uids)
        if rows.null_count:
            missing = uids.filter(pc.is_null(rows))[0].as_py()
            lack = f"no row of uid {missing}, which is in the embeddings"
            raise DataError(f"{self._path}: {lack}; {repair_hint(self._path)}")
        return rows.to_numpy().astype(np.int64)

    def copy(
        self, rows: NDArray[np.int64], places: NDArray[np.int64], starts: NDArray[np.int64], to: PackedText
    ) -> None:
        """Copy some rows to their places (by caption) and starts (by token) in a batch on the CPU."""
        pooled, tokens, hidden = to.pooled.numpy(), to.tokens.numpy(), to.hidden.numpy()
        columns = (self._batches, self._places, self._starts, self.lengths)
        copies = zip(places.tolist(), starts.tolist(), *(column[rows].tolist() for column in columns), strict=True)
        for place, start, batch, row, first, length in copies:
            pooled[place] = self._pooled[batch][row]
            tokens[start : start + length] = self._tokens[batch][first : first + length]
            hidden[start : start + length] = self._hidden[batch][first : first + length]


def read_states(
    shards: Sequence[StoredStates], rows: Sequence[NDArray[np.int64]], places: Sequence[NDArray[np.int64]]
) -> PackedText:
    """The captions of a batch.

    Args:
        shards: Its shards.
        rows: The rows of each in its file.
        places: Their places in the batch.
    """
    dims, size = shards[0].dims, sum(map(len, rows))
    lengths = np.zeros(size, np.int64)
    for shard, of_shard, where in zip(shards, rows, places, strict=True):
        lengths[where] = shard.lengths[of_shard]
    starts, num_tokens = lengths.cumsum() - lengths, int(lengths.sum())
    packed = PackedText(
        pooled=torch.empty(size, dims.embed_dim, dtype=torch.float16),
        # By numpy, which asks for huge pages: to touch 126 MB (4,096 captions) by small ones takes longer than to copy.
        hidden=torch.from_numpy(np.empty((num_tokens, dims.text_width), np.float16)),
        tokens=torch.empty(num_tokens, dtype=torch.int32),
        lengths=torch.from_numpy(lengths),
        context_length=dims.context_length,
    )
    for shard, of_shard, where in zip(shards, rows, places, strict=True):
        shard.copy(of_shard, where, starts[where], packed)
    return packed


def _read_batches(path: Path) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """The columns and rows of a file, mapped into memory."""

    def read() -> tuple[pa.Schema, list[pa.RecordBatch]]:
        with pa.memory_map(str(path)) as stream, pa.ipc.open_file(stream) as file:
            return file.schema, [file.get_batch(number) for number in range(file.num_record_batches)]

    with _named(path):
        schema, batches = undamaged(read, path)
        for rows in batches:
            rows.validate(full=True)  # offsets and texts; it does not look at the states
        _dims_of(schema.metadata)
    return schema, batches


def _read_metadata(source: Path | IO[bytes]) -> dict[bytes, bytes]:
    with pa.ipc.open_file(source) as file:
        return file.schema.metadata or {}


def _dims_of(metadata: Mapping[bytes, bytes] | None) -> ClipDims:
    return ClipDims(**json.loads((metadata or {})[_DIMS]))


def _numbers(vectors: pa.FixedSizeListArray) -> NDArray[np.float16]:
    """The numbers of a column of vectors, where they lie."""
    return vectors.flatten().to_numpy()


@contextlib.contextmanager
def _named(path: Path | IO[bytes]) -> Generator[None]:
    try:
        yield
    except (pa.ArrowException, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{name_of(path)}: damaged ({error}); {repair_hint(path)}") from error
