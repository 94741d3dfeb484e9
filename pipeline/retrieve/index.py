"""Opens and searches the neighbour index: its newest version, which is a list of segments and of deleted rows."""

import functools
import itertools
import logging
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.rows import require_columns
from pipeline.errors import DataError, StepError
from pipeline.retrieve.embedded import Floats, Ids, content_now
from pipeline.retrieve.segment import Modality, Segment, workspace_of
from pipeline.retrieve.versions import Version, descriptions_of, read_version, version_is_gone
from pipeline.workspace.forgotten import require_whole_index
from pipeline.workspace.hashing import sha256_of
from pipeline.workspace.objects import Json
from pipeline.workspace.store import Artifact

_log = logging.getLogger(__name__)

ROW_COLUMNS = ("uid", "key", "shard", "url", "caption", "split")


@dataclass(frozen=True)
class Neighbour:
    """One result of a search."""

    id: int
    """Stable number of the row: a hash of its uid, below 2^53."""
    uid: str
    similarity: float
    """Exact cosine similarity, never the approximation of a quantised index."""
    url: str
    caption: str
    key: str
    shard: str


class NeighbourIndex:
    """Searches the nearest rows by z_image or by z_text; several threads may search at once.

    An open index shows one version for ever. It is memory-mapped: opening and searching need memory for the rows that
    are visited, not for all rows.
    """

    def __init__(self, segments: Sequence[Segment], version: int) -> None:
        self._segments = tuple(segments)
        self.version = version
        """Number of changes since the index was built."""

    @classmethod
    def open(cls, index: Artifact, *, version_number: int | None = None, is_verified: bool = False) -> "NeighbourIndex":
        """Open a version of an index.

        Args:
            index: The index step's artifact. It names its embeddings, which hold the exact vectors.
            version_number: The version, of which the files stay until the second change after it; None: the newest.
            is_verified: Whether all files of the index, but not its embeddings, are read first and compared with their
                checksums; the time grows with the rows.

        Raises:
            DataError: If a file is missing or damaged, or the numbers of rows of two files differ.
            StepError: If rows of its embeddings are being forgotten at this moment, if these have other content than
                when its rows came from them, or if the version is gone.
        """
        require_whole_index(workspace_of(index), index.key)
        version = read_version(index, version_number)
        try:
            if is_verified:
                _verify(index, version)
            deleted = version.read_deleted(index)
            segments = [Segment(index, name, deleted) for name in version.segments]
        except (DataError, OSError):
            newest = read_version(index)
            if newest == version or not _is_gone(index, version):
                raise
            if version_number is None:  # two changes since then have removed its files
                return cls.open(index, is_verified=is_verified)
            raise version_is_gone(index, version.number, newest.number) from None
        _require_same_embeddings(index, segments)
        for segment in segments:
            require_columns(
                segment.rows.column_names, list(ROW_COLUMNS), where=f"{index.uri}/{segment.name}/rows.arrow"
            )
        return cls(segments, version.number)

    @property
    def num_rows(self) -> int:
        """Rows that a search may return."""
        return sum(segment.num_rows for segment in self._segments)

    @property
    def embed_dim(self) -> int:
        """Width D of a query, in features."""
        return self._segments[0].rows.shards.embed_dim

    @property
    def sources(self) -> tuple[Artifact, ...]:
        """Artifacts of the embed steps that the rows come from, each once."""
        by_uri = {source.uri: source for segment in self._segments for source in segment.rows.shards.sources}
        return tuple(by_uri.values())

    @functools.cached_property
    def first_shards(self) -> dict[str, str]:
        """The name of the first shard of each source, by the source's URI."""
        return {
            shards.sources[source].uri: name
            for shards in (segment.rows.shards for segment in self._segments)
            for source, name in reversed(shards.shards)
        }

    def search(self, vectors: Floats, k: int, modality: Modality = "image") -> tuple[Floats, Ids]:
        """Find the nearest rows.

        The search takes more effort for a larger k, so that the recall is that of the recipe's target for any k.

        Args:
            vectors: Queries (Q, D), of length one.
            k: Neighbours of each query.
            modality: Compare with pictures (z_image) or with captions (z_text).

        Returns:
            Exact cosine similarities (Q, k), falling, and the rows' ids (Q, k). If the index has fewer than k rows, the
            rest is -inf and -1.

        Raises:
            ValueError: If the queries are not (Q, D).
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.embed_dim:
            raise ValueError(f"queries of shape {vectors.shape}: this index takes (Q, {self.embed_dim})")
        queries = np.ascontiguousarray(vectors, np.float32)
        parts = [_search_segment(segment, queries, k, modality) for segment in self._segments]
        scores, ids = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True)) if parts[1:] else parts[0]
        query, order = np.arange(len(queries))[:, None], np.lexsort((ids, -scores))[:, :k]
        return scores[query, order], ids[query, order]  # ties by id, so that results do not change

    def find(self, vectors: Floats, k: int, modality: Modality = "image") -> list[list[Neighbour]]:
        """The same search, with the columns of each row; fewer than k rows if the index has fewer."""
        scores, ids = self.search(vectors, k, modality)
        is_row = ids >= 0
        neighbours = iter(self.neighbours(scores[is_row], ids[is_row]))  # of all queries at once
        return [list(itertools.islice(neighbours, count)) for count in is_row.sum(axis=1).tolist()]

    def neighbours(self, scores: Floats, ids: Ids) -> list[Neighbour]:
        """Rows by id with their similarities.

        Raises:
            ValueError: If no search returns such a row.
        """
        rows = list[Any]([None]) * len(ids)
        for segment, chosen, positions in self._locate(ids):
            for place, row in zip(chosen.tolist(), segment.rows.values(positions, _NEIGHBOUR_COLUMNS), strict=True):
                rows[place] = row
        return [
            Neighbour(number, uid, score, *others)
            for number, score, (uid, *others) in zip(ids.tolist(), scores.tolist(), rows, strict=True)
        ]

    @property
    def column_names(self) -> frozenset[str]:
        """The columns that the rows of every segment have."""
        return frozenset.intersection(*(frozenset(segment.rows.column_names) for segment in self._segments))

    def rows(self, ids: Sequence[int] | Ids, names: Collection[str] | None = None) -> pa.Table:
        """The columns of rows by id, in the order of ``ids``: uid, key, shard, url, caption, split and others.

        Args:
            ids: The rows.
            names: The columns to read, those of them that there are; None: all.

        Raises:
            ValueError: If no search returns such a row.
        """
        numbers = np.asarray(ids, np.int64).reshape(-1)
        parts, places = list[pa.Table](), list[Ids]()
        for segment, chosen, positions in self._locate(numbers):
            parts.append(segment.rows.columns(positions, names))
            places.append(chosen)
        if not parts:
            return self._segments[0].rows.columns(numbers, names)
        table = pa.concat_tables(parts, promote_options="default")
        order = np.argsort(np.concatenate(places))
        return table if (np.diff(order) == 1).all() else table.take(pa.array(order))

    def vectors(self, ids: Sequence[int] | Ids, modality: Modality = "image") -> Floats:
        """The stored vectors (len(ids), D) of rows by id, of length one.

        Raises:
            ValueError: If no search returns such a row.
        """
        numbers = np.asarray(ids, np.int64).reshape(-1)
        vectors = np.empty((len(numbers), self.embed_dim), np.float32)
        for segment, chosen, positions in self._locate(numbers):
            vectors[chosen] = segment.rows.vectors(positions, f"z_{modality}")
        return vectors

    def sample(self, split: str, count: int, seed: int = 0) -> Ids:
        """Ids of at most ``count`` random rows of a split; the time does not grow with the rows."""
        rng = np.random.default_rng(seed)
        ids = np.concatenate([segment.rows.sample(split, count, rng) for segment in self._segments])
        ids = ids[self.has(ids)]
        return ids if len(ids) <= count else rng.choice(ids, count, replace=False)

    def has(self, ids: Sequence[int] | Ids) -> Any:
        """Whether a search may return each row, (len(ids),) of bool."""
        numbers = np.asarray(ids, np.int64).reshape(-1)
        return np.any([segment.positions(numbers) >= 0 for segment in self._segments], axis=0)

    def sources_of(self, ids: Sequence[int] | Ids) -> Ids:
        """The embed step's artifact that each row comes from, as its number in ``sources``.

        Its manifest names the download with the row's picture.

        Raises:
            ValueError: If no search returns such a row.
        """
        numbers, places = np.asarray(ids, np.int64).reshape(-1), {one.uri: n for n, one in enumerate(self.sources)}
        sources = np.empty(len(numbers), np.int64)
        for segment, chosen, positions in self._locate(numbers):
            own = np.array([places[source.uri] for source in segment.rows.shards.sources], np.int64)
            sources[chosen] = own[segment.rows.sources_of(positions)]
        return sources

    def _locate(self, ids: Ids) -> list[tuple[Segment, Ids, Ids]]:
        """Each segment that has some of the rows: which of ``ids``, and their positions."""
        located, missing = list[tuple[Segment, Ids, Ids]](), np.arange(len(ids))
        for segment in self._segments:
            positions = segment.positions(ids[missing])
            if (positions >= 0).any():
                located.append((segment, missing[positions >= 0], positions[positions >= 0]))
            missing = missing[positions < 0]
        if len(missing):
            raise ValueError(f"no row {ids[missing[0]]}: the index has {self.num_rows} rows, and none of this id")
        return located


def _require_same_embeddings(index: Artifact, segments: Sequence[Segment]) -> None:
    """Refuse an index whose embeddings were made anew since: it would read other vectors at the places of its rows.

    Raises:
        StepError: If they were, or are being made anew; says what to run.
    """
    now = dict[str, str]()
    for segment in segments:
        shards = segment.rows.shards
        if not shards.contents:
            raise StepError(
                f"{index.uri}/{segment.name}: an earlier release built it, and did not note the content of its "
                "embeddings; put it together anew: unclip compact RECIPE"
            )
        for source, content in zip(shards.sources, shards.contents, strict=True):
            if source.uri not in now:
                now[source.uri] = content_now(source)
            if now[source.uri] != content:
                raise StepError(_other_content(index, source, is_there=bool(now[source.uri])))


def _other_content(index: Artifact, source: Artifact, *, is_there: bool) -> str:
    """What to do about an index whose rows come from other content of some embeddings."""
    facts, manifest = f"{index.uri}: rows of it come from {source.uri}", index.manifest()
    inputs = manifest.inputs.items() if manifest else ()
    if source.uri in {f"{workspace_of(index)}/{step}/{key}" for step, key in inputs}:
        state = "was made anew since" if is_there else "is not finished"
        return f"{facts}, which {state}; make both anew: unclip run RECIPE"
    if is_there:
        return f"{facts}, which was appended, and made anew since; put the index together anew: unclip compact RECIPE"
    return f"{facts}, which was appended, and is not finished or is gone; run the recipe of these embeddings first"


def _is_gone(index: Artifact, version: Version) -> bool:
    """Whether changes since a version have removed some of its files."""
    files = [f"{segment}/segment.json" for segment in version.segments]
    return not all(map(index.exists, [*files, version.deleted] if version.deleted else files))


def _verify(index: Artifact, version: Version) -> None:
    """Compare the files of a version with their checksums, several at a time; tells which ones have none."""
    descriptions = descriptions_of(index, version)
    described = {name.partition("/")[0] for name in descriptions if name != version.deleted}
    unknown = [name for name in version.segments if name not in described]
    unknown += [version.deleted] if version.deleted and version.deleted not in descriptions else []
    if unknown:
        _log.warning(
            "%s: no checksums are recorded of %s, which an earlier release wrote, so damage there is not seen; "
            "`unclip compact` writes them anew, with checksums",
            index.uri,
            ", ".join(unknown),
        )
    files = Artifact(index.uri)  # which remembers nothing of what this process wrote
    with ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
        list(threads.map(lambda name: _verify_file(files, name, descriptions[name]), descriptions))


def _verify_file(index: Artifact, name: str, described: Json) -> None:
    """Compare one file with its record; of a store, what is fetched for it is the copy that is opened afterwards.

    A copy in this machine's cache was compared when it came, but its disk may have changed it since: it is read again,
    and fetched again if it differs.
    """
    path = index.matching(name, described)
    if path is not None and "://" in index.uri and sha256_of(path) != described["sha256"]:
        path.unlink(missing_ok=True)
        path = index.matching(name, described)
    if path is None:
        raise DataError(f"{index.uri}/{name}: does not match its checksum; {index.mend()}")


_FILES_AT_ONCE = 4
_NEIGHBOUR_COLUMNS = ("uid", "url", "caption", "key", "shard")


def _search_segment(segment: Segment, queries: Floats, k: int, modality: Modality) -> tuple[Floats, Ids]:
    """The scores and the ids (Q, k) of the nearest rows of one segment; -inf and -1 where there are none."""
    scores, positions = segment.search(queries, k, modality)
    if not len(segment.rows):
        return scores, positions
    return scores, np.where(positions < 0, -1, segment.rows.ids[positions])
