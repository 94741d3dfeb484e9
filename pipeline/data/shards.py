"""Readers of img2dataset's shards: they match the pictures of a tar with the rows of its table by key and uid.

Every read of a picture gives its key and its uid, and the uid is compared with the picture's json in the tar. So the
first read detects a tar that does not belong to the table, the embeddings or the index.
"""

import functools
import json
import os
import tarfile
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from PIL import Image

from pipeline.data.list_columns import CAPTION_COLUMNS
from pipeline.data.rows import make_uid, require_columns
from pipeline.errors import DataError
from pipeline.pictures import decode
from pipeline.workspace.store import Artifact

pc: Any = pyarrow.compute  # its functions are created at import, so a type checker does not know them

_PICTURES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "jp2", "ppm"})
TAKEN_IN = b"taken_in"
"""Key in the metadata of a table whose tar somebody else wrote: it may hold samples that are no rows."""
REPAIR_HINT = "remove manifest.json and the shard's .done.json next to it and run again: only that shard is made again"
_BLOCK_BYTES = 512
_SEARCH_BYTES = 1 << 16
_SEARCHES = 700  # in one tar, as long as reading all headers of 10,000 pictures
_END = bytes(_BLOCK_BYTES)
_OPEN_SHARDS = 16  # the index of a tar of 10,000 pictures takes 8 MB


Members = dict[str, dict[str, tuple[int, int]]]
"""Span of each file in a tar, (offset, size) in bytes, by key and by extension."""


def repair_hint(path: Path) -> str:
    """What to do about a damaged file of a shard; a tar that was taken in is a link to its owner's file."""
    if path.is_symlink():
        return f"it is a link to {path.resolve()}: bring that file back from a copy"
    return REPAIR_HINT


def index_tar(path: Path, *, hint: str = "") -> Members:
    """Index the files of a tar.

    This code reads the headers because ``tarfile`` takes 4.5 times as long: 1.5 s for a shard of 10,000 pictures.

    Args:
        path: The tar.
        hint: What to do if it is damaged; by default, ``repair_hint``.

    Raises:
        DataError: If the tar is truncated or not a tar; names it.
    """
    members: Members = {}
    size_bytes, offset, last = path.stat().st_size, 0, ""
    with path.open("rb") as stream:
        while True:
            stream.seek(offset)
            header = stream.read(_BLOCK_BYTES)
            if len(header) < _BLOCK_BYTES or offset > size_bytes:
                raise DataError(f"{path}: truncated after {last or 'its first bytes'}; {hint or repair_hint(path)}")
            if header == _END:
                return members
            if header[257:262] != b"ustar" or header[156:157] not in {b"0", b"\0"}:
                return _index_any_tar(path, hint)
            last, size = _read_header(header, path, offset, hint)
            key, extension = _key_and_extension(last)
            members.setdefault(key, {})[extension] = (offset + _BLOCK_BYTES, size)
            offset += _BLOCK_BYTES + -(-size // _BLOCK_BYTES) * _BLOCK_BYTES


def find_in_tar(path: Path, file: int, key: str) -> dict[str, tuple[int, int]]:
    """The files of one key in a tar whose keys ascend, by bisection: some 20 reads of 64 KiB, whatever its size.

    Args:
        path: The tar, for messages.
        file: Descriptor of the tar.
        key: The key.

    Returns:
        Span of each file by extension; empty if the key is not found in this way, as in a tar of another order.

    Raises:
        DataError: If a header is damaged.
    """
    low, high = (
        0,
        path.stat().st_size,
    )  # header at ``low``; the first header from ``high`` on has this key or a later one
    while high - low > _SEARCH_BYTES:
        middle = (low + high) // 2 // _BLOCK_BYTES * _BLOCK_BYTES
        place = _next_header(file, middle, high)
        if place is None or _member_at(path, file, place)[0] >= key:
            high = middle
        else:
            low = place
    files: dict[str, tuple[int, int]] = {}
    while _is_header(os.pread(file, _BLOCK_BYTES, low)):
        stem, extension, size = _member_at(path, file, low)
        if stem > key:
            break
        if stem == key:
            files[extension] = (low + _BLOCK_BYTES, size)
        low += _BLOCK_BYTES + -(-size // _BLOCK_BYTES) * _BLOCK_BYTES
    return files


def _next_header(file: int, start: int, stop: int) -> int | None:
    """Offset of the first header from ``start`` on; None if there is none before ``stop``."""
    while start < stop:
        data = os.pread(file, _SEARCH_BYTES, start)
        for offset in range(0, len(data) - _BLOCK_BYTES + 1, _BLOCK_BYTES):
            if _is_header(data[offset : offset + _BLOCK_BYTES]):
                return start + offset if start + offset < stop else None
        if len(data) < _SEARCH_BYTES:
            return None
        start += _SEARCH_BYTES
    return None


def _is_header(block: bytes) -> bool:
    """Whether a block is the header of a plain file: its checksum tells it from the pixels of a picture."""
    if block[257:262] != b"ustar" or block[156:157] not in {b"0", b"\0"}:
        return False
    checksum = block[148:156].strip(b" \0")
    return checksum.isdigit() and int(checksum, 8) == sum(block) - sum(block[148:156]) + 8 * ord(" ")


def _member_at(path: Path, file: int, offset: int) -> tuple[str, str, int]:
    """Key, extension and size of the file whose header is at ``offset``."""
    name, size = _read_header(os.pread(file, _BLOCK_BYTES, offset), path, offset)
    return *_key_and_extension(name), size


def _read_header(header: bytes, path: Path, offset: int, hint: str = "") -> tuple[str, int]:
    """Name and size in a ustar header (POSIX.1-1988)."""
    checksum = header[148:156]
    try:
        is_whole = int(checksum.strip(b" \0") or b"0", 8) == sum(header) - sum(checksum) + 8 * ord(" ")
        name, prefix = (header[part].rstrip(b"\0").decode() for part in (slice(100), slice(345, 500)))
        size_bytes = int(header[124:136].strip(b" \0"), 8)
    except ValueError:
        is_whole, name, prefix, size_bytes = False, "", "", 0
    if not is_whole:
        raise DataError(f"{path}: damaged tar (header at byte {offset}); {hint or repair_hint(path)}")
    return f"{prefix}/{name}" if prefix else name, size_bytes


def _index_any_tar(path: Path, hint: str) -> Members:
    """Index a tar with long names or extended headers, which img2dataset does not write."""
    members: Members = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, extension = _key_and_extension(member.name)
                members.setdefault(key, {})[extension] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise DataError(f"{path}: damaged tar ({error}); {hint or repair_hint(path)}") from error
    return members


def sample_url(record: Mapping[str, Any], shard: str, key: str) -> str:
    """The URL in the json of a sample; of a sample without one, its place."""
    url = record.get("url")
    return url.strip() if isinstance(url, str) and url.strip() else f"shard:{shard}/{key}"


def sample_caption(record: Mapping[str, Any], text: bytes) -> str:
    """The caption in the json of a sample, or else its text file.

    Raises:
        ValueError: If the text is not UTF-8.
    """
    caption = next((one for name in CAPTION_COLUMNS if isinstance(one := record.get(name), str)), None)
    return text.decode("utf-8-sig").strip() if caption is None else caption


def _key_and_extension(name: str) -> tuple[str, str]:
    """The parts of a file's name before and after the first dot, as webdataset splits it: folders may have dots."""
    folder, slash, file = name.rpartition("/")
    key, _, extension = file.partition(".")
    return f"{folder}{slash}{key}", extension


def read_table(path: Path | IO[bytes], columns: Sequence[str], *, use_threads: bool = True) -> pa.Table:
    """Read columns of a shard's table, from a local path or what ``Artifact.ranged`` gives.

    Args:
        path: The table.
        columns: Names of the columns, in the order in which they are given back.
        use_threads: Whether several threads decode, which takes less time and more of the processor.

    Raises:
        DataError: If the table is damaged or lacks a column; names the file.
    """
    try:
        with pq.ParquetFile(path) as file:
            require_columns(file.schema_arrow.names, columns, where=name_of(path))
            return file.read(list(columns), use_threads=use_threads).select(list(columns))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{name_of(path)}: damaged ({error}); {REPAIR_HINT}") from error


def read_groups(path: Path | IO[bytes], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Read columns of a table, a row group at a time.

    Raises:
        DataError: If the table is damaged; names the file.
    """
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, list(columns))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{name_of(path)}: damaged ({error}); {REPAIR_HINT}") from error


def find_rows(
    path: Path | IO[bytes], keys: Sequence[str], values: pa.Array, columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Columns of the rows of which one of the columns ``keys`` has one of some strings; reads a row group at a time.

    Raises:
        DataError: If the table is damaged; names the file.
    """
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, list(keys))
                is_match = np.zeros(table.num_rows, np.bool_)
                for key in keys:
                    is_match |= pc.is_in(table.column(key).cast(pa.string()), value_set=values).to_numpy()
                if is_match.any():
                    yield from file.read_row_group(group, list(columns)).filter(pa.array(is_match)).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{name_of(path)}: damaged ({error}); {REPAIR_HINT}") from error


def read_names(path: Path | IO[bytes]) -> list[str]:
    """Names of the columns of a shard's table.

    Raises:
        DataError: If the table is damaged; names the file.
    """
    return list(read_schema(path).names)


def read_schema(path: Path | IO[bytes]) -> pa.Schema:
    """Columns of a shard's table, with their types and the table's metadata.

    Raises:
        DataError: If the table is damaged; names the file.
    """
    try:
        return pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{name_of(path)}: damaged ({error}); {REPAIR_HINT}") from error


def name_of(path: Path | IO[bytes]) -> str:
    """What a message calls a file of ``Artifact.ranged``."""
    return str(path) if isinstance(path, Path) else path.name


def good_rows(table: pa.Table) -> pa.Table:
    """The rows whose picture was stored."""
    return table.filter(pc.field("status") == "success")


def split_counts(path: Path) -> dict[str, int]:
    """Rows of a shard's table by split, without those that have no picture; for the shard's record."""
    names = [name for name in ("split", "status") if name in read_names(path)]
    table = read_table(path, names)
    return splits_of(good_rows(table) if "status" in names else table)


def splits_of(table: pa.Table) -> dict[str, int]:
    """Rows of a table by split."""
    counts = Counter(table["split"].to_pylist())
    return {str(split): count for split, count in sorted(counts.items())}


class ShardPictures:
    """Random access to the stored pictures of one shard; several threads may read at once.

    It holds the tar's index and one file handle, which is closed when the object is garbage-collected.

    Args:
        tar: Pictures of the shard.
        shard: Name of the shard, for messages.
        indexed: Whether all headers are read at once; else the first pictures are searched for one by one, and the
            headers are read only if a search finds none, or there are many.
        members: The tar's index, if it is known already.

    Raises:
        DataError: If the file is not a readable tar.
    """

    def __init__(self, tar: Path, shard: str, *, indexed: bool = True, members: Members | None = None) -> None:
        self._tar = tar
        self._shard = shard
        self._index = index_tar(tar) if members is None and indexed else members
        self._num_searches = 0
        self._file = os.open(tar, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __reduce__(self) -> tuple[Any, tuple[Path, str, Members]]:
        return (_open_pictures, (self._tar, self._shard, self._members()))

    def part(self, keys: Sequence[str]) -> "ShardPictures":
        """The same tar with these keys alone: small enough to send to another process."""
        members = self._members()
        return _open_pictures(self._tar, self._shard, {key: members[key] for key in keys if key in members})

    def keys(self) -> set[str]:
        """Keys of the rows that have files in the tar."""
        return set(self._members())

    def read(self, key: str, uid: str) -> bytes:
        """The stored picture file of a row.

        Raises:
            DataError: If the tar has no such picture, or has another uid for it.
        """
        files = self._files(key)
        picture = picture_span(files)
        if picture is None or not files.keys() & {"json", "txt"}:
            raise DataError(
                f"{self.where(key, uid)}: no picture and json of this key in {self._tar}; {repair_hint(self._tar)}"
            )
        try:
            record = json.loads(self._read(files["json"])) if "json" in files else {}
            text = self._read(files["txt"]) if "txt" in files else b""
            # A tar that somebody else wrote holds no uid of ours, but what it is computed from.
            tar_uid = record.get("uid")
            if tar_uid != uid:
                computed = make_uid(sample_url(record, self._shard, key), sample_caption(record, text))
                tar_uid = computed if computed == uid else tar_uid or computed
        except (ValueError, AttributeError) as error:
            raise DataError(
                f"{self.where(key, uid)}: malformed json in {self._tar} ({error!r}); {repair_hint(self._tar)}"
            ) from None
        if tar_uid != uid:
            raise DataError(
                f"{self.where(key, uid)}: the row has uid {tar_uid} in {self._tar}; {repair_hint(self._tar)}"
            )
        return self._read(picture)

    def decode(self, key: str, uid: str) -> Image.Image:
        """The picture of a row, upright and RGB.

        Raises:
            DataError: As ``read``, or if the picture cannot be decoded.
        """
        return decode(self.read(key, uid), where=self.where(key, uid))

    def _files(self, key: str) -> dict[str, tuple[int, int]]:
        if self._index is None and self._num_searches < _SEARCHES:
            self._num_searches += 1
            files = find_in_tar(self._tar, self._file, key)
            if picture_span(files) and "json" in files:
                return files
        return self._members().get(key, {})

    def _members(self) -> Members:
        if self._index is None:
            self._index = index_tar(self._tar)
        return self._index

    def _read(self, span: tuple[int, int]) -> bytes:
        data = os.pread(self._file, span[1], span[0])
        if len(data) < span[1]:
            raise DataError(f"{self._tar}: truncated at byte {span[0] + len(data)}; {repair_hint(self._tar)}")
        return data

    def where(self, key: str, uid: str) -> str:
        """Name of a row in messages."""
        return f"shard {self._shard}: key {key}: uid {uid}"


def _open_pictures(tar: Path, shard: str, members: Members) -> ShardPictures:
    return ShardPictures(tar, shard, members=members)


class StoredPictures:
    """Random access to the stored pictures of all shards; the last few shards stay open.

    Args:
        download: The download step's artifact.
    """

    def __init__(self, download: Artifact) -> None:
        self._download = download
        self._open = functools.lru_cache(_OPEN_SHARDS)(self.shard)

    def shard(self, shard: str) -> ShardPictures:
        """Open one shard.

        Raises:
            DataError: If the shard is missing or damaged.
        """
        return ShardPictures(self._download.path(f"{shard}.tar"), shard, indexed=False)

    def read(self, shard: str, key: str, uid: str) -> bytes:
        """See ``ShardPictures.read``."""
        return self._open(shard).read(key, uid)

    def decode(self, shard: str, key: str, uid: str) -> Image.Image:
        """See ``ShardPictures.decode``."""
        return self._open(shard).decode(key, uid)


SAMPLE_COLUMNS = ("uid", "key", "url", "caption", "split")
"""Columns that ``good_samples`` gives."""


def good_samples(tar: Path, parquet: Path, shard: str) -> tuple[pa.Table, ShardPictures]:
    """The good rows of a shard, sorted by key, and its pictures; an absent caption is empty.

    Args:
        tar: Pictures of the shard.
        parquet: Table of the shard.
        shard: Name of the shard.

    Raises:
        DataError: If table and tar do not have the same keys; names shard and key.
    """
    all_rows = read_table(parquet, [*SAMPLE_COLUMNS, "status"])
    may_have_more = TAKEN_IN in (all_rows.schema.metadata or {})
    table = good_rows(all_rows).sort_by("key").select(SAMPLE_COLUMNS).replace_schema_metadata()
    table = table.set_column(3, "caption", pc.fill_null(table.column("caption"), ""))
    pictures = ShardPictures(tar, shard)
    extra_keys = pictures.keys() - set(table.column("key").to_pylist())
    if extra_keys and not may_have_more:
        raise DataError(f"shard {shard}: {tar} has key {min(extra_keys)}, which is not a good row of {parquet.name}")
    return table, pictures


def picture_span(files: dict[str, tuple[int, int]]) -> tuple[int, int] | None:
    """Offset and size of the picture among the files of a row, in bytes; None if it has none."""
    spans = (span for extension, span in files.items() if extension.rpartition(".")[2].lower() in _PICTURES)
    return next(spans, None)
