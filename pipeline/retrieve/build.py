"""The index step: builds a FAISS index over z_image and one over z_text, and measures their recall.

The search effort is the smallest that reaches the requested recall, measured against exact search with pictures and
texts of the data as queries. FAISS is trained on a random sample of the rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.vectors import to_unit
from pipeline.recipe.sections import IndexConfig
from pipeline.retrieve.exact import EmbeddedShards, Floats, Ids, recall, true_neighbours
from pipeline.workspace.store import Artifact

Kind = Literal["flat", "ivf_flat", "ivf_sq8", "hnsw"]
Modality = Literal["image", "text"]
MODALITIES: tuple[Modality, ...] = ("image", "text")
ROW_COLUMNS = ("uid", "key", "shard", "url", "caption", "split")
RECALL_AT = 10

_FLAT_BELOW_ROWS = 20_000
_HNSW_LINKS = 32
_HNSW_BUILD_EFFORT = 80
_HNSW_EFFORTS = (16, 32, 64, 128, 256, 512, 1024)
_MIN_ROWS_PER_LIST = 39  # with fewer, FAISS warns that the training sample is too small
_WRITE_BYTES = 1 << 20
_CANDIDATES = {"ivf_sq8": 4}  # candidates per neighbour that a quantised index returns for re-ranking


@dataclass(frozen=True)
class IndexSummary:
    """Size and metrics of an index."""

    num_rows: int
    metrics: dict[str, Any]


def build_index(
    embed: Artifact,
    output: Artifact,
    config: IndexConfig,
    *,
    seed: int,
    num_threads: int = 1,
    on_rows: Callable[[int, int], None] = lambda _done, _total: None,
) -> IndexSummary:
    """Write ``image.faiss``, ``text.faiss``, ``rows.parquet`` and ``index.json``.

    Args:
        embed: The embeddings.
        output: The artifact to write.
        config: The recipe's section.
        seed: Seed of the training sample, the lists and the queries of the measurement.
        num_threads: Threads of FAISS. The same number gives the same bytes (rounding decides for rows between two
            lists); HNSW always uses one, because its graph depends on the order.
        on_rows: Called with the number of rows added and of all rows.

    Raises:
        DataError: If there are no embeddings, or a shard is damaged.
    """
    shards = EmbeddedShards.open(embed)
    kind = choose_kind(config.kind, shards.num_rows)
    faiss.omp_set_num_threads(1 if kind == "hnsw" else num_threads)
    rng = np.random.default_rng(seed)
    num_train = min(config.num_train_rows, shards.num_rows)
    sample = _choose(rng, shards.num_rows, 0 if kind in {"flat", "hnsw"} else num_train)
    query_rows = _choose(rng, shards.num_rows, min(config.num_recall_queries, shards.num_rows))
    indices: dict[Modality, Any] = {modality: _empty(kind, shards, num_train, seed) for modality in MODALITIES}
    if len(sample):
        for modality, index in indices.items():
            index.train(_gather(shards, sample, f"z_{modality}"))
    with output.write("rows.parquet") as path:
        _fill(indices, shards, path, on_rows)
    # Half the queries are pictures and half are texts, as users send both, and their embeddings are far apart.
    half = len(query_rows) // 2
    queries = np.concatenate(
        [_gather(shards, query_rows[:half], "z_image"), _gather(shards, query_rows[half:], "z_text")]
    )
    description: dict[str, Any] = {
        "kind": kind,
        "embed_dim": shards.embed_dim,
        "num_rows": shards.num_rows,
        "candidates_per_result": _CANDIDATES.get(kind, 1),
        "recall_target": config.recall_target,
        "num_recall_queries": len(query_rows),
    }
    k = min(RECALL_AT, shards.num_rows)
    for modality, index in indices.items():
        true = true_neighbours(shards, queries, f"z_{modality}", k)
        effort, recall_at_k = tune(index, kind, queries, true, k, config.recall_target)
        description[modality] = {"effort": effort, "recall_at_10": round(recall_at_k, 4)}
        # A Python file notices a full disk when it is closed; FAISS's own writer does not.
        with output.write(f"{modality}.faiss") as path, path.open("wb") as file:
            writer: Any = getattr(faiss, "PyCallbackIOWriter")  # noqa: B009  (faiss has no type for it)
            faiss.write_index(index, writer(file.write, _WRITE_BYTES))
    output.write_json("index.json", description)
    return IndexSummary(shards.num_rows, _metrics(description))


def choose_kind(kind: Literal["auto", "flat", "ivf_flat", "ivf_sq8", "hnsw"], num_rows: int) -> Kind:
    """Resolve ``auto``: exact search below 20,000 rows, where it takes less than 5 ms, else quantised lists."""
    if kind != "auto":
        return kind
    return "flat" if num_rows < _FLAT_BELOW_ROWS else "ivf_sq8"


def set_effort(index: Any, kind: str, effort: int) -> None:
    """Set the search effort of an index: the lists to visit (ivf) or the candidate nodes (hnsw); flat has none."""
    if kind.startswith("ivf"):
        index.nprobe = effort
    elif kind == "hnsw":
        index.hnsw.efSearch = effort


def tune(index: Any, kind: Kind, queries: Floats, true: list[set[int]], k: int, target: float) -> tuple[int, float]:
    """Set the smallest effort whose recall at K reaches the target, else the largest; returns effort and recall."""
    num_candidates = k * _CANDIDATES.get(kind, 1)
    effort, recall_at_k = 0, 0.0
    for effort in _efforts(index, kind):
        set_effort(index, kind, effort)
        _, candidates = index.search(queries, num_candidates)
        recall_at_k = recall(candidates, true, k)
        if recall_at_k >= target:
            break
    return effort, recall_at_k


def _efforts(index: Any, kind: Kind) -> list[int]:
    if kind == "flat":
        return [0]
    if kind == "hnsw":
        return list(_HNSW_EFFORTS)
    doublings = [2**power for power in range(int(index.nlist).bit_length()) if 2**power < index.nlist]
    return [*doublings, int(index.nlist)]


def _empty(kind: Kind, shards: EmbeddedShards, num_train: int, seed: int) -> Any:
    width, metric = shards.embed_dim, faiss.METRIC_INNER_PRODUCT
    if kind == "flat":
        return faiss.IndexFlatIP(width)
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, _HNSW_LINKS, metric)
        index.hnsw.efConstruction = _HNSW_BUILD_EFFORT
        return index
    num_lists = max(1, min(round(4 * shards.num_rows**0.5), num_train // _MIN_ROWS_PER_LIST))
    quantizer = faiss.IndexFlatIP(width)
    if kind == "ivf_flat":
        index = faiss.IndexIVFFlat(quantizer, width, num_lists, metric)
    else:
        index = faiss.IndexIVFScalarQuantizer(quantizer, width, num_lists, faiss.ScalarQuantizer.QT_8bit, metric)
    index.cp.seed = seed + 1
    return index


def _fill(
    indices: dict[Modality, Any], shards: EmbeddedShards, path: Path, on_rows: Callable[[int, int], None]
) -> None:
    with pq.ParquetWriter(path, pa.schema([(name, pa.string()) for name in ROW_COLUMNS])) as writer:
        for name, start, vectors in shards:
            for modality, index in indices.items():
                index.add(to_unit(getattr(vectors, f"z_{modality}")))
            table = vectors.table.append_column("shard", pa.array([name] * vectors.table.num_rows, pa.string()))
            writer.write_table(table.select(list(ROW_COLUMNS)))
            on_rows(start + vectors.table.num_rows, shards.num_rows)


def _gather(shards: EmbeddedShards, ids: Ids, column: str) -> Floats:
    """Read the vectors of sorted row numbers in one pass over the shards."""
    parts: list[Floats] = [np.zeros((0, shards.embed_dim), np.float32)]
    for _, start, vectors in shards:
        rows = getattr(vectors, column)
        first, last = np.searchsorted(ids, [start, start + len(rows)])
        parts.append(to_unit(rows[ids[first:last] - start]))
    return np.concatenate(parts)


def _choose(rng: np.random.Generator, num_rows: int, count: int) -> Ids:
    return np.sort(rng.choice(num_rows, count, replace=False))


def _metrics(description: dict[str, Any]) -> dict[str, Any]:
    metrics: dict[str, Any] = {"kind": description["kind"], "num_rows": description["num_rows"]}
    for modality in MODALITIES:
        metrics[f"{modality}_recall_at_10"] = description[modality]["recall_at_10"]
        metrics[f"{modality}_effort"] = description[modality]["effort"]
    lowest = min(description[modality]["recall_at_10"] for modality in MODALITIES)
    metrics["reaches_recall_target"] = lowest >= description["recall_target"]
    return metrics
