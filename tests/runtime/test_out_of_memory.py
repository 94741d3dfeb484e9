"""What memory did not suffice for, and what half of that is; which settings the part of a batch is counted for."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.recipe.train_sections import TrainResources
from pipeline.runtime import memory
from pipeline.runtime.restarts import Restarts, out_of_memory
from tests.tiny.recipe import tiny_tables
from tests.tiny.training import upsampler_context


def _recipe(workspace: Path, batch_size: int, **resources: Any) -> Recipe:
    upsampler = {"train": {"num_steps": 6, "batch_size": batch_size}, "resources": resources}
    return parse_recipe(tiny_tables(workspace, upsampler_1=upsampler))


@pytest.mark.parametrize(
    ("batch_size", "num_workers", "part", "largest_pass"),
    [(64, 1, 63, 32), (64, 2, 31, 16), (64, 1, 0, 64), (64, 1, 100, 64), (7, 2, 3, 2), (10, 1, 4, 4), (64, 1, 1, 1)],
)
def test_an_end_for_lack_of_memory_says_how_many_samples_ran_at_a_time(
    batch_size: int, num_workers: int, part: int, largest_pass: int, tmp_path: Path
) -> None:
    """A share is divided evenly: of 64 samples in parts of at most 63 there are 32 in each."""
    context = upsampler_context(_recipe(tmp_path, batch_size, micro_batch_size=part, num_workers=num_workers))
    end = out_of_memory(context.recipe.trained()["upsampler_1"], num_workers, "CUDA out of memory")
    assert end.largest_pass == largest_pass
    assert end.cause == f"out of memory with {largest_pass} samples at a time (CUDA out of memory)"


def test_half_of_a_part_is_smaller_than_what_ran(tmp_path: Path) -> None:
    context = upsampler_context(_recipe(tmp_path, 64, micro_batch_size=63))
    restarts, sizes = Restarts(context), list[int]()
    for _ in range(3):
        context = restarts.next(out_of_memory(context.recipe.trained()["upsampler_1"], 1, "no memory"))
        sizes.append(context.recipe.trained()["upsampler_1"].resources.samples_a_pass)
    assert sizes == [16, 8, 4]


_MEMORY: dict[str, Any] = {
    "num_workers": 2,
    "num_shards": 0,
    "cpus_per_worker": 2.0,
    "accelerator": "cuda",
    "gpu_memory_gb": 40.0,
    "validation": "beside",
    "label_selector": {"zone": "b"},
    "memory_gb_per_worker": 8.0,
    "disk_gb_per_worker": 1.0,
    "checkpointing": True,
    "compiled": True,
}
"""Another value of each field that says how much memory there is, or is taken."""
_OTHERS: dict[str, Any] = {
    "save_every_steps": 7,
    "log_every_steps": 7,
    "num_checkpoints": 7,
    "keep_best": "val_loss",
    "validation_cpus": 7.0,
    "validation_gpus": 1.0,
    "keep_state": True,
    "max_bad_steps": 7,
    "max_failures": 7,
    "max_preemptions": 7,
    "max_out_of_memory": 7,
    "resize_every_s": 7.0,
    "max_wait_s": 7.0,
    "hang_timeout_s": 7,
}


def test_every_field_is_known_to_decide_about_the_memory_or_not_to() -> None:
    fields = {field.name for field in dataclasses.fields(TrainResources)} - {"micro_batch_size"}
    assert fields == _MEMORY.keys() | _OTHERS.keys()


@pytest.mark.parametrize(("field", "value"), [*_MEMORY.items(), *_OTHERS.items()])
def test_a_part_that_was_learnt_is_forgotten_where_memory_changes_and_not_else(
    field: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[str] = []

    def count(_function: Any, name: str, *_: Any, **__: Any) -> dict[str, Any]:
        counts.append(name)
        return {"samples": 8, "words": "counted"}

    monkeypatch.setattr(memory, "call_again", count)
    monkeypatch.setattr(memory, "cluster_has_roles", lambda: False)
    context = memory.with_counted_part(upsampler_context(_recipe(tmp_path, 8, micro_batch_size="auto")))
    assert counts == ["upsampler_1"]
    halved = Restarts(context).next(out_of_memory(context.recipe.trained()["upsampler_1"], 1, "no memory"))
    memory.keep_halved_part(halved, 8)
    other = memory.with_counted_part(upsampler_context(_recipe(tmp_path, 8, micro_batch_size="auto", **{field: value})))
    is_anew = field in _MEMORY
    assert other.recipe.trained()["upsampler_1"].resources.micro_batch_size == (8 if is_anew else 4)
    assert len(counts) == 1 + is_anew


def test_a_part_that_an_earlier_release_kept_with_all_resources_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = upsampler_context(_recipe(tmp_path, 8, micro_batch_size="auto", num_workers=(1, 2)))
    of = dataclasses.asdict(context.recipe.trained()["upsampler_1"].resources)
    context.output.write_json(memory._PART, {"samples": 2, "words": "halved", "of": of | {"log_every_steps": 9}})
    monkeypatch.setattr(memory, "call_again", lambda *_, **__: pytest.fail("it counts again"))
    counted = memory.with_counted_part(context)
    assert counted.recipe.trained()["upsampler_1"].resources.micro_batch_size == 2
