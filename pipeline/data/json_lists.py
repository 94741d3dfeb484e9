"""The records of json, jsonl and ndjson files, and the annotation files of COCO and Flickr.

A ``.json`` file holds a list of records, lines of records as jsonl has them, pandas' columns, COCO's images and
annotations, or Karpathy's images and sentences. A list of records is read record by record; the other shapes are read
whole.
"""

import codecs
import json
from collections.abc import Iterator
from typing import IO, Any, cast

from pipeline.data.delimited import lines_of
from pipeline.data.reading import Reading
from pipeline.errors import DataError

Record = dict[str, Any]
Numbered = tuple[int, Record]
"""Line or number of a record in its file, from 1, and the record."""
_BLOCK_BYTES = 1 << 20
_LONGEST_RECORD = 16 << 20
_SHAPES = 'a list of records, such as [{"url": ..., "caption": ...}]'


def jsonl_records(stream: IO[bytes], reading: Reading, start: int = 0, stop: int | None = None) -> Iterator[Numbered]:
    """The records of a jsonl file, or of a span of its bytes; lines that hold no record are counted as malformed."""
    for number, line in lines_of(stream, reading, start, stop):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reading.malformed(number, f"not JSON ({error})")
            continue
        if isinstance(row, dict):
            yield number, cast("Record", row)
        else:
            reading.malformed(number, "no record, which begins with {")


def json_records(stream: IO[bytes], reading: Reading) -> Iterator[Numbered]:
    """The records of a json file of any shape.

    Raises:
        DataError: If the file is damaged, or of none of the shapes.
    """
    text = codecs.getreader("utf-8-sig")(stream)
    head = ""
    while _may_be_lines(head) and (block := text.read(_BLOCK_BYTES)):
        head += block
    if head.lstrip().startswith("["):
        yield from _array_records(head, text, reading)
        return
    first_line, _, rest = head.lstrip().partition("\n")
    if rest.strip() and _is_record(first_line):
        stream.seek(0)
        yield from jsonl_records(stream, reading)
        return
    records = _records_of(json.loads(head + text.read()))
    for number, record in enumerate(records, start=1):
        reading.at_line(number)
        yield number, record


def _may_be_lines(head: str) -> bool:
    """Whether more has to be read to tell lines of records from other shapes: a first line, and a letter after it."""
    is_record = not head.strip() or head.lstrip().startswith("{")
    return is_record and not head.lstrip().partition("\n")[2].strip()


def _array_records(buffer: str, text: Any, reading: Reading) -> Iterator[Numbered]:
    """The records of a list, decoded one after the other."""
    decoder, number = json.JSONDecoder(), 0
    place = buffer.index("[") + 1
    while True:
        while place < len(buffer) and buffer[place] in " \t\r\n,":
            place += 1
        if place < len(buffer) and buffer[place] == "]":
            reading.at_line(number)
            return
        try:
            value, end = decoder.raw_decode(buffer, place)
            is_whole = end < len(buffer)  # a number at the end of the buffer may go on in the next block
        except json.JSONDecodeError as error:
            value, end, is_whole = error, place, False
        if not is_whole:
            block = text.read(_BLOCK_BYTES) if len(buffer) - place < _LONGEST_RECORD else ""
            if not block:
                raise DataError(
                    f"record {number + 1}: {value if isinstance(value, Exception) else 'the list does not end'}"
                )
            buffer, place = buffer[place:] + block, 0
            continue
        place, number = end, number + 1
        reading.at_line(number)
        if isinstance(value, dict):
            yield number, cast("Record", value)
        else:
            reading.malformed(number, "no record, which begins with {")


def _is_record(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _records_of(value: Any) -> list[Record]:
    """The records of an object: COCO's, Karpathy's, one under the name ``data``, or pandas' columns."""
    if not isinstance(value, dict):
        raise DataError(f"must hold {_SHAPES}")
    tables = cast("Record", value)
    images, annotations, data = (_records(tables.get(name)) for name in ("images", "annotations", "data"))
    if images and annotations:
        by_id = {image.get("id"): image for image in images}
        return [by_id.get(one.get("image_id"), {}) | one for one in annotations]
    if images and all("sentences" in image for image in images):
        return [
            image | {"file_name": image.get("filename"), "caption": sentence.get("raw")}
            for image in images
            for sentence in image["sentences"]
        ]
    if data:
        return data
    columns = {
        name: list(column.values()) if isinstance(column, dict) else column
        for name, column in tables.items()
        if isinstance(column, dict | list)
    }
    if columns and len(columns) == len(tables) and len({len(column) for column in columns.values()}) == 1:
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    raise DataError(f"must hold {_SHAPES}, or COCO's images and annotations")


def _records(value: Any) -> list[Record]:
    """A list of records; empty if it is none."""
    rows = cast("list[Any]", value) if isinstance(value, list) else []
    return cast("list[Record]", rows) if all(isinstance(row, dict) for row in rows) else []
