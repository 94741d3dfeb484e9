"""Functions that run in a Ray task, perhaps on another machine; that its machine is cut off is noticed in seconds.

Ray gives up a machine that does not answer within seconds, but waits for a task on it until its connection times out:
minutes. So the task says first where it runs, and whoever waits for it looks whether that machine is still there. Until
it has said so, it is submitted again as soon as any machine has gone: it may have been on its way there.

An actor's end is seen at once, as in ``pool.py``; but an actor never gets a process that has loaded torch already.
"""

import traceback
from collections.abc import Callable, Generator
from typing import Any

import ray
import ray.exceptions

from pipeline.addresses import without_secrets
from pipeline.errors import StepError, UnclipError, first_line
from pipeline.runtime.placement import living_machines
from pipeline.runtime.worker_logs import logged
from pipeline.workspace.progress import ERROR
from pipeline.workspace.store import Artifact

_LOOK_S = 5.0
_FRAME = '\n  File "'


class MachineLostError(Exception):
    """The machine of a task has gone; says how that was seen."""


class GivenUpError(Exception):
    """A task was waited for in vain."""


def call(
    function: Callable[..., Any],
    *arguments: Any,
    options: dict[str, Any],
    is_given_up: Callable[[], bool] = lambda: False,
) -> Any:
    """Run a function in a task, once, and wait for what it returns.

    Args:
        function: What to run; Ray sends it by reference.
        arguments: What it is called with.
        options: Ray's options for the task; its name is "STEP: WHAT", and names its log.
        is_given_up: Whether to wait no longer for a process that does not end; asked from time to time.

    Raises:
        GivenUpError: If ``is_given_up`` says so; the process may be there still.
        MachineLostError: If the task's machine has ended, or is cut off.
        RayTaskError: If the function raised an error, which is its ``cause``.
        RayError: If its process ended.
    """

    def submit() -> Any:
        task: Any = _located
        name = options.get("name", function.__name__)
        return task.options(num_returns="streaming", max_retries=0, **options).remote(name, function, *arguments)

    values, machine, is_missing, living = submit(), "", False, living_machines()
    while True:
        if not ray.wait([values], timeout=_LOOK_S)[0]:
            if is_given_up():
                ray.cancel(values, force=True)  # for the case that it can be ended after all
                raise GivenUpError
            if is_missing:  # seen twice: what it has sent before may still be on its way
                raise MachineLostError("it is cut off from the others")
            before, living = living, living_machines()
            if machine:
                is_missing = machine not in living
            elif not before <= living:
                ray.cancel(values, force=True)
                values = submit()
            continue
        try:
            value: Any = ray.get(next(values))
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            if isinstance(error, ray.exceptions.NodeDiedError) or (machine and machine not in living_machines()):
                raise MachineLostError(first_line(error)) from None
            raise
        if machine:
            return value
        machine = value


def call_again(function: Callable[..., Any], *arguments: Any, options: dict[str, Any], max_retries: int) -> Any:
    """As ``call``, and again after a lost process or machine.

    Raises:
        StepError: If it was lost more than ``max_retries`` times.
        Exception: What the function raised.
    """
    for losses in range(max_retries + 1):
        try:
            return call(function, *arguments, options=options)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (MachineLostError, ray.exceptions.RayError) as error:
            if losses == max_retries:
                name = options.get("name", function.__name__)
                raise StepError(f"{name}: lost its worker {losses + 1} times; last time: {first_line(error)}") from None
    raise AssertionError


def failure_of(error: ray.exceptions.RayTaskError, name: str, output: Artifact) -> UnclipError:
    """What a task has failed with, in one line for people.

    Args:
        error: What Ray says, which may be a traceback of several processes.
        name: Of the step.
        output: Receives that as a file, if nobody has foreseen the error.
    """
    cause: BaseException = error
    while isinstance(cause, ray.exceptions.RayTaskError) and isinstance(cause.cause, BaseException):
        cause = cause.cause  # of a task for which the first one waited
    if isinstance(cause, UnclipError):
        return cause
    output.write_bytes(ERROR, without_secrets("".join(traceback.format_exception(error))).encode())
    return StepError(f"{name}: {_in_one_line(cause)}; details in {output.uri}/{ERROR}")


def _in_one_line(error: BaseException) -> str:
    """The class and the first line of an error; if its words are a traceback, what this ends with."""
    if _FRAME in str(error):
        return str(error).rstrip().splitlines()[-1].strip()
    return f"{type(error).__name__}: {first_line(error)}"


@ray.remote
def _located(name: str, function: Callable[..., Any], *arguments: Any) -> Generator[Any]:
    step, _, what = name.partition(": ")
    yield ray.get_runtime_context().get_node_id()
    with logged(step, what or "work"):
        value = function(*arguments)
    yield value
