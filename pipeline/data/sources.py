"""The sources of pairs: each is cut into pieces that workers read independently of one another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipeline.data.captions import context_length
from pipeline.data.drawn import drawn_batches
from pipeline.data.folders import count_pictures, read_folder
from pipeline.data.list_columns import OWN_COLUMNS, ListColumns
from pipeline.data.lists import Span, count_list_rows, explain_damage, extra_schemas, list_spans, read_span
from pipeline.data.pairs import cast_column, common_types
from pipeline.data.reading import Reading
from pipeline.data.tars import count_samples, tar_files, tar_tables
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.sections import PairsConfig
from pipeline.workspace.files import local_copy

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
    """Columns of a list that are kept besides URL and caption."""
    context_length: int = 0
    """Tokens of a caption that CLIP reads; 0: captions are not measured."""

    def pieces(self) -> list[list[Span]]:
        """The pieces, in the order of the source.

        Each tar is one; so is a drawn source, a folder, and a list with ``max_pairs``.

        Raises:
            DataError: If the source is missing or of no known format.
        """
        if self.config.source == "shards":
            tars = tar_files(self.config.path)
            return [[Span(tar.uri, num_bytes=tar.num_bytes)] for tar in tars[: self.config.max_pairs or None]]
        if self.config.source != "list":
            return [[]]
        if self.config.max_pairs:
            return [list_spans(self.config.path)]
        return _group(list_spans(self.config.path, PIECE_BYTES))

    def read(self, piece: Sequence[Span], name: str, reading: Reading) -> Iterator[pa.Table]:
        """Stream the rows of a piece.

        Args:
            piece: One of ``pieces``.
            name: Name of the part of the list that it becomes.
            reading: Counts the rows that are left out.

        Yields:
            Tables of ``url`` and ``caption`` (strings or nulls) and other columns.

        Raises:
            DataError: If the source is damaged or lacks a column.
        """
        config = self.config
        if config.source == "drawn":
            yield from drawn_batches(config.drawn, self.seed)
        elif config.source == "folder":
            yield from read_folder(Path(config.path), config.caption_column, reading)
        elif config.source == "shards":
            reading.begin(piece[0].uri)
            with explain_damage(piece[0].uri), local_copy(piece[0].uri) as tar:
                yield from tar_tables(tar, name, self.extra_columns, reading)
        else:
            columns = ListColumns(config.url_column, config.caption_column, self.extra_columns)
            types = common_types(extra_schemas(piece, columns))
            for span in piece:
                for table in read_span(span, columns, reading):
                    by_name = {name: table.column(name) for name in table.column_names}
                    yield pa.table(by_name | {name: cast_column(by_name[name], types[name]) for name in types})


def source_of(recipe: Recipe) -> Source:
    """The source that a recipe names, with the columns that its download reads."""
    length = 0 if recipe.pairs.source == "drawn" else context_length(recipe.clip)
    download = recipe.download
    read = dict.fromkeys([*download.extra_columns, download.blur_column, download.hash_column, ""])
    return Source(recipe.pairs, recipe.seed, tuple(name for name in read if name and name not in OWN_COLUMNS), length)


def count_pairs(config: PairsConfig) -> int:
    """About how many rows a source has, without reading them all.

    Raises:
        DataError: If the source is missing or damaged.
    """
    if config.source == "drawn":
        return config.drawn.num_pairs + config.drawn.num_faulty
    if config.source == "shards":
        count = count_samples(config.path)
    else:
        count = count_list_rows(config.path) if config.source == "list" else count_pictures(Path(config.path))
    return min(count, config.max_pairs or count)


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
