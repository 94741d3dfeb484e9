"""Changes of a finished index: rows deleted and restored, segments added and put together.

Each change writes new files and then a new version; the files of a version never change, so a reader keeps what it has
opened. The version before stays with its files, for a reader that is opening it; older ones are removed.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from pipeline.data.rows import row_id
from pipeline.errors import ConfigError, DataError
from pipeline.retrieve.build import IndexSummary, SegmentBuild
from pipeline.retrieve.embedded import EmbeddedShards, Ids
from pipeline.retrieve.recall import write_metrics
from pipeline.retrieve.rows import Rows, write_array
from pipeline.retrieve.segment import workspace_of
from pipeline.retrieve.takedown import Takedown
from pipeline.retrieve.versions import Version, describe_segment, last_versions, read_version
from pipeline.workspace.store import LIVE, Artifact, Workspace

pc: Any = pyarrow.compute  # its functions are made when it is imported, and have no types

_SEGMENT = re.compile(r"segment_(\d{5})/")
_BLOCK_ROWS = 65_536
_ROWS_OF_A_URL = 8
"""Rows that are compared with the URLs at once, for each URL: each comparison makes a table of all URLs anew."""

Check = Callable[[], None]
"""Raises StepError if the workspace's lock was lost; called before each commit."""


@dataclass(frozen=True)
class Change:
    """What became of the rows that a change named."""

    version: int
    changed: int
    """Rows that were deleted or restored."""
    unchanged: int
    """Rows that were so before."""
    unknown: tuple[str, ...]
    """Uids and URLs of which the index has no row."""


def _unlocked() -> None:
    """The check of a caller who is alone."""


def delete(index: Artifact, names: Sequence[str], check: Check = _unlocked) -> Change:
    """Let no search return the rows of some uids or URLs.

    The rows stay in the files until `unclip compact`; they are not added again by an append.

    Args:
        index: The index.
        names: Uids, or URLs, of which each may have several rows.
        check: Called before the commit.

    Raises:
        DataError: If a file of the index is damaged.
    """
    version = read_version(index)
    ids, unknown = find_ids(index, version, names)
    before = version.read_deleted(index)
    check()
    return _publish_deleted(index, version, np.union1d(before, ids), np.isin(ids, before), unknown)


def restore(index: Artifact, names: Sequence[str]) -> Change:
    """Undo ``delete``; rows that were compacted away come back with their embeddings, by an append.

    Raises:
        DataError: If a file of the index is damaged.
    """
    version = read_version(index)
    return _restore(index, version, *find_ids(index, version, names))


def _restore(index: Artifact, version: Version, ids: Ids, unknown: Sequence[str]) -> Change:
    before = version.read_deleted(index)
    numbers = _ids_of(unknown)
    is_compacted = np.isin(numbers, before)
    ids = np.union1d(ids, numbers[is_compacted])
    rest = tuple(itertools.compress(unknown, ~is_compacted))
    return _publish_deleted(index, version, np.setdiff1d(before, ids), ~np.isin(ids, before), rest)


def delete_everywhere(workspace: Workspace, names: Sequence[str], check: Check = _unlocked) -> dict[str, Change]:
    """Put names on the list that every later build reads, and delete their rows from every finished index.

    Args:
        workspace: The workspace, locked.
        names: As ``delete``. Names that no index has stay on the list, too.
        check: Called before each commit.

    Returns:
        The change of each index, by its key.

    Raises:
        ConfigError: If a name has a line break.
        DataError: If a file of an index is damaged.
    """
    takedown = Takedown.read(workspace.root).add(names)
    check()
    takedown.write(workspace.root)  # first: what is stopped here is only done again
    return {index.key: delete(index, names, check) for index in _finished(workspace)}


def restore_everywhere(workspace: Workspace, names: Sequence[str], check: Check = _unlocked) -> dict[str, Change]:
    """Undo ``delete_everywhere``; see there.

    Raises:
        ConfigError: If a pair was forgotten, or stays on the list by its other name, its URL or its uid: the next
            build would leave it out.
        DataError: If a file of an index is damaged.
    """
    rest = Takedown.read(workspace.root).remove(names)
    rows_of_indexes: list[tuple[Artifact, Version, Ids, tuple[str, ...]]] = []
    for index in _finished(workspace):
        version = read_version(index)
        ids, unknown = find_ids(index, version, names)
        for _, pairs in _pairs_of(index, version, ids):
            _require_off_list(pairs, rest)
        rows_of_indexes.append((index, version, ids, unknown))
    changes: dict[str, Change] = {}
    for index, version, ids, unknown in rows_of_indexes:
        check()
        changes[index.key] = _restore(index, version, ids, unknown)
    check()
    rest.write(workspace.root)
    return changes


def _require_off_list(pairs: pa.Table, takedown: Takedown) -> None:
    blocked: list[dict[str, str]] = pairs.filter(pa.array(takedown.has(pairs))).slice(0, 1).to_pylist()
    for pair in blocked:
        if any(takedown.forgotten.has([pair["uid"], pair["url"]])):
            raise ConfigError(f"{pair['url']}: this pair was forgotten (`unclip forget`), so it does not come back")
        if pair["url"] in takedown.names:
            raise ConfigError(
                f"{pair['uid']}: its URL was deleted, and with it every pair of the URL; restore the URL: {pair['url']}"
            )
        raise ConfigError(
            f"{pair['url']}: a pair of it was deleted by its uid, too; also restore the uid: {pair['uid']}"
        )


def _pairs_of(index: Artifact, version: Version, ids: Ids) -> Iterator[tuple[Ids, pa.Table]]:
    """The rows of some ids, block by block: the ids, and their columns."""
    for segment in version.segments:
        rows = open_rows(index, segment)
        positions = rows.positions(ids)
        positions = positions[positions >= 0]
        for start in range(0, len(positions), _BLOCK_ROWS):
            block = positions[start : start + _BLOCK_ROWS]
            yield np.asarray(rows.ids[block]), rows.columns(block)


def _finished(workspace: Workspace) -> list[Artifact]:
    """Every finished index of a workspace.

    Raises:
        DataError: If a manifest cannot be read: its index would keep the pairs.
    """
    manifests, damages = workspace.manifests("index")
    if damages:
        raise DataError("; ".join(damages))
    return [workspace.artifact("index", manifest.key) for manifest in manifests]


def find_ids(index: Artifact, version: Version, names: Sequence[str]) -> tuple[Ids, tuple[str, ...]]:
    """The ids of the rows, deleted or not, whose uid or URL is named; and the names without a row.

    Uids are found at once; for URLs, the column of all rows is read, block by block.
    """
    ids, rest = set[int](), dict.fromkeys(names)
    for segment in version.segments:
        rows = open_rows(index, segment)
        for name, position in zip(list(rest), rows.positions(_ids_of(rest)).tolist(), strict=True):
            if position >= 0 and rows.columns(np.array([position]), ["uid"]).column("uid")[0].as_py() == name:
                ids.add(row_id(name))
                del rest[name]
    urls = pa.array(list(rest), pa.string())
    for segment in version.segments if len(urls) else ():
        rows = open_rows(index, segment)
        for start, batch in rows.batches(["url"], max(_BLOCK_ROWS, _ROWS_OF_A_URL * len(urls))):
            is_named = pc.is_in(batch.column("url"), value_set=urls)
            ids.update(rows.ids[start + pc.indices_nonzero(is_named).to_numpy()].tolist())
            for url in pc.unique(batch.column("url").filter(is_named)).to_pylist():
                rest[url] = "found"
    unknown = tuple(name for name, state in rest.items() if state is None)
    return np.array(sorted(ids), np.int64), unknown


def segment_of_more(
    build: SegmentBuild, clip_of_index: Artifact | None = None, clip_of_more: Artifact | None = None
) -> SegmentBuild:
    """The build of a segment of new rows behind those that an index has.

    Args:
        build: The build, of the new embeddings.
        clip_of_index: The CLIP that the recipe of the index names, for an index of imported embeddings, which say none.
        clip_of_more: The CLIP that the recipe of the new embeddings names, for imported ones; None: not known.

    Raises:
        DataError: If its embeddings are not by the CLIP of the index, or nothing says by which they are.
    """
    version = read_version(build.output)
    [new] = build.sources
    shards = open_rows(build.output, version.segments[0]).shards
    old = shards.sources[0]
    _require_one_clip((new, _clip_of(new, clip_of_more)), (old, _clip_of(old, clip_of_index)))
    if (width := EmbeddedShards.open([new]).embed_dim) != shards.embed_dim:
        raise DataError(
            f"{new.uri}: embeddings of width {width}; those of the index, {old.uri}, have {shards.embed_dim}"
        )
    return replace(build, segment=_new_name(build.output), earlier=version.segments, deleted=version.deleted)


def segment_of_all(build: SegmentBuild) -> SegmentBuild:
    """The build of one segment from the embeddings of all segments of an index.

    Embeddings whose pairs were all forgotten have no rows, and are left out.

    Raises:
        DataError: If embeddings are gone.
    """
    version, sources = read_version(build.output), sources_of(build.output)
    with_rows = tuple(source for source in sources if has_rows(source))
    for source in sources:
        if source not in with_rows and source.manifest() is None:
            raise DataError(
                f"index: {source.uri} is gone, and rows of {build.output.uri} come from it: bring it back; if that "
                f"cannot be, move {build.output.uri} away: the next run builds it without these rows, and without "
                "those of other appends"
            )
    # If none has rows, the build refuses them.
    return replace(build, sources=with_rows or sources, segment=_new_name(build.output), deleted=version.deleted)


def sources_of(index: Artifact) -> tuple[Artifact, ...]:
    """The embeddings that the segments of an index read, each once."""
    segments = [open_rows(index, name).shards for name in read_version(index).segments]
    return tuple(Artifact(uri) for uri in dict.fromkeys(source.uri for shards in segments for source in shards.sources))


def has_rows(embeddings: Artifact) -> bool:
    """Whether a finished shard of some embeddings has a row."""
    return any(record.counts["ok"] for record in embeddings.shard_records().values())


def publish_segment(build: SegmentBuild, summary: IndexSummary, *, replaces: bool, check: Check = _unlocked) -> None:
    """Make a finished segment part of the index, or all of it.

    A segment that replaces all others has no deleted rows. What the list of takedowns names need not be deleted a
    second time, so that its row comes back when it is taken off the list and appended.

    Args:
        build: The build.
        summary: What its ``finish`` returned, in this process or another: its files are not read for their checksums.
        replaces: Whether it is all of the index from now on.
        check: Called before the commit.
    """
    version = read_version(build.output)
    new = replace(version, number=version.number + 1, segments=(*version.segments, build.segment))
    if replaces:
        new = _with_deleted(build.output, new, _only_deleted_here(build, version))
        new = replace(new, segments=(build.segment,))
    write_metrics(build.output, build.segment, summary.metrics)
    describe_segment(build.output, build.segment, summary.files)
    check()
    new.write(build.output)
    build.clear()
    _remove_old_files(build.output)


def _only_deleted_here(build: SegmentBuild, version: Version) -> Ids:
    """The deleted ids that the list of takedowns does not name: they were deleted before there was the list."""
    takedown, deleted = build.takedown(), version.read_deleted(build.output)
    listed = [_ids_of(takedown.names)]
    listed += [ids[takedown.has(pairs)] for ids, pairs in _pairs_of(build.output, version, deleted)]
    return np.setdiff1d(deleted, np.concatenate(listed))


def open_rows(index: Artifact, segment: str) -> Rows:
    """The rows of a segment, deleted ones included."""
    embedded = index.read_json(f"{segment}/segment.json")["embedded"]
    return Rows(index, segment, EmbeddedShards.from_json(embedded, workspace_of(index)))


def read_names(path: str) -> list[str]:
    """Uids and URLs of a file, one a line.

    Raises:
        ConfigError: If the file cannot be read.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:  # noqa: PTH123  (a string, as a user gives it)
            return [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None


def _ids_of(names: Iterable[str]) -> Ids:
    return np.array([row_id(name) for name in names], np.int64)


def _publish_deleted(
    index: Artifact, version: Version, deleted: Ids, is_unchanged: Any, unknown: tuple[str, ...]
) -> Change:
    changed, unchanged = int((~is_unchanged).sum()), int(is_unchanged.sum())
    if not changed:
        return Change(version.number, 0, unchanged, unknown)
    new = _with_deleted(index, replace(version, number=version.number + 1), deleted)
    new.write(index)
    _remove_old_files(index)
    return Change(new.number, changed, unchanged, unknown)


def _with_deleted(index: Artifact, version: Version, deleted: Ids) -> Version:
    """A version with these deleted rows, whose sorted ids are written if there are any."""
    if not len(deleted):
        return replace(version, deleted="", deleted_described={})
    name = f"changes/deleted-{version.number:06d}.npy"
    with index.write(name) as path:
        write_array(path, [deleted], deleted.shape, np.int64)
    return replace(version, deleted=name, deleted_described=index.describe(name))


def _new_name(index: Artifact) -> str:
    """The folder of the next segment: a number that no version has used; the newest version has the largest of all."""
    return f"segment_{1 + max(int(name[-5:]) for name in read_version(index).segments):05d}"


def _clip_of(embed: Artifact, named: Artifact | None) -> Artifact:
    """The CLIP that made some embeddings; of imported ones, the one that their recipe names."""
    manifest = embed.manifest()
    if manifest is None or manifest.step not in {"embed", "filter_embeddings"}:
        raise DataError(f"{embed.uri}: not the finished embeddings of an embed step")
    if manifest.step == "filter_embeddings":
        return _clip_of(Artifact(f"{workspace_of(embed)}/embed/{manifest.inputs['embed']}"), named)
    if "clip" in manifest.inputs:
        return Artifact(f"{workspace_of(embed)}/clip/{manifest.inputs['clip']}")
    if named is None:
        raise DataError(
            f"{embed.uri}: embeddings that were imported, and their folder does not say by which CLIP they are; give "
            "their recipe in place of the folder"
        )
    return named


def _require_one_clip(new: tuple[Artifact, Artifact], old: tuple[Artifact, Artifact]) -> None:
    """Refuse new embeddings that are not by the CLIP of the old ones; each is given with its CLIP.

    The weights are compared, or the keys of the two steps where one of them has not run.
    """
    (embed, clip), (_, old_clip) = new, old
    weights, old_weights = _weights_of(clip), _weights_of(old_clip)
    than = f"than those of the index, {old[0].uri}"
    if weights and old_weights:
        if weights != old_weights:
            raise DataError(f"{embed.uri}: embeddings of another CLIP {than}")
    elif clip.key != old_clip.key:
        missing = old_clip if weights else clip
        raise DataError(
            f"{embed.uri}: perhaps embeddings of another CLIP {than}: there are no weights in {missing.uri} to compare "
            "with; first: unclip run RECIPE --until clip"
        )


def _weights_of(clip: Artifact) -> list[str]:
    """The checksums of the weights of a finished CLIP step; empty if it is not finished."""
    manifest = clip.manifest()
    files = manifest.files.items() if manifest else ()
    return [info["sha256"] for name, info in files if name.endswith(".safetensors")]


def remove_earlier_versions(index: Artifact) -> None:
    """Remove what the newest version does not name; call it only while nobody reads the index."""
    _remove_old_files(index, num_kept=1)


def _remove_old_files(index: Artifact, *, num_kept: int = 2) -> None:
    """Remove the versions before the newest and the one before it, what neither names, and what killed writers left."""
    names = index.names()
    versions = last_versions(index, names, num_kept)
    segments = {name for one in versions for name in one.segments}
    others = {name for one in versions for name in (one.file, one.deleted)}
    old = list[str]()
    for name in names:
        segment = _SEGMENT.match(name)
        is_old = segment is not None and segment.group(0)[:-1] not in segments
        is_unused = name.startswith("changes/") and name not in others
        if is_old or is_unused or name.startswith(f"{LIVE}segment_"):
            old.append(name)
    index.remove_all(old)
    index.clear_temporaries()
