"""The file of keys: who comes in with it, its mistakes, and its changes."""

import json
import os
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from pipeline.errors import ConfigError, StepError
from pipeline.serve import keeper
from pipeline.serve.gate import Gate
from pipeline.serve.guards import Guards
from pipeline.serve.keys import Key, KeyRing, Meter, add_key, read_keys, revoke_key
from tests.serve.guarded import ask, client_of, guarded
from tests.tiny.command import ROOT, unclip_here


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


def test_the_page_says_what_is_open_and_what_a_search_opens(keys: Path) -> None:
    about = (ROOT / "docs/serving.md").read_text().partition("**Keys.**")[2].partition("\n\n")[0]
    of_search = _paths(about.partition("`search` (")[2].partition(")")[0])
    are_open = _paths(about.partition("The page, ")[2].partition("open.")[0]) | {"/"}
    table = (ROOT / "docs/http.md").read_text().partition("| route |")[2].partition("\n\n")[0]
    routes = re.findall(r"`(GET|POST) (/[^`]*)`", table)
    key = add_key(keys, "bob", ["search"])
    app = guarded(keys=keys)
    without_key, with_key = (
        {path: client_of(app, one).request(way, path) for way, path in routes} for one in ("", key)
    )
    assert {path for path, answer in without_key.items() if answer.status_code != 401} == are_open
    opened = {path for path, answer in with_key.items() if answer.status_code != 403}
    assert opened == are_open | of_search | {path for path in with_key if path.startswith("/v1/models")}


def _paths(text: str) -> set[str]:
    return set(re.findall(r"`(/[^`]*)`", text))


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


def test_the_keys_command_adds_lists_and_revokes(keys: Path) -> None:
    added = unclip_here("keys", "add", str(keys), "alice", "--scope", "images", "--requests", "60")
    assert added.stdout.startswith("unclip-")
    assert "alice" in unclip_here("keys", "list", str(keys)).stdout
    assert added.stdout.strip() not in unclip_here("keys", "list", str(keys)).stdout
    assert unclip_here("keys", "add", str(keys), "bob", "--scope", "all").returncode == 2
    assert unclip_here("keys", "revoke", str(keys)).returncode == 2
    assert unclip_here("keys", "revoke", str(keys), "alice").returncode == 0
    assert read_keys(keys) == []
