"""Lists of pairs as these tests write and read them."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from pipeline.data.list_columns import ListColumns
from pipeline.data.lists import list_spans, read_span
from pipeline.data.reading import Reading
from pipeline.data.sources import Source
from pipeline.recipe.pairs_sections import PairsConfig

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=20)
"""A cell, or a part of one."""


def read_rows(
    path: Path, columns: ListColumns | None = None, num_bytes: int | None = None
) -> tuple[list[Any], Reading]:
    """(url, caption) of every row that was read, and what was left out.

    Args:
        path: The list.
        columns: The columns that are asked for; None: those of every list.
        num_bytes: Size of a span; None: the usual one.
    """
    reading = Reading()
    spans = list_spans(str(path), num_bytes) if num_bytes else list_spans(str(path))
    tables = [table for span in spans for table in read_span(span, columns or ListColumns(), reading)]
    return [(row["url"], row["caption"]) for table in tables for row in table.to_pylist()], reading


def write_repeats(folder: Path, num_parts: int = 5, rows: int = 300) -> Source:
    """A list of parts in which every third row is one of an earlier part or of its own."""
    folder.mkdir(parents=True)
    for part in range(num_parts):
        numbers = [number - 100 * (number % 3 == 0) for number in range(part * rows, (part + 1) * rows)]
        table = pa.table({"url": [f"http://a/{n // 2}" for n in numbers], "caption": [f"caption {n}" for n in numbers]})
        pq.write_table(table, folder / f"{part}.parquet")
    return Source(PairsConfig(source="list", path=str(folder), validation_prob=0.3))


def bytes_of(folder: Path) -> dict[str, bytes]:
    """What the pairs step leaves in a folder, by name, without the records of its tasks."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and not path.name.endswith(".done.json")
    }
