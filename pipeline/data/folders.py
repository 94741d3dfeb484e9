"""Reads a folder of pictures with captions, in the usual layouts of image-text datasets, as ``file://`` pairs.

The caption of a picture is the first of these: its row in the folder's ``metadata.csv``, ``.jsonl`` or ``.parquet``
with a ``file_name`` column; the file next to it with its name and ``.txt``, ``.caption`` or ``.json``; the words of its
file name.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.data.lists import BATCH_ROWS, OnMalformed, list_columns, read_list
from pipeline.data.rows import require_columns
from pipeline.errors import DataError

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_CAPTION_COLUMNS = ("caption", "text", "prompt", "description")


def read_folder(folder: Path, caption_column: str, on_malformed: OnMalformed) -> Iterator[pa.Table]:
    """Stream the pairs of a folder.

    Args:
        folder: The folder.
        caption_column: Column of the metadata file that holds the caption; if it has no such column, the usual names
            are tried.
        on_malformed: Called with the number of metadata rows that could not be parsed.

    Yields:
        Tables of ``url`` (``file://``), ``caption`` and ``caption_source`` (metadata, sidecar or name).

    Raises:
        DataError: If the folder has no pictures or its metadata lacks a column.
    """
    metadata = _read_metadata(folder, caption_column, on_malformed)
    files = _picture_files(folder)
    for start in range(0, len(files), BATCH_ROWS):
        part = files[start : start + BATCH_ROWS]
        captions = [_caption_of(file, file.relative_to(folder).as_posix(), metadata) for file in part]
        columns = {
            "url": [file.resolve().as_uri() for file in part],
            "caption": [caption for caption, _ in captions],
            "caption_source": [source for _, source in captions],
        }
        yield pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def count_pictures(folder: Path) -> int:
    """Number of pictures below a folder.

    Raises:
        DataError: If there is none.
    """
    return len(_picture_files(folder))


def _picture_files(folder: Path) -> list[Path]:
    """Every picture below ``folder``, by relative path, without hidden files and folders."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files = [file for file in folder.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES and file.is_file()]
    visible = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if not visible:
        raise DataError(f"{folder}: no pictures ({' '.join(sorted(PICTURE_SUFFIXES))}) in it or below it")
    return sorted(visible, key=lambda file: file.relative_to(folder).as_posix())


def _read_metadata(folder: Path, caption_column: str, on_malformed: OnMalformed) -> dict[str, str]:
    file = next((folder / name for name in _METADATA if (folder / name).is_file()), None)
    if file is None:
        return {}
    names = list_columns(file)
    require_columns(names, ["file_name"], where=str(file))
    column = next((name for name in (caption_column, *_CAPTION_COLUMNS) if name in names), None)
    if column is None:
        require_columns(names, [caption_column or "caption"], where=str(file))
    captions: dict[str, str] = {}
    for table in read_list(file, "file_name", column or "", on_malformed):
        pairs = zip(table.column("url").to_pylist(), table.column("caption").to_pylist(), strict=True)
        captions |= {name: caption or "" for name, caption in pairs if name}
    return captions


def _caption_of(file: Path, name: str, metadata: dict[str, str]) -> tuple[str, str]:
    if name in metadata:
        return metadata[name], "metadata"
    for suffix in (".txt", ".caption"):
        sidecar = file.with_suffix(suffix)
        if sidecar.is_file():
            return _read_text(sidecar).strip(), "sidecar"
    sidecar = file.with_suffix(".json")
    if sidecar.is_file():
        return _caption_in_json(sidecar), "sidecar"
    words = re.sub(r"[^\w]+|_+", " ", file.stem).strip()
    return re.sub(r"\s*\d+$", "", words) or words, "name"


def _caption_in_json(sidecar: Path) -> str:
    try:
        value: Any = json.loads(_read_text(sidecar))
    except ValueError as error:
        raise DataError(f"{sidecar}: not valid JSON ({error})") from None
    names = [name for name in _CAPTION_COLUMNS if isinstance(value, dict) and isinstance(value.get(name), str)]
    if not names:
        raise DataError(f"{sidecar}: no text under {', '.join(_CAPTION_COLUMNS)}")
    return value[names[0]]


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error})") from None
