"""Semantic duplicates: pictures that CLIP cannot tell apart, as in SemDeDup (arXiv:2303.09540).

Embeddings are clustered, and compared within their clusters alone. With sqrt(N) clusters of sqrt(N) rows, finding the
cluster of a row costs as much as comparing it within the cluster. In a cluster the rows are taken by CLIP score, the
highest first, and a row is left out if one that stays is nearer than the threshold: every row that is left out has a
neighbour that stays.
Legend: N rows, D features of an embedding, K clusters.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline.data.shard_tables import read_table
from pipeline.data.vectors import to_arrow, to_numpy, to_unit
from pipeline.filter.gathered import Bundle
from pipeline.filter.labels import duplicates_table, map_table, sorted_duplicates
from pipeline.filter.scores import CLIP_SCORE, stays
from pipeline.workspace.store import Artifact

MOST_SAMPLED_ROWS = 262_144
"""Rows on which clusters are trained: 800 MB in float32 at D = 768."""
MOST_SAMPLED_SHARDS = 512
ROWS_PER_GROUP = 200_000
"""Rows of the clusters that are compared together: 300 MB at D = 768 in float16, as much again for their order, and up
to 600 MB for one cluster in float32. A larger cluster is compared in pieces of this size."""

_ROWS_PER_CENTROID = 64
_SIZES_AT_ONCE = 256
_NUM_BATCHES = b"batches"
"""Key of a bundle's metadata: how many batches each group has."""
_NUM_ITERATIONS = 10
_BLOCK_ROWS = 1024
_NO_SIMILARITY = -2.0

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Consecutive clusters that are compared together."""

    number: int
    first: int
    """Number of its first cluster."""
    stop: int

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"semantic-{self.first:06d}"


def train_centroids(embed: Artifact, measures: Artifact, shards: Sequence[str], num_rows: int, seed: int) -> Floats:
    """Centroids (K, D) of length one, by spherical k-means on a random sample of the rows that stay so far.

    Args:
        embed: The embeddings.
        measures: ``<shard>.arrow`` of every shard, see ``ScoreRules``.
        shards: Names of the shards that have rows which stay so far.
        num_rows: N, their rows.
        seed: Seed of the sample and of the first centroids.
    """
    rng = np.random.default_rng(seed)
    num_clusters = max(1, min(round(num_rows**0.5), MOST_SAMPLED_ROWS // 2))
    num_sampled = min(num_rows, MOST_SAMPLED_ROWS, _ROWS_PER_CENTROID * num_clusters)
    sample_shards = sorted(rng.choice(len(shards), min(len(shards), MOST_SAMPLED_SHARDS), replace=False).tolist())
    places = [
        (shard, np.flatnonzero(stays(map_table(measures.path(f"{shards[shard]}.arrow"))))) for shard in sample_shards
    ]
    total = sum(len(rows) for _, rows in places)
    sample: list[Floats] = []
    for shard, staying in places:
        count = min(len(staying), -(-num_sampled * len(staying) // max(total, 1)))
        rows = np.sort(rng.choice(staying, count, replace=False)) if count else staying
        table = read_table(embed.path(f"{shards[shard]}.parquet"), ["z_image"])
        sample.append(to_unit(to_numpy(table["z_image"])[rows]))
    return _cluster(np.concatenate(sample), num_clusters, rng)


def _cluster(sample: Floats, num_clusters: int, rng: np.random.Generator) -> Floats:
    num_clusters = min(num_clusters, len(sample))
    centroids = sample[np.sort(rng.choice(len(sample), num_clusters, replace=False))]
    for _ in range(_NUM_ITERATIONS):
        owners = nearest(sample, centroids)
        order = np.argsort(owners, kind="stable")  # sums in a fixed order give the same bytes again
        clusters, starts = np.unique(owners[order], return_index=True)
        sums = np.add.reduceat(sample[order], starts, axis=0)
        centroids = centroids.copy()  # an empty cluster keeps its centroid
        centroids[clusters] = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return centroids


def caption_groups(captions: pa.ChunkedArray, *, differ: bool) -> Ints:
    """A number for each caption, (N,): the same one for equal captions; or the same one for all."""
    if not differ:
        return np.zeros(len(captions), np.int64)
    digests = [hashlib.sha256((caption or "").strip().encode()).digest() for caption in captions.to_pylist()]
    return np.array([int.from_bytes(digest[:8], "little", signed=True) for digest in digests], np.int64)


def nearest(rows: Floats, centroids: Floats, device: str = "cpu") -> Ints:
    """Number of the nearest centroid of each row, (N,)."""
    table = torch.from_numpy(centroids).to(device).T
    blocks = [torch.from_numpy(rows[i : i + _BLOCK_ROWS]).to(device) for i in range(0, len(rows), _BLOCK_ROWS)]
    owners = [(block @ table).argmax(dim=1).cpu().numpy() for block in blocks]
    return np.concatenate(owners) if owners else np.zeros(0, np.int64)


def assign(embeddings: pa.Table, measures: pa.Table, centroids: Floats, groups: Ints, device: str = "cpu") -> pa.Table:
    """The rows of a shard that stay so far, sorted by cluster.

    Args:
        embeddings: Column ``z_image`` of the shard.
        measures: The shard's table of ``ScoreRules``.
        centroids: (K, D).
        groups: Only rows of one group are compared, (N,).
        device: Torch device.

    Returns:
        ``cluster``, ``row`` (in the shard), ``uid``, ``clip_score``, ``group``, ``z``.
    """
    rows = np.flatnonzero(stays(measures))
    z_image = to_unit(to_numpy(embeddings["z_image"])[rows])
    clusters = nearest(z_image, centroids, device)
    order = np.argsort(clusters, kind="stable")
    rows = rows[order]
    return pa.table(
        {
            "cluster": pa.array(clusters[order], pa.int32()),
            "row": pa.array(rows, pa.int32()),
            "uid": measures["uid"].take(pa.array(rows)),
            CLIP_SCORE: pa.array(measures[CLIP_SCORE].to_numpy()[rows]),
            "group": pa.array(groups[rows], pa.int64()),
            "z": to_arrow(z_image[order]),
        }
    )


def write_sizes(assigned: pa.Table, assignments: Artifact, shard: str) -> None:
    """Write how many rows of a shard each of its clusters has, so that nobody fetches the rows to count them."""
    clusters, sizes = np.unique(assigned["cluster"].to_numpy(), return_counts=True)
    assignments.write_bytes(_sizes_file(shard), json.dumps([clusters.tolist(), sizes.tolist()]).encode())


def plan_groups(assignments: Artifact, shards: Sequence[str], num_clusters: int) -> list[Group]:
    """Divide the clusters into groups of at most ``ROWS_PER_GROUP`` rows, or one larger cluster."""
    sizes = np.zeros(num_clusters, np.int64)
    for start in range(0, len(shards), _SIZES_AT_ONCE):
        names = [_sizes_file(shard) for shard in shards[start : start + _SIZES_AT_ONCE]]
        for clusters, of_shard in assignments.read_jsons(names):
            sizes[clusters] += of_shard
    groups: list[Group] = []
    first, rows = 0, 0
    for cluster, size in enumerate(sizes.tolist()):
        if rows and rows + size > ROWS_PER_GROUP:
            groups.append(Group(len(groups), first, cluster))
            first, rows = cluster, 0
        rows += size
    return [*groups, Group(len(groups), first, num_clusters)]


def write_bundle(
    assignments: Artifact, shards: Sequence[str], bundle: Bundle, groups: Sequence[Group], path: Path
) -> None:
    """Write the rows of a bundle's shards by group, so that a group reads its own alone.

    A group has one record batch, more if it has more than ``ROWS_PER_GROUP`` rows, and none without rows. Its rows
    stand in the order of their shards; ``number`` is that of the shard.
    """
    numbers = range(bundle.first, bundle.stop)
    tables = [map_table(assignments.path(f"{shards[number]}.arrow")) for number in numbers]
    borders = [*(group.first for group in groups), groups[-1].stop]
    places = np.stack([np.searchsorted(table["cluster"].to_numpy(), borders) for table in tables])
    num_batches = -(-np.diff(places).sum(axis=0) // ROWS_PER_GROUP)
    schema = tables[0].schema.append(pa.field("number", pa.int64()))
    schema = schema.with_metadata({_NUM_BATCHES: json.dumps(num_batches.tolist()).encode()})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for group, batches in zip(groups, num_batches.tolist(), strict=True):
            parts: list[pa.Table] = []
            for number, table, (start, stop) in zip(
                numbers, tables, places[:, group.number : group.number + 2].tolist(), strict=True
            ):
                part = table.slice(start, stop - start)
                parts.append(part.append_column("number", pa.array(np.full(part.num_rows, number, np.int64))))
            rows = pa.concat_tables(parts)
            for batch in range(batches):
                writer.write_table(rows.slice(batch * ROWS_PER_GROUP, ROWS_PER_GROUP).combine_chunks())


def find_semantic_duplicates(
    gathered: Artifact,
    bundles: Sequence[Bundle],
    group: Group,
    max_similarity: float,
    device: str = "cpu",
) -> pa.Table:
    """The duplicates of a group of clusters, in the layout of ``sorted_duplicates``; see ``ROWS_PER_GROUP``.

    Args:
        gathered: The files of the bundles, see ``write_bundle``.
        bundles: All bundles.
        group: The group.
        max_similarity: The recipe's threshold.
        device: Torch device.
    """
    pieces = _pieces(gathered, bundles, group)
    return sorted_duplicates([_find_in_piece(piece, max_similarity, device) for piece in pieces])


def _find_in_piece(piece: pa.Table, max_similarity: float, device: str) -> pa.Table:
    clusters, scores = piece["cluster"].to_numpy(), piece[CLIP_SCORE].to_numpy()
    order = np.lexsort((piece["row"].to_numpy(), piece["number"].to_numpy(), -scores, clusters))
    borders = np.flatnonzero(np.diff(clusters[order])) + 1
    vectors, groups = to_numpy(piece["z"]), piece["group"].to_numpy()
    again, first, details = list[Ints](), list[Ints](), list[str]()
    for members in np.split(order, borders):
        same_as, similarity = near_rows(to_unit(vectors[members]), groups[members], max_similarity, device)
        near = np.flatnonzero(same_as >= 0)
        again.append(members[near])
        first.append(members[same_as[near]])
        details += [f"similarity {one:.3f}" for one in similarity[near].tolist()]
    return duplicates_table(piece, np.concatenate(again), np.concatenate(first), "semantic_duplicate", details)


def near_rows(z: Floats, groups: Ints, max_similarity: float, device: str = "cpu") -> tuple[Ints, Floats]:
    """For each row, the most similar earlier row that stays, if it is more similar than the threshold; else -1.

    Args:
        z: Rows of length one in the order of preference, (N, D).
        groups: Only rows of one group are compared, (N,).
        max_similarity: The threshold.
        device: Torch device.

    Returns:
        Row numbers (N,), and the similarities to them.
    """
    same_as, similarity = np.full(len(z), -1, np.int64), np.zeros(len(z), np.float32)
    rows, owners = torch.from_numpy(z).to(device), torch.from_numpy(groups).to(device)
    staying = torch.zeros(0, dtype=torch.long, device=device)
    for start in range(0, len(z), _BLOCK_ROWS):
        here = torch.arange(start, min(start + _BLOCK_ROWS, len(z)), device=device)
        for block in range(0, len(staying), _BLOCK_ROWS):
            earlier = staying[block : block + _BLOCK_ROWS]
            best, place = _similarities(rows, owners, here, earlier).max(dim=1)
            best, nearest_rows = best.cpu().numpy(), earlier[place].cpu().numpy()
            own = slice(start, start + len(here))
            is_nearer = (best > max_similarity) & (best > similarity[own])
            same_as[own][is_nearer], similarity[own][is_nearer] = nearest_rows[is_nearer], best[is_nearer]
        inside = _similarities(rows, owners, here, here).cpu().numpy()
        stays_here = np.zeros(len(here), np.bool_)
        for place in np.flatnonzero(same_as[start : start + len(here)] < 0).tolist():
            scores = np.where(stays_here, inside[place], _NO_SIMILARITY)
            near = int(scores.argmax())
            if scores[near] > max_similarity:
                same_as[start + place], similarity[start + place] = start + near, scores[near]
            else:
                stays_here[place] = True
        staying = torch.cat([staying, here[torch.from_numpy(stays_here).to(device)]])
    return same_as, similarity


def _similarities(rows: torch.Tensor, groups: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine similarities of rows a and b; ``_NO_SIMILARITY`` where their groups differ."""
    scores = rows[a] @ rows[b].T
    return torch.where(groups[a][:, None] == groups[b][None], scores, torch.full_like(scores, _NO_SIMILARITY))


def _pieces(gathered: Artifact, bundles: Sequence[Bundle], group: Group) -> Iterator[pa.Table]:
    """The rows of a group from all shards, with the number of their shard; in pieces if they are too many."""
    parts: list[pa.Table] = []
    num_rows = 0
    for part in _parts(gathered, bundles, group):
        if num_rows and num_rows + part.num_rows > ROWS_PER_GROUP:
            yield pa.concat_tables(parts).combine_chunks()
            parts, num_rows = [], 0
        parts.append(part)
        num_rows += part.num_rows
    if num_rows:
        yield pa.concat_tables(parts).combine_chunks()


def _parts(gathered: Artifact, bundles: Sequence[Bundle], group: Group) -> Iterator[pa.Table]:
    """The rows of a group, shard by shard."""
    for bundle in bundles:
        place = gathered.ranged(bundle.file)
        with pa.memory_map(str(place)) if isinstance(place, Path) else place as file:
            reader = pa.ipc.open_file(file)
            num_batches: list[int] = json.loads(reader.schema.metadata[_NUM_BATCHES])
            first = sum(num_batches[: group.number])
            for batch in range(first, first + num_batches[group.number]):
                table = pa.Table.from_batches([reader.get_batch(batch)])
                numbers = table["number"].to_numpy()
                borders = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
                for start, stop in itertools.pairwise(borders):
                    yield table.slice(start, stop - start)


def _sizes_file(shard: str) -> str:
    return f"{shard}.sizes.json"
