"""The schedule of a run has known answers."""

from pathlib import Path

import pytest

from pipeline.recipe import schedule as module
from pipeline.recipe.recipe import parse_recipe
from pipeline.recipe.schedule import Load, Machine, Needs, Span, needs_of, schedule, this_machine
from tests.tiny.recipe import tiny_tables

_CPU = Needs(cpus=1.0)
_TWO = Machine(cpus=2)


def _load(name: str, seconds: float, *inputs: str, needs: Needs = _CPU, shared_s: float = 0.0) -> Load:
    return Load(name, inputs, needs, seconds, shared_s)


def test_two_steps_run_side_by_side_and_the_third_waits_for_the_first_to_end() -> None:
    spans = schedule([_load("a", 10), _load("b", 4), _load("c", 3)], _TWO)
    assert spans == {"b": Span(0, 4), "c": Span(4, 7), "a": Span(0, 10)}


def test_a_step_waits_for_its_inputs_and_a_later_one_takes_the_free_cpu() -> None:
    spans = schedule([_load("first", 5), _load("second", 5, "first"), _load("other", 2)], _TWO)
    assert spans == {"first": Span(0, 5), "second": Span(5, 10), "other": Span(0, 2)}


def test_inputs_outside_the_plan_are_done() -> None:
    assert schedule([_load("a", 1, "finished")], _TWO) == {"a": Span(0, 1)}


def test_side_by_side_is_slower_by_the_crowding() -> None:
    spans = schedule([_load("a", 10), _load("b", 4)], Machine(cpus=2, crowding=1.5))
    assert spans["b"] == Span(0, 6)  # both at two thirds of their speed
    assert spans["a"] == Span(0, 6 + (10 - 4))  # alone again


@pytest.mark.parametrize(("num_cpus", "cpus", "end_s"), [(8, 8, 10 * (1 + 0.5 / 7)), (2, 2, 15), (1, 2, 30)])
def test_a_run_has_the_cpus_that_it_may_use_and_two_that_take_turns_where_that_is_one(
    num_cpus: int, cpus: int, end_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "num_cpus", lambda: num_cpus)
    machine = this_machine(crowding=1.5)
    assert machine.cpus == cpus
    spans = schedule([_load("a", 10), _load("b", 10)], machine)
    assert spans["b"].end_s == pytest.approx(end_s)


@pytest.mark.parametrize(("busy", "slowdown"), [(0, 1.0), (1, 1.0), (2.5, 1.25), (4, 1.5), (9, 1.5)])
def test_slowdown_grows_with_the_busy_cpus(busy: float, slowdown: float) -> None:
    assert Machine(cpus=4, crowding=1.5).slowdown(busy) == pytest.approx(slowdown)


def test_workers_of_a_data_step_share_its_work_but_not_its_start() -> None:
    needs = Needs(most_workers=2, cpus=1.0)
    assert schedule([_load("rows", 3, needs=needs, shared_s=10)], _TWO) == {"rows": Span(0, 3 + 5)}


def test_a_data_step_starts_with_one_worker_and_adds_the_next_when_a_cpu_is_free() -> None:
    needs = Needs(most_workers=2, cpus=1.0)
    spans = schedule([_load("train", 4), _load("rows", 0, needs=needs, shared_s=10)], _TWO)
    assert spans == {"train": Span(0, 4), "rows": Span(0, 4 + 3)}


def test_a_training_waits_until_all_its_workers_have_room() -> None:
    needs = Needs(num_workers=2, most_workers=2, cpus=1.0)
    spans = schedule([_load("a", 3), _load("both", 5, needs=needs)], _TWO)
    assert spans == {"a": Span(0, 3), "both": Span(3, 8)}


def test_one_gpu_takes_one_training_at_a_time() -> None:
    needs = Needs(cpus=1.0, gpus=1.0)
    spans = schedule([_load("a", 3, needs=needs), _load("b", 5, needs=needs)], Machine(cpus=16, gpus=1))
    assert spans == {"a": Span(0, 3), "b": Span(3, 8)}


def test_a_running_step_keeps_its_cpu_although_an_earlier_one_waits() -> None:
    one = Machine(cpus=1)
    spans = schedule([_load("earlier", 5), _load("running", 2)], one, running={"running"})
    assert spans == {"running": Span(0, 2), "earlier": Span(2, 7)}


def test_a_step_that_is_larger_than_the_machine_runs_alone() -> None:
    needs = Needs(cpus=8.0)
    assert schedule([_load("large", 5, needs=needs), _load("a", 1)], _TWO)["a"] == Span(5, 6)


def test_needs_are_those_of_the_recipe(tmp_path: Path) -> None:
    tables = tiny_tables(
        tmp_path,
        decoder={"resources": {"num_workers": 2, "cpus_per_worker": 3.0, "accelerator": "cuda"}},
        download={"resources": {"num_workers": 5, "cpus_per_worker": 0.5}},
    )
    recipe = parse_recipe(tables)
    assert needs_of(recipe.decoder) == Needs(2, 2, 3.0, 1.0)
    assert needs_of(recipe.download) == Needs(1, 5, 0.5, 0.0)
    assert needs_of(recipe.pairs) == Needs(1, 2, 1.0, 0.0)
    assert needs_of(recipe.tracking) == Needs(1, 1, 0.0, 0.0)
