"""Token states on the disk: what is written is what CLIP says, and what is damaged or missing is said."""

import itertools
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.clip.frozen import FrozenClip
from pipeline.data.batch import Batch
from pipeline.data.batches import iterate_batches, plan_order
from pipeline.data.embed import Embedder
from pipeline.data.order import Share
from pipeline.data.rows import make_uid
from pipeline.data.samples import Samples
from pipeline.data.token_states import PackedText, copy_states, pack, read_empty, states_file
from pipeline.data.training_rows import ShardReader
from pipeline.data.vectors import write_embeddings
from pipeline.errors import ConfigError, DataError
from pipeline.networks.clip import clip_folder, load_clip_artifact
from pipeline.recipe.recipe import parse_recipe
from pipeline.recipe.sections import EmbedConfig
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact
from tests.tiny.shards import Sample, make_jpeg, noisy_shard, write_shard
from tests.tiny.token_states import embed_with_states
from tests.tiny.training import tiny_inputs

_CAPTIONS = ("a red circle", "", "a " * 20, "two blue squares beside a small green star", "word " * 50)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("states")
    inputs = tiny_inputs(folder)
    download = Artifact(str(folder / "captions"))
    for shard in range(2):
        samples = [Sample(f"http://a/{shard}/{i}", text, make_jpeg(i)) for i, text in enumerate(_CAPTIONS)]
        write_shard(download, f"{shard:05d}", samples, "jpg")
    return inputs | {"download": download, "embed": embed_with_states(folder / "states", download, inputs["clip"])}


def _samples(inputs: dict[str, Artifact], rows: Artifact | None = None) -> Samples:
    return Samples(ShardReader(None, rows or inputs["embed"], "train", states=inputs["embed"]), 0)


def _assert_as_encoded(batch: Batch, clip: FrozenClip) -> None:
    """Whether the stored captions of a batch are what CLIP says of them, to the digits of float16."""
    assert batch.text is not None
    stored, encoded = batch.text.encoding(), clip.encode_text(batch.captions)
    assert stored.mask.equal(encoded.mask)
    assert stored.tokens.equal(torch.where(encoded.mask, encoded.tokens, 0))
    torch.testing.assert_close(stored.pooled, encoded.pooled, rtol=2e-3, atol=2e-3)
    hidden = torch.where(encoded.mask[..., None], encoded.hidden, 0.0)
    torch.testing.assert_close(stored.hidden, hidden, rtol=2e-3, atol=2e-3)


def test_stored_captions_are_what_clip_says_of_them_in_any_order(inputs: dict[str, Artifact]) -> None:
    clip, samples = load_clip_artifact(inputs["clip"]), _samples(inputs)
    locations = np.array([[1, 4], [0, 0], [1, 1], [0, 3], [0, 0], [1, 2]])
    batch = samples.batch(locations)
    assert [text.strip() for text in batch.captions] == [_CAPTIONS[row].strip() for row in locations[:, 1]]
    _assert_as_encoded(batch, clip)
    for part in (slice(0, 2), slice(2, 3), slice(1, 6)):  # each as long as its own longest caption
        _assert_as_encoded(batch.rows(part), clip)
    assert batch.num_bytes > sum(len(clip.clip.tokenizer.encode(text)[:30]) + 2 for text in batch.captions) * 2 * 16


def test_the_empty_caption_and_the_sizes_are_in_every_file(inputs: dict[str, Artifact]) -> None:
    clip = load_clip_artifact(inputs["clip"])
    empty, expected = read_empty(inputs["embed"].path(states_file("00001"))), clip.encode_text([""])
    assert empty.dims == clip.dims
    assert empty.text.pooled.equal(expected.pooled)
    assert empty.text.hidden.equal(expected.hidden[:, :2])
    assert empty.text.tokens.equal(expected.tokens[:, :2])


def test_rows_of_a_filter_find_their_states_by_uid(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    filtered = Artifact(str(tmp_path / "filtered"))
    for shard in inputs["embed"].shard_records():
        table = pq.read_table(inputs["embed"].path(f"{shard}.parquet")).take(pa.array([3, 0, 4]))
        with filtered.write(f"{shard}.parquet") as path:
            write_embeddings([table], path, table.schema)
        filtered.commit_shard(ShardRecord(shard=shard, counts={"in": 3, "ok": 3}, files={}))
    batch = _samples(inputs, filtered).batch(np.array([[0, 2], [1, 0], [0, 1]]))
    _assert_as_encoded(batch, load_clip_artifact(inputs["clip"]))


def test_lists_with_weights_and_streams_keep_their_order(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    rows = Artifact(str(tmp_path / "rows"))
    for name in inputs["embed"].names():
        with rows.write(name) as path:
            path.write_bytes(inputs["embed"].path(name).read_bytes())
    for number, record in enumerate(rows.shard_records().values()):
        rows.commit_shard(replace(record, list_number=number))
    clip, uids = load_clip_artifact(inputs["clip"]), list[list[str]]()
    for states in (None, rows):
        reader = ShardReader(None, rows, "train", states=states)
        samples = Samples(reader, 0, weights=(3.0, 1.0), num_streams=2)
        order = plan_order(samples, 1, where="test", batch_size=4)
        with closing(iterate_batches(samples, order, Share(4), 0, prefetch=True)) as batches:
            some = list(itertools.islice(batches, 6))
        uids.append([uid for batch in some for uid in batch.uids])
    assert uids[0] == uids[1]
    for batch in some:
        _assert_as_encoded(batch, clip)


def test_embeddings_are_the_same_with_and_without_token_states(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    shard, folder = noisy_shard(tmp_path, num_rows=7), clip_folder(inputs["clip"])
    config = EmbedConfig(batch_size=4, token_states=True)
    result = Embedder(folder, config)(*shard, "00000", tmp_path / "a.arrow")
    assert result.table.equals(Embedder(folder, EmbedConfig(batch_size=4))(*shard, "00000").table)
    Embedder(folder, config)(*shard, "00000", tmp_path / "b.arrow")
    assert (tmp_path / "a.arrow").read_bytes() == (tmp_path / "b.arrow").read_bytes()


def test_a_row_whose_states_overflow_float16_is_left_out_and_told(
    inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pack

    def overflow(*arguments: object) -> PackedText:
        packed = real(*arguments)  # pyright: ignore[reportArgumentType]
        packed.hidden[int(packed.lengths[0])] = float("inf")  # the first token of the second caption
        return packed

    monkeypatch.setattr("pipeline.data.embed.pack", overflow)
    states = tmp_path / "states.arrow"
    embedder = Embedder(clip_folder(inputs["clip"]), EmbedConfig(batch_size=8, token_states=True))
    result = embedder(*noisy_shard(tmp_path), "00000", states)
    assert [(row["key"], row["reason"]) for row in result.failures] == [("0000001", "embedding is not finite")]
    with pa.ipc.open_file(states) as file:
        assert file.read_all()["uid"].to_pylist() == result.table["uid"].to_pylist()


def test_missing_damaged_and_foreign_states_are_named(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    embed, place = inputs["embed"], np.array([[0, 0]])
    rows = Artifact(str(tmp_path / "rows"))
    for name in embed.names():
        with rows.write(name) as path:
            path.write_bytes(embed.path(name).read_bytes())
    file = rows.path(states_file("00000"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    for read in (lambda: _samples({"embed": rows}).batch(place), lambda: read_empty(file)):
        with pytest.raises(DataError, match=r"00000\.tokens\.arrow: damaged .* bring it back from a copy"):
            read()
    uid = make_uid("http://a/0/1", _CAPTIONS[1])
    uids = pq.read_table(rows.path("00000.parquet"))["uid"].to_pylist()
    copy_states(embed.path(states_file("00000")), file, pa.array([one for one in uids if one != uid]))
    with pytest.raises(DataError, match=rf"00000\.tokens\.arrow: no row of uid {uid}"):
        _samples({"embed": rows}).batch(place)
    rows.remove(states_file("00000"))
    with pytest.raises(DataError, match=r"no file 00000\.tokens\.arrow"):
        _samples({"embed": rows}).batch(place)


def test_a_copy_without_some_rows_keeps_all_else(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    source, target = inputs["embed"].path(states_file("00000")), tmp_path / "copy.arrow"
    with pa.ipc.open_file(source) as file:
        before = file.read_all()
    copy_states(source, target, before["uid"].combine_chunks().take(pa.array([0, 4])))
    with pa.ipc.open_file(target) as file:
        assert file.read_all().equals(before.take(pa.array([0, 4])))
    assert read_empty(target).dims == read_empty(source).dims


def test_token_states_of_imported_embeddings_are_refused() -> None:
    with pytest.raises(ConfigError, match="token_states: the folder of import_from has none"):
        parse_recipe({"embed": {"token_states": True, "import_from": "folder"}})
