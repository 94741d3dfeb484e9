"""The download step on Ray: workers that share the limits of hosts."""

import contextlib
import time
from collections import Counter
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import ray

from pipeline.errors import StepError
from pipeline.recipe.sections import DownloadConfig
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.picture_servers import served_pictures
from pipeline.runtime.pool import ShardJob, map_shards, total_counts
from pipeline.runtime.taken_in import take_in_shards
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact

if TYPE_CHECKING:
    from pipeline.data.hosts import Limits

_MIN_ROWS_TO_JUDGE = 1000
_NUM_CAUSES = 20
_LEASE_SPARE_S = 60.0
_SHARD_SPARE_S = 600.0
_LIMITS = "download-limits"
_REQUESTS_AT_ONCE = 10_000


def run_download(context: StepContext) -> StepResult:
    """Download every shard of pairs; the drawn source's pictures are served meanwhile.

    Raises:
        StepError: If too few rows came through, or a shard lost its worker too often.
    """
    if context.recipe.pairs.source == "shards":
        return take_in_shards(context)
    from pipeline.data.download import check_columns, shard_names
    from pipeline.data.pairs import Pairs
    from pipeline.data.shard_writer import repeated_pictures

    config, output, pairs = context.recipe.download, context.output, Pairs(context.inputs["pairs"])
    num_rows = pairs.num_rows
    check_columns(config, pairs.columns, pairs.where)
    shards = shard_names(num_rows, config.samples_per_shard)

    def judge(records: list[ShardRecord]) -> None:
        _require_success(records, config, output, is_last=len(records) == len(shards))

    missing = set(shards) - set(output.shard_records())
    is_drawn = context.recipe.pairs.source == "drawn"
    with contextlib.ExitStack() as stack:
        if is_drawn and missing:
            stack.enter_context(served_pictures(context.recipe.pairs.drawn.port))
        stack.enter_context(_shared_limits(context))
        job = ShardJob(
            DownloadWorker, shards, num_rows, config.resources, limit_s=_shard_limit_s(config), on_record=judge
        )
        records = map_shards(context, job)
    counts, stats = total_counts(records), _stats(output, shards)
    metrics: dict[str, Any] = {
        "success": counts["ok"] / counts["in"],
        "failures": dict(_causes(stats).most_common(_NUM_CAUSES)),
        "one_pixel": sum(one.get("one_pixel", 0) for one in stats),
        "repeated": repeated_pictures(stats),
    }
    return StepResult(counts=counts, metrics=metrics, num_workers=config.resources.num_workers)


class DownloadWorker:
    """Makes shards of the download step."""

    def __init__(self, context: StepContext) -> None:
        from pipeline.data.download import Downloader, address_rules
        from pipeline.data.pairs import Pairs

        config = context.recipe.download
        self._config = config
        self._output = context.output
        self._pairs = Pairs(context.inputs["pairs"])
        rules = address_rules(context.recipe.pairs, config)
        num_decoders = max(1, int(config.resources.cpus_per_worker))
        downloader = Downloader(config, rules, _find_limits(context), num_decoders=num_decoders)
        self._downloader = downloader.__enter__()  # until the worker ends, and its decoders with it

    def __call__(self, shard: str) -> ShardRecord:
        """Download one shard and commit it."""
        from pipeline.data.download import read_rows
        from pipeline.data.shard_writer import ShardFiles

        start, output = time.monotonic(), self._output
        rows = read_rows(self._pairs, shard, self._config)
        names = [f"{shard}.tar", f"{shard}.parquet", f"{shard}_stats.json"]
        with output.write(names[0]) as tar, output.write(names[1]) as parquet, output.write(names[2]) as stats:
            counts = self._downloader.download(rows, shard, ShardFiles(tar, parquet, stats))
        files = {name: output.describe(name) for name in names}
        wall_s = round(time.monotonic() - start, 3)
        record = ShardRecord(shard=shard, counts=dict(counts), files=files, wall_s=wall_s)
        output.commit_shard(record)
        return record


class ClusterLimits:
    """The limits of hosts that all workers share.

    Args:
        actor: The actor that holds them.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def acquire(self, host: str, patience_s: float) -> int:
        """See ``pipeline.data.hosts.Limits``."""
        return await self._actor.acquire.remote(host, patience_s)

    async def release(self, host: str, lease: int) -> None:
        """See ``pipeline.data.hosts.Limits``."""
        self._actor.release.remote(host, lease)

    async def pause(self, host: str, seconds: float) -> None:
        """See ``pipeline.data.hosts.Limits``."""
        self._actor.pause.remote(host, seconds)


@contextlib.contextmanager
def _shared_limits(context: StepContext) -> Generator[None]:
    """An actor with the limits of hosts, inside the block, if the recipe has any."""
    from pipeline.data.hosts import HostLimits

    config = context.recipe.download
    needs = config.resources
    if not needs.max_per_host and not needs.max_rate_per_host:
        yield
        return
    options = {"name": f"{_LIMITS}-{context.output.uri}", "num_cpus": 0, "max_concurrency": _REQUESTS_AT_ONCE}
    actor_class: Any = ray.remote(HostLimits)
    lease_s = config.deadline_s + _LEASE_SPARE_S
    actor = actor_class.options(**options).remote(needs.max_per_host, needs.max_rate_per_host, lease_s=lease_s)
    try:
        yield
    finally:
        ray.kill(actor)


def _find_limits(context: StepContext) -> "Limits | None":
    needs = context.recipe.download.resources
    if not needs.max_per_host and not needs.max_rate_per_host:
        return None
    return ClusterLimits(ray.get_actor(f"{_LIMITS}-{context.output.uri}"))


def _shard_limit_s(config: DownloadConfig) -> float:
    """Longest time for a shard, in seconds; a worker that takes longer hangs.

    Every URL ends by its deadline; the time that URLs wait for their host's turn, or for a decoder, comes on top.
    """
    at_once = min(config.resources.num_connections, config.resources.max_per_host or config.samples_per_shard)
    rounds = -(-config.samples_per_shard // at_once)
    rate = config.resources.max_rate_per_host
    return _SHARD_SPARE_S + config.samples_per_shard * (1 + (1 / rate if rate else 0)) + 2 * rounds * config.deadline_s


def _require_success(records: list[ShardRecord], config: DownloadConfig, output: Artifact, *, is_last: bool) -> None:
    counts = total_counts(records)
    if not counts or (counts["in"] < _MIN_ROWS_TO_JUDGE and not is_last):
        return
    if counts["ok"] and counts["ok"] >= config.min_success_prob * counts["in"]:
        return
    causes = _causes(_stats(output, [record.shard for record in records])).most_common(5)
    for record in records:  # bad shards are tried again by the next run, since the cause may be gone by then
        if record.counts["ok"] < max(1, config.min_success_prob * record.counts["in"]):
            for name in (f"{record.shard}.done.json", *record.files):
                output.remove(name)
    top_causes = "; ".join(f"{count} x {cause}{_meaning(cause)}" for cause, count in causes)
    raise StepError(
        f"download: only {counts['ok']} of {counts['in']} rows came through (download.min_success_prob is "
        f"{config.min_success_prob}); most frequent causes: {top_causes}. Mend the list or the network and run again"
    )


def _meaning(cause: str) -> str:
    from pipeline.data.causes import CLASSES

    return f" ({CLASSES[cause]})" if cause in CLASSES else ""


def _stats(output: Artifact, shards: list[str]) -> list[dict[str, Any]]:
    return [output.read_json(f"{shard}_stats.json") for shard in shards]


def _causes(stats: list[dict[str, Any]]) -> Counter[str]:
    from pipeline.data.shard_writer import failure_causes

    return failure_causes(stats)
