"""The records of json, jsonl and ndjson files, and the annotation files of COCO and Flickr.

A ``.json`` file holds a list of records, lines of records as jsonl has them, pandas' columns, COCO's images and
annotations, or Karpathy's images and sentences. Lists of records, of which several may follow each other, are read
record by record; the other shapes are read whole.

A byte that is not UTF-8 becomes half of a surrogate pair, which the reader of a text finds: it costs its row.
"""

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from typing import IO, Any, cast

from pipeline.data.delimited import lines_of, refuse_utf16
from pipeline.data.reading import Reading
from pipeline.errors import DataError

Record = dict[str, Any]
Numbered = tuple[int, Record]
"""Line or number of a record in its file, from 1, and the record."""
Entry = Record | ValueError
"""A record, or why there is none in its place."""
_BLOCK_BYTES = 1 << 20
_LONGEST_RECORD = 16 << 20
_DECODER = json.JSONDecoder()
_PUNCTUATION = re.compile(r'"(?:[^"\\]++|\\.)*+"|["\[\]{},]', re.DOTALL)
"""Whole texts, and what tells where a value ends; a lone quote begins a text that is not here whole."""
_EDGE = re.compile(r'(?:\A"|\})(?=\s*+(?:,|\]\s*+(?:,\s*+)?\[)\s*+\{\s*+"\Z)')
"""The end of a record in what seems to be a text, and goes on to the first name of the next record, of the same list or
of the next one: a brace, or the text's own quote in its place."""
_BLANK = re.compile(r"\s*+\Z")
_LIST_END = re.compile(r"(?:\A|\})\s*+\]\Z")
"""The end of a list, in what is left of its last record behind the first character that is no JSON."""
_NEXT_RECORD = re.compile(r'[,}\]]\s*+(?:\[\s*+)?\{\s*+"')
_FIRST_NAME = re.compile(r'\{\s*+"((?:[^"\\]|\\.)*+)"\s*+:', re.DOTALL)
_IS_CUT = re.compile(r'\{\s*+(?:"(?:[^"\\]|\\.)*+(?:\\|"\s*+)?)?\Z', re.DOTALL)
"""The beginning of a record whose first name is not here whole."""
_MOST_NAMES = 1_000
_NAMED_CHARACTERS = 20
_SHAPES = 'a list of records, such as [{"url": ..., "caption": ...}]'


class UnknownShapeError(DataError):
    """A file is JSON, but of none of the shapes that hold records."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: If it is not JSON, or cannot be read: nested too deeply, or a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def jsonl_records(stream: IO[bytes], reading: Reading, start: int = 0, stop: int | None = None) -> Iterator[Numbered]:
    """The records of a jsonl file, or of a span of its bytes; lines that hold no record are counted as malformed."""
    for number, line in lines_of(stream, reading, start, stop):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            reading.malformed(number, f"not JSON ({error})")
            continue
        if isinstance(row, dict):
            yield number, cast("Record", row)
        else:
            reading.malformed(number, "no record, which begins with {")


def json_records(stream: IO[bytes], reading: Reading) -> Iterator[Numbered]:
    """The records of a json file of any shape.

    Raises:
        DataError: If the file is damaged.
        UnknownShapeError: If it is of none of the shapes.
    """
    text, head = _Text(stream), ""
    while _may_be_lines(head) and (block := text.read(_BLOCK_BYTES)):
        head += block
    refuse_utf16(head[:2].encode(errors="surrogateescape"))
    if head.lstrip().startswith("["):
        yield from _array_records(head.lstrip(), text, reading)
        return
    first_line, _, rest = head.lstrip().partition("\n")
    if rest.strip() and _is_record(first_line):
        yield from jsonl_records(cast("IO[bytes]", _Again(head, text)), reading)
        return
    try:
        value = parse_json(head + text.read())
    except ValueError as error:
        raise DataError(f"damaged, or not what its name says: {error}") from None
    for number, entry in enumerate(_entries_of(value), start=1):
        reading.at_line(number)
        if isinstance(entry, ValueError):
            reading.malformed(number, str(entry))
        else:
            yield number, entry


class _Text:
    """The text of a stream of bytes.

    Args:
        stream: The stream; compressed ones cannot be read again from their beginning.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")

    def read(self, num_bytes: int = -1) -> str:
        """The text of the next bytes; empty at the end."""
        text, block = "", b"more"
        while block and not text:  # a block may hold no whole letter
            block = self._stream.read(num_bytes)
            text = self._decoder.decode(block, final=not block)
        return text


class _Again:
    """The bytes of a text whose head was read already, from its beginning."""

    def __init__(self, head: str, rest: _Text) -> None:
        self._head = head
        self._rest = rest

    def read(self, num_bytes: int) -> bytes:
        head, self._head = self._head, ""
        return (head or self._rest.read(num_bytes)).encode(errors="surrogateescape")


def _may_be_lines(head: str) -> bool:
    """Whether more has to be read to tell lines of records from other shapes: a first line, and a letter after it."""
    is_record = not head.strip() or head.lstrip().startswith("{")
    return is_record and not head.lstrip().partition("\n")[2].strip()


def _array_records(buffer: str, text: _Text, reading: Reading) -> Iterator[Numbered]:
    """The records of lists, decoded one after the other; one that cannot be read is counted as malformed."""
    for number, value in _values(buffer, text):
        reading.at_line(number)
        if isinstance(value, dict):
            yield number, cast("Record", value)
        else:
            reading.malformed(number, str(value) if isinstance(value, Exception) else "no record, which begins with {")


def _values(buffer: str, text: _Text) -> Iterator[tuple[int, Any]]:
    """The values of a list, and of lists behind it, with their numbers from 1; of one that cannot be read, why.

    Raises:
        DataError: If a list does not end, or something that is no list is behind it.
    """
    number, place, in_list, names = 1, 0, False, set[str]()
    while True:
        while place < len(buffer) and buffer[place] in " \t\r\n,":
            place += 1
        mark = buffer[place : place + 1]
        if mark == ("]" if in_list else "["):
            place, in_list = place + 1, not in_list
            continue
        if mark and not in_list:
            rest = ascii(buffer[place : place + _NAMED_CHARACTERS])
            raise DataError(f"behind record {number - 1} and the end of its list is {rest}, which begins no other list")
        value, end, num_others = _decoded(buffer, place, names) if mark else (None, 0, 0)
        is_fault = isinstance(value, Exception)
        # A number at the end of the buffer may go on in the next block, and the last record may take the list's end.
        if place < end < len(buffer) and not (is_fault and _BLANK.match(buffer, end)):
            yield number, value
            yield from [(number, ValueError("may be a record in one that is not JSON"))] * num_others
            if isinstance(value, dict) and len(names) < _MOST_NAMES:
                names.update(itertools.islice(cast("Record", value), 1))
            number, place = number + 1, end
            continue
        is_too_long = len(buffer) - place >= _LONGEST_RECORD
        block = "" if is_too_long else text.read(_BLOCK_BYTES)
        if not block and not in_list:
            return
        if not block and is_fault and not is_too_long and _is_last_record(buffer[place:].rstrip()):
            yield number, value
            return
        if not block:
            raise DataError(f"record {number}: {value if is_fault else 'the list does not end'}")
        buffer, place = buffer[place:] + block, 0


def _decoded(buffer: str, place: int, names: set[str]) -> tuple[Any, int, int]:
    """A value, or why it cannot be read; and what ``_end_of_value`` returns."""
    try:
        value, end = _DECODER.raw_decode(buffer, place)
    except json.JSONDecodeError as error:
        reason, fault = (
            ValueError(f"not JSON ({error.msg}: character {error.pos - place + 1} of the record)"),
            error.pos,
        )
    except ValueError as error:  # a number of thousands of digits
        reason, fault = error, len(buffer)
    except RecursionError:
        reason, fault = ValueError("nested too deeply"), len(buffer)
    else:
        if isinstance(value, str) and _EDGE.match(buffer[place:end]):
            return ValueError("not JSON (a quote between two records)"), place + 1, 0
        return value, end, 0
    return reason, *_end_of_value(buffer, place, fault, names)


def _end_of_value(buffer: str, place: int, fault: int, names: set[str]) -> tuple[int, int]:
    """The place behind a value, without reading it, 0 if its end is not in the buffer; and what may be records in it.

    Args:
        buffer: The text.
        place: Where the value begins.
        fault: The first character that is no JSON; the length of the buffer if there is none. The quotes before it are
            those of texts. If one is missing behind it, or one too many, a text seems to begin at a record's end, and
            to go on to the next record's first name: the value ends there, unless a list in it is open. If a record
            begins in the place of a name, a bracket of the value is missing, or one is too many: the value ends there,
            too.
        names: First names of the records before, by which a record is told from one in a list of the value. Without
            them, a record begins with the first name of this value, or, behind a text, with any.
    """
    is_first = not names
    names = names or {name for name in [_first_name(buffer, place)] if name is not None}
    opened, num_others, behind_comma = list[str](), 0, len(buffer)
    num_lists = _num_open_lists(buffer, place, fault)
    for match in _PUNCTUATION.finditer(buffer, place):
        mark, start = match.group(), match.start()
        if mark == '"':
            break
        end, is_end = 0, True
        if len(mark) > 1 and fault <= match.end() and fault < len(buffer):
            own = _num_own(mark) if start < fault else 0
            edge, num_lists = _edge_in(mark, own, num_lists)
            end, is_end = start + edge if edge else 0, not num_lists
        elif mark == "{" and start >= fault and (opened == ["["] or opened[-1:] == ["{"]):
            end = start if _BLANK.fullmatch(buffer, behind_comma, start) else 0
        if end:
            record = buffer.index("{", end)
            name = _first_name(buffer, record)
            if name is None and _IS_CUT.match(buffer, record):
                break
            if is_end and (name in names or (is_first and mark != "{")):
                return end, num_others
            num_others += name is not None
        if not opened and mark in {",", "]", "}"}:  # behind a bare number, or one } too many
            return max(start, place + 1), num_others
        if mark in {"[", "{"}:
            opened.append(mark)
        elif mark in {"]", "}"}:
            opened.pop()
            if not opened:
                return match.end(), num_others
        behind_comma = match.end() if mark == "," else len(buffer)
    return 0, 0


def _first_name(buffer: str, place: int) -> str | None:
    """The first name of the record that begins at a place; None if none does, or if its name is not here whole."""
    match = _FIRST_NAME.match(buffer, place)
    if match is None:
        return None
    try:
        return _DECODER.raw_decode(buffer, match.start(1) - 1)[0]
    except ValueError:  # an escape that is none
        return match.group(1)


def _num_open_lists(buffer: str, place: int, fault: int) -> int:
    """How many lists of a value are open where it is no JSON any more: behind that, brackets may be letters.

    One whose first value is not behind us does not count: its bracket may stand in the place of a text's first quote.
    """
    num_lists, last = 0, ""
    for match in _PUNCTUATION.finditer(buffer, place, fault):
        mark = match.group()
        if mark == '"':
            break
        if len(mark) == 1:
            last = mark
        num_lists += (mark == "[") - (mark == "]")
    return num_lists - (last == "[")


def _num_own(text: str) -> int:
    """How many characters of a text that lacks its last quote are its own; behind them is what lies between two."""
    own = text[:-1].rstrip(" \t\r\n[{")
    if own.endswith(","):
        return len(own[:-1].rstrip(" \t\r\n]}"))
    return len(own) - 1 if own.endswith(":") else len(text)


def _edge_in(text: str, num_own: int, num_lists: int) -> tuple[int, int]:
    """Where a record may end in what seems to be a text but is what lies between two, 0 if nowhere.

    And how many lists are open there, or at the end, if as many as ``num_lists`` are open before it. The first
    ``num_own`` characters are a text indeed, whose brackets are letters.
    """
    edge = _EDGE.search(text)
    stop = edge.start() if edge else len(text)
    num_lists += text.count("[", num_own, stop) - text.count("]", num_own, stop)
    return edge.end() if edge else 0, max(0, num_lists)


def _is_last_record(rest: str) -> bool:
    """Whether the rest of a file is one record that is no JSON, and the end of its list.

    A file that is cut in a record is not taken for it, nor one in which another record may follow.
    """
    try:
        json.loads(rest)
    except json.JSONDecodeError as error:
        return bool(_LIST_END.search(rest[error.pos :])) and not _NEXT_RECORD.search(rest)
    except (ValueError, RecursionError):
        return False
    return False


def _is_record(line: str) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _entries_of(value: Any) -> list[Entry]:
    """The records of an object: COCO's, Karpathy's, those under the name ``data``, or pandas' columns."""
    if not isinstance(value, dict):
        raise UnknownShapeError(f"must hold {_SHAPES}")
    tables = cast("Record", value)
    images, annotations, data = (_entries(tables, name) for name in ("images", "annotations", "data"))
    if images and annotations:
        return _joined(images, annotations)
    if any(isinstance(image, dict) and "sentences" in image for image in images):
        return [entry for number, image in enumerate(images, start=1) for entry in _captioned(image, number)]
    has_faults = any(isinstance(one, ValueError) for one in data)
    if data and not (has_faults and len(tables) > 1 and _rows_of_columns(tables)):
        return data
    if rows := _rows_of_columns(tables):
        return [*rows]
    raise UnknownShapeError(f"must hold {_SHAPES}, or COCO's images and annotations")


def _joined(images: list[Entry], annotations: list[Entry]) -> list[Entry]:
    """COCO's annotations, each with the fields of its image; behind them the images that are no records."""
    by_id = {_hashable(image.get("id")): image for image in images if isinstance(image, dict)}
    joined = [
        one if isinstance(one, ValueError) else by_id.get(_hashable(one.get("image_id")), {}) | one
        for one in annotations
    ]
    return [*joined, *(image for image in images if isinstance(image, ValueError))]


def _captioned(image: Entry, number: int) -> list[Entry]:
    """One of Karpathy's images, by its number, with each of its captions."""
    if isinstance(image, ValueError):
        return [image]
    if "sentences" not in image:
        return [ValueError(f"entry {number} of images: no sentences")]
    named = image | {"file_name": image.get("filename")}
    return [named | {"caption": caption} for caption in _sentences(image["sentences"])]


def _rows_of_columns(tables: Record) -> list[Record]:
    """The rows of pandas' columns; none if the values are no columns of one length."""
    columns = {
        name: list(column.values()) if isinstance(column, dict) else column
        for name, column in tables.items()
        if isinstance(column, dict | list)
    }
    if len(columns) < len(tables) or len({len(column) for column in columns.values()}) != 1:
        return []
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _hashable(value: Any) -> Any:
    """An id; a list or a record in its place is its text."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def _sentences(value: Any) -> list[Any]:
    """The captions of an image; what stands in the place of one is left to the reader of captions."""
    sentences = cast("list[Any]", value) if isinstance(value, list) else [value]
    return [cast("Record", one).get("raw") if isinstance(one, dict) else one for one in sentences]


def _entries(tables: Record, name: str) -> list[Entry]:
    """A list of records by its name, with an error in the place of what is none; empty if none of it is a record."""
    value = tables.get(name)
    rows = cast("list[Any]", value) if isinstance(value, list) else []
    if not any(isinstance(row, dict) for row in rows):
        return []
    return [
        cast("Record", row)
        if isinstance(row, dict)
        else ValueError(f"entry {number} of {name}: no record, which begins with {{")
        for number, row in enumerate(rows, start=1)
    ]
