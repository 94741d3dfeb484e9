"""A dashboard behind SSH. The ``ssh`` of these tests forwards a port on this machine, and answers as OpenSSH does."""

import http.server
import os
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from pipeline.errors import ConfigError, StepError
from pipeline.runtime.tunnel import reachable
from tests.tiny.command import unclip_here

_SSH = f"""#!{sys.executable}
import pathlib, socket, sys, threading
words = sys.argv[1:]
pathlib.Path(__file__).with_name("words").write_text("\\n".join(words))
if words[-1] == "nobody@head":
    sys.exit("Warning: a line before\\nnobody@head: Permission denied (publickey).\\n")
if words[-1] == "silent@head":
    sys.exit(3)
_, here, host, there = words[words.index("-L") + 1].split(":")
listener = socket.create_server(("127.0.0.1", int(here)))

def copy(source, target):
    while data := source.recv(65536):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)

while True:
    one, _ = listener.accept()
    try:
        other = socket.create_connection((host, int(there)))
    except OSError:  # as sshd: the connection is closed, the tunnel stays
        one.close()
        continue
    for pair in ((one, other), (other, one)):
        threading.Thread(target=copy, args=pair, daemon=True).start()
"""


class _Dashboard(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.path.encode())


@pytest.fixture
def port() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the words of the last call of ``ssh`` stand."""
    program = tmp_path / "ssh"
    program.write_text(_SSH)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "words"


def test_a_dashboard_behind_ssh_is_called_through_a_tunnel_that_ends_with_the_block(port: int, words: Path) -> None:
    with reachable(f"ssh://somebody@head:2222/{port}") as url:
        assert requests.get(f"{url}/api/version", timeout=10).text == "/api/version"
    called = words.read_text().split("\n")
    assert called[called.index("-p") + 1] == "2222"
    assert called[-2:] == ["--", "somebody@head"]
    with pytest.raises(requests.exceptions.ConnectionError):
        requests.get(url, timeout=10)


def test_another_address_needs_no_tunnel() -> None:
    with reachable("http://127.0.0.1:8265") as url:
        assert url == "http://127.0.0.1:8265"


@pytest.mark.usefixtures("words")
def test_what_ssh_says_is_the_error() -> None:
    with pytest.raises(StepError, match=r"ssh ended: nobody@head: Permission denied .*try `ssh -N"):
        reachable("ssh://nobody@head").__enter__()


@pytest.mark.usefixtures("words")
def test_the_keys_of_ray_up_are_named_where_a_key_is_missing() -> None:
    with pytest.raises(
        StepError, match=r"\(publickey\)\.; of a cluster of `ray up`, first `ssh-add ~/\.ssh/ray-autoscaler"
    ):
        reachable("ssh://nobody@head").__enter__()
    with pytest.raises(StepError, match=r"ssh ended: exit code 3; try `ssh -N"):
        reachable("ssh://silent@head").__enter__()


@pytest.mark.usefixtures("words")
def test_errors_name_the_address_and_not_the_tunnel() -> None:
    done = unclip_here("jobs", "--address", "ssh://somebody@head/1")
    assert done.returncode == 4
    assert "no Ray cluster answers at ssh://somebody@head/1" in done.stderr
    assert "127.0.0.1" not in done.stderr


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ssh://", "give ssh://USER@HOST"),
        ("ssh://head:many", "give ssh://USER@HOST"),
        ("ssh://head/jobs", "after the host comes the dashboard's port"),
    ],
)
def test_wrong_addresses_are_one_message(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reachable(address).__enter__()


def test_a_machine_without_ssh_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no `ssh` on this machine"):
        reachable("ssh://head").__enter__()
