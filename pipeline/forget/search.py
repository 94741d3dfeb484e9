"""Finds the rows of some uids and URLs in the artifacts of a workspace; reads two or three columns of each file."""

import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.data.drawn import EVALUATION
from pipeline.data.shard_tables import find_rows, read_names
from pipeline.errors import DataError
from pipeline.forget.networks import continued_by, networks_on
from pipeline.forget.shown import Pairs
from pipeline.recipe.lineage import indexed_embeddings
from pipeline.recipe.steps import STEP_ROWS
from pipeline.retrieve.changes import find_ids
from pipeline.retrieve.versions import read_version
from pipeline.workspace.forgotten import Pending, Rewrite, TrainedOn
from pipeline.workspace.manifest import Manifest, content_of
from pipeline.workspace.store import LIVE, MANIFEST, Artifact, Workspace

TABLES = ("pairs", "download", "filter", "embed", "filter_embeddings")
"""Steps whose artifacts hold a row for each pair, in the order in which they are searched and rewritten."""
SHARDS_STAY = frozenset({"download", "embed"})
"""Steps whose finished shards count while the step is unfinished; other unfinished work is removed and made anew."""
SHOWN = ("evaluate", "ablate", "search")
"""Artifacts of what people look at: with captions, uids or pictures of some pairs. No run makes the last two anew."""
FAILURES = "_failures.jsonl"
_SHARD = re.compile(r"(?:labels/)?(\d{5,})\.parquet")
_THREADS = 8
_NAMES = ("uid", "url")
_COLUMNS = (*_NAMES, "caption", "split", "status", "reason")
_SEARCHED = (*_NAMES, "same_as")
"""Labels name a pair by its copies, too, which may be in another shard."""


@dataclass
class Rows:
    """Rows of the named pairs in one artifact."""

    uids: set[str] = field(default_factory=set[str])
    trained: set[str] = field(default_factory=set[str])
    """Uids of those that a training reads: good, of the training split, and not left out."""
    captions: set[str] = field(default_factory=set[str])
    shards: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    """Uids by shard."""
    is_live: bool = False
    """Whether files of unfinished work hold such rows, too."""

    def add(self, other: "Rows") -> None:
        """Add the rows of one more file."""
        self.uids |= other.uids
        self.trained |= other.trained
        self.captions |= other.captions
        for shard, uids in other.shards.items():
            self.shards.setdefault(shard, set()).update(uids)
        self.is_live |= other.is_live


@dataclass(frozen=True)
class Search:
    """What a workspace holds of some pairs."""

    names: tuple[str, ...]
    """The uids and URLs that were searched."""
    uids: frozenset[str]
    """Uids of all their pairs."""
    unknown: tuple[str, ...]
    """Names of which the workspace has no row."""
    rows: dict[str, int]
    """Rows by step; of an index, those that a search may return."""
    pending: Pending
    """What has to be rewritten."""
    networks: tuple[TrainedOn, ...]
    dirty: tuple[tuple[str, str], ...]
    """Step and key of the finished networks, and of all that was made from them, in the order of the steps."""
    roots: tuple[tuple[str, str], ...]
    """Those of ``dirty`` that are made from none of it: who makes these and all that follows anew makes all anew."""
    node_s: float
    """What the making of ``dirty`` took: wall seconds times workers."""
    continued: tuple[tuple[str, str], ...] = ()
    """Step and key of the trainings on these pairs that others of ``dirty`` have continued, and would continue again
    when they are made anew."""
    begun_with: tuple[tuple[tuple[str, str], tuple[str, str]], ...] = ()
    """Networks that began, by ``init_from``, with weights that were trained on these pairs, finished or not: step and
    key of each, and those of the network with whose weights it began."""
    earlier: tuple[TrainedOn, ...] = ()
    """Trainings on these pairs of which the workspace has only what began with their weights, or continued them."""


def search(workspace: Workspace, names: Iterable[str]) -> Search:
    """Find the rows of some uids and URLs; memory is that of these rows, and of one row group for each thread.

    Raises:
        DataError: If a manifest or a file cannot be read: it might hold such a row.
    """
    searched = tuple(dict.fromkeys(names))
    manifests = {step: _manifests(workspace, step) for step in STEP_ROWS}
    rows_by_artifact: dict[tuple[str, str], Rows] = {}
    uids, names_of_rows = set(searched), set[str]()
    for step in TABLES:
        for key in workspace.keys(step):
            rows, names_here = _search_artifact(step, workspace.artifact(step, key), {*uids}, rows_by_artifact)
            names_of_rows |= names_here
            if rows.shards or rows.is_live:
                rows_by_artifact[step, key] = rows
                uids |= rows.uids
    counts = Counter[str]()
    for (step, _), rows in rows_by_artifact.items():
        counts[step] += sum(map(len, rows.shards.values()))
    indexes: list[str] = []
    for key in manifests["index"]:
        index = workspace.artifact("index", key)
        ids, unknown = find_ids(index, version := read_version(index), sorted(uids))
        counts["index"] += len(np.setdiff1d(ids, version.read_deleted(index)))
        names_of_rows |= set(searched) - set(unknown)
        if len(ids) or any(one in rows_by_artifact for one in indexed_embeddings("index", index)):
            indexes.append(key)
    counts_of_trained = {one: len(rows.trained) for one, rows in rows_by_artifact.items() if rows.trained}
    networks = networks_on(workspace, manifests, counts_of_trained)
    dirty, begun_with = _made_from(manifests, networks.finished), dict(networks.begun_with)
    return Search(
        searched,
        frozenset(uid for rows in rows_by_artifact.values() for uid in rows.uids),
        tuple(name for name in searched if name not in names_of_rows),
        {step: count for step, count in counts.items() if count},
        Pending(
            tuple(_rewrites(rows_by_artifact, manifests)),
            tuple(indexes),
            tuple(_removals(workspace, manifests, rows_by_artifact, searched)),
        ),
        networks.networks,
        dirty,
        tuple(
            one
            for one in dirty
            if manifests[one[0]][one[1]].inputs.items().isdisjoint(dirty) and begun_with.get(one) not in dirty
        ),
        sum(manifests[step][key].node_s for step, key in dirty),
        tuple(continued_by((manifests[step][key] for step, key in dirty), networks.networks)),
        networks.begun_with,
        networks.earlier,
    )


def _manifests(workspace: Workspace, step: str) -> dict[str, Manifest]:
    manifests, damages = workspace.manifests(step)
    if damages:
        raise DataError("; ".join(damages))
    return {manifest.key: manifest for manifest in manifests}


def _search_artifact(
    step: str, artifact: Artifact, names: set[str], rows_by_artifact: Mapping[tuple[str, str], Rows]
) -> tuple[Rows, set[str]]:
    """The rows of one artifact; and which of the names it has."""
    files = [name for name in artifact.names() if name.endswith((".parquet", FAILURES)) and name != EVALUATION]
    if step in {"filter", "filter_embeddings"}:  # the files of their passes have no uids
        files = [name for name in files if not name.startswith(LIVE)]
    trained = {uid for (name, _), rows in rows_by_artifact.items() if name == "download" for uid in rows.trained}
    values = pa.array(sorted(names), pa.string())

    def search_file(name: str) -> tuple[Rows, set[str]]:
        if name.endswith(FAILURES):
            return _search_failures(artifact, name, names)
        return _search_table(artifact, name, names, values, trained)

    rows, names_of_rows = Rows(), set[str]()
    with ThreadPoolExecutor(_THREADS) as threads:
        for rows_of_file, names_of_file in threads.map(search_file, files):
            rows.add(rows_of_file)
            names_of_rows |= names_of_file
    return rows, names_of_rows


def _search_table(
    artifact: Artifact, name: str, names: set[str], values: pa.Array, trained: set[str]
) -> tuple[Rows, set[str]]:
    """The rows of one Parquet file.

    Args:
        artifact: The file's artifact.
        name: The file.
        names: What is searched.
        values: The same for Arrow.
        trained: Of labels, the uids of the training split.
    """
    file = artifact.ranged(name)
    existing = read_names(file)
    keys, columns = ([one for one in chosen if one in existing] for chosen in (_SEARCHED, _COLUMNS))
    if not keys:
        return Rows(), set()
    matches = list(find_rows(file, keys, values, columns))
    if not matches:
        return Rows(), set()
    named = [row for row in matches if names & {row["uid"], row.get("url")}]
    shard = _SHARD.fullmatch(name)
    uids = {row["uid"] for row in named}
    rows = Rows(uids, shards={shard.group(1): uids} if shard else {}, is_live=shard is None)
    for row in named:
        rows.captions.add(row.get("caption") or "")
        is_train = row["split"] == "train" if "split" in row else row["uid"] in trained
        if is_train and row.get("status", "success") == "success" and not row.get("reason"):
            rows.trained.add(row["uid"])
    return rows, {row[key] for row in named for key in _NAMES if row.get(key)}


def _search_failures(artifact: Artifact, name: str, names: set[str]) -> tuple[Rows, set[str]]:
    """The rows that could not be embedded; they are in no table of the artifact."""
    lines = artifact.path(name).read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if names & {row["uid"], row["url"]}]
    shard = name.removesuffix(FAILURES)
    uids = {row["uid"] for row in rows}
    return Rows(uids, shards={shard: uids} if uids else {}), {row[key] for row in rows for key in ("uid", "url")}


def _rewrites(
    rows_by_artifact: Mapping[tuple[str, str], Rows], manifests: Mapping[str, Mapping[str, Manifest]]
) -> Iterator[Rewrite]:
    for (step, key), rows in rows_by_artifact.items():
        manifest = manifests[step].get(key)
        if (rows.shards or rows.is_live) and (manifest is not None or step in SHARDS_STAY):
            content = content_of(manifest) if manifest else ""
            yield Rewrite(step, key, tuple(sorted(rows.shards)), content)


def _removals(
    workspace: Workspace,
    manifests: Mapping[str, Mapping[str, Manifest]],
    rows_by_artifact: Mapping[tuple[str, str], Rows],
    names: Iterable[str],
) -> Iterator[tuple[str, str]]:
    """Unfinished lists, filters and indexes that may hold such a row, and what people look at that shows one."""
    for step in ("pairs", "filter", "filter_embeddings", "index") if rows_by_artifact else ():
        for key in workspace.keys(step):
            if key not in manifests[step] and (step != "pairs" or (step, key) in rows_by_artifact):
                yield step, key
    uids = {uid for rows in rows_by_artifact.values() for uid in rows.uids}
    captions = {caption for rows in rows_by_artifact.values() for caption in rows.captions}
    pairs = Pairs(frozenset({*names, *uids} - {""}), frozenset(captions - {""}))
    for step in SHOWN:
        for key in workspace.keys(step):
            artifact = workspace.artifact(step, key)
            is_nameless = step == "ablate" and rows_by_artifact and not artifact.exists(MANIFEST)  # names come last
            if is_nameless or pairs.are_in(artifact):
                yield step, key


def _made_from(
    manifests: Mapping[str, Mapping[str, Manifest]], roots: Collection[tuple[str, str]]
) -> tuple[tuple[str, str], ...]:
    """Artifacts, and all that were made from them, directly or not, in the order of the steps."""
    users: defaultdict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
    for step, of_step in manifests.items():
        for key, manifest in of_step.items():
            for one in manifest.inputs.items():
                users[one].add((step, key))
    reached, waiting = set[tuple[str, str]](), list(roots)
    while waiting:
        one = waiting.pop()
        if one not in reached:
            reached.add(one)
            waiting += users[one]
    return tuple((step, key) for step in STEP_ROWS for key in sorted(manifests[step]) if (step, key) in reached)


def names_of(words: Iterable[str]) -> list[str]:
    """Uids and URLs, of which a word that is a file has one a line.

    Raises:
        ConfigError: If a file cannot be read.
    """
    from pathlib import Path

    from pipeline.retrieve.changes import read_names as read_lines

    lists = [read_lines(word) if "://" not in word and Path(word).is_file() else [word] for word in words]
    return list(dict.fromkeys(itertools.chain.from_iterable(lists)))
