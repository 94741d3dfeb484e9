"""What the driver of a download knows of its shards, and when too few rows come through."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.data.causes import CLASSES
from pipeline.errors import StepError
from pipeline.recipe.sections import DownloadConfig
from pipeline.runtime.pool import ShardReading, total_counts
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import LIVE, RECORD_SUFFIX, Artifact

_MIN_ROWS_TO_JUDGE = 1000
_NUM_SHOWN = 4
_READ_EVERY_S = 2.0
_PAUSES = 4.0
"""Pause after a look, in times of its own: a fifth of the driver's time, at most, goes into looks."""
TOO_FEW = f"{LIVE}too-few.json"
"""There if the step was stopped because too few rows came through: the limit, later the files that go because of it."""


class DownloadWatch:
    """What the driver knows of unfinished shards, from small files that their workers write."""

    def __init__(self, output: Artifact) -> None:
        self._output = output
        self._causes: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self.num_records = 0
        """Shards that are finished."""
        self._readings: dict[str, tuple[ShardReading, dict[str, int]]] = {}
        self._next_look = float("-inf")

    def read(self, shards: Sequence[str]) -> dict[str, ShardReading]:
        """How far shards are: a look at all of them every few seconds, and nothing in between."""
        began = time.monotonic()
        if began < self._next_look:
            return {}
        for shard, values in zip(shards, self._output.find_jsons(list(map(progress_name, shards))), strict=True):
            if values is not None:
                self._readings[shard] = ShardReading(values["rows"], values["beat"]), values["causes"]
        ended = time.monotonic()
        self._next_look = ended + max(_READ_EVERY_S, _PAUSES * (ended - began))
        return {shard: self._readings[shard][0] if shard in self._readings else ShardReading() for shard in shards}

    def add(self, records: list[ShardRecord]) -> None:
        """Take note of shards that are finished."""
        self.num_records += len(records)
        for record in records:
            self._causes.update(record.causes)
            self._counts.update(record.counts)
            self._readings.pop(record.shard, None)

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
        self._output.write_json(TOO_FEW, config.resources.min_success_prob)
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
        causes = sum((Counter(causes) for _, causes in self._readings.values()), self._causes.copy())
        shown = ", ".join(f"{count} {cause}" for cause, count in causes.most_common(_NUM_SHOWN))
        return f"failed: {shown}" if shown else ""


def _is_enough(counts: Mapping[str, int], config: DownloadConfig) -> bool:
    """Whether so many rows came through as the recipe asks for, and one at the least."""
    return counts["ok"] >= max(1, config.resources.min_success_prob * counts["in"])


def remove_bad_shards(output: Artifact, config: DownloadConfig) -> None:
    """After a stop because of too few good rows: remove the bad shards, unless enough came through by now's limit.

    What is removed is written down first: of the shards that a kill leaves, enough may have come through.
    """
    names: Any = output.find_json(TOO_FEW)
    if not isinstance(names, list):
        records = list(output.shard_records().values())
        are_enough = not records or _is_enough(total_counts(records), config)
        bad = [] if are_enough else [record for record in records if not _is_enough(record.counts, config)]
        names = [name for record in bad for name in (f"{record.shard}{RECORD_SUFFIX}", *record.files)]
        output.write_json(TOO_FEW, names)
    output.remove_all(names)
    output.remove(TOO_FEW)


def progress_name(shard: str) -> str:
    """The small file in which a worker says how far a shard is."""
    return f"{LIVE}shard-{shard}.json"
