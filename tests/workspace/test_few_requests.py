"""What asks an object store for as little with many shards as with few, counted by a local server."""

import dataclasses
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.data.selection import selection_of
from pipeline.data.shard_tables import split_counts
from pipeline.data.training_rows import ShardReader
from pipeline.filter import duplicates, semantic
from pipeline.filter.labels import write_table
from pipeline.recipe.sections import IndexConfig
from pipeline.retrieve import parts
from pipeline.retrieve.build import SegmentBuild
from pipeline.runtime.filter import MEASURES, part_of, run_filter
from pipeline.runtime.filter_embeddings import _measures, run_filter_embeddings
from pipeline.train.checkpoint import Checkpoint, Snapshot
from pipeline.train.resume import checkpoint_name
from pipeline.workspace.progress import read_progress
from pipeline.workspace.store import Artifact
from tests.filter.planted import commit, embed_by_eye, make_context, output_of, tiny_recipe, without_ray
from tests.s3_server import S3Server
from tests.tiny.shards import drawn_sample, make_embeddings, write_shard

_DIM, _ROWS, _SHARDS = 256, 1024, 16


def test_an_index_is_trained_on_a_sample_of_shards_that_are_not_fetched(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(parts, "_MIN_PART_ROWS", 4 * _ROWS)  # several parts: other machines fetch the files
    embed, output = Artifact(f"{bucket}/embed/k"), Artifact(f"{bucket}/index/k")
    vectors = np.random.default_rng(0).normal(size=(_SHARDS * _ROWS, _DIM)).astype(np.float32)
    make_embeddings(embed, vectors, vectors, _ROWS, held_out_every=50)
    data_bytes = sum(size for name, size in embed.sizes().items() if name.endswith(".parquet"))
    shutil.rmtree(tmp_path / "cache")
    s3_server.counted()
    config = IndexConfig(kind="ivf_rabitq", num_train_rows=2000, num_recall_queries=20)
    SegmentBuild((embed,), output, config, seed=0).prepare()
    requests = [one for one in s3_server.counted() if one.name.endswith(".parquet")]
    kinds = Counter(one.kind for one in requests)
    assert kinds.keys() == {"HEAD", "ranged GET"}  # no file is fetched whole
    # A block of 2 rows is a range of each column, a query one of one column; beside these comes what pyarrow reads of
    # a footer, twice of a shard with queries, and its column of splits.
    ranges = [one.num_bytes for one in requests if one.kind == "ranged GET"]
    blocks = [size for size in ranges if size % (2 * _DIM) == 0 and size <= 64 * _DIM]
    assert 1700 <= len(blocks) <= 2 * 1000 + 20  # blocks side by side are one range
    assert sum(blocks) <= 2 * _DIM * (2 * 2000 + 20)
    assert len(ranges) - len(blocks) <= 5 * _SHARDS
    assert sum(ranges) < 0.5 * data_bytes  # of small shards, footers are most of it


def _filtered(root: str, num_shards: int, folder: Path, server: S3Server) -> tuple[Counter[str], int]:
    """Requests of both filter steps on shards of drawn rows, and how many parts they searched."""
    rules = {"filter": {"duplicates": "near"}, "filter_embeddings": {"max_similarity": 0.99}}
    recipe = dataclasses.replace(tiny_recipe(folder, **rules), workspace=root)
    contexts = {
        step: dataclasses.replace(make_context(folder, step, recipe), root=root)
        for step in ("filter", "embed", "filter_embeddings")
    }
    download = contexts["filter"].inputs["download"]
    for shard in range(num_shards):
        write_shard(download, f"{shard:05d}", [drawn_sample(12 * shard + i) for i in range(12)], "png")
    server.counted()
    commit(contexts["filter"], run_filter(contexts["filter"]))
    requests = server.counted()
    embed_by_eye(contexts["embed"])
    server.counted()
    commit(contexts["filter_embeddings"], run_filter_embeddings(contexts["filter_embeddings"]))
    requests += server.counted()
    num_parts = len({one.name for one in requests if "live/results/" in one.name and "PUT" in one.kind})
    return Counter(one.kind for one in requests if "/results" not in one.name), num_parts


def test_clip_scores_that_other_machines_measured_are_a_request_of_each_shard(
    bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    output, shards = Artifact(f"{bucket}/filter_embeddings/k"), [f"{number:05d}" for number in range(6)]
    tables = [pa.table({"clip_score": [0.1 * number]}) for number in range(6)]
    for shard, table in zip(shards, tables, strict=True):
        with part_of(output, MEASURES).write(f"{shard}.arrow") as path:
            write_table(table, path)
    shutil.rmtree(tmp_path / "cache")
    s3_server.counted()
    assert list(_measures(output, shards)) == tables
    assert Counter(one.kind for one in s3_server.counted() if MEASURES in one.name) == {"GET": 6}
    state = read_progress(output)
    assert state is not None
    assert (state.total, state.message) == (6, "comparing the CLIP scores")


@pytest.mark.slow
def test_a_search_for_duplicates_asks_for_no_shard_in_each_of_its_parts(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_ray(monkeypatch)
    few, num_few = _filtered(f"{bucket}/few", 12, tmp_path, s3_server)
    monkeypatch.setattr(duplicates, "ROWS_PER_PART", 24)
    monkeypatch.setattr(semantic, "ROWS_PER_GROUP", 24)
    many, num_many = _filtered(f"{bucket}/many", 12, tmp_path, s3_server)
    num_more = (num_many - num_few) // 2  # a file and a record each
    assert num_more > 20
    # One bundle: each part looks at it, and none at the twelve shards.
    assert many - few == {"HEAD": num_more}


def test_a_build_that_begins_anew_removes_the_old_files_with_one_request(bucket: str, s3_server: S3Server) -> None:
    output = Artifact(f"{bucket}/index/k")
    for number in range(40):
        output.write_json(f"live/segment_00000/part-{number:06d}.json", {})
    output.write_json("live/segment_00001/other.json", {})
    s3_server.counted()
    SegmentBuild((), output, IndexConfig(), seed=0).clear()
    assert Counter(one.kind for one in s3_server.counted()) == {"DELETE": 2, "LIST": 2}
    assert output.names() == ["live/segment_00001/other.json"]


def test_a_checkpoint_is_read_with_one_look_at_each_of_its_files(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    artifact, name, num_files = Artifact(f"{bucket}/prior/k"), checkpoint_name(4), 3
    whole = {f"network.{number}": torch.randn(6, 2) for number in range(40)}
    for number in (2, 1, 0):
        rows = {key: tensor[2 * number : 2 * number + 2].clone() for key, tensor in whole.items()}
        shapes = {key: [6, 2] for key in whole}
        Snapshot(4, {}, rows, shapes, number, num_files).publish(artifact, name, "key", "attempt")
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "of-another-machine"))
    s3_server.counted()
    read = Checkpoint(artifact, name).read("network")
    assert all(torch.equal(read[key.removeprefix("network.")], tensor) for key, tensor in whole.items())
    requests = [one for one in s3_server.counted() if one.name.endswith(".safetensors")]
    assert Counter(one.kind for one in requests) == {"HEAD": num_files, "GET": num_files}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_training_that_starts_with_a_selection_reads_no_table(
    split: str, bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_ray(monkeypatch)
    asked = list[Counter[str]]()
    for num_shards in (2, 5):
        root = f"{bucket}/{num_shards}"
        recipe = dataclasses.replace(tiny_recipe(tmp_path, filter={"min_caption_words": 8}), workspace=root)
        context = dataclasses.replace(make_context(tmp_path, "filter", recipe), root=root)
        download = context.inputs["download"]
        for shard in range(num_shards):
            name = f"{shard:05d}"
            samples = [drawn_sample(12 * shard + i, is_validation=i % 3 == 0, failed=i % 4 == 3) for i in range(12)]
            write_shard(download, name, samples, "png")
            splits = split_counts(download.path(f"{name}.parquet"))
            download.commit_shard(dataclasses.replace(download.shard_record(name), splits=splits))
        result = run_filter(context)
        download.fold_records()
        download.write_json("manifest.json", {})  # the step is finished
        context.output.fold_records()
        commit(context, result)
        assert 0 < result.counts["short_caption"] < result.counts["in"]
        s3_server.counted()
        reader = ShardReader(download, None, split, selection_of({"filter": output_of(recipe, "filter")}))
        requests = s3_server.counted()
        asked.append(Counter(one.kind for one in requests))
        assert not [one for one in requests if one.name.endswith(".parquet")]
        assert reader.shard_rows == [len(reader.table(shard)) for shard in reader.shards]
    assert asked[0] == asked[1] == {"HEAD": 2, "GET": 2}
