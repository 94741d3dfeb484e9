"""Packages, variables and secrets of a job, on a real cluster: in its driver and its workers, and nowhere else."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from pipeline.errors import ConfigError
from pipeline.recipe.job_sections import Extra
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.runtime.environment import pack_secrets, requirements_of, runtime_environment, secret_values
from pipeline.runtime.follow import _why_not_started, follow_job
from pipeline.runtime.jobs import list_jobs, submit_recipe
from pipeline.runtime.kuberay import ray_job
from tests.tiny.command import ROOT

_COMMAND = """
import importlib.util
import ray

take_secrets()

@ray.remote(num_cpus=0)
def look():
    word = importlib.import_module("greeting").WORD if importlib.util.find_spec("greeting") else None
    return word, os.environ["PLAIN"], os.environ["MY_PASSWORD"] == os.environ["EXPECTED"][::-1]

if __name__ == "__main__":
    ray.init(address="auto", log_to_driver=False)
    print("driver", look._function(), flush=True)
    print("worker", ray.get(look.remote()), flush=True)
"""
_VALUE = "correct-horse-battery"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an empty virtual environment, which imports this one's packages.

    Ray copies a virtual environment for each set of packages of a job: this one's gigabytes would take a minute.
    """
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    new = next(folder.glob("lib/python*/site-packages"))
    paths = [Path(path) for path in sys.path if path.endswith("site-packages")]
    (new / "0.pth").write_text("\n".join(map(str, paths)))
    for file in [file for path in paths for file in path.glob("__editable__*.pth")]:  # after 0.pth, by name
        shutil.copy(file, new)
    return str(folder / "bin/python")


@pytest.fixture(scope="module")
def head(ray_head: Any, python: str) -> Iterator[Any]:
    settings = {"RUNTIME_ENV_RETRY_TIMES": "1"}
    with ray_head(environment=settings, python=python) as head, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield head


def _wheel(folder: Path) -> Path:
    """A package that no machine has."""
    file, facts = folder / "greeting-1.0-py3-none-any.whl", "greeting-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr("greeting.py", "WORD = 'hello'\n")
        wheel.writestr(f"{facts}/METADATA", "Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n")
        wheel.writestr(f"{facts}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{facts}/RECORD", "")
    return file


def _source(folder: Path) -> Path:
    """A tree whose command looks around."""
    for package in ("models", "pipeline", "jobs"):
        (folder / "source" / package).mkdir(parents=True)
        (folder / "source" / package / "__init__.py").touch()
    file = (ROOT / "jobs/job.py").read_text()
    (folder / "source/jobs/job.py").write_text(file.partition("def main")[0] + _COMMAND)
    return folder / "source"


def _recipe(folder: Path, **job: Any) -> Recipe:
    (folder / "work").mkdir(exist_ok=True)
    return parse_recipe({"name": "env", "workspace": str(folder / "work"), "job": job})


@pytest.mark.ray
def test_variables_and_secrets_reach_every_process_of_a_job_and_no_log(
    head: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_PASSWORD", _VALUE)
    env = {"PLAIN": "variable", "EXPECTED": _VALUE[::-1]}
    recipe = _recipe(tmp_path, env=env, secrets=["MY_PASSWORD"])
    job = submit_recipe(recipe, address=head.dashboard, source=_source(tmp_path))
    pieces: list[str] = []
    assert follow_job(job.job_id, pieces.append, head.dashboard) == 0, "".join(pieces)
    assert "driver (None, 'variable', True)" in "".join(pieces)
    assert "worker (None, 'variable', True)" in "".join(pieces)
    session = head.folder / "session_latest"
    found = subprocess.run(
        ["grep", "-rl", _VALUE, f"{session.resolve()}/"], capture_output=True, text=True, check=False
    )
    [package] = {Path(line) for line in found.stdout.splitlines()}  # the job's package alone, for its user alone
    assert (package.name, package.stat().st_mode & 0o777) == ("secrets.json", 0o600)
    assert _VALUE not in json.dumps([job.to_dict() for job in list_jobs(head.dashboard)])


@pytest.mark.ray
def test_packages_of_a_recipe_reach_the_driver_and_the_workers_of_a_job(
    head: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_PASSWORD", _VALUE)
    env = {"PLAIN": "variable", "EXPECTED": _VALUE[::-1]}
    recipe = _recipe(tmp_path, pip=["--no-index", str(_wheel(tmp_path))], env=env, secrets=["MY_PASSWORD"])
    job = submit_recipe(recipe, address=head.dashboard, source=_source(tmp_path))
    pieces: list[str] = []
    assert follow_job(job.job_id, pieces.append, head.dashboard) == 0, "".join(pieces)
    assert "driver ('hello', 'variable', True)" in "".join(pieces)
    assert "worker ('hello', 'variable', True)" in "".join(pieces)


@pytest.mark.ray
def test_a_package_that_cannot_be_had_is_one_message_before_anything_starts(head: Any, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, pip=["--no-index", "no-such-package==1"])
    job = submit_recipe(recipe, address=head.dashboard, source=_source(tmp_path))
    pieces: list[str] = []
    assert follow_job(job.job_id, pieces.append, head.dashboard) == 4
    assert "".join(pieces) == (
        "error: the environment of the job could not be made, and nothing was started: No matching distribution found "
        "for no-such-package==1; see job.pip and job.extras of the recipe\n"
    )


_PIP = """runtime_env setup failed: Failed to set up runtime environment.
Traceback (most recent call last):
ray._private.runtime_env.utils.SubprocessCalledProcessError: Run cmd[9] failed with the following details.
Last 50 lines of stdout:
    Looking in links: x
    ERROR: Could not find a version that satisfies the requirement no-such-package==1 (from versions: none)
    ERROR: No matching distribution found for no-such-package==1
"""


def test_why_a_job_has_not_started_is_one_line() -> None:
    why = _why_not_started(_PIP)
    assert why.startswith("the environment of the job could not be made, and nothing was started: No matching distrib")
    assert "\n" not in why
    assert _why_not_started("Job supervisor actor died.\nmore") == "Job supervisor actor died."
    assert "Ray does not say why" in _why_not_started("")


def _normal(requirement: str) -> tuple[str, list[str], str]:
    """Name, bounds and condition of a requirement, whatever their order and quotes."""
    package, _, condition = requirement.partition(";")
    [name, bounds] = re.fullmatch(r"([\w-]+)(.*)", package.strip()).groups()
    return name, sorted(bounds.split(",")), condition.strip(" ()").replace('"', "'")


def test_extras_are_those_of_the_project_with_their_packages() -> None:
    extras: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert {*get_args(Extra), "dev"} == extras.keys()
    for name in get_args(Extra):
        assert [*map(_normal, requirements_of(name))] == [*map(_normal, extras[name])]
    assert runtime_environment(parse_recipe({"job": {"extras": ["s3"]}}).job)["pip"]["packages"] == requirements_of(
        "s3"
    )
    assert "pip" not in runtime_environment(parse_recipe({}).job)


def test_secrets_that_are_not_there_or_stand_in_the_recipe_are_refused(tmp_path: Path) -> None:
    config = parse_recipe({"job": {"secrets": ["A_TOKEN", "B"]}}).job
    with pytest.raises(ConfigError, match=r"job\.secrets: A_TOKEN: not set here"):
        secret_values(config, {"B": "1"})
    assert pack_secrets({}, tmp_path) == {}
    assert not list(tmp_path.iterdir())
    for env in ({"AWS_SECRET_ACCESS_KEY": "x"}, {"HF_TOKEN": "x"}, {"MLFLOW_TRACKING_PASSWORD": "x"}):
        with pytest.raises(ConfigError, match=r"job: env\..*put the name into job\.secrets"):
            parse_recipe({"job": {"env": env}})
    with pytest.raises(ConfigError, match="env and secrets both name B"):
        parse_recipe({"job": {"env": {"B": "1"}, "secrets": ["B"]}})


def test_a_manifest_carries_the_same_environment_with_secrets_from_kubernetes() -> None:
    job = {"extras": ["s3"], "env": {"PLAIN": "variable"}, "secrets": ["MY_PASSWORD"]}
    recipe = parse_recipe({"workspace": "s3://b/w", "job": job})
    _, manifest = yaml.safe_load_all(ray_job(recipe, "host/unclip"))
    assert yaml.safe_load(manifest["spec"]["runtimeEnvYAML"]) == runtime_environment(recipe.job)
    cluster = manifest["spec"]["rayClusterSpec"]
    value = {"name": "MY_PASSWORD", "valueFrom": {"secretKeyRef": {"name": "unclip-job", "key": "MY_PASSWORD"}}}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(value in container["env"] for container in group["template"]["spec"]["containers"])
