"""A folder of pictures in an object store: its pairs, its pictures, and what is strange about it."""

import asyncio
import itertools
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.folders import count_pictures, has_pictures, read_folder
from pipeline.data.lists import Span
from pipeline.data.make_pairs import write_pairs
from pipeline.data.pairs import Pairs
from pipeline.data.reading import Reading, name_examples
from pipeline.data.rows import make_uid
from pipeline.data.sources import Source
from pipeline.errors import ConfigError, DataError
from pipeline.init.recipe import write_recipe
from pipeline.recipe.pairs_sections import PairsConfig
from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.recipe.recipe import load_recipe, parse_recipe
from pipeline.recipe.sections import DownloadConfig
from pipeline.recipe.user_files import unseen_inputs
from pipeline.runtime.context import StepContext
from pipeline.workspace import objects
from pipeline.workspace.digests import fingerprint
from pipeline.workspace.files import find_files
from pipeline.workspace.objects import ObjectStore
from pipeline.workspace.store import Artifact, Workspace
from pipeline.workspace.trees import Stretch, in_reading_order
from tests.data.conftest import make_picture
from tests.s3_server import S3Server
from tests.tiny.recipe import tiny_tables
from tests.tiny.steps_here import run_step, steps_here
from tests.tiny.strange_folder import fetch, put, put_here, strange_files
from tests.workspace.conftest import use

_CONFIG = DownloadConfig(image_px=32, retries=1)


def _rows(folder: str, column: str = "") -> tuple[list[tuple[str, str, str]], Reading]:
    """The rows of a folder, by the names of the pictures in it, and what was counted."""
    reading = Reading()
    rows = [row for table in read_folder(folder, column, reading) for row in table.to_pylist()]
    urls = [row["url"] if "://" in folder else unquote(row["url"].removeprefix("file://")) for row in rows]
    assert all(url.startswith(f"{folder}/") for url in urls)
    names = [url.removeprefix(f"{folder}/") for url in urls]
    return [(name, row["caption"], row["caption_source"]) for name, row in zip(names, rows, strict=True)], reading


@pytest.mark.parametrize("page", [1000, 3, 1])
@pytest.mark.parametrize("column", ["", "-"])
def test_a_folder_in_a_store_has_the_pairs_of_the_same_folder_on_a_disk(
    page: int, column: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_here(tmp_path / "my pictures", strange_files())
    put(f"{bucket}/my pictures", strange_files())
    put(f"{bucket}/my pictures, others", {"1.png": make_picture(1)})  # begins with the folder's name
    monkeypatch.setattr(objects, "_BATCH", page)
    here, reading_here = _rows(f"{tmp_path}/my pictures", column)
    there, reading_there = _rows(f"{bucket}/my pictures", column)
    assert there == here
    sources = Counter(source for _, _, source in here)
    assert sources == ({"metadata": 7, "sidecar": 4, "name": 5} if not column else {"sidecar": 4, "name": 11})
    assert (reading_there.counts, reading_there.notes) == (reading_here.counts, reading_here.notes)
    assert reading_here.counts == {"in": 2, "malformed": 2}  # strange/1.txt and strange/2.json
    examples = [one.replace(f"{bucket}/", f"{tmp_path}/") for one in name_examples([reading_there])]
    assert examples == name_examples([reading_here])
    assert count_pictures(f"{bucket}/my pictures/") == count_pictures(f"{tmp_path}/my pictures") == 17


def test_a_large_folder_is_read_page_by_page(bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many files a folder has, one request tells of few, and the files beside pictures come with them."""
    names = [f"{number:02d}" for number in range(40)]
    files = {f"{name}.jpg": b"" for name in names} | {f"{name}.txt": name.encode() for name in names}
    put(f"{bucket}/large", files)
    monkeypatch.setattr(objects, "_BATCH", 7)
    s3_server.counted()
    rows = iter(read_folder(f"{bucket}/large", "", Reading()))
    monkeypatch.setattr("pipeline.data.folders.BATCH_ROWS", 7)
    first = next(rows)
    assert first.num_rows < 10
    before = [request.kind for request in s3_server.counted()]
    assert before.count("GET") < 14  # the captions of the first pictures alone
    captions = first.column("caption").to_pylist() + [
        one for table in rows for one in table.column("caption").to_pylist()
    ]
    assert captions == names
    assert [request.kind for request in s3_server.counted()].count("LIST") > 8


def test_a_page_that_fails_is_asked_for_again_and_a_list_without_order_is_refused(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(f"{bucket}/folder", {f"{number}.jpg": b"" for number in range(5)})
    monkeypatch.setattr(objects, "_BATCH", 2)
    for kind in ("500", "reset", "throttled"):
        s3_server.fail(kind, "GET", "/bucket", times=1)
        assert len(_rows(f"{bucket}/folder")[0]) == 5
    page = ObjectStore.page

    def reversed_pages(store: ObjectStore, path: str, start: str = "", *, deep: bool = False, **others: Any) -> Any:
        del others
        infos, _ = page(store, path, deep=deep)
        return (infos[:1], "") if start else (infos[1:], "more")

    monkeypatch.setattr(ObjectStore, "page", reversed_pages)
    with pytest.raises(DataError, match=r"/folder.*: the store lists its files in no order"):
        _rows(f"{bucket}/folder")


def test_what_is_strange_in_a_store_is_counted_and_what_is_missing_is_one_sentence(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(f"{bucket}/folder", {"": b"", "sub/": b"", "1.jpg": b"", "/2.jpg": b"", "sub//3.jpg": b"", "../4.jpg": b""})
    rows, reading = _rows(f"{bucket}/folder")
    assert [name for name, _, _ in rows] == ["1.jpg"]
    assert reading.counts == {"in": 2, "malformed": 2}
    assert (
        name_examples([reading])[0] == f"{bucket}/folder//: a folder without a name is left out: rename what is in it"
    )
    with pytest.raises(DataError, match=r"/none: no such folder"):
        _rows(f"{bucket}/none")
    with pytest.raises(DataError, match=r"s3://no-such-bucket/folder: no such folder"):
        _rows("s3://no-such-bucket/folder")
    put(f"{bucket}/empty", {"list.csv": b"url,caption\nhttp://a/1.jpg,one\n"})
    with pytest.raises(DataError, match=r"/empty: no pictures \(\.bmp"):
        _rows(f"{bucket}/empty")
    assert not has_pictures(f"{bucket}/empty/list.csv")
    use(s3_server.environment | {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, monkeypatch)
    monkeypatch.setattr(objects, "_FIRST_PATIENCE_S", 0.0)
    with pytest.raises(ConfigError, match=r"/folder: no answer .*AWS_ENDPOINT_URL"):
        _rows(f"{bucket}/folder")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nowhere")
    use({"AWS_ENDPOINT_URL": s3_server.endpoint}, monkeypatch)
    with pytest.raises(ConfigError, match=r"/folder: no access .*AWS_ACCESS_KEY_ID"):
        _rows(f"{bucket}/folder")


def test_init_and_plan_know_a_folder_in_a_store_by_what_the_store_says_of_it(bucket: str, tmp_path: Path) -> None:
    folder, out = f"{bucket}/pictures", tmp_path / "mine.toml"
    files = {f"train/{number}.jpg": make_picture(number) for number in range(12)}
    metadata = "file_name,text\n" + "".join(f"{number}.jpg,picture {number}\n" for number in range(12))
    put(folder, files | {"train/metadata.csv": metadata.encode()})
    put(f"{bucket}/pictures [1]", {"1.jpg": b"", "2.jpg": b""})
    assert (count_pictures(f"{bucket}/pictures [1]"), len(find_files(f"{bucket}/pictures [1]"))) == (2, 2)
    summary = write_recipe(folder, str(out), gpu=False)
    assert summary.startswith("12 pictures in a folder; sized for")
    assert "captions: 12 from metadata files" in summary
    recipe = load_recipe(out)
    assert (recipe.pairs.source, recipe.pairs.path) == ("folder", folder)
    keys = [make_plan(recipe)[0].key]
    assert fingerprint(f"{bucket}/pictures [1]") != fingerprint(folder)  # the name of a folder, and no pattern
    keys.append(make_plan(replace(recipe, pairs=replace(recipe.pairs, path=f"{folder}/")))[0].key)
    assert keys[0] == keys[1]
    assert not unseen_inputs(recipe)
    for name, content in [("train/1.jpg", make_picture(99)), ("train/metadata.csv", metadata.upper().encode())]:
        put(folder, {name: content})
        keys.append(make_plan(recipe)[0].key)
    put(f"{bucket}/moved", files | {"train/metadata.csv": metadata.encode()})
    keys.append(make_plan(replace(recipe, pairs=replace(recipe.pairs, path=f"{bucket}/moved")))[0].key)
    assert len(set(keys)) == 4
    output = Artifact(str(tmp_path / "pairs"))
    assert write_pairs(Source(recipe.pairs), output).counts == {"in": 12, "ok": 12}
    rows = Pairs(output).read(0, 12, ["uid", "url", "caption"]).to_pylist()
    assert [row["uid"] for row in rows] == [make_uid(row["url"], row["caption"]) for row in rows]
    assert rows[1]["url"] == f"{folder}/train/1.jpg"


@pytest.mark.parametrize("is_async", [False, True])
def test_other_stores_give_a_folder_whole_and_a_picture_in_two_requests(
    is_async: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_here(tmp_path / "pictures", strange_files())
    for name, content in strange_files().items():
        fsspec.filesystem("memory").pipe(f"/others/pictures/{name}", content)
    if is_async:
        driver = AsyncFileSystemWrapper(fsspec.filesystem("memory"), asynchronous=False)
        monkeypatch.setattr(ObjectStore, "driver", lambda *_: driver)
    assert _rows("memory://others/pictures")[0] == _rows(f"{tmp_path}/pictures")[0]
    for name, result in [("b.JPEG", strange_files()["b.JPEG"]), ("missing.jpg", "file")]:
        assert asyncio.run(fetch(f"memory://others/pictures/{name}", _CONFIG)) == result
    small = replace(_CONFIG, max_body_bytes=10)
    assert asyncio.run(fetch("memory://others/pictures/b.JPEG", small)) == "body-size"


def test_other_stores_are_listed_by_sub_folders_and_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver of gs:// and az:// holds a kilobyte for each name of what it lists."""
    names = [f"{a}/{b}/{number}.jpg" for a in range(5) for b in range(9) for number in range(3)]
    for name in ["top.jpg", *names, ".hidden/1.jpg", "0/.hidden.jpg"]:
        fsspec.filesystem("memory").pipe(f"/listed/{name}", b"")
    page, sizes = ObjectStore.page, list[int]()

    def page_noted(store: ObjectStore, path: str, *args: Any, **others: Any) -> Any:
        infos, start = page(store, path, *args, **others)
        sizes.append(len(infos))
        return infos, start

    monkeypatch.setattr(ObjectStore, "page", page_noted)
    files = find_files("memory://listed")
    assert [file.uri.partition("/listed/")[2] for file in files] == sorted(["top.jpg", *names])
    assert count_pictures("memory://listed") == len(files)
    assert max(sizes) <= 10
    assert len(sizes) == 2 * (1 + 5 + 45)


def test_the_steps_make_the_shards_of_the_same_folder_on_a_disk(
    bucket: str, tmp_path: Path, s3_server: S3Server
) -> None:
    put_here(tmp_path / "pictures", strange_files())
    put(f"{bucket}/pictures", strange_files())
    tables: list[pa.Table] = []
    with steps_here():
        for place in (str(tmp_path), bucket):
            pairs = {"source": "folder", "path": f"{place}/pictures"}
            recipe = parse_recipe(tiny_tables(tmp_path / "w", pairs=pairs, download={"samples_per_shard": 100}))
            s3_server.counted()
            for step in make_plan(recipe)[:2]:
                run_step(StepContext(recipe, step, recipe.workspace))
            output = artifact_of(Workspace(recipe.workspace), make_plan(recipe)[1])
            tables.append(pq.read_table(output.path("00000.parquet")))
    names = ["key", "caption", "status", "width", "height", "original_width", "sha256"]
    assert tables[0].select(names) == tables[1].select(names)
    assert tables[1].column("status").to_pylist() == ["success"] * 16
    requests = s3_server.counted()
    pictures = Counter(
        one.name for one in requests if one.kind == "GET" and Path(one.name).suffix in {".jpg", ".JPEG", ".webp"}
    )
    assert set(pictures.values()) == {1}
    # A plan looks twice at all files, the pairs step three times, and at each folder.
    assert sum(one.kind == "LIST" for one in requests) < 30


@pytest.mark.parametrize("pictures", [1, 2, 5])
@pytest.mark.parametrize("page", [1000, 2, 1])
def test_a_large_folder_is_cut_into_parts_whose_pairs_are_those_of_the_whole(
    pictures: int, page: int, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("train-more/1.jpg", "train/sub-2/1.jpg", "train/sub/more/1.jpg", "train/sub/more.jpg")
    files = strange_files() | {name: make_picture(1) for name in more}
    put_here(tmp_path / "my pictures", files)
    put(f"{bucket}/my pictures", files)
    whole, reading = _rows(f"{tmp_path}/my pictures")
    monkeypatch.setattr(objects, "_BATCH", page)
    monkeypatch.setattr("pipeline.workspace.trees._RUN", page)
    monkeypatch.setattr("pipeline.data.folders._PART_PICTURES", pictures)
    for place in (str(tmp_path), bucket):
        source = Source(PairsConfig(source="folder", path=f"{place}/my pictures"))
        pieces = source.pieces()
        assert len(pieces) == 1 if page == 1000 else len(pieces) >= len(whole) // (2 * pictures)
        rows, readings = list[tuple[str, str, str]](), [Reading() for _ in pieces]
        for piece, one in zip(pieces, readings, strict=True):
            again = [Span(**span) for span in json.loads(json.dumps([asdict(span) for span in piece]))]
            for table in source.read(again, one):
                names = [unquote(url).rpartition("my pictures/")[2] for url in table.column("url").to_pylist()]
                rows += zip(
                    names, table.column("caption").to_pylist(), table.column("caption_source").to_pylist(), strict=True
                )
        assert [(unquote(name), *rest) for name, *rest in whole] == rows
        assert sum((one.counts for one in readings), Counter()) == reading.counts
        for note in ("malformed_metadata", "captions_from_metadata", "captions_from_sidecar", "captions_from_name"):
            assert sum(one.notes[note] for one in readings) == reading.notes[note]
        # In parts, names that no picture has are counted where the names say a folder, as metadata does.
        compared = [one.notes["metadata_without_picture"] for one in readings]
        assert sum(compared) == reading.notes["metadata_without_picture"] == 2
        assert sum(one.notes["annotations_not_compared"] for one in readings) == (0 if page == 1000 else 2)
        if page == 1000:
            assert readings[0].notes == reading.notes
    output = Artifact(str(tmp_path / "pairs"))
    summary = write_pairs(Source(PairsConfig(source="folder", path=f"{bucket}/my pictures")), output)
    assert summary.counts == {"in": len(whole) + 2, "ok": len(whole), "malformed": 2}
    urls = Pairs(output).read(0, len(whole), ["url"]).column("url").to_pylist()
    assert [url.removeprefix(f"{bucket}/my pictures/") for url in urls] == [name for name, _, _ in whole]


@pytest.mark.parametrize("in_store", [False, True])
def test_a_folder_of_names_with_one_beginning_is_cut_between_them(
    in_store: bool, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [f"frame.{number:04d}.jpg" for number in range(12)]
    texts = {name.replace("jpg", "txt"): name.encode() for name in frames[::2]}
    # Captions of the first and the second lie behind, or before, a picture between them, where a part may begin.
    names = ("frame.-.bmp", "frame.-.c.bmp", "frame.-.txt", "frame.+.caption", "frame.+.d.jpg", "frame.+.jpg")
    files = dict.fromkeys(frames, b"") | texts | {name: name.encode() for name in (*names, "frame.bmp")}
    place = f"{bucket}/film" if in_store else str(tmp_path / "film")
    (put if in_store else put_here)(place if in_store else Path(place), files)
    whole, _ = _rows(place)
    for page, pictures in [(3, 2), (1, 5)] if in_store else itertools.product((1, 2, 3, 7), (1, 2, 5)):
        monkeypatch.setattr(objects, "_BATCH", page)
        monkeypatch.setattr("pipeline.workspace.trees._RUN", page)
        monkeypatch.setattr("pipeline.data.folders._PART_PICTURES", pictures)
        source = Source(PairsConfig(source="folder", path=place))
        pieces = source.pieces()
        readings = [Reading() for _ in pieces]
        rows = [
            tuple(row.values())
            for piece, reading in zip(pieces, readings, strict=True)
            for table in source.read(piece, reading)
            for row in table.to_pylist()
        ]
        assert [(unquote(url).rpartition("/")[2], *rest) for url, *rest in rows] == whole
        assert len(readings) > 1
        assert max(sum(one.notes.values()) for one in readings) <= page + pictures


def test_a_part_of_a_folder_lists_little_of_the_rest(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(f"{bucket}/flat", {f"{number:03d}.jpg": b"" for number in range(120)})
    put(f"{bucket}/deep", {f"{number:03d}/1.jpg": b"" for number in range(120)})
    monkeypatch.setattr(objects, "_BATCH", 10)
    monkeypatch.setattr("pipeline.data.folders._PART_PICTURES", 20)
    for folder, most in (("flat", [4] * 6), ("deep", [34, *[26] * 5])):  # the first may find files in the folder itself
        source = Source(PairsConfig(source="folder", path=f"{bucket}/{folder}"))
        pieces = source.pieces()
        assert len(pieces) == 6
        for piece, most_lists in zip(pieces, most, strict=True):
            s3_server.counted()
            rows = sum(table.num_rows for table in source.read(piece, Reading()))
            assert rows == 20
            assert sum(request.kind == "LIST" for request in s3_server.counted()) <= most_lists


@settings(deadline=None, max_examples=200)
@given(
    st.sets(
        st.lists(st.sampled_from(["a", "a-", "a.b", "b", "c d"]), min_size=1, max_size=4).map("/".join), max_size=30
    ),
    st.lists(st.lists(st.sampled_from(["a", "a-", "b."]), min_size=1, max_size=3).map("/".join), max_size=4),
)
def test_each_file_is_in_one_stretch(files: set[str], cuts: list[str]) -> None:
    places = ["", *sorted({f"{cut}x." for cut in cuts}, key=in_reading_order), ""]
    stretches = [Stretch(*pair) for pair in itertools.pairwise(places)]
    assert stretches[0].first == stretches[-1].stop == ""
    order = sorted(files, key=in_reading_order)
    assert [file for one in stretches for file in order if one.has(file)] == order
    for file in files:
        for folder in ["", *(file.rsplit("/", depth)[0] for depth in range(1, file.count("/") + 1))]:
            holders = [one for one in stretches if one.has(file)]
            assert all(one.has_some_of(folder) for one in holders)
            inside = [one for one in files if one.startswith(f"{folder}/" if folder else "")]
            for one in stretches:
                assert not one.has_all_of(folder) or all(map(one.has, inside))
