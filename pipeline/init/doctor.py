"""What of this machine and its settings would stop a run, each with its mend."""

import base64
import http.client
import importlib
import importlib.metadata
import os
import platform
import resource
import shutil
import sys
import tempfile
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pipeline.addresses import without_password
from pipeline.errors import UnclipError
from pipeline.machine import free_memory_bytes, num_cpus
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.steps import STEPS
from pipeline.workspace.lock import locked
from pipeline.workspace.store import Workspace

State = Literal["ok", "warning", "problem"]

_DRIVER = Path("/proc/driver/nvidia/version")
_SHARED = Path("/dev/shm")
_LEAST_PYTHON = (3, 11)
_LEAST_DISK_GB, _LITTLE_DISK_GB = 1.0, 10.0
_LEAST_MEMORY_GB, _LITTLE_MEMORY_GB = 2.0, 8.0
_LITTLE_SHARED_GB = 2.0
_LEAST_FILES, _LITTLE_FILES = 1024, 8192
_SOCKET_BYTES = 107
"""Longest path of a Unix socket on Linux (sun_path of unix(7) without its last zero)."""
_RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
_TRACKER_S = 5.0


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    state: State
    text: str
    """What is there."""
    mend: str = ""
    """What to do about it; empty if it is well."""


def examine(recipe: Recipe | None) -> Iterator[Finding]:
    """Check everything, one after the other.

    Args:
        recipe: Whose workspace, tracker and accelerators are checked, too; None: this machine alone.
    """
    workspace = Workspace(recipe.workspace) if recipe else None
    yield check_python(sys.version_info[:2])
    yield check_torch(needs_cuda=recipe is not None and uses_cuda(recipe))
    yield check_import("open_clip", "open_clip_torch", module="pipeline.clip.library")
    takes_gpu_build = _DRIVER.exists() and platform.machine() == "x86_64"
    yield check_faiss({name for name in ("faiss-cpu", "faiss-gpu") if _version(name)}, has_driver=takes_gpu_build)
    yield check_import("ray", "ray")
    places = {tempfile.gettempdir(): "temporary files"}
    if workspace is not None and workspace.is_local:
        places[workspace.root] = "workspace"
    if cache := os.environ.get("UNCLIP_CACHE"):
        places[cache] = "cache"
    for place, name in places.items():
        yield check_disk(place, name)
    yield check_cpus(num_cpus(), os.cpu_count() or 1)
    yield check_memory(free_memory_bytes())
    yield check_shared_memory(_SHARED)
    yield check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    yield check_socket_path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    yield check_proxy(os.environ)
    if workspace is not None:
        yield check_workspace(workspace)
    if recipe is not None:
        yield check_tracker(recipe.tracking.uri)


def uses_cuda(recipe: Recipe) -> bool:
    """Whether a step of the recipe runs on a GPU."""
    sections = (getattr(recipe, row.name) for row in STEPS)
    return any(getattr(getattr(section, "resources", None), "accelerator", "") == "cuda" for section in sections)


def check_python(number: tuple[int, ...]) -> Finding:
    """Python is new enough."""
    text = ".".join(map(str, number))
    if number < _LEAST_PYTHON:
        return Finding("Python", "problem", text, "install Python 3.11 or newer, and make a new environment with it")
    return Finding("Python", "ok", text)


def check_import(name: str, package: str, *, module: str = "", mend: str = "") -> Finding:
    """A library can be loaded (through ``module``); one of a wrong build is found only so.

    Args:
        name: Of the library.
        package: What is installed.
        module: What is loaded instead of the library.
        mend: What to do about a broken one; empty: to install the package.
    """
    try:
        importlib.import_module(module or name)
    except Exception as error:  # noqa: BLE001  (a broken library raises anything)
        mend = mend or f"pip install -c constraints.txt {package}, in the environment of {sys.prefix}"
        return Finding(name, "problem", f"cannot be loaded: {type(error).__name__}: {error}", mend)
    return Finding(name, "ok", _version(package))


def check_torch(*, needs_cuda: bool) -> Finding:
    """Torch loads, and sees the GPU that the machine or the recipe says there is."""
    library = check_import("torch", "torch")
    if library.state != "ok":
        return library
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
        return Finding("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda}: {names}")
    if _DRIVER.exists():
        mend = "this torch is built for the CPU, or for another driver: install the CUDA build of the same version"
        state: State = "problem" if needs_cuda else "warning"
        return Finding("torch", state, f"{torch.__version__} does not see the GPU of this machine", mend)
    if needs_cuda:
        mend = "set the steps' resources.accelerator to cpu, or run on a machine or cluster with a GPU"
        return Finding(
            "torch", "problem", f"{torch.__version__}; this machine has no GPU, the recipe asks for one", mend
        )
    return Finding("torch", "ok", f"{torch.__version__}, on the CPU")


def check_faiss(builds: set[str], *, has_driver: bool) -> Finding:
    """Exactly one build of FAISS is installed, and the one that fits."""
    build = "gpu" if has_driver else "cpu"
    install = f"pip install -c constraints.txt -e '.[{build}]'"
    by_make = f"rm .venv/.ready-*; make setup EXTRA={build} (in an environment that make did not make: "
    anew = f"{by_make}pip uninstall -y faiss-cpu faiss-gpu; {install}, in that of {sys.prefix})"
    if not builds:
        return Finding("faiss", "problem", "not installed", f"{by_make}{install}, in that of {sys.prefix})")
    if len(builds) > 1:
        return Finding("faiss", "problem", "both builds are installed over each other", anew)
    [build] = builds
    library = check_import("faiss", build, mend=anew)
    if library.state == "ok" and has_driver and build == "faiss-cpu":
        mend = f"indexes are built on the CPU; for the GPU: {anew}"
        return Finding("faiss", "warning", f"{build} {_version(build)} beside a GPU", mend)
    return replace(library, text=f"{build} {library.text}")


def check_disk(place: str, name: str) -> Finding:
    """There is room where files are written, and they may be written there."""
    folder = next(path for path in (Path(place).absolute(), *Path(place).absolute().parents) if path.exists())
    if not os.access(folder, os.W_OK):
        return Finding(f"disk ({name})", "problem", f"{folder} cannot be written", f"chown it, or name another {name}")
    free_gb = shutil.disk_usage(folder).free / 1e9
    mend = f"free some space on the disk of {folder}, or put the {name} elsewhere"
    return _graded(
        f"disk ({name})", free_gb, _LEAST_DISK_GB, _LITTLE_DISK_GB, f"{free_gb:.1f} GB free at {folder}", mend
    )


def check_cpus(num_usable: int, num_there: int) -> Finding:
    """A run may keep some of the machine's CPUs busy."""
    if num_usable < num_there:
        return Finding("CPUs", "ok", f"{num_usable} of the machine's {num_there}: the container or job has no more")
    return Finding("CPUs", "ok", f"{num_usable}")


def check_memory(num_bytes: float) -> Finding:
    """There is memory for a training beside Ray."""
    mend = "end other programs, or raise the container's limit; Ray alone takes about 1 GB"
    text = f"{num_bytes / 1e9:.1f} GB available"
    return _graded("memory", num_bytes / 1e9, _LEAST_MEMORY_GB, _LITTLE_MEMORY_GB, text, mend)


def check_shared_memory(place: Path) -> Finding:
    """Ray's object store fits into shared memory; else it is on a disk, and slow."""
    mend = "docker run --shm-size=8g (in Kubernetes: an emptyDir with medium Memory at /dev/shm)"
    if not place.is_dir():
        return Finding("/dev/shm", "warning", "there is none: Ray's objects lie on a disk", mend)
    free_gb = shutil.disk_usage(place).free / 1e9
    return _graded("/dev/shm", free_gb, 0.0, _LITTLE_SHARED_GB, f"{free_gb:.1f} GB free", mend)


def check_open_files(limit: int) -> Finding:
    """Ray and a download may open enough files and sockets; they raise the soft limit themselves."""
    if limit == resource.RLIM_INFINITY:
        return Finding("open files", "ok", "no limit")
    mend = "raise the hard limit: ulimit -Hn 65536, or nofile in /etc/security/limits.conf; docker run --ulimit"
    return _graded("open files", limit, _LEAST_FILES, _LITTLE_FILES, f"at most {limit}", mend)


def check_socket_path(folder: str) -> Finding:
    """Ray's sockets have paths that Linux takes."""
    spare = _SOCKET_BYTES - len(os.fsencode(folder + _RAY_SOCKET))
    if spare < 0:
        mend = f"set TMPDIR (or RAY_TMPDIR) to a path shorter by {-spare} bytes, such as /tmp"
        return Finding("TMPDIR", "problem", f"{folder} is too long for Ray's sockets", mend)
    return Finding("TMPDIR", "ok", folder)


def check_proxy(environment: Mapping[str, str]) -> Finding:
    """A proxy is not asked for this machine's own servers."""
    settings = {name.lower(): value for name, value in environment.items() if value}
    proxies = [
        without_password(settings[name]) for name in ("http_proxy", "https_proxy", "all_proxy") if name in settings
    ]
    if not proxies:
        return Finding("proxy", "ok", "none")
    direct = {name.strip() for name in settings.get("no_proxy", "").split(",")}
    missing = [] if "*" in direct else [name for name in ("127.0.0.1", "localhost") if name not in direct]
    if missing:
        mend = "Ray's processes find one another through it, and fail: export no_proxy=127.0.0.1,localhost,$no_proxy"
        return Finding("proxy", "problem", f"{proxies[0]}, also for {' and '.join(missing)}", mend)
    return Finding("proxy", "ok", f"{proxies[0]}, not for this machine")


def check_workspace(workspace: Workspace) -> Finding:
    """A file can be written to the workspace, read, locked, and removed."""
    probe, name = workspace.artifact("doctor", uuid.uuid4().hex), "probe"
    try:
        workspace.check()
        probe.write_bytes(name, b"unclip")
        is_same = probe.path(name).read_bytes() == b"unclip"
        try:
            if workspace.is_local:
                with locked(f"{probe.uri}/lock", "", lambda _: None):
                    pass
        finally:
            probe.destroy()
    except UnclipError as error:
        return Finding("workspace", "problem", f"{workspace.root}: {error}", "see the message")
    except OSError as error:
        return Finding("workspace", "problem", f"{workspace.root}: {error}", "name another workspace")
    finally:
        if workspace.is_local:
            _remove_if_empty(Path(workspace.root) / "doctor")
    if not is_same:
        return Finding("workspace", "problem", f"{workspace.root}: other bytes come back", "use another disk or store")
    return Finding("workspace", "ok", f"{workspace.root}: written, read, locked and removed")


def check_tracker(uri: str) -> Finding:
    """The tracking server answers."""
    shown = without_password(uri)
    if not uri.startswith(("http://", "https://")):
        return Finding("tracker", "ok", shown or "a database beside the artifacts")
    try:
        address = urllib.parse.urlsplit(uri)
        port = address.port or 5000
    except ValueError:  # its words may hold a part of the password
        mend = 'set tracking.uri to an address like "http://host:5000"'
        return Finding("tracker", "problem", f"{shown}: host and port cannot be read", mend)
    user, _, server = address.netloc.rpartition("@")
    request = urllib.request.Request(
        address._replace(netloc=server, path=f"{address.path.rstrip('/')}/health").geturl()
    )
    if user:
        name_and_password = urllib.parse.unquote(user).encode()
        request.add_header("Authorization", f"Basic {base64.b64encode(name_and_password).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=_TRACKER_S):
            return Finding("tracker", "ok", shown)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        mend = f"start it (mlflow server --port {port}), or set tracking.uri"
        return Finding("tracker", "problem", f"{shown}: {reason}", mend)


def _graded(name: str, value: float, least: float, little: float, text: str, mend: str) -> Finding:
    if value < least:
        return Finding(name, "problem", text, mend)
    return Finding(name, "warning", text, mend) if value < little else Finding(name, "ok", text)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()
