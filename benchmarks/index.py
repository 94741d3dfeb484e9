"""The neighbour index against autofaiss's default, against bare FAISS, and at sizes up to millions of rows.

    python -m benchmarks.index --target 0.99 --threads 1 --autofaiss PYTHON    # an interpreter that has autofaiss
    python -m benchmarks.index --rows 200000 --dim 128    # recall at 10, 100 and 1,000 neighbours, without autofaiss
    python -m benchmarks.index --memory 1000000 5000000 --dim 64 --train-rows 40000 --queries 60    # bytes a row

Rows are synthetic: points around centres, as CLIP's embeddings are, with z_text apart from z_image. The queries are not
in the index. Both indices are searched in one process by the same FAISS, warm, in turn, with the same threads. Ours is
one of two that a build makes, so its build is half of that. autofaiss has no recall target, but takes what its clock
allows, so its graph is also searched with the least effort that reaches ours. Times stand twice: by the clock, and of
the processor, which other programs change less. Ratios are of one run. Recall is that of queries which the build has
not seen, over the recall target; floor 1. Bytes a row are those of the smallest kind (RaBitQ) and one modality, beside
the count by which `memory_gb` chooses a kind, and by which 100M rows of width 768 take 11 GB; floor: less than 20.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.side_by_side import publish
from pipeline.data.rows import embeddings_schema, make_uid
from pipeline.data.vectors import ROW_GROUP_ROWS, WRITER_OPTIONS, to_arrow
from pipeline.recipe.sections import IndexConfig
from pipeline.retrieve import NeighbourIndex, kinds
from pipeline.retrieve.build import build_index
from pipeline.retrieve.efforts import Effort, effort_for
from pipeline.retrieve.segment import open_searcher
from pipeline.retrieve.versions import BASE_SEGMENT
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact, Workspace

Floats = NDArray[np.float32]

_ROWS_PER_SHARD = 10_000
_K = (10, 100, 1000)
_IN_TURN = 20  # queries of one program, before those of the next
_AUTOFAISS = """
import json, sys, time
import faiss
from autofaiss import build_index
folder, path, threads = sys.argv[1:]
start, cpu = time.perf_counter(), time.process_time()
index, infos = build_index(embeddings=folder, save_on_disk=False, nb_cores=int(threads), verbose=40)
build_s, build_cpu_s = time.perf_counter() - start, time.process_time() - cpu
faiss.write_index(index, path)
print(json.dumps({"build_s": build_s, "build_cpu_s": build_cpu_s, "kind": str(infos.get("index_key"))}))
"""


def main() -> None:
    """Parse the arguments, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--target", type=float, default=0.95, help="recall target")
    parser.add_argument("--kind", default="auto")
    parser.add_argument("--train-rows", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--autofaiss", default="", help="interpreter of an environment with autofaiss")
    parser.add_argument("--memory", type=int, nargs="+", metavar="ROWS", help="only the memory of so many rows")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    if args.memory:
        publish("index_memory", [measure_memory(num_rows, args) for num_rows in args.memory], {"threads": args.threads})
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Workspace(folder), args)
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n")
    if args.autofaiss:
        publish("index", comparison(result), {"measured": result})
    else:
        publish("index_recall", recall_rows(result), {"measured": result})


def comparison(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of ours beside autofaiss's, from all that was measured."""
    theirs, table = result["autofaiss"], list[tuple[str, float, float, float | None]]()
    for name in ("clock", "processor"):
        times = result[f"searches_ms_by_{name}"]
        table += [
            (f"a query, ids and similarities, ms by the {name}", times["ours"], times["autofaiss"], 20),
            (
                f"a query, with the rows' columns, ms by the {name}",
                times["ours_with_columns"],
                times["autofaiss"],
                None,
            ),
        ]
        if "autofaiss_at_target" in times:
            at_target = f"a query, autofaiss's graph at the recall target, ms by the {name}"
            table.append((at_target, times["ours"], times["autofaiss_at_target"], None))
    table.append(("a build, s by the clock", result["build_s"] / 2, theirs["build_s"], 3))
    table.append(("a build, s of the processor", result["build_cpu_s"] / 2, theirs["build_cpu_s"], 3))
    rows: list[dict[str, Any]] = [
        {"what": what, "ours": one, "autofaiss": other, "ratio": other / one, "floor": floor}
        for what, one, other, floor in table
    ]
    recall = {"what": "recall at 10", "ours": result["recall_of_new_queries"]["10"], "autofaiss": theirs["recall"]}
    return [*rows, recall | {"ratio": None, "floor": 0.99}]


def recall_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of recalls and times for each number of neighbours."""
    return [
        {
            "rows": f"{result['rows']:,} x {result['dim']}",
            "k": k,
            "recall": result["recall_of_new_queries"][str(k)],
            "target": result["recall_target"],
            "over_target": result["recall_over_target"][str(k)],
            "floor": 1.0,
            "ms": result["search_ms"][str(k)],
        }
        for k in _K
    ]


def measure(workspace: Workspace, args: argparse.Namespace) -> dict[str, Any]:
    """Build one index of synthetic rows and measure it."""
    embed, output = workspace.artifact("embed", "e"), workspace.artifact("index", "i")
    centres = np.random.default_rng(1).normal(size=(max(100, args.rows // 50), args.dim)).astype(np.float32)
    write_rows(embed, centres, args.rows)
    queries = rows_around(centres, np.random.default_rng(2), 200)[0]
    config = IndexConfig(
        kind=args.kind,
        recall_target=args.target,
        num_train_rows=args.train_rows,
        num_recall_queries=args.queries,
    )
    kinds.set_threads(args.threads)
    before_mb, start, cpu = _peak_mb(), time.perf_counter(), time.process_time()
    summary = build_index(embed, output, config, seed=0, num_threads=args.threads)
    build_s, build_cpu_s, peak_mb = time.perf_counter() - start, time.process_time() - cpu, _peak_mb()
    start = time.perf_counter()
    index = NeighbourIndex.open(output)
    open_s = time.perf_counter() - start
    segment = output.read_json(f"{BASE_SEGMENT}/segment.json")
    result: dict[str, Any] = {
        "rows": args.rows,
        "dim": args.dim,
        "recall_target": args.target,
        "threads": args.threads,
        "build_s": build_s,
        "build_cpu_s": build_cpu_s,
        "build_peak_mb_over_start": peak_mb - before_mb,
        "open_s": open_s,
        "index_bytes_per_row": {
            modality: _size(output, f"{BASE_SEGMENT}/{modality}.") / args.rows for modality in ("image", "text")
        },
        "rows_bytes_per_row": _size(output, BASE_SEGMENT) / args.rows
        - sum(_size(output, f"{BASE_SEGMENT}/{modality}.") / args.rows for modality in ("image", "text")),
        "kinds": {modality: segment[modality]["kind"] for modality in ("image", "text")},
        "efforts": segment["image"]["efforts"],
        "reaches_recall_target": summary.metrics["reaches_recall_target"],
        "tried_ms": {kind: tuned["latency_ms"] for kind, tuned in summary.metrics["image_tried"].items()},
    }
    result["search_ms"] = {str(k): _median_ms(queries, lambda query, k=k: index.find(query, k)) for k in _K}
    result["recall_of_new_queries"] = _recalls(embed, index, queries)
    result["recall_over_target"] = {k: value / args.target for k, value in result["recall_of_new_queries"].items()}
    theirs, their_index = _autofaiss(workspace, embed, queries, args) if args.autofaiss else ({}, None)
    for name, clock in (("clock", time.perf_counter), ("processor", time.thread_time)):
        searches = _searches_ms(output, index, queries, their_index, clock, theirs.get("effort_at_target", 0))
        result[f"searches_ms_by_{name}"] = searches
        if theirs:
            result[f"query_ratio_by_{name}"] = searches["autofaiss"] / searches["ours"]
            result[f"query_ratio_with_columns_by_{name}"] = searches["autofaiss"] / searches["ours_with_columns"]
    if theirs:
        result["autofaiss"] = theirs
        result["build_ratio_by_clock"] = theirs["build_s"] / (build_s / 2)
        result["build_ratio_by_processor"] = theirs["build_cpu_s"] / (build_cpu_s / 2)
    return result


def measure_memory(num_rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """Memory and disk of an index with one bit a feature, and of its build."""
    kind, width = "ivf_rabitq", args.dim
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(folder)
        embed, output = workspace.artifact("embed", "e"), workspace.artifact("index", "i")
        centres = np.random.default_rng(1).normal(size=(num_rows // 50, width)).astype(np.float32)
        write_rows(embed, centres, num_rows)
        config = IndexConfig(kind=kind, num_train_rows=args.train_rows, num_recall_queries=args.queries)
        kinds.set_threads(args.threads)
        Path("/proc/self/clear_refs").write_text("5")  # the peak of this process begins anew (Linux: proc(5))
        before_mb = _peak_mb()
        build_index(embed, output, config, seed=0, num_threads=args.threads)
        measured, counted = _size(output, f"{BASE_SEGMENT}/image.") / num_rows, kinds.row_bytes(kind, width)
        return {
            "rows": f"{num_rows:,} x {width}",
            "bytes_a_row": measured,
            "counted": counted,
            "of_counted": measured / counted,
            "build_peak_mb_over_start": _peak_mb() - before_mb,
            "gb_for_100M_x_768": 100e6 * kinds.row_bytes(kind, 768) * measured / counted / 1e9,
            "below": 20.0,
        }


def _searches_ms(
    output: Artifact,
    index: NeighbourIndex,
    queries: Floats,
    autofaiss: Any,
    clock: Callable[[], float],
    effort_at_target: int,
) -> dict[str, float]:
    """Median ms of searches for 10, in turn.

    FAISS's share of ours (the same index, lists, count); ours with ids and exact similarities; with the columns of the
    rows too; autofaiss's index, with ids and similarities, at its own effort and at the least that reaches the target.
    """
    description = output.read_json(f"{BASE_SEGMENT}/segment.json")["image"]
    searcher = open_searcher(output, BASE_SEGMENT, "image", description["kind"])
    effort, count = effort_for([Effort(**item) for item in description["efforts"]], 10)
    searches: dict[str, Callable[[Floats], Any]] = {
        "faiss": lambda query: searcher.search(query, count, effort),
        "ours": lambda query: index.search(query, 10),
        "ours_with_columns": lambda query: index.find(query, 10),
    }
    if autofaiss is not None:
        searches["autofaiss"] = lambda query: autofaiss.search(query, 10)
        if effort_at_target:
            parameters = kinds.faiss.SearchParametersHNSW(efSearch=effort_at_target)
            searches["autofaiss_at_target"] = lambda query: autofaiss.search(query, 10, params=parameters)
    times: dict[str, list[float]] = {name: [] for name in searches}
    for number, block in enumerate(np.split(queries, len(queries) // _IN_TURN)):
        for name in list(searches)[:: 1 if number % 2 else -1]:
            for query in block:
                start = clock()
                searches[name](query[None])
                times[name].append(clock() - start)
    medians = {name: 1000 * float(np.median(values[_IN_TURN:])) for name, values in times.items()}
    return medians | {"over_faiss": medians["ours_with_columns"] - medians["faiss"]}


def _recalls(embed: Artifact, index: NeighbourIndex, queries: Floats) -> dict[str, float]:
    """Recall of queries that the build has not seen, against all rows."""
    best = np.full((len(queries), max(_K)), -np.inf, np.float32)
    for name in embed.shard_records():
        table = pq.read_table(embed.path(f"{name}.parquet"), columns=["z_image"])
        rows = np.concatenate([chunk.flatten().to_numpy() for chunk in table.column("z_image").chunks])
        rows = rows.reshape(-1, queries.shape[1]).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        both = np.concatenate([best, queries @ rows.T], axis=1)
        best = -np.partition(-both, max(_K) - 1, axis=1)[:, : max(_K)]
    best = -np.sort(-best, axis=1)
    recalls = dict[str, float]()
    for k in _K:
        scores, _ = index.search(queries, k)
        recalls[str(k)] = float((scores >= best[:, k - 1 : k] - 2e-6).sum(axis=1).clip(max=k).mean() / k)
    return recalls


def _autofaiss(
    workspace: Workspace, embed: Artifact, queries: Floats, args: argparse.Namespace
) -> tuple[dict[str, Any], Any]:
    """The default index of autofaiss of the same rows, and its figures."""
    folder = Path(workspace.root) / "npy"
    folder.mkdir()
    rows = list[Any]()
    for name in embed.shard_records():
        table = pq.read_table(embed.path(f"{name}.parquet"), columns=["z_image"])
        rows += [chunk.flatten().to_numpy().reshape(-1, args.dim) for chunk in table.column("z_image").chunks]
    vectors = np.concatenate(rows).astype(np.float32)
    np.save(folder / "0.npy", vectors)
    path = str(folder.parent / "autofaiss.index")
    command = [args.autofaiss, "-c", _AUTOFAISS, str(folder), path, str(args.threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    answer = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.splitlines()[-1]
    )
    index = kinds.read(Path(path))
    true = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]

    def recall(effort: int) -> float:
        parameters = kinds.faiss.SearchParametersHNSW(efSearch=effort) if effort else None
        ids = index.search(queries, 10, params=parameters)[1].tolist()
        return float(np.mean([len(set(one) & set(other)) for one, other in zip(ids, true.tolist(), strict=True)]) / 10)

    answer["recall"] = recall(0)
    if hasattr(index, "hnsw"):
        enough = (effort for effort in (16 << power for power in range(12)) if recall(effort) >= args.target)
        answer |= {"effort": index.hnsw.efSearch, "effort_at_target": next(enough, 0)}
    return answer, index


def write_rows(embed: Artifact, centres: Floats, num_rows: int) -> None:
    """Commit shards of synthetic rows around centres (C, D); one row in fifty is for validation."""
    schema = embeddings_schema(centres.shape[1])
    for shard, start in enumerate(range(0, num_rows, _ROWS_PER_SHARD)):
        count = min(_ROWS_PER_SHARD, num_rows - start)
        z_image, z_text = rows_around(centres, np.random.default_rng([3, shard]), count)
        name, numbers = f"{shard:05d}", range(start, start + count)
        columns: dict[str, Any] = {
            "uid": [make_uid(f"http://a/{i}", "") for i in numbers],
            "key": [f"{name}{i:05d}" for i in range(count)],
            "url": [f"http://host.example/pictures/{i}.jpg" for i in numbers],
            "caption": [f"the caption of picture {i}, of usual length, with some words" for i in numbers],
            "split": ["validation" if i % 50 == 0 else "train" for i in numbers],
            "z_image": to_arrow(z_image),
            "z_text": to_arrow(z_text),
        }
        columns |= {field.name: pa.nulls(count, field.type) for field in schema if field.name not in columns}
        with embed.write(f"{name}.parquet") as path:
            table = pa.table({field.name: columns[field.name] for field in schema}, schema=schema)
            pq.write_table(table, path, row_group_size=ROW_GROUP_ROWS, **WRITER_OPTIONS)
        embed.commit_shard(ShardRecord(shard=name, counts={"in": count, "ok": count}, files={}))


def rows_around(centres: Floats, rng: np.random.Generator, count: int) -> tuple[Floats, Floats]:
    """Points around random centres, and captions of them: a common direction and less noise. Of length one."""
    chosen, width = rng.integers(0, len(centres), count), centres.shape[1]
    noise = rng.normal(size=(2, count, width)).astype(np.float32)
    z_image = centres[chosen] + 0.7 * noise[0]
    z_text = centres[chosen] + 0.5 * noise[1] + 0.8 * np.sign(np.arange(width) % 2 - 0.5).astype(np.float32)
    return tuple((z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32) for z in (z_image, z_text))  # type: ignore[return-value]


def _median_ms(queries: Floats, search: Callable[[Floats], Any]) -> float:
    times = list[float]()
    for query in [*queries[:10], *queries]:
        start = time.perf_counter()
        search(query[None])
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times[10:]))


def _size(output: Artifact, start: str) -> int:
    return sum(output.path(name).stat().st_size for name in output.names() if name.startswith(start))


def _peak_mb() -> float:
    """Peak of this process's resident memory, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")) / 1e6


if __name__ == "__main__":
    main()
