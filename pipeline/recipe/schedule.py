"""When each step of a run starts and ends, from the time that its work takes and the CPUs and GPUs that it needs.

The rules are those of `unclip run` on one machine (``pipeline.runtime.admission.fits_now``): the steps whose inputs are
done start in the order of the plan, each as soon as its CPUs and GPUs are free. A data step starts with one worker and
adds others while CPUs are free. Side by side every worker is slower, because the cores share caches, memory and, as
hyperthreads do, arithmetic units.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.machine import num_cpus
from pipeline.recipe.sections import TaskResources
from pipeline.recipe.train_sections import TrainResources

_GPUS = Path("/proc/driver/nvidia/gpus")
_LITTLE = 1e-9


@dataclass(frozen=True)
class Needs:
    """The workers of a step, and what each of them takes."""

    num_workers: int = 1
    """Workers without which the step does not begin."""
    most_workers: int = 1
    """Workers that share its work while there is room."""
    cpus: float = 0.0
    """Logical CPUs of each worker."""
    gpus: float = 0.0
    """GPUs of each worker."""


@dataclass(frozen=True)
class Load:
    """A step that is still to be done."""

    name: str
    inputs: Collection[str]
    """Steps whose artifacts it reads; those that are not scheduled are done."""
    needs: Needs
    fixed_s: float
    """Seconds that more workers do not shorten."""
    shared_s: float = 0.0
    """Seconds of one worker for the work that workers share."""


@dataclass(frozen=True)
class Machine:
    """What the workers of a run share."""

    cpus: float
    gpus: float = 0.0
    crowding: float = 1.0
    """Time of a piece of work with every CPU busy, over its time with one CPU busy; at least 1."""

    def slowdown(self, busy_cpus: float) -> float:
        """Time of a piece of work while ``busy_cpus`` CPUs are busy, over its time with one: linear in between."""
        if self.cpus <= 1:
            return 1.0
        share = (busy_cpus - 1) / (self.cpus - 1)
        return 1.0 + (self.crowding - 1.0) * min(1.0, max(0.0, share))


@dataclass(frozen=True)
class Span:
    """Start and end of a step, in seconds from now."""

    start_s: float
    end_s: float


@dataclass
class _Active:
    load: Load
    workers: int
    start_s: float
    fixed_s: float
    shared_s: float

    @property
    def left_s(self) -> float:
        return self.fixed_s + self.shared_s / self.workers

    def work(self, seconds: float) -> None:
        fixed = min(seconds, self.fixed_s)
        self.fixed_s -= fixed
        self.shared_s = max(0.0, self.shared_s - (seconds - fixed) * self.workers)


def this_machine(crowding: float = 1.0) -> Machine:
    """This machine as the run's own Ray divides it: two CPUs also where there is one, which the workers take in turns.

    Args:
        crowding: As it was measured by the time of processors, which does not pass while a worker waits for one.
    """
    num_gpus = len(list(_GPUS.iterdir())) if _GPUS.is_dir() else 0
    cpus = logical_cpus()
    return Machine(cpus, num_gpus, crowding * cpus / num_cpus())


def logical_cpus() -> int:
    """CPUs of the run's own Ray, at least two: a data step and a training must be able to run at the same time."""
    return max(2, num_cpus())


def needs_of(section: object) -> Needs:
    """The workers of the step that a section of the recipe configures; a step without ``resources`` takes no CPU."""
    resources = getattr(section, "resources", None)
    if not isinstance(resources, TaskResources | TrainResources):
        return Needs()
    fewest, most = resources.workers if isinstance(resources, TrainResources) else (1, resources.num_workers)
    return Needs(
        num_workers=fewest,
        most_workers=most,
        cpus=resources.cpus_per_worker,
        gpus=1.0 if resources.accelerator == "cuda" else 0.0,
    )


def schedule(loads: Sequence[Load], machine: Machine, running: Collection[str] = ()) -> dict[str, Span]:
    """Start and end of every step.

    Args:
        loads: The steps, in the order of the plan.
        machine: Where they run.
        running: Steps that have their workers already.

    Returns:
        Spans by step name.
    """
    waiting = sorted(loads, key=lambda load: load.name not in running)
    active: list[_Active] = []
    spans: dict[str, Span] = {}
    now = 0.0
    while waiting or active:
        _grow(active, machine)
        unfinished = {load.name for load in waiting} | {one.load.name for one in active}
        for load in [load for load in waiting if not unfinished & set(load.inputs)]:
            if not active or _fits(load.needs, load.needs.num_workers, active, machine):
                waiting.remove(load)
                active.append(_Active(load, load.needs.num_workers, now, load.fixed_s, load.shared_s))
                _grow(active[-1:], machine, active)
        slowdown = machine.slowdown(sum(one.workers * one.load.needs.cpus for one in active))
        worked = min(one.left_s for one in active)
        now += worked * slowdown
        for one in list(active):
            one.work(worked)
            if one.left_s <= _LITTLE:
                active.remove(one)
                spans[one.load.name] = Span(one.start_s, now)
    return spans


def _grow(steps: Sequence[_Active], machine: Machine, active: Sequence[_Active] | None = None) -> None:
    """Add workers to the steps that can use more."""
    everyone = steps if active is None else active
    for one in steps:
        while one.workers < one.load.needs.most_workers and _fits(one.load.needs, 1, everyone, machine):
            one.workers += 1


def _fits(needs: Needs, num_workers: int, active: Sequence[_Active], machine: Machine) -> bool:
    cpus = sum(one.workers * one.load.needs.cpus for one in active) + num_workers * needs.cpus
    gpus = sum(one.workers * one.load.needs.gpus for one in active) + num_workers * needs.gpus
    return cpus <= machine.cpus + _LITTLE and gpus <= machine.gpus + _LITTLE
