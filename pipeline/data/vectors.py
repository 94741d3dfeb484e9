"""Embeddings as numpy arrays and as Parquet columns of fixed-size lists of float16, which plain pyarrow reads."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.rows import embeddings_schema
from pipeline.data.shards import read_table

ROW_GROUP_ROWS = 1024
"""Rows of a row group; small, so that reading the vectors of a few neighbours does not read their whole shards."""


@dataclass
class Vectors:
    """The embeddings of one shard."""

    z_image: NDArray[np.float16]
    """(N, D), rows of length one."""
    z_text: NDArray[np.float16]
    """(N, D), rows of length one."""
    table: pa.Table = field(repr=False)
    """Columns uid, key, url, caption, split."""


def to_arrow(vectors: NDArray[Any]) -> pa.FixedSizeListArray:
    """Convert (N, D) numbers to a column of fixed-size lists of float16."""
    halves = np.ascontiguousarray(vectors, dtype=np.float16)
    return pa.FixedSizeListArray.from_arrays(pa.array(halves.reshape(-1)), halves.shape[1])


def to_numpy(column: pa.ChunkedArray) -> NDArray[np.float16]:
    """Convert a column of fixed-size lists to an array (N, D)."""
    chunks = [chunk.flatten().to_numpy().reshape(-1, chunk.type.list_size) for chunk in column.chunks]
    return np.concatenate(chunks) if chunks else np.zeros((0, column.type.list_size), np.float16)


def to_unit(vectors: NDArray[np.float16]) -> NDArray[np.float32]:
    """Rows (N, D) as float32, normalised to length one, because float16 changes the length by up to 1e-3."""
    rows = vectors.astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def read_vectors(path: Path) -> Vectors:
    """Read one shard of the embed step.

    Raises:
        DataError: If the file is damaged or lacks a column; names the file.
    """
    table = read_table(path, embeddings_schema(1).names)
    z_image, z_text = to_numpy(table.column("z_image")), to_numpy(table.column("z_text"))
    return Vectors(z_image, z_text, table.drop_columns(["z_image", "z_text"]))
