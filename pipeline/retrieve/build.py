"""The index step: a FAISS index over z_image and one over z_text, with the recall that they reach.

The search effort is the smallest that reaches the recall asked for, measured against exact search on rows of the data,
by picture and by text. Trained on a random sample, not on the first rows.
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
_MIN_ROWS_PER_LIST = 39  # below it FAISS calls the training sample too small
_WRITE_BYTES = 1 << 20
_CANDIDATES = {"ivf_sq8": 4}  # how many times K are taken from a quantised index and re-ranked


@dataclass(frozen=True)
class BuiltIndex:
    """What was built."""

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
) -> BuiltIndex:
    """Write ``image.faiss``, ``text.faiss``, ``rows.parquet`` and ``index.json``.

    Args:
        embed: The embeddings.
        output: The artifact to write.
        config: The recipe's section.
        seed: Seed of the training sample, the lists and the queries of the measurement.
        num_threads: Threads of FAISS. The same number gives the same bytes (rows that lie between two lists fall by
            rounding); HNSW is always built by one, since its graph depends on the order.
        on_rows: Called with rows added and rows in all.

    Raises:
        DataError: If there are no embeddings, or a shard is damaged.
    """
    shards = EmbeddedShards.open(embed)
    kind = choose_kind(config.kind, shards.num_rows)
    faiss.omp_set_num_threads(1 if kind == "hnsw" else num_threads)
    rng = np.random.default_rng(seed)
    num_train = min(config.num_train_rows, shards.num_rows)
    sample = _choose(rng, shards.num_rows, 0 if kind in {"flat", "hnsw"} else num_train)
    asked = _choose(rng, shards.num_rows, min(config.num_recall_queries, shards.num_rows))
    indices: dict[Modality, Any] = {modality: _empty(kind, shards, num_train, seed) for modality in MODALITIES}
    if len(sample):
        for modality, index in indices.items():
            index.train(_gather(shards, sample, f"z_{modality}"))
    with output.write("rows.parquet") as path:
        _fill(indices, shards, path, on_rows)
    # Half the queries are pictures and half are texts: both come, and texts lie apart from the pictures.
    half = len(asked) // 2
    queries = np.concatenate([_gather(shards, asked[:half], "z_image"), _gather(shards, asked[half:], "z_text")])
    description: dict[str, Any] = {
        "kind": kind,
        "embed_dim": shards.embed_dim,
        "num_rows": shards.num_rows,
        "candidates_per_result": _CANDIDATES.get(kind, 1),
        "recall_target": config.recall_target,
        "num_recall_queries": len(asked),
    }
    k = min(RECALL_AT, shards.num_rows)
    for modality, index in indices.items():
        true = true_neighbours(shards, queries, f"z_{modality}", k)
        effort, reached = tune(index, kind, queries, true, k, config.recall_target)
        description[modality] = {"effort": effort, "recall_at_10": round(reached, 4)}
        # Through Python's own file: FAISS's writer does not notice a disk that fills while it closes.
        with output.write(f"{modality}.faiss") as path, path.open("wb") as file:
            writer: Any = getattr(faiss, "PyCallbackIOWriter")  # noqa: B009  (faiss has no type for it)
            faiss.write_index(index, writer(file.write, _WRITE_BYTES))
    output.write_json("index.json", description)
    return BuiltIndex(shards.num_rows, _metrics(description))


def choose_kind(asked: Literal["auto", "flat", "ivf_flat", "ivf_sq8", "hnsw"], num_rows: int) -> Kind:
    """Resolve ``auto``: exact while that is quick (under 5 ms at 20,000 rows), quantised lists above."""
    if asked != "auto":
        return asked
    return "flat" if num_rows < _FLAT_BELOW_ROWS else "ivf_sq8"


def set_effort(index: Any, kind: str, effort: int) -> None:
    """Set how hard an index looks: lists visited (ivf) or nodes kept (hnsw); flat has no such number."""
    if kind.startswith("ivf"):
        index.nprobe = effort
    elif kind == "hnsw":
        index.hnsw.efSearch = effort


def tune(index: Any, kind: Kind, queries: Floats, true: list[set[int]], k: int, target: float) -> tuple[int, float]:
    """The smallest effort whose recall at K reaches the target, else the largest, and that recall."""
    num_candidates = k * _CANDIDATES.get(kind, 1)
    effort, reached = 0, 0.0
    for effort in _efforts(index, kind):
        set_effort(index, kind, effort)
        _, found = index.search(queries, num_candidates)
        reached = recall(found, true, k)
        if reached >= target:
            break
    return effort, reached


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
    """Vectors of sorted row numbers, in one pass over the shards."""
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
