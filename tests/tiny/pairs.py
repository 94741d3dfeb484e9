"""A finished list of pairs without its source."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.pairs import Pairs, Part, write_index
from pipeline.data.rows import numbered_names
from pipeline.workspace.store import Artifact


def write_parts(folder: Path, parts: list[pa.Table], *, row_group_size: int = 70) -> Pairs:
    """Write parts and their index, and open the list."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in zip(numbered_names(len(parts)), parts, strict=True):
        pq.write_table(part, folder / f"{name}.parquet", row_group_size=row_group_size)
    artifact = Artifact(str(folder))
    names = numbered_names(len(parts))
    write_index(
        artifact,
        [Part(name, part.num_rows) for name, part in zip(names, parts, strict=True)],
        [part.schema for part in parts],
    )
    return Pairs(artifact)
