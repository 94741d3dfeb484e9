"""Which prompts and which rows an evaluation takes."""

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import vectors
from pipeline.data.rows import make_uid
from pipeline.data.vectors import to_unit
from pipeline.errors import DataError
from pipeline.evaluate import prompts as prompts_module
from pipeline.evaluate.evaluate import plan_work
from pipeline.evaluate.prompts import choose_prompts, choose_rows, first_images
from pipeline.recipe.recipe import Recipe
from pipeline.workspace import stored_files
from pipeline.workspace.store import Artifact
from tests.evaluate.conftest import evaluate_inputs
from tests.tiny.shards import write_vectors


def test_drawn_prompts_come_with_their_scenes_and_a_partner_of_as_many_objects(tiny: Recipe) -> None:
    prompts = plan_work(tiny, evaluate_inputs(tiny)).prompts
    assert prompts.source == "drawn"
    assert len(prompts.prompts) == 10
    for number, prompt in enumerate(prompts.prompts):
        assert prompt.scene is not None
        partner = prompts.partners[number]
        assert partner is not None
        other = prompts.prompts[partner].scene
        assert other is not None
        assert partner != number
        assert len(other.objects) == len(prompt.scene.objects)
    assert sorted(number for number in prompts.partners if number is not None) == list(range(10))


def test_prompts_of_a_file_are_drawn_in_its_order(tiny: Recipe, tmp_path: Path) -> None:
    inputs, path = evaluate_inputs(tiny), tmp_path / "prompts.txt"
    path.write_text("\ufeffa red circle\n\n  a blue star \n", encoding="utf-8")
    prompts = choose_prompts(str(path), inputs["pairs"], inputs["embed"], 10)
    assert [prompt.text for prompt in prompts.prompts] == ["a red circle", "a blue star"]
    assert (prompts.source, prompts.num_in_file) == ("file", 2)
    first = choose_prompts(str(path), inputs["pairs"], inputs["embed"], 1)
    assert ([prompt.text for prompt in first.prompts], first.num_in_file) == (["a red circle"], 2)
    path.write_text("\n")
    with pytest.raises(DataError, match="no prompts"):
        choose_prompts(str(path), inputs["pairs"], inputs["embed"], 10)


def _embeddings(artifact: Artifact, captions: Sequence[str | None], rows_per_shard: int) -> list[dict[str, Any]]:
    """Commit shards with a training row for each caption; the rows in the order of their uids."""
    rng, rows = np.random.default_rng(0), list[dict[str, Any]]()
    for start in range(0, len(captions), rows_per_shard):
        shard = f"{start // rows_per_shard:05d}"
        part = [
            {
                "uid": make_uid(str(number), ""),
                "key": f"{shard}{number}",
                "url": "",
                "caption": caption,
                "split": "train",
            }
            for number, caption in enumerate(captions[start : start + rows_per_shard], start)
        ]
        z_image, z_text = rng.standard_normal((2, len(part), 8))
        write_vectors(
            artifact, shard, part, *(to_unit(z.astype(np.float16)).astype(np.float16) for z in (z_image, z_text))
        )
        rows += [row | {"shard": shard, "z_image": z} for row, z in zip(part, z_image, strict=True)]
    return sorted(rows, key=lambda row: row["uid"])


def test_rows_are_chosen_by_uid_whatever_the_number_asked(tmp_path: Path) -> None:
    embed = Artifact(str(tmp_path))
    rows = _embeddings(embed, [f"caption {number}" for number in range(700)], 7)
    choice = choose_rows(embed, 40, "train")
    assert [(row.uid, row.key, row.caption, row.shard) for row in choice.rows] == [
        (row["uid"], row["key"], row["caption"], row["shard"]) for row in rows[:40]
    ]
    assert [row.uid for row in choice.captioned] == [row["uid"] for row in rows[:40]]
    expected = to_unit(np.array([row["z_image"] for row in rows[:40]], np.float16))
    np.testing.assert_allclose(np.array([row.z_image for row in choice.rows], np.float32), expected, atol=2e-3)
    np.testing.assert_allclose(first_images(embed, 40, "train"), expected, atol=2e-3)
    assert [row.uid for row in choose_rows(embed, 3, "train").rows] == [row["uid"] for row in rows[:3]]
    assert not choose_rows(embed, 3, "validation").rows
    assert len(first_images(embed, 3, "validation")) == 0


@pytest.mark.parametrize("rows_per_shard", [7, 25])
def test_rows_are_chosen_with_few_shards_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_shard: int
) -> None:
    """Shards of any size: several together, one alone, and one by its row groups."""
    embed, sizes, looks, concat = Artifact(str(tmp_path)), list[int](), list[tuple[int, int]](), pa.concat_tables
    monkeypatch.setattr(vectors, "ROW_GROUP_ROWS", 5)
    rows = _embeddings(embed, [f"caption {number}" for number in range(100)], rows_per_shard)

    def measured(tables: Sequence[pa.Table]) -> pa.Table:
        sizes.append(sum(table.num_rows for table in tables[1:]))
        return concat(tables)

    monkeypatch.setattr(prompts_module, "_ROWS_AT_ONCE", 20)
    monkeypatch.setattr(prompts_module.pa, "concat_tables", measured)
    choice = choose_rows(embed, 10, "train", lambda *look: looks.append(look))
    assert [row.uid for row in choice.rows] == [row["uid"] for row in rows[:10]]
    assert (sum(sizes), max(sizes) <= 20) == (100, True)
    num_shards = -(-100 // rows_per_shard)
    assert looks[-1] == (num_shards, num_shards)
    assert len(looks) > 2


def test_a_caption_is_one_prompt_and_an_empty_one_is_none(tmp_path: Path) -> None:
    embed, pairs = Artifact(str(tmp_path / "embed")), Artifact(str(tmp_path / "pairs"))
    captions = ["photo" if number % 10 else f"caption {number}" for number in range(500)]
    captions[10:13] = ["", " ", None]
    rows = _embeddings(embed, captions, 20)
    texts = [prompt.text for prompt in choose_prompts("", pairs, embed, 40).prompts]
    assert texts == [one for one in dict.fromkeys(row["caption"] for row in rows) if (one or "").strip()][:40]
    assert len(texts) == 40
    without = Artifact(str(tmp_path / "without"))
    _embeddings(without, ["", None], 2)
    assert [prompt.text for prompt in choose_prompts("", pairs, without, 40).prompts] == [""]


def test_of_shards_in_a_store_little_else_than_the_chosen_rows_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    embed = Artifact(f"memory://{uuid.uuid4().hex}")
    rows = _embeddings(embed, [f"caption {number}" for number in range(300)], 100)
    monkeypatch.setattr(stored_files, "_SMALL_BYTES", 0)
    monkeypatch.setattr(Artifact, "path", lambda _, name: pytest.fail(f"{name} is fetched whole"))
    assert [row.uid for row in choose_rows(embed, 5, "train").rows] == [row["uid"] for row in rows[:5]]
    assert len(first_images(embed, 5, "train")) == 5


@pytest.mark.parametrize("damage", ["column", "scene", "bytes"])
def test_a_broken_evaluation_table_is_a_data_error_that_names_it(tiny: Recipe, tmp_path: Path, damage: str) -> None:
    pairs = Artifact(str(tmp_path))
    rows = {"prompt": ["x"], "kind": ["k"], "scene": ['{"objects": [{}], "background": "red"}']}
    if damage == "column":
        del rows["scene"]
    with pairs.write("evaluation.parquet") as path:
        if damage == "bytes":
            path.write_bytes(b"PAR1 not parquet")
        else:
            pq.write_table(pa.table(rows), path)
    with pytest.raises(DataError, match=r"evaluation\.parquet") as caught:
        choose_prompts("", pairs, evaluate_inputs(tiny)["embed"], 5)
    if damage == "bytes":
        assert "; bring it back from a copy" in str(caught.value)
