"""The pairs step at its joints: pieces, repeated rows across pieces, kills, one side for every picture."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import duplicates, make_pairs, sources
from pipeline.data.make_pairs import COMPARE, PairsMaker, write_pairs
from pipeline.data.pairs import Pairs
from pipeline.data.rows import make_uid, numbered_names, split_of
from pipeline.data.sources import Source
from pipeline.errors import DataError
from pipeline.recipe.pairs_sections import PairsConfig
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import LIVE, Artifact
from tests.data.listing import bytes_of, write_repeats
from tests.tiny.pairs import write_parts
from tests.tiny.shards import write_tar


@pytest.fixture(params=[1024, 3])
def in_pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece for every file, which is read alone or with another; runs of 70 rows, and several groups of buckets."""
    monkeypatch.setattr(make_pairs, "MOST_READS", request.param)
    monkeypatch.setattr(sources, "PIECE_BYTES", 1)
    monkeypatch.setattr(duplicates, "RUN_ROWS", 70)
    monkeypatch.setattr(duplicates, "GROUP_ROWS", 400)


@pytest.mark.usefixtures("in_pieces")
def test_repeated_rows_are_found_across_pieces_and_the_first_stays(tmp_path: Path) -> None:
    source, output = write_repeats(tmp_path / "list"), Artifact(str(tmp_path / "out"))
    summary = write_pairs(source, output)
    pairs = Pairs(output)
    rows = [
        (url, caption)
        for part in range(5)
        for url, caption in zip(*pq.read_table(tmp_path / f"list/{part}.parquet").to_pydict().values(), strict=True)
    ]
    unique = list(dict.fromkeys(rows))
    table = pairs.read(0, pairs.num_rows, ["url", "caption", "uid"])
    assert list(zip(table["url"].to_pylist(), table["caption"].to_pylist(), strict=True)) == unique
    assert table["uid"].to_pylist() == [make_uid(*row) for row in unique]
    assert summary.counts == {"in": 1500, "ok": len(unique), "duplicate": 1500 - len(unique)}
    assert len(unique) < 1500
    assert [name for name in output.names() if name.endswith("parquet") and not name.startswith(LIVE)] == [
        f"{name}.parquet" for name in numbered_names(5)
    ]


class _Killed(Exception):
    """In place of a kill."""


class _Recorded(Artifact):
    """Notes the tasks that are committed, and dies at the commit of one."""

    def __init__(self, uri: str, dies_after: int = 1000) -> None:
        super().__init__(uri)
        self.done: list[str] = []
        self._dies_after = dies_after

    def commit_shard(self, record: ShardRecord) -> None:
        if len(self.done) == self._dies_after:
            raise _Killed  # its files are there, its record is not
        super().commit_shard(record)
        self.done.append(record.shard)


@pytest.mark.usefixtures("in_pieces")
def test_a_run_that_is_killed_in_any_task_continues_to_the_same_bytes(tmp_path: Path) -> None:
    source, whole = write_repeats(tmp_path / "list"), _Recorded(str(tmp_path / "whole"))
    write_pairs(source, whole)
    for stop in range(len(whole.done)):
        killed, again = _Recorded(str(tmp_path / f"{stop}"), stop), _Recorded(str(tmp_path / f"{stop}"))
        with pytest.raises(_Killed):
            write_pairs(source, killed)
        write_pairs(source, again)
        assert [*killed.done, *again.done] == whole.done
        assert bytes_of(tmp_path / f"{stop}") == bytes_of(tmp_path / "whole")


def test_what_an_earlier_release_has_compared_or_written_is_done_again(tmp_path: Path) -> None:
    source = write_repeats(tmp_path / "list")
    whole, half = (Artifact(str(tmp_path / name)) for name in ("whole", "half"))
    write_pairs(source, whole)
    half.write_json(f"{LIVE}pieces.json", [])
    with half.write(f"{COMPARE}0000-1024.npy") as path, path.open("wb") as stream:
        np.save(stream, np.arange(3, dtype=np.uint64))
    half.write_bytes("00000.parquet", b"other rows")
    for name in (f"{COMPARE}0000-1024", "00000"):
        half.commit_shard(ShardRecord(shard=name, counts={"in": 3, "ok": 0, "duplicate": 3}, files={}))
    write_pairs(source, half)
    assert bytes_of(tmp_path / "half") == bytes_of(tmp_path / "whole")
    assert half.shard_records().keys() == whole.shard_records().keys()


@pytest.mark.usefixtures("in_pieces")
def test_tasks_of_a_phase_may_be_done_in_any_order(tmp_path: Path) -> None:
    source = write_repeats(tmp_path / "list")
    write_pairs(source, Artifact(str(tmp_path / "whole")))
    maker = PairsMaker(source, Artifact(str(tmp_path / "backwards")))
    for names in maker.phases():
        for name in reversed(names):
            maker.make(name)
    maker.finish()
    assert bytes_of(tmp_path / "backwards") == bytes_of(tmp_path / "whole")


def test_one_piece_or_many_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_repeats(tmp_path / "list")
    tables: list[pa.Table] = []
    for size in (1 << 30, 1):
        monkeypatch.setattr(sources, "PIECE_BYTES", size)
        output = Artifact(str(tmp_path / str(size)))
        write_pairs(source, output)
        tables.append(Pairs(output).read(0, Pairs(output).num_rows, ["uid", "url", "caption", "split"]))
    assert tables[0].equals(tables[1])


def test_all_captions_of_a_picture_are_on_one_side(tmp_path: Path) -> None:
    rows = [
        (f"http://host/{picture}.jpg", f"caption {n} of picture {picture}") for picture in range(40) for n in range(5)
    ]
    (tmp_path / "list.csv").write_text("url,caption\n" + "".join(f"{url},{caption}\n" for url, caption in rows))
    output = Artifact(str(tmp_path / "out"))
    config = PairsConfig(source="list", path=str(tmp_path / "list.csv"), validation_prob=0.2)
    summary = write_pairs(Source(config), output)
    table = Pairs(output).read(0, 200, ["url", "split"])
    sides: dict[str, set[str]] = {}
    for url, split in zip(table["url"].to_pylist(), table["split"].to_pylist(), strict=True):
        sides.setdefault(url, set()).add(split)
    assert all(len(split) == 1 for split in sides.values())
    assert {split for side in sides.values() for split in side} == {"train", "validation"}
    assert summary.metrics["validation"] == 5 * sum(side == {"validation"} for side in sides.values())


@pytest.mark.parametrize("prob", [0.0, 0.02, 0.5])
def test_the_share_of_validation_pictures_is_that_of_the_recipe(prob: float) -> None:
    splits = [split_of(f"http://a/{number}", prob) for number in range(5000)]
    assert splits.count("validation") / 5000 == pytest.approx(prob, abs=0.02)


_DIFFERENT: dict[str, list[dict[str, Any]]] = {
    "null in the first part": [{"w": None}, {"w": "no"}],
    "int and double": [{"w": 1}, {"w": 1.5}],
    "large int and double": [{"w": 2**53 + 1}, {"w": 1.5}],
    "int and text": [{"w": 1}, {"w": "one"}],
    "a list and text": [{"w": [1, 2]}, {"w": "one"}],
}


@pytest.mark.parametrize("name", _DIFFERENT)
@pytest.mark.parametrize("together", [True, False])
def test_columns_of_different_types_stop_nothing(
    name: str, together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 1 << 30 if together else 1)
    (tmp_path / "list").mkdir()
    for number, row in enumerate(_DIFFERENT[name]):
        pair = {"url": f"http://a/{number}", "caption": "c"}
        pq.write_table(pa.Table.from_pylist([pair | row]), tmp_path / f"list/{number}.parquet")
    config = PairsConfig(source="list", path=str(tmp_path / "list"))
    numbers = {"int and double": [1.0, 1.5], "large int and double": [2.0**53, 1.5]}
    for extra, expected in {(): None, ("w",): numbers.get(name, "texts")}.items():
        output = Artifact(str(tmp_path / f"out{len(extra)}"))
        assert write_pairs(Source(config, extra_columns=extra), output).counts == {"in": 2, "ok": 2}
        values = Pairs(output).read(0, 2, extra).to_pydict()
        if expected == "texts":
            assert all(value is None or isinstance(value, str) for value in values["w"])
            assert values["w"][1] == _DIFFERENT[name][1]["w"]
        else:
            assert values == ({"w": expected} if extra else {})


def test_a_part_without_a_named_column_is_refused_by_its_name(tmp_path: Path) -> None:
    for number, row in enumerate([{"a": "1"}, {}]):
        pair = {"url": f"http://a/{number}", "caption": "c"}
        pq.write_table(pa.Table.from_pylist([pair | row]), tmp_path / f"{number}.parquet")
    config = PairsConfig(source="list", path=str(tmp_path))
    with pytest.raises(DataError, match=r"1\.parquet: no column a; it has url, caption"):
        write_pairs(Source(config, extra_columns=("a",)), Artifact(str(tmp_path / "out")))


def test_empty_captions_are_counted_in_every_format(tmp_path: Path) -> None:
    rows = [("http://a/1", ""), ("http://a/2", "  "), ("http://a/3", "full")]
    writers: dict[str, Callable[[Path], Any]] = {
        "csv": lambda path: path.write_text("url,caption\n" + "\n".join(",".join(row) for row in rows)),
        "tsv": lambda path: path.write_text("url\tcaption\n" + "\n".join("\t".join(row) for row in rows)),
        "jsonl": lambda path: path.write_text("\n".join(json.dumps({"url": u, "caption": c}) for u, c in rows)),
    }
    for kind, write in writers.items():
        write(tmp_path / f"list.{kind}")
        config = PairsConfig(source="list", path=str(tmp_path / f"list.{kind}"))
        summary = write_pairs(Source(config), Artifact(str(tmp_path / kind)))
        assert (summary.counts["ok"], summary.metrics["empty_captions"]) == (3, 2), kind


@pytest.mark.usefixtures("in_pieces")
def test_the_share_of_long_captions_counts_each_part_by_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count_long(captions: list[str], context_length: int) -> int:
        return sum(len(one) > context_length for one in captions)

    monkeypatch.setattr(make_pairs, "MOST_CAPTIONS", 10)
    monkeypatch.setattr(make_pairs, "count_long", count_long)
    (tmp_path / "list").mkdir()
    for name, caption, num_rows in (("0", "short", 190), ("1", "a long caption", 10)):
        urls = [f"http://a/{name}/{number}" for number in range(num_rows)]
        pq.write_table(pa.table({"url": urls, "caption": [caption] * num_rows}), tmp_path / f"list/{name}.parquet")
    source = Source(PairsConfig(source="list", path=str(tmp_path / "list")), context_length=8)
    metrics = write_pairs(source, Artifact(str(tmp_path / "out"))).metrics
    assert (metrics["captions_measured"], metrics["long_captions"]) == (20, 10)
    assert metrics["long_caption_share"] == 0.05


def test_max_pairs_counts_rows_over_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_repeats(tmp_path / "list")
    monkeypatch.setattr(sources, "PIECE_BYTES", 1)
    limited = replace(source, config=replace(source.config, max_pairs=450))
    output = Artifact(str(tmp_path / "out"))
    assert write_pairs(limited, output).counts["in"] == 450
    assert len(source.pieces()) == 5


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet", "folder", "shards"])
def test_max_pairs_counts_malformed_rows_in_their_order(kind: str, tmp_path: Path) -> None:
    """The first rows count, whatever is wrong behind them: 20 good ones, 10 malformed, 20 good, 10 malformed."""
    path = _with_malformed_rows(tmp_path / f"list.{kind}", kind)
    source = Source(PairsConfig(source=kind if kind in {"folder", "shards"} else "list", path=str(path)))
    for limit, expected in {5: (5, 0), 20: (20, 0), 26: (20, 6), 45: (35, 10), 60: (40, 20), 90: (40, 20)}.items():
        output = Artifact(str(tmp_path / f"out{limit}"))
        summary = write_pairs(replace(source, config=replace(source.config, max_pairs=limit)), output)
        assert (summary.counts["ok"], summary.counts["malformed"]) == expected, limit
        assert summary.counts["in"] == sum(expected)


def _with_malformed_rows(path: Path, kind: str) -> Path:
    is_good = [number % 30 < 20 for number in range(60)]
    urls = [f"http://a/{number:02d}.jpg" for number in range(60)]
    if kind == "folder":
        path.mkdir()
        for number, good in enumerate(is_good):
            (path / f"{number:02d}.jpg").touch()
            (path / f"{number:02d}.txt").write_bytes(b"good" if good else b"\xff")
    elif kind == "shards":
        texts = {f"{number:02d}.txt": b"good" if good else b"\xff" for number, good in enumerate(is_good)}
        path.mkdir()
        pictures = {f"{number:02d}.jpg": str(number).encode() for number in range(60)}
        write_tar(path / "0.tar", (texts | pictures).items())
    elif kind == "parquet":
        captions = [b"good" if good else b"\xff" for good in is_good]
        pq.write_table(pa.table({"url": urls, "caption": captions}), path)
    elif kind == "json":
        rows = [{"url": url, "caption": "c"} if good else 5 for url, good in zip(urls, is_good, strict=True)]
        path.write_text(json.dumps(rows))
    else:
        mark = "," if kind == "csv" else "\t"
        lines = [mark.join((url, "c")) if good else "no row" for url, good in zip(urls, is_good, strict=True)]
        if kind == "jsonl":
            rows = [{"url": url, "caption": "c"} for url in urls]
            lines = [json.dumps(row) if good else "no row" for row, good in zip(rows, is_good, strict=True)]
        path.write_text("\n".join(lines if kind == "jsonl" else [f"url{mark}caption", *lines]))
    return path


def test_found_positions_are_gathered_by_their_pieces(tmp_path: Path) -> None:
    random, files = np.random.default_rng(0), list[Path]()
    rows = random.choice(70, (5, 9))
    for number, of_file in enumerate(rows):
        files.append(tmp_path / f"{number}.npy")
        pieces = of_file // 10 % 6
        np.save(files[-1], np.sort((pieces << 40) + 10 * number + np.arange(9)).astype(np.uint64))
    for chosen in (files, files[:1], []):
        num_found = duplicates.gather_positions(chosen, 8, tmp_path / "all")
        found = np.load(tmp_path / "all", mmap_mode="r")
        expected = sorted(position for file in chosen for position in np.load(file).tolist())
        assert sorted(found.tolist()) == expected
        assert len(found) == num_found
        for piece in range(8):
            of_piece = [position & (1 << 40) - 1 for position in expected if position >> 40 == piece]
            assert duplicates.rows_of_piece(found, piece).tolist() == of_piece


def test_the_reader_reads_any_span_of_rows(tmp_path: Path) -> None:
    rows = pa.table(
        {
            "uid": [str(number) for number in range(500)],
            "url": ["u"] * 500,
            "caption": ["c"] * 500,
            "split": ["train"] * 500,
            "n": range(500),
        }
    )
    pairs = write_parts(tmp_path, [rows.slice(0, 133), rows.slice(133, 0), rows.slice(133, 201), rows.slice(334)])
    for start, stop in ((0, 500), (0, 1), (132, 134), (130, 400), (499, 600), (500, 510), (40, 40)):
        assert pairs.read(start, stop, ["n", "uid"]).equals(
            rows.slice(start, max(0, stop - start)).select(["n", "uid"])
        )
    assert sum(batch.num_rows for batch in pairs.batches(["uid"])) == pairs.num_rows == 500
    with pytest.raises(DataError, match=r"pairs\.json: no column punsafe; it has uid, url, caption, split, n"):
        pairs.read(0, 1, ["punsafe"])


def test_names_of_shards_sort_as_numbers_beyond_99999() -> None:
    for count in (1, 100_000, 100_001, 1_000_001):
        names = numbered_names(count)
        assert names == sorted(names)
        assert len(names) == len(set(names)) == count
    assert numbered_names(3) == ["00000", "00001", "00002"]
    assert numbered_names(100_001)[-1] == "100000"
