"""Other tries of failed rows that are asked for; a run that is stopped leaves what it has not tried to the next one.

Shards that gained rows are committed aside, and take the place of the old ones when all shards were tried.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from pipeline.data.causes import is_in_class
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import LIVE, RECORD_SUFFIX, Artifact

NONE = "none"
"""Stands in the place of a class: the tries that wait are given up."""

_NAME = f"{LIVE}retries.json"
_STAGED = "retry-"
_THREADS = 16
"""Shards that are put in place at once: in an object store each takes about ten requests, and a copy of its tar."""


def waiting_retries(output: Artifact) -> list[str]:
    """Classes of the failures that are to be tried again, in their order; the first one may have begun."""
    classes: list[str] | None = output.find_json(_NAME)
    return classes or []


def ask_retry(output: Artifact, failed_class: str) -> None:
    """Note that the failures of a class are to be tried again.

    Args:
        output: The download's artifact.
        failed_class: The class (``pipeline.data.causes``); narrower ones that wait are done with it.
    """
    waiting = waiting_retries(output)
    if not any(is_in_class(failed_class, one) for one in waiting):
        others = [one for one in waiting if not is_in_class(one, failed_class)]
        output.write_json(_NAME, [*others, failed_class])


def end_retry(output: Artifact, failed_class: str) -> None:
    """Note that the failures of a class were tried again."""
    output.write_json(_NAME, [one for one in waiting_retries(output) if one != failed_class])


def give_up_retries(output: Artifact) -> None:
    """Try nothing again that waits; the rows that came so far stay."""
    if waiting_retries(output):
        output.write_json(_NAME, [])


def staged_in(output: Artifact, failed_class: str) -> Artifact:
    """Where shards are put whose failed rows were tried again."""
    return Artifact(f"{output.uri}/{LIVE}{_STAGED}{failed_class}")


def adopt(output: Artifact, note: Callable[[int, int], object] = lambda _done, _total: None) -> None:
    """Put the shards that gained rows in the place of the old ones; it may be stopped anywhere, and done again.

    Those of another try that is not done stay: their records say which shards were tried.

    Args:
        output: The download's artifact.
        note: Is told after each shard how many are done, of how many; it may raise to stop here.
    """
    names = set(output.names())
    folders = {name.split("/")[1] for name in names if name.startswith(f"{LIVE}{_STAGED}")}
    for folder in sorted(folders - {f"{_STAGED}{failed_class}" for failed_class in waiting_retries(output)}):
        staged = Artifact(f"{output.uri}/{LIVE}{folder}")

        def put_in_place(record: ShardRecord, staged: Artifact = staged, folder: str = folder) -> None:
            for name in record.files:
                if f"{LIVE}{folder}/{name}" in names:  # else it was moved before a stop
                    staged.move(name, output)
            if record.files:
                output.commit_shard(record)
            staged.remove(f"{record.shard}{RECORD_SUFFIX}")

        records = list(staged.shard_records().values())
        with ThreadPoolExecutor(_THREADS) as threads:
            for done, _ in enumerate(threads.map(put_in_place, records), 1):
                note(done, len(records))
