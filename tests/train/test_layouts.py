"""The same training by 1, 2, 3 and 4 workers, with the batch in parts of 1, 2 and 5: equal up to rounding.

A batch of 7 divides among none of them. Each process takes part in every number of workers that has its rank.
"""

import multiprocessing
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.diffusion.config import DiffusionConfig
from models.layers.dropout import SampleDropout
from models.sample_random import SampleRandom
from pipeline.data.batch import Batch
from pipeline.data.order import Share
from pipeline.networks.clip import bigrams_of_all
from pipeline.networks.contrast import ContrastiveObjective, Pairs
from pipeline.networks.diffusion_loss import DiffusionLoss, draws_of
from pipeline.recipe.train_sections import NoisyClipStepConfig, TrainConfig, TrainResources
from pipeline.train.loop import make_step
from pipeline.train.state import create_state

BATCH = 7
WORKERS = (1, 2, 3, 4)
PARTS = (0, 1, 2, 5)
CONFIG = TrainConfig(num_steps=3, batch_size=BATCH, learning_rate=0.01, eps=1e-2)
WORDS = ("red", "blue", "star", "on", "a", "field", "of")


class _Diffusion(nn.Module):
    """A diffusion loss with dropout, dropped conditions and loss-aware timesteps."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), SampleDropout(0.3), nn.Linear(16, 4))
        self._loss = DiffusionLoss(DiffusionConfig(num_timesteps=2, timestep_draws="loss_aware"))

    def forward(self, batch: Batch, random: SampleRandom) -> Tensor:
        x0 = batch.require_z_image() * random.keep("image", 0.3, torch.device("cpu"))[:, None]
        return self._loss(lambda x, t: self.network(x) + t[:, None], x0, random)


class _Contrast(ContrastiveObjective):
    """A contrastive loss with hard negatives, which depend on the words of the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.ModuleDict({"image": nn.Linear(4, 8), "text": nn.Linear(1, 8), "drop": SampleDropout(0.3)})
        self.network.register_parameter("scale", nn.Parameter(torch.tensor(3.0)))

    def prepare(self, batch: Batch, random: SampleRandom) -> Batch:
        num_words = len(bigrams_of_all(batch.captions))
        return replace(batch, negatives=tuple(str(num_words + seed % 5) for seed in random.seeds("negatives").tolist()))

    def encode(self, batch: Batch, random: SampleRandom) -> Pairs:
        assert batch.negatives is not None
        words, negatives = ([[len(text) / 9] for text in texts] for texts in (batch.captions, batch.negatives))
        image = self.network["drop"](self.network["image"](batch.require_z_image()))
        noisy = image + 0.1 * random.normal_like("noise", image)
        text, negative = (self.network["text"](torch.tensor(numbers)) for numbers in (words, negatives))
        return Pairs(noisy, text, self.network.scale, negative)


OBJECTIVES = {"diffusion": _Diffusion, "contrast": _Contrast}


def _batch(step: int, share: Share) -> Batch:
    whole = Batch(
        tuple(f"{step}/{place}" for place in range(BATCH)),
        tuple(" ".join(WORDS[: 1 + (place + step) % 7]) for place in range(BATCH)),
        z_image=torch.randn(BATCH, 4, generator=torch.Generator().manual_seed(step)),
    )
    return whole.rows(slice(share.start, share.stop))


def _train(kind: str, share: Share, part: int) -> dict[str, Any]:
    """Three steps: losses, weights, and the losses that the timesteps remember."""
    torch.manual_seed(0)
    objective = OBJECTIVES[kind]().train()
    state = create_state(objective.network, CONFIG, torch.device("cpu"))
    wrapped = objective if share.world_size == 1 else DistributedDataParallel(objective, gradient_as_bucket_view=True)
    section = NoisyClipStepConfig(train=CONFIG, resources=TrainResources(micro_batch_size=part))
    step = make_step(wrapped, section, share, seed=1)
    losses: list[float] = []
    for number in range(CONFIG.num_steps):
        before = float(state.loss_sum[0])
        step(state, _batch(number, share))
        losses.append(float(state.loss_sum[0]) - before)
        state.step += 1
    draws = draws_of(objective)
    memory = {} if draws is None else draws.state_dict()
    return {"losses": torch.tensor(losses)} | state.network.state_dict() | memory


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    results: dict[tuple[str, int, int], dict[str, Any]] = {}
    for world_size in WORKERS[rank:]:
        if world_size > 1:
            store = f"file://{folder}/store{world_size}"
            torch.distributed.init_process_group("gloo", store, rank=rank, world_size=world_size)
        for kind in OBJECTIVES:
            for part in PARTS:
                results[kind, world_size, part] = _train(kind, Share(BATCH, rank, world_size), part)
        if world_size > 1:
            torch.distributed.destroy_process_group()
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, int, int], dict[str, Any]]]:
    """Of each rank: what every number of workers and size of parts came to."""
    folder = tmp_path_factory.mktemp("workers")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once for all workers
    workers = [context.Process(target=_work, args=(rank, str(folder))) for rank in range(max(WORKERS))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * len(workers)
    return [torch.load(folder / f"{rank}.pt") for rank in range(max(WORKERS))]


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_training_is_the_same_whatever_its_workers_and_parts(
    trained: list[dict[tuple[str, int, int], dict[str, Any]]], kind: str
) -> None:
    expected = trained[0][kind, 1, 0]
    assert expected["losses"].isfinite().all()
    for world_size in WORKERS:
        for part in PARTS:
            for rank in range(world_size):
                actual = trained[rank][kind, world_size, part]
                assert actual.keys() == expected.keys()
                for name, value in expected.items():
                    torch.testing.assert_close(
                        actual[name], value, rtol=1e-4, atol=1e-5, msg=f"{world_size} {part} {name}"
                    )
