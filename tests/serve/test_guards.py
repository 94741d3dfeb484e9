"""Guards of every request: hosts, origins, sizes, the access log and the safety hook."""

import base64
import json
import socket
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from starlette.testclient import TestClient

from pipeline.errors import ConfigError
from pipeline.serve.guards import AccessLog, GuardSettings, RequestFacts
from pipeline.serve.keys import add_key
from pipeline.serve.protocols import Images
from pipeline.serve.safety import load_hook
from tests.serve.guarded import Serving, ask, client_of, guarded
from tests.tiny.shards import pixels
from tests.tiny.storage import files_of_at_most


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("[::1]:8000", 200),
        ("10.1.2.3", 200),
        ("pictures.example", 200),
        ("evil.example", 421),
        ("pictures.example.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
        ("[", 421),
        ("PICTURES.example", 200),
    ],
)
def test_a_host_that_was_not_named_is_refused(host: str, status: int) -> None:
    client = client_of(guarded(GuardSettings(hosts=("Pictures.Example",))))
    answer = client.get("/v1/models", headers={"Host": host})
    assert answer.status_code == status
    if status != 200:
        assert answer.json()["error"]["code"] == "unknown_host"


def test_pages_of_other_origins_are_refused() -> None:
    client = client_of(guarded(GuardSettings(hosts=("Pictures.example",))))
    origins = {"http://127.0.0.1": 200, "https://pictures.example": 200, "https://evil.example": 403, "http://[": 403}
    for origin, status in origins.items():
        assert client.get("/v1/models", headers={"Origin": origin}).status_code == status


def test_every_answer_has_a_request_id_and_security_headers() -> None:
    client = client_of(guarded())
    for path in ("/", "/v1/models", "/nothing"):
        headers = client.get(path, headers={"X-Request-Id": "mine-1"}).headers
        assert headers["X-Request-Id"] == "mine-1"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "script-src" in client.get("/").headers["Content-Security-Policy"]  # the page keeps its own
    forged = client.get("/v1/models", headers={"X-Request-Id": "a b"}).headers["X-Request-Id"]
    assert forged != "a b"
    assert len(forged) == 32


def test_bodies_that_are_declared_too_large_or_come_too_slowly_are_refused(serving: Serving) -> None:
    with serving(guarded(GuardSettings(body_timeout_s=0.05))) as url:
        host, port = url.removeprefix("http://").split(":")
        for length, status in ((1 << 30, b"413"), (20, b"408")):
            with socket.create_connection((host, int(port)), timeout=60) as link:
                head = f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
                link.sendall(head.encode() + b"{")
                assert link.recv(4096).split()[1] == status


def test_the_access_log_is_json_lines_without_prompts_and_keys(keys: Path, tmp_path: Path) -> None:
    key, log = add_key(keys, "alice"), tmp_path / "logs" / "access.jsonl"
    for log_prompts in (False, True):
        app = guarded(GuardSettings(access_log=str(log), log_prompts=log_prompts), keys)
        answer = ask(app, key, prompt="a secret wish", n=2)
        assert ask(app, "wrong").status_code == 401
        first, second = map(json.loads, log.read_text().splitlines()[-2:])
        assert (first["key"], first["status"], first["path"]) == ("alice", 200, "/v1/images/generations")
        assert first["request_id"] == answer.headers["X-Request-Id"]
        assert first["pixels"] == 2 * 16 * 16
        assert first["bytes_received"] > 20
        assert first["bytes_sent"] == len(answer.content)
        assert (second["key"], second["status"], second["refused_by"]) == ("", 401, "key")
        assert ("a secret wish" in log.read_text()) == log_prompts
        assert key not in log.read_text()


def test_the_access_log_leaves_out_whether_the_process_lives(tmp_path: Path) -> None:
    log = tmp_path / "access.jsonl"
    app = TestClient(guarded(GuardSettings(access_log=str(log))), base_url="http://localhost")
    for path in ("/livez", "/readyz"):
        app.get(path)
    assert [json.loads(line)["path"] for line in log.read_text().splitlines()] == ["/readyz"]


def test_a_log_that_cannot_be_written_ends_no_request_and_its_lines_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "access.jsonl"
    app = guarded(GuardSettings(access_log=str(log)))
    log.unlink()
    log.mkdir()  # as good as a full disk
    assert [ask(app).status_code for _ in range(3)] == [200] * 3
    log.rmdir()
    assert ask(app).status_code == 200
    assert len(log.read_text().splitlines()) == 1
    lost, back = (record.getMessage() for record in caplog.records if "access_log" in record.getMessage())
    assert "cannot be written: Is a directory" in lost
    assert back.endswith("lines left out: 3")


def test_what_a_full_disk_has_cut_off_is_no_part_of_the_next_line(tmp_path: Path) -> None:
    file = tmp_path / "access.jsonl"
    scope = {"client": ("10.0.0.1", 1), "method": "GET", "path": "/"}

    def write(number: int) -> None:
        log.write(scope, RequestFacts(str(number)), 200, 0.1)

    log = AccessLog(GuardSettings(access_log=str(file)))
    write(1)
    with files_of_at_most(file.stat().st_size + 40):
        write(2), write(3)
    write(4), write(5)
    first, half, *rest = file.read_text().splitlines()
    assert len(half) == 40
    file.write_text("\n".join([first, half]))
    log = AccessLog(GuardSettings(access_log=str(file)))  # as after a start on a disk that was full
    write(6)
    rest += file.read_text().splitlines()[2:]
    assert [json.loads(line)["request_id"] for line in (first, *rest)] == ["1", "4", "5", "6"]


def refuse_rude_and_bright(prompt: str, image: Images | None) -> str | None:
    if image is None:
        return "rude" if "rude" in prompt else None
    return "too bright" if image.mean() > 128 and "bright" in prompt else None


def test_the_safety_hook_refuses_prompts_and_blanks_pictures(tmp_path: Path) -> None:
    log = tmp_path / "access.jsonl"
    app = guarded(GuardSettings(access_log=str(log)), hook=refuse_rude_and_bright)
    refused = ask(app, prompt="a rude picture")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "content_policy_violation")
    for prompt, value in (("a picture", 255), ("a bright picture", 0)):
        [image] = ask(app, prompt=prompt).json()["data"]
        assert np.unique(pixels(base64.b64decode(image["b64_json"]))).tolist() == [value]
    events = ask(app, prompt="a bright picture", stream=True, partial_images=1).text
    files = [json.loads(line[6:])["b64_json"] for line in events.splitlines() if line.startswith("data: ")]
    assert len(files) == 2
    for file in files:
        assert pixels(base64.b64decode(file)).max() == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["refused_by"], line["blanked"]) for line in lines] == [("safety", 0), ("", 0), ("", 1), ("", 2)]


def test_a_hook_is_found_by_name_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("my_safety")
    module.check = refuse_rude_and_bright  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_safety", module)
    assert load_hook("my_safety:check") is refuse_rude_and_bright
    for name in ("my_safety:nothing", "no_such_module:check", "my_safety"):
        with pytest.raises(ConfigError, match="MODULE:FUNCTION"):
            load_hook(name)
