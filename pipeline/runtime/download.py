"""The download step on Ray: workers that share the limits of hosts, and another try of failed rows."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Generator, Sequence
from typing import Any

from pipeline.data.causes import is_in_class
from pipeline.data.retries import adopt, end_retry, staged_in, waiting_retries
from pipeline.data.splits import Split
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.download_watch import TOO_FEW, DownloadWatch, remove_bad_shards
from pipeline.runtime.download_workers import DownloadWorker, RetryWorker, read_split, write_split
from pipeline.runtime.host_limits import SHARDS_AT_ONCE, shared_limits
from pipeline.runtime.picture_servers import served_pictures
from pipeline.runtime.pool import ShardJob, ShardWorker, map_shards, total_counts
from pipeline.runtime.taken_in import take_in_shards
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.progress import Progress
from pipeline.workspace.store import Artifact

_NUM_CAUSES = 20
_MOST_LOSSES = 60
"""Workers that one shard may lose: ten find a row among a thousand."""
_SILENCE_S = 300.0
"""As long as a worker waits for storage before it gives up (pipeline/workspace/objects.py)."""
_STATS_AT_ONCE = 256


def run_download(context: StepContext) -> StepResult:
    """Download every shard of pairs, and try failed rows again that wait for it (``pipeline.data.retries``).

    The drawn source's pictures are served meanwhile.

    Raises:
        StepError: If too few rows came through, or a shard lost its worker again and again.
    """
    if context.recipe.pairs.source == "shards":
        return take_in_shards(context)
    from pipeline.data.pairs import Pairs
    from pipeline.data.shard_rows import check_columns, shard_names

    config, output, pairs = context.recipe.download, context.output, Pairs(context.inputs["pairs"])
    num_rows = pairs.num_rows
    check_columns(config, pairs.columns, pairs.where)
    retries = waiting_retries(output)
    _adopt(output)
    if output.exists(TOO_FEW):
        remove_bad_shards(output, config)
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


def _adopt(output: Artifact) -> None:
    """See ``adopt``; its progress is shown, for it may take an hour in an object store."""
    progress: Progress | None = None

    def note(done: int, total: int) -> None:
        nonlocal progress
        progress = progress or Progress(output)  # most often there is nothing to do, and no request for it
        progress.update(done, total, "shards", "put in the place of the old ones")

    adopt(output, note)


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
    made_in = staged_in(output, context.retry_failed) if is_retry else output
    watch = DownloadWatch(output)

    def note_records(records: list[ShardRecord]) -> None:
        watch.add(records)
        if not is_retry:
            watch.require_success(config, is_last=watch.num_records == len(shards))

    def split_lost(shard: str, losses: int) -> bool:
        return _split(context, made_in, shard, losses)

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


def _split(context: StepContext, output: Artifact, shard: str, losses: int) -> bool:
    """From its second loss on, halve what a lost worker was making; returns whether the shard is tried again."""
    from pipeline.data.pairs import Pairs
    from pipeline.data.shard_rows import ShardSpan

    config = context.recipe.download
    if losses > _MOST_LOSSES or not config.resources.max_retries:
        return False
    if losses == 1:
        return True
    split = read_split(output, shard)
    if split is None:
        span = ShardSpan.of(shard, Pairs(context.inputs["pairs"]).list_rows, config.samples_per_shard)
        split = Split([(0, span.stop - span.start)])
    else:
        split.lose()
    write_split(output, shard, split)
    return True


def _has_class(record: ShardRecord, failed_class: str) -> bool:
    return any(is_in_class(cause, failed_class) for cause in record.causes)


def _causes(records: list[ShardRecord]) -> Counter[str]:
    return sum((Counter(record.causes) for record in records), Counter[str]())
