"""Samples that are not finite are found where workers divide the network, so that all must run it together."""

import multiprocessing

import pytest
import torch
import torch.distributed
from torch import Tensor, nn

from models.sample_random import SampleRandom
from pipeline.data.batch import Batch
from pipeline.data.order import Share
from pipeline.recipe.train_sections import TrainConfig, TrainResources
from pipeline.train.accumulation import Place
from pipeline.train.diagnosis import Culprits, find_culprits_together, of_all_workers
from pipeline.train.sharding import create_mesh, shard

NUM_WORKERS = 3
CPU = torch.device("cpu")
CASES = {
    "finite": ["good"] * 7,
    "gradient": ["good", "good", "steep", "good", "good", "good", "good"],
    "loss": ["good", "good", "good", "good", "good", "good", "nan"],
    "both in a row": ["nan", "good", "good", "good", "steep", "good", "good"],
    "all": ["steep"] * 18,
}
"""What the samples of a global batch are; the last worker has the most."""

Found = list[dict[str, tuple[Culprits, Culprits]]]
"""Of each worker: what it found itself and what all have found, by case."""


class _Steep(nn.Module):
    """The loss of "steep" samples is finite and its gradient is not; of "nan" ones neither is."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))

    def forward(self, batch: Batch, random: SampleRandom) -> Tensor:
        x = torch.tensor([[torch.nan if uid.startswith("nan") else 1.0, 1.0] for uid in batch.uids])
        factor = torch.tensor([[0.0 if uid.startswith("steep") else 1.0] for uid in batch.uids])
        return (factor * (self.network(x) + random.uniform("shift", 1))).abs().sqrt().mean()


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=NUM_WORKERS)
    mesh = create_mesh(TrainResources(num_workers=NUM_WORKERS, num_shards=0), CPU, NUM_WORKERS)
    assert mesh is not None
    objective = _Steep().train()
    shard(objective, objective.network, list(objective.network), mesh, TrainConfig(), CPU)
    results = dict[str, tuple[Culprits, Culprits]]()
    for name, words in CASES.items():
        share = Share(len(words), rank, NUM_WORKERS)
        uids = tuple(f"{word}{place}" for place, word in enumerate(words))
        batch = Batch(uids, ("",) * len(uids)).rows(slice(share.start, share.stop))
        random = SampleRandom.of_samples(1, range(share.start, share.stop))
        own = find_culprits_together(objective, batch, random, Place(CPU, "float32"), share)
        results[name] = own, of_all_workers(own)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def culprits(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("culprits")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    workers = [context.Process(target=_work, args=(rank, str(folder)), daemon=True) for rank in range(NUM_WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * NUM_WORKERS
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(NUM_WORKERS)]


@pytest.mark.parametrize("case", ["finite", "gradient", "loss", "both in a row"])
def test_a_divided_training_blames_those_samples_alone_that_are_not_finite(culprits: Found, case: str) -> None:
    bad = [f"{word}{place}" for place, word in enumerate(CASES[case]) if word != "good"]
    for rank, results in enumerate(culprits):
        share = Share(len(CASES[case]), rank, NUM_WORKERS)
        own, of_all = results[case]
        assert own.uids == [uid for uid in bad if share.start <= int(uid[-1]) < share.stop]
        assert of_all.uids == bad


def test_parameters_are_named_whose_rows_other_workers_have(culprits: Found) -> None:
    names = {"network.0.weight", "network.0.bias", "network.1.weight", "network.1.bias"}  # the last has one row
    for case in ("gradient", "loss"):
        assert set(culprits[0][case][1].parameters) == names


def test_of_very_many_samples_that_are_not_finite_eight_are_named(culprits: Found) -> None:
    assert len(culprits[0]["all"][1].uids) == 8
