"""The workers of a download: they make shards, whole or in parts, and try the failed rows of shards again."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.data.retries import staged_in
from pipeline.data.shard_tables import split_counts
from pipeline.data.shard_writer import FAILURES, ShardFiles, failure_causes
from pipeline.data.splits import Part, Split
from pipeline.errors import StepError
from pipeline.runtime.context import StepContext
from pipeline.runtime.download_watch import progress_name
from pipeline.runtime.host_limits import find_limits
from pipeline.runtime.picture_servers import answers
from pipeline.shapes.server import HOST
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import LIVE, Artifact

if TYPE_CHECKING:
    from pipeline.data.download import OnProgress


class DownloadWorker:
    """Makes shards of the download step, several at a time: while one waits for its last URLs, the next begins."""

    def __init__(self, context: StepContext) -> None:
        from pipeline.data.download import Downloader, address_rules
        from pipeline.data.pairs import Pairs

        config = context.recipe.download
        self._context = context
        self._config = config
        self._output = context.output
        self._pairs = Pairs(context.inputs["pairs"])
        rules = address_rules(context.recipe.pairs, config)
        num_decoders = max(1, int(config.resources.cpus_per_worker))
        downloader = Downloader(config, rules, find_limits(context), num_decoders=num_decoders)
        self._stack = contextlib.ExitStack()  # left open: a worker's process ends, and its decoders with it
        self._downloader = self._stack.enter_context(downloader)
        gc.freeze()  # the collector went through all modules again and again: a fifth of the time of fetching

    def __call__(self, shard: str) -> ShardRecord:
        """Download one shard and commit it."""
        from pipeline.data.shard_rows import read_rows

        start, output = time.monotonic(), self._output
        rows = read_rows(self._pairs, shard, self._config)
        split = read_split(output, shard)
        with _written(output, shard) as files:
            if split is None:
                counts = self._download(rows, shard, files)
            else:
                counts = self._download_in_parts(rows, shard, split, files)
            causes, splits = _facts_of(files)
        record = self._commit(output, shard, dict(counts), causes, splits, start)
        if split is not None:
            output.remove(_split_name(shard))  # a shard that is made again must not be joined from these parts
        return record

    def close(self) -> None:
        """End its decoders, where it is not the process that ends."""
        self._stack.close()

    def _download(self, rows: pa.Table, shard: str, files: ShardFiles, first: int = 0) -> Counter[str]:
        counts = self._downloader.download(rows, shard, files, self._reporter(shard), first=first)
        pairs = self._context.recipe.pairs
        if pairs.source == "drawn":
            _require_server(rows, shard, _causes_of(files), pairs.drawn.port)
        return counts

    def _download_in_parts(self, rows: pa.Table, shard: str, split: Split, files: ShardFiles) -> Counter[str]:
        """Download a shard that took its workers down, part by part; what is done before a loss is kept."""
        from pipeline.data.shard_again import join_shard

        parts = _parts(self._output, shard)
        for start, stop in _begun(self._output, shard, split):
            with _written(parts, f"{start}-{stop}") as part_files:
                self._download(rows.slice(start, stop - start), shard, part_files, first=start)
        made = [ShardFiles(*map(parts.path, _names(f"{start}-{stop}"))) for start, stop in split.done]
        return join_shard(rows, shard, made, split.killers, files, self._config)

    def _commit(
        self,
        output: Artifact,
        shard: str,
        counts: dict[str, int],
        causes: dict[str, int],
        splits: dict[str, int],
        start: float,
    ) -> ShardRecord:
        from pipeline.data.shard_rows import ShardSpan

        span = ShardSpan.of(shard, self._pairs.list_rows, self._config.samples_per_shard)
        record = ShardRecord(
            shard=shard,
            counts=counts,
            files={name: output.describe(name) for name in _names(shard)},
            causes=causes,
            splits=splits,
            list_number=span.list_number,
            wall_s=round(time.monotonic() - start, 3),
        )
        output.commit_shard(record)
        return record

    def _reporter(self, shard: str) -> OnProgress:
        def report(done: int, causes: Counter[str]) -> None:
            values = {"rows": done, "causes": dict(causes), "beat": self._downloader.beat()}
            self._output.write_json(progress_name(shard), values)

        return report


class RetryWorker(DownloadWorker):
    """Tries the failed rows of finished shards again; shards that gained are committed aside, until all are tried."""

    def __call__(self, shard: str) -> ShardRecord:
        """Try one shard again."""
        from pipeline.data.shard_again import retry_shard
        from pipeline.data.shard_rows import read_rows

        start, output, failed_class = time.monotonic(), self._output, self._context.retry_failed
        staged = staged_in(output, failed_class)
        rows = read_rows(self._pairs, shard, self._config)
        old = ShardFiles(*map(output.path, _names(shard)))
        split = read_split(staged, shard)
        with tempfile.TemporaryDirectory() as folder:
            files: ShardFiles | None = _files_in(folder, shard)
            if split is not None:
                files = self._retry_in_parts(rows, shard, old, split)
            elif retry_shard(self._downloader, rows, old, files, failed_class, self._reporter(shard)) is None:
                files = None
            if files is None:
                record = dataclasses.replace(output.shard_record(shard), files={})
                staged.commit_shard(record)
            else:
                causes, splits = _facts_of(files)
                counts = _counts_of(files)
                _copy(files, staged, shard)
                record = self._commit(staged, shard, counts, causes, splits, start)
        if split is not None:
            staged.remove(_split_name(shard))
            parts = _parts(staged, shard)
            parts.remove_all(parts.names())
        return record

    def _retry_in_parts(self, rows: pa.Table, shard: str, old: ShardFiles, split: Split) -> ShardFiles | None:
        """Try the failed rows of a shard that took its workers down, part by part.

        Each part goes on from the shard that the parts before it made. Rows that took workers down stay as they were.

        Returns:
            The last shard that was made; None if no row came through.
        """
        from pipeline.data.shard_again import retry_shard

        failed_class = self._context.retry_failed
        staged = staged_in(self._output, failed_class)
        parts = _parts(staged, shard)
        newest: ShardFiles | None = None
        for part in split.done:  # in the order in which they were made
            newest = _find_files(parts, part) or newest
        for part in _begun(staged, shard, split):
            with tempfile.TemporaryDirectory() as folder:
                files = _files_in(folder, shard)
                tried = retry_shard(
                    self._downloader,
                    rows,
                    newest or old,
                    files,
                    failed_class,
                    self._reporter(shard),
                    only=range(*part),
                )
                if tried is not None:
                    _copy(files, parts, _part_name(part))
            newest = _find_files(parts, part) or newest
        return newest


def read_split(output: Artifact, shard: str) -> Split | None:
    """In which parts a shard is made that took its workers down; None: it is made whole."""
    split = output.find_json(_split_name(shard))
    return None if split is None else Split.from_dict(split)


def write_split(output: Artifact, shard: str, split: Split) -> None:
    """Keep in which parts a shard is made."""
    output.write_json(_split_name(shard), split.to_dict())


def _begun(output: Artifact, shard: str, split: Split) -> Generator[Part]:
    """The parts of a shard that are not made yet, each noted before and after its turn."""
    while (part := split.begin()) is not None:
        write_split(output, shard, split)
        yield part
        split.finish()
        write_split(output, shard, split)


def _split_name(shard: str) -> str:
    return f"{LIVE}split-{shard}.json"


def _parts(output: Artifact, shard: str) -> Artifact:
    """Where the parts of a shard are."""
    return Artifact(f"{output.uri}/{LIVE}parts/{shard}")


def _part_name(part: Part) -> str:
    return f"{part[0]}-{part[1]}"


def _find_files(parts: Artifact, part: Part) -> ShardFiles | None:
    """The files of a part, if it has any; its statistics are written last."""
    names = _names(_part_name(part))
    return ShardFiles(*map(parts.path, names)) if parts.exists(names[-1]) else None


def _names(shard: str) -> tuple[str, str, str]:
    return f"{shard}.tar", f"{shard}.parquet", f"{shard}_stats.json"


@contextlib.contextmanager
def _written(output: Artifact, shard: str) -> Generator[ShardFiles]:
    with contextlib.ExitStack() as stack:
        yield ShardFiles(*(stack.enter_context(output.write(name)) for name in _names(shard)))


def _require_server(rows: pa.Table, shard: str, causes: dict[str, int], port: int) -> None:
    """Refuse a shard during which the server of drawn pictures ended: its rows would stay failed for ever.

    If a run is killed, that server ends at once, and this worker a moment later.

    Raises:
        StepError: If it did.
    """
    base = f"http://{HOST}:{port}/"
    num_elsewhere = sum(not url.as_py().startswith(base) for url in rows["url"])
    if causes.get("connect", 0) > num_elsewhere or (causes.get("lost") and not answers(port)):
        raise StepError(f"download: shard {shard}: the server of the drawn pictures, {base}, has ended; run again")


def _facts_of(files: ShardFiles) -> tuple[dict[str, int], dict[str, int]]:
    """Failed rows by cause, and good rows by split, of files that are not published yet: nothing is read back."""
    return _causes_of(files), split_counts(files.parquet)


def _causes_of(files: ShardFiles) -> dict[str, int]:
    return dict(failure_causes([_stats_of(files)]))


def _counts_of(files: ShardFiles) -> dict[str, int]:
    stats = _stats_of(files)
    return {"in": stats["count"], "ok": stats["successes"], **{status: stats[status] for status in FAILURES}}


def _stats_of(files: ShardFiles) -> dict[str, Any]:
    return json.loads(files.stats.read_text(encoding="utf-8"))


def _files_in(folder: str, shard: str) -> ShardFiles:
    return ShardFiles(*(Path(folder) / name for name in _names(shard)))


def _copy(files: ShardFiles, output: Artifact, name: str) -> None:
    """Publish the files of a shard under a name, the statistics last."""
    for source, target_name in zip(files, _names(name), strict=True):
        with output.write(target_name) as target:
            shutil.copyfile(source, target)
