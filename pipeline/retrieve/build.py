"""Builds one segment of an index in three stages, of which the second runs in parallel.

    prepare    chooses the kinds to try, the queries and a random sample; trains centroids and quantisers
    add_part   reads some shards once: codes of each kind, rows, ids, and the exact neighbours of the queries
    finish     puts the parts together on the disk, tunes each kind, keeps the fastest that reaches the recall target

Everything between the stages is a file under ``live/``, so a build that is killed goes on from its finished parts.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.vectors import VECTOR_COLUMNS
from pipeline.recipe.sections import IndexConfig
from pipeline.retrieve import kinds
from pipeline.retrieve.choice import ROWS_PER_LIST, choose_num_lists, kinds_left_out, kinds_to_try
from pipeline.retrieve.embedded import EmbeddedShards, Floats, Ids
from pipeline.retrieve.parts import PartPlan, PartWriter, code_name, nearer, shards_of_parts
from pipeline.retrieve.rows import Rows, repeated_positions, sorted_positions, write_array, write_rows
from pipeline.retrieve.sample import choose_queries, choose_sample, read_rows
from pipeline.retrieve.segment import (
    MODALITIES,
    Modality,
    index_file,
    lists_file,
    open_searcher,
    sizes_file,
    workspace_of,
)
from pipeline.retrieve.takedown import Takedown
from pipeline.retrieve.tune import Truth, Tuned, fastest, tune
from pipeline.retrieve.versions import BASE_SEGMENT, Version
from pipeline.workspace.hashing import HashedFile
from pipeline.workspace.manifest import ShardRecord, add_counts
from pipeline.workspace.store import LIVE, Artifact

_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True)
class IndexSummary:
    """Rows and metrics of a segment."""

    counts: dict[str, int]
    """Rows: ``in`` = ``ok`` + each kind of row that is left out."""
    metrics: dict[str, Any]
    files: dict[str, dict[str, Any]]
    """Size and SHA-256 of what was written, for the process that commits it."""


@dataclass(frozen=True)
class SegmentBuild:
    """The build of one segment; travels between processes."""

    sources: tuple[Artifact, ...]
    """Artifacts of embed steps; all of one CLIP."""
    output: Artifact
    """The index."""
    config: IndexConfig
    seed: int
    segment: str = BASE_SEGMENT
    """Its folder in the index."""
    num_threads: int = 1
    """Threads of FAISS in each process."""
    on_gpu: bool = False
    """Whether centroids are trained and rows assigned to them on a GPU."""
    earlier: tuple[str, ...] = ()
    """Segments of the same index: their rows are not added again."""
    deleted: str = ""
    """File in the index with the sorted ids of rows to leave out; empty: none."""

    def parts(self) -> list[str]:
        """Names of the parts, in order; each is some consecutive shards."""
        return list(shards_of_parts(self.segment, EmbeddedShards.open(self.sources)))

    def num_rows(self) -> int:
        """Rows of the embeddings."""
        return EmbeddedShards.open(self.sources).num_rows

    def prepare(self) -> None:
        """Choose, sample and train; nothing to do if that is done.

        Raises:
            DataError: If there are no embeddings, or a shard is damaged.
        """
        inputs = [*(source.uri for source in self.sources), *self.earlier, self.deleted, self.takedown().digest]
        embedded, rng = EmbeddedShards.open(self.sources, with_contents=True), np.random.default_rng(self.seed)
        origin = {"inputs": inputs, "embedded": embedded.to_json(workspace_of(self.output))}
        plan = self._live("plan.json")
        if (self.output.find_json(plan) or {}).items() >= origin.items():
            return
        self.clear()  # of a change that was given up, or of a removal that was stopped
        kinds.set_threads(self.num_threads)
        is_alone = len(shards_of_parts(self.segment, embedded)) == 1
        query_rows, are_validation = choose_queries(embedded, self.config.num_recall_queries, rng)
        chosen = kinds_to_try(self.config, embedded.num_rows, embedded.embed_dim)
        listed: list[kinds.Kind] = [kind for kind in chosen if kinds.is_listed(kind)]
        if listed:
            num_lists = choose_num_lists(self.config, embedded.num_rows)
            count = min(self.config.num_train_rows, embedded.num_rows, ROWS_PER_LIST * num_lists + len(query_rows))
            random_rows = choose_sample(embedded.num_rows, count, rng)
            others = np.setdiff1d(random_rows, query_rows)
            sample_rows = others if len(others) >= num_lists else random_rows
            samples = read_rows(embedded, dict.fromkeys(VECTOR_COLUMNS, sample_rows), whole=is_alone)
            for modality in MODALITIES:
                sample = samples[f"z_{modality}"]
                centroids = kinds.train_centroids(
                    sample, min(num_lists, len(sample)), seed=self.seed, on_gpu=self.on_gpu
                )
                for kind in listed:
                    with self.output.write(self._live(f"{modality}.{kind}.faiss")) as path:
                        kinds.write(kinds.train_coder(kind, centroids, sample), path)
        half = len(query_rows) // 2
        # Shuffled, so that each half of the queries holds pictures and captions.
        order = rng.permutation(len(query_rows))
        halves: dict[str, Ids] = dict(zip(VECTOR_COLUMNS, np.split(query_rows, [half]), strict=True))
        queries = read_rows(embedded, halves, whole=is_alone)
        self._write_array("queries", np.concatenate([queries[name] for name in VECTOR_COLUMNS])[order])
        self._write_array("query_rows", query_rows[order])
        queries_of = "validation rows" if are_validation else "rows of any split"
        self.output.write_json(self._live("plan.json"), {"kinds": chosen, "queries_of": queries_of, **origin})

    def add_part(self, name: str) -> ShardRecord:
        """Read the shards of one part, once, and write what the segment needs of them.

        Raises:
            DataError: If a shard is damaged.
        """
        kinds.set_threads(self.num_threads)
        embedded = self._embedded()
        chosen = self.kinds_tried()
        plan = PartPlan(
            chosen,
            {(one, kind): self.read_coder(one, kind) for one in MODALITIES for kind in chosen if kinds.is_listed(kind)},
            np.array(self.read_array("queries")),
            np.array(self.read_array("query_rows")),
            np.load(self.output.path(self.deleted)) if self.deleted else np.zeros(0, np.int64),
            self.takedown(),
            self.on_gpu,
        )
        part = PartWriter(plan, embedded)
        for shard in shards_of_parts(self.segment, embedded)[name]:
            part.add(shard)
        part.write(self.output, name)
        return ShardRecord(shard=name, counts=dict(part.counts), files={})

    def finish(self) -> IndexSummary:
        """Put the parts together, tune, and write the segment's description last."""
        kinds.set_threads(self.num_threads)
        embedded = self._embedded()
        names = list(shards_of_parts(self.segment, embedded))
        records = self.output.shard_records()
        counts = add_counts([records[name].counts for name in names])
        self._join_rows(names)
        rows = Rows(self.output, self.segment, embedded)
        hidden, repeats = self._hide_repeats(rows)
        counts = {**counts, "ok": counts["ok"] - sum(repeats.values()), **repeats}
        description: dict[str, Any] = {
            "embedded": embedded.to_json(workspace_of(self.output)),
            "num_rows": counts["ok"],
            "counts": counts,
            "recall_target": self.config.recall_target,
        }
        with self.output.write(f"{self.segment}/hidden.npy") as path:
            write_array(path, [hidden], hidden.shape, np.int64)
        truth, chosen = self._truth(names, rows), self.kinds_tried()
        tried: dict[Modality, dict[str, Tuned]] = {modality: {} for modality in MODALITIES}
        for modality in MODALITIES:
            for kind in chosen:
                if kind == "hnsw":
                    searcher = self._graph_without(names, modality, truth.own_positions)
                else:
                    self._join_codes(names, modality, kind)
                    searcher = open_searcher(self.output, self.segment, modality, kind)
                able = [tuned.latency_ms for tuned in tried[modality].values() if tuned.reaches_target]
                tried[modality][kind] = tune(
                    searcher, rows, truth, modality, self.config.recall_target, limit_ms=min(able, default=float("inf"))
                )
            best = fastest(list(tried[modality].values()))
            if best.kind == "hnsw":
                self._join_codes(names, modality, best.kind)
            self._remove_others(modality, best.kind)
            description[modality] = {"kind": best.kind, "efforts": [effort.to_json() for effort in best.efforts]}
        self.output.write_json(f"{self.segment}/segment.json", description)
        metrics = _metrics(description, tried, embedded)
        metrics |= {"num_recall_queries": len(truth.queries), "recall_queries": self._plan("queries_of")}
        metrics["kinds_left_out"] = kinds_left_out(self.config, embedded.num_rows, embedded.embed_dim)
        return IndexSummary(counts, metrics, self.output.known())

    def clear(self) -> None:
        """Remove what was written between the stages; a step's commit does this itself.

        The plan goes first: without it the next build begins anew, and does not miss the files that are gone by then.
        """
        self.output.remove(self._live("plan.json"))
        self.output.remove_all([name for name in self.output.names() if name.startswith(f"{LIVE}{self.segment}/")])

    def takedown(self) -> Takedown:
        """Rows that no index of this workspace may have."""
        return Takedown.read(workspace_of(self.output))

    def _live(self, name: str) -> str:
        return f"{LIVE}{self.segment}/{name}"

    def _embedded(self) -> EmbeddedShards:
        """The embeddings as the first stage opened them, so that no part reads the records of all shards again."""
        return EmbeddedShards.from_json(self._plan("embedded"), workspace_of(self.output))

    def kinds_tried(self) -> list[kinds.Kind]:
        """The kinds that the first stage chose."""
        return self._plan("kinds")

    def _plan(self, name: str) -> Any:
        """What the first stage wrote down."""
        return self.output.read_json(self._live("plan.json"))[name]

    def _write_array(self, name: str, values: NDArray[Any]) -> None:
        with self.output.write(self._live(f"{name}.npy")) as path:
            write_array(path, [values], values.shape, values.dtype)

    def read_array(self, name: str) -> NDArray[Any]:
        """An array that a stage wrote, memory-mapped."""
        return np.load(self.output.path(self._live(f"{name}.npy")), mmap_mode="r").view(np.ndarray)

    def read_coder(self, modality: Modality, kind: kinds.Kind) -> Any:
        """The trained index of a kind with lists, without rows."""
        return kinds.read(self.output.path(self._live(f"{modality}.{kind}.faiss")))

    def _join_rows(self, names: Sequence[str]) -> None:
        readers: list[Any] = [
            pa.ipc.open_file(pa.memory_map(str(self.output.path(f"{name}.rows.arrow")))) for name in names
        ]
        with self.output.write(f"{self.segment}/rows.arrow") as path:
            batches = (reader.get_batch(i) for reader in readers for i in range(reader.num_record_batches))
            write_rows(path, batches, readers[0].schema)
        for array, width in (("ids", ()), ("places", ()), ("groups", (4,))):
            parts = [self._load(name, array) for name in names]
            with self.output.write(f"{self.segment}/{array}.npy") as path:
                write_array(path, parts, (sum(map(len, parts)), *width), np.int64)
        ids = np.load(self.output.path(f"{self.segment}/ids.npy"), mmap_mode="r").view(np.ndarray)
        with self.output.write(f"{self.segment}/order.npy") as path:
            write_array(path, sorted_positions(ids), ids.shape, np.int64)

    def _load(self, part: str, array: str) -> NDArray[Any]:
        return np.load(self.output.path(f"{part}.{array}.npy"), mmap_mode="r").view(np.ndarray)

    def _hide_repeats(self, rows: Rows) -> tuple[Ids, dict[str, int]]:
        """Positions of rows that no search returns, and how many there are of each kind."""
        counts, hidden = Counter[str](), list[Ids]()
        order = np.load(self.output.path(f"{self.segment}/order.npy"), mmap_mode="r").view(np.ndarray)
        for repeats, firsts in repeated_positions(rows.ids, order):
            uids = [rows.columns(positions, ["uid"]).column("uid").to_pylist() for positions in (repeats, firsts)]
            same = sum(one == other for one, other in zip(*uids, strict=True))
            counts.update({"duplicate_uid": same, "id_collision": len(repeats) - same})
            hidden.append(repeats)
        for segment in self.earlier:
            embedded = EmbeddedShards.from_json(
                self.output.read_json(f"{segment}/segment.json")["embedded"], workspace_of(self.output)
            )
            before = Rows(self.output, segment, embedded)  # with its deleted rows
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                part = np.asarray(rows.ids[start : start + _ROWS_AT_ONCE])
                hidden.append(np.flatnonzero(before.positions(part) >= 0) + start)
        all_hidden = np.unique(np.concatenate([np.zeros(0, np.int64), *hidden]))
        earlier = len(all_hidden) - counts.total()
        counts.update({"already_indexed": earlier} if earlier > 0 else {})
        return all_hidden, {name: count for name, count in counts.items() if count}

    def _truth(self, names: Sequence[str], rows: Rows) -> Truth:
        scores, positions = dict[Modality, Floats](), dict[Modality, Ids]()
        for modality in MODALITIES:
            parts = [
                (self._load(name, f"{modality}.nearest"), self._load(name, f"{modality}.nearest_places"))
                for name in names
            ]
            near, places = functools.reduce(nearer, parts)
            scores[modality] = near
            positions[modality] = rows.positions_of_places(places.reshape(-1)).reshape(places.shape)
        own = rows.positions_of_places(np.asarray(self.read_array("query_rows")))
        return Truth(np.array(self.read_array("queries")), own, scores, positions)

    def _join_codes(self, names: Sequence[str], modality: Modality, kind: kinds.Kind) -> None:
        """Write the index of one kind: the codes of each list from every part, side by side."""
        parts = [self._load(name, f"{modality}.{code_name(kind)}") for name in names]
        if kinds.is_exact(kind):
            index = self._exact(kind, parts)
        else:
            index = self.read_coder(modality, kind)
            sizes = np.stack([self._load(name, f"{modality}.sizes") for name in names])
            positions = [self._load(name, f"{modality}.positions") for name in names]
            with self.output.write(lists_file(self.segment, modality, kind)) as path, HashedFile(path) as file:
                for block in kinds.list_blocks(parts, positions, sizes):
                    file.write(block)
            with self.output.write(sizes_file(self.segment, modality, kind)) as path:
                write_array(path, [sizes.sum(axis=0)], sizes.shape[1:], np.int64)
            kinds.search_lists_by_graph(index)
        with self.output.write(index_file(self.segment, modality, kind)) as path:
            kinds.write(index, path)

    def _exact(self, kind: kinds.Kind, parts: Sequence[NDArray[np.float32]]) -> Any:
        """An index that holds the vectors of some parts themselves."""
        index = kinds.new_exact(kind, parts[0].shape[1])
        kinds.set_threads(1 if kind == "hnsw" else self.num_threads)  # a graph depends on the order
        for part in parts:
            index.add(np.ascontiguousarray(part))
        kinds.set_threads(self.num_threads)
        return index

    def _graph_without(self, names: Sequence[str], modality: Modality, queries: Ids) -> kinds.Searcher:
        """A graph of all rows but a few.

        The queries are rows, and a graph leads to the neighbours of its own nodes sooner than to those of a new query.
        """
        parts = [self._load(name, f"{modality}.vectors") for name in names]
        starts = np.cumsum([0, *map(len, parts)])
        others = np.setdiff1d(np.arange(starts[-1]), queries)
        if len(others) < len(queries):  # hardly any other rows: a graph of them would say nothing
            others = np.arange(starts[-1])
        cuts = np.searchsorted(others, starts)
        rows = [
            part[others[cut:end] - start]
            for part, start, cut, end in zip(parts, starts.tolist(), cuts.tolist(), cuts[1:].tolist(), strict=False)
        ]
        return kinds.Searcher("hnsw", self._exact("hnsw", rows), others)

    def _remove_others(self, modality: Modality, kind: kinds.Kind) -> None:
        start = f"{self.segment}/{modality}."
        names = [name for name in self.output.names() if name.startswith(start)]
        self.output.remove_all([name for name in names if not name.startswith(f"{start}{kind}.")])


def build_index(
    embed: Artifact,
    output: Artifact,
    config: IndexConfig,
    *,
    seed: int,
    num_threads: int = 1,
    on_rows: Callable[[int, int], None] = lambda _done, _total: None,
) -> IndexSummary:
    """Build an index of one segment in this process.

    Args:
        embed: The embeddings.
        output: The artifact to write.
        config: The recipe's section.
        seed: Seed of the training sample, the lists and the queries of the measurement.
        num_threads: Threads of FAISS.
        on_rows: Called with the number of rows added and of all rows.

    Raises:
        DataError: If there are no embeddings, or a shard is damaged.
    """
    build = SegmentBuild((embed,), output, config, seed, num_threads=num_threads)
    build.prepare()
    records, num_rows = output.shard_records(), EmbeddedShards.open(build.sources).num_rows
    done = 0
    for name in build.parts():
        if name not in records:
            records[name] = build.add_part(name)
            output.commit_shard(records[name])
        done += records[name].counts["in"]
        on_rows(done, num_rows)
    summary = build.finish()
    Version(0, (BASE_SEGMENT,), "").write(output)
    build.clear()
    return summary


def _metrics(
    description: dict[str, Any], tried: dict[Modality, dict[str, Tuned]], embedded: EmbeddedShards
) -> dict[str, Any]:
    """What stands in the manifest: recall, latency, memory, and the curve of every kind that was tried."""
    metrics: dict[str, Any] = {"num_rows": description["num_rows"], "recall_target": description["recall_target"]}
    for modality in MODALITIES:
        kind = description[modality]["kind"]
        best = tried[modality][kind]
        metrics[f"{modality}_kind"] = kind
        metrics[f"{modality}_latency_ms"] = best.latency_ms
        metrics[f"{modality}_memory_bytes"] = embedded.num_rows * kinds.row_bytes(kind, embedded.embed_dim)
        for effort in best.efforts if best.curve else ():  # else nothing was measured
            metrics[f"{modality}_recall_at_{effort.k}"] = round(effort.recall, 4)
        metrics[f"{modality}_tried"] = {name: tuned.to_json() for name, tuned in tried[modality].items()}
    metrics["reaches_recall_target"] = all(
        tried[modality][description[modality]["kind"]].reaches_target for modality in MODALITIES
    )
    return metrics
