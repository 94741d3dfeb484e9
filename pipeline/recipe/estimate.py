"""How long the rest of a run takes: from measured or recorded times of its steps, and from the rates of running ones.

`unclip plan --time` and `unclip init` measure, and write ``recipes/<name>/times.json`` into the workspace. A step that
was not measured takes the time of its last run on the same inputs with the same settings; the seed makes no difference
to it. A time recorded on other inputs is not used: they may have more rows, or larger networks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.errors import DataError
from pipeline.recipe.plan import Step, artifact_of, make_plan
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.schedule import Load, Machine, Span, needs_of, schedule, this_machine
from pipeline.recipe.status import StepStatus
from pipeline.recipe.tables import to_dict
from pipeline.recipe.train_sections import TrainResources
from pipeline.workspace.manifest import Manifest, parse_record
from pipeline.workspace.progress import ProgressState, duration, read_progress
from pipeline.workspace.store import Artifact, Workspace

TIMES = "times.json"
_TRUSTED_SHARE = 0.1
"""Share of a step after which its own rate counts alone; before, the estimate counts too."""
_ALIVE_S = 600.0
"""A reading that is older belongs to a step that does not run."""


@dataclass(frozen=True)
class StepTime:
    """Time of a step on a machine with nothing else to do."""

    fixed_s: float
    """Seconds that more workers do not shorten."""
    shared_s: float = 0.0
    """Seconds of one worker for the work that workers share."""


@dataclass(frozen=True)
class Times:
    """Known times of steps."""

    steps: dict[str, StepTime] = field(default_factory=dict[str, StepTime])
    """By `time_keys`."""
    crowding: float = 1.0
    """See ``Machine``."""
    measured: float = 0.0
    """When, in seconds since the epoch."""


@dataclass(frozen=True)
class Remaining:
    """The rest of a run."""

    spans: dict[str, Span]
    """When each unfinished step of known time runs, from now."""
    untimed: tuple[str, ...] = ()
    """Unfinished steps of unknown time."""
    ending: tuple[str, ...] = ()
    """Steps that have counted all they count. What they still do, such as a last validation, has no rate."""

    @property
    def seconds(self) -> float:
        """Time to go, without the steps of unknown time and those that end."""
        return max((span.end_s for span in self.spans.values()), default=0.0)

    @property
    def text(self) -> str:
        """The time to go in words."""
        if self.spans:
            return f"{'at least ' if self.besides else ''}{duration(self.seconds)} to go"
        if self.untimed:
            return "unknown time to go"
        return f"{' and '.join(self._ends)} to go" if self.ending else f"{duration(self.seconds)} to go"

    @property
    def besides(self) -> str:
        """Which steps are not in that time, as the end of a sentence; empty: all are."""
        names = [*self.untimed, *self._ends]
        return f" besides {', '.join(names)}" if names else ""

    @property
    def _ends(self) -> list[str]:
        return [f"the end of {name}" for name in self.ending]

    def explain(self, recipe: str) -> str:
        """The time to go, and how steps of unknown time get one; ``recipe`` as words of a command."""
        words = f"{self.text}{self.besides if self.spans else ''}"
        return f"{words}; `unclip plan {recipe} --time` measures it" if self.untimed else words


def time_keys(recipe: Recipe) -> dict[str, str]:
    """A key for the time of each step: of its fields with `resources`, and those of its inputs, without the seed."""
    return _time_keys(recipe, make_plan(dataclasses.replace(recipe, seed=0)))


def _time_keys(recipe: Recipe, plan: Sequence[Step]) -> dict[str, str]:
    """``time_keys`` from the plan with seed 0."""
    keys: dict[str, str] = {}
    for step in plan:
        resources = to_dict(getattr(recipe, step.name)).get("resources", {})
        keys[step.name] = hashlib.sha256(json.dumps([step.key, resources], sort_keys=True).encode()).hexdigest()[:16]
    return keys


def save_times(recipe: Recipe, times: Mapping[str, StepTime], crowding: float | None) -> float:
    """Keep measured times in the recipe's workspace. Those of other steps stay as long as their settings are the same.

    Args:
        recipe: The recipe.
        times: By step name.
        crowding: See ``Machine``; None if it was not measured: then the one of before stays.

    Returns:
        The crowding that is kept.
    """
    keys, home = time_keys(recipe), _home(recipe)
    earlier = _read_times(home)
    others = {key: value for key, value in earlier.steps.items() if key in keys.values()}
    measured = {keys[name]: value for name, value in times.items()}
    record = Times(others | measured, earlier.crowding if crowding is None else crowding, time.time())
    home.write_json(TIMES, dataclasses.asdict(record))
    return record.crowding


def load_times(recipe: Recipe, steps: Sequence[Step]) -> tuple[dict[str, StepTime], Machine]:
    """The known times of a recipe's steps by name, and this machine."""
    record, plan = _read_times(_home(recipe)), make_plan(dataclasses.replace(recipe, seed=0))
    keys, times = _time_keys(recipe, plan), dict[str, StepTime]()
    for step in steps:
        if measured := record.steps.get(keys[step.name]):
            times[step.name] = measured
    unmeasured = [step.name for step in steps if step.name not in times]
    times |= _recorded_times(recipe, plan, unmeasured, record.crowding)
    return times, this_machine(record.crowding)


def remaining_from(
    recipe: Recipe, statuses: Sequence[StepStatus], times: Mapping[str, StepTime], machine: Machine
) -> Remaining:
    """The rest of a run that stands still or has not begun; an interrupted step continues where it stopped."""
    workspace = Workspace(recipe.workspace)
    todo = [status for status in statuses if status.state != "done"]
    states = _read_states(workspace, [status.step for status in todo if status.state == "partial"])
    rests = {name: _part(value, 1.0 - _share(states.get(name))) for name, value in times.items()}
    ending = {name for name, state in states.items() if _is_counted_out(name, state)}
    return remaining(recipe, [status.step for status in todo], {}, rests, machine, ending=ending)


def remaining(
    recipe: Recipe,
    steps: Sequence[Step],
    readings: Mapping[str, ProgressState],
    times: Mapping[str, StepTime],
    machine: Machine,
    *,
    ending: Collection[str] = (),
) -> Remaining:
    """The time to go of a run.

    Args:
        recipe: The recipe.
        steps: Its unfinished steps.
        readings: The progress of the running ones.
        times: The known times.
        machine: Where it runs.
        ending: Steps that have counted all they count, beside those that do by their readings.
    """
    running = {name for name, state in readings.items() if state.has_begun}
    busy = sum(needs.num_workers * needs.cpus for needs in (needs_of(getattr(recipe, name)) for name in running))
    slowdown = machine.slowdown(busy)
    pace = _pace(readings, times, slowdown)
    ends = {*ending, *(name for name, reading in readings.items() if _is_counted_out(name, reading))}
    rests: dict[str, StepTime | None] = {}
    for step in steps:
        estimate = times.get(step.name)
        paced = None if estimate is None else _part(estimate, pace)
        rests[step.name] = None if step.name in ends else _left(readings.get(step.name), paced, slowdown)
    spans = schedule(
        [_load(recipe, step, rests[step.name] or StepTime(0.0)) for step in steps], machine, running=running
    )
    return Remaining(
        {name: span for name, span in spans.items() if rests[name] is not None},
        tuple(name for name, rest in rests.items() if rest is None and name not in ends),
        tuple(name for name in rests if name in ends),
    )


def _pace(readings: Mapping[str, ProgressState], times: Mapping[str, StepTime], slowdown: float) -> float:
    """Time of the running trainings at their own rates, over their estimates: what waits is as much slower."""
    live = expected = 0.0
    for name, state in readings.items():
        share, estimate = state.done / max(state.total, 1), times.get(name)
        if estimate is not None and not estimate.shared_s and state.eta_s and _TRUSTED_SHARE <= share < 1:
            live += state.eta_s / slowdown / (1 - share)
            expected += estimate.fixed_s
    return live / expected if expected else 1.0


def status_remaining(recipe: Recipe, statuses: Sequence[StepStatus]) -> Remaining:
    """The rest of a run that may be running now, in whatever process."""
    workspace, now = Workspace(recipe.workspace), time.time()
    steps = [status.step for status in statuses if status.state != "done"]
    times, machine = load_times(recipe, steps)
    states = _read_states(workspace, steps)
    # A reading from far ahead was written before the clock went back. A step that ends writes none, however long it is.
    ending = {name for name, state in states.items() if _is_counted_out(name, state)}
    live = {name: state for name, state in states.items() if abs(now - state.updated) < _ALIVE_S}
    if live.keys() <= ending:
        return remaining_from(recipe, statuses, times, machine)
    return remaining(recipe, steps, live, times, machine, ending=ending)


def _read_states(workspace: Workspace, steps: Sequence[Step]) -> dict[str, ProgressState]:
    """The newest reading of each step that has one."""
    states = {step.name: read_progress(artifact_of(workspace, step)) for step in steps}
    return {name: state for name, state in states.items() if state is not None}


def _is_counted_out(name: str, state: ProgressState) -> bool:
    """Whether all that a step counts is done: what it still does, such as a last validation, has no rate.

    The rows of pairs are counted only about, and are then put in order.
    """
    return state.done >= state.total > 0 and name != "pairs"


def _left(state: ProgressState | None, estimate: StepTime | None, slowdown: float) -> StepTime | None:
    """What is left of a step: by its own rate as far as that can be trusted, else by the estimate."""
    if state is None or not state.has_begun:
        return estimate
    share = state.done / max(state.total, 1)
    if not state.eta_s:
        # Nothing is counted yet, and the time until then is part of the estimate.
        worked = state.wall_s / slowdown
        return (
            None if estimate is None else _part(estimate, max(0.1, 1.0 - worked / max(_alone(estimate), worked, 1e-9)))
        )
    by_rate = StepTime(state.eta_s / slowdown)
    if estimate is None:
        return by_rate
    trust = min(1.0, share / _TRUSTED_SHARE)
    rest = _part(estimate, 1.0 - share)
    return StepTime(trust * by_rate.fixed_s + (1 - trust) * rest.fixed_s, (1 - trust) * rest.shared_s)


def _load(recipe: Recipe, step: Step, rest: StepTime) -> Load:
    return Load(step.name, tuple(step.inputs), needs_of(getattr(recipe, step.name)), rest.fixed_s, rest.shared_s)


def _part(value: StepTime, share: float) -> StepTime:
    return StepTime(value.fixed_s * share, value.shared_s * share)


def _alone(value: StepTime) -> float:
    return value.fixed_s + value.shared_s


def _share(state: ProgressState | None) -> float:
    """Share of an interrupted step that is done."""
    return 0.0 if state is None else min(1.0, state.done / max(state.total, 1))


def _recorded_times(recipe: Recipe, plan: Sequence[Step], names: Sequence[str], crowding: float) -> dict[str, StepTime]:
    """Times of the newest artifacts that were made on the same inputs with the same settings and any one seed.

    Args:
        recipe: The recipe.
        plan: Its whole plan, with any seed.
        names: The steps to find times of; those that have none are absent from the result.
        crowding: Of the machine on which they ran.
    """
    if not names:
        return {}
    workspace = Workspace(recipe.workspace)
    # Not of all steps: the manifest of a download is 40 MB for 100,000 shards. The first step has every seed in use.
    manifests = {name: workspace.manifests(name)[0] for name in {plan[0].name, *names}}
    seeds = {
        recipe.seed,
        *(one.section["seed"] for some in manifests.values() for one in some if "seed" in one.section),
    }
    plans = [_with_seed(plan, seed) for seed in seeds]
    times: dict[str, StepTime] = {}
    for name in names:
        keys = {steps[name].key for steps in plans}
        manifest = next((one for one in manifests[name] if one.key in keys), None)
        if manifest is not None and (value := _recorded_time(recipe, manifest, crowding)) is not None:
            times[name] = value
    return times


def _with_seed(plan: Sequence[Step], seed: int) -> dict[str, Step]:
    """The steps of the same recipe with another seed, by name; no file is read for it."""
    steps: dict[str, Step] = {}
    for step in plan:
        section = step.section | ({"seed": seed} if "seed" in step.section else {})
        inputs = {name: steps[name].key for name in step.inputs}
        steps[step.name] = dataclasses.replace(step, section=section, inputs=inputs)
    return steps


def _recorded_time(recipe: Recipe, manifest: Manifest, crowding: float) -> StepTime | None:
    """The time of a finished step; None for a training by another number of workers than the recipe has now.

    That of a training by a changing number is taken as that of the fewest, as which it is planned.
    """
    resources = getattr(getattr(recipe, manifest.step), "resources", None)
    if not isinstance(resources, TrainResources):
        return StepTime(0.0, manifest.node_s / crowding)
    # Not node_s / wall_s: the last validation, by one process, makes that less.
    if not resources.fewest_workers <= manifest.num_workers <= resources.most_workers:
        return None
    return StepTime(manifest.node_s / resources.fewest_workers / crowding)


def _read_times(home: Artifact) -> Times:
    """The measured times; none if the file is missing, damaged or of another release: no run may stop for them."""
    with contextlib.suppress(DataError):
        times = home.find_json(TIMES)
        if times is not None:
            return parse_record(Times, times)
    return Times()


def _home(recipe: Recipe) -> Artifact:
    return Workspace(recipe.workspace).artifact("recipes", recipe.name)
