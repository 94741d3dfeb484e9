"""Defects seen in public unCLIP training code, by name: ours has none of them. The mathematics is in tests/models."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.data.batches import iterate_batches, plan_order
from pipeline.data.order import Share
from pipeline.data.rows import split_of
from pipeline.data.samples import Samples
from pipeline.data.training_rows import ShardReader
from pipeline.errors import DataError
from pipeline.evaluate.metrics import FeatureSums, frechet_distance
from tests.tiny.networks import make_cascade, save_cascade
from tests.tiny.shards import write_download, write_embed


def test_frechet_distance_is_not_averaged_over_ranks() -> None:
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(400, 4)), rng.normal(0.3, 1.2, size=(400, 4))
    whole = frechet_distance(FeatureSums.of(generated), FeatureSums.of(real))
    ranks = np.array_split(generated, 8)
    merged = sum((FeatureSums.of(part) for part in ranks[1:]), start=FeatureSums.of(ranks[0]))
    assert frechet_distance(merged, FeatureSums.of(real)) == pytest.approx(whole, rel=1e-9)
    averaged = np.mean([frechet_distance(FeatureSums.of(part), FeatureSums.of(real)) for part in ranks])
    assert averaged > 1.05 * whole  # which is what averaging would have said


def test_split_is_not_redone_per_rank() -> None:
    # a row's split follows from its URL alone: no rank, no order, no generator
    urls = [f"http://a/{i}" for i in range(2000)]
    splits = [split_of(url, 0.1) for url in urls]
    assert [split_of(url, 0.1) for url in reversed(urls)] == splits[::-1]
    assert 0.07 < splits.count("validation") / len(splits) < 0.13


def test_weights_are_not_tied_to_a_version_of_the_code(tmp_path: Path) -> None:
    # nothing that is read back is a pickle: safetensors and JSON alone
    save_cascade(make_cascade(), tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        head = path.read_bytes()[:9]
        assert head[:2] not in (b"PK", b"\x80\x02"), path  # a zip of pickles, a pickle
        assert path.suffix == ".json" or head[8:9] == b"{"


def test_shard_without_embeddings_is_an_error_and_not_a_silent_hang(tmp_path: Path) -> None:
    download = write_download(tmp_path / "download")
    embed = write_embed(tmp_path / "embed", download)
    embed.path("00001.parquet").unlink()
    with pytest.raises(DataError, match="00001"):
        ShardReader(download, embed, "train")


def test_workers_of_unequal_shards_get_batches_of_equal_number(tmp_path: Path) -> None:
    # a rank that runs out of rows before the others leaves them waiting for it; the planned order has no such end
    download = write_download(tmp_path / "download", num_shards=1, num_rows=7)
    samples = Samples(ShardReader(download, None, "train"), 32)
    order = plan_order(samples, 0, where="test")
    workers = [iterate_batches(samples, order, Share(4, rank, 2), 0) for rank in range(2)]
    for _ in range(5):
        assert [len(next(worker)) for worker in workers] == [2, 2]
