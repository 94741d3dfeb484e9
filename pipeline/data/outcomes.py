"""What became of a row: its picture or its failure, and its columns in the shard's table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.data.resize import StoredPicture
from pipeline.data.shard_rows import stored_columns
from pipeline.data.shard_writer import RESULT_FIELDS, SUCCESS
from pipeline.recipe.sections import DownloadConfig


@dataclass(frozen=True)
class Failure:
    """Why a row has no picture."""

    status: str
    cause: str
    message: str


def row_values(
    stored: dict[str, Any], key: str, outcome: StoredPicture | Failure, config: DownloadConfig
) -> dict[str, Any]:
    """All columns of a row, in img2dataset's order."""
    kind = config.compute_hash
    names = [name for name, _ in RESULT_FIELDS] + ([] if kind == "none" else [kind])
    values = stored | dict.fromkeys(names) | {"key": key}
    if isinstance(outcome, Failure):
        return values | {"status": outcome.status, "error_message": outcome.message}
    values |= {"status": SUCCESS, "width": outcome.width, "height": outcome.height, "exif": outcome.exif}
    values |= {"original_width": outcome.original_width, "original_height": outcome.original_height}
    return values | ({} if kind == "none" else {kind: outcome.digest})


def shard_schema(rows: pa.Table, config: DownloadConfig) -> pa.Schema:
    """Columns of the shard's table."""
    kind = config.compute_hash
    results = [*RESULT_FIELDS, *([] if kind == "none" else [(kind, pa.string())])]
    return pa.schema([*stored_columns(rows, config).schema, *(pa.field(*field) for field in results)])
