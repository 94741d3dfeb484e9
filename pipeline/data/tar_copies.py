"""A workspace's own copies of tars that somebody else wrote, without the samples of forgotten pairs.

A tar that is taken in is copied where it or the workspace is remote. Elsewhere a link leads to its owner's, which
stays.
"""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import IO

import pyarrow as pa

from pipeline.data.blank import are_blank
from pipeline.data.reading import Reading
from pipeline.data.tar_index import index_tar, picture_span, spans_of
from pipeline.data.tar_samples import Span, urls_in
from pipeline.data.tars import read_tar
from pipeline.workspace.forgotten import Forgotten
from pipeline.workspace.hashing import HashedFile
from pipeline.workspace.store import Artifact

_BLOCK_BYTES = 8 << 20
_OFFSET = "picture_offset"


def leave_out_forgotten(download: Artifact, shard: str, table: pa.Table, forgotten: Forgotten) -> pa.Table:
    """Take forgotten pairs out of the copy of a tar; a link, and so its owner's tar, stays as it is.

    To do it a second time changes nothing. What stays keeps its bytes and its order.

    Args:
        download: The artifact of the download step.
        shard: Name of the shard.
        table: The shard's table, in which the rows of forgotten pairs are empty.
        forgotten: What is forgotten; samples of the tar that are no rows, such as repeated pairs and those with several
            pictures, are compared, too.

    Returns:
        The table, with the places where its pictures lie now.

    Raises:
        DataError: If the tar is damaged.
    """
    name = f"{shard}.tar"
    if download.is_link(name):
        return table
    tar = download.path(name)
    samples = list(read_tar(tar, Reading(lines=[(str(tar), 0)])))
    is_forgotten = forgotten.has_rows([sample.uid for sample in samples], [sample.url for sample in samples])
    keys = {sample.key for sample, goes in zip(samples, is_forgotten, strict=True) if goes}
    keys |= _forgotten_besides(tar, {sample.key for sample in samples}, forgotten)
    keys.update(table.filter(pa.array(are_blank(table))).column("key").to_pylist())
    spans = spans_of(tar, keys)
    if spans:
        with download.write(name) as path, HashedFile(path) as target, tar.open("rb") as source:
            _copy_without(spans, source, target, tar.stat().st_size)
    return _with_places(table, download.path(name))


def _forgotten_besides(tar: Path, usable: Collection[str], forgotten: Forgotten) -> set[str]:
    """Keys of the forgotten ones among the samples of a tar that cannot be used."""
    with tar.open("rb") as stream:

        def read(span: Span) -> bytes:
            stream.seek(span[0])
            return stream.read(span[1])

        others = ((key, urls_in(files, read)) for key, files in index_tar(tar).items() if key not in usable)
        return {key for key, urls in others if any(forgotten.has(urls))}


def _copy_without(spans: Iterable[tuple[int, int]], source: IO[bytes], target: HashedFile, num_bytes: int) -> None:
    """Copy a file of so many bytes without some spans of it."""
    copied = 0
    for start, stop in [*spans, (num_bytes, num_bytes)]:
        source.seek(copied)
        while data := source.read(min(_BLOCK_BYTES, start - copied)):
            target.write(data)
            copied += len(data)
        copied = stop


def _with_places(table: pa.Table, tar: Path) -> pa.Table:
    """The table of a shard with the offsets of its pictures in a tar; one of an earlier release has none."""
    if _OFFSET not in table.column_names:
        return table
    members = index_tar(tar)
    spans = [picture_span(members.get(key, {})) for key in table.column("key").to_pylist()]
    before = table.column(_OFFSET).to_pylist()  # null of a row whose picture is damaged
    offsets = [span[0] if span and place is not None else None for span, place in zip(spans, before, strict=True)]
    return table.set_column(table.schema.get_field_index(_OFFSET), _OFFSET, pa.array(offsets, pa.int64()))
