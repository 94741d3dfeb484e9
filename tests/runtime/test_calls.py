"""Tasks on a machine that goes silent, ends, or fails: what their caller is told, and when."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from pipeline.errors import DataError, StepError
from pipeline.runtime import calls
from pipeline.runtime.calls import GivenUpError, MachineLostError, call, call_again, failure_of
from pipeline.runtime.placement import controller_options, living_machines
from pipeline.workspace.progress import ERROR
from pipeline.workspace.store import Artifact
from tests.ports import free_ports
from tests.ray_head import end_with_children
from tests.tiny.command import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

_SETTINGS = {"RAY_health_check_failure_threshold": "3", "RAY_health_check_timeout_ms": "2000"}
_FAR = {"num_cpus": 1, "resources": {"far": 1}}


@pytest.fixture(scope="module")
def head(ray_head: Any) -> Generator[Any]:
    with ray_head(environment=_SETTINGS | {"PYTHONPATH": str(ROOT)}) as head, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(address=head.address, log_to_driver=False)
        yield head
        ray.shutdown()


@pytest.fixture
def far(head: Any) -> Generator[subprocess.Popen[bytes]]:
    """Another machine: processes of its own on this one."""
    with _another_machine(head) as process:
        yield process


@contextlib.contextmanager
def _another_machine(head: Any) -> Generator[subprocess.Popen[bytes]]:
    before = living_machines()
    agent, grpc, metrics = free_ports(3)
    words = [
        "start", "--block", f"--address={head.address}", "--num-cpus=2", "--resources={\"far\": 2}",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}",
        f"--metrics-export-port={metrics}", "--object-store-memory=100000000", "--disable-usage-stats",
    ]  # fmt: skip
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    settings = inherited | _SETTINGS | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [str(Path(sys.executable).with_name("ray")), *words], env=settings, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 60
        while living_machines() <= before:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        try:
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for member in _family(process):
                    member.resume()
            end_with_children(process)


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


_NO_IMPORT = """The remote function failed to import on the worker.

Traceback (most recent call last):
  File "calls.py", line 3, in <module>
ModuleNotFoundError: No module named 'pyarrow'
"""


_Fails = Callable[[Exception], None]


def _fail(error: Exception) -> None:
    raise error


def _start(function: _Fails, error: Exception) -> Any:
    task: Any = ray.remote(num_cpus=0, max_retries=0)(function)
    return task.remote(error)


def _wait_for_one_that_fails(error: Exception) -> None:
    ray.get(_start(_fail, error))


@pytest.mark.parametrize("function", [_fail, _wait_for_one_that_fails])
def test_what_a_task_has_failed_with_is_one_line_and_the_traceback_a_file(
    head: Any, tmp_path: Path, function: _Fails
) -> None:
    output = Artifact(str(tmp_path))
    for error, words in (
        (DataError("shard 3 is damaged"), "shard 3 is damaged"),
        (KeyError("uid"), "index: KeyError: 'uid'"),
        (ValueError("first line\nsecond line"), "index: ValueError: first line"),
        (RuntimeError(_NO_IMPORT), "index: ModuleNotFoundError: No module named 'pyarrow'"),
    ):
        with pytest.raises(ray.exceptions.RayTaskError) as raised:
            ray.get(_start(function, error))
        failure, is_unforeseen = failure_of(raised.value, "index", output), not isinstance(error, DataError)
        assert str(failure) == words + (f"; details in {tmp_path}/{ERROR}" if is_unforeseen else "")
        assert type(failure) is (StepError if is_unforeseen else DataError)
        assert output.exists(ERROR) == is_unforeseen
        assert not is_unforeseen or "in _fail\n" in output.path(ERROR).read_text()


def _sleeps(mark: str) -> None:
    Path(mark).touch()
    time.sleep(3600)


def _once_it_runs(mark: Path, act: Callable[[], None], *, note_time: bool = True) -> threading.Thread:
    """Act a second after the marked function has begun; the time of the act is written into the mark if wished."""

    def wait() -> None:
        while not mark.exists():
            time.sleep(0.05)
        time.sleep(1)
        if note_time:
            mark.write_text(str(time.monotonic()))
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_machine_that_goes_silent_is_missed_within_seconds(far: subprocess.Popen[bytes], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    thread = _once_it_runs(mark, lambda: [member.suspend() for member in _family(far)])
    with pytest.raises(MachineLostError, match="cut off from the others"):
        call(_sleeps, str(mark), options=_FAR)
    thread.join()
    assert time.monotonic() - float(mark.read_text()) < 60  # Ray's own time-out is minutes


def test_a_machine_that_ends_is_told_from_a_process_that_fails(far: subprocess.Popen[bytes], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    thread = _once_it_runs(mark, lambda: end_with_children(far))
    with pytest.raises(MachineLostError):
        call(_sleeps, str(mark), options=_FAR)
    thread.join()


def _sleeps_by_number(mark: str) -> None:
    Path(mark).write_text(str(os.getpid()))
    time.sleep(3600)


@pytest.mark.usefixtures("head")
def test_a_task_that_is_given_up_is_left_and_ended_if_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    monkeypatch.setattr(calls, "_LOOK_S", 0.2)
    options = {"num_cpus": 1}
    with pytest.raises(GivenUpError):
        call(
            _sleeps_by_number, str(mark), options=options, is_given_up=lambda: mark.exists() and mark.stat().st_size > 0
        )
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(mark.read_text())).wait(60)


def _says_no_place_at_first(_name: str, _function: Callable[..., Any], mark: str) -> Generator[str]:
    if not Path(mark).exists():
        Path(mark).write_text(str(os.getpid()))
        time.sleep(3600)
    yield ray.get_runtime_context().get_node_id()
    yield "second"


@pytest.mark.slow
def test_a_task_is_submitted_again_if_a_machine_goes_before_it_has_said_where_it_runs(
    head: Any, far: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_located", ray.remote(_says_no_place_at_first))
    mark = tmp_path / "mark"
    with _another_machine(head) as other:

        def silence_its_machine() -> None:
            families = [_family(process) for process in (far, other)]
            pid = int(mark.read_text())
            for member in next(family for family in families if pid in {member.pid for member in family}):
                member.suspend()

        thread = _once_it_runs(mark, silence_its_machine, note_time=False)
        assert call(_sleeps, str(mark), options=_FAR) == "second"
        thread.join()


def _dies_once(mark: str) -> str:
    if not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "second"


def _dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fails() -> None:
    raise DataError("a damaged shard")


@pytest.mark.usefixtures("head")
def test_a_lost_process_is_replaced_and_an_error_is_passed_on(tmp_path: Path) -> None:
    options = {"num_cpus": 1, "name": "index"}
    assert call_again(_dies_once, str(tmp_path / "mark"), options=options, max_retries=1) == "second"
    with pytest.raises(StepError, match=r"^index: lost its worker 2 times; last time: "):
        call_again(_dies, options=options, max_retries=1)
    with pytest.raises(DataError, match="a damaged shard"):
        call_again(_fails, options=options, max_retries=1)
    with pytest.raises(ray.exceptions.RayError):
        call(_dies, options=options)


@pytest.mark.usefixtures("far")
def test_controllers_stand_where_their_driver_is_if_machines_have_no_roles() -> None:
    where = ray.remote(lambda: ray.get_runtime_context().get_node_id())
    options = controller_options(has_roles=False)
    assert {ray.get(where.options(**options).remote()) for _ in range(4)} == {ray.get_runtime_context().get_node_id()}
