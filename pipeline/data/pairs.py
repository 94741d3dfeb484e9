"""The pairs step: converts any source of captioned pictures to one list of (uid, url, caption, split)."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.folders import count_pictures, read_folder
from pipeline.data.lists import count_list_rows, read_list
from pipeline.data.rows import make_uid, pairs_schema, split_of
from pipeline.errors import DataError
from pipeline.recipe.sections import PairsConfig

OnRows = Callable[[int], None]


@dataclass
class PairsSummary:
    """Counts of the source's rows by outcome."""

    counts: Counter[str] = field(default_factory=Counter[str])
    """Numbers of rows: ``in`` = ``ok`` + ``duplicate`` + ``missing_url`` + ``malformed``."""
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])
    """Numbers of rows: ``null_captions`` (stored as the empty caption), ``train`` and ``validation``."""


def write_pairs(
    batches: Iterator[pa.Table], config: PairsConfig, path: Path, summary: PairsSummary, on_rows: OnRows
) -> None:
    """Write ``pairs.parquet`` batch by batch.

    Args:
        batches: Tables of ``url``, ``caption`` and other columns, as ``source_batches`` yields them.
        config: The recipe's section.
        path: The file to write.
        summary: Counts to add to; it may already count rows that the reader left out.
        on_rows: Called with the number of rows read so far.

    Raises:
        DataError: If no row is usable; gives the counts by reason.
    """
    uids: set[bytes] = set()
    writer: pq.ParquetWriter | None = None
    try:
        for batch in batches:
            table = _to_pairs(batch, config.validation_prob, uids, summary)
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            try:
                writer.write_table(table.cast(writer.schema))
            except (pa.ArrowInvalid, ValueError) as error:
                raise DataError(f"pairs: {config.path}: its parts have columns of different types: {error}") from None
            on_rows(summary.counts["in"])
    finally:
        if writer is not None:
            writer.close()
    if not summary.counts["ok"]:
        where = f"{config.path}: " if config.path else ""
        raise DataError(f"pairs: {where}no usable row among {summary.counts['in']}: {dict(summary.counts)}")


def source_batches(config: PairsConfig, summary: PairsSummary) -> Iterator[pa.Table]:
    """Yield the rows of a ``list`` or ``folder`` source, at most ``max_pairs``; malformed rows are counted.

    Raises:
        DataError: If the source is missing, damaged or lacks a column.
    """

    def on_malformed(count: int) -> None:
        summary.counts["in"] += count
        summary.counts["malformed"] += count

    if config.source == "list":
        batches = read_list(Path(config.path), config.url_column, config.caption_column, on_malformed)
    else:
        batches = read_folder(Path(config.path), config.caption_column, on_malformed)
    remaining = config.max_pairs or None
    for batch in batches:
        yield batch.slice(0, remaining)
        if remaining is not None:
            remaining -= batch.num_rows
            if remaining <= 0:
                return


def count_pairs(config: PairsConfig) -> int:
    """About how many rows a source has, without reading them all.

    Raises:
        DataError: If the source is missing or damaged.
    """
    if config.source == "drawn":
        return config.drawn.num_pairs + config.drawn.num_faulty
    path = Path(config.path)
    count = count_list_rows(path) if config.source == "list" else count_pictures(path)
    return min(count, config.max_pairs or count)


def _to_pairs(batch: pa.Table, validation_prob: float, uids: set[bytes], summary: PairsSummary) -> pa.Table:
    """Add uid and split to the rows of a batch; rows without a URL and repeated rows are left out and counted.

    Args:
        batch: ``url``, ``caption`` and other columns.
        validation_prob: Share of rows that become the validation split.
        uids: uids of earlier batches, as bytes (16 each); this batch's are added.
        summary: Counts to add to.

    Returns:
        Columns ``uid``, ``url``, ``caption``, ``split``, then the others, in the order of the batch.
    """
    rows: list[tuple[str, str, str, str]] = []
    indices: list[int] = []
    nulls = 0
    urls, captions = batch.column("url").to_pylist(), batch.column("caption").to_pylist()
    for index, (raw_url, raw_caption) in enumerate(zip(urls, captions, strict=True)):
        url, caption = (raw_url or "").strip(), raw_caption or ""
        uid = make_uid(url, caption)
        if not url:
            summary.counts["missing_url"] += 1
        elif bytes.fromhex(uid) in uids:
            summary.counts["duplicate"] += 1
        else:
            uids.add(bytes.fromhex(uid))
            nulls += raw_caption is None
            indices.append(index)
            rows.append((uid, url, caption, split_of(uid, validation_prob)))
    summary.counts["in"] += batch.num_rows
    summary.counts["ok"] += len(rows)
    splits = Counter(row[3] for row in rows)
    for name, value in {"null_captions": nulls, "train": splits["train"], "validation": splits["validation"]}.items():
        summary.metrics[name] = summary.metrics.get(name, 0) + value
    columns = dict(zip(pairs_schema().names, (list(column) for column in zip(*rows, strict=True)), strict=False))
    pairs = pa.Table.from_pydict(columns or {name: [] for name in pairs_schema().names}, schema=pairs_schema())
    for name in batch.column_names:
        if name not in pairs.column_names:
            pairs = pairs.append_column(batch.field(name), batch.column(name).take(pa.array(indices, pa.int64())))
    return pairs
