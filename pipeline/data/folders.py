"""Reads a folder of pictures with captions, in the usual layouts of image-text datasets, here or in an object store.

The captions of a picture are the first of these:

1. Its rows in a metadata file: ``metadata.csv``, ``.jsonl`` or ``.parquet`` with a ``file_name`` column (Hugging Face
   ImageFolder), in the picture's folder or in one above it, the nearest first; or the annotations of COCO
   (``captions_*.json``), of Flickr8k (``captions.txt``, ``Flickr8k.token.txt``), of Flickr30k (``results.csv``,
   ``results_20130124.token``) or Karpathy's (``dataset_*.json``), anywhere, by the name of the picture alone.
   Of several metadata files in a folder the first by name is read.
2. The file next to it with its name and ``.txt``, ``.caption`` or ``.json``.
3. The words of its file name.

In memory are the names of all metadata files, the captions of those files and annotations that a picture may be in,
the names of a folder's sub-folders, and of its files those of a page, of the next folders up to a million
(``pipeline.workspace.trees``), and those from a picture to the file next to it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import pyarrow as pa

from pipeline.data.caption_files import (
    PICTURE_SUFFIXES,
    SIDECARS,
    Metadata,
    caption_by_name,
    caption_in,
    has_captions,
    is_annotation,
    is_picture,
    leave_out_file,
    read_annotations,
    read_metadata,
    sidecar_of,
)
from pipeline.data.list_columns import NO_CAPTIONS
from pipeline.data.lists import BATCH_ROWS, explain_damage
from pipeline.data.reading import Reading, within_limit
from pipeline.errors import DataError
from pipeline.workspace.trees import Page, Stretch, Tree, in_reading_order

_SOURCES = ("metadata", "sidecar", "name")
_SIDECARS_AT_ONCE = 1000
_PART_PICTURES = 1_000_000

Row = tuple[str, str, str]
"""URL, caption, and where the caption is from."""


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
        caption_files += [name for name in names if has_captions(name)]
        _add_nested(nested, names)
        pictures = [name for name in names if is_picture(name)]
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
        own = [one for one in caption_files if is_annotation(one) or stretch.has_some_of(one.rpartition("/")[0])]
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
            are left out (``malformed_metadata``), files of both that are not read (``metadata_not_read``), and metadata
            names without a picture (``metadata_without_picture``) or, in annotations of a folder of several parts, not
            compared (``annotations_not_compared``).

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
    count = sum(is_picture(name) for name in tree.files())
    if not count:
        raise _no_pictures(tree)
    return count


def has_pictures(folder: str) -> bool:
    """Whether there is a picture in a folder or below it; False if there is no such folder."""
    tree = Tree(folder)
    return tree.exists() and any(is_picture(name) for name in tree.files())


def _require_folder(tree: Tree) -> None:
    if not tree.exists():
        raise DataError(f"{tree.uri}: no such folder")


def _no_pictures(tree: Tree) -> DataError:
    return DataError(f"{tree.uri}: no pictures ({' '.join(sorted(PICTURE_SUFFIXES))}) in it or below it")


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
            (place for place, name in enumerate(self._names) if self._waits(name) and is_picture(name)),
            len(self._names),
        )
        ready = [*self._sidecars, *self._names[:end]]
        self._sidecars = [name for name in ready if name.endswith(SIDECARS) and self._waits(name)]
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
    sidecars: dict[str, list[str]] = {}
    for edge in (stretch.first, stretch.stop):
        folder, _, name = edge.rpartition("/")
        stems = accumulate(name.split(".")[:-2], lambda stem, part: f"{stem}.{part}")
        names = [stem + suffix for stem in stems for suffix in SIDECARS]
        sidecars.setdefault(folder, []).extend(name for name in names if tree.has(_joined(folder, name)))
    return sidecars


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
        self._annotations: list[tuple[str, Metadata]] = []
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
            if is_annotation(file):
                self._annotations.append((file, read_annotations(self._tree.place(file), self._reading_of(file))))
            else:
                first = self._metadata.setdefault(folder, name)  # the files come in the order of their names
                if first != name:
                    reading = self._reading_of(file)
                    leave_out_file(self._tree.place(file), f"{first} in the same folder is", reading)

    def _rows_of(self, folder: str, pages: Iterator[Page], above: list[tuple[str, Metadata]]) -> Iterator[Row]:
        """The rows of the pictures in a folder and below it.

        Args:
            folder: The folder.
            pages: Its entries.
            above: Metadata of the folders above it, the nearest first.
        """
        metadata: list[tuple[str, Metadata]] = []
        own = _joined(folder, self._metadata.get(folder, ""))
        if folder in self._metadata:
            metadata = [(folder, read_metadata(self._tree.place(own), self._column, self._reading_of(own)))]
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

    def _count_unmatched(self, file: str, folder: str, metadata: Metadata) -> None:
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
            self._count_lost(folder, page.dead_links)
            yield waiting.add(page.files)
        yield waiting.rest()

    def _count_lost(self, folder: str, links: Sequence[str]) -> None:
        """Count links that lead to no file: a picture, or a file with captions, is lost with each."""
        for name in links:
            place, reason = self._tree.place(_joined(folder, name)), "a link that leads to no file"
            if is_picture(name):
                self._reading.malformed(0, reason, place)
            elif name.endswith(SIDECARS) or has_captions(name):
                self._reading.notes["malformed_metadata"] += 1
                self._reading.name(0, reason, place)

    def _rows_of_files(self, folder: str, names: list[str], nearest_first: list[tuple[str, Metadata]]) -> Iterator[Row]:
        pictures, others = [name for name in names if is_picture(name)], {*names, *self._over_edges.get(folder, ())}
        for start in range(0, len(pictures), _SIDECARS_AT_ONCE):
            some = pictures[start : start + _SIDECARS_AT_ONCE]
            captions = {one: self._captions_of(_joined(folder, one), folder, nearest_first) for one in some}
            sidecars = {one: name for one in some if not captions[one] and (name := sidecar_of(one, others))}
            contents = self._tree.read([_joined(folder, name) for name in sidecars.values()])
            texts = dict(zip(sidecars, contents, strict=True))
            for picture in some:
                file, source = _joined(folder, picture), "metadata"
                if picture in sidecars:
                    source = "sidecar"
                    captions[picture] = self._caption_in(sidecars[picture], texts[picture], file)
                elif not captions[picture]:
                    source = "name"
                    captions[picture] = [caption_by_name(picture)]
                if captions[picture]:
                    url = self._tree.url(file)
                    yield from ((url, caption, source) for caption in captions[picture])

    def _caption_in(self, sidecar: str, content: bytes, picture: str) -> list[str]:
        """The caption in the file next to a picture; none if it cannot be read."""
        try:
            return [caption_in(sidecar, content)]
        except ValueError as error:
            self._reading.malformed(0, str(error), self._tree.place(picture))
            return []

    def _captions_of(self, picture: str, folder: str, nearest_first: list[tuple[str, Metadata]]) -> list[str]:
        """Captions of a picture in metadata files and annotations; may be none."""
        captions = next((texts for place, one in nearest_first if (texts := one.find(picture, place))), [])
        return captions or [caption for _, one in self._annotations for caption in one.find(picture, folder)]


def _joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _table(rows: Sequence[Row]) -> pa.Table:
    names = ("url", "caption", "caption_source")
    columns = zip(*rows, strict=True) if rows else [[]] * len(names)
    return pa.table({name: pa.array(values, pa.string()) for name, values in zip(names, columns, strict=True)})
