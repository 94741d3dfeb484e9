"""What the readers of lists report: rows that they leave out, with file and line, and names that match nothing."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from pipeline.addresses import without_password

NUM_EXAMPLES = 10
"""Malformed rows that are named; the others are counted."""
MAX_CELL = 131_072
"""Longest URL or caption, in characters (Parquet: bytes): the limit of Python's csv module."""
_SURROGATE = re.compile("[\ud800-\udfff]")
T = TypeVar("T")


@dataclass(frozen=True)
class Malformed:
    """One row that was left out."""

    file: str
    """The file."""
    line: int
    """Line (text) or row (Parquet, JSON) in the span that was read, from 1; 0: the file as a whole."""
    span: int
    """Number of the span, in its piece, that was read."""
    reason: str
    """What is wrong with it."""


@dataclass
class Reading:
    """Counts of one piece of a source."""

    counts: Counter[str] = field(default_factory=Counter[str])
    """Rows: ``in`` = ``ok`` + ``missing_url`` + ``malformed``."""
    notes: Counter[str] = field(default_factory=Counter[str])
    """Other numbers, by name."""
    examples: list[Malformed] = field(default_factory=list[Malformed])
    """The first malformed rows."""
    lines: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    """File, and lines or rows that were read, of each span."""
    limit: int | None = None
    """Most rows to read, in the order of the source, with those that are left out; None: all."""
    num_taken: int = 0
    """Rows that were read so far, if there is a limit."""

    @property
    def is_full(self) -> bool:
        """Whether the limit is reached."""
        return self.limit is not None and self.num_taken >= self.limit

    def take(self, num_rows: int = 1) -> int:
        """Count the next rows of the source; returns how many of them are within the limit."""
        if self.limit is None:
            return num_rows
        num_within = min(num_rows, self.limit - self.num_taken)
        self.num_taken += num_within
        return num_within

    def begin(self, file: str) -> None:
        """A reader begins with a span of a file."""
        self.lines.append((file, 0))

    def at_line(self, line: int) -> None:
        """The reader has read up to a line of the span, from 1."""
        self.lines[-1] = (self.lines[-1][0], line)

    def malformed(self, line: int, reason: str, file: str = "") -> None:
        """Count the next row of the source, which is left out; nothing if it is behind the limit.

        Args:
            line: Its line.
            reason: What is wrong with it.
            file: Its file, if that is not the one that the reader began with.
        """
        if self.take():
            self.leave_out(line, reason, file)

    def leave_out(self, line: int, reason: str, file: str = "") -> None:
        """Count a row that is left out after it was taken."""
        self.counts["in"] += 1
        self.counts["malformed"] += 1
        self.name(line, reason, file)

    def name(self, line: int, reason: str, file: str = "") -> None:
        """Name a malformed row without counting it, unless enough are named."""
        if file:
            if len(self.examples) == NUM_EXAMPLES:  # it comes behind them, and would be a span more in memory
                return
            self.begin(file)
        self.examples.append(Malformed(self.lines[-1][0], line, len(self.lines) - 1, reason))
        self.examples = sorted(self.examples, key=lambda one: (one.span, one.line))[:NUM_EXAMPLES]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "counts": dict(self.counts),
            "notes": dict(self.notes),
            "examples": [asdict(example) for example in self.examples],
            "lines": self.lines,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Reading":
        """From JSON."""
        return cls(
            Counter(data["counts"]),
            Counter(data["notes"]),
            [Malformed(**example) for example in data["examples"]],
            [(file, count) for file, count in data["lines"]],
        )


def within_limit(rows: Iterator[T], reading: Reading) -> Iterator[T]:
    """The rows within the limit of ``reading``, to which the reader of ``rows`` adds those that it leaves out."""
    if reading.limit is None:
        yield from rows
        return
    while not reading.is_full:
        row = next(rows, None)
        if row is None or not reading.take():
            return
        yield row


def has_surrogates(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, or what stands in the place of a byte that is not UTF-8."""
    return not text.isascii() and _SURROGATE.search(text) is not None


def name_examples(readings: list[Reading]) -> list[str]:
    """The first malformed rows of all pieces, as ``file:line: reason``, for people: without passwords of addresses.

    Lines are counted from the file's beginning.
    """
    names: list[str] = []
    file, before = "", 0
    for reading in readings:
        starts: list[int] = []
        for name, count in reading.lines:
            before = before if name == file else 0
            starts.append(before)
            file, before = name, before + count
        for one in reading.examples:
            shown = without_password(one.file) if "://" in one.file else one.file
            place = f"{shown}:{starts[one.span] + one.line}" if one.line else shown
            names.append(f"{place}: {one.reason}")
    # The name of a file may hold bytes that are not UTF-8.
    return [name.encode(errors="backslashreplace").decode() for name in names[:NUM_EXAMPLES]]
