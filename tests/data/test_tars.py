"""Shards that people have already: read as they are, checked by key and uid as our own."""

import hashlib
import io
import json
import re
import tarfile
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.data.decoders import Measures
from pipeline.data.make_pairs import write_pairs
from pipeline.data.pairs import Pairs
from pipeline.data.rows import make_uid
from pipeline.data.shards import StoredPictures, good_samples
from pipeline.data.sources import Source, count_pairs
from pipeline.data.tars import TakenIn, count_samples, take_in
from pipeline.errors import DataError
from pipeline.forget.rewrite import rewrite
from pipeline.recipe.pairs_sections import PairsConfig
from pipeline.recipe.sections import SHARD_COLUMNS, DownloadConfig
from pipeline.workspace.forgotten import Forgotten, Rewrite
from pipeline.workspace.manifest import Manifest, ShardRecord
from pipeline.workspace.store import Artifact
from tests.data.conftest import make_picture

Files = dict[str, bytes]
_measures: list[Measures] = []
"""The decoders of this file, which take a second to start."""


@pytest.fixture(scope="module", autouse=True)
def _decoders() -> Generator[None]:
    with Measures(DownloadConfig()) as measures:
        _measures.append(measures)
        yield
        _measures.clear()


def _take_in(tar: Path, rows: pa.Table, shard: str, output: Artifact) -> TakenIn:
    return take_in(str(tar), rows, shard, output, _measures[0])


def _write_tar(path: Path, files: Files, layout: int = tarfile.GNU_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", errors="surrogateescape", format=layout) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def _img2dataset(number: int, **fields: Any) -> Files:
    key = f"{number:09d}"
    record = {"url": f"http://a/{number}.jpg", "caption": f"caption {number}", "key": key, "status": "success"}
    record |= {"width": 96, "height": 64, "original_width": 200, "original_height": 100, "sha256": "f" * 64} | fields
    return {
        f"{key}.jpg": make_picture(number),
        f"{key}.json": json.dumps(record).encode(),
        f"{key}.txt": str(record["caption"] or "").encode(),
    }


def _url_of(picture: bytes) -> str:
    """The URL of a sample without one."""
    return f"sha256:{hashlib.sha256(picture).hexdigest()}"


def _make(folder: Path, output: Path, **config: Any) -> tuple[Pairs, Artifact, dict[str, int]]:
    """The list of pairs and the shards of a folder, as the pairs step and the download step make them."""
    listed, shards = Artifact(str(output / "pairs")), Artifact(str(output / "download"))
    extra = config.pop("extra_columns", ())
    summary = write_pairs(Source(PairsConfig(source="shards", path=str(folder), **config), extra_columns=extra), listed)
    pairs = Pairs(listed)
    for part, tar in zip(pairs.parts, sorted(folder.rglob("*.tar")), strict=True):
        _take_in(tar, pairs.part(part.name), part.name, shards)
    return pairs, shards, dict(summary.counts)


def test_shards_of_img2dataset_are_taken_in_as_they_are(tmp_path: Path) -> None:
    for shard in range(2):
        files = {k: v for n in range(3) for k, v in _img2dataset(10 * shard + n, punsafe=0.25, uid="f" * 32).items()}
        _write_tar(tmp_path / f"in/{shard:05d}.tar", files)
    pairs, shards, counts = _make(tmp_path / "in", tmp_path / "out", extra_columns=("punsafe", "source_uid"))
    assert counts == {"in": 6, "ok": 6}
    assert count_pairs(PairsConfig(source="shards", path=str(tmp_path / "in"))) == 6
    assert shards.path("00001.tar").resolve() == tmp_path / "in/00001.tar"
    table = pq.read_table(shards.path("00001.parquet"))
    assert set(table.column_names) - SHARD_COLUMNS == {"uid", "split", "punsafe", "source_uid"}
    row = table.to_pylist()[0]
    assert row["uid"] == make_uid("http://a/10.jpg", "caption 10")
    assert (row["key"], row["status"], row["punsafe"], row["sha256"]) == ("000000010", "success", "0.25", "f" * 64)
    assert row["source_uid"] == "f" * 32  # its own, as img2dataset copied it
    assert (row["width"], row["original_height"]) == (96, 100)
    samples, pictures = good_samples(shards.path("00001.tar"), shards.path("00001.parquet"), "00001")
    keys_and_uids = zip(samples["key"].to_pylist(), samples["uid"].to_pylist(), strict=True)
    assert [pictures.read(*one) for one in keys_and_uids] == [make_picture(number) for number in (10, 11, 12)]
    assert samples["caption"].to_pylist() == [f"caption {number}" for number in (10, 11, 12)]
    assert pairs.num_rows == 6


def test_a_tar_without_json_has_its_texts_and_urls_of_its_own(tmp_path: Path) -> None:
    files = {
        "a.b/cat.JPG": make_picture(0),
        "a.b/cat.txt": b"a cat",
        "dog.png": make_picture(1, kind="PNG"),
        "dog.txt": b"",
    }
    _write_tar(tmp_path / "in/x/y.tar", files)
    pairs, shards, _ = _make(tmp_path / "in", tmp_path / "out")
    rows = pairs.read(0, 2, ["url", "caption", "uid", "key"]).to_pylist()
    assert [(row["url"], row["caption"], row["key"]) for row in rows] == [
        (_url_of(files["a.b/cat.JPG"]), "a cat", "a.b/cat"),
        (_url_of(files["dog.png"]), "", "dog"),
    ]
    pictures = StoredPictures(shards)
    assert pictures.read("00000", "a.b/cat", rows[0]["uid"]) == make_picture(0)
    with pytest.raises(DataError, match="the row has uid"):
        pictures.read("00000", "a.b/cat", rows[1]["uid"])
    table = pq.read_table(shards.path("00000.parquet")).to_pylist()
    assert (table[0]["width"], table[0]["height"]) == (96, 64)


def test_samples_without_a_url_keep_their_uids_wherever_their_tar_lies(tmp_path: Path) -> None:
    one, other = ({f"{n}.jpg": make_picture(n), f"{n}.txt": b"text"} for n in (1, 2))
    _write_tar(tmp_path / "in/b.tar", one)
    _write_tar(tmp_path / "more/sub/a.tar", other)  # earlier by name, and the list's first
    _write_tar(tmp_path / "more/sub/renamed.tar", one)
    uids = [_make(tmp_path / name, tmp_path / f"out-{name}")[0].batches(["uid", "url"]) for name in ("in", "more")]
    before, after = ({row["url"]: row["uid"] for table in tables for row in table.to_pylist()} for tables in uids)
    assert list(before) == [_url_of(make_picture(1))]
    assert after == before | {_url_of(make_picture(2)): make_uid(_url_of(make_picture(2)), "text")}


@pytest.mark.parametrize(
    ("files", "caption"),
    [
        ({"9.jpg": make_picture(9), "9.TXT": b"large letters"}, "large letters"),
        ({"9.JPG": make_picture(9), "9.JSON": b'{"caption": "large letters"}'}, "large letters"),
        ({"9.jpg": make_picture(9), "9.json": b"[[0, 1, 2, 3]]", "9.txt": b"with boxes"}, "with boxes"),
        ({"9 .jpg": make_picture(9), "9 .txt": b"a key with a space"}, "a key with a space"),
        ({"9.depth.png": b"", "9.jpg": make_picture(9), "9.txt": b"with depth"}, "with depth"),
        ({"9.left.jpg": make_picture(9), "9.txt": b"the one picture"}, "the one picture"),
        ({"9.jpg": make_picture(9), "9.json": b'{"url": " \\u00a0http://a/9 \\n", "uid": [1]}'}, ""),
    ],
)
def test_what_is_taken_in_can_be_read(files: Files, caption: str, tmp_path: Path) -> None:
    _write_tar(tmp_path / "in/0.tar", files)
    _, shards, counts = _make(tmp_path / "in", tmp_path / "out")
    assert counts == {"in": 1, "ok": 1}
    samples, pictures = good_samples(shards.path("00000.tar"), shards.path("00000.parquet"), "00000")
    [row] = samples.to_pylist()
    assert row["caption"] == caption
    assert pictures.read(row["key"], row["uid"]) == make_picture(9)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"9.txt": b"text"}, "key 9: no picture"),
        ({"9.jpg": b"", "9.txt": b"caf\xe9"}, "key 9: 'utf-8' codec"),
        ({"9.jpg": b"", "9.json": b"{"}, "key 9: Expecting property name"),
        ({"9.jpg": b"", "9.json": b'{"caption": "\\ud83d"}'}, "key 9: .*surrogates not allowed"),
        ({"9.jpg": b"", "9.json": b'{"caption": "c", "w": "\\ud83d"}'}, "key 9: .*surrogates not allowed"),
        ({"9.jpg": b"", "9.json": b"[" * 100_000}, "key 9: nested too deeply"),
        ({"9.jpg": b"", "9.cls": b"7"}, "key 9: no text: neither .txt nor a record in .json"),
        ({"9.jpg": b"", "9.json": b"[1]"}, "key 9: no text: neither .txt nor a record in .json"),
        ({"9.jpg": b"", "9.png": b"", "9.txt": b""}, r"key 9: several pictures \(\.jpg, \.png\)"),
        ({"9.a.jpg": b"", "9.b.JPG": b"", "9.txt": b""}, r"key 9: several pictures \(\.a\.jpg, \.b\.JPG\)"),
        ({"9\udce9.jpg": b"", "9\udce9.txt": b""}, r"key 9\\udce9: a name that is not UTF-8"),
    ],
)
def test_a_strange_sample_is_counted_and_the_others_are_read(files: Files, reason: str, tmp_path: Path) -> None:
    _write_tar(tmp_path / "in/0.tar", _img2dataset(1) | files | _img2dataset(2))
    output = Artifact(str(tmp_path / "pairs"))
    source = Source(PairsConfig(source="shards", path=str(tmp_path / "in")), extra_columns=("w",))
    summary = write_pairs(source, output)
    assert summary.counts == {"in": 3, "ok": 2, "malformed": 1}
    [example] = summary.metrics["malformed_rows"]
    assert example.startswith(f"{tmp_path}/in/0.tar:")
    assert re.search(reason, example)
    part, shards = Pairs(output).part("00000"), Artifact(str(tmp_path / "download"))
    assert _take_in(tmp_path / "in/0.tar", part, "00000", shards).counts == {"in": 2, "ok": 2}
    good, pictures = good_samples(shards.path("00000.tar"), shards.path("00000.parquet"), "00000")
    assert [pictures.read(row["key"], row["uid"]) for row in good.to_pylist()] == [make_picture(1), make_picture(2)]


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["9.jpg", "9.txt", "9"])
def test_a_file_that_is_in_a_tar_twice_costs_its_sample(name: str, layout: int, tmp_path: Path) -> None:
    sample, long_name = {"9.jpg": make_picture(9), "9.txt": b"text", "9": b""}, {"x" * 200 + ".cls": b""}
    tar = tmp_path / "in/0.tar"
    _write_tar(tar, _img2dataset(1) | sample | (long_name if layout == tarfile.PAX_FORMAT else {}), layout)
    with tarfile.open(tar, "a", format=layout) as stream:
        stream.addfile(tarfile.TarInfo(name))
    output = Artifact(str(tmp_path / "pairs"))
    summary = write_pairs(Source(PairsConfig(source="shards", path=str(tmp_path / "in"))), output)
    assert Pairs(output).part("00000")["key"].to_pylist() == ["000000001"]
    reasons = [example.partition(": ")[2] for example in summary.metrics["malformed_rows"]]
    assert f"key 9: two files of one name (.{name[2:]})" in reasons


def test_folders_and_links_in_a_tar_are_no_samples(tmp_path: Path) -> None:
    tar = tmp_path / "in/0.tar"
    _write_tar(tar, {f"train/{name}": data for name, data in _img2dataset(1).items()})
    with tarfile.open(tar, "a") as stream:
        for name, kind in (("train", tarfile.DIRTYPE), ("train/000000001", tarfile.DIRTYPE), ("a", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type = kind
            stream.addfile(member)
    _, shards, counts = _make(tmp_path / "in", tmp_path / "out")
    assert counts == {"in": 1, "ok": 1}
    samples, _ = good_samples(shards.path("00000.tar"), shards.path("00000.parquet"), "00000")
    assert samples["key"].to_pylist() == ["train/000000001"]


def test_repeated_pairs_stay_in_the_tar_and_are_no_rows(tmp_path: Path) -> None:
    _write_tar(tmp_path / "in/0.tar", _img2dataset(1) | _img2dataset(2))
    _write_tar(tmp_path / "in/1.tar", _img2dataset(2) | _img2dataset(3))
    _, shards, counts = _make(tmp_path / "in", tmp_path / "out")
    assert counts == {"in": 4, "ok": 3, "duplicate": 1}
    samples, _ = good_samples(shards.path("00001.tar"), shards.path("00001.parquet"), "00001")
    assert samples["caption"].to_pylist() == ["caption 3"]


def test_a_tar_that_changes_after_the_list_was_made_is_refused(tmp_path: Path) -> None:
    _write_tar(tmp_path / "in/0.tar", _img2dataset(1) | _img2dataset(2))
    output = Artifact(str(tmp_path / "pairs"))
    write_pairs(Source(PairsConfig(source="shards", path=str(tmp_path / "in"))), output)
    _write_tar(tmp_path / "in/0.tar", _img2dataset(1, caption="another") | _img2dataset(2))
    with pytest.raises(DataError, match="key 000000001: is not what it was when the list of pairs was made"):
        _take_in(tmp_path / "in/0.tar", Pairs(output).part("00000"), "00000", Artifact(str(tmp_path / "out")))


def test_max_pairs_stops_in_the_middle_of_the_shards(tmp_path: Path) -> None:
    for shard in range(3):
        _write_tar(tmp_path / f"in/{shard}.tar", _img2dataset(2 * shard) | _img2dataset(2 * shard + 1))
    pairs, _, counts = _make(tmp_path / "in", tmp_path / "out", max_pairs=3)
    assert counts["ok"] == 3
    assert [part.num_rows for part in pairs.parts] == [2, 1, 0]


def test_a_damaged_tar_of_a_person_is_theirs_to_mend(tmp_path: Path) -> None:
    tar = tmp_path / "in/00000.tar"
    _write_tar(tar, _img2dataset(1))
    _, shards, _ = _make(tmp_path / "in", tmp_path / "out")
    tar.write_bytes(tar.read_bytes()[:-20_000])
    with pytest.raises(DataError, match=rf"truncated after .*; it is a link to {tar}: bring that file back"):
        good_samples(shards.path("00000.tar"), shards.path("00000.parquet"), "00000")
    with pytest.raises(DataError, match=r"truncated after .*; bring this file back from a copy, or leave it out"):
        _make(tmp_path / "in", tmp_path / "again")


def test_a_name_that_is_not_utf_8_costs_its_sample_alone_in_every_kind_of_tar(tmp_path: Path) -> None:
    strange = {"\udce9.jpg": b"", "\udce9.txt": b""}
    for number, layout in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        long_name = {} if layout == tarfile.USTAR_FORMAT else {"x" * 200 + ".jpg": b"", "x" * 200 + ".txt": b"long"}
        files = {**strange, **_img2dataset(number), **long_name}
        _write_tar(tmp_path / f"in/{number}.tar", files, layout)
    summary = write_pairs(
        Source(PairsConfig(source="shards", path=str(tmp_path / "in"))), Artifact(str(tmp_path / "out"))
    )
    assert summary.counts == {"in": 8, "ok": 4, "duplicate": 1, "malformed": 3}
    assert summary.metrics["malformed_rows"][0] == rf"{tmp_path}/in/0.tar:2: key \udce9: a name that is not UTF-8"


@pytest.mark.parametrize(
    ("picture", "cause"),
    [
        (b"no picture", "not a picture"),
        (b"", "not a picture"),
        (make_picture(5)[:-300], "image file is truncated"),  # its header is whole
    ],
)
def test_a_damaged_picture_is_a_failed_row_that_no_later_step_reads(picture: bytes, cause: str, tmp_path: Path) -> None:
    files = _img2dataset(1) | _img2dataset(5) | {"000000005.jpg": picture}
    _write_tar(tmp_path / "in/0.tar", files)
    listed, shards = Artifact(str(tmp_path / "pairs")), Artifact(str(tmp_path / "download"))
    write_pairs(Source(PairsConfig(source="shards", path=str(tmp_path / "in"))), listed)
    taken_in = _take_in(tmp_path / "in/0.tar", Pairs(listed).part("00000"), "00000", shards)
    assert taken_in.counts == {"in": 2, "ok": 1, "failed_to_resize": 1}
    assert taken_in.causes == {cause: 1}
    stats = shards.read_json("00000_stats.json")
    assert (stats["count"], stats["successes"], stats["failed_to_resize"]) == (2, 1, 1)
    assert stats["status_dict"] == {"success": 1, cause: 1}
    row = pq.read_table(shards.path("00000.parquet")).to_pylist()[1]
    assert (row["key"], row["status"], row["error_message"]) == ("000000005", "failed_to_resize", cause)
    assert row["width"] is row["sha256"] is row["picture_offset"] is None
    samples, _ = good_samples(shards.path("00000.tar"), shards.path("00000.parquet"), "00000")
    assert samples["key"].to_pylist() == ["000000001"]


_ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31 - 1, 2**31, 5_000_000_000, -1])
    | st.floats()
    | st.text(st.characters(codec=None), max_size=8)
    | st.sampled_from(["\ud83d", "a\0b", " x ", "x" * 131_073]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
_FIELDS = ("url", "caption", "text", "uid", "width", "height", "original_width", "original_height", "exif", "sha256")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=st.dictionaries(st.sampled_from([*_FIELDS, "punsafe"]), _ODD, max_size=6) | _ODD)
@example(record={"width": 5_000_000_000, "height": 1, "original_width": 5_000_000_000, "original_height": 1})
@example(record={"width": True, "height": True, "original_width": True, "original_height": True})
@example(record={"exif": "\ud83d", "sha256": "\udc00"})
def test_no_json_of_a_sample_ends_the_take_in(record: Any, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path) as name:
        folder = Path(name)
        odd = {"9.jpg": make_picture(9), "9.json": json.dumps(record).encode(), "9.txt": b"text"}
        _write_tar(folder / "in/0.tar", _img2dataset(1) | odd)
        extra = ("punsafe", "source_uid")
        pairs, shards, counts = _make(folder / "in", folder / "out", extra_columns=extra)
        assert counts["in"] == 2 == counts["ok"] + counts.get("malformed", 0)
        samples, pictures = good_samples(shards.path("00000.tar"), shards.path("00000.parquet"), "00000")
        assert samples.num_rows == pairs.num_rows == counts["ok"]
        for row in samples.to_pylist():
            assert pictures.read(row["key"], row["uid"])
        table = pq.read_table(shards.path("00000.parquet"))
        assert {(row["width"], row["height"]) for row in table.to_pylist()} == {(96, 64)}
        assert all(size >= 0 for size in table["original_width"].to_pylist())


def test_forget_leaves_a_damaged_picture_what_it_is(tmp_path: Path) -> None:
    files = {key: value for number in (1, 2, 5) for key, value in _img2dataset(number).items()}
    _write_tar(tmp_path / "in/0.tar", files | {"000000005.jpg": b"no picture"})
    listed, shards = Artifact(str(tmp_path / "pairs")), Artifact(str(tmp_path / "download"))
    write_pairs(Source(PairsConfig(source="shards", path=str(tmp_path / "in"))), listed)
    taken_in = _take_in(tmp_path / "in/0.tar", Pairs(listed).part("00000"), "00000", shards)
    shards.commit_shard(ShardRecord(shard="00000", counts=taken_in.counts, files=taken_in.files))
    shards.commit(Manifest(step="download", key="d", step_version=1, section={}, inputs={}))
    forgotten = Forgotten("salt").add(["http://a/1.jpg"], 0.0, {}, ())
    rewrite(shards, Rewrite("download", "d", ("00000",), "c"), forgotten, lambda: None, lambda _: None)
    record = shards.shard_record("00000")
    assert record.counts == {"in": 3, "ok": 1, "failed_to_download": 1, "failed_to_resize": 1}
    assert record.causes == {"forgotten": 1, "not a picture": 1}
    assert shards.read_json("00000_stats.json")["status_dict"] == {"success": 1, **record.causes}


def test_the_key_of_the_pairs_says_how_tars_are_read_and_not_where_they_lie() -> None:
    shards, listed = PairsConfig(source="shards", path="a"), PairsConfig(source="list", path="a")
    assert shards.path_in_key("a") == shards.path_in_key("b") == "by content, decoded, one picture"
    assert listed.path_in_key("a") == ""


def test_the_samples_of_a_small_tar_in_a_store_are_counted_as_here(tmp_path: Path) -> None:
    files = {"folder/a.b.jpg": b"1", "folder/a.txt": b"2", f"{'long' * 40}.jpg": b"3", "z.txt": b"4"}
    store = fsspec.filesystem("memory")
    for layout in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        _write_tar(tmp_path / "0.tar", files, layout)
        store.pipe("/counted/0.tar", (tmp_path / "0.tar").read_bytes())
        assert count_samples("memory://counted") == count_samples(str(tmp_path)) == 3
    store.pipe("/counted/0.tar", b"no tar")
    with pytest.raises(DataError, match=r"^memory:///counted/0\.tar: damaged tar \(.*leave it out of the folder"):
        count_samples("memory://counted")
    store.rm("/counted", recursive=True)
