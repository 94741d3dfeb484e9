"""The download step: img2dataset downloads and writes one shard, and this module checks and sorts it.

This module replaces three parts of img2dataset:
- ``limited_urlopen``: adds a deadline and a largest size per URL, and a limit of connections per host.
- ``PictureResizer``: img2dataset's resizer ignores EXIF orientation, stores 16-bit pictures white, fills the missing
  part of a truncated file with gray, and decodes a decompression bomb before it measures it.
- ``_Writer``: remembers the first disk error, which img2dataset prints and ignores.
img2dataset writes rows in order of completion. The shard is sorted by key before it is published, and the times of its
tar members are zero, so that the same responses give the same bytes.
"""

import io
import json
import logging
import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.data.fetch import limited_urlopen
from pipeline.data.rows import require_columns
from pipeline.data.shards import Members, good_rows, index_tar, read_member
from pipeline.errors import ConfigError, DataError
from pipeline.pictures import DecodedPicture, PictureError, read, resize, square
from pipeline.recipe.sections import DownloadConfig
from pipeline.workspace.store import translate_os_errors

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import looks for a newer release on the network

from img2dataset.downloader import Downloader
from img2dataset.writer import WebDatasetSampleWriter

logging.getLogger("exifread").setLevel(logging.CRITICAL)

SHARD_DIGITS = 5
_PASSED_THROUGH = ("uid", "split")  # columns that img2dataset copies
_PILLOW_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_RESERVED = frozenset(
    {"key", "caption", "url", "width", "height", "original_width", "original_height", "status", "error_message"}
    | {"exif", "md5", "sha256", "sha512"}
)


def shard_names(num_rows: int, samples_per_shard: int) -> list[str]:
    """Names of the shards that hold ``num_rows`` rows: five digits, as in img2dataset."""
    return [f"{shard:0{SHARD_DIGITS}d}" for shard in range(-(-num_rows // samples_per_shard))]


def check_columns(config: DownloadConfig, columns: list[str], where: str) -> None:
    """Refuse extra columns that the pairs do not have or that img2dataset writes itself.

    Raises:
        ConfigError: If img2dataset writes a column of this name.
        DataError: If the pairs do not have a column.
    """
    conflicts = sorted(_RESERVED & set(config.extra_columns))
    if conflicts:
        names = ", ".join(conflicts)
        raise ConfigError(f"download.extra_columns: img2dataset writes {names} itself; rename or leave out")
    require_columns(columns, [*_PASSED_THROUGH, "url", "caption", *config.extra_columns], where=where)


def read_rows(pairs: Path, shard: str, config: DownloadConfig) -> pa.Table:
    """Read the rows of one shard; only the row groups that contain them are read.

    Args:
        pairs: ``pairs.parquet``.
        shard: Shard name.
        config: The recipe's section.
    """
    start, stop = int(shard) * config.samples_per_shard, (int(shard) + 1) * config.samples_per_shard
    columns = [*dict.fromkeys([*_PASSED_THROUGH, *config.extra_columns]), "caption", "url"]
    tables: list[pa.Table] = []
    with pq.ParquetFile(pairs) as parquet:
        first = 0
        for group in range(parquet.num_row_groups):
            num_rows = parquet.metadata.row_group(group).num_rows
            if first < stop and first + num_rows > start:
                table = parquet.read_row_group(group, columns=columns)
                tables.append(table.slice(max(0, start - first), min(stop, first + num_rows) - max(start, first)))
            first += num_rows
    return pa.concat_tables(tables).select(columns)


def download_shard(
    rows: pa.Table, shard: str, config: DownloadConfig, tar: Path, parquet: Path, stats: Path
) -> Counter[str]:
    """Download one shard with img2dataset, check it and sort it by key.

    Args:
        rows: The rows of ``read_rows``.
        shard: Shard name.
        config: The recipe's section.
        tar: File to write; a scratch folder exists next to it during the download.
        parquet: File to write.
        stats: File to write.

    Returns:
        Numbers of rows: ``in`` = ``ok`` + ``failed_to_download`` + ``failed_to_resize``.

    Raises:
        DataError: If img2dataset did not write every row, or tar and table differ.
        StepError: If the disk is full.
    """
    scratch = tar.with_name(f"{tar.name}.d")
    scratch.mkdir()
    try:
        with translate_os_errors(f"download: shard {shard}: {scratch.parent}"):
            _run_img2dataset(_convert_for_json(rows), shard, config, scratch)
            members = index_tar(scratch / f"{shard}.tar")
            table, counts = _check(scratch, shard, rows, members)
            _write_in_order(scratch / f"{shard}.tar", tar, members)
            pq.write_table(table, parquet)
            shutil.copyfile(scratch / f"{shard}_stats.json", stats)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return counts


def failure_causes(stats: list[dict[str, Any]]) -> Counter[str]:
    """Number of rows by cause of failure, summed over the ``_stats.json`` of shards."""
    causes: Counter[str] = Counter()
    for shard_stats in stats:
        causes.update({cause: count for cause, count in shard_stats["status_dict"].items() if cause != "success"})
    return causes


class PictureResizer:
    """Decodes, resizes and encodes a picture; img2dataset calls it for each download.

    Args:
        config: The recipe's section.
    """

    def __init__(self, config: DownloadConfig) -> None:
        self._config = config

    def __call__(self, stream: io.BytesIO, boxes: Any = None) -> tuple[Any, ...]:  # noqa: ARG002  (faces to blur)
        """Return (bytes, width, height, original width, original height, error), as img2dataset's resizer does."""
        try:
            return *self._store(stream.getvalue()), None
        except PictureError as error:
            return None, None, None, None, None, error.reason

    def _store(self, data: bytes) -> tuple[bytes, int, int, int, int]:
        config = self._config
        least_px = 0 if config.resize_mode == "no" else config.image_px
        picture = read(data, where="download", side_px=least_px, max_area_px=config.max_image_area_px)
        shorter, longer = sorted((picture.width, picture.height))
        if shorter < config.min_image_px:
            raise PictureError("download", "image too small")
        if longer > config.max_aspect_ratio * shorter:
            raise PictureError("download", "aspect ratio too large")
        image = self._resize(picture)
        is_stored_format = picture.format == _PILLOW_FORMATS[config.encode_format]
        if config.skip_reencode and image is picture.image and picture.is_plain and is_stored_format:
            return data, picture.width, picture.height, picture.width, picture.height
        return self._encode(image), *image.size, picture.width, picture.height

    def _resize(self, picture: DecodedPicture) -> Image.Image:
        """The picture at its target size; the same object if it has that size already."""
        config, image, side_px = self._config, picture.image, self._config.image_px
        of_longer = config.resize_mode in {"border", "keep_ratio_largest"}
        side = (max if of_longer else min)(picture.width, picture.height)
        if config.resize_mode == "no" or (config.resize_only_if_bigger and side <= side_px):
            return image
        is_square = config.resize_mode in {"border", "center_crop"}
        if is_square and image.size == (side_px, side_px):
            return image
        if config.resize_mode == "center_crop":
            return Image.fromarray(square(image, side_px))
        width, height = (max(1, round(length * side_px / side)) for length in (picture.width, picture.height))
        if image.size != (width, height):
            image = resize(image, (width, height))
        if config.resize_mode != "border":
            return image
        canvas = Image.new("RGB", (side_px, side_px), "white")
        canvas.paste(image, ((side_px - width) // 2, (side_px - height) // 2))
        return canvas

    def _encode(self, image: Image.Image) -> bytes:
        buffer, quality = io.BytesIO(), self._config.encode_quality
        option = {"compress_level": quality} if self._config.encode_format == "png" else {"quality": quality}
        image.save(buffer, _PILLOW_FORMATS[self._config.encode_format], **option)
        return buffer.getvalue()


class _Writer(WebDatasetSampleWriter):
    """img2dataset's writer that remembers its first error."""

    error: Exception | None = None

    def write(self, img_str: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
        try:
            super().write(img_str, key, caption, meta)
        except Exception as error:  # img2dataset hides errors of its writer, so the first one is remembered here
            self.error = self.error or error
            raise


def _run_img2dataset(rows: pa.Table, shard: str, config: DownloadConfig, scratch: Path) -> None:
    with pa.ipc.new_file(str(scratch / "rows.arrow"), rows.schema) as sink:
        sink.write_table(rows)
    writers: list[_Writer] = []

    def make_writer(*args: Any) -> _Writer:
        writers.append(_Writer(*args))
        return writers[-1]

    downloader = Downloader(
        sample_writer_class=make_writer,
        resizer=PictureResizer(config),
        thread_count=min(config.num_threads, rows.num_rows),
        save_caption=True,
        extract_exif=True,
        output_folder=str(scratch),
        column_list=rows.column_names,
        timeout=config.timeout_s,
        number_sample_per_shard=config.samples_per_shard,
        oom_shard_count=SHARD_DIGITS,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format=config.encode_format,
        retries=config.retries,
        user_agent_token=config.user_agent_token or None,
        disallowed_header_directives=list(config.disallowed_header_directives) or None,
    )
    with limited_urlopen(config.deadline_s, max_per_host=config.resources.max_per_host):
        downloader.download_shard((int(shard), str(scratch / "rows.arrow")))
    for writer in writers:
        if isinstance(writer.error, OSError):
            raise writer.error
        if writer.error is not None:
            raise DataError(f"download: shard {shard}: a row could not be written: {writer.error}") from writer.error


def _convert_for_json(rows: pa.Table) -> pa.Table:
    """Convert columns to text, except those of text, numbers or booleans, because img2dataset writes them as JSON."""
    for index, name in enumerate(rows.column_names):
        kind = rows.schema.field(name).type
        if not (
            pa.types.is_string(kind)
            or pa.types.is_integer(kind)
            or pa.types.is_floating(kind)
            or pa.types.is_boolean(kind)
        ):
            texts = [None if value is None else str(value) for value in rows.column(name).to_pylist()]
            rows = rows.set_column(index, name, pa.array(texts, pa.string()))
    return rows


def _check(scratch: Path, shard: str, rows: pa.Table, members: Members) -> tuple[pa.Table, Counter[str]]:
    table = pq.read_table(scratch / f"{shard}.parquet").sort_by("key")
    if sorted(table.column("uid").to_pylist()) != sorted(rows.column("uid").to_pylist()):
        raise DataError(
            f"download: shard {shard}: img2dataset received {rows.num_rows} rows and returned {table.num_rows}; "
            "the worker's log names the lost ones"
        )
    stats = json.loads((scratch / f"{shard}_stats.json").read_text())
    statuses = Counter(table.column("status").to_pylist())
    good = good_rows(table)
    if stats["successes"] != good.num_rows or members.keys() != set(good.column("key").to_pylist()):
        raise DataError(
            f"download: shard {shard}: {good.num_rows} good rows in the table, {stats['successes']} in the stats, "
            f"{len(members)} in the tar"
        )
    with (scratch / f"{shard}.tar").open("rb") as stream:
        for row, (key, uid) in enumerate(
            zip(good.column("key").to_pylist(), good.column("uid").to_pylist(), strict=True)
        ):
            if json.loads(read_member(stream, members[key]["json"]))["uid"] != uid:
                raise DataError(f"download: shard {shard}: row {row}: the tar has another uid than {uid}")
    failures = {name: statuses[name] for name in ("failed_to_download", "failed_to_resize")}
    return table, Counter({"in": table.num_rows, "ok": good.num_rows, **failures})


def _write_in_order(source: Path, target: Path, members: Members) -> None:
    with source.open("rb") as old, tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as new:
        for key in sorted(members):
            for extension, span in members[key].items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size, member.mode, member.uname, member.gname = span[1], 0o444, "bigdata", "bigdata"
                new.addfile(member, io.BytesIO(read_member(old, span)))  # as webdataset writes it, with time zero
