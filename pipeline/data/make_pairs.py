"""The pairs step: converts any source of captioned pictures to one list of (uid, url, caption, split).

It has four phases of independent tasks. Each task is committed with a record of its own, so that several workers share
a phase, and a run that was killed repeats only the tasks under way:

1. ``live/rows/NNNNN`` reads one piece of the source, or several, from NNNNN on, if there are more than ``MOST_READS``;
   it writes the rows of each, and the uids of all as sorted runs.
2. ``live/compare/AAA-BBB`` finds the repeated uids in a range of buckets.
3. ``live/repeats`` puts what was found into one file, piece by piece.
4. ``NNNNN`` writes a part: the rows of a piece without the repeated ones.

No task holds more than a batch of rows, or about a million uids, and a few numbers for each piece (docs/formats.md
describes the files). Each piece is a few requests of an object store, whatever their number.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from pipeline.data.arrays import save_array
from pipeline.data.blank import blank_rows, num_blank
from pipeline.data.captions import MOST_CAPTIONS, count_long
from pipeline.data.duplicates import (
    Positions,
    Runs,
    RunWriter,
    bucket_groups,
    count_rows,
    gather_positions,
    repeated_positions,
    rows_of_piece,
)
from pipeline.data.lists import Span
from pipeline.data.pairs import ROW_GROUP_ROWS, Part, cast_column, plain_type, write_index
from pipeline.data.reading import Reading, name_examples
from pipeline.data.rows import make_uid, numbered_names, pairs_schema, split_of
from pipeline.data.sources import Source, list_of, named_list
from pipeline.errors import DataError
from pipeline.workspace.forgotten import CAUSE, Forgotten
from pipeline.workspace.hashing import HashedFile
from pipeline.workspace.manifest import ShardRecord, add_counts
from pipeline.workspace.store import LIVE, RECORD_SUFFIX, Artifact

pc: Any = pyarrow.compute  # its functions are made when it is imported
READ, COMPARE, REPEATS = f"{LIVE}rows/", f"{LIVE}compare/", f"{LIVE}repeats"
MOST_READS = 1024
"""Most tasks that read one list: so few files of runs are compared, however many tars there are."""
_FETCHES = 8
"""Files of runs that come at once."""
_PIECES, _EARLIER = f"{LIVE}spans.json", f"{LIVE}pieces.json"
"""The pieces of the source; where an earlier release wrote them, whose records of tasks are those of other rows."""
OnRows = Callable[[int], None]


@dataclass
class PairsSummary:
    """Counts of the source's rows by outcome."""

    counts: Counter[str] = field(default_factory=Counter[str])
    """Numbers of rows: ``in`` = ``ok`` + ``duplicate`` + ``missing_url`` + ``malformed``."""
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])
    """What goes into the manifest: numbers of rows, and the first malformed rows."""


class PairsMaker:
    """Makes the list of pairs of one source.

    Args:
        source: The source.
        output: The artifact to write.
        forgotten: Pairs whose rows stay empty; None: none.
    """

    def __init__(self, source: Source, output: Artifact, forgotten: Forgotten | None = None) -> None:
        self._source = source
        self._output = output
        self._forgotten = forgotten
        if not output.exists(_PIECES):
            if output.exists(_EARLIER):
                output.remove_all([name for name in output.names() if name.endswith(RECORD_SUFFIX)])
                output.remove(_EARLIER)
            output.write_json(_PIECES, [[asdict(span) for span in piece] for piece in source.pieces()])
        self._pieces = [[Span(**span) for span in piece] for piece in output.read_json(_PIECES)]
        self._names = numbered_names(len(self._pieces))
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._lists = [list_of(piece) for piece in self._pieces]
        self._reads = {f"{READ}{self._names[pieces.start]}": pieces for pieces in _together(self._lists)}
        self._records = dict[str, ShardRecord]()
        self._rows_before = [0]

    def phases(self) -> Iterator[list[str]]:
        """The tasks of each phase, by the names of their records; ask for a phase when the one before is done.

        Raises:
            DataError: After the first phase, if no row is usable; gives the counts by reason.
        """
        yield list(self._reads)
        self._require_rows()
        yield self._compared
        yield [REPEATS]
        yield list(self._names)

    def make(self, name: str, on_rows: OnRows = lambda _done: None) -> ShardRecord:
        """Do one task and commit it.

        Args:
            name: Its name, from ``phases``.
            on_rows: Called with the number of rows that a reading task has read.

        Raises:
            DataError: If the source is damaged or lacks a column.
        """
        start = time.monotonic()
        if name.startswith(READ):
            counts = self._read(name, on_rows)
        elif name.startswith(COMPARE):
            counts = self._compare(name)
        else:
            counts = self._gather() if name == REPEATS else self._write_part(name)
        files = {} if name.startswith(LIVE) else {f"{name}.parquet": self._output.describe(f"{name}.parquet")}
        wall_s = round(time.monotonic() - start, 3)
        record = ShardRecord(shard=name, counts=counts, files=files, wall_s=wall_s)
        self._output.commit_shard(record)
        self._records[name] = record
        return record

    def finish(self) -> PairsSummary:
        """Write the index, when every task is done."""
        records = self._output.shard_records()
        readings = [Reading.from_dict(one) for one in self._output.read_jsons([f"{name}.json" for name in self._reads])]
        parts = [records[name].counts for name in self._names]
        summary = PairsSummary(Counter(add_counts([dict(reading.counts) for reading in readings])))
        total = add_counts(parts)
        summary.counts["ok"] = total["ok"]
        if total["duplicate"]:
            summary.counts["duplicate"] = total["duplicate"]
        written = self._output.read_jsons([f"{LIVE}parts/{name}.json" for name in self._names])
        notes = add_counts([one["notes"] for one in written])
        summary.metrics |= add_counts([dict(reading.notes) for reading in readings]) | notes
        if summary.metrics.get("captions_measured"):
            summary.metrics["context_length"] = self._source.context_length
            summary.metrics["long_caption_share"] = _long_share([one["notes"] for one in written], parts)
        if len(self._source.config.lists) > 1:
            summary.metrics["lists"] = self._count_lists(readings, parts)
        if examples := name_examples(readings):
            summary.metrics["malformed_rows"] = examples
        columns = dict.fromkeys(tuple(map(tuple, one["columns"])) for one in written)  # most parts have the same
        schemas = [pa.schema([(name, pa.type_for_alias(kind)) for name, kind in one]) for one in columns]
        numbered = zip(self._names, parts, self._lists, strict=True)
        write_index(self._output, [Part(name, counts["ok"], number) for name, counts, number in numbered], schemas)
        return summary

    def _count_lists(self, readings: Sequence[Reading], parts: Sequence[Mapping[str, int]]) -> list[dict[str, int]]:
        """Rows of each list by outcome, as those of all lists together."""
        lists = [Counter[str]() for _ in self._source.config.lists]
        for pieces, reading in zip(self._reads.values(), readings, strict=True):
            lists[self._lists[pieces.start]].update({name: n for name, n in reading.counts.items() if name != "ok"})
        for number, part in zip(self._lists, parts, strict=True):
            lists[number].update({"ok": part["ok"], "duplicate": part["duplicate"]})
        return [dict(counts) for counts in lists]

    def _read(self, name: str, on_rows: OnRows) -> dict[str, int]:
        reading = Reading(limit=self._rows_left(name))
        with (
            self._output.write(f"{name}.runs") as runs_path,
            runs_path.open("wb") as stream,
            contextlib.closing(RunWriter(stream)) as runs,
        ):
            for number in self._reads[name]:
                runs.begin(number)
                self._read_piece(number, reading, runs, on_rows)
        self._output.write_json(f"{name}.json", reading.to_dict())
        return {"in": 0, "ok": 0} | dict(reading.counts)  # a piece may have no rows

    def _read_piece(self, number: int, reading: Reading, runs: RunWriter, on_rows: OnRows) -> None:
        batches = () if reading.is_full else self._source.read(self._pieces[number], reading)
        with (
            self._output.write(f"{READ}{self._names[number]}.parquet") as path,
            contextlib.closing(_PartWriter(path)) as writer,
        ):
            for batch in batches:
                table, uids = _to_pairs(batch, self._source.config.validation_prob, reading)
                runs.add(uids)
                writer.write(table)
                on_rows(reading.counts["in"])

    def _require_rows(self) -> None:
        records = self._output.shard_records()
        for number, config in enumerate(self._source.config.each()):
            names = [name for name, pieces in self._reads.items() if self._lists[pieces.start] == number]
            counts = add_counts([records[name].counts for name in names])
            if not counts.get("ok"):
                with named_list(self._source.config, number):
                    where = f"{config.path}: " if config.path else ""
                    raise DataError(f"pairs: {where}no usable row among {counts.get('in', 0)}: {counts}")

    def _rows_left(self, name: str) -> int | None:
        """Rows that ``max_pairs`` leaves to a reading task of its list; None: all."""
        if not self._source.config.max_pairs:
            return None
        names = list(self._reads)
        lists = [self._lists[pieces.start] for pieces in self._reads.values()]
        while (place := len(self._rows_before)) <= names.index(name):
            is_first = lists[place] != lists[place - 1]
            self._rows_before.append(0 if is_first else self._rows_before[-1] + self._num_read(names[place - 1]))
        return max(0, self._source.config.max_pairs - self._rows_before[names.index(name)])

    def _num_read(self, name: str) -> int:
        """Rows that a task has read; of one that another process has done, by its record."""
        if name not in self._records:
            self._records |= self._output.shard_records()
        return self._records[name].counts.get("in", 0)

    @cached_property
    def _compared(self) -> list[str]:
        """The tasks that compare; known when all pieces are read."""
        records = self._output.shard_records()
        groups = bucket_groups(sum(records[name].counts.get("ok", 0) for name in self._reads))
        return [f"{COMPARE}{first:04d}-{end:04d}" for first, end in groups]

    @cached_property
    def _runs(self) -> list[Runs]:
        """The sorted uids of all pieces; known when they are read."""
        with ThreadPoolExecutor(_FETCHES) as threads:
            return [Runs.of(path) for path in threads.map(self._output.path, [f"{name}.runs" for name in self._reads])]

    @cached_property
    def _repeats(self) -> Positions:
        """The positions of all repeated rows, those of a piece together; known when they are gathered."""
        return np.load(self._output.path(f"{REPEATS}.npy"), mmap_mode="r")

    def _compare(self, name: str) -> dict[str, int]:
        first, end = name.removeprefix(COMPARE).split("-")
        repeats = repeated_positions(self._runs, (int(first), int(end)))
        with self._output.write(f"{name}.npy") as path:
            save_array(path, repeats)
        num_rows = count_rows(self._runs, (int(first), int(end)))
        return {"in": num_rows, "ok": num_rows - len(repeats), "duplicate": len(repeats)}

    def _gather(self) -> dict[str, int]:
        files = [self._output.path(f"{group}.npy") for group in self._compared]
        with self._output.write(f"{REPEATS}.npy") as path:
            num_rows = gather_positions(files, len(self._names), path)
        return {"in": num_rows, "duplicate": num_rows}

    def _write_part(self, name: str) -> dict[str, int]:
        repeats = rows_of_piece(self._repeats, self._numbers[name])
        notes: Counter[str] = Counter({"train": 0, "validation": 0, "empty_captions": 0})
        captions: list[str] = []
        num_rows = row = 0
        with (
            pq.ParquetFile(self._output.path(f"{READ}{name}.parquet")) as rows,
            self._output.write(f"{name}.parquet") as path,
            HashedFile(path) as stream,
            pq.ParquetWriter(stream, rows.schema_arrow, compression="zstd") as writer,
        ):
            for batch in rows.iter_batches(ROW_GROUP_ROWS):
                low, high = np.searchsorted(repeats, [row, row + batch.num_rows])
                keep = np.ones(batch.num_rows, dtype=np.bool_)
                keep[repeats[low:high] - row] = False
                row += batch.num_rows
                table = pa.Table.from_batches([batch]).filter(pa.array(keep))
                if self._forgotten is not None:
                    table = blank_rows(table, self._forgotten)
                notes.update(_notes(table))
                every = -(-rows.metadata.num_rows // MOST_CAPTIONS)
                captions += table.column("caption").to_pylist()[-num_rows % every :: every]
                num_rows += table.num_rows
                if table.num_rows:
                    writer.write_table(table)
        if self._source.context_length:
            long_captions = count_long(captions, self._source.context_length)
            notes.update({"captions_measured": len(captions), "long_captions": long_captions})
        columns = [[column.name, str(column.type)] for column in rows.schema_arrow]
        self._output.write_json(f"{LIVE}parts/{name}.json", {"notes": dict(notes), "columns": columns})
        return {"in": row, "ok": num_rows, "duplicate": len(repeats)}


def write_pairs(source: Source, output: Artifact, on_rows: OnRows = lambda _done: None) -> PairsSummary:
    """Write the list of pairs in this process; tasks that are committed already are not done again.

    Args:
        source: The source.
        output: The artifact to write.
        on_rows: Called with the number of rows read so far.

    Raises:
        DataError: If the source is damaged, lacks a column, or has no usable row.
    """
    maker, before = PairsMaker(source, output), 0
    for names in maker.phases():
        records = output.shard_records()
        for name in names:
            record = records.get(name) or maker.make(name, lambda done, before=before: on_rows(before + done))
            before += record.counts.get("in", 0) if name.startswith(READ) else 0
    return maker.finish()


class _PartWriter:
    """A Parquet file with the columns of its first table; tables of other types are cast to them."""

    def __init__(self, path: Any) -> None:
        self._path = path
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        self._writer = self._writer or pq.ParquetWriter(self._path, table.schema, compression="zstd")
        if table.num_rows:
            self._writer.write_table(table.cast(self._writer.schema))

    def close(self) -> None:
        if self._writer is None:
            self.write(pairs_schema().empty_table())
        assert self._writer is not None
        self._writer.close()


def _together(lists: Sequence[int]) -> list[range]:
    """The pieces that each task reads: one, or several that follow one another in a list of very many.

    Args:
        lists: The list of each piece.
    """
    tasks: list[range] = []
    for _, pieces in groupby(range(len(lists)), key=lists.__getitem__):
        numbers = list(pieces)
        width, stop = -(-len(numbers) // MOST_READS), numbers[-1] + 1
        tasks += [range(start, min(stop, start + width)) for start in range(numbers[0], stop, width)]
    return tasks


def _to_pairs(batch: pa.Table, validation_prob: float, reading: Reading) -> tuple[pa.Table, list[bytes]]:
    """Add uid and split to the rows of a batch; rows without a URL are left out and counted.

    Args:
        batch: ``url``, ``caption`` and other columns.
        validation_prob: Share of pictures that become the validation split.
        reading: Counts to add to.

    Returns:
        Columns ``uid``, ``url``, ``caption``, ``split``, then the others, in the order of the batch; and the uids as
        bytes.
    """
    urls = pc.utf8_trim_whitespace(batch.column("url").fill_null(""))
    has_url = pc.not_equal(urls, "")
    urls, captions = urls.filter(has_url), batch.column("caption").fill_null("").filter(has_url)
    uids = [make_uid(*pair) for pair in zip(urls.to_pylist(), captions.to_pylist(), strict=True)]
    splits = [split_of(url, validation_prob) for url in urls.to_pylist()]
    reading.counts["in"] += batch.num_rows
    reading.counts["ok"] += len(uids)
    if len(uids) < batch.num_rows:
        reading.counts["missing_url"] += batch.num_rows - len(uids)
    columns = [pa.array(uids, pa.string()), urls, captions, pa.array(splits, pa.string())]
    pairs = pa.Table.from_arrays(columns, schema=pairs_schema())
    for name in batch.column_names:
        if name not in pairs.column_names:
            column = batch.column(name).filter(has_url)
            pairs = pairs.append_column(name, cast_column(column, plain_type(column.type)))
    return pairs, [bytes.fromhex(uid) for uid in uids]


def _long_share(notes: Sequence[Mapping[str, int]], parts: Sequence[Mapping[str, int]]) -> float:
    """Share of the rows whose captions are too long; of a part that was sampled, as many as its sample says."""
    long_rows = [
        one["long_captions"] / one["captions_measured"] * counts["ok"] if one["captions_measured"] else 0.0
        for one, counts in zip(notes, parts, strict=True)
    ]
    return round(sum(long_rows) / sum(counts["ok"] for counts in parts), 6)


def _notes(table: pa.Table) -> dict[str, int]:
    """Rows of each split, rows with an empty caption, and rows of forgotten pairs, if there are any."""
    is_train = pc.sum(pc.equal(table.column("split"), "train")).as_py() or 0
    is_empty = pc.sum(pc.equal(pc.utf8_trim_whitespace(table.column("caption")), "")).as_py() or 0
    notes = {"train": is_train, "validation": table.num_rows - is_train, "empty_captions": is_empty}
    return notes | ({CAUSE: count} if (count := num_blank(table)) else {})
