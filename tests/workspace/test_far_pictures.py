"""A picture in the tar of an object store is fetched alone: what it costs, and that it is the right one."""

import asyncio
import io
import json
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.data import shards
from pipeline.data.decoders import Measures
from pipeline.data.make_pairs import write_pairs
from pipeline.data.pairs import Pairs
from pipeline.data.rows import make_uid
from pipeline.data.selection import label_file
from pipeline.data.shard_tables import Place
from pipeline.data.shard_writer import RESULT_FIELDS, ShardFiles, ShardRow, Span, write_shard
from pipeline.data.shards import StoredPictures
from pipeline.data.sources import Source
from pipeline.data.tars import take_in
from pipeline.errors import DataError
from pipeline.evaluate.parts import PartRunner
from pipeline.evaluate.prompts import PromptSet, Row
from pipeline.evaluate.work import Work
from pipeline.filter.examples import write_examples
from pipeline.filter.labels import write_labels
from pipeline.forget.rewrite import rewrite
from pipeline.pictures.frame import square
from pipeline.pictures.read import decode
from pipeline.recipe.pairs_sections import PairsConfig
from pipeline.recipe.sections import DownloadConfig, IndexConfig
from pipeline.retrieve.build import build_index
from pipeline.retrieve.index import Neighbour
from pipeline.retrieve.retriever import Retriever
from pipeline.sampling.edit_pictures import training_pca
from pipeline.serve.local_neighbours import LocalNeighbours
from pipeline.workspace.forgotten import Forgotten, Rewrite
from pipeline.workspace.manifest import Manifest, ShardRecord
from pipeline.workspace.store import Artifact, Workspace
from tests.s3_server import Request, S3Server
from tests.tiny.shards import make_embeddings, pixels, plain_picture, write_tar, write_vectors

_ROWS, _DIM = 40, 16
_SCHEMA = pa.schema(
    [*((name, pa.string()) for name in ("uid", "split", "caption", "url")), *RESULT_FIELDS, ("sha256", pa.string())]
)


def _picture(shard: str, row: int) -> bytes:
    """What begins as a JPEG file; no two are alike."""
    return b"\xff\xd8" + random.Random(f"{shard} {row}").randbytes(40_000 + 100 * row)


def _decodable(shard: str, row: int) -> bytes:
    """As ``_picture``, of one colour; what follows a JPEG file is not decoded."""
    junk = _picture(shard, row)
    return plain_picture(f"#{junk[2:5].hex()}", kind="JPEG") + junk


def _row(shard: str, row: int) -> dict[str, Any]:
    url, caption, is_good = f"http://a/{shard}/{row}.jpg", f"caption {row}", row % 9 != 8
    values = dict.fromkeys(_SCHEMA.names) | {"uid": make_uid(url, caption), "url": url, "caption": caption}
    values |= {"split": "train", "key": f"{shard}{row:02d}", "status": "success" if is_good else "failed_to_download"}
    sizes = ("width", "height", "original_width", "original_height")
    return values | (dict.fromkeys(sizes, 64) if is_good else {"error_message": "dns"})


def _write(download: Artifact, shard: str, picture: Callable[[str, int], bytes] = _picture) -> list[dict[str, Any]]:
    """Commit a shard as a download writes it; returns its good rows."""
    names, values = [f"{shard}.tar", f"{shard}.parquet", f"{shard}_stats.json"], [_row(shard, n) for n in range(_ROWS)]
    pictures = [picture(shard, number) for number in range(_ROWS)]
    rows = [
        ShardRow(row, Span(io.BytesIO(data), 0, len(data)) if row["status"] == "success" else None)
        for row, data in zip(values, pictures, strict=True)
    ]
    with download.write(names[0]) as tar, download.write(names[1]) as table, download.write(names[2]) as stats:
        counts = dict(write_shard(rows, _SCHEMA, "jpg", ShardFiles(tar, table, stats), start=0.0))
    files = {name: download.describe(name) for name in names}
    download.commit_shard(ShardRecord(shard=shard, counts=counts, files=files))
    return [row for row in values if row["status"] == "success"]


def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From here on this is a machine that has none of the files."""
    cache = tmp_path / "of-another-machine"
    shutil.rmtree(cache, ignore_errors=True)
    monkeypatch.setenv("UNCLIP_CACHE", str(cache))


def _of(requests: Sequence[Request], end: str) -> Counter[str]:
    return Counter(one.kind for one in requests if one.name.endswith(end))


def test_pictures_of_neighbours_cost_a_request_each_and_not_their_tars(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    workspace, query = Workspace(bucket), np.eye(_DIM, dtype=np.float32)[:1]
    embed, download = workspace.artifact("embed", "e"), workspace.artifact("download", "d")
    nearest = list[bytes]()
    for number in range(3):
        shard = f"{number:05d}"
        rows = _write(download, shard)
        vectors = np.random.default_rng(number).normal(size=(len(rows), _DIM))
        vectors[7 * number] = query
        nearest.append(_picture(shard, int(rows[7 * number]["key"][5:])))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        write_vectors(embed, shard, rows, vectors, vectors)
    embed.commit(Manifest(step="embed", key="e", step_version=1, section={}, inputs={"download": "d"}))
    index = Artifact(str(tmp_path / "index"))
    build_index(embed, index, IndexConfig(kind="flat", recall_target=1.0), seed=0)
    tar_bytes = sum(size for name, size in download.sizes().items() if name.endswith(".tar"))
    _elsewhere(monkeypatch, tmp_path)
    neighbours = LocalNeighbours(Retriever.open(index))
    for kinds in ({"HEAD": 6, "ranged GET": 3}, {"ranged GET": 3}):
        s3_server.counted()
        [results] = asyncio.run(neighbours.search(query, 3, "image", num_pictures=3))
        requests = s3_server.counted()
        assert sorted(row.picture or b"" for row in results) == sorted(nearest)
        assert _of(requests, ".tar") == kinds
        assert sum(one.num_bytes for one in requests if "download" in one.name) < 0.1 * tar_bytes
    assert not [one for one in requests if one.name.endswith(".parquet") and "download" in one.name]


def test_principal_components_cost_the_embeddings_of_the_pictures_alone(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here, far = Artifact(str(tmp_path / "embed")), Artifact(f"{bucket}/embed/e")
    vectors = np.random.default_rng(0).normal(size=(2000, 512)).astype(np.float32)
    for artifact in (here, far):
        make_embeddings(artifact, vectors, vectors, 1000, held_out_every=10)
    _elsewhere(monkeypatch, tmp_path)
    s3_server.counted()
    of_store = training_pca(far)
    num_bytes = sum(one.num_bytes for one in s3_server.counted() if one.name.endswith(".parquet"))
    assert 2 * vectors.size < num_bytes < 3 * vectors.size  # one of two columns of half precision
    torch.testing.assert_close(of_store.variance, training_pca(here).variance)


def test_pictures_of_a_search_are_fetched_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed, query = Workspace(str(tmp_path)).artifact("embed", "e"), np.eye(_DIM, dtype=np.float32)
    make_embeddings(embed, query, query, _DIM)
    index = Artifact(str(tmp_path / "index"))
    build_index(embed, index, IndexConfig(kind="flat", recall_target=1.0), seed=0)
    retriever, both = Retriever.open(index), threading.Barrier(2)

    def picture(neighbour: Neighbour) -> bytes:
        both.wait(60)
        return b"\xff\xd8" + neighbour.uid.encode()

    monkeypatch.setattr(retriever, "picture", picture)
    results = asyncio.run(LocalNeighbours(retriever).search(query[:2], 3, "image", num_pictures=2))
    for rows in results:
        uids = [row.picture and row.picture[2:].decode() for row in rows]
        assert uids == [rows[0].columns["uid"], rows[1].columns["uid"], None]


def test_every_picture_is_read_at_its_place(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    download = Artifact(f"{bucket}/download/d")
    rows = _write(download, "00000")
    _elsewhere(monkeypatch, tmp_path)
    pictures = StoredPictures(download, by_ranges=True)
    for row in rows:
        assert pictures.read("00000", row["key"], row["uid"]) == _picture("00000", int(row["key"][5:]))
    assert _of(s3_server.counted(), ".tar")["ranged GET"] == len(rows)
    with pytest.raises(DataError, match=r"key 0000003: uid .*: the row has uid .* in s3://.*00000.tar"):
        pictures.read("00000", rows[3]["key"], rows[4]["uid"])
    with pytest.raises(DataError, match=r"key 0000008: .*: no picture and json of this key"):
        pictures.read("00000", "0000008", make_uid("http://a/00000/8.jpg", "caption 8"))


def test_a_tar_that_goes_away_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    download = Artifact(f"{bucket}/download/d")
    rows = _write(download, "00000")
    _elsewhere(monkeypatch, tmp_path)
    pictures = StoredPictures(download, by_ranges=True)
    pictures.read("00000", rows[0]["key"], rows[0]["uid"])
    download.remove("00000.tar")
    with pytest.raises(DataError, match=r"s3://.*00000\.tar: is gone since it was opened"):
        pictures.read("00000", rows[1]["key"], rows[1]["uid"])


def test_a_damaged_picture_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    download = Artifact(f"{bucket}/download/d")
    rows = _write(download, "00000")
    content = bytearray(download.read_bytes("00000.tar"))
    table = pq.read_table(download.path("00000.parquet"), columns=list(Place._fields)).to_pylist()
    content[table[5]["picture_offset"] + 1000] ^= 1
    download.write_bytes("00000.tar", bytes(content))
    _elsewhere(monkeypatch, tmp_path)
    pictures = StoredPictures(download, by_ranges=True)
    assert pictures.read("00000", rows[4]["key"], rows[4]["uid"]) == _picture("00000", 4)
    with pytest.raises(
        DataError, match=r"key 0000005: .*: the picture in s3://.*00000.tar does not match its checksum"
    ):
        pictures.read("00000", rows[5]["key"], rows[5]["uid"])


def test_what_forget_leaves_is_read_at_its_new_place(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    download = Artifact(f"{bucket}/download/d")
    rows, last = _write(download, "00000"), _row("00000", _ROWS - 1)
    download.commit(Manifest(step="download", key="d", step_version=1, section={}, inputs={}))
    old_tar = download.read_bytes("00000.tar")
    _elsewhere(monkeypatch, tmp_path)
    pictures = StoredPictures(download, by_ranges=True)
    for row in (rows[2], last):
        pictures.read("00000", row["key"], row["uid"])
    # Another machine rewrites the shard, while a server reads it.
    forgets = {row["uid"] for row in rows if int(row["key"][5:]) in {1, *range(10, 30)}}
    forgotten = Forgotten("salt").add(forgets, 0.0, {}, ())
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    rewrite(Artifact(download.uri), Rewrite("download", "d", ("00000",), "c"), forgotten, lambda: None, lambda _: None)
    new_tar = download.read_bytes("00000.tar")
    _elsewhere(monkeypatch, tmp_path)
    for row in rows:
        number = int(row["key"][5:])
        if row["uid"] not in forgets:
            s3_server.counted()
            assert pictures.read("00000", row["key"], row["uid"]) == _picture("00000", number)
    assert _of(s3_server.counted(), ".tar") == {"ranged GET": 1}
    with pytest.raises(DataError, match=r"key 0000001: .*: no picture and json of this key"):
        pictures.read("00000", rows[1]["key"], rows[1]["uid"])
    # A kill between table and tar leaves the old tar beside the new table.
    download.write_bytes("00000.tar", old_tar)
    assert StoredPictures(download, by_ranges=True).read("00000", last["key"], last["uid"]) == _picture("00000", 39)
    assert len(new_tar) < len(old_tar) / 2


def test_pictures_of_shards_that_are_taken_in_are_read_at_their_places(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    members = [
        *((f"{'long/' * 30}{n:04d}.jpg", _decodable("a", n)) for n in range(30)),
        *((f"{'long/' * 30}{n:04d}.txt", f"caption {n}".encode()) for n in range(30)),
    ]
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in/0.tar", members)
    listed, download = Artifact(str(tmp_path / "pairs")), Artifact(f"{bucket}/download/d")
    write_pairs(Source(PairsConfig(source="shards", path=str(tmp_path / "in"))), listed)
    part = Pairs(listed).part("00000")
    with Measures(DownloadConfig()) as measures:
        take_in(str(tmp_path / "in/0.tar"), part, "00000", download, measures)
    _elsewhere(monkeypatch, tmp_path)
    pictures = StoredPictures(download, by_ranges=True)
    s3_server.counted()
    for row in part.to_pylist():
        number = int(row["caption"].split()[1])
        assert pictures.read("00000", row["key"], row["uid"]) == _decodable("a", number)
    assert _of(s3_server.counted(), ".tar") == {"HEAD": 2, "ranged GET": 30}


@pytest.mark.parametrize("is_sorted", [True, False])
def test_a_table_without_places_costs_a_search_or_else_the_tar(
    *, is_sorted: bool, bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    download, numbers = Artifact(f"{bucket}/download/d"), list(range(400))
    if not is_sorted:
        random.Random(0).shuffle(numbers)
    members = list[tuple[str, bytes]]()
    for number in numbers:
        record = json.dumps({"uid": f"uid {number}"}).encode()
        members += [(f"{number:05d}.jpg", _picture("b", number)[:20_000]), (f"{number:05d}.json", record)]
    with download.write("00000.tar") as path:
        write_tar(path, members)
    with download.write("00000.parquet") as path:
        pq.write_table(pa.table({"key": [f"{number:05d}" for number in range(400)]}), path)
    monkeypatch.setattr(shards, "_SEARCHES", 3)
    tar_bytes = download.sizes()["00000.tar"]
    _elsewhere(monkeypatch, tmp_path)
    pictures, whole = StoredPictures(download, by_ranges=True), list[int]()
    for number in (7, 300, 399, 20):
        s3_server.counted()
        assert pictures.read("00000", f"{number:05d}", f"uid {number}") == _picture("b", number)[:20_000]
        requests = [one for one in s3_server.counted() if one.name.endswith(".tar")]
        whole.append(sum(one.num_bytes for one in requests if one.kind == "GET"))
        assert sum(one.num_bytes for one in requests if one.kind == "ranged GET") < 0.2 * tar_bytes
    assert whole == ([0, 0, 0, tar_bytes] if is_sorted else [tar_bytes, 0, 0, 0])


def _runner(rows: Sequence[Row], download: Artifact, folder: Path) -> PartRunner:
    """An evaluation of rows, without networks."""
    cascade: Any = SimpleNamespace(clip=None, sides_px={"decoder": 16, "upsampler_1": 32})
    work = Work(PromptSet((), "captions"), PromptSet((), "trained"), rows, "validation", (), ())
    return PartRunner(cascade, work, download, Artifact(str(folder / "evaluate")), 0)


def _row_of(shard: str, row: dict[str, Any]) -> Row:
    no_vector = np.zeros(_DIM, np.float16)
    return Row(row["uid"], row["key"], shard, row["caption"], no_vector, no_vector)


def test_real_pictures_of_an_evaluation_cost_a_request_each_and_not_their_tars(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    download, names = Artifact(f"{bucket}/download/d"), [f"{number:05d}" for number in range(6)]
    rows = [_row_of(shard, _write(download, shard, _decodable)[int(shard)]) for shard in names]
    _elsewhere(monkeypatch, tmp_path)
    s3_server.counted()
    pictures = _runner(rows, download, tmp_path)._real_pictures(rows)
    assert _of(s3_server.counted(), ".tar") == {"HEAD": 2 * len(rows), "ranged GET": len(rows)}
    for row, picture in zip(rows, pictures, strict=True):
        stored = decode(_decodable(row.shard, int(row.key[5:])), where="")
        np.testing.assert_array_equal(picture, square(stored, 32))


def test_real_pictures_of_an_evaluation_are_fetched_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, together = [_row_of("00000", _row("00000", number)) for number in range(4)], threading.Barrier(4)

    def decode(_self: StoredPictures, _shard: str, key: str, _uid: str) -> Image.Image:
        together.wait(60)
        return Image.new("RGB", (32, 32), (int(key), 0, 0))

    monkeypatch.setattr(StoredPictures, "decode", decode)
    pictures = _runner(rows, Artifact(str(tmp_path)), tmp_path)._real_pictures(rows)
    assert [int(picture[0, 0, 0]) for picture in pictures] == [int(row.key) for row in rows]


def test_examples_of_a_filter_cost_a_request_for_each_picture_and_not_their_tars(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What docs/scaling.md says of an example of a duplicate, without the checksums at the commit."""
    download, output = Artifact(f"{bucket}/download/d"), Artifact(f"{bucket}/filter/f")
    stays, again = _write(download, "00000", _decodable)[0], _write(download, "00001", _decodable)[3]
    measures = pa.table({"uid": [again["uid"]], "key": [again["key"]], "reason": [""], "detail": [""]})
    duplicate = {"row": 0, "reason": "duplicate", "detail": "", "same_as": stays["uid"], "same_as_shard": "00000"}
    with output.write(label_file("00001")) as path:
        counts, _ = write_labels(measures, [duplicate], path, where="")
    _elsewhere(monkeypatch, tmp_path)
    for artifact, name in ((download, "00000.parquet"), (download, "00001.parquet"), (output, label_file("00001"))):
        artifact.path(name)  # the worker of the passes has them
    s3_server.counted()
    write_examples(output, download, [ShardRecord(shard="00001", counts=counts, files={})], 6)
    requests = s3_server.counted()
    assert Counter(one.kind for one in requests) == {"HEAD": 9, "ranged GET": 2, "PUT": 3}
    assert _of(requests, ".tar") == {"HEAD": 4, "ranged GET": 2}
    [example] = output.read_json("examples.json")["examples"]["duplicate"]
    shown = [pixels(output.read_bytes(one["file"])) for one in example["pictures"]]
    np.testing.assert_array_equal(shown, [pixels(_decodable("00001", 3)), pixels(_decodable("00000", 0))])
