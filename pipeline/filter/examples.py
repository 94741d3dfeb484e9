"""Examples of the rows that are left out, with their pictures, for the report."""

from collections.abc import Sequence
from typing import Any

from pipeline.data.selection import LABEL_COLUMNS, label_file
from pipeline.data.shard_tables import read_table
from pipeline.data.shards import StoredPictures
from pipeline.errors import DataError
from pipeline.pictures.frame import thumbnail
from pipeline.pictures.png import to_png
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact

EXAMPLES = "examples.json"
_LARGEST_PX = 160

Json = dict[str, Any]


def write_examples(
    output: Artifact, rows: Artifact, records: Sequence[ShardRecord], num_examples: int, *, with_pictures: bool = True
) -> None:
    """Write ``examples.json`` and its pictures: of each reason some rows, from shards far apart.

    Only shards that have such rows are read; memory is that of one shard's labels.

    Args:
        output: Artifact of the filter step, with its labels.
        rows: The download, or imported embeddings: the tables of what is labelled.
        records: The shards of ``output``.
        num_examples: Rows of each reason.
        with_pictures: Whether ``rows`` has pictures; else examples are texts alone.

    Raises:
        DataError: If a shard is damaged.
    """
    pictures = StoredPictures(rows, by_ranges=True) if with_pictures else None
    reasons = sorted({reason for record in records for reason in record.counts} - {"in", "ok"})
    examples: dict[str, list[Json]] = {}
    for reason in reasons:
        shards = [record.shard for record in records if record.counts.get(reason)]
        num_shards = min(len(shards), num_examples)
        entries: list[Json] = []
        for number in range(num_shards):
            count = -(-(num_examples - len(entries)) // (num_shards - number))
            entries += _rows_of(output, rows, shards[number * len(shards) // num_shards], reason)[:count]
        examples[reason] = [
            _write_example(output, rows, pictures, entry, f"examples/{reason}-{number}")
            for number, entry in enumerate(entries)
        ]
    output.write_json(EXAMPLES, {"examples": examples})


def _rows_of(output: Artifact, rows: Artifact, shard: str, reason: str) -> list[Json]:
    labels = read_table(output.path(label_file(shard)), LABEL_COLUMNS)
    labelled = [row | {"shard": shard} for row in labels.to_pylist() if row["reason"] == reason]
    table = read_table(rows.path(f"{shard}.parquet"), ["uid", "url", "caption"])
    about = {row["uid"]: row for row in table.to_pylist()}
    return [about[row["uid"]] | row for row in labelled]


def _write_example(output: Artifact, rows: Artifact, pictures: StoredPictures | None, row: Json, name: str) -> Json:
    """Write the picture of a row, and beside it that of the row which stays in its place."""
    example: Json = {"caption": row["caption"] or "", "url": row["url"], "uid": row["uid"], "detail": row["detail"]}
    example["stays"] = None
    files = [_write_picture(output, pictures, row["shard"], row["key"], row["uid"], f"{name}.png")]
    if row["same_as"]:
        shard = row["same_as_shard"]
        table = read_table(rows.path(f"{shard}.parquet"), ["uid", "key", "caption"])
        first = next(item for item in table.to_pylist() if item["uid"] == row["same_as"])
        files.append(_write_picture(output, pictures, shard, first["key"], first["uid"], f"{name}-stays.png"))
        example["stays"] = {"caption": first["caption"] or "", "uid": first["uid"]}
    example["pictures"] = [{"file": file} for file in files if file]
    return example


def _write_picture(output: Artifact, pictures: StoredPictures | None, shard: str, key: str, uid: str, name: str) -> str:
    """Write a small picture; empty if there is none, or it cannot be decoded, which may be why its row is left out."""
    if pictures is None:
        return ""
    try:
        image = pictures.decode(shard, key, uid)
    except DataError:
        return ""
    output.write_bytes(name, to_png(thumbnail(image, _LARGEST_PX)))
    return name
