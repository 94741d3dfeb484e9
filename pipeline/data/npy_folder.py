"""clip-retrieval's folder of embeddings: written from ours, and taken over as ours.

Its parts are aligned row by row: ``img_emb/img_emb_P.npy``, ``text_emb/text_emb_P.npy`` (N, D) and
``metadata/metadata_P.parquet``; P is padded with zeros. embedding-reader and autofaiss read the same layout.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.arrays import save_array
from pipeline.data.blank import are_forgotten
from pipeline.data.lists import explain_damage
from pipeline.data.rows import embeddings_schema, make_uid, numbered_names, split_of
from pipeline.data.vectors import read_vectors, to_arrow, write_embeddings
from pipeline.errors import ConfigError, DataError
from pipeline.workspace.forgotten import CAUSE, Forgotten
from pipeline.workspace.store import Artifact

_NAMES = ("uid", "key", "url", "caption", "split", "clip_score")
_URL_NAMES = ("url", "URL", "image_path")
_CAPTION_NAMES = ("caption", "TEXT", "text", "top_caption")
_SLICE_ROWS = 1 << 14
_LENGTH_TOLERANCE = 0.01  # of a unit vector that was rounded to float16
_CLIP_OF_WIDTH = {512: "ViT-B-32-quickgelu", 768: "ViT-L-14-quickgelu"}
_RECIPE = """\
# Embeddings that others made: unclip run recipe.toml --until index builds their index.
name = {name}
workspace = {workspace}

[clip]
# The CLIP that made the embeddings; clip-retrieval's folder does not name it. Searching needs it.
source = "pretrained"
name = {clip}
tag = "openai"

[embed]
import_from = {folder}
"""
_UID = re.compile(r"[0-9a-f]{32}")
_NUMBER = re.compile(r"[0-9]+")


def export_embeddings(embed: Artifact, folder: Path) -> int:
    """Write the embeddings of a finished step in clip-retrieval's layout, one part for each shard with rows.

    Args:
        embed: The embed step's artifact.
        folder: Where to write; must not exist, or be empty.

    Returns:
        The number of rows.

    Raises:
        ConfigError: If the folder is not empty.
        DataError: If a shard is damaged.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; name a new folder")
    shards = [name for name, record in embed.shard_records().items() if record.counts["ok"]]
    width, out, num_rows = len(str(len(shards))), Artifact(str(folder)), 0
    for number, shard in enumerate(shards):
        part, vectors = f"{number:0{width}d}", read_vectors(embed.path(f"{shard}.parquet"))
        for kind, values in (("img", vectors.z_image), ("text", vectors.z_text)):
            with out.write(f"{kind}_emb/{kind}_emb_{part}.npy") as path:
                save_array(path, values)
        table = vectors.table.append_column("image_path", vectors.table.column("key"))
        with out.write(f"metadata/metadata_{part}.parquet") as path:
            pq.write_table(table, path)
        num_rows += table.num_rows
    return num_rows


@dataclass(frozen=True)
class NpyPart:
    """One part of a folder: rows of the same number in three files."""

    name: str
    """``00000``, ``00001``, ... in the order of the parts."""
    img: Path
    text: Path
    metadata: Path
    num_rows: int
    embed_dim: int


def find_parts(folder: Path) -> list[NpyPart]:
    """The parts of a folder, by number.

    Raises:
        DataError: If there are none, a file of a part is missing, or its files do not have the same rows; names it.
    """
    numbers = {path.stem.removeprefix("img_emb_"): path for path in folder.glob("img_emb/img_emb_*.npy")}
    if not numbers:
        raise DataError(f"{folder}: no img_emb/img_emb_*.npy; it is no folder of embeddings of clip-retrieval")
    for number, path in numbers.items():
        if not _NUMBER.fullmatch(number):
            raise DataError(f"{path}: {number} is no number of a part; rename or move this file away")
    parts: list[NpyPart] = []
    names = numbered_names(len(numbers))
    for place, number in enumerate(sorted(numbers, key=int)):
        text, metadata = folder / f"text_emb/text_emb_{number}.npy", folder / f"metadata/metadata_{number}.parquet"
        for path in (text, metadata):
            if not path.is_file():
                raise DataError(
                    f"{path} is missing: each part needs embeddings of pictures and of texts, and metadata; "
                    "clip-retrieval writes all three with --enable_text True --enable_image True --enable_metadata True"
                )
        shapes = {str(path): _open_array(path).shape for path in (numbers[number], text)}
        num_rows, embed_dim = next(iter(shapes.values()))
        with explain_damage(str(metadata)):
            rows = pq.read_metadata(metadata).num_rows
        if len(set(shapes.values())) > 1 or rows != num_rows:
            raise DataError(f"{folder}: part {number}: rows differ: {shapes}, {rows} in {metadata.name}")
        if parts and parts[0].embed_dim != embed_dim:
            raise DataError(f"{numbers[number]}: {embed_dim} features; the first part has {parts[0].embed_dim}")
        parts.append(NpyPart(names[place], numbers[number], text, metadata, num_rows, embed_dim))
    return parts


def count_rows(folder: Path) -> int:
    """Rows of all parts of a folder.

    Raises:
        DataError: See ``find_parts``.
    """
    return sum(part.num_rows for part in find_parts(folder))


def import_part(
    part: NpyPart, validation_prob: float, target: Path, forgotten: Forgotten | None = None
) -> tuple[Counter[str], list[dict[str, str]]]:
    """Write one part as a shard of the embed step, in slices, so that a part of any size takes little memory.

    A uid, key and split that we exported stay. Other rows get the uid of their URL (or path) and caption.

    Args:
        part: The part.
        validation_prob: Share of rows for validation, where the metadata has no split.
        target: Parquet file to write, in ``rows.embeddings_schema``.
        forgotten: Pairs to leave out; None: none.

    Returns:
        Numbers of rows, ``in`` = ``ok`` + ``corrupt`` + ``forgotten``; and the corrupt rows, whose vectors are not
        finite or zero.
    """
    failures: list[dict[str, str]] = []
    counts, schema = Counter({"in": part.num_rows, "ok": 0}), embeddings_schema(part.embed_dim)

    def slices() -> Iterator[pa.Table]:
        for table in _slices(part, validation_prob, schema, failures, forgotten):
            counts["ok"] += table.num_rows
            yield table

    write_embeddings(slices(), target, schema)
    counts["corrupt"] = len(failures)
    if num_forgotten := part.num_rows - counts["ok"] - counts["corrupt"]:
        counts[CAUSE] = num_forgotten
    return counts, failures


def write_import_recipe(folder: Path, out: Path) -> tuple[int, Path]:
    """Write ``out/recipe.toml``, whose embed step takes over the folder.

    Returns:
        The number of rows, and the recipe's path.

    Raises:
        ConfigError: If ``out`` has a recipe.
        DataError: If the folder's parts do not fit together.
    """
    parts = find_parts(folder)
    path = out / "recipe.toml"
    if path.exists():
        raise ConfigError(f"{path} exists; name a new folder")
    guess = _CLIP_OF_WIDTH.get(parts[0].embed_dim, _CLIP_OF_WIDTH[768])
    text = _RECIPE.format(
        name=_quote(out.resolve().name),
        workspace=_quote(str(out.resolve() / "workspace")),
        clip=_quote(guess),
        folder=_quote(str(folder.resolve())),
    )
    Artifact(str(out)).write_bytes(path.name, text.encode())
    return sum(part.num_rows for part in parts), path


def _quote(text: str) -> str:
    """A TOML string."""
    return json.dumps(text, ensure_ascii=False)


def _slices(
    part: NpyPart,
    validation_prob: float,
    schema: pa.Schema,
    failures: list[dict[str, str]],
    forgotten: Forgotten | None,
) -> Iterator[pa.Table]:
    arrays = [_open_array(path) for path in (part.img, part.text)]
    with explain_damage(str(part.metadata)), pq.ParquetFile(part.metadata) as file:
        names = [name for name in file.schema_arrow.names if name in {*_NAMES, *_URL_NAMES, *_CAPTION_NAMES}]
        start = 0
        for batch in file.iter_batches(_SLICE_ROWS, columns=names):
            vectors = [_to_unit(np.asarray(array[start : start + batch.num_rows])) for array in arrays]
            table = _identify(pa.Table.from_batches([batch]), part, start, validation_prob)
            good = np.logical_and(*(np.isfinite(rows).all(1) & (np.abs(rows).max(1) > 0) for rows in vectors))
            stays = np.ones(table.num_rows, np.bool_) if forgotten is None else ~are_forgotten(table, forgotten)
            bad = table.filter(pa.array(stays & ~good)).select(["uid", "key", "url"]).to_pylist()
            good &= stays
            failures += [row | {"reason": "embedding is zero or not finite", "detail": part.img.name} for row in bad]
            z_image, z_text = (to_arrow(rows[good]) for rows in vectors)
            score = (vectors[0][good].astype(np.float32) * vectors[1][good].astype(np.float32)).sum(1)
            table = table.filter(pa.array(good))
            scores = table.column("clip_score") if "clip_score" in names else pa.array(score, pa.float32())
            columns = [table.column(name) for name in ("uid", "key", "url", "caption", "split")]
            yield pa.table([*columns, scores, z_image, z_text], schema=schema)
            start += batch.num_rows


def _identify(table: pa.Table, part: NpyPart, start: int, validation_prob: float) -> pa.Table:
    """The table with uid, key, url, caption and split of every row."""
    width = len(str(part.num_rows))
    made: dict[str, list[str]] = {
        "url": _first_column(table, _URL_NAMES),
        "caption": _first_column(table, _CAPTION_NAMES),
        "key": [f"{part.name}{row:0{width}d}" for row in range(start, start + table.num_rows)],
    }
    made["uid"] = [make_uid(url, caption) for url, caption in zip(made["url"], made["caption"], strict=True)]
    uids = _first_column(table, ("uid",))
    if all(_UID.fullmatch(uid) for uid in uids):
        made["uid"] = uids
        made["key"] = _first_column(table, ("key",)) if "key" in table.column_names else made["key"]
    made["split"] = [split_of(url, validation_prob) for url in made["url"]]
    splits = _first_column(table, ("split",))
    if set(splits) <= {"train", "validation"}:
        made["split"] = splits
    for name, values in made.items():
        column = pa.array(values, pa.string())
        place = table.schema.get_field_index(name)
        table = table.append_column(name, column) if place < 0 else table.set_column(place, name, column)
    return table


def _first_column(table: pa.Table, names: tuple[str, ...]) -> list[str]:
    """The first of these columns that the table has, as text; empty text where it has none or no value."""
    name = next((name for name in names if name in table.column_names), None)
    values: list[Any] = [None] * table.num_rows if name is None else table.column(name).to_pylist()
    return ["" if value is None else str(value) for value in values]


def _to_unit(rows: NDArray[Any]) -> NDArray[np.float16]:
    """Rows as float16 of length one; those that have it already stay as they are."""
    lengths = np.linalg.norm(rows.astype(np.float32), axis=1, keepdims=True)
    unit = np.where(np.abs(lengths - 1) < _LENGTH_TOLERANCE, rows, rows / np.where(lengths > 0, lengths, 1))
    return unit.astype(np.float16)


def _open_array(path: Path) -> NDArray[Any]:
    mode: Literal["r"] = "r"
    try:
        array = np.load(path, mmap_mode=mode, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no array that can be read: {error}") from error
    if array.ndim != 2 or array.dtype.kind != "f":
        raise DataError(f"{path}: {array.dtype} {array.shape}; embeddings are floats (N, D)")
    return array
