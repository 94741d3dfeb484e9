"""The download step on Ray: workers that share the limits of hosts, and another try of failed rows."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.data.causes import CLASSES, is_in_class
from pipeline.data.shard_writer import FAILURES, ShardFiles, failure_causes
from pipeline.data.shards import split_counts
from pipeline.data.splits import Part, Split
from pipeline.errors import StepError
from pipeline.recipe.sections import DownloadConfig
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.host_limits import SHARDS_AT_ONCE, find_limits, shared_limits
from pipeline.runtime.picture_servers import answers, served_pictures
from pipeline.runtime.pool import ShardJob, ShardReading, ShardWorker, map_shards, total_counts
from pipeline.runtime.retries import ask_retry, end_retry, waiting_retries
from pipeline.runtime.taken_in import take_in_shards
from pipeline.shapes.server import HOST
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import LIVE, RECORD_SUFFIX, Artifact

if TYPE_CHECKING:
    from pipeline.data.download import OnProgress

_MIN_ROWS_TO_JUDGE = 1000
_NUM_CAUSES = 20
_NUM_SHOWN = 4
_MOST_LOSSES = 60
"""Workers that one shard may lose: ten find a row among a thousand."""
_SILENCE_S = 300.0
"""As long as a worker waits for storage before it gives up (pipeline/workspace/objects.py)."""
_READ_EVERY_S = 2.0
_STAGED = "retry-"
_STATS_AT_ONCE = 256
_TOO_FEW = f"{LIVE}too-few.json"
"""There if the step was stopped because too few rows came through."""


def run_download(context: StepContext) -> StepResult:
    """Download every shard of pairs, and try failed rows again if this run, or one that was stopped, asks for it.

    The drawn source's pictures are served meanwhile.

    Raises:
        StepError: If too few rows came through, or a shard lost its worker again and again.
    """
    if context.recipe.pairs.source == "shards":
        return take_in_shards(context)
    from pipeline.data.download import check_columns, shard_names
    from pipeline.data.pairs import Pairs

    config, output, pairs = context.recipe.download, context.output, Pairs(context.inputs["pairs"])
    num_rows = pairs.num_rows
    check_columns(config, pairs.columns, pairs.where)
    if context.retry_failed:
        ask_retry(output, context.retry_failed)
    retries = waiting_retries(output)
    _adopt(output)
    if output.exists(_TOO_FEW):
        _remove_bad(output, config)
    shards = shard_names(pairs.list_rows, config.samples_per_shard)
    is_drawn = context.recipe.pairs.source == "drawn"
    with contextlib.ExitStack() as stack:
        if is_drawn and (retries or set(shards) - set(output.shard_records())):
            stack.enter_context(served_pictures(context.recipe.pairs.drawn.port))
        stack.enter_context(shared_limits(context))
        records = map_shards(context, _job(context, DownloadWorker, shards, num_rows))
        for failed_class in retries:
            records = _try_again(context, records, failed_class)
    counts = total_counts(records)
    metrics: dict[str, Any] = {
        "success": counts["ok"] / counts["in"],
        "failures": dict(_causes(records).most_common(_NUM_CAUSES)),
        **_oddities(output, shards),
    }
    return StepResult(counts=counts, metrics=metrics, num_workers=config.resources.num_workers)


def _try_again(context: StepContext, records: Sequence[ShardRecord], failed_class: str) -> list[ShardRecord]:
    """Try the failed rows of a class again; shards that an earlier run tried are not tried once more.

    Shards that gained are committed aside, and take the place of the old ones when all are tried.

    Returns:
        The records of all shards.
    """
    output, context = context.output, dataclasses.replace(context, retry_failed=failed_class)
    failed = [record for record in records if _has_class(record, failed_class)]
    num_rows = sum(record.counts["in"] for record in failed)
    map_shards(context, _job(context, RetryWorker, [record.shard for record in failed], num_rows))
    end_retry(output, failed_class)
    _adopt(output)
    return list(output.shard_records().values())


def _oddities(output: Artifact, shards: Sequence[str]) -> dict[str, Any]:
    """Placeholders and pictures of one pixel, from the totals of all shards, of which a few are in memory at once."""
    from pipeline.data.shard_writer import repeated_pictures

    num_one_pixel = 0

    def all_stats() -> Generator[dict[str, Any]]:
        nonlocal num_one_pixel
        for start in range(0, len(shards), _STATS_AT_ONCE):
            for stats in output.read_jsons([f"{shard}_stats.json" for shard in shards[start : start + _STATS_AT_ONCE]]):
                num_one_pixel += stats.get("one_pixel", 0)
                yield stats

    repeated = repeated_pictures(all_stats())
    return {"one_pixel": num_one_pixel, "repeated": repeated}


def _job(context: StepContext, worker: type[ShardWorker], shards: list[str], num_rows: int) -> ShardJob:
    """The work on some shards: the first download of all, or another try of failed rows."""
    config, output = context.recipe.download, context.output
    is_retry = worker is RetryWorker
    made_in = _staged(output, context.retry_failed) if is_retry else output
    watch = _Watch(output)

    def note_records(records: list[ShardRecord]) -> None:
        watch.add(records)
        if not is_retry:
            watch.require_success(config, is_last=watch.num_records == len(shards))

    def split_lost(shard: str, losses: int) -> bool:
        return _split(made_in, config, shard, losses)

    return ShardJob(
        worker,
        shards,
        num_rows,
        config.resources,
        num_at_once=1 if is_retry else SHARDS_AT_ONCE,
        limit_s=_SILENCE_S + 2 * config.deadline_s,
        on_records=note_records,
        output=made_in if is_retry else None,
        note=watch.note,
        read=watch.read,
        on_loss=split_lost,
    )


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
        from pipeline.data.download import read_rows

        start, output = time.monotonic(), self._output
        rows = read_rows(self._pairs, shard, self._config)
        split = _read_split(output, shard)
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
        parts = _parts(self._output, shard)
        for start, stop in _begun(self._output, shard, split):
            with _written(parts, f"{start}-{stop}") as part_files:
                self._download(rows.slice(start, stop - start), shard, part_files, first=start)
        made = [ShardFiles(*map(parts.path, _names(f"{start}-{stop}"))) for start, stop in split.done]
        return self._downloader.join(rows, shard, made, split.killers, files)

    def _commit(
        self,
        output: Artifact,
        shard: str,
        counts: dict[str, int],
        causes: dict[str, int],
        splits: dict[str, int],
        start: float,
    ) -> ShardRecord:
        from pipeline.data.download import ShardSpan

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
            self._output.write_json(_progress_name(shard), values)

        return report


class RetryWorker(DownloadWorker):
    """Tries the failed rows of finished shards again; shards that gained are committed aside, until all are tried."""

    def __call__(self, shard: str) -> ShardRecord:
        """Try one shard again."""
        from pipeline.data.download import read_rows

        start, output, failed_class = time.monotonic(), self._output, self._context.retry_failed
        staged = _staged(output, failed_class)
        rows = read_rows(self._pairs, shard, self._config)
        old = ShardFiles(*map(output.path, _names(shard)))
        split = _read_split(staged, shard)
        with tempfile.TemporaryDirectory() as folder:
            files: ShardFiles | None = _files_in(folder, shard)
            if split is not None:
                files = self._retry_in_parts(rows, shard, old, split)
            elif self._downloader.retry(rows, old, files, failed_class, self._reporter(shard)) is None:
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
        failed_class = self._context.retry_failed
        staged = _staged(self._output, failed_class)
        parts = _parts(staged, shard)
        newest: ShardFiles | None = None
        for part in split.done:  # in the order in which they were made
            newest = _find_files(parts, part) or newest
        for part in _begun(staged, shard, split):
            with tempfile.TemporaryDirectory() as folder:
                files = _files_in(folder, shard)
                tried = self._downloader.retry(
                    rows, newest or old, files, failed_class, self._reporter(shard), only=range(*part)
                )
                if tried is not None:
                    _copy(files, parts, _part_name(part))
            newest = _find_files(parts, part) or newest
        return newest


class _Watch:
    """What the driver knows of unfinished shards, from small files that their workers write."""

    def __init__(self, output: Artifact) -> None:
        self._output = output
        self._causes: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._records: list[ShardRecord] = []
        self._readings: dict[str, tuple[float, ShardReading, dict[str, int]]] = {}

    def read(self, shard: str) -> ShardReading:
        """How far a shard is; looked at every few seconds."""
        now = time.monotonic()
        read_at, reading, _ = self._readings.get(shard, (float("-inf"), ShardReading(), {}))
        if now - read_at < _READ_EVERY_S:
            return reading
        causes = dict[str, int]()
        values = self._output.find_json(_progress_name(shard))
        if values is not None:
            reading, causes = ShardReading(values["rows"], values["beat"]), values["causes"]
        self._readings[shard] = (now, reading, causes)
        return reading

    def add(self, records: list[ShardRecord]) -> None:
        """Take note of shards that are finished."""
        self._records += records
        for record in records:
            self._causes.update(record.causes)
            self._counts.update(record.counts)
            self._readings.pop(record.shard, None)

    @property
    def num_records(self) -> int:
        """Shards that are finished."""
        return len(self._records)

    def require_success(self, config: DownloadConfig, *, is_last: bool) -> None:
        """Stop a download of which too little comes through.

        Bad shards are made again by the next run, since the cause may be gone by then, unless its limit is lower.

        Args:
            config: The recipe's section.
            is_last: Whether all shards are finished; else a few rows say nothing.

        Raises:
            StepError: If so many rows failed; names the causes.
        """
        counts = self._counts
        if not counts or (counts["in"] < _MIN_ROWS_TO_JUDGE and not is_last) or _is_enough(counts, config):
            return
        self._output.write_json(_TOO_FEW, config.resources.min_success_prob)
        top_causes = "; ".join(
            f"{count} x {cause}" + (f" ({CLASSES[cause]})" if cause in CLASSES else "")
            for cause, count in self._causes.most_common(5)
        )
        raise StepError(
            f"download: only {counts['ok']} of {counts['in']} rows came through "
            f"(download.resources.min_success_prob is {config.resources.min_success_prob}); most frequent causes: "
            f"{top_causes}. Mend the list or the network and run again: shards below that share are made again. With a "
            "lower share, which is no part of the key, all are kept"
        )

    def note(self) -> str:
        """The most frequent causes of failures until now."""
        causes = sum((Counter(causes) for _, _, causes in self._readings.values()), self._causes.copy())
        shown = ", ".join(f"{count} {cause}" for cause, count in causes.most_common(_NUM_SHOWN))
        return f"failed: {shown}" if shown else ""


def _is_enough(counts: Mapping[str, int], config: DownloadConfig) -> bool:
    """Whether so many rows came through as the recipe asks for, and one at the least."""
    return counts["ok"] >= max(1, config.resources.min_success_prob * counts["in"])


def _remove_bad(output: Artifact, config: DownloadConfig) -> None:
    """After a stop because of too few good rows: remove the bad shards, unless enough came through by now's limit."""
    records = list(output.shard_records().values())
    if records and not _is_enough(total_counts(records), config):
        for record in records:
            if not _is_enough(record.counts, config):
                for name in (f"{record.shard}{RECORD_SUFFIX}", *record.files):
                    output.remove(name)
    output.remove(_TOO_FEW)


def _split(output: Artifact, config: DownloadConfig, shard: str, losses: int) -> bool:
    """From its second loss on, halve what a lost worker was making; returns whether the shard is tried again."""
    if losses > _MOST_LOSSES or not config.resources.max_retries:
        return False
    if losses == 1:
        return True
    split = _read_split(output, shard)
    if split is None:
        split = Split([(0, config.samples_per_shard)])
    else:
        split.lose()
    _write_split(output, shard, split)
    return True


def _read_split(output: Artifact, shard: str) -> Split | None:
    split = output.find_json(_split_name(shard))
    return None if split is None else Split.from_dict(split)


def _write_split(output: Artifact, shard: str, split: Split) -> None:
    output.write_json(_split_name(shard), split.to_dict())


def _begun(output: Artifact, shard: str, split: Split) -> Generator[Part]:
    """The parts of a shard that are not made yet, each noted before and after its turn."""
    while (part := split.begin()) is not None:
        _write_split(output, shard, split)
        yield part
        split.finish()
        _write_split(output, shard, split)


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


def _progress_name(shard: str) -> str:
    return f"{LIVE}shard-{shard}.json"


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


def _staged(output: Artifact, failed_class: str) -> Artifact:
    """Where shards are put whose failed rows were tried again."""
    return Artifact(f"{output.uri}/{LIVE}{_STAGED}{failed_class}")


def _adopt(output: Artifact) -> None:
    """Put the shards that gained rows in the place of the old ones; it may be stopped anywhere, and done again.

    Those of another try that is not done stay: their records say which shards were tried.
    """
    names = {name.split("/")[1] for name in output.names() if name.startswith(f"{LIVE}{_STAGED}")}
    for folder in sorted(names - {f"{_STAGED}{failed_class}" for failed_class in waiting_retries(output)}):
        staged = Artifact(f"{output.uri}/{LIVE}{folder}")
        for shard, record in staged.shard_records().items():
            for name in record.files:
                if staged.exists(name):
                    staged.move(name, output)
            if record.files:
                output.commit_shard(record)
            staged.remove(f"{shard}{RECORD_SUFFIX}")


def _has_class(record: ShardRecord, failed_class: str) -> bool:
    return any(is_in_class(cause, failed_class) for cause in record.causes)


def _causes(records: list[ShardRecord]) -> Counter[str]:
    return sum((Counter(record.causes) for record in records), Counter[str]())
