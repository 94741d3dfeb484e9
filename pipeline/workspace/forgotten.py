"""What a workspace was told to forget: ``forgotten.json`` in it, with hashes of uids and URLs, and no content.

`unclip forget` adds an entry. Wherever rows enter the workspace (a list, shards, embeddings of somebody else, an
append), the file is asked, so that a forgotten pair does not come back. The hashes are salted: nobody recognises a URL
in the file without hashing it with this salt.

``forgetting.json`` lists the files that still hold forgotten rows, by shard; it is removed when all are rewritten.
"""

import dataclasses
import functools
import hashlib
import secrets
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import StepError
from pipeline.workspace.manifest import Manifest, read_record
from pipeline.workspace.store import Artifact

Json = dict[str, Any]

FORGOTTEN = "forgotten.json"
PENDING = "forgetting.json"
CAUSE = "forgotten"
"""Class of failure of a row that is not downloaded, because its pair was forgotten."""
_DIGEST_BYTES = 16
_MEND = "bring it back from a copy"


@dataclass(frozen=True)
class TrainedOn:
    """A network that was trained on pairs, or was being trained, when they were forgotten."""

    step: str
    key: str
    pairs: int
    """Pairs that its training may have read."""
    source: str
    """The input that says which rows it reads."""
    content: str
    """``content_of`` this input when it was trained."""


@dataclass(frozen=True)
class Entry:
    """One call of `unclip forget`."""

    at: float
    """When, in seconds since the epoch."""
    names: tuple[str, ...]
    """Hashes of the uids and URLs."""
    rows: dict[str, int] = field(default_factory=dict[str, int])
    """Rows that the workspace had of them, by step."""
    networks: tuple[TrainedOn, ...] = ()


@dataclass(frozen=True)
class Forgotten:
    """All entries of a workspace."""

    salt: str
    entries: tuple[Entry, ...] = ()

    @classmethod
    def read(cls, workspace: str) -> "Forgotten":
        """The file of a workspace, by its root; no entries if there is none.

        Raises:
            DataError: If it cannot be read: what it holds must not come back unnoticed.
        """
        content = Artifact(workspace).find_bytes(FORGOTTEN)
        if content is None:
            return cls(secrets.token_hex(_DIGEST_BYTES))
        return read_record(cls, content, f"{workspace}/{FORGOTTEN}", _MEND)

    def write(self, workspace: str) -> None:
        """Replace the file of a workspace."""
        Artifact(workspace).write_json(FORGOTTEN, dataclasses.asdict(self))

    def add(self, names: Iterable[str], at: float, rows: dict[str, int], networks: Iterable[TrainedOn]) -> "Forgotten":
        """With one more entry; ``names`` are uids and URLs."""
        entry = Entry(at, tuple(sorted({self._hash(name) for name in names})), rows, tuple(networks))
        return dataclasses.replace(self, entries=(*self.entries, entry))

    def has(self, names: Iterable[str | None]) -> list[bool]:
        """Whether each uid or URL was forgotten."""
        hashes = self._hashes
        return [bool(hashes and name) and self._hash(name or "") in hashes for name in names]

    def has_rows(self, uids: Iterable[str | None], urls: Iterable[str | None]) -> list[bool]:
        """Whether the pair of each row was forgotten, by its uid or by its URL."""
        return [by_uid or by_url for by_uid, by_url in zip(self.has(uids), self.has(urls), strict=True)]

    def trained_on(self, manifest: Manifest) -> int:
        """Forgotten pairs that a finished network was trained on; 0 if it was made anew from the rest.

        Its weights may come from other trainings: one that it continued with more phases, or a network that it began
        with. Pairs that these were trained on count as its own.
        """
        trainings = list(trainings_of(manifest.step, manifest.key, manifest.input_contents, manifest.metrics))
        return sum(most_pairs(entry.networks, trainings) for entry in self.entries)

    def begun_with(self, manifest: Manifest) -> tuple[str, str] | None:
        """Step and key of the network with whose weights a finished one began, if forgotten pairs were in these."""
        source = manifest.metrics.get("begun_with")
        if not source:
            return None
        name, key = source.get("name", manifest.step), source["key"]
        trainings = list(trainings_of(name, key, source.get("input_contents"), source))
        return (name, key) if any(most_pairs(entry.networks, trainings) for entry in self.entries) else None

    @property
    def digest(self) -> str:
        """SHA-256 of all hashes."""
        return hashlib.sha256("\n".join(sorted(self._hashes)).encode()).hexdigest()

    @functools.cached_property
    def _hashes(self) -> frozenset[str]:
        return frozenset(name for entry in self.entries for name in entry.names)

    def _hash(self, name: str) -> str:
        return hashlib.blake2b(name.encode(), key=self.salt.encode(), digest_size=_DIGEST_BYTES).hexdigest()


Training = tuple[str, str, dict[str, str] | None]
"""Step and key of a training, and the content of its inputs by step name; None: not known."""


def trainings_of(step: str, key: str, contents: dict[str, str] | None, sources: Json) -> Iterator[Training]:
    """The trainings that weights have been through, their own first.

    Args:
        step: Of the network.
        key: Of the network.
        contents: Of its own inputs.
        sources: Where its first weights come from, as in its metrics.
    """
    yield step, key, contents
    for source in (sources.get("continued"), sources.get("begun_with")):
        if source:
            yield from trainings_of(source.get("name", step), source["key"], source.get("input_contents"), source)


def most_pairs(networks: Iterable[TrainedOn], trainings: Sequence[Training]) -> int:
    """Pairs of one call that weights have been trained on: those of the training that has read most of them.

    Nearly always all of them read the same. Of several that read different ones it is the least that it can be.
    """

    def has_read(network: TrainedOn) -> bool:
        return any(
            (network.step, network.key) == (step, key)
            and (contents is None or network.content == contents.get(network.source, ""))
            for step, key, contents in trainings
        )

    return max((one.pairs for one in networks if has_read(one)), default=0)


@dataclass(frozen=True)
class Rewrite:
    """Shards of one artifact that hold forgotten rows."""

    step: str
    key: str
    shards: tuple[str, ...]
    content: str = ""
    """``content_of`` its manifest before; empty: the step is not finished."""


@dataclass(frozen=True)
class Pending:
    """What is still to be rewritten or removed."""

    rewrites: tuple[Rewrite, ...] = ()
    """In the order of the steps."""
    indexes: tuple[str, ...] = ()
    """Keys of the indexes that read embeddings of ``rewrites``: they are built anew after these."""
    removals: tuple[tuple[str, str], ...] = ()
    """Step and key of artifacts that are removed and made anew: those that show a pair, and unfinished work."""
    has_begun: bool = False
    """Whether the rewriting has begun: from then on the places in ``indexes`` are not those of the embeddings."""

    @classmethod
    def read(cls, workspace: str) -> "Pending | None":
        """The file of a workspace, by its root; None if nothing is to be done.

        Raises:
            DataError: If it cannot be read: it alone says which files still hold forgotten rows.
        """
        content = Artifact(workspace).find_bytes(PENDING)
        return None if content is None else read_record(cls, content, f"{workspace}/{PENDING}", _MEND)

    def write(self, workspace: str) -> None:
        """Replace the file of a workspace."""
        Artifact(workspace).write_json(PENDING, dataclasses.asdict(self))

    @staticmethod
    def remove(workspace: str) -> None:
        """Remove the file: everything is rewritten."""
        Artifact(workspace).remove(PENDING)

    def merge(self, other: "Pending") -> "Pending":
        """With what another call found; of one artifact, the content of the earlier call counts."""
        rewrites = {(one.step, one.key): one for one in self.rewrites}
        for one in other.rewrites:
            before = rewrites.get((one.step, one.key))
            shards = tuple(sorted({*one.shards, *(before.shards if before else ())}))
            rewrites[one.step, one.key] = dataclasses.replace(before or one, shards=shards)
        return Pending(
            tuple(rewrites.values()),
            tuple(sorted({*self.indexes, *other.indexes})),
            tuple(sorted({*self.removals, *other.removals})),
            self.has_begun,
        )


def require_whole_index(workspace: str, key: str) -> None:
    """Refuse an index whose embeddings are being rewritten.

    Raises:
        StepError: If they are; says how to finish.
    """
    pending = Pending.read(workspace)
    if pending is not None and pending.has_begun and key in pending.indexes:
        raise StepError(
            f"{workspace}: rows are being forgotten, and index/{key} is not built anew yet; "
            f"finish with: unclip forget --compact --workspace {shlex.quote(workspace)}"
        )
