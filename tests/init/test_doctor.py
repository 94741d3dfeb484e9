"""Each check says what is there, and what to do."""

import base64
import http.server
import json
import resource
import socketserver
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.init import doctor
from pipeline.recipe.recipe import parse_recipe
from pipeline.workspace.store import Workspace
from tests.ports import free_port
from tests.tiny.recipe import tiny_tables, write_recipe


@pytest.mark.parametrize(
    ("finding", "state", "words"),
    [
        (doctor.check_python((3, 10)), "problem", "install Python 3.11"),
        (doctor.check_python((3, 11)), "ok", ""),
        (doctor.check_import("no_such_module", "some-package"), "problem", "some-package"),
        (doctor.check_import("json", "pytest"), "ok", ""),
        (doctor.check_faiss(set(), has_driver=True), "problem", r"'.\[gpu\]'"),
        (
            doctor.check_faiss({"faiss-cpu", "faiss-gpu"}, has_driver=True),
            "problem",
            r"-y faiss-cpu faiss-gpu; pip install",
        ),
        (doctor.check_faiss({"faiss-cpu", "faiss-gpu"}, has_driver=False), "problem", r"'.\[cpu\]'"),
        (doctor.check_faiss({"faiss-cpu"}, has_driver=True), "warning", r"'.\[gpu\]'"),
        (doctor.check_faiss({"faiss-cpu"}, has_driver=False), "ok", ""),
        (doctor.check_memory(1.0e9), "problem", "container's limit"),
        (doctor.check_memory(4.0e9), "warning", "container's limit"),
        (doctor.check_memory(64e9), "ok", ""),
        (doctor.check_shared_memory(Path("/no/such/place")), "warning", "--shm-size"),
        (doctor.check_open_files(256), "problem", "ulimit -Hn 65536"),
        (doctor.check_open_files(4096), "warning", "ulimit -Hn 65536"),
        (doctor.check_open_files(resource.RLIM_INFINITY), "ok", ""),
        (doctor.check_socket_path("/tmp"), "ok", ""),
        (doctor.check_socket_path("/scratch/" + "a" * 40), "problem", "shorter by 10 bytes"),
        (doctor.check_proxy({}), "ok", ""),
        (doctor.check_proxy({"HTTP_PROXY": "http://p:3128"}), "problem", "no_proxy=127.0.0.1,localhost"),
        (doctor.check_proxy({"http_proxy": "http://p", "NO_PROXY": "localhost, 127.0.0.1"}), "ok", ""),
        (doctor.check_proxy({"http_proxy": "http://p", "no_proxy": "*"}), "ok", ""),
        (doctor.check_tracker(""), "ok", ""),
        (doctor.check_tracker("http://127.0.0.1:1"), "problem", "mlflow server --port 1"),
    ],
)
def test_a_check_says_what_to_do(finding: doctor.Finding, state: str, words: str) -> None:
    assert finding.state == state
    assert bool(finding.mend) == (state != "ok")
    assert words.replace("\\", "") in finding.mend


@pytest.mark.parametrize("has_driver", [True, False])
def test_a_faiss_that_cannot_be_loaded_is_a_problem(*, has_driver: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    finding = doctor.check_faiss({"faiss-cpu"}, has_driver=has_driver)
    assert (finding.state, "cannot be loaded" in finding.text) == ("problem", True)
    assert "pip uninstall -y faiss-cpu faiss-gpu; pip install" in finding.mend


@contextmanager
def _server(handler: type[socketserver.BaseRequestHandler]) -> Generator[str]:
    """Host and port of a server."""
    with socketserver.TCPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class _NoHttp(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.rfile.readline()
        self.wfile.write(b"I am Ray\n")


class _WithPassword(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        expected = base64.b64encode(b"me:sec@ret").decode()
        is_mine = self.path == "/ml/health" and self.headers["Authorization"] == f"Basic {expected}"
        self.send_response(200 if is_mine else 401)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.mark.parametrize("uri", ["http://h:abc", "http://h:70000", "http://[h", "http://me:se/secret@h"])
def test_a_tracker_whose_address_cannot_be_read_is_named(uri: str) -> None:
    finding = doctor.check_tracker(uri)
    assert (finding.state, "http://host:5000" in finding.mend) == ("problem", True)
    assert "secret" not in finding.text


def test_a_port_that_speaks_no_http_is_named() -> None:
    with _server(_NoHttp) as address:
        finding = doctor.check_tracker(f"http://{address}")
    assert finding.state == "problem"
    assert "I am Ray" in finding.text


def test_a_tracker_is_asked_with_its_password_which_nobody_sees() -> None:
    with _server(_WithPassword) as address:
        good = doctor.check_tracker(f"http://me:sec%40ret@{address}/ml/")
        bad = doctor.check_tracker(f"http://me:secret@{address}")
    assert (good.state, good.text) == ("ok", f"http://me:***@{address}/ml/")
    assert (bad.state, "secret" in bad.text) == ("problem", False)


def test_passwords_of_proxies_and_databases_are_not_shown() -> None:
    proxy = doctor.check_proxy({"http_proxy": "http://me:secret@p:3128"})
    assert proxy.text == "http://me:***@p:3128, also for 127.0.0.1 and localhost"
    assert doctor.check_tracker("postgresql://me:secret@db/ml").text == "postgresql://me:***@db/ml"


def test_the_longest_folder_that_passes_gives_sockets_that_linux_takes() -> None:
    folder = "/" + "a" * (107 - len(doctor._RAY_SOCKET) - 1)
    assert doctor.check_socket_path(folder).state == "ok"
    assert doctor.check_socket_path(folder + "a").state == "problem"


@pytest.mark.parametrize(
    ("has_driver", "needs_cuda", "state", "words"),
    [
        (False, False, "ok", ""),
        (False, True, "problem", "resources.accelerator"),
        (True, False, "warning", "install the CUDA build"),
        (True, True, "problem", "install the CUDA build"),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_named(
    has_driver: bool, needs_cuda: bool, state: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path if has_driver else tmp_path / "none")
    finding = doctor.check_torch(needs_cuda=needs_cuda)
    assert finding.state == state
    assert words in finding.mend


def test_a_workspace_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = doctor.check_workspace(Workspace(str(tmp_path / "file/workspace")))
    assert finding.state == "problem"
    assert "not a folder" in finding.text
    assert doctor.check_workspace(Workspace(str(tmp_path / "good"))).state == "ok"
    assert not (tmp_path / "good").exists()


def test_a_disk_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_disk(str(tmp_path / "not/there/yet"), "workspace").text.endswith(str(tmp_path))
    monkeypatch.setattr(doctor, "_LEAST_DISK_GB", 1e9)
    finding = doctor.check_disk(str(tmp_path), "workspace")
    assert (finding.state, finding.mend.startswith("free some space")) == ("problem", True)


def test_a_container_s_or_job_s_share_of_the_cpus_is_said() -> None:
    assert doctor.check_cpus(64, 64).text == "64"
    assert doctor.check_cpus(2, 64).text == "2 of the machine's 64: the container or job has no more"


def test_a_recipe_that_asks_for_a_gpu_is_seen(tmp_path: Path) -> None:
    assert not doctor.uses_cuda(parse_recipe(tiny_tables(tmp_path)))
    assert doctor.uses_cuda(parse_recipe(tiny_tables(tmp_path, decoder={"resources": {"accelerator": "cuda"}})))


def test_the_command_ends_with_code_4_where_a_run_would_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write_recipe(tmp_path, port=free_port()))
    for limit in ("_LEAST_DISK_GB", "_LEAST_MEMORY_GB"):
        monkeypatch.setattr(doctor, limit, 0.0)
    good = CliRunner().invoke(app, ["doctor", path])
    assert good.exit_code == 0, good.output
    assert f"next:\n  unclip plan {path}\n  unclip run {path}\n" in good.stderr
    bad = CliRunner().invoke(app, ["doctor", path, "--set", "tracking.uri=http://127.0.0.1:1", "--json"])
    assert bad.exit_code == 4
    states = {finding["name"]: finding["state"] for finding in json.loads(bad.stdout)}
    assert [name for name, state in states.items() if state == "problem"] == ["tracker"]
    assert {
        "Python",
        "torch",
        "faiss",
        "ray",
        "CPUs",
        "memory",
        "/dev/shm",
        "open files",
        "TMPDIR",
        "proxy",
    } <= states.keys()
