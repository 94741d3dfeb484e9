import base64
import json
import os
import resource
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import AsyncMock, Mock

import numpy as np
import pytest
from starlette.testclient import TestClient

from models.request import SampleRequest
from pipeline.errors import ConfigError, StepError
from pipeline.recipe.picture_card import ModelCard
from pipeline.serve import keeper
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.gate import Gate
from pipeline.serve.guarded_model import GuardedModel
from pipeline.serve.guards import AccessLog, Guards, GuardSettings, RequestFacts
from pipeline.serve.keys import Key, KeyRing, Meter, Scope, add_key, read_keys, revoke_key
from pipeline.serve.protocols import Accepted, Images, NeighbourRow, NotServing, Overloaded, Preview, SampledPictures
from pipeline.serve.safety import SafetyCalls, load_hook
from tests.tiny.command import unclip_here
from tests.tiny.shards import pixels, plain_picture

Serving = Callable[[Any], AbstractContextManager[str]]


class WhiteModel:
    """Networks that answer at once."""

    async def sample(self, request: SampleRequest, _client: str = "") -> SampledPictures:
        return SampledPictures(np.full((len(request.seeds), 16, 16, 3), 255, np.uint8), None)

    async def stream(self, request: SampleRequest, _client: str = "", _num_previews: int = 0) -> Any:
        yield Accepted()
        yield Preview(0, 0, np.full((16, 16, 3), 255, np.uint8))
        yield await self.sample(request)

    async def cut_at(self, texts: Sequence[str]) -> list[int]:
        return [0] * len(texts)

    async def stats(self) -> dict[str, int]:
        return {"requests": 1}


def guarded(
    settings: GuardSettings = GuardSettings(),  # noqa: B008
    keys: Path | None = None,
    hook: Any = None,
    model: Any = None,
    index: Any = None,
) -> Guards:
    meter = Meter(clock=lambda: 0.0)
    safety = SafetyCalls(hook) if hook else None
    behind: Any = GuardedModel(model or WhiteModel(), 16, meter, safety)  # pyright: ignore[reportArgumentType]
    app = create_app(behind, index, ApiSettings(ModelCard("tiny", 16)))
    return Guards(app, settings, KeyRing(keys) if keys else None, meter)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def client_of(app: Any, key: str = "") -> TestClient:
    """A client that calls the application without a socket."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return TestClient(app, base_url="http://127.0.0.1", headers=headers)


def ask(app: Any, key: str = "", **fields: Any) -> Any:
    return client_of(app, key).post("/v1/images/generations", json={"prompt": "a"} | fields)


def test_keys_open_what_their_scopes_name_until_they_are_revoked(keys: Path) -> None:
    both, search = add_key(keys, "alice"), add_key(keys, "bob", ["search"])
    app = guarded(keys=keys)
    assert ask(app, both).status_code == 200
    wrong = ask(app, both + "x")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
    nothing = client_of(app).get("/v1/models")
    assert (nothing.status_code, nothing.headers["WWW-Authenticate"]) == (401, "Bearer")
    for path in ("/metrics", "/knn-service", "/anything"):
        assert client_of(app).get(path).status_code == 401
    for path in ("/", "/healthz"):
        assert client_of(app).get(path).status_code == 200
    refused = ask(app, search)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
    assert client_of(app, search).get("/indices-list").status_code == 200
    revoke_key(keys, "alice")
    assert ask(app, both).status_code == 401


def key_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says of keys since the last call."""
    lines = [record.getMessage() for record in caplog.records if "serve.keys" in record.getMessage()]
    caplog.clear()
    return lines


def test_nobody_comes_in_while_the_keys_cannot_be_read_and_all_are_told(
    keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = add_key(keys, "alice")
    ring, good = KeyRing(keys), keys.read_text()
    gate = Gate(ring)
    gate.open(guarded().app)
    app = Guards(gate, keys=ring)
    for spoil in (keys.unlink, lambda: keys.write_text("{}"), lambda: keys.write_text('{"keys": 5}')):
        spoil()
        for key in (secret, "wrong"):
            refused = ask(app, key)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_keys")
            assert refused.json()["error"]["message"] == "the server's keys cannot be read; ask its operator"
        unready = client_of(app).get("/readyz")
        assert (unready.status_code, unready.json()["error"]["code"]) == (503, "not_ready")
        assert str(keys.parent) not in unready.text
        assert client_of(app).get("/livez").status_code == 200
        [line] = key_lines(caplog)
        assert str(keys) in line
        keys.write_text(good)
        assert client_of(app).get("/readyz").json() == {"status": "ok"}
        assert ask(app, secret).status_code == 200
        assert key_lines(caplog) == [f"serve.keys: {keys} is read again"]
    aside = keys.rename(keys.with_name("aside"))
    assert ask(app, secret).status_code == 503
    aside.rename(keys)  # with the same inode and time
    assert ask(app, secret).status_code == 200
    assert len(key_lines(caplog)) == 2


WRONG_WORDS = [
    ({"request": 5}, "unknown word 'request'; one of name, sha256, scopes, requests, pixels, bytes, created"),
    ({"scope": ["images"]}, "unknown word 'scope'; one of name"),
    ({"scopes": ["images", "serach"]}, "scopes: 'serach' is none of images, search, metrics"),
    ({"scopes": "images"}, "scopes: Input should be a valid tuple"),
    ({"requests": -1}, "requests: -1 is below 0"),
    ({"pixels": -1}, "pixels: -1 is below 0"),
    ({"bytes": -1}, "bytes: -1 is below 0"),
    ({"pixels": "many"}, "pixels: Input should be a valid integer"),
]


def with_row(keys: Path, words: dict[str, Any]) -> bytes:
    """The file with these words for its first key."""
    rows = json.loads(keys.read_text())["keys"]
    return json.dumps({"keys": [rows[0] | words, *rows[1:]]}).encode()


@pytest.mark.parametrize(("words", "reason"), WRONG_WORDS, ids=[reason[:20] for _, reason in WRONG_WORDS])
def test_a_wrong_word_in_the_file_of_keys_is_refused(keys: Path, words: dict[str, Any], reason: str) -> None:
    add_key(keys, "alice"), add_key(keys, "bob")
    wrong = with_row(keys, words)
    keys.write_bytes(wrong)
    for act in (lambda: read_keys(keys), lambda: add_key(keys, "carol")):
        with pytest.raises(ConfigError) as error:
            act()
        assert str(error.value).startswith(f"{keys}: the key 'alice': {reason}")
    assert keys.read_bytes() == wrong


def test_a_key_is_revoked_beside_one_with_a_mistake_and_that_one_too(keys: Path) -> None:
    add_key(keys, "alice"), add_key(keys, "bob")
    keys.write_bytes(with_row(keys, {"request": 5}))
    [alice, _] = json.loads(keys.read_text())["keys"]
    revoke_key(keys, "bob")
    assert json.loads(keys.read_text()) == {"keys": [alice]}
    revoke_key(keys, "alice")
    assert read_keys(keys) == []


def test_a_server_that_is_started_again_leaves_out_a_key_with_a_mistake(
    keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alice, bob = add_key(keys, "alice"), add_key(keys, "bob")
    keys.write_bytes(with_row(keys, {"request": 5}))
    ring = KeyRing(keys)
    gate = Gate(ring)
    gate.open(guarded().app)
    app = Guards(gate, keys=ring)
    assert [ask(app, key).status_code for key in (alice, bob)] == [401, 200]
    assert client_of(app).get("/readyz").json()["note"].startswith("a change of the server's keys has a mistake")
    [line] = key_lines(caplog)
    assert f"{keys}: the key 'alice': unknown word 'request'" in line


def test_a_key_with_a_mistake_outlasts_a_swap_but_no_change_to_another_file(keys: Path) -> None:
    """By Ray Serve alone, a process that goes on has a new ring for each recipe."""
    alice, other = add_key(keys, "alice"), keys.with_name("other.json")
    before = KeyRing(keys)
    for file in (keys, other):
        file.write_bytes(with_row(keys, {"request": 5}))
    kept, lost = KeyRing(keys, before).find(alice), KeyRing(other, before).find(alice)
    assert kept is not None
    assert (kept.name, lost) == ("alice", None)


def test_serve_is_not_started_with_a_mistake_in_the_keys(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_key(keys, "alice")
    keys.write_bytes(with_row(keys, {"request": 5}))
    monkeypatch.setattr(keeper, "keep", Mock(side_effect=AssertionError("a server is started")))
    done = unclip_here("serve", "configs/demo.toml", "--set", f"serve.keys={keys}")
    assert done.returncode == 2
    assert "the key 'alice': unknown word 'request'" in done.stderr


def test_a_row_without_a_name_or_words_is_named_by_its_number(keys: Path) -> None:
    keys.write_text('{"keys": [{"sha256": "a"}, 5]}')
    with pytest.raises(ConfigError, match=r"key number 1: name: Field required; .*key number 2: not an object"):
        read_keys(keys)


@pytest.mark.parametrize(("words", "reason"), WRONG_WORDS, ids=[reason[:20] for _, reason in WRONG_WORDS])
def test_a_wrong_word_while_serving_leaves_a_key_as_it_was_and_the_others_as_they_are(
    keys: Path, words: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    alice, bob = add_key(keys, "alice", ["search"], requests=3), add_key(keys, "bob")
    ring = KeyRing(keys)
    gate = Gate(ring)
    gate.open(guarded().app)
    app = Guards(gate, keys=ring, meter=Meter(clock=lambda: 0.0))
    rows = json.loads(with_row(keys, words))["keys"]
    revoke_key(keys, "bob")
    carol = add_key(keys, "carol")
    [_, new] = json.loads(keys.read_text())["keys"]
    keys.write_text(json.dumps({"keys": [rows[0], new, new | {"name": "dave", "sha256": "0", "pixel": 1}]}))
    assert [ask(app, key).status_code for key in (alice, bob, carol)] == [403, 401, 200]
    asked = client_of(app, alice).get("/indices-list")
    assert (asked.status_code, asked.headers["x-ratelimit-limit-requests"]) == (200, "3")
    assert client_of(app).get("/readyz").json() == {
        "status": "ok",
        "note": "a change of the server's keys has a mistake and does not hold",
    }
    [line] = key_lines(caplog)
    assert f"{keys}: the key 'alice': {reason}" in line
    assert f"{keys}: the key 'dave': unknown word 'pixel'" in line
    keys.write_text(json.dumps({"keys": [new]}))
    assert ask(app, alice).status_code == 401
    assert client_of(app).get("/readyz").json() == {"status": "ok"}
    assert key_lines(caplog) == [f"serve.keys: {keys} is read again"]


def test_the_file_holds_no_key_and_nobody_else_may_read_it(keys: Path) -> None:
    secret = add_key(keys, "alice")
    assert secret not in keys.read_text()
    assert len(secret) > 43  # 256 bits in base64
    assert keys.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="has a key named 'alice'"):
        add_key(keys, "alice")
    with pytest.raises(ConfigError, match="has no key named 'bob'; its keys: alice"):
        revoke_key(keys, "bob")
    with pytest.raises(ConfigError, match="no such file of keys; first: unclip keys add"):
        read_keys(keys.with_name("none.json"))
    assert [path.name for path in keys.parent.iterdir()] == ["keys.json"]


def test_who_could_read_the_file_can_read_it_after_a_change(keys: Path) -> None:
    """A server may be another user, and read the file by its group or owner."""
    add_key(keys, "alice")
    keys.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(keys, 12, 34)
    before = keys.stat()
    add_key(keys, "bob")
    revoke_key(keys, "alice")
    after = keys.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_a_file_whose_owner_cannot_be_kept_stays_as_it_is(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_key(keys, "alice")
    before = keys.read_bytes()
    monkeypatch.setattr(os, "chown", Mock(side_effect=PermissionError(1, "Operation not permitted")))
    with pytest.raises(ConfigError, match="run the command as its owner, or as root"):
        revoke_key(keys, "alice")
    assert keys.read_bytes() == before
    assert [path.name for path in keys.parent.iterdir()] == ["keys.json"]


def test_a_key_is_revoked_in_the_file_that_a_link_leads_to(keys: Path, tmp_path: Path) -> None:
    add_key(keys, "alice")
    link = tmp_path / "current" / "keys.json"
    link.parent.mkdir()
    link.symlink_to(keys)
    revoke_key(link, "alice")
    assert read_keys(keys) == []
    assert link.is_symlink()


def test_two_changes_at_a_time_lose_none(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_key(keys, "alice")

    def revoke_meanwhile(path: Path) -> list[Key]:
        monkeypatch.undo()
        with pytest.raises(StepError, match="another command is changing it"):
            revoke_key(path, "alice")
        return read_keys(path)

    monkeypatch.setattr("pipeline.serve.keys.read_keys", revoke_meanwhile)
    add_key(keys, "bob")
    assert [key.name for key in read_keys(keys)] == ["alice", "bob"]


@pytest.mark.parametrize(
    ("limits", "expected", "unit"),
    [
        ({"requests": 2}, [200, 200, 429], "requests"),
        ({"pixels": 2 * 16 * 16}, [200, 200, 429], "pixels"),
        ({"bytes": 10}, [200, 429], "bytes"),
    ],
)
def test_what_a_key_uses_is_limited(keys: Path, limits: dict[str, int], expected: list[int], unit: str) -> None:
    key, other = add_key(keys, "alice", **limits), add_key(keys, "bob")
    app = guarded(keys=keys)
    answers = [ask(app, key) for _ in expected]
    assert [answer.status_code for answer in answers] == expected
    error = answers[-1].json()["error"]
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert unit in error["message"]
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 36000
    assert ask(app, other).status_code == 200
    if unit == "requests":
        assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]


class RefusingModel(WhiteModel):
    """Networks that refuse, each time for the next of these reasons, and then answer."""

    def __init__(self) -> None:
        self.errors = [Overloaded("full"), NotServing("none"), ValueError("no such size")]
        self.clients = list[str]()

    async def sample(self, request: SampleRequest, client: str = "") -> SampledPictures:
        self.clients.append(client)
        if self.errors:
            raise self.errors.pop()
        return SampledPictures(np.zeros((len(request.seeds), 16, 16, 3), np.uint8), None)

    async def stream(self, request: SampleRequest, client: str = "", _num_previews: int = 0) -> Any:
        sampled = await self.sample(request, client)
        yield Accepted()
        yield sampled


@pytest.mark.parametrize("stream", [False, True])
def test_a_key_pays_no_pixels_for_pictures_that_are_refused(keys: Path, stream: bool) -> None:
    key = add_key(keys, "alice", pixels=16 * 16)
    app = guarded(keys=keys, model=RefusingModel())
    assert [ask(app, key, stream=stream).status_code for _ in range(5)] == [400, 503, 429, 200, 429]


class NearModel(WhiteModel):
    """Networks that also embed pictures."""

    async def embed_image(self, _image: Images) -> Any:
        return np.eye(4)[0]


@pytest.mark.parametrize("stream", [False, True])
def test_neighbours_need_the_scope_of_a_search(keys: Path, stream: bool) -> None:
    row = NeighbourRow(7, 0.5, {"uid": "u", "url": "http://data", "caption": "a caption", "split": "train"})
    index = Mock(search=AsyncMock(return_value=[[row]]), near_copy=AsyncMock(return_value=None))
    scopes: list[list[Scope]] = [["images"], ["images", "search"]]
    without, both = (add_key(keys, str(number), opens) for number, opens in enumerate(scopes))
    for app in (guarded(keys=keys, model=NearModel(), index=index), guarded(model=NearModel(), index=index)):
        index.search.reset_mock()
        answers = [ask(app, key, neighbours=1, stream=stream) for key in (without, both)]
        assert [answer.status_code for answer in answers] == [200, 200]
        has_neighbours = ["a caption" in answer.text for answer in answers]
        assert has_neighbours == [app.keys is None, True]
        assert ["lacks the scope 'search'" in answer.text for answer in answers] == [app.keys is not None, False]
        assert index.search.await_count == sum(has_neighbours)
    assert "scope" not in ask(guarded(keys=keys, index=index), without).text


class FailingModel(WhiteModel):
    """Networks that accept a stream and then fail, before its pictures or after them."""

    def __init__(self, error: Exception, has_pictures: bool) -> None:
        self.error = error
        self.has_pictures = has_pictures

    async def stream(self, request: SampleRequest, _client: str = "", _num_previews: int = 0) -> Any:
        yield Accepted()
        yield Preview(0, 0, np.full((16, 16, 3), 255, np.uint8))
        if self.has_pictures:
            yield await self.sample(request)
        raise self.error


@pytest.mark.parametrize("error", [NotServing("gone"), Overloaded("full"), ValueError("no such edit")])
@pytest.mark.parametrize("has_pictures", [False, True])
def test_a_key_pays_for_a_stream_that_fails_only_if_its_pictures_came(
    keys: Path, error: Exception, has_pictures: bool
) -> None:
    key = add_key(keys, "alice", pixels=16 * 16)
    app = guarded(keys=keys, model=FailingModel(error, has_pictures))
    answer = ask(app, key, stream=True, partial_images=1)
    assert (answer.status_code, "event: error" in answer.text) == (200, True)
    assert ("completed" in answer.text) == has_pictures
    assert ask(app, key).status_code == (429 if has_pictures else 200)


class ReducingModel(WhiteModel):
    """Networks with the training embeddings, which notes what it is asked for."""

    def __init__(self) -> None:
        self.reduced = list[Sequence[int]]()
        self.edits = list[Any]()

    async def reduce_image(self, _image: Any, components: Sequence[int]) -> tuple[tuple[int, ...], Any]:
        self.reduced.append(components)
        return (*components, 16), np.eye(16)[: len(components) + 1]

    async def sample(self, request: SampleRequest, _client: str = "") -> SampledPictures:
        self.edits.append(request.edit)
        return await super().sample(request)


def test_a_key_without_the_pixels_has_no_embeddings_read_for_it(keys: Path) -> None:
    key, model = add_key(keys, "alice", pixels=4 * 16 * 16), ReducingModel()
    client, files = client_of(guarded(keys=keys, model=model, index=Mock()), key), {"image": plain_picture("red")}
    answers = [
        client.post("/v1/images/pca-reconstructions", data={"components": counts}, files=files)
        for counts in ("2,3", "5")
    ]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert model.reduced == [(2, 3)]
    [edit] = model.edits
    assert (edit.picture.levels, len(edit.picture.sha256), edit.components) == (b"", 64, (2, 3, 16))


def test_shares_are_of_checked_keys_and_else_of_addresses(keys: Path) -> None:
    key, other = add_key(keys, "alice"), add_key(keys, "bob")
    for path, headers, number in (
        (keys, [f"Bearer {key}", f"bearer {key}", f"Bearer  {key}"], 1),
        (keys, [f"Bearer {key}", f"Bearer {other}"], 2),
        (None, ["Bearer invented", "Bearer another", "Basic x"], 1),
    ):
        model = RefusingModel()
        model.errors.clear()
        client = client_of(guarded(keys=path, model=model))
        for header in headers:
            answer = client.post("/v1/images/generations", json={"prompt": "a"}, headers={"Authorization": header})
            assert answer.status_code == 200
        assert len(set(model.clients)) == number


def test_a_bucket_fills_evenly_and_a_large_request_passes_when_it_is_full(keys: Path) -> None:
    now_s = 0.0
    add_key(keys, "alice", pixels=600)
    [key] = read_keys(keys)
    meter = Meter(clock=lambda: now_s)
    assert meter.wait_s(key, "pixels", 10_000) == 0
    meter.use(key, "pixels", 660)
    assert meter.wait_s(key, "pixels", 60) == pytest.approx(12)
    now_s = 12.0
    assert meter.wait_s(key, "pixels", 60) == pytest.approx(0)
    assert meter.wait_s(key, "requests") == 0


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
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 40, limits[1]))
    try:
        write(2), write(3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
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


def test_the_keys_command_adds_lists_and_revokes(keys: Path) -> None:
    added = unclip_here("keys", "add", str(keys), "alice", "--scope", "images", "--requests", "60")
    assert added.stdout.startswith("unclip-")
    assert "alice" in unclip_here("keys", "list", str(keys)).stdout
    assert added.stdout.strip() not in unclip_here("keys", "list", str(keys)).stdout
    assert unclip_here("keys", "add", str(keys), "bob", "--scope", "all").returncode == 2
    assert unclip_here("keys", "revoke", str(keys)).returncode == 2
    assert unclip_here("keys", "revoke", str(keys), "alice").returncode == 0
    assert read_keys(keys) == []
