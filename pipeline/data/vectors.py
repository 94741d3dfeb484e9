"""Embeddings as numpy arrays and as Parquet columns of fixed-size lists of float16, which plain pyarrow reads."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.far_files import FarFiles, MappedFiles
from pipeline.data.mends import repair_hint
from pipeline.data.rows import embeddings_schema
from pipeline.data.shard_tables import read_batches, read_table, undamaged
from pipeline.errors import DataError
from pipeline.workspace.hashing import HashedFile

pc: Any = pyarrow.compute  # its functions are made when it is imported
ROW_GROUP_ROWS = 1024
"""Rows of a row group; small, so that a writer holds few vectors in memory."""

WRITER_OPTIONS: dict[str, Any] = {"compression": "none", "use_dictionary": False, "data_page_size": 1 << 30}
"""How a ParquetWriter stores embeddings: uncompressed (vectors do not shrink), and each column of a row group as one
page. The page ends with the bytes of its vectors, so `StoredVectors` reads a single vector from its place in it."""

BATCH_ROWS = 16_384
"""Most rows of a file that are read at once where all of them are read: 50 MB of float32 at D = 768."""
VECTOR_COLUMNS = ("z_image", "z_text")
_ONE_PAGE = {b"unclip": b"one plain page for each column of a row group"}


@dataclass
class Vectors:
    """The embeddings of one shard."""

    z_image: NDArray[np.float16]
    """(N, D), rows of length one."""
    z_text: NDArray[np.float16]
    """(N, D), rows of length one."""
    table: pa.Table = field(repr=False)
    """Columns uid, key, url, caption, split, clip_score."""


def to_arrow(vectors: NDArray[Any], dtype: Any = np.float16) -> pa.FixedSizeListArray:
    """Convert (N, D) numbers to a column of fixed-size lists of a type of floats."""
    rows = np.ascontiguousarray(vectors, dtype=dtype)
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])


def to_numpy(column: pa.ChunkedArray) -> NDArray[np.float16]:
    """Convert a column of fixed-size lists to an array (N, D)."""
    chunks = [chunk.flatten().to_numpy().reshape(-1, chunk.type.list_size) for chunk in column.chunks]
    return np.concatenate(chunks) if chunks else np.zeros((0, column.type.list_size), np.float16)


def to_unit(vectors: NDArray[np.float16]) -> NDArray[np.float32]:
    """Rows (N, D) as float32, normalised to length one, because float16 changes the length by up to 1e-3."""
    rows = vectors.astype(np.float32)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows


def write_embeddings(tables: Iterable[pa.Table], path: Path, schema: pa.Schema) -> None:
    """Write tables in ``rows.embeddings_schema`` to one file; the same tables give the same bytes."""
    with (
        HashedFile(path) as stream,
        pq.ParquetWriter(stream, schema.with_metadata(_ONE_PAGE), **WRITER_OPTIONS) as writer,
    ):
        for table in tables:
            rows = table.combine_chunks().replace_schema_metadata(_ONE_PAGE)
            writer.write_table(rows, row_group_size=ROW_GROUP_ROWS)


def read_column(path: Path, name: str) -> NDArray[np.float16]:
    """Read one column of vectors of a shard, (N, D).

    From a file of ``write_embeddings`` the numbers are copied as they lie there; pyarrow, which decodes every number of
    a list for itself, reads the others.

    Raises:
        DataError, StepError: As ``undamaged``.
    """
    return undamaged(lambda: _read_column(path, name), path)


def _read_column(path: Path, name: str) -> NDArray[np.float16]:
    with pq.ParquetFile(path) as file:
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        embed_dim = file.schema_arrow.field(name).type.list_size
        leaf = file.schema_arrow.get_field_index(name)  # each column has one leaf
        is_ours = _ONE_PAGE.items() <= (file.schema_arrow.metadata or {}).items()
        if not (is_ours and all(_is_plain(group, leaf) for group in groups)):
            return to_numpy(file.read([name]).column(name))
    if not groups:
        return np.zeros((0, embed_dim), np.float16)
    content, parts = np.memmap(path, np.uint8, "r"), list[NDArray[np.float16]]()
    for group in groups:
        chunk = group.column(leaf)
        stop = chunk.data_page_offset + chunk.total_compressed_size
        numbers = content[stop - 2 * embed_dim * group.num_rows : stop]
        parts.append(numbers.view(np.float16).reshape(group.num_rows, embed_dim))
    return np.concatenate(parts)


class StoredColumn:
    """One column of vectors of a shard, read row by row when it is asked for.

    A file of ``write_embeddings`` stays on the disk, mapped, so that it takes no memory of the process; pyarrow reads
    the column of any other file at once.

    Args:
        path: The shard.
        name: The column.

    Raises:
        DataError, StepError: As ``undamaged``.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._bytes, self._starts, self._row_bytes = undamaged(lambda: _open_column(path, name), path)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """The vectors of some rows of the file, (len(rows), D)."""
        # Rows as opaque values of their size, at any byte: each is copied as a whole.
        num_places = max(0, len(self._bytes) - self._row_bytes + 1)
        values = np.ndarray((num_places,), f"V{self._row_bytes}", self._bytes, strides=(1,))
        return values[self._starts[rows]].view(np.float16).reshape(len(rows), self._row_bytes // 2)


def _is_plain(group: Any, leaf: int) -> bool:
    """Whether a row group may be one of ``write_embeddings``: programs that write a file anew keep its metadata."""
    chunk = group.column(leaf)
    is_stored_plainly = chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page
    return is_stored_plainly and group.num_rows <= ROW_GROUP_ROWS


def _open_column(path: Path, name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64], int]:
    """The bytes of a column or of its file, where each row begins in them, and how many bytes it has."""
    with pq.ParquetFile(path) as file:
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        row_bytes = 2 * file.schema_arrow.field(name).type.list_size
        leaf = file.schema_arrow.get_field_index(name)
        is_ours = _ONE_PAGE.items() <= (file.schema_arrow.metadata or {}).items()
        if not groups or not (is_ours and all(_is_plain(group, leaf) for group in groups)):
            content = to_numpy(file.read([name]).column(name)).view(np.uint8).reshape(-1)
            return content, np.arange(len(content) // row_bytes) * row_bytes, row_bytes
    stops = [group.column(leaf).data_page_offset + group.column(leaf).total_compressed_size for group in groups]
    rows = [np.arange(-group.num_rows, 0) * row_bytes for group in groups]
    starts = np.concatenate([stop + offsets for stop, offsets in zip(stops, rows, strict=True)])
    return np.memmap(path, np.uint8, "r"), starts, row_bytes


def read_vectors(path: Path) -> Vectors:
    """Read one shard of the embed step.

    Raises:
        DataError: If the file is damaged or lacks a column; names the file.
    """
    names = [name for name in embeddings_schema(1).names if name not in {"z_image", "z_text"}]
    table = read_table(path, names)
    return Vectors(read_column(path, "z_image"), read_column(path, "z_text"), table)


def training_batches(file: Path | IO[bytes], columns: Sequence[str]) -> Iterator[list[NDArray[np.float32]]]:
    """The vectors of a shard's training rows, in order, a batch at a time.

    Memory grows with ``BATCH_ROWS`` x D for each column, and with the rows of the file by some bytes for each, but not
    with rows x D. Only of a local file that another program wrote anew, a column is held as a whole.

    Args:
        file: The shard: a local path, or what ``Artifact.ranged`` gives, of which only these columns are fetched.
        columns: Some of ``VECTOR_COLUMNS``.

    Yields:
        One array (B, D) for each column, rows of length one, with B up to ``BATCH_ROWS``.

    Raises:
        DataError: If the file is damaged or lacks a column; names it.
    """
    if isinstance(file, Path):
        is_train = _is_train(read_table(file, ["split"]))
        stored = [StoredColumn(file, name) for name in columns]
        for first in range(0, len(is_train), BATCH_ROWS):
            rows = first + np.flatnonzero(is_train[first : first + BATCH_ROWS])
            yield [to_unit(column.read(rows)) for column in stored]
    else:
        for table in read_batches(file, [*columns, "split"], BATCH_ROWS):
            is_train = _is_train(table)
            yield [to_unit(to_numpy(table.column(name))[is_train]) for name in columns]


def _is_train(table: pa.Table) -> NDArray[np.bool_]:
    return pc.equal(table.column("split"), "train").to_numpy()


@dataclass(frozen=True)
class RowGroups:
    """Where the vectors of some files start; a row's number counts through all files.

    Legend: G row groups.
    """

    first_rows: NDArray[np.int64]
    """(G,) number of the first row of each row group, ascending."""
    files: NDArray[np.int64]
    """(G,) number of its file."""
    offsets: NDArray[np.int64]
    """(G, 2) place of its first z_image and z_text, in bytes from the start of the file."""

    @classmethod
    def of_file(cls, path: Path | IO[bytes], *, file: int = 0, first_row: int = 0) -> "RowGroups":
        """Read the places from the footer of a file that was written with ``WRITER_OPTIONS``.

        Of a file of ``Artifact.ranged`` in an object store nothing else is fetched.

        Raises:
            DataError: If the file is damaged or lacks a column, or its first vectors are not where they should be.
            StepError: As ``undamaged``.
        """
        return undamaged(lambda: cls._of_file(path, file, first_row), path)

    @classmethod
    def _of_file(cls, path: Path | IO[bytes], file: int, first_row: int) -> "RowGroups":
        with pq.ParquetFile(path) as parquet:
            metadata = parquet.metadata
            names = [metadata.schema.column(i).path.split(".")[0] for i in range(metadata.num_columns)]
            first_rows, offsets = list[int](), list[list[int]]()
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                if not group.num_rows:  # a shard of which no row stays
                    continue
                chunks = [group.column(names.index(column)) for column in VECTOR_COLUMNS]
                # The last bytes of a chunk are its values, two bytes each.
                offsets.append([c.data_page_offset + c.total_compressed_size - 2 * c.num_values for c in chunks])
                first_rows.append(first_row)
                first_row += group.num_rows
        return cls(np.array(first_rows, np.int64), np.full(len(offsets), file), np.array(offsets).reshape(-1, 2))

    @classmethod
    def concatenate(cls, parts: "list[RowGroups]") -> "RowGroups":
        """The row groups of several files, in order."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__annotations__))


class StoredVectors:
    """Reads single vectors by row number, in time and memory that do not depend on the number of rows.

    Args:
        groups: Where the vectors are.
        path_of: The local path of a file, by its number.
        embed_dim: Width D of a vector.
        far: The same files, if some of them are in an object store.
    """

    def __init__(
        self, groups: RowGroups, path_of: Callable[[int], Path], embed_dim: int, far: FarFiles | None = None
    ) -> None:
        self._groups = groups
        self._embed_dim = embed_dim
        self._far = far
        self._maps = MappedFiles[int](path_of)

    def read(self, rows: NDArray[np.int64], column: str) -> NDArray[np.float32]:
        """The vectors (len(rows), D) of ``z_image`` or ``z_text``, of length one."""
        groups = np.searchsorted(self._groups.first_rows, rows, side="right") - 1
        starts = self._groups.offsets[groups, VECTOR_COLUMNS.index(column)]
        starts = starts + (rows - self._groups.first_rows[groups]) * (2 * self._embed_dim)
        files = self._groups.files[groups]
        if self._far is not None:
            return to_unit(self._far.read(files, starts, 2 * self._embed_dim).view(np.float16))
        vectors = np.empty((len(rows), self._embed_dim), np.float16)
        for place, (file, start) in enumerate(zip(files.tolist(), starts.tolist(), strict=True)):
            vectors[place] = np.frombuffer(self._maps.content(file), np.float16, self._embed_dim, start)
        return to_unit(vectors)


def check_places(groups: RowGroups, vectors: Vectors, path: Path) -> None:
    """Compare what `StoredVectors` reads in one file with what the Parquet reader read there.

    Raises:
        DataError: If the file's columns have several pages, or are compressed.
    """
    rows = groups.first_rows - groups.first_rows[:1]
    stored = StoredVectors(
        RowGroups(rows, np.zeros_like(rows), groups.offsets), lambda _: path, vectors.z_image.shape[1]
    )
    for column in VECTOR_COLUMNS:
        if not np.array_equal(stored.read(rows, column), to_unit(getattr(vectors, column)[rows])):
            raise DataError(
                f"{path}: column {column} is not stored in one uncompressed page a row group; {repair_hint(path)}"
            )
