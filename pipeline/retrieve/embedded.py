"""The embed steps' rows that an index is built from, with row numbers that count through all of their shards."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.mends import repair_hint
from pipeline.data.shard_tables import read_schema, read_table
from pipeline.data.vectors import Vectors, read_vectors
from pipeline.errors import DataError
from pipeline.workspace.manifest import content_of
from pipeline.workspace.store import Artifact

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class EmbeddedShards:
    """Rows 0 .. N - 1 of some embeddings, in order of artifact, shard name and key."""

    sources: tuple[Artifact, ...]
    """Artifacts of embed steps."""
    shards: tuple[tuple[int, str], ...]
    """Number of the source and name of each shard."""
    starts: Ids
    """First row number of each shard, and N as the last entry."""
    embed_dim: int
    """Width D of a vector."""
    contents: tuple[str, ...] = ()
    """``content_now`` of each source when the shards were counted; empty if it was not asked for, and of a segment that
    an earlier release wrote."""

    @property
    def num_rows(self) -> int:
        """N."""
        return int(self.starts[-1])

    @classmethod
    def open(cls, sources: Sequence[Artifact], *, with_contents: bool = False) -> "EmbeddedShards":
        """Read the row counts of every committed shard.

        Args:
            sources: Artifacts of embed steps.
            with_contents: Whether ``contents`` is filled, for which the manifest of each source is read.

        Raises:
            DataError: If there are no rows, or the widths of two sources differ.
        """
        shards, sizes = list[tuple[int, str]](), list[int]()
        contents = tuple(map(content_now, sources)) if with_contents else ()
        widths: dict[str, int] = {}
        for number, source in enumerate(sources):
            records = source.shard_records()
            shards += [(number, name) for name in records]
            sizes += [record.counts["ok"] for record in records.values()]
            if not sum(record.counts["ok"] for record in records.values()):
                reason = "every picture failed, or every pair was forgotten"
                raise DataError(f"index: {source.uri} holds no embeddings: {reason}")
            schema = read_schema(source.ranged(f"{next(iter(records))}.parquet"))
            widths[source.uri] = int(schema.field("z_image").type.list_size)
        if len(set(widths.values())) > 1:
            raise DataError(f"index: embeddings of different widths: {widths}; all must be of one CLIP")
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return cls(tuple(sources), tuple(shards), starts, next(iter(widths.values())), contents)

    def read(self, shard: int, path: Path | None = None) -> Vectors:
        """The rows of one shard, by its number.

        Args:
            shard: The number.
            path: Its local path, if it is known already.

        Raises:
            DataError: If the file is damaged, or has another number of rows than its record.
        """
        path = path or self.path(shard)
        vectors, num_rows = read_vectors(path), int(self.starts[shard + 1] - self.starts[shard])
        if len(vectors.z_image) != num_rows:
            counts = f"{len(vectors.z_image)} rows, its record says {num_rows}"
            raise DataError(f"index: {self.name(shard)} has {counts}; {repair_hint(path)}")
        return vectors

    def read_column(self, shard: int, name: str) -> list[Any]:
        """One column of a shard, without its vectors."""
        source, file = self.shards[shard]
        return read_table(self.sources[source].ranged(f"{file}.parquet"), [name]).column(name).to_pylist()

    def path(self, number: int) -> Path:
        """The local path of one shard's file, by its number."""
        source, name = self.shards[number]
        return self.sources[source].path(f"{name}.parquet")

    @property
    def are_far(self) -> bool:
        """Whether some of the shards' files are in an object store."""
        return any(source.reads_parts for source in self.sources)

    def path_here(self, number: int) -> Path | None:
        """The local path of one shard's file, by its number; None if it is in a store, and this machine has no copy."""
        source, name = self.shards[number]
        return self.sources[source].path_here(f"{name}.parquet")

    def num_bytes(self, number: int) -> int:
        """What the vectors of a shard take, which are nearly all of its file."""
        return 2 * 2 * self.embed_dim * int(self.starts[number + 1] - self.starts[number])

    def read_parts(self, parts: Sequence[tuple[int, int, int]]) -> list[bytes]:
        """Parts of files in object stores, (shard, start, stop) in bytes."""
        contents = [b""] * len(parts)
        for source, artifact in enumerate(self.sources):
            places, own = list[int](), list[tuple[str, int, int]]()
            for place, (shard, start, stop) in enumerate(parts):
                number, name = self.shards[shard]
                if number == source:
                    places.append(place)
                    own.append((f"{name}.parquet", start, stop))
            if own:
                for place, content in zip(places, artifact.read_parts(own), strict=True):
                    contents[place] = content
        return contents

    def name(self, shard: int) -> str:
        """The file of one shard, for messages."""
        source, name = self.shards[shard]
        return f"{self.sources[source].uri}/{name}.parquet"

    def shard_of(self, rows: Ids) -> Ids:
        """The number of the shard of each row."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def to_json(self, root: str) -> dict[str, Any]:
        """As JSON; sources inside the workspace ``root`` by their path in it, so that the workspace may be moved."""
        sources = [source.uri.removeprefix(f"{root}/") for source in self.sources]
        sizes = np.diff(self.starts).tolist()
        shards = [[source, name, size] for (source, name), size in zip(self.shards, sizes, strict=True)]
        return {"sources": sources, "contents": [*self.contents], "shards": shards, "embed_dim": self.embed_dim}

    @classmethod
    def from_json(cls, data: dict[str, Any], root: str) -> "EmbeddedShards":
        """From JSON."""
        sources = [name if name.startswith("/") or "://" in name else f"{root}/{name}" for name in data["sources"]]
        starts = np.concatenate([[0], np.cumsum([size for _, _, size in data["shards"]])]).astype(np.int64)
        shards = tuple((int(source), str(name)) for source, name, _ in data["shards"])
        contents = tuple(data.get("contents", ()))
        return cls(tuple(Artifact(uri) for uri in sources), shards, starts, int(data["embed_dim"]), contents)


def content_now(source: Artifact) -> str:
    """``content_of`` some embeddings as they are now; empty if they are not finished.

    Raises:
        DataError: If their manifest cannot be read.
    """
    manifest = source.manifest()
    return "" if manifest is None else content_of(manifest)
