"""What a worker takes of the memory that it may use, for ``micro_batch_size = "auto"``."""

import pytest

from pipeline.errors import StepError
from pipeline.recipe.train_sections import TrainResources
from pipeline.runtime import memory


@pytest.mark.parametrize(
    ("total_gb", "num_cpus", "resources", "room_gb"),
    [
        (64, 8, {}, 8 - 1.5),
        (8, 8, {}, 0.5),  # a small share: half of it, and not less than nothing
        (16, 4, {"cpus_per_worker": 4}, 16 - 1.5),
        (16, 2, {"cpus_per_worker": 4}, 16 - 1.5),  # more than there are: all of the machine, and not twice
        (8, 8, {"memory_gb_per_worker": 4}, 4 - 1.5),
    ],
)
def test_a_worker_on_cpus_has_room_on_ordinary_machines(
    total_gb: float, num_cpus: int, resources: dict[str, int], room_gb: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "memory_bytes", lambda: total_gb * 1e9)
    monkeypatch.setattr(memory, "num_cpus", lambda: num_cpus)
    assert memory._room_gb("prior", TrainResources(**resources)) == pytest.approx(room_gb)


@pytest.mark.parametrize("gb", [1.0, 1.5])
def test_a_worker_without_room_for_its_process_is_refused_before_anything_is_counted(gb: float) -> None:
    """A room of 0 would be one without a limit, in which everything fits."""
    with pytest.raises(StepError, match=rf"prior: resources.memory_gb_per_worker is {gb:g}, and a worker takes 1.5 GB"):
        memory._room_gb("prior", TrainResources(memory_gb_per_worker=gb))
