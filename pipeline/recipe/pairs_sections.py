"""The section of the pairs: one source of pairs, or several lists with weights."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from models.configclass import configclass
from pipeline.recipe.sections import Port, Share, StepSection, TaskResources


@configclass
class DrawnConfig:
    """Captioned pictures that the project draws itself and serves on 127.0.0.1 while they are downloaded."""

    num_pairs: PositiveInt = 8000
    """Pictures to draw, in images."""
    image_px: Annotated[int, Field(ge=16, le=1024)] = 128
    """Side of a picture, in pixels."""
    port: Port = 8976
    """Port of the picture server on 127.0.0.1; part of every URL, so it changes the uids."""
    num_faulty: NonNegativeInt = 12
    """URLs added that are dead, slow, corrupt or not pictures, in rows."""


@configclass
class PairsList:
    """One of several lists of pairs."""

    path: Annotated[str, Field(min_length=1)]
    """The list, or the folder of pictures or of shards, as in ``PairsConfig``."""
    url_column: str = ""
    """As in ``PairsConfig``."""
    caption_column: str = ""
    """As in ``PairsConfig``."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often a training sees a row of the list in one epoch."""


_NO_FOLDERS = ("http://", "https://", "file://")


@configclass
class PairsConfig(StepSection):
    """Where the image-text pairs come from; the step writes one list of (uid, url, caption, split)."""

    source: Literal["drawn", "list", "folder", "shards"] = "drawn"
    """drawn: shapes drawn by the project; list: URLs and captions; folder: pictures with captions; shards: tars of
    pictures and texts, as webdataset and img2dataset write them, which are taken in as they are."""
    path: str = ""
    """The list (txt, csv, tsv, json, jsonl, ndjson, each also .gz or .zst, or parquet), a folder of its parts, or a
    pattern such as data/*.parquet; here or under s3://, gs://, az://, https://. Or the folder of shards, there too, or
    of pictures: on a disk that every worker has, or under s3://, gs://, az://."""
    url_column: str = ""
    """Column that holds the URL (list); empty: found by its name."""
    caption_column: str = ""
    """Column that holds the caption; empty: found by its name; "-": the list has no captions."""
    lists: tuple[PairsList, ...] = ()
    """Several lists of one source, in place of path: tables with path, url_column, caption_column and weight, how often
    a training sees a row of the list in an epoch: 1; 2: each row twice; 0.5: half of the rows, and the others in the
    next epoch. Of a row that several lists have, the first keeps it. A weight is part of the trainings' keys alone."""
    validation_prob: Share = 0.02
    """Share of pictures set aside for validation, by hash of the URL: all captions of a picture are on one side."""
    max_pairs: NonNegativeInt = 0
    """Rows to read from the start of the list (of each list), by one worker; 0: all."""
    drawn: DrawnConfig = DrawnConfig()
    """Settings of the drawn source."""
    resources: TaskResources = TaskResources()
    """Workers of this step, for a list of more than one piece (256 MB)."""

    def __post_init__(self) -> None:
        if self.lists:
            self._check_lists()
        elif self.source != "drawn" and not self.path:
            raise ValueError(f"path is required when source is {self.source!r}")
        for path in (one.path for one in self.each()):
            if self.source == "folder" and path.startswith(_NO_FOLDERS):
                raise ValueError(
                    f"{path}: a folder of pictures is here or in a store (s3://, gs://, az://): web servers list none"
                )

    def _check_lists(self) -> None:
        if self.source == "drawn":
            raise ValueError('lists need source = "list", "folder" or "shards"')
        for name in ("path", "url_column", "caption_column"):
            if getattr(self, name):
                raise ValueError(f"{name} is set beside lists: it belongs into the tables of lists")
        paths = [one.path if "://" in one.path else str(Path(one.path).resolve()) for one in self.lists]
        rows = [(path, one.url_column, one.caption_column) for path, one in zip(paths, self.lists, strict=True)]
        for number, columns in enumerate(rows):
            if columns in rows[:number]:
                first = rows.index(columns) + 1
                raise ValueError(
                    f"list {number + 1} ({self.lists[number].path}) is list {first} again; to see its rows more often, "
                    f"raise the weight of list {first}"
                )

    def each(self) -> "list[PairsConfig]":
        """The section of each list alone, in the order of their rows."""
        if not self.lists:
            return [self]
        return [
            replace(self, lists=(), path=one.path, url_column=one.url_column, caption_column=one.caption_column)
            for one in self.lists
        ]

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each list; empty if every row is seen once in an epoch."""
        weights = tuple(one.weight for one in self.lists)
        return weights if any(weight != 1 for weight in weights) else ()

    def local_paths(self, fields: Iterable[str]) -> dict[str, str]:
        """The list or folder, which may be in an object store too; of several lists, each names its own."""
        return {name: self.path for name in fields if self.source != "drawn" and not self.lists}

    @property
    def known_by_size(self) -> tuple[str, ...]:
        """Tars: a plan does not read terabytes."""
        return (".tar",) if self.source == "shards" else ()

    def path_in_key(self, path: str) -> str:
        """A folder's absolute path or URI, because the URLs of its pictures contain it; of shards, how they are read.

        An earlier release named pictures without a URL by their place, took damaged ones, and the first of several
        pictures.
        """
        if self.source == "shards":
            return "by content, decoded, one picture"
        if self.source != "folder":
            return ""
        return path.rstrip("/") if "://" in path else str(Path(path).resolve())
