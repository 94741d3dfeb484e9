"""Other tries of failed rows that are asked for; a run that is stopped leaves what it has not tried to the next one.

Shards that gained rows are committed aside, and take the place of the old ones when all shards were tried.

The manifest goes meanwhile. What it says of the time before rows were forgotten is kept, and comes back if no row came:
then what was made from the shards stays done.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

from pipeline.data.causes import is_in_class
from pipeline.workspace.manifest import Manifest, ShardRecord, content_of, content_of_files, read_record
from pipeline.workspace.store import LIVE, RECORD_SUFFIX, Artifact

NONE = "none"
"""Stands in the place of a class: the tries that wait are given up."""

_NAME = f"{LIVE}retries.json"
_BEFORE = f"{LIVE}before.json"
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


@dataclass(frozen=True)
class Before:
    """What a finished download was when it was opened again."""

    content: str
    """``content_of`` it, as it is when no row has come since."""
    former_contents: tuple[str, ...]
    """Those of its manifest."""
    is_rewritten: bool = False
    """Whether forgotten rows are leaving its shards: then their content says nothing about rows that came."""

    @classmethod
    def read(cls, output: Artifact) -> "Before | None":
        """What is kept of a download; None if it was not opened again, or rows have come since."""
        content = output.find_bytes(_BEFORE)
        return None if content is None else read_record(cls, content, f"{output.uri}/{_BEFORE}", "remove this file")

    @classmethod
    def of(cls, manifest: Manifest) -> "Before":
        """What is to be kept of a finished download."""
        return cls(content_of(manifest), manifest.former_contents)

    def write(self, output: Artifact) -> None:
        """Keep it."""
        output.write_json(_BEFORE, asdict(self))

    def begin_rewriting(self, output: Artifact) -> "Before | None":
        """Note that forgotten rows leave the shards from now on; None, and nothing is kept, if rows have come.

        It may be stopped, and called again for shards of which some are rewritten.
        """
        if not self.is_rewritten and self.content != _content_of_shards(output):
            output.remove(_BEFORE)
            return None
        before = replace(self, is_rewritten=True)
        before.write(output)
        return before

    def end_rewriting(self, output: Artifact) -> None:
        """Note what the shards are without the forgotten rows."""
        now = _content_of_shards(output)
        former = dict.fromkeys(one for one in (*self.former_contents, self.content) if one != now)
        Before(now, tuple(former)).write(output)


def with_former_contents(output: Artifact, manifest: Manifest) -> Manifest:
    """The new manifest of a download, with the former contents of the one before if no row has come since."""
    before = Before.read(output)
    if before is None or before.content != content_of(manifest):
        return manifest
    return replace(manifest, former_contents=before.former_contents)


def _content_of_shards(output: Artifact) -> str:
    records = output.shard_records(live=False).values()
    return content_of_files({name: described for record in records for name, described in record.files.items()})


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
