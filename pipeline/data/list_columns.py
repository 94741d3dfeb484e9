"""The columns of a list: which are read, and how they are found by their names."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import DataError
from pipeline.recipe.sections import PAIRS_COLUMNS

NO_CAPTIONS = "-"
"""Caption column of a list that has none."""
URL_COLUMNS = ("url", "image_url", "img_url", "link", "image", "src", "coco_url", "flickr_url")
CAPTION_COLUMNS = ("caption", "text", "title", "description", "alt_text", "alt", "prompt", "top_caption", "raw")


@dataclass(frozen=True)
class ListColumns:
    """The columns that are read from a list."""

    url: str = ""
    """Column of the URL; empty: found by its name."""
    caption: str = ""
    """Column of the caption; empty: found by its name; ``NO_CAPTIONS``: there is none."""
    extra: tuple[str, ...] = ()
    """Other columns that are kept, under these names; ``source_uid`` is the list's own ``uid``."""

    def find(self, names: Sequence[str], where: str) -> list[str]:
        """The names of URL column, caption column (empty if there is none) and the other columns, as the list has them.

        Raises:
            DataError: If a column is missing, or stands there twice; names the file and the existing columns.
        """
        url = find_column(names, self.url, URL_COLUMNS, where)
        caption = "" if self.caption == NO_CAPTIONS else find_column(names, self.caption, CAPTION_COLUMNS, where)
        existing = [url, caption, *(find_column(names, column_in_list(name), (), where) for name in self.extra)]
        for name in existing:
            if name and list(names).count(name) > 1:
                raise DataError(f"{where}: has column {name} {list(names).count(name)} times; rename all but one")
        return existing


def column_in_list(name: str) -> str:
    """The name in a list of a column that is kept: ``uid`` for ``source_uid``."""
    original = name.removeprefix("source_")
    return original if original in PAIRS_COLUMNS else name


def find_column(names: Sequence[str], requested: str, usual: Sequence[str], where: str) -> str:
    """The column of a list that is meant by a name, whatever its case.

    Args:
        names: Columns of the list.
        requested: The name; empty: the first of ``usual`` that the list has.
        usual: Names to try.
        where: File, for the message.

    Raises:
        DataError: If there is none; names the existing columns.
    """
    by_lower = {name.lower(): name for name in reversed(names)}
    for candidate in (requested,) if requested else usual:
        if candidate in names:
            return candidate
        if candidate.lower() in by_lower:
            return by_lower[candidate.lower()]
    what = f"no column {requested}" if requested else f"none of the columns {', '.join(usual)}"
    raise DataError(f"{where}: {what}; it has {', '.join(names) or 'none'}")


def names_of(first_row: Sequence[str]) -> tuple[list[str], bool]:
    """Column names of a csv or tsv file, and whether its first row is a header.

    Without a header (CC3M, CC12M) a cell of the first row is a URL: its column is ``url``, and the other one of two is
    ``caption``; further columns are ``column_1``, ``column_2`` and so on.
    """
    url = next((number for number, cell in enumerate(first_row) if "://" in cell), None)
    if url is None:
        return list(first_row), True
    names = [f"column_{number}" for number in range(1, len(first_row) + 1)]
    names[url] = "url"
    if len(names) == 2:
        names[1 - url] = "caption"
    return names, False
