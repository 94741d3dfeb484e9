"""Captions of a folder of pictures: from metadata at any depth, annotations of datasets, sidecars, names."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.caption_files import is_picture, sidecar_of
from pipeline.data.folders import _Waiting, count_pictures, read_folder
from pipeline.data.reading import MAX_CELL, Reading, name_examples
from pipeline.errors import DataError
from pipeline.workspace.digests import fingerprint
from pipeline.workspace.files import find_files


def _pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def _captions(folder: Path, column: str = "") -> tuple[list[tuple[str, str, str]], Reading]:
    reading = Reading()
    rows = [row for table in read_folder(str(folder), column, reading) for row in table.to_pylist()]
    base = folder.resolve().as_uri()
    return [(row["url"][len(base) + 1 :], row["caption"], row["caption_source"]) for row in rows], reading


@pytest.mark.parametrize("name", ["0001.png", "./0001.png", ".//0001.png"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("depth", ["", "train/", "data/train/"])
def test_metadata_of_imagefolder_is_found_at_any_depth(name: str, kind: str, depth: str, tmp_path: Path) -> None:
    _pictures(tmp_path, f"{depth}0001.png", f"{depth}0002.png", "other/0001.png")
    row, path = {"file_name": name, "text": "a red house"}, tmp_path / f"{depth}metadata.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text("file_name,text\n" + ",".join(row.values()) if kind == "csv" else json.dumps(row))
    captions, reading = _captions(tmp_path)
    assert (f"{depth}0001.png", "a red house", "metadata") in captions
    assert [source for _, _, source in captions].count("name") == 2
    assert reading.notes["captions_from_metadata"] == 1
    assert reading.notes["metadata_without_picture"] == 0


@pytest.mark.parametrize("name", ["train/0001.png", "./train/0001.png", "train\\0001.png"])
def test_metadata_may_name_pictures_in_folders_below_in_any_spelling(name: str, tmp_path: Path) -> None:
    _pictures(tmp_path, "train/0001.png")
    (tmp_path / "metadata.csv").write_text(f"file_name,text\r\n{name},a red house\r\n", newline="")
    assert _captions(tmp_path)[0] == [("train/0001.png", "a red house", "metadata")]


def test_the_nearest_metadata_wins(tmp_path: Path) -> None:
    _pictures(tmp_path, "a/1.png", "a/2.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na/1.png,far one\na/2.png,far two\n")
    (tmp_path / "a/metadata.csv").write_text("file_name,text\n1.png,near one\n")
    captions, reading = _captions(tmp_path)
    assert captions == [("a/1.png", "near one", "metadata"), ("a/2.png", "far two", "metadata")]
    assert reading.notes["metadata_without_picture"] == 1  # the far row of 1.png stands for nothing


def test_names_without_a_picture_are_counted_and_one_is_named(tmp_path: Path) -> None:
    _pictures(tmp_path, "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png,one\n2.png,two\n3.png,three\n")
    _, reading = _captions(tmp_path)
    assert reading.notes["metadata_without_picture"] == 2
    assert name_examples([reading]) == [
        f"{tmp_path}/metadata.csv: names 2 files that are no pictures here, such as 2.png"
    ]


_STEM = st.lists(st.sampled_from(["a", "b", "0", "a-"]), min_size=1, max_size=3).map(".".join)


@given(st.sets(st.tuples(_STEM, st.sampled_from([".jpg", ".BMP", ".txt", ".json", ".caption", ".x", ""]))), st.data())
@settings(deadline=None, max_examples=300)
def test_files_that_come_in_pages_have_their_captions_beside_them(
    files: set[tuple[str, str]], data: st.DataObject
) -> None:
    """Whatever the pages: pictures in their order, each together with the files that may hold its caption."""
    names = sorted({stem + suffix for stem, suffix in files})
    waiting, groups, start = _Waiting(), list[list[str]](), 0
    while start < len(names):
        stop = data.draw(st.integers(start + 1, len(names)))
        groups.append(waiting.add(names[start:stop]))
        start = stop
    groups.append(waiting.rest())
    pairs = [(one, sidecar_of(one, set(group))) for group in groups for one in group if is_picture(one)]
    assert pairs == [(one, sidecar_of(one, set(names))) for one in names if is_picture(one)]


@pytest.mark.parametrize("name", ["frame.{:07d}.jpg", "{:07d}.jpg", "clip.{:07d}.a.jpg", "frame{:07d}"])
def test_few_names_wait_whatever_they_have_in_common(name: str) -> None:
    """Names that are equal up to their first dot were looked at again at each page: a million took hours."""
    waiting, pages, num_out = _Waiting(), 50, 0
    for page in range(pages):
        names = [name.format(100 * page + number) for number in range(100)]
        num_out += len(waiting.add([*names, f"{names[-1]}.txt"]))
        assert len(waiting.rest()) < 10
    assert num_out + len(waiting.rest()) >= 100 * pages


_KARPATHY = {
    "images": [
        {"filename": "b.jpg", "sentences": [{"raw": "b one"}, {"raw": "b two"}], "split": "train"},
        {"filename": "c.jpg", "sentences": [], "split": "val"},
    ]
}
_COCO: dict[str, Any] = {
    "images": [{"id": 1, "file_name": "b.jpg"}],
    "annotations": [{"image_id": 1, "caption": "b one"}, {"image_id": 1, "caption": "b two"}],
}
_ANNOTATIONS = {
    "annotations/captions_train2017.json": json.dumps(_COCO),
    "dataset_flickr30k.json": json.dumps(_KARPATHY),
    "captions.txt": "image,caption\nb.jpg,b one\nb.jpg,b two\n",
    "Flickr8k.token.txt": "b.jpg#0\tb one\nb.jpg#1\tb two\n",
    "results_20130124.token": "b.jpg#0\tb one\nb.jpg#1\tb two\n",
    "results.csv": "image_name| comment_number| comment\nb.jpg| 0| b one\nb.jpg| 1| b two\n",
}


@pytest.mark.parametrize("name", _ANNOTATIONS)
def test_annotations_of_coco_and_flickr_give_a_pair_for_each_caption(name: str, tmp_path: Path) -> None:
    _pictures(tmp_path, "train2017/b.jpg", "train2017/d.jpg")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(_ANNOTATIONS[name])
    captions, reading = _captions(tmp_path)
    assert captions == [
        ("train2017/b.jpg", "b one", "metadata"),
        ("train2017/b.jpg", "b two", "metadata"),
        ("train2017/d.jpg", "d", "name"),
    ]
    assert not reading.notes["malformed_metadata"]


@pytest.mark.parametrize(
    ("captions", "reason"),
    [
        ([{"image_id": 2, "caption": "of no image"}], "no name of a picture"),
        ([{"image_id": 1, "caption": None}, {"image_id": 1, "caption": 5}], "the caption is null"),
        ([{"image_id": 1, "caption": "half \ud83d"}], "not UTF-8, or half of a surrogate pair"),
        ([{"image_id": [1], "caption": "of a list"}], "no name of a picture"),
        ([{"image_id": 1, "caption": "x" * (MAX_CELL + 1)}], "a text of 131073 characters"),
    ],
)
def test_a_strange_caption_of_annotations_is_counted_and_the_others_stay(
    captions: list[dict[str, Any]], reason: str, tmp_path: Path
) -> None:
    _pictures(tmp_path, "b.jpg")
    (tmp_path / "captions_val.json").write_text(json.dumps(_COCO | {"annotations": [*_COCO["annotations"], *captions]}))
    rows, reading = _captions(tmp_path)
    assert [caption for _, caption, _ in rows] == ["b one", "b two"]
    assert reading.notes["malformed_metadata"] == len(captions)
    assert name_examples([reading])[0].startswith(f"{tmp_path}/captions_val.json:3: {reason}")
    assert not reading.counts["malformed"]


def test_strange_images_and_sentences_of_annotations_stop_nothing(tmp_path: Path) -> None:
    _pictures(tmp_path, "b.jpg", "c.jpg")
    coco = {"images": [{"id": [1], "file_name": "c.jpg"}, *_COCO["images"]], "annotations": _COCO["annotations"]}
    (tmp_path / "captions_val.json").write_text(json.dumps(coco))
    karpathy = {"images": [{"filename": "c.jpg", "sentences": [{"raw": "c one"}, 5, {"tokens": []}]}]}
    (tmp_path / "dataset_x.json").write_text(json.dumps(karpathy))
    rows, reading = _captions(tmp_path)
    assert [caption for _, caption, _ in rows] == ["b one", "b two", "c one"]
    assert reading.notes["malformed_metadata"] == 2


_FEATURES = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
_ABOUT_DATASETS = {
    "dataset_info.json": {
        "builder_name": "imagefolder",
        "features": _FEATURES,
        "splits": {"train": {"num_examples": 2}},
    },
    "dataset_infos.json": {"default": {"features": _FEATURES, "splits": {"train": {"num_examples": 2}}}},
    "dataset_dict.json": {"splits": ["train", "validation"]},
}


@pytest.mark.parametrize("name", _ABOUT_DATASETS)
def test_what_hugging_face_says_of_a_dataset_is_no_annotation(name: str, tmp_path: Path) -> None:
    _pictures(tmp_path, "train/1.png")
    (tmp_path / "train/metadata.jsonl").write_text('{"file_name": "1.png", "text": "one"}\n')
    (tmp_path / name).write_text(json.dumps(_ABOUT_DATASETS[name]))
    captions, reading = _captions(tmp_path)
    assert captions == [("train/1.png", "one", "metadata")]
    assert (reading.examples, reading.notes["malformed_metadata"]) == ([], 0)


_NO_ANNOTATIONS = {
    "dataset_stats.json": ('{"mean": [0.5, 0.5], "version": "1"}', "no images with sentences"),
    "dataset_tags.json": ('[{"image": "1.png"}, {"image": "2.png"}]', "no name of a picture"),
    "captions_results.json": ('[{"image_id": 1, "caption": "one"}]', "no name of a picture"),
    "results.csv": ("epoch,loss\n1,0.5\n2,0.4\n", "no name of a picture with a caption"),
}


@pytest.mark.parametrize("name", _NO_ANNOTATIONS)
def test_a_file_named_like_annotations_that_holds_none_is_named_and_not_read(name: str, tmp_path: Path) -> None:
    _pictures(tmp_path, "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png,one\n")
    content, reason = _NO_ANNOTATIONS[name]
    (tmp_path / name).write_text(content)
    captions, reading = _captions(tmp_path)
    assert captions == [("1.png", "one", "metadata")]
    assert (reading.notes["metadata_not_read"], reading.notes["malformed_metadata"]) == (1, 0)
    assert name_examples([reading]) == [
        f"{tmp_path}/{name}: not read: named like annotations, but no picture has a caption in it ({reason})"
    ]


def test_captions_of_no_known_shape_are_refused_with_what_to_do(tmp_path: Path) -> None:
    _pictures(tmp_path, "1.png")
    (tmp_path / "captions_train.json").write_text('{"1.png": "one"}')
    with pytest.raises(DataError, match=r"captions_train\.json: must hold a list .*; if it holds no captions, give it"):
        _captions(tmp_path)


def test_of_two_metadata_files_in_a_folder_the_first_is_read_and_the_other_is_named(tmp_path: Path) -> None:
    _pictures(tmp_path, "1.png", "2.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png,one\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "2.png", "text": "two"}\n')
    captions, reading = _captions(tmp_path)
    assert captions == [("1.png", "one", "metadata"), ("2.png", "2", "name")]
    assert reading.notes["metadata_not_read"] == 1
    assert name_examples([reading]) == [f"{tmp_path}/metadata.jsonl: not read: metadata.csv in the same folder is"]


def test_a_row_of_metadata_without_a_file_name_is_counted(tmp_path: Path) -> None:
    _pictures(tmp_path, "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png,one\n,two\n,three\n")
    rows, reading = _captions(tmp_path)
    assert [caption for _, caption, _ in rows] == ["one"]
    assert reading.notes["malformed_metadata"] == 2
    assert name_examples([reading]) == [f"{tmp_path}/metadata.csv: 2 rows without a file name"]


def test_a_broken_line_of_metadata_is_counted_and_named(tmp_path: Path) -> None:
    _pictures(tmp_path, "1.png", "2.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "one"}\n{"file_name"\n')
    captions, reading = _captions(tmp_path)
    assert [caption for _, caption, _ in captions] == ["one", "2"]
    assert reading.notes["malformed_metadata"] == 1
    assert name_examples([reading])[0].startswith(f"{tmp_path}/metadata.jsonl:2: not JSON")
    assert not reading.counts["malformed"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("2.txt", b"caf\xe9", "2.txt is not UTF-8"),
        ("2.json", b"{", "2.json is no JSON"),
        ("2.json", b'{"label": 3}', "2.json has no text under caption"),
        ("2.json", b'{"caption": "half \\ud83d"}', "2.json: not UTF-8, or half of a surrogate pair"),
        ("2.json", b"[" * 100_000, "2.json is no JSON (nested too deeply)"),
        ("2.txt", b"x" * (MAX_CELL + 1), "2.txt: a text of 131073 characters; the limit is 131072"),
    ],
)
def test_a_strange_sidecar_costs_its_picture_and_no_other(
    name: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    _pictures(tmp_path, "1.png", "2.png", "3.png")
    (tmp_path / name).write_bytes(content)
    captions, reading = _captions(tmp_path)
    assert [name for name, _, _ in captions] == ["1.png", "3.png"]
    assert reading.counts["malformed"] == 1
    assert reason in name_examples([reading])[0]


def test_the_named_column_of_the_metadata_holds_the_caption(tmp_path: Path) -> None:
    _pictures(tmp_path, "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,text,long_text\n1.png,short,long\n")
    assert _captions(tmp_path, "long_text")[0][0][1] == "long"
    assert _captions(tmp_path, "-")[0][0][1:] == ("1", "name")


@pytest.mark.parametrize(
    ("links", "num_paths"),
    [
        ({"a/up": ""}, 2),
        ({"a/up": "", "a/up too": "a", "b/up": "", "self": "."}, 2),
        ({"up": "..", "a/up": "../.."}, 2),
        ({"a/over": "b", "b/over": "a"}, 4),  # each picture is in two folders
        ({"a/far": "../far", "../far/back": "a"}, 2),
        ({"c": "a"}, 3),
    ],
)
def test_links_are_followed_but_none_for_ever(links: dict[str, str], num_paths: int, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    _pictures(folder, "a/1.png", "b/2.png")
    (tmp_path / "far").mkdir()
    for link, target in links.items():
        (folder / link).symlink_to(folder / target if target != "." else target)
    assert count_pictures(str(folder)) == num_paths
    assert len(_captions(folder)[0]) == num_paths
    assert len(find_files(str(folder))) == num_paths
    assert len(find_files(f"{folder}/**/*.png")) == num_paths


def test_links_that_lead_nowhere_are_counted_and_the_others_are_read(tmp_path: Path) -> None:
    _pictures(tmp_path, "1.png", "3.png")
    for link, target in {"2.png": "nowhere", "3.txt": "nowhere", "loop": "loop", "4.png": "4.png"}.items():
        (tmp_path / link).symlink_to(target)
    (tmp_path / "1.txt").write_text("one")
    captions, reading = _captions(tmp_path)
    assert captions == [("1.png", "one", "sidecar"), ("3.png", "3", "name")]
    assert reading.counts == {"in": 2, "malformed": 2}
    assert reading.notes["malformed_metadata"] == 1
    assert name_examples([reading])[0] == f"{tmp_path}/2.png: a link that leads to no file"


def test_what_is_strange_behind_ten_examples_is_counted_and_takes_the_name_of_no_other_file(tmp_path: Path) -> None:
    _pictures(tmp_path, *(f"{number:02d}.png" for number in range(3)))
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + "a,b,c\n" * 10 + "00.png,zero\n")
    (tmp_path / "zz.png").symlink_to("nowhere")
    _, reading = _captions(tmp_path)
    assert name_examples([reading]) == [f"{tmp_path}/metadata.csv:{line}: 3 cells, not 2" for line in range(2, 12)]
    assert (reading.notes["malformed_metadata"], reading.counts["malformed"]) == (10, 1)


def test_pictures_whose_names_are_not_utf8_are_pairs_and_can_be_named(tmp_path: Path) -> None:
    for name in (b"caf\xe9.jpg", b"caf\xe9.txt", b"th\xe9.jpg"):
        (tmp_path / os.fsdecode(name)).write_bytes(b"\xff" if name.endswith(b"txt") else b"")
    captions, reading = _captions(tmp_path)
    assert captions == [("th%E9.jpg", "th", "name")]
    name_examples([reading])[0].encode()
    assert len(fingerprint(str(tmp_path))) == 16
