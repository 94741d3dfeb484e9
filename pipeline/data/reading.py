"""What the readers of lists report: rows that they leave out, with file and line, and names that match nothing."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

NUM_EXAMPLES = 10
"""Malformed rows that are named; the others are counted."""
MAX_CELL = 131_072
"""Longest URL or caption, in characters (Parquet: bytes): the limit of Python's csv module."""


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

    def begin(self, file: str) -> None:
        """A reader begins with a span of a file."""
        self.lines.append((file, 0))

    def at_line(self, line: int) -> None:
        """The reader has read up to a line of the span, from 1."""
        self.lines[-1] = (self.lines[-1][0], line)

    def malformed(self, line: int, reason: str, file: str = "") -> None:
        """Count a row that is left out; ``file`` if it is not of the file that the reader began with."""
        self.counts["in"] += 1
        self.counts["malformed"] += 1
        self.name(line, reason, file)

    def name(self, line: int, reason: str, file: str = "") -> None:
        """Name a malformed row without counting it, unless enough are named."""
        if file and len(self.examples) < NUM_EXAMPLES:
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


def name_examples(readings: list[Reading]) -> list[str]:
    """The first malformed rows of all pieces, as ``file:line: reason``; lines are counted from the file's beginning."""
    names: list[str] = []
    file, before = "", 0
    for reading in readings:
        starts: list[int] = []
        for name, count in reading.lines:
            before = before if name == file else 0
            starts.append(before)
            file, before = name, before + count
        for one in reading.examples:
            place = f"{one.file}:{starts[one.span] + one.line}" if one.line else one.file
            names.append(f"{place}: {one.reason}")
    return names[:NUM_EXAMPLES]
