"""Lines, and the records of csv and tsv files.

A row that cannot be read is counted and never takes others with it. In csv, a quote that opens a cell must be closed
before a comma or a line end, within ``_LONGEST_RECORD`` characters. If it is not, its line alone is malformed, and
reading goes on with the next line. In tsv a quote is a letter like any other. Everything else is read as by Python's
own csv module, but for its limit of a cell: a cell that is too long for a list is one row of it, which its readers
count, and not the end of the quote.
"""

import csv
from collections import deque
from collections.abc import Iterator
from typing import IO

from pipeline.data.reading import Reading
from pipeline.errors import DataError

Line = tuple[int, str]
"""Number of a line, from 1, and its text with the line end."""
Record = tuple[int, list[str]]
"""Number of the first line of a record, and its cells."""
_BLOCK_BYTES = 4 << 20
_LONGEST_LINE = 16 << 20
_LONGEST_RECORD = 1 << 20
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def lines_of(stream: IO[bytes], reading: Reading, start: int = 0, stop: int | None = None) -> Iterator[Line]:
    """The lines of a file, or those that begin in a span of its bytes.

    Args:
        stream: The file.
        reading: Counts lines that are not UTF-8, or longer than 16 MiB.
        start: First byte of the span.
        stop: Byte after its last; None: the end of the file.

    Raises:
        DataError: If the file is UTF-16, or has the line ends of old Macs.
    """
    number = 0
    try:
        for line in _byte_lines(stream, start, stop):
            number += 1
            if line is None:
                reading.malformed(number, f"a line longer than {_LONGEST_LINE >> 20} MiB")
                continue
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                reading.malformed(number, f"not UTF-8 ({error.reason} at byte {error.start} of the line)")
                continue
            yield number, text
    finally:
        reading.at_line(number)


def csv_records(lines: Iterator[Line], reading: Reading) -> Iterator[Record]:
    """The records of a csv file; blank lines are none."""
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_RECORD + _LONGEST_LINE))  # of the whole process
    waiting: deque[Line] = deque()
    while (line := waiting.popleft() if waiting else next(lines, None)) is not None:
        number, text = line
        if '"' not in text and "\r" not in text[:-2]:
            text = text.rstrip("\r\n")
            if text:
                yield number, text.split(",")
            continue
        record = _Record(line, waiting, lines)
        try:
            yield number, next(csv.reader(record, strict=True))
        except csv.Error as error:
            is_open = record.give_back() or "unexpected end" in str(error)
            cells = None if is_open else _read_leniently(text)
            if cells is None:
                reading.malformed(number, "a quote is opened and not closed" if is_open else _reason(text, error))
            else:
                yield number, cells


def tsv_records(lines: Iterator[Line], reading: Reading) -> Iterator[Record]:
    """The records of a tsv file, in which nothing is quoted; blank lines are none."""
    del reading
    for number, line in lines:
        text = line.rstrip("\r\n")
        if text:
            yield number, text.split("\t")


class _Record:
    """The lines of one csv record, as its parser asks for them; they can be given back to be read as others."""

    def __init__(self, first: Line, waiting: deque[Line], lines: Iterator[Line]) -> None:
        self._next: Line | None = first
        self._waiting = waiting
        self._lines = lines
        self._taken: list[Line] = []
        self._size = 0

    def __iter__(self) -> Iterator[str]:
        while self._next is not None and self._size < _LONGEST_RECORD:
            self._size += len(self._next[1])
            yield self._next[1]
            self._next = self._waiting.popleft() if self._waiting else next(self._lines, None)
            if self._next is not None:
                self._taken.append(self._next)

    def give_back(self) -> bool:
        """Return the lines after the first to be read again; whether there are any."""
        self._waiting.extendleft(reversed(self._taken))
        return bool(self._taken)


def _read_leniently(text: str) -> list[str] | None:
    """A single line with letters after a closing quote, as Python's csv module reads it; None if it cannot."""
    try:
        return next(csv.reader([text]))
    except csv.Error:
        return None


def _reason(text: str, error: csv.Error) -> str:
    """Why a single line cannot be read; Python's own words for a line end of an old Mac are for programmers."""
    return "a line end of old Macs (CR alone) outside of quotes" if "\r" in text.rstrip("\r\n") else str(error)


def _byte_lines(stream: IO[bytes], start: int, stop: int | None) -> Iterator[bytes | None]:
    """Lines with their ends, without a byte order mark; None for a line that is too long to be held."""
    # The line that the byte before the span belongs to is another span's.
    position, skips = (start - 1, True) if start else (0, False)
    stream.seek(position) if start else None
    rest, long_bytes = b"", 0
    while True:
        block = stream.read(_BLOCK_BYTES)
        if position == 0 and not rest and not long_bytes:
            refuse_utf16(block)
            _refuse_old_macs(block)
            bom = len(_BOM) if block.startswith(_BOM) else 0
            position, block = bom, block[bom:]
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        if not block and (rest or long_bytes):  # of a line that is too long, nothing may be left
            lines, rest = [rest], b""
        for line in lines:
            if stop is not None and position >= stop:
                return
            if not skips:
                yield None if long_bytes + len(line) > _LONGEST_LINE else line + b"\n"
            position += long_bytes + len(line) + 1
            skips, long_bytes = False, 0
        if not block:
            return
        if len(rest) > _LONGEST_LINE:
            rest, long_bytes = b"", long_bytes + len(rest)


def refuse_utf16(block: bytes) -> None:
    """Refuse a file by its first bytes.

    Raises:
        DataError: If it is UTF-16.
    """
    if block[:2] in _UTF16:
        raise DataError("UTF-16; convert it to UTF-8, for example with iconv")


def _refuse_old_macs(block: bytes) -> None:
    """Refuse a file by its first bytes: the whole of it would be one line.

    Raises:
        DataError: If its lines end with CR alone.
    """
    if b"\r" in block[:-1] and b"\n" not in block:  # a CR at the end may be one of a CR LF
        raise DataError("line ends of old Macs (CR alone); convert it, for example with tr '\\r' '\\n' < OLD > NEW")
