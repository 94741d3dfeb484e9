"""How workers agree on the step after which they end; on several workers in ``test_sharding.py``."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed

from pipeline.train import stop
from pipeline.train.stop import StopVote


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("lag", [0, 2])
def test_a_wish_decides_so_many_steps_later_and_stays(lag: int, group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stop._LAG_STEPS, "cpu", lag)
    wishes = ["", "", "", "its machine is taken away"]
    vote = StopVote(lambda: wishes[0], world_size=2)
    decided: list[bool] = []
    for number in range(6):
        loss = vote.add_up(torch.tensor(float(number)))
        assert float(loss) == number
        decided.append(vote.is_decided)
        if len(wishes) > 1:
            wishes.pop(0)
    assert decided == [number >= 3 + lag for number in range(6)]


def test_a_loss_that_is_not_finite_hides_no_wish_and_is_none(group: None) -> None:
    for wish in ("", "its process got SIGTERM"):
        vote = StopVote(lambda wish=wish: wish, world_size=2)
        assert vote.add_up(torch.tensor(float("nan"))).isnan()
        assert vote.is_decided == bool(wish)


def test_one_worker_decides_at_once(group: None) -> None:
    vote = StopVote(lambda: "the run was asked to end", world_size=1)
    vote.add_up(torch.tensor(1.0))
    assert vote.is_decided
    assert vote.reason() == "the run was asked to end"
