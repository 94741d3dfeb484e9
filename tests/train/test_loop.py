from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from models.layers.dropout import SampleDropout
from models.layers.ema import create_average
from models.sample_random import SampleRandom
from pipeline.data.batch import Batch
from pipeline.data.order import Share
from pipeline.errors import ResumeError, StepError
from pipeline.recipe.train_sections import NoisyClipStepConfig, TrainConfig, TrainPhase, TrainResources
from pipeline.train.loop import StepFunction, learning_rate, make_step, train
from pipeline.train.resume import Keep, checkpoint_name, load_newest_checkpoint, save_checkpoint
from pipeline.train.state import TrainState, create_state
from pipeline.workspace.store import Artifact

_RESOURCES = TrainResources(save_every_steps=4, log_every_steps=3)


class _Regression(nn.Module):
    """Mean squared error of a small network with dropout, on numbers made from the batch's uids."""

    def __init__(self, *, dropout: float = 0.5, noise: float = 1.0) -> None:
        super().__init__()
        hidden = [nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), SampleDropout(dropout), nn.Linear(32, 1)]
        self.network = nn.Sequential(*hidden)
        self.noise = noise

    def forward(self, batch: Batch, random: SampleRandom) -> Tensor:
        x = torch.tensor([[float(uid), float(uid) ** 2, 1.0] for uid in batch.uids]) / 10
        target = x.sum(1, keepdim=True) + self.noise * random.normal("noise", (1,))
        return ((self.network(x) - target) ** 2).mean()


def _nothing(state: TrainState) -> None:
    """Neither saves nor reports."""


def _batches(start: int) -> Iterator[Batch]:
    for step in range(start, 1000):
        uids = tuple(str((step * 4 + i) % 7) for i in range(4))
        yield Batch(uids, ("",) * 4)


def _make_step(objective: nn.Module, config: TrainConfig, max_bad_steps: int = 0) -> StepFunction:
    section = NoisyClipStepConfig(train=config, resources=TrainResources(max_bad_steps=max_bad_steps))
    return make_step(objective, section, Share(4), seed=1)


def _start(config: TrainConfig, max_bad_steps: int = 0) -> tuple[TrainState, StepFunction]:
    torch.manual_seed(0)
    objective = _Regression().train()
    step = _make_step(objective, config, max_bad_steps)
    return create_state(objective.network, config, torch.device("cpu")), step


def _run(state: TrainState, step: StepFunction, config: TrainConfig, save: Callable[[TrainState], None]) -> None:
    train(state, step, _batches(state.step), config, _RESOURCES, save, _nothing)


def _same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "float32"), ("adamw", "bfloat16"), ("muon", "float32")])
def test_resumed_training_equals_an_uninterrupted_one(
    tmp_path: Path, optimizer: Literal["adamw", "muon"], precision: Literal["float32", "bfloat16"]
) -> None:
    config = TrainConfig(
        num_steps=10,
        optimizer=optimizer,
        precision=precision,
        lr_schedule="cosine",
        warmup_steps=3,
        weight_decay=0.1,
    )
    whole, step = _start(config)
    artifact = Artifact(str(tmp_path))
    _run(whole, step, config, lambda state: save_checkpoint(state, artifact, "key", Keep(2)))
    assert [name for name in artifact.names() if "checkpoints" in name] == [checkpoint_name(4), checkpoint_name(8)]

    artifact.remove(checkpoint_name(8))
    resumed, step = _start(config)
    with torch.no_grad():
        resumed.network[0].weight.zero_()  # pyright: ignore  (what is loaded must replace it)
    assert load_newest_checkpoint(resumed, artifact, "key")
    assert resumed.step == 4
    _run(resumed, step, config, _nothing)
    assert _same(whole.network, resumed.network)
    assert _same(whole.ema, resumed.ema)


def test_load_newest_checkpoint_refuses_what_belongs_to_another_recipe(tmp_path: Path) -> None:
    config = TrainConfig(num_steps=10)
    state, _ = _start(config)
    artifact = Artifact(str(tmp_path))
    save_checkpoint(state, artifact, "key", Keep(2))
    with pytest.raises(ResumeError, match="another recipe"):
        load_newest_checkpoint(state, artifact, "other")
    with pytest.raises(ResumeError, match="does not fit the network"):
        load_newest_checkpoint(create_state(nn.Linear(2, 2), config, torch.device("cpu")), artifact, "key")


def test_checkpoint_keeps_the_memory_order_of_kernels(tmp_path: Path) -> None:
    config = TrainConfig()
    network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    state = create_state(network, config, torch.device("cpu"))
    network(torch.randn(1, 3, 8, 8)).sum().backward()
    state.optimizer.step()
    moment = state.optimizer.state[network.weight]["exp_avg"].clone()
    artifact = Artifact(str(tmp_path))
    save_checkpoint(state, artifact, "key", Keep(1))
    assert load_newest_checkpoint(state, artifact, "key")
    loaded = state.optimizer.state[network.weight]["exp_avg"]
    assert torch.equal(loaded, moment)
    assert loaded.stride() == network.weight.stride()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(optimizer: Literal["adamw", "muon"]) -> None:
    config = TrainConfig(num_steps=10, learning_rate=0.1, optimizer=optimizer)
    state, step = _start(config)
    before: dict[int, nn.Module] = {}

    def poisoned(state: TrainState, batch: Batch) -> None:
        before[state.step] = create_average(state.network)
        uids = ("nan", *batch.uids[1:]) if state.step == 5 else batch.uids
        step(state, Batch(uids, batch.captions))

    with pytest.raises(StepError, match="step 6: loss or gradient is not finite"):
        train(state, poisoned, _batches(0), config, _RESOURCES, _nothing, _nothing)
    assert _same(before[5], state.network)
    assert not _same(before[4], state.network)


def test_steps_after_a_bad_one_change_nothing_either() -> None:
    # On a GPU the loop reads the flag only at log lines: until then the steps must be idle.
    config = TrainConfig(learning_rate=0.1)
    state, step = _start(config)
    step(state, Batch(("nan", "1", "2", "3"), ("",) * 4))
    frozen = create_average(state.network)
    step(state, Batch(("1", "2", "3", "4"), ("",) * 4))
    assert int(state.bad_step) == 1
    assert _same(frozen, state.network)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bad_steps_are_skipped_and_counted_up_to_their_budget(optimizer: Literal["adamw", "muon"]) -> None:
    config = TrainConfig(num_steps=10, learning_rate=0.1, optimizer=optimizer)
    state, step = _start(config, max_bad_steps=2)
    losses: list[list[float]] = []
    changed: list[bool] = []
    moved: list[bool] = []

    def poisoned(state: TrainState, batch: Batch) -> None:
        before = create_average(state.network), create_average(state.ema)
        step(state, Batch(("nan", *batch.uids[1:]), batch.captions) if state.step in {2, 5, 7} else batch)
        changed.append(not _same(before[0], state.network))
        moved.append(not _same(before[1], state.ema))

    def explain(state: TrainState) -> str:
        return f"; {int(state.num_bad)} in all"

    with pytest.raises(
        StepError, match=r"step 8: .* after 2 that were skipped; 3 in all; no weight .*max_bad_steps = 12"
    ):
        train(
            state, poisoned, _batches(0), config, _RESOURCES,
            _nothing, lambda state: losses.append(state.loss_sum.tolist()), explain,
        )  # fmt: skip
    assert changed == [True, True, False, True, True, False, True, False]
    assert moved == changed
    assert [count for _, count in losses] == [2, 2]  # of the steps that were finite
    assert all(total > 0 for total, _ in losses)


def test_a_skipped_step_changes_no_statistics_of_batch_norms() -> None:
    torch.manual_seed(0)
    objective, config = _Regression(dropout=0.0).train(), TrainConfig(num_steps=2, learning_rate=0.1)
    objective.network.insert(1, nn.BatchNorm1d(32))
    state, step = create_state(objective.network, config, torch.device("cpu")), _make_step(objective, config, 1)
    step(state, Batch(("1", "2", "3", "4"), ("",) * 4))
    before = create_average(state.network)
    step(state, Batch(("nan", "2", "3", "4"), ("",) * 4))
    assert _same(before, state.network)
    assert all(bool(torch.isfinite(value).all()) for value in state.ema.state_dict().values())


def test_train_saves_and_reports_when_due() -> None:
    config = TrainConfig(num_steps=8)
    state, step = _start(config)
    saved: list[int] = []
    means: list[float] = []
    train(
        state, step, _batches(0), config, _RESOURCES,
        lambda state: saved.append(state.step),
        lambda state: means.append(float(state.loss_sum[1])),
    )  # fmt: skip
    assert saved == [4]  # not after the last step: the artifact follows
    assert means == [3, 3, 2]  # losses since the last log line


def test_the_average_follows_the_network() -> None:
    config = TrainConfig(num_steps=6, learning_rate=0.05, ema_decay=0.0)
    state, step = _start(config)
    _run(state, step, config, _nothing)
    assert _same(state.ema, state.network)


def test_the_tensors_of_the_average_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(num_steps=4)
    state, step = _start(config)
    expected, looked_up = create_average(state.ema), list[int]()
    state_dict = state.ema.state_dict

    def counting() -> dict[str, Tensor]:
        looked_up.append(state.step)
        return state_dict()

    def checked(state: TrainState, batch: Batch) -> None:
        step(state, batch)
        decay = min(config.ema_decay, (2 + state.step) / (11 + state.step))
        for average, weight in zip(expected.parameters(), state.network.parameters(), strict=True):
            average.lerp_(weight.detach(), 1 - decay)

    monkeypatch.setattr(state.ema, "state_dict", counting)
    _run(state, checked, config, _nothing)
    assert looked_up == [0]
    assert _same(state.ema, expected)


def test_learning_rate_rises_then_falls() -> None:
    config = TrainConfig(num_steps=110, warmup_steps=10, learning_rate=1.0, lr_schedule="cosine")
    rates = [learning_rate(config, step) for step in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert rates[-1] < 0.001
    assert learning_rate(TrainConfig(learning_rate=1.0), 900) == 1.0


def test_phases_change_settings_from_their_step_on() -> None:
    first = TrainPhase(from_step=40, grad_clip_norm=0.5, precision="bfloat16")
    second = TrainPhase(from_step=60, learning_rate=0.5, lr_schedule="cosine", warmup_steps=10, num_steps=130)
    config = TrainConfig(num_steps=100, warmup_steps=10, learning_rate=1.0, phases=(first, second))
    assert config.total_steps == 130
    assert [config.at(step).precision for step in (39, 40, 129)] == ["float32", "bfloat16", "bfloat16"]
    assert [config.at(step).grad_clip_norm for step in (39, 40, 129)] == [1.0, 0.5, 0.5]
    rates = [learning_rate(config, step) for step in range(130)]
    assert rates[9:60] == [1.0] * 51  # the first phase leaves the schedule as it is
    assert rates[60] == pytest.approx(0.05)
    assert rates[69] == rates[70] == 0.5
    assert rates[100] == pytest.approx(0.25)
    assert 0 < rates[129] < 0.001


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ((TrainPhase(from_step=101),), "from_step is 101: after 0 and at most 100"),
        ((TrainPhase(from_step=100),), "ends its warm-up at 100 of 100 steps"),
        ((TrainPhase(from_step=50), TrainPhase(from_step=50)), r"phases\[1\].from_step is 50: after 50"),
        ((TrainPhase(from_step=50, warmup_steps=60),), "ends its warm-up at 110 of 100 steps"),
    ],
)
def test_phases_that_cannot_be_are_refused(phases: tuple[TrainPhase, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainConfig(num_steps=100, phases=phases)
