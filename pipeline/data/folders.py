"""Reads a folder of pictures with captions, in the usual layouts of image-text datasets, here or in an object store.

The captions of a picture are the first of these:

1. Its rows in a metadata file: ``metadata.csv``, ``.jsonl`` or ``.parquet`` with a ``file_name`` column (Hugging Face
   ImageFolder), in the picture's folder or in one above it, the nearest first; or the annotations of COCO
   (``captions_*.json``), of Flickr8k (``captions.txt``, ``Flickr8k.token.txt``), of Flickr30k (``results.csv``,
   ``results_20130124.token``) or Karpathy's (``dataset_*.json``), anywhere, by the name of the picture alone.
2. The file next to it with its name and ``.txt``, ``.caption`` or ``.json``.
3. The words of its file name.

In memory are the names of all metadata files, the captions of those files and annotations that a picture may be in,
the names of a folder's sub-folders, and of its files those of a page, of the next folders up to a million
(``pipeline.workspace.trees``), and those from a picture to the file next to it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import accumulate, pairwise
from pathlib import PurePosixPath
from typing import IO, Any

import pyarrow as pa

from pipeline.data.delimited import csv_records, lines_of
from pipeline.data.json_lists import json_records, parse_json
from pipeline.data.list_columns import CAPTION_COLUMNS, NO_CAPTIONS, ListColumns, find_column
from pipeline.data.lists import BATCH_ROWS, Span, explain_damage, file_columns, kind_of, open_text, read_span
from pipeline.data.reading import MAX_CELL, Reading, has_surrogates, within_limit
from pipeline.errors import DataError
from pipeline.workspace.trees import Page, Stretch, Tree, in_reading_order

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
NAME_COLUMNS = ("file_name", "filename", "image", "image_name", "path", "image_path", "file")
_ANNOTATIONS = ("captions_*.json", "dataset_*.json")
_TOKENS = ("*.token", "*.token.txt")
_TABLES = {"captions.txt": ",", "results.csv": "|"}
_SOURCES = ("metadata", "sidecar", "name")
_SIDECARS = (".txt", ".caption", ".json")
_SIDECARS_AT_ONCE = 1000
_PART_PICTURES = 1_000_000

Row = tuple[str, str, str]
"""URL, caption, and where the caption is from."""


@dataclass
class _Metadata:
    """Captions of one metadata file, by the picture's path from the file's folder, or by its name alone."""

    captions: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    by_name_alone: bool = False
    matched: set[str] = field(default_factory=set[str])

    def add(self, name: str, caption: str | None) -> None:
        key = PurePosixPath(name.replace("\\", "/")).as_posix()  # without ./ and doubled slashes
        self.captions.setdefault(key.rpartition("/")[2] if self.by_name_alone else key, []).append(caption or "")

    def find(self, picture: str, folder: str) -> list[str]:
        key = picture.rpartition("/")[2] if self.by_name_alone else picture[len(folder) :].lstrip("/")
        if key in self.captions:
            self.matched.add(key)
        return self.captions.get(key, [])


@dataclass(frozen=True)
class FolderPart:
    """A part of a folder that is read by itself."""

    stretch: Stretch
    caption_files: tuple[str, ...]
    """Paths of the metadata files and annotations that may hold captions of its pictures."""


def folder_parts(folder: str, *, is_cut: bool = True) -> list[FolderPart]:
    """The parts of a folder, in the order of its pairs: about a million pictures each.

    The folder is listed once, in any order; of each thousand names the first is remembered.

    Args:
        folder: Path or URI of the folder.
        is_cut: Whether it may have several parts.

    Raises:
        ConfigError: If a store cannot be reached; says what to set.
        DataError: If the folder has no pictures.
    """
    tree = Tree(folder)
    _require_folder(tree)
    firsts, caption_files, nested = list[tuple[str, int]](), list[str](), set[str]()
    for names in tree.runs():
        caption_files += [name for name in names if _has_captions(name)]
        _add_nested(nested, names)
        pictures = [name for name in names if _is_picture(name)]
        if pictures:
            firsts.append((min(pictures, key=in_reading_order), len(pictures)))
    if not firsts:
        raise _no_pictures(tree)
    cuts, num_since = [""], 0
    for first, count in sorted(firsts, key=lambda one: in_reading_order(one[0])) if is_cut else ():
        place = _place_to_cut(first)
        if num_since >= _PART_PICTURES and in_reading_order(place) > in_reading_order(cuts[-1]):
            cuts.append(place)
            num_since = 0
        num_since += count
    caption_files.sort(key=in_reading_order)
    parts: list[FolderPart] = []
    for cut, stop in pairwise([*cuts, ""]):
        stretch = Stretch(cut, stop, is_flat=bool(cut) and cut.rpartition("/")[0] not in nested)
        own = [one for one in caption_files if _is_annotation(one) or stretch.has_some_of(one.rpartition("/")[0])]
        parts.append(FolderPart(stretch, tuple(own)))
    return parts


def read_folder(
    folder: str, caption_column: str, reading: Reading, part: FolderPart | None = None
) -> Iterator[pa.Table]:
    """Stream the pairs of a folder, by the relative paths of the pictures: files before folders.

    Args:
        folder: Path or URI of the folder.
        caption_column: Column of the metadata files that holds the caption; empty: found by its name.
        part: One of ``folder_parts``; None: the whole folder.
        reading: Counts pictures that are left out; its notes count pairs by the source of their caption
            (``captions_from_metadata``, ``_sidecar``, ``_name``), rows of metadata and captions of annotations that
            are left out (``malformed_metadata``), and metadata names without a picture (``metadata_without_picture``)
            or, in annotations of a folder of several parts, not compared (``annotations_not_compared``).

    Yields:
        Tables of ``url`` (``file://``, or the picture's URI in a store), ``caption`` and ``caption_source`` (metadata,
        sidecar or name).

    Raises:
        ConfigError: If a store cannot be reached; says what to set.
        DataError: If the folder has no pictures, or a metadata file lacks a column.
    """
    if part is None:
        part = folder_parts(folder, is_cut=False)[0]
    for source in _SOURCES:
        reading.notes[f"captions_from_{source}"] = 0
    reader = _Reader(Tree(folder), caption_column, reading, part)
    rows: list[Row] = []
    with explain_damage(folder):
        for row in within_limit(reader.rows(), reading):
            reading.notes[f"captions_from_{row[2]}"] += 1
            rows.append(row)
            if len(rows) >= BATCH_ROWS:
                yield _table(rows)
                rows = []
    yield _table(rows)


def count_pictures(folder: str) -> int:
    """Number of pictures below a folder.

    Raises:
        ConfigError: If a store cannot be reached; says what to set.
        DataError: If there is none.
    """
    tree = Tree(folder)
    _require_folder(tree)
    count = sum(_is_picture(name) for name in tree.files())
    if not count:
        raise _no_pictures(tree)
    return count


def has_pictures(folder: str) -> bool:
    """Whether there is a picture in a folder or below it; False if there is no such folder."""
    tree = Tree(folder)
    return tree.exists() and any(_is_picture(name) for name in tree.files())


def _require_folder(tree: Tree) -> None:
    if not tree.exists():
        raise DataError(f"{tree.uri}: no such folder")


def _no_pictures(tree: Tree) -> DataError:
    return DataError(f"{tree.uri}: no pictures ({' '.join(sorted(PICTURE_SUFFIXES))}) in it or below it")


def _has_captions(file: str) -> bool:
    return file.rpartition("/")[2] in METADATA or _is_annotation(file)


def _is_annotation(file: str) -> bool:
    name = file.rpartition("/")[2]
    return name not in METADATA and any(fnmatch(name, pattern) for pattern in (*_ANNOTATIONS, *_TOKENS, *_TABLES))


def _add_nested(nested: set[str], names: Sequence[str]) -> None:
    """Add the folders that have sub-folders with some files."""
    for name in {name.rpartition("/")[0] for name in names}:
        folder = name
        while folder:
            folder = folder.rpartition("/")[0]
            if folder in nested:
                break
            nested.add(folder)


def _place_to_cut(picture: str) -> str:
    """The place before a picture and the files beside it, whose names are equal up to the last dot."""
    folder, slash, name = picture.rpartition("/")
    return f"{folder}{slash}{name.rpartition('.')[0]}."


class _Waiting:
    """Names of a folder's files that wait for the files next to them; names come, and leave, in their order.

    The names of ``a.jpg``, of the files next to it, and of all files between them begin with ``a.``.
    """

    def __init__(self) -> None:
        self._names = list[str]()
        """From the first picture that waits."""
        self._sidecars = list[str]()
        """Those before it that may be next to a picture that is still to come."""

    def add(self, names: Sequence[str]) -> list[str]:
        """Add the next names; returns those that wait no longer, with the files next to them."""
        is_blocked = bool(self._names)
        self._names += names
        if not names or (is_blocked and self._waits(self._names[0])):
            return []
        end = next(
            (place for place, name in enumerate(self._names) if self._waits(name) and _is_picture(name)),
            len(self._names),
        )
        ready = [*self._sidecars, *self._names[:end]]
        self._sidecars = [name for name in ready if name.endswith(_SIDECARS) and self._waits(name)]
        self._names = self._names[end:]
        return ready

    def rest(self) -> list[str]:
        """The names that wait, when there are no more."""
        return [*self._sidecars, *self._names]

    def _waits(self, name: str) -> bool:
        """Whether a file next to this one may come behind the last one."""
        return self._names[-1].startswith(f"{name.rpartition('.')[0]}.")


def _sidecars_over_edges(tree: Tree, stretch: Stretch) -> dict[str, list[str]]:
    """Files with captions that may lie on the other side of a stretch's ends than their pictures, by folder.

    The files next to ``a.jpg`` lie around ``a.b.jpg``, where a stretch may begin with ``a.b.``.
    """
    found: dict[str, list[str]] = {}
    for edge in (stretch.first, stretch.stop):
        folder, _, name = edge.rpartition("/")
        stems = accumulate(name.split(".")[:-2], lambda stem, part: f"{stem}.{part}")
        names = [stem + suffix for stem in stems for suffix in _SIDECARS]
        found.setdefault(folder, []).extend(name for name in names if tree.has(_joined(folder, name)))
    return found


class _Reader:
    """Reads the rows of one folder, or of a part of it, and counts what is strange."""

    def __init__(self, tree: Tree, column: str, reading: Reading, part: FolderPart) -> None:
        self._tree = tree
        self._column = column
        self._reading = reading
        self._part = part
        self._stretch = part.stretch
        self._metadata: dict[str, str] = {}
        """Name of the metadata file of each folder that has one."""
        self._annotations: list[tuple[str, _Metadata]] = []
        self._over_edges = _sidecars_over_edges(tree, part.stretch)

    def rows(self) -> Iterator[Row]:
        """The rows of all pictures."""
        if self._column != NO_CAPTIONS:
            self._open_caption_files()
        yield from self._rows_of("", self._tree.pages("", self._stretch), [])
        for file, one in self._annotations:
            self._count_unmatched(file, "", one)

    def _open_caption_files(self) -> None:
        for file in self._part.caption_files:
            folder, _, name = file.rpartition("/")
            if _is_annotation(file):
                self._annotations.append((file, _read_annotations(self._tree.place(file), self._reading_of(file))))
            else:
                self._metadata[folder] = min(name, self._metadata.get(folder, name), key=METADATA.index)

    def _rows_of(self, folder: str, pages: Iterator[Page], above: list[tuple[str, _Metadata]]) -> Iterator[Row]:
        """The rows of the pictures in a folder and below it.

        Args:
            folder: The folder.
            pages: Its entries.
            above: Metadata of the folders above it, the nearest first.
        """
        metadata: list[tuple[str, _Metadata]] = []
        own = _joined(folder, self._metadata.get(folder, ""))
        if folder in self._metadata:
            metadata = [(folder, _read_metadata(self._tree.place(own), self._column, self._reading_of(own)))]
        folders: list[str] = []
        for names in self._groups(folder, pages, folders):
            yield from self._rows_of_files(folder, names, [*metadata, *above])
        places = [_joined(folder, name) for name in sorted(folders)]  # a store sorts them with a slash at their ends
        for place, own_pages in zip(places, self._tree.pages_of(places, self._stretch), strict=True):
            yield from self._rows_of(place, own_pages, [*metadata, *above])
        for _, one in metadata:
            self._count_unmatched(own, folder, one)

    def _reading_of(self, file: str) -> Reading:
        """Counts what is strange in a caption file, which is read for several parts: that which has it counts."""
        return self._reading if self._stretch.has(file) else Reading()

    def _count_unmatched(self, file: str, folder: str, metadata: _Metadata) -> None:
        """Count the names in a metadata file that no picture has, and give the first as an example.

        If its folder is cut into several parts, each part counts the names that it would have. Annotations say no
        folder of a picture, so that no part can tell: their names are counted as not compared.
        """
        is_whole = self._stretch.has_all_of(folder)
        if metadata.by_name_alone and not is_whole:
            own = self._stretch.has(file)
            self._reading.notes["annotations_not_compared"] += len(metadata.captions) if own else 0
            return
        unmatched = [name for name in metadata.captions if name not in metadata.matched]
        if not is_whole:
            unmatched = [name for name in unmatched if self._stretch.has(_joined(folder, name))]
        self._reading.notes["metadata_without_picture"] += len(unmatched)
        if unmatched:
            reason = f"names {len(unmatched)} files that are no pictures here, such as {unmatched[0]}"
            self._reading.name(0, reason, self._tree.place(file))

    def _groups(self, folder: str, pages: Iterator[Page], folders: list[str]) -> Iterator[list[str]]:
        """Names of a folder's files; a picture and the file next to it come together.

        Args:
            folder: The folder.
            pages: Its entries.
            folders: Receives the names of its sub-folders.
        """
        waiting = _Waiting()
        for page in pages:
            folders += [name for name in page.folders if name]
            if "" in page.folders:
                where = f"{self._tree.place(folder).rstrip('/')}//"
                self._reading.malformed(0, "a folder without a name is left out: rename what is in it", where)
            self._count_lost(folder, page.lost)
            yield waiting.add(page.files)
        yield waiting.rest()

    def _count_lost(self, folder: str, links: Sequence[str]) -> None:
        """Count links that lead to no file: a picture, or a file with captions, is lost with each."""
        for name in links:
            place, reason = self._tree.place(_joined(folder, name)), "a link that leads to no file"
            if _is_picture(name):
                self._reading.malformed(0, reason, place)
            elif name.endswith(_SIDECARS) or _has_captions(name):
                self._reading.notes["malformed_metadata"] += 1
                self._reading.name(0, reason, place)

    def _rows_of_files(
        self, folder: str, names: list[str], nearest_first: list[tuple[str, _Metadata]]
    ) -> Iterator[Row]:
        pictures, others = [name for name in names if _is_picture(name)], {*names, *self._over_edges.get(folder, ())}
        for start in range(0, len(pictures), _SIDECARS_AT_ONCE):
            some = pictures[start : start + _SIDECARS_AT_ONCE]
            captions = {one: self._captions_of(_joined(folder, one), folder, nearest_first) for one in some}
            sidecars = {one: name for one in some if not captions[one] and (name := _sidecar_of(one, others))}
            contents = self._tree.read([_joined(folder, name) for name in sidecars.values()])
            texts = dict(zip(sidecars, contents, strict=True))
            for picture in some:
                file, source = _joined(folder, picture), "metadata"
                if picture in sidecars:
                    source = "sidecar"
                    captions[picture] = self._caption_in(sidecars[picture], texts[picture], file)
                elif not captions[picture]:
                    source = "name"
                    captions[picture] = [_caption_by_name(picture)]
                if captions[picture]:
                    url = self._tree.url(file)
                    yield from ((url, caption, source) for caption in captions[picture])

    def _caption_in(self, sidecar: str, content: bytes, picture: str) -> list[str]:
        """The caption in the file next to a picture; none if it cannot be read."""
        try:
            return [_caption_in(sidecar, content)]
        except ValueError as error:
            self._reading.malformed(0, str(error), self._tree.place(picture))
            return []

    def _captions_of(self, picture: str, folder: str, nearest_first: list[tuple[str, _Metadata]]) -> list[str]:
        """Captions of a picture in metadata files and annotations; may be none."""
        captions = next((texts for place, one in nearest_first if (texts := one.find(picture, place))), [])
        return captions or [caption for _, one in self._annotations for caption in one.find(picture, folder)]


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in PICTURE_SUFFIXES


def _joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _table(rows: Sequence[Row]) -> pa.Table:
    names = ("url", "caption", "caption_source")
    columns = zip(*rows, strict=True) if rows else [[]] * len(names)
    return pa.table({name: pa.array(values, pa.string()) for name, values in zip(names, columns, strict=True)})


def _read_metadata(file: str, caption_column: str, reading: Reading) -> _Metadata:
    names = file_columns(file)
    name_column = find_column(names, "", NAME_COLUMNS, file)
    caption = find_column(names, caption_column, CAPTION_COLUMNS, file)
    metadata, own_reading, num_nameless = _Metadata(), Reading(), 0
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


def _read_annotations(file: str, reading: Reading) -> _Metadata:
    metadata, own_reading = _Metadata(by_name_alone=True), Reading()
    own_reading.begin(file)
    with explain_damage(file), open_text(file) as stream:
        read = _annotation_records if file.endswith(".json") else _annotation_lines
        for number, name, caption in read(file, stream, own_reading):
            if fault := _fault_of(name, caption):
                own_reading.malformed(number, fault)
            else:
                metadata.add(name, caption.strip())
    _take_over(reading, own_reading)
    return metadata


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
        if len(cells) > 1 and _is_picture(name):
            yield number, name, cells[-1]
        elif number > 1:  # the first line may be a header
            own_reading.malformed(number, "no name of a picture with a caption")


def _sidecar_of(picture: str, names: set[str]) -> str:
    """The file next to a picture that holds its caption; empty if there is none."""
    stem = PurePosixPath(picture).stem
    return next((stem + suffix for suffix in _SIDECARS if stem + suffix in names), "")


def _caption_by_name(picture: str) -> str:
    words = re.sub(r"[^\w]+|_+", " ", PurePosixPath(picture).stem).strip()
    return re.sub(r"\s*\d+$", "", words) or words


def _caption_in(sidecar: str, content: bytes) -> str:
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
