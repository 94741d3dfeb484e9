"""The files of deploy/, and the Dockerfile, against the schemas and checkers of what reads them."""

import copy
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from pipeline.errors import ConfigError
from pipeline.recipe.recipe import parse_recipe
from pipeline.runtime.kuberay import CLUSTER_FILE, PART, ray_service
from pipeline.runtime.parts import networks_options, parts_of
from pipeline.runtime.placement import ROLE
from pipeline.runtime.serve_file import PROXY_ENVIRONMENT, application
from tests.tiny.command import ROOT, unclip_here

_SCHEMAS: dict[str, Any] = json.loads((Path(__file__).parent / "kuberay.json").read_text())
_ROLES = {"download", "embed", "train", "serve"}


def _validate(resource: dict[str, Any]) -> None:
    schema = {"$ref": f"#/$defs/{resource['kind']}", **_SCHEMAS}
    jsonschema.Draft202012Validator(schema).validate(resource)


def _load(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy" / name).read_text())


@pytest.mark.parametrize("name", ["raycluster", "rayjob", "rayservice"])
def test_kuberay_takes_the_manifests(name: str) -> None:
    resource = _load(f"kuberay/{name}.yaml")
    assert resource["kind"].lower() == name
    _validate(resource)
    # What the operator refuses beside the schema: a job on a cluster that stays is not begun again.
    assert not {"clusterSelector", "backoffLimit"} <= resource["spec"].keys()


def test_the_schema_would_notice_a_misspelt_or_a_missing_field() -> None:
    resource = _load("kuberay/raycluster.yaml")
    for change in (
        lambda spec: spec.update(headGroupSpecs=spec.pop("headGroupSpec")),
        lambda spec: spec["authOptions"].update(mode="tokens"),
        lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].pop("name"),
        lambda spec: spec["workerGroupSpecs"][0].update(maxReplicas="8"),
    ):
        broken = copy.deepcopy(resource)
        change(broken["spec"])
        with pytest.raises(jsonschema.ValidationError):
            _validate(broken)


def test_every_cluster_on_kubernetes_asks_for_the_token_and_has_groups_by_role() -> None:
    cluster = _load("kuberay/raycluster.yaml")["spec"]
    assert {group["groupName"]: group["labels"] for group in cluster["workerGroupSpecs"]} == {
        role: {ROLE: role} for role in _ROLES
    }
    for spec in (cluster, _load("kuberay/rayservice.yaml")["spec"]["rayClusterConfig"]):
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert spec["headGroupSpec"]["labels"] == {ROLE: "head"}
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            [container] = pod["containers"]
            mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert {"/local", "/dev/shm"} <= mounted
            assert {mount["name"] for mount in container["volumeMounts"]} == {
                volume["name"] for volume in pod["volumes"]
            }


def test_ray_serve_takes_the_services_file() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(_load("kuberay/rayservice.yaml")["spec"]["serveConfigV2"]))
    assert config.applications[0].import_path == "pipeline.runtime.serve_file:application"
    deployments = config.applications[0].deployments
    bound = application(config.applications[0].args)._bound_deployment
    assert [one.name for one in deployments] == [bound.name, *bound.init_kwargs]
    cluster = _load("kuberay/rayservice.yaml")["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        assert {one["name"]: one["value"] for one in container["env"]} == PROXY_ENVIRONMENT


def test_serve_prints_a_rayservice_with_machines_for_each_part_of_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = {"replicas": [1, 3], "memory_gb_per_replica": 6, "label_selector": {"gpu": "h100"}}
    serve = {"mode": "chain", "host": "0.0.0.0", "keys": "keys.json", "accelerator": "cuda", "decoder": decoder}
    recipe = parse_recipe({"name": "my model", "workspace": "s3://b/w", "serve": serve})
    monkeypatch.setattr("pipeline.runtime.kuberay.serve_file", lambda *_: "applications: []\n")
    service = yaml.safe_load(ray_service(recipe, "host/unclip", pytest.fail))
    _validate(service)
    assert service["metadata"]["name"] == "unclip-my-model"
    groups = {group["groupName"]: group for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    assert groups.keys() == {"prior", "decoder", *(name.replace("_", "-") for name in recipe.upsamplers())}
    assert (groups["decoder"]["maxReplicas"], groups["prior"]["maxReplicas"]) == (3, 1)
    assert groups["decoder"]["labels"] == {ROLE: "serve", PART: "decoder", "gpu": "h100"}
    [container] = groups["decoder"]["template"]["spec"]["containers"]
    assert container["image"] == "host/unclip:gpu"
    assert container["resources"]["limits"] == {"memory": "10G", "nvidia.com/gpu": "1"}
    long = replace(recipe, name="a" * 60 + " small ")
    assert (
        yaml.safe_load(ray_service(long, "host/unclip", pytest.fail))["metadata"]["name"] == "a" * 41 + "-small"
    )  # KubeRay: 47
    with pytest.raises(ConfigError, match=r"serve\.host: 127\.0\.0\.1 is seen by its own machine alone"):
        ray_service(parse_recipe({"workspace": "s3://b/w"}), "host/unclip", pytest.fail)


@pytest.mark.parametrize(
    ("gateway", "expected"),
    [
        ({}, None),
        ({"label_selector": {ROLE: "head"}}, None),
        ({"label_selector": {"tier": "front"}, "replicas": [1, 3]}, ("4G", "1", {ROLE: "http", "tier": "front"}, 3)),
        ({"memory_gb_per_replica": 11.5, "cpus_per_replica": 2}, ("16G", "3", {ROLE: "http"}, 1)),
    ],
)
def test_a_rayservice_has_machines_for_what_its_http_processes_ask_for(
    gateway: dict[str, Any], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = {"host": "0.0.0.0", "keys": "keys.json", "accelerator": "cuda", "gateway": gateway}
    recipe = parse_recipe({"workspace": "s3://b/w", "serve": serve})
    file = Mock(return_value="applications: []\n")
    monkeypatch.setattr("pipeline.runtime.kuberay.serve_file", file)
    service = yaml.safe_load(ray_service(recipe, "host/unclip", pytest.fail))
    _validate(service)
    placed = file.call_args.args[0].serve.gateway
    first, *others = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert (first["groupName"], first["labels"]) == ("networks", {ROLE: "serve", PART: "networks"})
    sizes: list[Any] = []
    for group in others:
        [container] = group["template"]["spec"]["containers"]
        assert (group["groupName"], container["image"]) == ("http", "host/unclip:cpu")
        requests = container["resources"]["requests"]
        assert container["resources"]["limits"] == {"memory": requests["memory"]}
        assert placed.label_selector == group["labels"]
        sizes.append((requests["memory"], requests["cpu"], group["labels"], group["maxReplicas"]))
    assert sizes == ([] if expected is None else [expected])


def test_a_part_of_a_gpu_is_a_whole_one_on_kubernetes_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = {"host": "0.0.0.0", "keys": "keys.json", "accelerator": "cuda", "mode": "chain"}
    serve |= {"decoder": {"gpus_per_replica": 0.5}}
    monkeypatch.setattr("pipeline.runtime.kuberay.serve_file", Mock(return_value="applications: []\n"))
    lines: list[str] = []
    service = yaml.safe_load(
        ray_service(parse_recipe({"workspace": "s3://b/w", "serve": serve}), "unclip", lines.append)
    )
    assert lines == ["decoder: 0.5 GPU a copy; on Kubernetes each copy has a machine with 1"]
    [group] = [one for one in service["spec"]["rayClusterConfig"]["workerGroupSpecs"] if one["groupName"] == "decoder"]
    [container] = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize(
    "serve",
    [
        {"memory_gb_per_replica": 3, "label_selector": {"zone": "a"}},
        {"mode": "chain", "neighbours": {"memory_gb_per_replica": 3}, "decoder": {"label_selector": {"zone": "a"}}},
    ],
)
def test_each_part_of_a_rayservice_has_machines_on_which_no_other_fits(
    serve: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = {"memory_gb_per_replica": 12}
    recipe = parse_recipe(
        {"workspace": "s3://b/w", "serve": {"host": "0.0.0.0", "keys": "keys.json", "gateway": gateway, **serve}}
    )
    file = Mock(return_value="applications: []\n")
    monkeypatch.setattr("pipeline.runtime.kuberay.serve_file", file)
    service = yaml.safe_load(ray_service(recipe, "host/unclip", pytest.fail))
    placed = file.call_args.args[0].serve
    selectors = {
        part: networks_options(placed, part)["ray_actor_options"]["label_selector"] for part in parts_of(recipe)
    }
    selectors["http"] = placed.gateway.label_selector
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    for part, selector in selectors.items():
        [group] = [group for group in groups if selector.items() <= group["labels"].items()]
        assert group["groupName"] == part.replace("_", "-")
        # One replica of a CPU, and one CPU for Ray itself.
        cpus = group["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"]
        assert (cpus, group["rayStartParams"].get("num-cpus")) == (("1", None) if part == "http" else ("2", "1"))


@pytest.mark.parametrize("gateway", [{"memory_gb_per_replica": 12}, {"label_selector": {"tier": "front"}}])
def test_http_processes_that_need_a_machine_of_their_own_are_not_put_on_the_head(gateway: dict[str, Any]) -> None:
    gateway = {**gateway, "label_selector": {ROLE: "head", **gateway.get("label_selector", {})}}
    serve = {"host": "0.0.0.0", "keys": "keys.json", "gateway": gateway}
    with pytest.raises(ConfigError, match=r"serve\.gateway\.label_selector has unclip-role = head, whose size"):
        ray_service(parse_recipe({"workspace": "s3://b/w", "serve": serve}), "host/unclip", pytest.fail)


@pytest.mark.parametrize("value", ["in(H100,H200)", "!T4", "!in(T4,L4)"])
def test_a_kind_of_machine_has_one_label_of_each_name(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes would refuse a label like that."""
    monkeypatch.setattr("pipeline.runtime.kuberay.serve_file", lambda *_: "applications: []\n")
    for part, changes in (
        ("networks", {"label_selector": {"gpu": value}}),
        ("http", {"gateway": {"label_selector": {"gpu": value}}}),
    ):
        serve = {"host": "0.0.0.0", "keys": "keys.json", **changes}
        recipe = parse_recipe({"workspace": "s3://b/w", "serve": serve})
        with pytest.raises(ConfigError, match=f"of {part} has gpu = {re.escape(value)}, but"):
            ray_service(recipe, "host/unclip", pytest.fail)


def test_submit_prints_a_rayjob_with_the_recipe_and_a_cluster_of_its_own(tmp_path: Path) -> None:
    recipe = str(ROOT / "configs/demo.toml")
    done = unclip_here("submit", recipe, "--set", "workspace=s3://b/w", "--manifest", "host/unclip", "--until", "embed")
    assert done.returncode == 0, done.stderr
    config, job = yaml.safe_load_all(done.stdout)
    _validate(job)
    spec = job["spec"]
    assert spec["entrypoint"].endswith("run /recipes/recipe.json --address auto --until embed")
    assert json.loads(config["data"]["recipe.json"])["workspace"] == "s3://b/w"
    pod = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert {"name": "recipes", "configMap": {"name": config["metadata"]["name"]}} in pod["volumes"]
    assert pod["containers"][0]["image"] == "host/unclip:cpu"
    assert "IMAGE" not in done.stdout
    here = unclip_here("submit", recipe, "--set", f"workspace={tmp_path}", "--manifest", "host/unclip")
    assert (here.returncode, here.stdout) == (2, "")
    assert "name a bucket" in here.stderr


def test_google_clouds_cluster_is_what_ray_up_takes_and_has_the_roles_of_the_other() -> None:
    config = prepare_config(_load("gcp.yaml"))
    config.setdefault("cluster_synced_files", [])
    validate_config(config)
    other = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    for one in (config, other):
        labels = {name: node["labels"][ROLE] for name, node in one["available_node_types"].items()}
        assert labels == {role: role for role in (*_ROLES, "head")}
        head, workers = one["head_start_ray_commands"], one["worker_start_ray_commands"]
        assert "--dashboard-host=127.0.0.1" in head[-1]
        assert all("RAY_AUTH_MODE=token" in line for line in (head[1], workers[1]))
        assert all("--object-spilling-directory=/local/spill" in line for line in (head[1], workers[1]))
        assert all("UNCLIP_CACHE=/local/cache" in line for line in (head[1], workers[1]))
        assert f"spot-drain.sh {one['provider']['type']}" in workers[-1]
    profiles = {name: node["node_config"]["IamInstanceProfile"] for name, node in other["available_node_types"].items()}
    assert profiles == {role: {"Name": "unclip-workspace"} for role in _ROLES} | {"head": {"Name": "unclip-head"}}
    made = (ROOT / "deploy/aws-roles.sh").read_text()
    assert "for role in unclip-workspace unclip-head" in made
    accounts = {
        role: kind["node_config"]["serviceAccounts"][0]["email"].partition("@")[0]
        for role, kind in _load("gcp.yaml")["available_node_types"].items()
    }
    assert accounts == dict.fromkeys(_ROLES, "unclip") | {"head": "unclip-head"}


@pytest.mark.parametrize("name", ["cluster.yaml", "deploy/gcp.yaml"])
def test_every_machine_is_set_up_whole_as_ray_merges_the_commands(name: str) -> None:
    config = AutoscalingConfig(yaml.safe_load((ROOT / name).read_text()), skip_content_hash=True)
    commands = {role: config.get_worker_setup_commands(role) for role in _ROLES}
    commands["head"] = config.get_head_setup_commands()
    for role, lines in commands.items():
        packages, environment, *_ = lines
        assert "apt-get install -y -q python3-venv" in packages, role
        assert "python3 -m venv ~/venv" in environment, role
        assert "local-disk.sh" in lines[-1], role
    # AWS's image joins its disks by itself; elsewhere local-disk.sh does it.
    assert ("mdadm" in commands["train"][0]) == ("gcp" in name)


@pytest.mark.parametrize("name", ["cluster.yaml", "deploy/gcp.yaml"])
def test_the_images_of_the_machines_have_a_python_that_is_new_enough(name: str) -> None:
    assert set(re.findall(r"ubuntu-\d\d\.?\d\d", (ROOT / name).read_text())) <= {"ubuntu-24.04", "ubuntu-2404"}


def test_the_image_has_the_folders_that_the_program_reads() -> None:
    copied = re.findall(r"^COPY --chown=unclip (\w+) \1$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert {Path(CLUSTER_FILE).parts[0], "models", "pipeline", "jobs", "configs"} == set(copied)


def _checker(name: str) -> str:
    path = Path(sys.executable).parent / name
    if not path.exists():
        pytest.skip(f"{name} is not installed: it comes with unclip[dev], where its package has a wheel")
    return str(path)


def test_shellcheck_finds_nothing() -> None:
    scripts = [str(path) for path in sorted((ROOT / "deploy").glob("*.sh"))]
    assert len(scripts) >= 4
    done = subprocess.run([_checker("shellcheck"), *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_hadolint_finds_nothing_and_the_image_has_both_targets() -> None:
    done = subprocess.run([_checker("hadolint"), str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    text = (ROOT / "Dockerfile").read_text()
    assert "FROM base AS cpu" in text
    assert "FROM base AS gpu" in text


@pytest.fixture
def metadata() -> Generator[tuple[str, dict[str, str]]]:
    """A cloud's metadata server, and its answers by path; others are 404."""
    answers: dict[str, str] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers.get(self.path)
            self.send_response(200 if answer is not None else 404)
            self.end_headers()
            self.wfile.write((answer or "").encode())

        do_PUT = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", answers
        server.shutdown()


@pytest.mark.parametrize(
    ("cloud", "path", "before", "notice", "seconds"),
    [
        ("aws", "/latest/meta-data/spot/instance-action", None, '{"action": "terminate"}', 110),
        ("gcp", "/computeMetadata/v1/instance/preempted", "FALSE", "TRUE", 25),
    ],
)
def test_a_spot_notice_becomes_a_drain(
    metadata: tuple[str, dict[str, str]],
    tmp_path: Path,
    cloud: str,
    path: str,
    before: str | None,
    notice: str,
    seconds: int,
) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    url, answers = metadata
    answers["/latest/api/token"] = "token"
    if before is not None:
        answers[path] = before
    # The head, which is busy, accepts the third call.
    (tmp_path / "ray").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n[ $(wc -l < {tmp_path}/called) -ge 3 ]\n'
    )
    (tmp_path / "ray").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SPOT_METADATA": url, "SPOT_EVERY_S": "0.1"}
    with subprocess.Popen(["bash", str(ROOT / "deploy/spot-drain.sh"), cloud], env=environment) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.7)
        assert not (tmp_path / "called").exists()
        answers[path] = notice
        assert process.wait(20) == 0
    calls = (tmp_path / "called").read_text().splitlines()
    assert len(calls) == 3
    assert all(call.startswith("drain-node --reason DRAIN_NODE_REASON_PREEMPTION") for call in calls)
    left = [int(call.rpartition("--deadline-remaining-seconds ")[2]) for call in calls]
    assert left == sorted(left, reverse=True)
    assert left[0] in {seconds, seconds - 1}


def test_a_drain_that_the_head_never_accepts_ends_with_the_notice(
    metadata: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    url, answers = metadata
    answers["/computeMetadata/v1/instance/preempted"] = "TRUE"
    (tmp_path / "ray").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "ray").chmod(0o755)
    settings = {"SPOT_METADATA": url, "SPOT_EVERY_S": "0.1", "SPOT_NOTICE_S": "1"}
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **settings}
    command = ["bash", str(ROOT / "deploy/spot-drain.sh"), "gcp"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 1
    assert "the head has not accepted the drain" in done.stderr
