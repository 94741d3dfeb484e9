"""Captions of pictures in files: metadata and annotations of a folder, and the files next to its pictures."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import IO, Any

from pipeline.data.delimited import csv_records, lines_of
from pipeline.data.json_lists import UnknownShapeError, json_records, parse_json
from pipeline.data.list_columns import CAPTION_COLUMNS, ListColumns, find_column
from pipeline.data.lists import Span, explain_damage, file_columns, kind_of, open_text, read_span
from pipeline.data.reading import MAX_CELL, Reading, has_surrogates
from pipeline.errors import DataError

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""In the order of their names: of several in a folder the first is read."""
NAME_COLUMNS = ("file_name", "filename", "image", "image_name", "path", "image_path", "file")
_KARPATHY = "dataset_*.json"
_ANNOTATIONS = ("captions_*.json", _KARPATHY)
_ABOUT_DATASETS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json"})
"""What Hugging Face's tools write into a folder: no annotations, in spite of their names."""
_TOKENS = ("*.token", "*.token.txt")
_TABLES = {"captions.txt": ",", "results.csv": "|"}
SIDECARS = (".txt", ".caption", ".json")


@dataclass
class Metadata:
    """Captions of one metadata file, by the picture's path from the file's folder, or by its name alone."""

    captions: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    by_name_alone: bool = False
    matched: set[str] = field(default_factory=set[str])

    def add(self, name: str, caption: str | None) -> None:
        """Add the caption of a file that is named."""
        key = PurePosixPath(name.replace("\\", "/")).as_posix()  # without ./ and doubled slashes
        self.captions.setdefault(key.rpartition("/")[2] if self.by_name_alone else key, []).append(caption or "")

    def find(self, picture: str, folder: str) -> list[str]:
        """The captions of a picture, by its path and that of the folder of this file; may be none."""
        key = picture.rpartition("/")[2] if self.by_name_alone else picture[len(folder) :].lstrip("/")
        if key in self.captions:
            self.matched.add(key)
        return self.captions.get(key, [])


def has_captions(file: str) -> bool:
    """Whether a file is metadata or annotations, by its name."""
    return file.rpartition("/")[2] in METADATA or is_annotation(file)


def is_annotation(file: str) -> bool:
    """Whether a file is annotations, by its name."""
    name = file.rpartition("/")[2]
    patterns = (*_ANNOTATIONS, *_TOKENS, *_TABLES)
    return name not in _ABOUT_DATASETS and any(fnmatch(name, pattern) for pattern in patterns)


def is_picture(name: str) -> bool:
    """Whether a file is a picture, by its name."""
    return PurePosixPath(name).suffix.lower() in PICTURE_SUFFIXES


def read_metadata(file: str, caption_column: str, reading: Reading) -> Metadata:
    """Read a metadata file.

    Args:
        file: Its path or URI.
        caption_column: Column of the captions; empty: found by its name.
        reading: Counts and names rows that cannot be read.

    Raises:
        DataError: If it lacks a column.
    """
    names = file_columns(file)
    name_column = find_column(names, "", NAME_COLUMNS, file)
    caption = find_column(names, caption_column, CAPTION_COLUMNS, file)
    metadata, own_reading, num_nameless = Metadata(), Reading(), 0
    for table in read_span(Span(file), ListColumns(name_column, caption), own_reading):
        for name, text in zip(table.column("url").to_pylist(), table.column("caption").to_pylist(), strict=True):
            if name:
                metadata.add(name, text)
            else:
                num_nameless += 1
    if num_nameless:
        own_reading.counts["malformed"] += num_nameless
        own_reading.name(0, f"{num_nameless} rows without a file name")
    _take_over(reading, own_reading)
    return metadata


def _take_over(reading: Reading, own_reading: Reading) -> None:
    """Count what is left out of a caption file: it is no row of the folder, whose rows are its pictures."""
    reading.notes["malformed_metadata"] += own_reading.counts["malformed"]
    for example in own_reading.examples:
        reading.name(example.line, example.reason, example.file)


def read_annotations(file: str, reading: Reading) -> Metadata:
    """Read annotations; ``reading`` counts and names records that cannot be read.

    Other tools use the names of annotations, too: a file in which no picture has a caption counts as one that was not
    read.

    Raises:
        DataError: If the file is damaged, or is ``captions_*.json`` and of no known shape.
    """
    metadata, own_reading, fault = Metadata(by_name_alone=True), Reading(), ""
    own_reading.begin(file)
    with explain_damage(file), open_text(file) as stream:
        read = _annotation_records if file.endswith(".json") else _annotation_lines
        try:
            for number, name, caption in read(file, stream, own_reading):
                if reason := _fault_of(name, caption):
                    own_reading.malformed(number, reason)
                else:
                    metadata.add(name, caption.strip())
        except UnknownShapeError as error:
            if not fnmatch(file.rpartition("/")[2], _KARPATHY):
                raise DataError(f"{error}; if it holds no captions, give it another name") from None
            fault = "no images with sentences"
    if own_reading.examples and not metadata.captions:
        fault = own_reading.examples[0].reason
    if fault:
        leave_out_file(file, f"named like annotations, but no picture has a caption in it ({fault})", reading)
    else:
        _take_over(reading, own_reading)
    return metadata


def leave_out_file(file: str, reason: str, reading: Reading) -> None:
    """Count and name a file of metadata or annotations that is not read."""
    reading.notes["metadata_not_read"] += 1
    reading.name(0, f"not read: {reason}", file)


def _fault_of(name: Any, caption: Any) -> str:
    """Why a picture's name and its caption in annotations are left out; empty if they are not."""
    if not isinstance(name, str) or not name:
        return "no name of a picture"
    if not isinstance(caption, str):
        return f"the caption is {kind_of(caption)}"
    return _fault_of_text(name) or _fault_of_text(caption)


def _fault_of_text(text: str) -> str:
    if len(text) > MAX_CELL:
        return f"a text of {len(text)} characters; the limit is {MAX_CELL}"
    return "not UTF-8, or half of a surrogate pair, which is no character" if has_surrogates(text) else ""


def _annotation_records(file: str, stream: IO[bytes], own_reading: Reading) -> Iterator[tuple[int, Any, Any]]:
    """Number, name and caption of each record of a JSON file."""
    del file
    for number, record in json_records(stream, own_reading):
        yield number, record.get("file_name"), record.get("caption")


def _annotation_lines(file: str, stream: IO[bytes], own_reading: Reading) -> Iterator[tuple[int, Any, Any]]:
    """Line, name and caption: ``image,caption``, ``image| number| caption`` or ``image#number<TAB>caption``."""
    lines, delimiter = lines_of(stream, own_reading), _TABLES.get(file.rpartition("/")[2], "\t")
    if delimiter == ",":
        records = csv_records(lines, own_reading)
    else:
        records = ((number, line.strip().split(delimiter)) for number, line in lines if line.strip())
    for number, cells in records:
        name = cells[0].partition("#")[0].strip()
        if len(cells) > 1 and is_picture(name):
            yield number, name, cells[-1]
        elif number > 1:  # the first line may be a header
            own_reading.malformed(number, "no name of a picture with a caption")


def sidecar_of(picture: str, names: set[str]) -> str:
    """The file next to a picture that holds its caption; empty if there is none."""
    stem = PurePosixPath(picture).stem
    return next((stem + suffix for suffix in SIDECARS if stem + suffix in names), "")


def caption_by_name(picture: str) -> str:
    """The words of a picture's name, without a number at their end."""
    words = re.sub(r"[^\w]+|_+", " ", PurePosixPath(picture).stem).strip()
    return re.sub(r"\s*\d+$", "", words) or words


def caption_in(sidecar: str, content: bytes) -> str:
    """The caption in the file next to a picture.

    Raises:
        ValueError: If it cannot be read; says why.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{sidecar} is not UTF-8 ({error.reason} at byte {error.start})") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    caption = _caption_in_json(sidecar, text) if sidecar.endswith(".json") else text.strip()
    if fault := _fault_of_text(caption):
        raise ValueError(f"{sidecar}: {fault}")
    return caption


def _caption_in_json(sidecar: str, text: str) -> str:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{sidecar} is no JSON ({error})") from None
    names = [name for name in CAPTION_COLUMNS if isinstance(value, dict) and isinstance(value.get(name), str)]
    if not names:
        raise ValueError(f"{sidecar} has no text under {', '.join(CAPTION_COLUMNS)}")
    return str(value[names[0]])
