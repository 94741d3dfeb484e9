"""clip-retrieval's folder of embeddings, out and in, with the real embedding-reader."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding_reader import EmbeddingReader

from pipeline.data.npy_folder import export_embeddings, find_parts, import_part, write_import_recipe
from pipeline.data.rows import make_uid, split_of
from pipeline.data.vectors import read_vectors, to_unit
from pipeline.errors import ConfigError, DataError
from pipeline.recipe.recipe import load_recipe
from pipeline.workspace.store import Artifact
from tests.tiny.shards import make_embeddings

_NUM_ROWS, _DIM = 50, 8


def _unit(seed: int, num_rows: int = _NUM_ROWS) -> Any:
    return to_unit(np.random.default_rng(seed).standard_normal((num_rows, _DIM)).astype(np.float16))


@pytest.fixture
def embed(tmp_path: Path) -> Artifact:
    """Three shards of 20, 20 and 10 rows."""
    artifact = Artifact(str(tmp_path / "embed"))
    make_embeddings(artifact, _unit(0), _unit(1), 20)
    return artifact


def _read_all(reader: EmbeddingReader) -> tuple[Any, Any]:
    batches = list(reader(batch_size=16, show_progress=False))
    return np.concatenate([rows for rows, _ in batches]), [meta for _, meta in batches]


def test_embedding_reader_reads_our_shards(embed: Artifact) -> None:
    reader = EmbeddingReader(
        embeddings_folder=embed.uri,
        file_format="parquet",
        embedding_column="z_image",
        meta_columns=["uid", "caption"],
    )
    assert (reader.count, reader.dimension) == (_NUM_ROWS, _DIM)
    rows, metas = _read_all(reader)
    assert np.array_equal(rows, _unit(0).astype(np.float16))
    captions = [caption for meta in metas for caption in meta["caption"]]
    assert captions == [f"caption {number}" for number in range(_NUM_ROWS)]


@pytest.mark.parametrize(("kind", "seed"), [("img", 0), ("text", 1)])
def test_embedding_reader_reads_the_exported_folder(embed: Artifact, tmp_path: Path, kind: str, seed: int) -> None:
    folder = tmp_path / "npy"
    assert export_embeddings(embed, folder) == _NUM_ROWS
    assert sorted(path.name for path in folder.glob("*/*.npy")) == sorted(
        f"{name}_emb_{part}.npy" for name in ("img", "text") for part in range(3)
    )
    reader = EmbeddingReader(
        embeddings_folder=str(folder / f"{kind}_emb"),
        metadata_folder=str(folder / "metadata"),
        file_format="parquet_npy",
        meta_columns=["image_path", "caption", "uid"],
    )
    rows, metas = _read_all(reader)
    assert np.array_equal(rows, _unit(seed).astype(np.float16))
    assert metas[0]["caption"][3] == "caption 3"
    assert metas[0]["image_path"][3] == "0000000003"
    with pytest.raises(ConfigError, match="not empty"):
        export_embeddings(embed, folder)


def test_what_was_exported_comes_back_as_the_same_rows(embed: Artifact, tmp_path: Path) -> None:
    export_embeddings(embed, tmp_path / "npy")
    parts = find_parts(tmp_path / "npy")
    assert [part.name for part in parts] == ["00000", "00001", "00002"]
    for part in parts:
        counts, failures = import_part(part, 0.5, tmp_path / "back.parquet")
        assert (counts["ok"], failures) == (part.num_rows, [])
        assert (tmp_path / "back.parquet").read_bytes() == embed.path(f"{part.name}.parquet").read_bytes()


def _foreign(folder: Path, number: str, img: Any, text: Any, metadata: dict[str, Any]) -> None:
    """One part, as clip-retrieval writes it."""
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    np.save(folder / f"img_emb/img_emb_{number}.npy", img)
    np.save(folder / f"text_emb/text_emb_{number}.npy", text)
    pq.write_table(pa.table(metadata), folder / f"metadata/metadata_{number}.parquet")


def test_a_foreign_part_gets_uids_unit_vectors_and_a_split_and_its_bad_rows_are_named(tmp_path: Path) -> None:
    img = _unit(0, 6) * 9
    img[2] = np.nan
    img[4] = 0
    metadata = {
        "image_path": [f"{row:09d}" for row in range(6)],
        "caption": [None, *(f"caption {row}" for row in range(1, 6))],
        "url": [f"http://a/{row}" for row in range(6)],
        "uid": [str(row) for row in range(6)],
        "nested": [{"a": 1}] * 6,
    }
    _foreign(tmp_path, "0", img, _unit(1, 6), metadata)
    [part] = find_parts(tmp_path)
    counts, failures = import_part(part, 0.5, tmp_path / "out.parquet")
    assert counts == {"in": 6, "ok": 4, "corrupt": 2}
    assert [failure["url"] for failure in failures] == ["http://a/2", "http://a/4"]
    vectors = read_vectors(tmp_path / "out.parquet")
    assert np.allclose(vectors.z_image, _unit(0, 6)[[0, 1, 3, 5]], atol=1e-3)
    rows = vectors.table.to_pylist()
    assert [row["caption"] for row in rows] == ["", "caption 1", "caption 3", "caption 5"]
    for row in rows:
        assert row["uid"] == make_uid(row["url"], row["caption"])
        assert row["split"] == split_of(row["url"], 0.5)
    expected = (to_unit(vectors.z_image) * to_unit(vectors.z_text)).sum(1)
    assert np.allclose(vectors.table.column("clip_score").to_numpy(), expected, atol=1e-3)


def test_parts_come_in_order_of_their_numbers_and_must_fit_together(tmp_path: Path) -> None:
    def part(folder: str, number: str, num_img: int = 3, num_text: int = 3, num_meta: int = 3) -> Path:
        metadata = {"image_path": [str(row) for row in range(num_meta)]}
        _foreign(tmp_path / folder, number, _unit(0, num_img), _unit(1, num_text), metadata)
        return tmp_path / folder

    for number in ("10", "9"):
        part("good", number)
    assert [one.img.name for one in find_parts(tmp_path / "good")] == ["img_emb_9.npy", "img_emb_10.npy"]
    with pytest.raises(DataError, match="part 0: rows differ"):
        find_parts(part("text", "0", num_text=4))
    with pytest.raises(DataError, match="part 0: rows differ"):
        find_parts(part("metadata", "0", num_meta=2))
    (part("missing", "0") / "text_emb/text_emb_0.npy").unlink()
    with pytest.raises(DataError, match=r"text_emb_0\.npy is missing: .* with --enable_text True"):
        find_parts(tmp_path / "missing")
    for number in ("part", "\u00b2", "1-2"):
        with pytest.raises(DataError, match=rf"img_emb_{number}.npy: {number} is no number of a part"):
            find_parts(part(f"named-{number}", number))
    with pytest.raises(DataError, match="no folder of embeddings of clip-retrieval"):
        find_parts(tmp_path)
    (part("damaged", "0") / "img_emb/img_emb_0.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match="no array that can be read"):
        find_parts(tmp_path / "damaged")


def test_damaged_metadata_is_refused_by_the_name_of_its_file(embed: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "npy"
    export_embeddings(embed, folder)
    metadata = folder / "metadata/metadata_0.parquet"
    whole, [part, *_] = metadata.read_bytes(), find_parts(folder)
    metadata.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[len(whole) // 2 + 4 :])
    with pytest.raises(DataError, match=r"metadata_0\.parquet: cannot be read: "):
        import_part(part, 0.1, tmp_path / "out.parquet")
    metadata.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"metadata_0\.parquet: damaged, or not what its name says"):
        find_parts(folder)


def test_the_recipe_of_an_imported_folder_loads_and_is_not_overwritten(embed: Artifact, tmp_path: Path) -> None:
    export_embeddings(embed, tmp_path / "npy")
    out = tmp_path / "taken \U0001f98a over"
    num_rows, path = write_import_recipe(tmp_path / "npy", out)
    recipe = load_recipe(path)
    assert num_rows == _NUM_ROWS
    assert recipe.embed.import_from == str(tmp_path / "npy")
    assert recipe.workspace == str(out / "workspace")
    with pytest.raises(ConfigError, match="exists"):
        write_import_recipe(tmp_path / "npy", out)
