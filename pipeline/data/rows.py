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
_LEAST_DIGITS = 5


def make_uid(url: str, caption: str) -> str:
    """The row's stable name in every step: the first 128 bits of a SHA-256, in hex."""
    return hashlib.sha256(f"{url}\n{caption}".encode()).hexdigest()[:_UID_LENGTH]


def row_id(uid: str) -> int:
    """The row's stable number in an index: a 64-bit hash of its uid, cut to 53 bits, because JSON's numbers are floats.

    Among 100 million rows, one pair of equal numbers is as likely as not; the index says so, and leaves one row out.
    """
    return int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest()) >> 11


def split_of(url: str, validation_prob: float) -> str:
    """``validation`` or ``train``.

    It depends on the URL alone: all captions of a picture are on one side, and workers and shards do not change it.
    """
    first_bits = int.from_bytes(hashlib.sha256(url.encode()).digest()[:4])
    return "validation" if first_bits < validation_prob * 2**32 else "train"


def numbered_names(count: int) -> list[str]:
    """Names of shards or parts: five digits as in img2dataset, or more, so that names sort as numbers."""
    digits = max(_LEAST_DIGITS, len(str(count - 1)))
    return [f"{number:0{digits}d}" for number in range(count)]


def pairs_schema() -> "pa.Schema":
    """Schema of the parts of the pairs step; extra columns may follow."""
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
            ("clip_score", pa.float32()),  # cosine of z_image and z_text, before both are rounded to float16
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
