"""A look at the machines of a cluster: whether each on which a step may run has packages and workspace of the run.

All are looked at before the first step begins, and the run is refused if one is unfit. Those that come later are looked
at when they come: a run that works on others goes on, and says which one is unfit. Its trainings read which they are,
and leave them out.
"""

import contextlib
import platform
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import ConfigError, UnclipError
from pipeline.recipe.plan import Step
from pipeline.recipe.recipe import Recipe
from pipeline.runtime.lost_workers import last_line
from pipeline.runtime.packages import complaint
from pipeline.runtime.placement import amounts_of, cluster_has_roles, living_machines, machine_has, worker_options
from pipeline.workspace.store import Workspace

SEEN = "machines.json"
"""A number of the run that goes on, in ``recipes/<name>``, which every machine must see."""
VERDICTS = "verdicts.json"
"""Beside it, of a run on a cluster: what is wrong with each machine that has answered, by Ray's id; empty: nothing."""
_EVERY_S = 5.0
_SHOWS_WITHIN_S = 25.0  # a shared folder may show new files late; shorter than the longest look
_LONGEST_LOOK_S = 30.0
"""A machine that has not answered by then is judged when it does."""


class Machines:
    """The machines of the connected cluster that have been looked at, from the start on.

    Args:
        recipe: The recipe of the run.
        steps: Its steps that are not done; none: no machine is looked at.
        warn: Receives what is wrong with a machine that comes later.

    Raises:
        ConfigError: If one of them lacks packages, or does not see the workspace; names all such machines.
    """

    def __init__(self, recipe: Recipe, steps: Sequence[Step], warn: Callable[[str], None]) -> None:
        has_roles = bool(steps) and cluster_has_roles()
        sections = {step.name: getattr(recipe, step.name) for step in steps}
        self._workers = [
            worker_options(name, section.resources, has_roles=has_roles)
            for name, section in sections.items()
            if hasattr(section, "resources")
        ]
        self._workspace = Workspace(recipe.workspace)
        self._home = self._workspace.artifact("recipes", recipe.name)
        self._home.remove(VERDICTS)  # of another run, which may have had other machines
        self._file, self._number = "", uuid.uuid4().hex
        """What every machine must see if the workspace is a folder: of this run, for one whose own disk has a folder of
        this name may have run the same recipe."""
        if self._workers and self._workspace.is_local:
            self._home.write_json(SEEN, {"run": self._number})
            self._file = f"{self._home.uri}/{SEEN}"
        self._asked: dict[str, Any] = {}
        """What each machine's task will return, by the machine; None once it has answered or gone."""
        self._verdicts: dict[str, str] = {}
        """What is wrong with each machine that has answered; empty: nothing."""
        self._has_fit = False
        self._looked_at = float("-inf")
        if unfit := self._find_unfit(_LONGEST_LOOK_S):
            raise ConfigError(unfit)
        self._warn = warn

    def look(self, *, wait_s: float = 0.0) -> None:
        """Ask the machines that have not been asked, and read the answers that are there.

        Args:
            wait_s: Longest time to wait for answers; 0: none, and not more often than every few seconds.

        Raises:
            ConfigError: If a machine is unfit, and none has been fit so far: then no step has begun to work.
        """
        if not wait_s and time.monotonic() - self._looked_at < _EVERY_S:
            return
        if unfit := self._find_unfit(wait_s):
            if not self._has_fit:
                raise ConfigError(unfit)
            self._warn(f"a machine has come on which steps fail, take it out of the cluster: {unfit}")

    def explain(self, error: UnclipError) -> UnclipError:
        """The failure of a step, with the unfit machines that are there, which may be why; looks first.

        Raises:
            ConfigError: As ``look``.
        """
        self.look(wait_s=_LONGEST_LOOK_S)
        there = living_machines() if any(self._verdicts.values()) else set[str]()
        unfit = "; ".join(sorted({words for machine, words in self._verdicts.items() if words and machine in there}))
        return type(error)(f"{error}; perhaps it ran on an unfit machine: {unfit}") if unfit else error

    def _find_unfit(self, wait_s: float) -> str:
        """What is wrong with the machines of which that is known since now; empty if nothing."""
        if not self._workers:
            return ""
        self._looked_at = time.monotonic()
        nodes = ray.nodes()
        hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in nodes}
        for node in nodes:
            if node["NodeID"] not in self._asked and self._may_work(node):
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                look = _look.options(scheduling_strategy=there)
                self._asked[node["NodeID"]] = look.remote(self._file, self._number, _SHOWS_WITHIN_S)
        waiting = {task: machine for machine, task in self._asked.items() if task is not None}
        answered, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=wait_s) if waiting else ([], [])
        complaints, elsewhere = list[str](), list[str]()
        for task in answered:
            machine = waiting[task]
            self._asked[machine] = None
            try:
                lack, name = ray.get(task)
            except ray.exceptions.RayTaskError as error:  # it cannot even import the question
                lack, name = f"{hosts.get(machine, machine)}: {last_line(error)}", ""
            except ray.exceptions.RayError:  # the machine has gone, or gives up its task: its work will tell
                self._verdicts[machine] = ""
                continue
            complaints += filter(None, [lack])
            elsewhere += filter(None, [name])
            self._verdicts[machine] = lack or (f"{name} does not see the workspace" if name else "")
            self._has_fit = self._has_fit or not self._verdicts[machine]
        if answered:
            self._home.write_json(VERDICTS, self._verdicts)
        unfit = list[str]()
        if complaints:
            unfit.append(
                f"{'; '.join(sorted(complaints))}: no step can run there; start the cluster's machines from an "
                "environment with unclip's dependencies, as the setup_commands of cluster.yaml and the Dockerfile do"
            )
        if elsewhere:
            unfit.append(
                f"{', '.join(sorted(elsewhere))}: {self._workspace.root} is another folder there than here, and every "
                'machine must share the workspace: name a bucket (workspace = "s3://BUCKET/PREFIX"), or a folder of a '
                "shared file system"
            )
        return "; ".join(unfit)

    def _may_work(self, node: dict[str, Any]) -> bool:
        return node["Alive"] and any(machine_has(node, amounts_of(worker), worker) for worker in self._workers)


def machine_verdicts(recipe: Recipe) -> dict[str, str] | None:
    """What the run that goes on knows to be wrong with each machine of its cluster, by Ray's id; empty: nothing.

    Returns:
        None if it looks at none: on a Ray of its own.
    """
    return Workspace(recipe.workspace).artifact("recipes", recipe.name).find_json(VERDICTS)


@ray.remote(num_cpus=0, max_retries=0)
def _look(file: str, number: str, wait_s: float) -> tuple[str, str]:
    """What this machine's packages lack, and its name if a file of the workspace lacks a number; each may be empty."""
    deadline = time.monotonic() + wait_s
    while file and not _has(file, number):
        if time.monotonic() > deadline:
            return complaint(), platform.node()
        time.sleep(0.5)
    return complaint(), ""


def _has(file: str, number: str) -> bool:
    with contextlib.suppress(OSError):
        return number in Path(file).read_text(encoding="utf-8")
    return False
