"""The sources of pairs: each is cut into pieces that workers read independently of one another."""

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from pipeline.data.captions import context_length
from pipeline.data.drawn import drawn_batches
from pipeline.data.folders import FolderPart, count_pictures, folder_parts, read_folder
from pipeline.data.list_columns import ListColumns
from pipeline.data.lists import Span, count_list_rows, explain_damage, extra_schemas, list_spans, read_span
from pipeline.data.pairs import Part, cast_column, common_types
from pipeline.data.reading import Reading
from pipeline.data.tars import count_samples, tar_files, tar_tables
from pipeline.errors import DataError
from pipeline.recipe.pairs_sections import PairsConfig
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.sections import PAIRS_COLUMNS
from pipeline.workspace.files import UserFile, local_copy
from pipeline.workspace.trees import Stretch

PIECE_BYTES = 256 << 20
"""Files are read together, and cut where their format allows it, up to this size."""


@dataclass(frozen=True)
class Source:
    """A source of pairs, as the recipe names it."""

    config: PairsConfig
    """The recipe's section."""
    seed: int = 0
    """The recipe's seed."""
    extra_columns: tuple[str, ...] = ()
    """Columns of a list that are kept beside URL and caption."""
    context_length: int = 0
    """Tokens of a caption that CLIP reads; 0: captions are not measured."""

    def pieces(self) -> list[list[Span]]:
        """The pieces, in the order of the source; each is of one list.

        Each tar is one; so is a drawn source, a folder up to a million pictures, and what has ``max_pairs``.

        Raises:
            DataError: If the source is missing or of no known format.
        """
        pieces: list[list[Span]] = []
        for number, config in enumerate(self.config.each()):
            with named_list(self.config, number):
                pieces += [[replace(span, list_number=number) for span in piece] for piece in _pieces(config)]
        return pieces

    def read(self, piece: Sequence[Span], reading: Reading) -> Iterator[pa.Table]:
        """Stream the rows of a piece.

        Args:
            piece: One of ``pieces``.
            reading: Counts the rows that are left out; its limit counts all rows.

        Yields:
            Tables of ``url`` and ``caption`` (strings or nulls) and other columns.

        Raises:
            DataError: If the source is damaged or lacks a column.
        """
        number = list_of(piece)
        with named_list(self.config, number):
            yield from self._read(self.config.each()[number], piece, reading)

    def _read(self, config: PairsConfig, piece: Sequence[Span], reading: Reading) -> Iterator[pa.Table]:
        if config.source == "drawn":
            for batch in drawn_batches(config.drawn, self.seed):
                yield batch.slice(0, reading.take(batch.num_rows))
                if reading.is_full:
                    return
        elif config.source == "folder":
            stretch = Stretch(piece[0].first_path, piece[0].stop_path, piece[0].is_flat)
            part = FolderPart(stretch, tuple(piece[0].caption_files))
            yield from read_folder(config.path, config.caption_column, reading, part)
        elif config.source == "shards":
            reading.begin(piece[0].uri)
            with explain_damage(piece[0].uri), local_copy(piece[0].uri) as tar:
                yield from tar_tables(tar, self.extra_columns, reading)
        else:
            columns = ListColumns(config.url_column, config.caption_column, self.extra_columns)
            types = common_types(extra_schemas(piece, columns))
            for span in piece:
                if reading.is_full:
                    return
                for table in read_span(span, columns, reading):
                    by_name = {name: table.column(name) for name in table.column_names}
                    yield pa.table(by_name | {name: cast_column(by_name[name], types[name]) for name in types})


def source_of(recipe: Recipe) -> Source:
    """The source that a recipe names, with the columns that its download reads."""
    length = 0 if recipe.pairs.source == "drawn" else context_length(recipe.clip)
    download = recipe.download
    read = dict.fromkeys([*download.extra_columns, download.blur_column, download.hash_column, ""])
    return Source(recipe.pairs, recipe.seed, tuple(name for name in read if name and name not in PAIRS_COLUMNS), length)


def count_pairs(config: PairsConfig) -> int:
    """About how many rows a source has, without reading them all.

    Raises:
        DataError: If the source is missing or damaged.
    """
    total = 0
    for number, one in enumerate(config.each()):
        with named_list(config, number):
            total += _count_one(one)
    return total


def tars_of(config: PairsConfig, parts: Sequence[Part]) -> dict[str, UserFile]:
    """The tar of each part of the list of pairs; of source shards.

    Raises:
        DataError: If a folder is missing.
    """
    tars: dict[str, UserFile] = {}
    for number, one in enumerate(config.each()):
        with named_list(config, number):
            names = [part.name for part in parts if part.list_number == number]
            tars |= dict(zip(names, tar_files(one.path), strict=False))  # max_pairs leaves tars out
    return tars


def list_of(piece: Sequence[Span]) -> int:
    """Which of the recipe's lists a piece is of, from 0."""
    return piece[0].list_number if piece else 0


@contextlib.contextmanager
def named_list(config: PairsConfig, number: int) -> Generator[None]:
    """Say in an error which of several lists it is about.

    Args:
        config: The recipe's section.
        number: Number of the list, from 0; people count from 1.
    """
    try:
        yield
    except DataError as error:
        if len(config.lists) < 2:
            raise
        raise DataError(f"list {number + 1} of pairs.lists: {error}") from error


def _count_one(config: PairsConfig) -> int:
    if config.source == "drawn":
        return config.drawn.num_pairs + config.drawn.num_faulty
    if config.source == "shards":
        count = count_samples(config.path)
    else:
        count = count_list_rows(config.path) if config.source == "list" else count_pictures(config.path)
    return min(count, config.max_pairs or count)


def _pieces(config: PairsConfig) -> list[list[Span]]:
    """The pieces of one list."""
    if config.source == "shards":
        tars = tar_files(config.path)
        return [[Span(tar.uri, num_bytes=tar.num_bytes)] for tar in tars[: config.max_pairs or None]]
    if config.source == "folder":
        parts = folder_parts(config.path, is_cut=not config.max_pairs)
        return [[_span_of(config.path, part)] for part in parts]
    if config.source != "list":
        return [[Span(config.path)]]
    if config.max_pairs:
        return [list_spans(config.path)]
    return _group(list_spans(config.path, PIECE_BYTES))


def _span_of(folder: str, part: FolderPart) -> Span:
    stretch = part.stretch
    return Span(
        folder,
        first_path=stretch.first,
        stop_path=stretch.stop,
        is_flat=stretch.is_flat,
        caption_files=part.caption_files,
    )


def _group(spans: Sequence[Span]) -> list[list[Span]]:
    """Consecutive spans together, up to ``PIECE_BYTES``."""
    pieces: list[list[Span]] = []
    size = 0
    for span in spans:
        if not pieces or size + span.num_bytes > PIECE_BYTES:
            pieces.append([])
            size = 0
        pieces[-1].append(span)
        size += span.num_bytes
    return pieces
