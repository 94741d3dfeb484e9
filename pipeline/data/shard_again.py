"""Shards from shards: failed rows of one tried again, and one joined from its parts."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Sequence

import pyarrow as pa

from pipeline.data.causes import FetchError
from pipeline.data.download import MEMORY_BYTES, Downloader, OnProgress
from pipeline.data.mends import repair_hint
from pipeline.data.outcomes import Failure, row_values, shard_schema
from pipeline.data.shard_rows import stored_columns
from pipeline.data.shard_writer import (
    FAILED_TO_RESIZE,
    ShardFiles,
    ShardRow,
    failed_rows,
    key_of,
    read_shard,
    time_of_day,
    write_shard,
)
from pipeline.errors import DataError
from pipeline.recipe.sections import DownloadConfig
from pipeline.workspace.disk import translate_os_errors


def retry_shard(
    downloader: Downloader,
    rows: pa.Table,
    old: ShardFiles,
    files: ShardFiles,
    failed_class: str,
    on_progress: OnProgress | None = None,
    *,
    only: range | None = None,
) -> Counter[str] | None:
    """Try the failed rows of a written shard again, and keep the rest as it is.

    Args:
        downloader: Fetches them.
        rows: The rows of ``read_rows``.
        old: The shard.
        files: The files to write; its table and tar hold the good rows of before, byte for byte.
        failed_class: Class of the failures (``pipeline.data.causes``), or ``all``.
        on_progress: Receives the progress; rows that are kept count as finished.
        only: Numbers of the rows that may be tried; default: all.

    Returns:
        Numbers of rows; None if no row came through: then nothing is written.

    Raises:
        DataError: If the shard has other rows.
        StepError: If the disk is full.
    """
    start = time.monotonic()
    with (
        translate_os_errors(f"download: {files.tar.parent}"),
        old.tar.open("rb") as stream,
        tempfile.SpooledTemporaryFile(MEMORY_BYTES) as scratch,
    ):
        merged, schema = read_shard(old.tar, old.parquet, stream)
        if [row.values["uid"] for row in merged] != rows.column("uid").to_pylist():
            raise DataError(f"download: {old.parquet}: it has other rows than the pairs; {repair_hint(old.parquet)}")
        failed = [number for number in failed_rows(merged, failed_class) if only is None or number in only]
        if not failed:
            return None
        keys = [merged[number].values["key"] for number in failed]
        kept = rows.num_rows - len(failed)
        again = downloader.fetch_rows(
            rows.take(pa.array(failed, pa.int64())),
            keys,
            scratch,
            on_progress and (lambda done, causes: on_progress(kept + done, causes)),
        )
        if not any(row.picture for row in again):
            return None
        for number, row in zip(failed, again, strict=True):
            merged[number] = row
        return write_shard(merged, schema, downloader.config.encode_format, files, start=time_of_day(start))


def join_shard(
    rows: pa.Table,
    shard: str,
    parts: Sequence[ShardFiles],
    killers: Sequence[int],
    files: ShardFiles,
    config: DownloadConfig,
) -> Counter[str]:
    """Write a shard from parts of it.

    Args:
        rows: All rows of the shard.
        shard: Shard name.
        parts: Its parts, as ``Downloader.download`` wrote them.
        killers: Numbers of the rows that are in no part: their pictures took workers down.
        files: The files to write.
        config: The recipe's section.
    """
    start = time.monotonic()
    with translate_os_errors(f"download: shard {shard}: {files.tar.parent}"), contextlib.ExitStack() as stack:
        joined: list[ShardRow] = []
        for part in parts:
            part_rows, _ = read_shard(part.tar, part.parquet, stack.enter_context(part.tar.open("rb")))
            joined += part_rows
        error = FetchError("killer", "its worker was lost twice")
        failure = Failure(FAILED_TO_RESIZE, error.cause, str(error))
        for number, stored in zip(
            killers,
            stored_columns(rows.take(pa.array(killers, pa.int64())), config).to_pylist(),
            strict=True,
        ):
            key = key_of(shard, number, config.samples_per_shard)
            joined.append(ShardRow(row_values(stored, key, failure, config), None))
        joined.sort(key=lambda row: row.values["key"])
        return write_shard(joined, shard_schema(rows, config), config.encode_format, files, start=time_of_day(start))
