"""The records of an artifact: its manifest and its shard records."""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import DataError

T = TypeVar("T")

Json = dict[str, Any]
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """The commit of one shard of a data step."""

    shard: str
    """Shard name, for example ``00003``."""
    counts: dict[str, int]
    """Rows: ``in`` = ``ok`` + each kind of failure."""
    files: dict[str, Json]
    """Size and SHA-256 of each file of the shard."""
    causes: dict[str, int] = field(default_factory=dict[str, int])
    """Failed rows by class of cause."""
    splits: dict[str, int] = field(default_factory=dict[str, int])
    """Good rows by split, for a training; of a filter, those that stay. Empty in records of other steps, of releases
    that did not count them, and of labels from which rows were forgotten."""
    list_number: int = 0
    """Which of the recipe's lists its rows are of, from 0: no shard has rows of two."""
    wall_s: float = 0.0
    """Time spent, in seconds."""

    def __post_init__(self) -> None:
        check_counts(self.counts, where=f"shard {self.shard}")

    def rows_of(self, split: str) -> int | None:
        """Good rows of a split; None if the record does not count them."""
        return self.splits.get(split, 0) if self.splits or not self.counts["ok"] else None

    def to_dict(self) -> Json:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> "ShardRecord":
        """From JSON.

        Raises:
            DataError: If a field is missing or of the wrong type, or the counts do not add up.
        """
        return parse_record(cls, data)

    @staticmethod
    def list_from_json(content: bytes) -> "list[ShardRecord]":
        """Many records from a JSON list, at once.

        Raises:
            DataError: See ``from_dict``.
        """
        try:
            return _adapter(list[ShardRecord]).validate_json(content, strict=True)
        except ValidationError as error:
            raise DataError(_first_error(error)) from None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The commit of an artifact: its inputs, its contents and its cost."""

    step: str
    """Step name."""
    key: str
    """Step key."""
    step_version: int
    """Version of the step's code that is part of the key."""
    section: Json
    """The recipe's section, without resources."""
    inputs: dict[str, str]
    """Key of each input, by step name."""
    input_contents: dict[str, str] = field(default_factory=dict[str, str])
    """``content_of`` each input when the step read it, by step name: an input may be made anew under its key."""
    former_contents: tuple[str, ...] = ()
    """``content_of`` it before rows were forgotten: what was made from these stays done."""
    counts: dict[str, int] = field(default_factory=dict[str, int])
    """Rows: ``in`` = ``ok`` + each kind of failure; empty for steps without rows."""
    metrics: Json = field(default_factory=dict[str, Any])
    """What the step measured."""
    files: dict[str, Json] = field(default_factory=dict[str, Json])
    """Size in bytes and SHA-256 of every file."""
    wall_s: float = 0.0
    """From the step's first start to its commit, less the time between a kill and the next run, in seconds."""
    node_s: float = 0.0
    """Wall seconds times workers."""
    num_workers: int = 0
    """Workers of the step; of a training the most that one of its starts had. 0: it is not known."""
    created: float = 0.0
    """Commit time, in seconds since the epoch."""
    versions: dict[str, str] = field(default_factory=dict[str, str])
    """Versions of the project and of the packages that shaped the bytes."""
    tracking_run_id: str = ""
    """MLflow run, or empty."""
    schema_version: int = SCHEMA_VERSION
    """Version of this layout."""

    def __post_init__(self) -> None:
        check_counts(self.counts, where=f"step {self.step}")

    def to_dict(self) -> Json:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> "Manifest":
        """From JSON.

        Raises:
            DataError: If a field is missing or of the wrong type, the counts do not add up, or the schema differs.
        """
        version = data.get("schema_version") if isinstance(data, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise DataError(f"a newer unclip wrote it (schema version {version}, this one reads {SCHEMA_VERSION})")
        if version != SCHEMA_VERSION:
            raise DataError(f"schema version {version}: it is no manifest of unclip")
        return parse_record(cls, data)


@functools.cache
def _adapter(cls: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(cls)


def parse_record(cls: type[T], data: Any) -> T:
    """Build a dataclass from JSON; fields that this release does not know are ignored.

    Raises:
        DataError: If a field is missing or of the wrong type; names it.
    """
    try:
        # From JSON: in Python's objects, pydantic's strict mode accepts no dict for a nested dataclass.
        return _adapter(cls).validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise DataError(_first_error(error)) from None


def read_record(cls: type[T], content: bytes, file: str, mend: str) -> T:
    """Build a dataclass from the content of a JSON file; fields that this release does not know are ignored.

    Args:
        cls: The dataclass.
        content: The whole file.
        file: Its URI.
        mend: What to do about a damaged one.

    Raises:
        DataError: If it is no JSON, or a field is missing or of the wrong type; names the file and the field.
    """
    try:
        return _adapter(cls).validate_json(content, strict=True)
    except ValidationError as error:
        raise DataError(f"{file}: {_first_error(error)}; {mend}") from None


def _first_error(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    return f"{name}: {first['msg']}" if name else first["msg"]


def check_counts(counts: dict[str, int], *, where: str) -> None:
    """Refuse counts that lose rows.

    Raises:
        DataError: If ``in`` is not the sum of all others.
    """
    if counts and counts.get("in") != sum(value for name, value in counts.items() if name != "in"):
        raise DataError(f"{where}: rows do not add up: {counts}")


_STATE = "state/"
"""Start of the names of files by which a training can be lengthened, which no step reads."""
_TIMES = (".done.json", "_stats.json", "metrics.jsonl")
"""Ends of the names of files that hold times, which no step reads."""


def content_of(manifest: Manifest) -> str:
    """16 hex digits over the content of an artifact: equal if it was made anew with equal bytes."""
    return content_of_files(manifest.files)


def content_of_files(files: Mapping[str, Json]) -> str:
    """As ``content_of``, by size and SHA-256 of the files of an artifact, by name."""
    digests = {
        name: info.get("sha256")
        for name, info in files.items()
        if not name.endswith(_TIMES) and not name.startswith(_STATE)
    }
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]


def has_content(manifest: Manifest, content: str) -> bool:
    """Whether an artifact has this content, or had it before rows were forgotten."""
    return content in {content_of(manifest), *manifest.former_contents}


def add_counts(all_counts: list[dict[str, int]]) -> dict[str, int]:
    """Sum counts by name."""
    total: dict[str, int] = {}
    for counts in all_counts:
        for name, value in counts.items():
            total[name] = total.get(name, 0) + value
    return total
