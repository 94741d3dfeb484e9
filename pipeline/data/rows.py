"""The uid and split of a row, and the columns of every table.

Arrow schemas are functions, so that ``unclip plan`` does not load pyarrow.
"""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_UID_LENGTH = 32


def make_uid(url: str, caption: str) -> str:
    """The row's stable name in every step: the first 128 bits of a SHA-256, in hex."""
    return hashlib.sha256(f"{url}\n{caption}".encode()).hexdigest()[:_UID_LENGTH]


def split_of(uid: str, validation_prob: float) -> str:
    """``validation`` or ``train``; depends on the uid alone, so workers and shards do not change it."""
    return "validation" if int(uid[-8:], 16) < validation_prob * 2**32 else "train"


def pairs_schema() -> "pa.Schema":
    """Schema of the pairs step's ``pairs.parquet``; extra columns may follow."""
    import pyarrow as pa

    return pa.schema([("uid", pa.string()), ("url", pa.string()), ("caption", pa.string()), ("split", pa.string())])


def embeddings_schema(embed_dim: int) -> "pa.Schema":
    """Schema of the embed step's ``<shard>.parquet``: one row per good picture, sorted by key.

    Args:
        embed_dim: Width D of the joint space, in features.
    """
    import pyarrow as pa

    vector = pa.list_(pa.float16(), embed_dim)
    return pa.schema(
        [
            ("uid", pa.string()),
            ("key", pa.string()),
            ("url", pa.string()),
            ("caption", pa.string()),
            ("split", pa.string()),
            ("z_image", vector),
            ("z_text", vector),
        ]
    )


def require_columns(names: Sequence[str], required: Sequence[str], *, where: str) -> None:
    """Refuse a table that lacks a column.

    Args:
        names: Columns of the table.
        required: Columns that it must have.
        where: File of the table, for the message.

    Raises:
        DataError: If a column is missing; names the file, the missing columns and the existing ones.
    """
    missing = [name for name in required if name not in names]
    if missing:
        raise DataError(f"{where}: no column {', '.join(missing)}; it has {', '.join(names)}")
