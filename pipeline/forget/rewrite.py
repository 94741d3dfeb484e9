"""Rewrites the shards that hold forgotten rows.

A list of pairs and a shard of the download keep the row, empty and counted as a failure of the class ``forgotten``, so
that the rows after it keep their numbers and keys, and rows in are rows out. Labels and embeddings lose the row.
To rewrite a shard a second time changes nothing, so that what was killed is done again. Memory is that of the shards
that are rewritten at once, without their pictures.
"""

import itertools
import json
import operator
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.blank import BLANK, COLUMNS_THAT_STAY, are_forgotten, blank_rows
from pipeline.data.pairs import ROW_GROUP_ROWS
from pipeline.data.retries import Before, adopt
from pipeline.data.selection import label_file
from pipeline.data.shard_tables import TAKEN_IN, read_names, read_schema, read_table, split_counts
from pipeline.data.shard_writer import ShardFiles, ShardRow, failure_causes, read_shard, write_shard
from pipeline.data.tar_copies import leave_out_forgotten
from pipeline.data.tar_index import index_tar
from pipeline.data.tars import counts_of, taken_in_totals
from pipeline.data.token_states import copy_states, states_file
from pipeline.data.vectors import write_embeddings
from pipeline.filter.examples import EXAMPLES
from pipeline.filter.labels import count_reasons
from pipeline.forget.search import FAILURES, SHARDS_STAY
from pipeline.workspace.forgotten import Forgotten, Rewrite
from pipeline.workspace.hashing import HashedFile
from pipeline.workspace.manifest import Manifest, add_counts, content_of
from pipeline.workspace.store import ALL_RECORDS, LIVE, MANIFEST, RECORD_SUFFIX, Artifact

Counts = dict[str, int]

_THREADS = 8
"""Shards that are rewritten at once: one of the download moves its tar both ways, and 10,000 embeddings take 100 MB."""
_NOTE_EVERY_S = 30.0


def rewrite(
    artifact: Artifact,
    work: Rewrite,
    forgotten: Forgotten,
    check: Callable[[], None],
    note: Callable[[Sequence[str]], object],
) -> None:
    """Rewrite some shards of an artifact without the forgotten rows, then its manifest.

    What is left of an artifact that somebody has removed since goes, too.

    Args:
        artifact: The artifact, of the step of ``work``.
        work: The shards.
        forgotten: What is forgotten.
        check: Raises StepError if the lock of the workspace was lost.
        note: Is called every half minute with the shards that are left, in their order.

    Raises:
        DataError: If a file is damaged.
        StepError: If the disk is full.
    """
    check()
    manifest = artifact.manifest()
    if manifest is None and work.step not in SHARDS_STAY:
        artifact.destroy()
        return
    before: Before | None = None
    if manifest is None and work.step == "download":
        adopt(artifact, lambda _done, _total: check())  # what a retry gained is no part of shards under way
        before = Before.read(artifact)
        before = before and before.begin_rewriting(artifact)
    artifact.remove(ALL_RECORDS)

    def rewrite_one(shard: str) -> None:
        check()
        _drop_checksums(artifact, shard)
        _REWRITERS[work.step](artifact, shard, forgotten)

    _for_each(work.shards, rewrite_one, note)
    check()
    if manifest is None:
        for name in [name for name in artifact.names() if name.startswith((f"{LIVE}parts/", f"{LIVE}retry-"))]:
            artifact.remove(name)  # parts of shards under way; they are made again
        if before is not None:
            before.end_rewriting(artifact)
        return
    if work.step in {"filter", "filter_embeddings"}:
        _rewrite_examples(artifact, forgotten)
    new = _manifest_of(artifact, manifest, work.step, forgotten)
    former = [*manifest.former_contents, work.content]
    contents = tuple(dict.fromkeys(one for one in former if one != content_of(new)))
    artifact.write_json(MANIFEST, replace(new, former_contents=contents).to_dict())


def _for_each(
    shards: Sequence[str], rewrite_one: Callable[[str], None], note: Callable[[Sequence[str]], object]
) -> None:
    """Rewrite several shards at a time; an error ends it when those under way are done."""
    noted_at = time.monotonic()
    with ThreadPoolExecutor(_THREADS) as threads:
        futures = [threads.submit(rewrite_one, shard) for shard in shards]
        try:
            for number, future in enumerate(futures, 1):
                future.result()
                if time.monotonic() - noted_at >= _NOTE_EVERY_S:
                    note(shards[number:])
                    noted_at = time.monotonic()
        finally:
            threads.shutdown(cancel_futures=True)


def _manifest_of(artifact: Artifact, manifest: Manifest, step: str, forgotten: Forgotten) -> Manifest:
    """The manifest with the files, rows and failures of today."""
    by_name = artifact.fold_records()
    records, files, metrics = list(by_name.values()), artifact.describe_files(by_name), dict(manifest.metrics)
    if step == "pairs":  # its rows are all there
        return replace(manifest, files=files)
    counts = add_counts([record.counts for record in records])
    if step == "download":
        causes = sum((Counter(record.causes) for record in records), Counter[str]())
        metrics |= {"failures": dict(causes.most_common()), "success": counts["ok"] / max(1, counts["in"])}
        repeated: list[dict[str, Any]] = metrics.get("repeated", [])
        is_forgotten = forgotten.has([one["url"] for one in repeated])
        metrics["repeated"] = list(itertools.compress(repeated, map(operator.not_, is_forgotten)))
    return replace(manifest, files=files, counts=counts, metrics=metrics)


def _rewrite_pairs(artifact: Artifact, part: str, forgotten: Forgotten) -> None:
    """Empty the rows of one part of a list, batch by batch."""
    name = f"{part}.parquet"
    with (
        pq.ParquetFile(artifact.path(name)) as rows,
        artifact.write(name) as path,
        HashedFile(path) as stream,
        pq.ParquetWriter(stream, rows.schema_arrow, compression="zstd") as writer,
    ):
        for batch in rows.iter_batches(ROW_GROUP_ROWS):
            writer.write_table(blank_rows(pa.Table.from_batches([batch]), forgotten))
    _commit(artifact, part, [name])


def _rewrite_download(artifact: Artifact, shard: str, forgotten: Forgotten) -> None:
    """Empty the rows of one shard, and take their pictures out of the tar."""
    names = [f"{shard}.tar", f"{shard}.parquet", f"{shard}_stats.json"]
    if not artifact.exists(f"{shard}{RECORD_SUFFIX}"):  # a killed worker left it; it is made anew
        for name in names:
            artifact.remove(name)
        return
    old = ShardFiles(*map(artifact.path, names))
    if TAKEN_IN in (read_schema(old.parquet).metadata or {}):
        counts, causes = _rewrite_taken_in(artifact, shard, forgotten)
    else:
        with old.tar.open("rb") as stream:
            rows, schema = read_shard(old.tar, old.parquet, stream)
            is_forgotten = forgotten.has_rows([row.values["uid"] for row in rows], [row.values["url"] for row in rows])
            # A row that is empty already has its picture still, if a kill came between its table and its tar.
            rows = [
                _empty(row) if goes or not row.values["uid"] else row
                for row, goes in zip(rows, is_forgotten, strict=True)
            ]
            extension = _extension_of(old)
            with (
                artifact.write(names[0]) as tar,
                artifact.write(names[1]) as parquet,
                artifact.write(names[2]) as stats,
            ):
                start = float(json.loads(old.stats.read_text()).get("start_time", 0.0))
                counts = dict(write_shard(rows, schema, extension, ShardFiles(tar, parquet, stats), start=start))
        causes = dict(failure_causes([artifact.read_json(names[2])]))
    _commit(artifact, shard, names, counts, causes)


def _rewrite_taken_in(artifact: Artifact, shard: str, forgotten: Forgotten) -> tuple[Counts, Counts]:
    """Empty the rows in the table of a shard that was taken in; a tar that is its owner's, by a link, stays."""
    name = f"{shard}.parquet"
    table = blank_rows(pq.read_table(artifact.path(name)), forgotten)
    table = leave_out_forgotten(artifact, shard, table, forgotten)
    with artifact.write(name) as path, HashedFile(path) as stream:
        pq.write_table(table, stream)
    totals = taken_in_totals(table)
    artifact.write_json(f"{shard}_stats.json", artifact.read_json(f"{shard}_stats.json") | totals)
    return counts_of(totals), dict(failure_causes([totals]))


def _empty(row: ShardRow) -> ShardRow:
    values = {name: value if name in COLUMNS_THAT_STAY else BLANK.get(name) for name, value in row.values.items()}
    return ShardRow(values, None)


def _extension_of(files: ShardFiles) -> str:
    """Suffix of the pictures in a shard's tar: that of its first one."""
    for members in index_tar(files.tar).values():
        for extension in members.keys() - {"json", "txt"}:
            return extension
    return "jpg"  # it has no picture


def _rewrite_labels(artifact: Artifact, shard: str, forgotten: Forgotten) -> None:
    """Take the rows out of a shard's labels; what was left out as a copy of one stays left out."""
    counts = _labels_without(artifact, shard, forgotten)
    _commit(artifact, shard, [label_file(shard)], counts)


def _labels_without(artifact: Artifact, shard: str, forgotten: Forgotten) -> Counts:
    name = label_file(shard)
    path = artifact.path(name)
    table = read_table(path, read_names(path))
    table = table.filter(pa.array([not goes for goes in forgotten.has(table.column("uid").to_pylist())]))
    same_as: list[str] = table.column("same_as").to_pylist()
    copies = ["" if goes else uid for uid, goes in zip(same_as, forgotten.has(same_as), strict=True)]
    table = table.set_column(table.schema.get_field_index("same_as"), "same_as", pa.array(copies, pa.string()))
    with artifact.write(name) as target, HashedFile(target) as stream:
        pq.write_table(table, stream)
    return count_reasons(table.column("reason").to_pylist())


def _rewrite_embed(artifact: Artifact, shard: str, forgotten: Forgotten) -> None:
    """Take the rows out of a shard's embeddings and token states, and out of the rows that could not be embedded."""
    names = [f"{shard}.parquet", f"{shard}{FAILURES}", states_file(shard)]
    if not artifact.exists(f"{shard}{RECORD_SUFFIX}"):
        artifact.remove_all([names[0], names[2]])
        return
    num_ok, causes = _embeddings_without(artifact, names[0], forgotten), Counter[str]()
    if artifact.exists(names[1]):
        rows = [json.loads(line) for line in artifact.path(names[1]).read_text(encoding="utf-8").splitlines()]
        is_forgotten = forgotten.has_rows([row["uid"] for row in rows], [row["url"] for row in rows])
        rows = [row for row, goes in zip(rows, is_forgotten, strict=True) if not goes]
        causes = Counter(row["reason"] for row in rows)
        artifact.write_bytes(names[1], "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    if artifact.exists(names[2]):
        uids = read_table(artifact.path(names[0]), ["uid"])["uid"].combine_chunks()  # of one shard
        with artifact.write(names[2]) as target:
            copy_states(artifact.path(names[2]), target, uids)
    counts = artifact.shard_record(shard).counts | {"ok": num_ok}
    if "corrupt" in counts:
        counts["corrupt"] = causes.total()
    counts["in"] = sum(count for name, count in counts.items() if name != "in")
    _commit(artifact, shard, [name for name in names if artifact.exists(name)], counts, dict(causes))


def _rewrite_filtered(artifact: Artifact, shard: str, forgotten: Forgotten) -> None:
    """Take the rows out of the labels and of the embeddings that stay."""
    _embeddings_without(artifact, f"{shard}.parquet", forgotten)
    counts = _labels_without(artifact, shard, forgotten)
    _commit(artifact, shard, [label_file(shard), f"{shard}.parquet"], counts)


def _embeddings_without(artifact: Artifact, name: str, forgotten: Forgotten) -> int:
    path = artifact.path(name)
    table = read_table(path, read_names(path))
    stays = ~are_forgotten(table, forgotten)
    with artifact.write(name) as target:
        write_embeddings([table.filter(pa.array(stays))], target, table.schema)
    return int(stays.sum())


def _rewrite_examples(artifact: Artifact, forgotten: Forgotten) -> None:
    """Take the pairs out of the examples of a filter, with their pictures."""
    if not artifact.exists(EXAMPLES):
        return
    examples: Mapping[str, Sequence[dict[str, Any]]] = artifact.read_json(EXAMPLES)["examples"]
    others: dict[str, list[dict[str, Any]]] = {}
    for reason, rows in examples.items():
        others[reason] = []
        for row in rows:
            if not any(forgotten.has([row["uid"], *([row["stays"]["uid"]] if row["stays"] else [])])):
                others[reason].append(row)
                continue
            for picture in row["pictures"]:
                artifact.remove(picture["file"])
    artifact.write_json(EXAMPLES, {"examples": others})


def _drop_checksums(artifact: Artifact, shard: str) -> None:
    """Compare the files of a shard with its record for the last time: while it is rewritten, they differ."""
    if not artifact.exists(f"{shard}{RECORD_SUFFIX}"):
        return
    record = artifact.shard_record(shard)
    for name in record.files:
        artifact.path(name)
    if record.files:
        artifact.commit_shard(replace(record, files={}))


def _commit(
    artifact: Artifact, shard: str, names: Sequence[str], counts: Counts | None = None, causes: Counts | None = None
) -> None:
    """Write the record of a rewritten shard, if it had one; what is None stays."""
    if not artifact.exists(f"{shard}{RECORD_SUFFIX}"):
        return
    record = artifact.shard_record(shard)
    files = {name: artifact.describe(name) for name in names}
    counts, causes = record.counts if counts is None else counts, record.causes if causes is None else causes
    has_table = f"{shard}.parquet" in names  # labels alone do not say the split of their rows
    splits = split_counts(artifact.path(f"{shard}.parquet")) if record.splits and has_table else {}
    artifact.commit_shard(replace(record, counts=counts, files=files, causes=causes, splits=splits))


_REWRITERS: dict[str, Callable[[Artifact, str, Forgotten], None]] = {
    "pairs": _rewrite_pairs,
    "download": _rewrite_download,
    "filter": _rewrite_labels,
    "embed": _rewrite_embed,
    "filter_embeddings": _rewrite_filtered,
}
