"""Several lists of pairs in one recipe, from the recipe to the shards."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import sources
from pipeline.data.make_pairs import PairsSummary, write_pairs
from pipeline.data.pairs import Pairs
from pipeline.data.samples import Samples
from pipeline.data.shard_rows import ShardSpan, shard_names
from pipeline.data.sources import Source, count_pairs, tars_of
from pipeline.data.training_rows import ShardReader
from pipeline.errors import ConfigError, DataError
from pipeline.recipe.pairs_sections import PairsConfig, PairsList
from pipeline.recipe.paths import with_absolute_paths
from pipeline.recipe.plan import Step, make_plan
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact
from tests.tiny.recipe import keys_of, tiny_tables
from tests.tiny.shards import make_embeddings, write_tar


def _write_list(path: Path, numbers: range, **columns: str) -> str:
    """A list; ``columns`` renames url and caption."""
    values = {"url": [f"http://a/{n // 2}" for n in numbers], "caption": [f"caption {n}" for n in numbers]}
    pq.write_table(pa.table({columns.get(name, name): column for name, column in values.items()}), path)
    return str(path)


def _recipe(folder: Path, lists: list[dict[str, Any]], **changes: Any) -> Recipe:
    pairs = {"source": "list", "lists": lists} | changes.pop("pairs", {})
    return parse_recipe(tiny_tables(folder / "workspace", pairs=pairs, **changes))


def _write(recipe: Recipe, output: Path, **changes: Any) -> tuple[PairsSummary, Pairs]:
    artifact = Artifact(str(output))
    summary = write_pairs(Source(recipe.pairs, **changes), artifact)
    return summary, Pairs(artifact)


def test_the_rows_of_the_lists_follow_one_another_and_the_first_keeps_a_repeated_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 1)
    folder = tmp_path / "first"
    folder.mkdir()
    _write_list(folder / "a.parquet", range(30))
    _write_list(folder / "b.parquet", range(30, 50))
    lists = [
        {"path": str(folder), "weight": 0.5},
        {"path": _write_list(tmp_path / "c.parquet", range(45, 70), url="link", caption="words"), "url_column": "link",
         "caption_column": "words"},
    ]  # fmt: skip
    recipe = _recipe(tmp_path, lists, pairs={"validation_prob": 0.3})
    summary, pairs = _write(recipe, tmp_path / "pairs")
    assert summary.counts == {"in": 75, "ok": 70, "duplicate": 5}
    assert summary.metrics["lists"] == [{"in": 50, "ok": 50, "duplicate": 0}, {"in": 25, "ok": 20, "duplicate": 5}]
    assert [(part.num_rows, part.list_number) for part in pairs.parts] == [(30, 0), (20, 0), (20, 1)]
    table = pairs.read(0, 70, ["url", "caption", "split"])
    assert table["caption"].to_pylist() == [f"caption {n}" for n in range(70)]
    sides = {(row["url"], row["split"]) for row in table.to_pylist()}
    assert len(sides) == len({url for url, _ in sides}), "all captions of a picture are on one side, over the lists"
    assert {split for _, split in sides} == {"train", "validation"}
    assert count_pairs(recipe.pairs) == 75
    first_rows, _ = _write(_recipe(tmp_path, lists, pairs={"max_pairs": 8}), tmp_path / "few")
    assert [one["in"] for one in first_rows.metrics["lists"]] == [8, 8]


def test_no_shard_has_rows_of_two_lists() -> None:
    names = shard_names([25, 0, 7], 10)
    spans = [ShardSpan.of(name, [25, 0, 7], 10) for name in names]
    assert [(span.start, span.stop, span.list_number) for span in spans] == [
        (0, 10, 0), (10, 20, 0), (20, 25, 0), (25, 32, 2),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no shard 00004"):
        ShardSpan.of("00004", [25, 0, 7], 10)


def test_a_weight_is_in_the_keys_of_the_trainings_alone(tmp_path: Path) -> None:
    paths = [_write_list(tmp_path / f"{name}.parquet", range(5)) for name in "ab"]
    plain = _recipe(tmp_path, [{"path": path} for path in paths])
    before, after = keys_of(plain), keys_of(_recipe(tmp_path, [{"path": paths[0], "weight": 2.0}, {"path": paths[1]}]))
    assert {name for name in before if before[name] == after[name]} == {"pairs", "download"}
    pretrained = {"source": "pretrained", "name": "ViT-B-32", "tag": "openai"}
    frozen = [_recipe(tmp_path, [{"path": paths[0], "weight": w}], clip=pretrained) for w in (1.0, 2.0)]
    same = {name for name, key in keys_of(frozen[0]).items() if keys_of(frozen[1])[name] == key}
    assert same == {"pairs", "download", "clip", "embed", "index"}
    _write_list(tmp_path / "b.parquet", range(6))
    assert keys_of(plain)["pairs"] != before["pairs"], "the content of each list is part of the key"
    swapped = _recipe(tmp_path, [{"path": path} for path in reversed(paths)])
    assert keys_of(swapped)["pairs"] != keys_of(plain)["pairs"]


def test_one_list_of_weight_one_is_the_same_as_its_path_alone(tmp_path: Path) -> None:
    path = _write_list(tmp_path / "a.parquet", range(5))
    alone = parse_recipe(tiny_tables(tmp_path / "workspace", pairs={"source": "list", "path": path}))
    assert keys_of(_recipe(tmp_path, [{"path": path}])) == keys_of(alone)
    [pairs] = make_plan(alone, until="pairs")
    assert "lists" not in pairs.section
    assert "list_weights" not in _step(alone, "prior").section


def _step(recipe: Recipe, name: str) -> Step:
    return next(step for step in make_plan(recipe) if step.name == name)


def test_paths_of_all_lists_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = with_absolute_paths(_recipe(tmp_path, [{"path": "a.csv"}, {"path": "s3://b/c.csv", "weight": 2.0}]))
    assert recipe.pairs.lists == (PairsList(path=f"{tmp_path}/a.csv"), PairsList(path="s3://b/c.csv", weight=2.0))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"lists": [{"path": "a", "weight": 0.0}]}, r"pairs.lists.0.weight: .*greater than 0, got 0.0"),
        ({"lists": [{"path": "a"}, {"path": "b", "weight": -1.0}]}, r"pairs.lists.1.weight: .*greater than 0"),
        ({"lists": [{"path": "a", "weigth": 1.0}]}, "unknown key pairs.lists.0.weigth"),
        ({"lists": [{"path": "a"}, {"path": "b"}, {"path": "./a"}]}, r"list 3 \(./a\) is list 1 again"),
        ({"lists": [{"path": "a"}], "path": "b"}, "path is set beside lists"),
        ({"lists": [{"path": "a"}], "url_column": "b"}, "url_column is set beside lists"),
        ({"lists": [{"path": "a"}], "source": "drawn"}, "lists need source"),
    ],
)
def test_impossible_lists_are_refused(tmp_path: Path, pairs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_recipe(tiny_tables(tmp_path, pairs={"source": "list"} | pairs))


def test_a_list_may_come_twice_with_another_column_of_captions() -> None:
    lists = (PairsList(path="a", caption_column="short"), PairsList(path="a", caption_column="long"))
    assert [one.caption_column for one in PairsConfig(source="list", lists=lists).each()] == ["short", "long"]


def test_weights_are_refused_where_rows_are_of_no_list(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pairs.lists have weights, but the rows of embed.import_from"):
        _recipe(tmp_path, [{"path": "a", "weight": 2.0}], embed={"import_from": "folder"})


def test_errors_name_the_list_by_its_number(tmp_path: Path) -> None:
    good = _write_list(tmp_path / "a.parquet", range(5))
    missing = _recipe(tmp_path, [{"path": good}, {"path": str(tmp_path / "nothing.csv")}])
    with pytest.raises(ConfigError, match=r"pairs: list 2: .*nothing.csv does not exist"):
        make_plan(missing)
    with pytest.raises(DataError, match=r"list 2 of pairs.lists: .*nothing.csv: no such list"):
        _write(missing, tmp_path / "missing")
    other = _recipe(tmp_path, [{"path": good}, {"path": _write_list(tmp_path / "b.parquet", range(5), url="x")}])
    with pytest.raises(DataError, match=r"list 2 of pairs.lists: .*b.parquet"):
        _write(other, tmp_path / "other")
    with pytest.raises(DataError, match=r"list 1 of pairs.lists: .*a.parquet.*score"):
        _write(_recipe(tmp_path, [{"path": good}, {"path": other.pairs.lists[1].path, "url_column": "x"}]),
               tmp_path / "columns", extra_columns=("score",))  # fmt: skip
    (tmp_path / "empty.csv").write_text("url,caption\n,no address\n")
    empty = _recipe(tmp_path, [{"path": good}, {"path": str(tmp_path / "empty.csv")}])
    with pytest.raises(DataError, match=r"list 2 of pairs.lists: .*empty.csv: no usable row among 1"):
        _write(empty, tmp_path / "empty")


def test_validation_looks_at_each_list_as_often_as_the_training(tmp_path: Path) -> None:
    embed, vectors = Artifact(str(tmp_path)), np.eye(16, dtype=np.float32)[np.arange(40) % 16]
    make_embeddings(embed, vectors, vectors, 10)
    for shard, record in embed.shard_records().items():
        number = int(shard == "00003")
        embed.commit_shard(ShardRecord(**record.to_dict() | {"list_number": number}))
    reader = ShardReader(None, embed, "train")
    captions = {
        weights: [caption.removeprefix("caption ") for caption in first.captions]
        for weights in ((), (1.0, 3.0))
        if (first := Samples(reader, 0, weights=weights).first(8))
    }
    assert captions[()] == ["0", "1", "2", "3", "4", "5", "30", "31"]
    assert Counter(int(caption) >= 30 for caption in captions[1.0, 3.0]) == {False: 4, True: 4}


def test_parts_of_shards_in_two_folders_find_their_tars(tmp_path: Path) -> None:
    for name, numbers in (("a", range(3)), ("b", range(3, 5))):
        for number in numbers:
            (tmp_path / name).mkdir(exist_ok=True)
            write_tar(tmp_path / f"{name}/{number}.tar", [(f"{number}.jpg", b"x"), (f"{number}.txt", b"text")])
    lists = (PairsList(path=str(tmp_path / "a"), weight=2.0), PairsList(path=str(tmp_path / "b")))
    for max_pairs, expected in ((0, ["a/0", "a/1", "a/2", "b/3", "b/4"]), (1, ["a/0", "b/3"])):
        config, output = PairsConfig(source="shards", lists=lists, max_pairs=max_pairs), tmp_path / f"{max_pairs}"
        write_pairs(Source(config), Artifact(str(output)))
        tars = tars_of(config, Pairs(Artifact(str(output))).parts)
        assert [tar.uri for tar in tars.values()] == [f"{tmp_path}/{name}.tar" for name in expected]
    (tmp_path / "b").rename(tmp_path / "c")
    with pytest.raises(DataError, match=r"list 2 of pairs.lists: "):
        tars_of(config, [])
