"""Search for the queries of a file, part by part: each part is made alone and gives the same bytes on every machine."""

from collections import Counter
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.retrieve.embedded import Floats
from pipeline.retrieve.queries import QueryEncoder, to_direction
from pipeline.retrieve.query_list import PROBLEM, QUERY_COLUMNS
from pipeline.retrieve.retriever import Results
from pipeline.retrieve.search import Searcher, SearchOptions
from pipeline.workspace.hashing import HashedFile

_BATCH = 256
NEIGHBOUR = pa.struct(
    [
        ("uid", pa.string()),
        ("similarity", pa.float32()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("shard", pa.string()),
        ("key", pa.string()),
    ]
)
"""One result in the answers' column ``neighbours``."""


class PartSearcher:
    """Answers parts of a list of queries.

    Args:
        searcher: The search.
        options: How to search.
        queries: The list, with one row group for each part, see ``query_list``.
        num_threads: Threads of FAISS.

    Raises:
        ConfigError: If the filter is wrong.
    """

    def __init__(self, searcher: Searcher, options: SearchOptions, queries: Path, num_threads: int) -> None:
        faiss.omp_set_num_threads(num_threads)
        self._searcher = searcher
        self._options = options
        self._conditions = searcher.retriever.conditions(options.where, options.distinct)
        self._queries = queries

    def __call__(self, part: int, target: Path) -> Counter[str]:
        """Answer one part.

        Args:
            part: Number of the row group.
            target: Parquet file to write: one row for each query, with its neighbours, the nearest first.

        Returns:
            Numbers of queries: ``in`` = ``ok`` + ``fewer`` (than k neighbours) + ``failed``.

        Raises:
            DataError: If a file of the index is damaged.
        """
        with pq.ParquetFile(self._queries) as parquet:
            queries = parquet.read_row_group(part)
        counts: Counter[str] = Counter({"in": 0, "ok": 0, "fewer": 0, "failed": 0})
        answers = [self._answer(queries.slice(start, _BATCH), counts) for start in range(0, len(queries), _BATCH)]
        shown = queries.drop_columns([name for name in ("embedding", PROBLEM) if name in queries.column_names])
        rows = pa.concat_tables(answers)
        for name in rows.column_names:
            shown = shown.append_column(name, rows.column(name))
        with HashedFile(target) as stream:
            pq.write_table(shown, stream, compression="zstd")
        return counts

    def _answer(self, queries: pa.Table, counts: Counter[str]) -> pa.Table:
        vectors, problems = encode_rows(queries, self._searcher.encoder, self._searcher.retriever.index.embed_dim)
        options, conditions = self._options, self._conditions
        good = [row for row, problem in enumerate(problems) if not problem]
        search = self._searcher.retriever.search
        answers = search(vectors[good], options.k, options.modality, conditions) if good else []
        results: dict[int, Results] = dict(zip(good, answers, strict=True))
        statuses = ["failed" if problem else _status(results[row]) for row, problem in enumerate(problems)]
        counts.update(statuses)
        counts["in"] += len(statuses)
        fields = [field.name for field in NEIGHBOUR]
        neighbours = [
            [{name: getattr(one, name) for name in fields} for one in results[row].neighbours] if row in results else []
            for row in range(len(problems))
        ]
        return pa.table(
            {
                "status": pa.array(statuses, pa.string()),
                "error_message": pa.array([problem or None for problem in problems], pa.string()),
                "neighbours": pa.array(neighbours, pa.list_(NEIGHBOUR)),
            }
        )


def encode_rows(queries: pa.Table, encoder: QueryEncoder, embed_dim: int) -> tuple[Floats, list[str]]:
    """The direction of the sum of what each row holds (text, picture, uid, embedding), and what is wrong with it.

    Returns:
        Vectors (N, D), and for each row a message, or an empty one; the vector of a row with a message means nothing.
    """
    total = np.zeros((len(queries), embed_dim), np.float32)
    problems = [problem or "" for problem in queries.column(PROBLEM).to_pylist()]
    is_empty = np.ones(len(queries), bool)
    for name in (name for name in QUERY_COLUMNS if name in queries.column_names):
        values = queries.column(name).to_pylist()
        rows = [row for row, value in enumerate(values) if value is not None]
        if not rows:
            continue
        is_empty[rows] = False
        vectors, wrong = _encode(name, [values[row] for row in rows], encoder, embed_dim)
        total[rows] += vectors
        for row, problem in zip(rows, wrong, strict=True):
            problems[row] = problems[row] or (f"{name}: {problem}" if problem else "")
    lengths = np.linalg.norm(total, axis=1, keepdims=True)
    for row in np.flatnonzero((lengths[:, 0] < 1e-6) | is_empty):
        problems[row] = problems[row] or "nothing to look for"
    return total / np.maximum(lengths, 1e-12), problems


def _encode(name: str, values: list[Any], encoder: QueryEncoder, embed_dim: int) -> tuple[Floats, list[str]]:
    """Vectors (N, D) of some values of a column, zero where something is wrong with the value, and what that is."""
    if name == "text":
        return encoder.texts(values), [""] * len(values)
    if name == "image":
        return encoder.pictures(values)
    if name == "uid":
        return encoder.rows(values)
    vectors, problems = np.zeros((len(values), embed_dim), np.float32), [""] * len(values)
    for place, value in enumerate(values):
        try:
            vectors[place] = to_direction(value, embed_dim)
        except ValueError as error:
            problems[place] = str(error)
    return vectors, problems


def _status(results: Results) -> str:
    return "ok" if results.end == "enough" else "fewer"
