"""Reads a folder of pictures with captions, in the usual layouts of image-text datasets, as ``file://`` pairs.

The captions of a picture are the first of these:

1. Its rows in a metadata file: ``metadata.csv``, ``.jsonl`` or ``.parquet`` with a ``file_name`` column (Hugging Face
   ImageFolder), in the picture's folder or in one above it, the nearest first; or the annotations of COCO
   (``captions_*.json``), of Flickr8k (``captions.txt``, ``Flickr8k.token.txt``), of Flickr30k (``results.csv``,
   ``results_20130124.token``) or Karpathy's (``dataset_*.json``), anywhere, by the name of the picture alone.
2. The file next to it with its name and ``.txt``, ``.caption`` or ``.json``.
3. The words of its file name.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from pipeline.data.delimited import csv_records, lines_of
from pipeline.data.json_lists import json_records
from pipeline.data.list_columns import CAPTION_COLUMNS, NO_CAPTIONS, ListColumns, find_column
from pipeline.data.lists import BATCH_ROWS, Span, explain_damage, list_columns, open_text, read_span
from pipeline.data.reading import Reading
from pipeline.errors import DataError

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
NAME_COLUMNS = ("file_name", "filename", "image", "image_name", "path", "image_path", "file")
_ANNOTATIONS = ("captions_*.json", "dataset_*.json")
_TOKENS = ("*.token", "*.token.txt")
_TABLES = {"captions.txt": ",", "results.csv": "|"}
_SOURCES = ("metadata", "sidecar", "name")


@dataclass
class _Metadata:
    """Captions of one metadata file, by the picture's path from the file's folder, or by its name alone."""

    captions: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    by_name_alone: bool = False
    matched: set[str] = field(default_factory=set[str])

    def add(self, name: str, caption: str | None) -> None:
        key = PurePosixPath(name.replace("\\", "/")).as_posix()  # without ./ and doubled slashes
        self.captions.setdefault(key.rpartition("/")[2] if self.by_name_alone else key, []).append(caption or "")

    def find(self, picture: Path, folder: Path) -> list[str]:
        key = picture.name if self.by_name_alone else picture.relative_to(folder).as_posix()
        if key in self.captions:
            self.matched.add(key)
        return self.captions.get(key, [])


def read_folder(folder: Path, caption_column: str, reading: Reading) -> Iterator[pa.Table]:
    """Stream the pairs of a folder, by the relative paths of the pictures: files before folders.

    Args:
        folder: The folder.
        caption_column: Column of the metadata files that holds the caption; empty: found by its name.
        reading: Counts metadata rows that could not be parsed; its notes count pairs by the source of their caption
            (``captions_from_metadata``, ``_sidecar``, ``_name``), and metadata names without a picture.

    Yields:
        Tables of ``url`` (``file://``), ``caption`` and ``caption_source`` (metadata, sidecar or name).

    Raises:
        DataError: If the folder has no pictures, or a metadata file lacks a column.
    """
    require_pictures(folder)
    files = [] if caption_column == NO_CAPTIONS else _annotation_files(folder)
    annotations = [(file, _read_annotations(file, reading)) for file in files]
    rows: list[tuple[str, str, str]] = []
    for source in _SOURCES:
        reading.notes[f"captions_from_{source}"] = 0
    for picture, captions_of_picture in _captioned(
        folder, [], [one for _, one in annotations], caption_column, reading
    ):
        captions, source = captions_of_picture, "metadata"
        if not captions_of_picture:
            try:
                caption, source = _caption_of(picture)
            except ValueError as error:
                reading.malformed(0, str(error), str(picture))
                continue
            captions = [caption]
        reading.notes[f"captions_from_{source}"] += len(captions)
        rows += [(picture.resolve().as_uri(), caption, source) for caption in captions]
        if len(rows) >= BATCH_ROWS:
            yield _table(rows)
            rows = []
    for file, one in annotations:
        _count_unmatched(file, one, reading)
    yield _table(rows)


def count_pictures(folder: Path) -> int:
    """Number of pictures below a folder.

    Raises:
        DataError: If there is none.
    """
    require_pictures(folder)
    return sum(len(pictures) for _, pictures, _ in _walk(folder))


def has_pictures(folder: Path) -> bool:
    """Whether there is a picture in a folder or below it."""
    return any(pictures for _, pictures, _ in _walk(folder))


def require_pictures(folder: Path) -> None:
    """Refuse a folder without pictures.

    Raises:
        DataError: If there is no folder, or no picture.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    if not has_pictures(folder):
        raise DataError(f"{folder}: no pictures ({' '.join(sorted(PICTURE_SUFFIXES))}) in it or below it")


def _walk(folder: Path) -> Iterator[tuple[Path, list[Path], list[Path]]]:
    """Each folder with its pictures and its other files; files before folders."""
    pictures, others, folders = _entries(folder)
    yield folder, pictures, others
    for one in folders:
        yield from _walk(one)


def _entries(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Pictures, other files and folders in a folder, sorted by name, without hidden ones and links upwards."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    folders = [entry for entry in entries if entry.is_dir()]
    files = [entry for entry in entries if entry.is_file()]
    return (
        [file for file in files if _is_picture(file)],
        [file for file in files if not _is_picture(file)],
        [one for one in folders if not (one.is_symlink() and folder.resolve().is_relative_to(one.resolve()))],
    )


def _captioned(
    folder: Path, above: list[tuple[Path, _Metadata]], annotations: list[_Metadata], column: str, reading: Reading
) -> Iterator[tuple[Path, list[str]]]:
    """Every picture with its captions in metadata files, which may be none."""
    pictures, _, folders = _entries(folder)
    own = next((folder / name for name in METADATA if column != NO_CAPTIONS and (folder / name).is_file()), None)
    metadata = [(folder, _read_metadata(own, column, reading))] if own else []
    nearest_first = [*metadata, *above]
    for picture in pictures:
        captions = next((texts for place, one in nearest_first if (texts := one.find(picture, place))), [])
        yield picture, captions or [caption for one in annotations for caption in one.find(picture, folder)]
    for entry in folders:
        yield from _captioned(entry, nearest_first, annotations, column, reading)
    for _, one in metadata:
        _count_unmatched(own or folder, one, reading)


def _count_unmatched(file: Path, metadata: _Metadata, reading: Reading) -> None:
    """Count the names in a metadata file that no picture has, and give the first as an example."""
    unmatched = [name for name in metadata.captions if name not in metadata.matched]
    reading.notes["metadata_without_picture"] += len(unmatched)
    if unmatched:
        reading.name(0, f"names {len(unmatched)} files that are no pictures here, such as {unmatched[0]}", str(file))


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in PICTURE_SUFFIXES


def _table(rows: list[tuple[str, str, str]]) -> pa.Table:
    names = ("url", "caption", "caption_source")
    columns = zip(*rows, strict=True) if rows else [[]] * len(names)
    return pa.table({name: pa.array(values, pa.string()) for name, values in zip(names, columns, strict=True)})


def _read_metadata(file: Path, caption_column: str, reading: Reading) -> _Metadata:
    names = list_columns(str(file))
    name_column = find_column(names, "", NAME_COLUMNS, str(file))
    caption = find_column(names, caption_column, CAPTION_COLUMNS, str(file))
    metadata, own_reading = _Metadata(), Reading()
    for table in read_span(Span(str(file)), ListColumns(name_column, caption), own_reading):
        for name, text in zip(table.column("url").to_pylist(), table.column("caption").to_pylist(), strict=True):
            if name:
                metadata.add(name, text)
    _take_over(reading, own_reading)
    return metadata


def _take_over(reading: Reading, own_reading: Reading) -> None:
    """Count the malformed rows of a metadata file: they are no rows of the folder, whose rows are its pictures."""
    reading.notes["malformed_metadata"] += own_reading.counts["malformed"]
    for example in own_reading.examples:
        reading.name(example.line, example.reason, example.file)


def _annotation_files(folder: Path) -> list[Path]:
    patterns = (*_ANNOTATIONS, *_TOKENS, *_TABLES)
    return [file for _, _, files in _walk(folder) for file in files if any(fnmatch(file.name, one) for one in patterns)]


def _read_annotations(file: Path, reading: Reading) -> _Metadata:
    metadata, own_reading = _Metadata(by_name_alone=True), Reading()
    own_reading.begin(str(file))
    with explain_damage(str(file)), open_text(str(file)) as stream:
        if file.suffix == ".json":
            records = (
                (record.get("file_name"), record.get("caption")) for _, record in json_records(stream, own_reading)
            )
        else:
            records = _annotation_lines(file, lines_of(stream, own_reading), own_reading)
        for name, caption in records:
            if isinstance(name, str) and isinstance(caption, str):
                metadata.add(name, caption.strip())
    _take_over(reading, own_reading)
    return metadata


def _annotation_lines(file: Path, lines: Iterator[tuple[int, str]], own_reading: Reading) -> Iterator[tuple[str, str]]:
    """Names and captions: ``image,caption``, ``image| number| caption`` or ``image#number<TAB>caption``."""
    delimiter = _TABLES.get(file.name, "\t")
    if delimiter == ",":
        records = csv_records(lines, own_reading)
    else:
        records = ((number, line.strip().split(delimiter)) for number, line in lines if line.strip())
    for number, cells in records:
        name = cells[0].partition("#")[0].strip()
        if len(cells) > 1 and Path(name).suffix.lower() in PICTURE_SUFFIXES:
            yield name, cells[-1]
        elif number > 1:  # the first line may be a header
            own_reading.malformed(number, "no name of a picture with a caption")


def _caption_of(file: Path) -> tuple[str, str]:
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
        raise ValueError(f"{sidecar.name} is no JSON ({error})") from None
    names = [name for name in CAPTION_COLUMNS if isinstance(value, dict) and isinstance(value.get(name), str)]
    if not names:
        raise ValueError(f"{sidecar.name} has no text under {', '.join(CAPTION_COLUMNS)}")
    return _whole(value[names[0]], sidecar)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name} is not UTF-8 ({error.reason} at byte {error.start})") from None


def _whole(text: str, sidecar: Path) -> str:
    """Refuse half of a surrogate pair."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{sidecar.name} holds half of a surrogate pair, which is no character")
    return text
