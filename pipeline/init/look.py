"""A look at a person's pairs: what they are, about how many, and what is odd about them."""

from collections import Counter
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import pyarrow.compute

from pipeline.data.caption_files import PICTURE_SUFFIXES
from pipeline.data.captions import MOST_CAPTIONS
from pipeline.data.folders import has_pictures
from pipeline.data.list_columns import CAPTION_COLUMNS, NO_CAPTIONS, URL_COLUMNS, find_column
from pipeline.data.lists import FORMATS, format_of, list_columns, list_files
from pipeline.data.reading import Reading, name_examples
from pipeline.data.sources import Source, count_pairs
from pipeline.errors import ConfigError, DataError
from pipeline.recipe.pairs_sections import PairsConfig
from pipeline.workspace.files import exists, find_files

pc: Any = pyarrow.compute  # its functions are made when it is imported
_MOST_ROWS = 100_000
"""Rows that are read; the number of further ones is estimated."""


@dataclass(frozen=True)
class Look:
    """What a source holds."""

    pairs: PairsConfig
    """The section of a recipe."""
    num_pairs: int
    """Its pairs; an estimate if it is large."""
    is_estimate: bool
    """Whether only the first rows were read."""
    kind: str
    """What they are, for a person."""
    remarks: list[str]
    """What is odd about the rows that were read, for a person."""
    captions: tuple[str, ...]
    """The first captions."""

    @property
    def count(self) -> str:
        """The number of pairs, for a person."""
        return f"about {self.num_pairs}" if self.is_estimate else str(self.num_pairs)

    @property
    def text(self) -> str:
        """What it holds, for a person."""
        return f"{self.count} {self.kind}"


def look_at(source: str, url_column: str, caption_column: str) -> Look:
    """Look at a list or a folder.

    Args:
        source: The list or the folder.
        url_column: Column of the URLs; empty: found by its name.
        caption_column: Column of the captions; empty: found by its name.

    Raises:
        ConfigError: If there is no such source, or a column is not found; names the existing ones.
        DataError: If it cannot be read, or holds no pair.
    """
    pairs, kind = _section(source, url_column, caption_column)
    reading, notes, captions, is_whole = _read(Source(pairs))
    num_rows = reading.counts["in"] + notes["rows"]
    num_pairs = notes["rows"] if is_whole else count_pairs(pairs)
    if not notes["rows"]:
        raise DataError(f"{source}: holds no pairs" + (f" among {num_rows} rows" if num_rows else ""))
    return Look(pairs, num_pairs, not is_whole, kind, _remarks(pairs, reading, notes, num_rows), captions)


def _section(source: str, url_column: str, caption_column: str) -> tuple[PairsConfig, str]:
    """The pairs section of a source, and what it holds, for a person."""
    if not exists(source):
        raise ConfigError(f"{source}: no such list or folder")
    if has_pictures(source):
        return PairsConfig(source="folder", path=source, caption_column=caption_column), "pictures in a folder"
    dead_links = list[str]()
    suffixes = {PurePath(file.uri).suffix.lower() for file in find_files(source, dead_links)}
    if not suffixes and not dead_links:
        pictures, lists = " ".join(sorted(PICTURE_SUFFIXES)), " ".join(f".{name}" for name in FORMATS)
        raise ConfigError(f"{source}: this folder holds no pictures ({pictures}), lists ({lists}) or shards (.tar)")
    if ".tar" in suffixes:
        return PairsConfig(source="shards", path=source), "pictures in shards (*.tar), which are taken in as they are"
    names = list_columns(source)
    url = _find(names, url_column, URL_COLUMNS, source, "name one with --url-column")
    if caption_column == NO_CAPTIONS or format_of(list_files(source)[0].uri) == "txt":
        pairs = PairsConfig(source="list", path=source, url_column=url, caption_column=NO_CAPTIONS)
        return pairs, f"rows (url: {url}; no captions: nothing can be trained to follow a text)"
    hint = f"name one with --caption-column, or say that there is none with --caption-column {NO_CAPTIONS}"
    caption = _find(names, caption_column, CAPTION_COLUMNS, source, hint)
    pairs = PairsConfig(source="list", path=source, url_column=url, caption_column=caption)
    return pairs, f"rows (url: {url}, caption: {caption})"


def _find(names: list[str], requested: str, usual: tuple[str, ...], source: str, hint: str) -> str:
    try:
        return find_column(names, requested, usual, source)
    except DataError as error:
        raise ConfigError(f"{error}: {hint}") from None


def _read(source: Source) -> tuple[Reading, Counter[str], tuple[str, ...], bool]:
    """Read the first rows: what was left out, numbers of rows, the first captions, and whether that was all."""
    reading, notes, first = Reading(), Counter[str](), list[str]()
    for piece in source.pieces():
        for table in source.read(piece, reading):
            notes["rows"] += table.num_rows
            captions = pc.utf8_trim_whitespace(table.column("caption").fill_null(""))
            first += captions.slice(0, MOST_CAPTIONS - len(first)).to_pylist()
            notes["empty"] += pc.sum(pc.equal(captions, "")).as_py() or 0
            if notes["rows"] >= _MOST_ROWS:
                return reading, notes, tuple(first), False
    return reading, notes, tuple(first), True


def _remarks(pairs: PairsConfig, reading: Reading, notes: Counter[str], num_rows: int) -> list[str]:
    remarks: list[str] = []
    if notes["empty"] and pairs.caption_column != NO_CAPTIONS:
        remarks.append(f"{notes['empty']} of {notes['rows']} captions are empty")
    if pairs.source == "folder":
        origins = {"metadata": "metadata files", "sidecar": "files beside them", "name": "the pictures' names"}
        counts = [
            f"{n} from {words}" for name, words in origins.items() if (n := reading.notes[f"captions_from_{name}"])
        ]
        remarks.append(f"captions: {', '.join(counts)}")
        if unmatched := reading.notes["metadata_without_picture"]:
            remarks.append(f"{unmatched} names in metadata files are no pictures here")
        if not_read := reading.notes["metadata_not_read"]:
            remarks.append(f"{not_read} files of metadata or annotations are not read")
    malformed, captions = reading.counts["malformed"], reading.notes["malformed_metadata"]
    counts = [f"{malformed} of {num_rows} rows"] if malformed else []
    counts += [f"{captions} captions in metadata and annotations"] if captions else []
    if counts:
        remarks.append(f"{' and '.join(counts)} cannot be read, such as {name_examples([reading])[0]}")
    return remarks
