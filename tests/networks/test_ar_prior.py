"""What is measured for the autoregressive prior before its first step."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from models.ar_prior.config import ArPriorConfig
from models.pca import PcaSums
from models.sample_random import SampleRandom
from pipeline.data.batch import Batch
from pipeline.data.vectors import read_vectors, to_unit
from pipeline.errors import ConfigError, DataError
from pipeline.networks.ar_prior import ArPriorObjective, build_ar_prior, measure_embeddings
from pipeline.sampling.edit_pictures import training_pca
from pipeline.workspace.store import Artifact
from tests.tiny.networks import CLIP, make_clip
from tests.tiny.shards import EMBED_DIM, make_embeddings, write_download, write_embed

DIMS = CLIP.dims()
SMALL = ArPriorConfig(width=16, depth=1, num_heads=2, num_buckets=16, num_dot_buckets=3)


def training_rows(embed: Artifact) -> tuple[np.ndarray, np.ndarray]:
    z_image, z_text = [], []
    for shard in embed.shard_records():
        vectors = read_vectors(embed.path(f"{shard}.parquet"))
        keep = np.array(vectors.table.column("split").to_pylist()) == "train"
        z_image.append(to_unit(vectors.z_image)[keep])
        z_text.append(to_unit(vectors.z_text)[keep])
    return np.concatenate(z_image), np.concatenate(z_text)


@pytest.fixture
def embed(tmp_path: Path) -> Artifact:
    return write_embed(tmp_path / "embed", write_download(tmp_path / "download", num_shards=3, num_rows=20))


def test_code_is_measured_on_the_training_rows_alone(embed: Artifact) -> None:
    z_image, z_text = training_rows(embed)
    expected = PCA(svd_solver="full").fit(z_image.astype(np.float64))
    network = build_ar_prior(SMALL, DIMS, embed)
    count = network.num_components
    explained = expected.explained_variance_ratio_.cumsum()
    assert explained[count - 1] >= 0.99 > explained[count - 2]
    assert network.config.num_components == count
    np.testing.assert_allclose(network.components, expected.components_[:count], atol=1e-4)
    np.testing.assert_allclose(network.component_std, expected.explained_variance_[:count] ** 0.5, rtol=1e-4)
    dot = (z_image * z_text).sum(1)
    np.testing.assert_allclose(network.dot_edges, np.quantile(dot, [1 / 3, 2 / 3]), atol=0.1)
    shares = np.bincount(np.searchsorted(network.dot_edges.numpy(), dot), minlength=3) / len(dot)
    np.testing.assert_allclose(shares, 1 / 3, atol=0.03)


def test_number_of_components_can_be_asked_for(embed: Artifact) -> None:
    network = build_ar_prior(ArPriorConfig(width=16, depth=1, num_heads=2, num_components=4), DIMS, embed)
    assert network.components.shape == (4, EMBED_DIM)
    with pytest.raises(ConfigError, match="num_components is 17, but z_image has 16 features"):
        build_ar_prior(ArPriorConfig(width=16, depth=1, num_heads=2, num_components=17), DIMS, embed)


def test_measurement_reads_whole_shards_up_to_its_limit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    z_image, z_text = rng.standard_normal((2, 60, 8)).astype(np.float32)
    embed = Artifact(str(tmp_path))
    make_embeddings(embed, z_image, z_text, 10)
    assert [measure_embeddings(embed, 8, limit)[0].num_rows for limit in (60, 100, 30, 20, 1)] == [60, 60, 30, 20, 10]


def test_a_large_part_is_measured_in_batches_as_it_is_measured_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    z_image, z_text = np.random.default_rng(0).standard_normal((2, 60, 8)).astype(np.float32)
    embed, sizes = Artifact(str(tmp_path)), list[int]()
    make_embeddings(embed, z_image, z_text, 60, held_out_every=7)
    whole, whole_dots = measure_embeddings(embed, 8, 60)
    update = PcaSums.update

    def counted(self: PcaSums, x: torch.Tensor) -> None:
        sizes.append(len(x))
        update(self, x)

    monkeypatch.setattr(PcaSums, "update", counted)
    monkeypatch.setattr("pipeline.data.vectors.BATCH_ROWS", 16)
    sums, dots = measure_embeddings(embed, 8, 60)
    edited = training_pca(embed)
    assert sizes == [13, 14, 14, 10] * 2
    assert torch.equal(dots.counts, whole_dots.counts)
    for pca in (sums.pca(), edited):
        torch.testing.assert_close(pca.variance, whole.pca().variance)
        torch.testing.assert_close(pca.components, whole.pca().components)


def test_measurement_refuses_too_few_rows(tmp_path: Path) -> None:
    embed = Artifact(str(tmp_path))
    make_embeddings(embed, np.ones((1, EMBED_DIM), np.float32), np.ones((1, EMBED_DIM), np.float32), 1)
    with pytest.raises(DataError, match="1 rows: principal components need at least two"):
        build_ar_prior(SMALL, DIMS, embed)


def test_loss_before_training_is_that_of_a_guess(embed: Artifact, tmp_path: Path) -> None:
    from pipeline.clip.files import load_clip
    from pipeline.clip.frozen import FrozenClip

    clip = FrozenClip(load_clip(make_clip(tmp_path / "clip")))
    z_image = torch.from_numpy(training_rows(embed)[0][:6])
    batch = Batch(tuple("abcdef"), ("a red circle",) * 6, z_image=z_image)
    objective = ArPriorObjective(build_ar_prior(SMALL, clip.dims, embed), clip.encode_text)
    loss = objective(batch, SampleRandom.of_samples(0, range(6)))
    assert float(loss.detach()) == pytest.approx(np.log(16), abs=1e-6)
