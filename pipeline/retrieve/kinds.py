"""The kinds of index: how the rows are coded, stored and searched. Each is one of FAISS's.

    flat         every vector as float32; every row is compared, exactly
    ivf_sq8      lists of rows around centroids; 8 bits a feature, re-ranked with the exact vectors
    ivf_rabitq   the same with 1 bit a feature (RaBitQ, arXiv:2405.12497), re-ranked with the exact vectors
    hnsw         a graph of float32 vectors

Rows are coded apart, in any process, and put together later: the codes of a list lie side by side in one file, which is
memory-mapped, so that building and opening an index of any size needs little memory.

Legend: N rows, Q queries, D features, L lists.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

from pipeline.retrieve.embedded import Floats, Ids
from pipeline.workspace.hashing import HashedFile

faiss: Any = _faiss  # its types are incomplete

Kind = Literal["flat", "ivf_sq8", "ivf_rabitq", "hnsw"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Codes = NDArray[np.uint8]

_HNSW_LINKS = 32
_HNSW_BUILD_EFFORT = 80
_ID_BYTES = 8
_ALIGNMENT = 8  # rows of a list are padded to a multiple of it, so that the ids behind the codes are aligned
_KMEANS_ROUNDS, _LAST_ROUNDS = 6, 2
_TWO_LEVELS_FROM_LISTS = 256
_QUANTISER_ROWS = 16_384  # the range of each feature is learned from this many
_GRAPH_ABOVE_LISTS = 4096  # with more lists, their centroids are searched by a graph

_MAX_CANDIDATES = 16_384
_CACHED_PARAMETERS = 1024


@dataclass(frozen=True)
class Lists:
    """The shape of the lists of an index."""

    sizes: Ids
    """(L,) rows of each list."""
    code_bytes: int

    @property
    def capacities(self) -> Ids:
        """(L,) rows that each list has room for."""
        return -(-self.sizes // _ALIGNMENT) * _ALIGNMENT

    @property
    def starts(self) -> Ids:
        """(L + 1,) place of each list in the file, in bytes, and the size of the file."""
        return np.concatenate([[0], np.cumsum(self.capacities * (self.code_bytes + _ID_BYTES))]).astype(np.int64)


def is_listed(kind: Kind) -> bool:
    """Whether the rows are in lists around centroids."""
    return kind.startswith("ivf")


def is_exact(kind: Kind) -> bool:
    """Whether the index holds the vectors themselves."""
    return not is_listed(kind)


def row_bytes(kind: Kind, embed_dim: int) -> int:
    """Memory of a row, in bytes, without its columns, which stay on the disk."""
    sizes = {
        "flat": 4 * embed_dim,
        "ivf_sq8": embed_dim + _ID_BYTES,
        "ivf_rabitq": -(-embed_dim // 8) + 8 + _ID_BYTES,
        "hnsw": 4 * embed_dim + 2 * 4 * _HNSW_LINKS + 16,
    }
    return sizes[kind]


def train_centroids(sample: Floats, num_lists: int, *, seed: int, on_gpu: bool) -> Floats:
    """The centroids (L, D) of k-means on a sample of rows, compared by inner product.

    Many are trained on two levels: the sample is divided into about sqrt(L) groups, each group is clustered for itself,
    and two last rounds compare all rows with all centroids. They take most of the time.
    """
    cluster = functools.partial(_kmeans, seed=seed, on_gpu=on_gpu)
    if num_lists < _TWO_LEVELS_FROM_LISTS:
        return cluster(sample, num_lists, rounds=_KMEANS_ROUNDS)
    groups = cluster(sample, round(num_lists**0.5), rounds=_KMEANS_ROUNDS)
    group_of = nearest(sample, groups, 1)[1][:, 0]
    # The first k L / N lists belong to the first k rows, in order of group: each group gets its share, and all are L.
    ends = np.cumsum(np.bincount(group_of, minlength=len(groups))) * num_lists // len(sample)
    parts = [
        cluster(sample[group_of == group], count, rounds=_KMEANS_ROUNDS)
        for group, count in enumerate(np.diff(ends, prepend=0).tolist())
        if count
    ]
    return cluster(sample, num_lists, rounds=_LAST_ROUNDS, start=np.concatenate(parts))


def _kmeans(rows: Floats, count: int, *, rounds: int, seed: int, on_gpu: bool, start: Floats | None = None) -> Floats:
    clustering = faiss.Clustering(rows.shape[1], count)
    clustering.niter = rounds
    clustering.seed = seed + 1
    clustering.spherical = True
    clustering.min_points_per_centroid = 1
    clustering.max_points_per_centroid = len(rows)
    if start is not None:
        faiss.copy_array_to_vector(start.reshape(-1), clustering.centroids)
    clustering.train(np.ascontiguousarray(rows), _maybe_on_gpu(faiss.IndexFlatIP(rows.shape[1]), on_gpu))
    return faiss.vector_to_array(clustering.centroids).reshape(count, rows.shape[1])


def train_coder(kind: Kind, centroids: Floats, sample: Floats) -> Any:
    """An empty FAISS index of a kind with lists, its quantiser trained on the sample."""
    width, metric = sample.shape[1], faiss.METRIC_INNER_PRODUCT
    quantizer = faiss.IndexFlatIP(width)
    quantizer.add(centroids)
    if kind == "ivf_sq8":
        index = faiss.IndexIVFScalarQuantizer(quantizer, width, len(centroids), faiss.ScalarQuantizer.QT_8bit, metric)
    else:
        index = faiss.IndexIVFRaBitQ(quantizer, width, len(centroids), metric)
    quantizer.this.disown()
    index.own_fields = True
    index.train(np.ascontiguousarray(sample[:: -(-len(sample) // _QUANTISER_ROWS)]))
    return index


def assigner(coder: Any, *, on_gpu: bool) -> Callable[[Floats], Ids]:
    """A function that gives the list of each vector: (N, D) -> (N,)."""
    quantizer = _maybe_on_gpu(coder.quantizer, on_gpu)
    return lambda vectors: np.ascontiguousarray(quantizer.search(vectors, 1)[1][:, 0])


def encode(coder: Any, vectors: Floats, lists: Ids) -> Codes:
    """The codes (N, code bytes) of vectors (N, D) in their lists."""
    codes = np.empty((len(vectors), coder.code_size), np.uint8)
    coder.encode_vectors(
        len(vectors), faiss.swig_ptr(vectors), faiss.swig_ptr(lists), faiss.swig_ptr(codes.reshape(-1))
    )
    return codes


def new_exact(kind: Kind, embed_dim: int) -> Any:
    """An empty index of a kind that holds the vectors themselves."""
    if kind == "flat":
        return faiss.IndexFlatIP(embed_dim)
    index = faiss.IndexHNSWFlat(embed_dim, _HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = _HNSW_BUILD_EFFORT
    return index


def search_lists_by_graph(coder: Any) -> None:
    """Let the centroids be searched by a graph if there are many, since comparing them all would take most of a search.

    Only the search changes: rows were assigned to the lists of the nearest centroids, all of them compared.
    """
    if coder.nlist <= _GRAPH_ABOVE_LISTS:
        return
    flat, threads = coder.quantizer, faiss.omp_get_max_threads()
    graph = new_exact("hnsw", flat.d)
    faiss.omp_set_num_threads(1)  # the graph depends on the order
    graph.add(flat.reconstruct_n(0, flat.ntotal))
    faiss.omp_set_num_threads(threads)
    coder.quantizer = graph
    graph.this.disown()
    flat.this.own(True)


def write(index: Any, path: Path) -> None:
    """Write a FAISS index; a Python file notices a full disk when it is closed, FAISS's own writer does not."""
    with HashedFile(path) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write, 1 << 20))


def read(path: Path) -> Any:
    """Read a FAISS index.

    Raises:
        RuntimeError: If it is damaged.
    """
    return faiss.read_index(str(path))


def list_blocks(
    parts: Sequence[NDArray[np.uint8]], positions: Sequence[Ids], sizes: NDArray[np.int64]
) -> Iterator[bytes]:
    """The bytes of each list: codes, padding, positions, padding. A part's positions follow those of earlier parts."""
    firsts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    ends = np.cumsum(sizes, axis=1)
    capacities = Lists(sizes.sum(axis=0), parts[0].shape[1]).capacities
    for number, capacity in enumerate(capacities.tolist()):
        slices = [slice(int(ends[p, number] - sizes[p, number]), int(ends[p, number])) for p in range(len(parts))]
        codes = np.concatenate([part[rows] for part, rows in zip(parts, slices, strict=True)])
        numbers = np.concatenate(
            [one[rows] + first for one, rows, first in zip(positions, slices, firsts, strict=False)]
        )
        free = capacity - len(codes)
        yield codes.tobytes() + bytes(free * codes.shape[1]) + numbers.astype(np.int64).tobytes() + bytes(8 * free)


def map_lists(coder: Any, lists: Lists, path: Path) -> None:
    """Give a coder the rows of a file of lists, memory-mapped.

    Raises:
        ValueError: If the file has another size.
    """
    starts = lists.starts
    if path.stat().st_size != starts[-1]:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, expected {starts[-1]}")
    table = np.stack([lists.sizes, lists.capacities, starts[:-1]], axis=1).astype(np.uint64)
    inverted = faiss.OnDiskInvertedLists()
    inverted.nlist, inverted.code_size = len(lists.sizes), lists.code_bytes
    inverted.filename, inverted.totsize, inverted.read_only = str(path), int(starts[-1]), True
    inverted.prefetch_nthread = 0  # its threads take longer than a search whose rows are in memory
    inverted.lists.resize(len(lists.sizes))
    faiss.memcpy(inverted.lists.data(), faiss.swig_ptr(table.reshape(-1)), table.nbytes)
    if starts[-1]:
        inverted.do_mmap()
    coder.replace_invlists(inverted, True)
    inverted.this.disown()
    coder.ntotal = int(lists.sizes.sum())


class Searcher:
    """Searches an index with a given effort; several threads may search at once.

    The effort is the lists to visit (ivf) or the nodes to keep (hnsw); flat has none.

    Args:
        kind: The kind.
        index: FAISS's index.
        positions: Position of each of its rows; default: they are numbered by position.
    """

    def __init__(self, kind: Kind, index: Any, positions: Ids | None = None) -> None:
        self.kind: Kind = kind
        self._index = index
        self._positions = positions
        # Making an object of FAISS takes as long as visiting a list.
        self._parameters = functools.lru_cache(_CACHED_PARAMETERS)(self._make_parameters)

    @property
    def num_rows(self) -> int:
        """N."""
        return int(self._index.ntotal)

    @property
    def max_effort(self) -> int:
        """The effort that compares every row, or as many as the kind can."""
        if is_listed(self.kind):
            return int(self._index.nlist)
        return self.num_rows if self.kind == "hnsw" else 1

    def search(self, queries: Floats, count: int, effort: int) -> tuple[Floats, Ids]:
        """The similarities, as the index knows them, and the positions of rows (Q, count); -1 where there is none."""
        scores, rows = self._search(queries, count, effort)
        return scores, rows if self._positions is None else np.where(rows < 0, -1, self._positions[rows])

    def _search(self, queries: Floats, count: int, effort: int) -> tuple[Floats, Ids]:
        if self.kind == "hnsw":
            if count > self.num_rows // 4:  # a graph does not reach every node
                return self._index.storage.search(queries, count)
            effort = max(effort, count)
        return self._index.search(queries, count, params=self._parameters(effort))

    def _make_parameters(self, effort: int) -> Any:
        if self.kind == "flat":
            return None
        if self.kind == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=effort)
        parameters = faiss.SearchParametersIVF(nprobe=effort)
        if self._index.nlist > _GRAPH_ABOVE_LISTS:
            parameters.quantizer_params = faiss.SearchParametersHNSW(efSearch=max(32, 2 * effort))
        return parameters


def efforts(kind: Kind, largest: int) -> list[int]:
    """Efforts to try, ascending; each is about 1.4 times the one before."""
    if kind == "flat":
        return [1]
    first = 16 if kind == "hnsw" else 1
    values = sorted({round(first * 2 ** (step / 2)) for step in range(48)})
    return [value for value in values if value < largest] + [largest]


def candidates(kind: Kind, k: int) -> list[int]:
    """Numbers of rows to try that an index may return for re-ranking, for each of K results; ascending."""
    if is_exact(kind):
        return [1]
    largest = {"ivf_sq8": 4, "ivf_rabitq": 128}[kind]
    return [2**power for power in range(8) if 2**power <= largest and k * 2**power <= max(k, _MAX_CANDIDATES)]


def has_gpu() -> bool:
    """Whether this FAISS is built for GPUs and sees one."""
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def set_threads(num_threads: int) -> None:
    """Threads of FAISS in this process."""
    faiss.omp_set_num_threads(num_threads)


def nearest(queries: Floats, vectors: Floats, count: int) -> tuple[Floats, Ids]:
    """The exact ``count`` largest similarities (Q, count) and their rows."""
    return faiss.knn(queries, vectors, count, metric=faiss.METRIC_INNER_PRODUCT)


def _maybe_on_gpu(index: Any, on_gpu: bool) -> Any:
    return faiss.index_cpu_to_all_gpus(index) if on_gpu else index
