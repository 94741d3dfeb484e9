"""Opt-outs of hosts: every spelling of a path is the same path, and nothing that a host sends is an error."""

import asyncio
import json
import re
import time
from dataclasses import replace
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import fetch
from pipeline.data.causes import FetchError
from pipeline.data.fetch import Fetcher
from pipeline.data.opt_outs import MAX_BYTES, opting_directive, parse_robots, parse_tdm
from pipeline.data.urls import AddressRules
from tests.data.fetching import CONFIG, NEAR, SPARE_S, cause_of, fetch_all
from tests.data.hostile import HostileServer

_DIRECTIVES = ("noai", "noindex")
_LETTERS = "ab/~.\u00e9\u732b*$?%"
_PATH = st.text(st.sampled_from(_LETTERS.replace("?", "").replace("%", "")), max_size=8).map(lambda path: f"/{path}")
_PATTERN = st.text(st.sampled_from("ab/~\u00e9*"), max_size=6).map(lambda pattern: f"/{pattern}")
_OTHER_ITEMS = st.sampled_from(
    ["all", "max-image-preview:large", "max-snippet: -1", "max-video-preview:0", "noarchive", "none of these",
     "unavailable_after: Wednesday, 03-Jun-26 15:00:00 GMT", "unavailable_after: 2026-06-03T15:00:00Z", ""]
)  # fmt: skip


def _allows(rule: str, target: str) -> bool:
    return parse_robots(f"User-agent: *\n{rule}\n".encode(), "unclip").allows(target)


def _encoded(text: str, safe: str) -> str:
    return quote(text, safe=safe)


@given(pattern=_PATTERN, is_whole=st.booleans(), path=_PATH, spellings=st.tuples(st.booleans(), st.booleans()))
def test_patterns_match_what_regular_expressions_do_however_both_are_encoded(
    pattern: str, is_whole: bool, path: str, spellings: tuple[bool, bool]
) -> None:
    end = "$" if is_whole else ""
    expected = re.match(".*".join(map(re.escape, pattern.split("*"))) + ("\\Z" if is_whole else ""), path, re.DOTALL)
    written = pattern if spellings[0] else _encoded(pattern, "*/")
    target = _encoded(path, "/~*$") if spellings[1] else "".join(f"%{octet:02x}" for octet in path.encode())
    assert _allows(f"Disallow: {written}{end}", target) == (expected is None), (written, target)


@pytest.mark.parametrize(
    ("pattern", "target", "is_allowed"),
    [
        ("/a%7eb/", "/a~b/c.jpg", False),
        ("/a~b/", "/a%7Eb/c.jpg", False),
        ("/caf\u00e9", "/caf%C3%A9/a.jpg", False),
        ("/foo/%62%61%7A", "/foo/baz", False),
        ("/?u=https://a", "/?u=https%3A%2F%2Fa", False),
        ("/*?", "/who%3F.jpg", True),
        ("/*?", "/who.jpg?size=1", False),
        ("/who%3f", "/who%3F.jpg", False),
        ("/a%2Ab", "/axxb", True),
        ("/a%2Ab", "/a*b", False),
        ("/price%24", "/price$/a.jpg", False),
        ("/%zz", "/%zz", False),
    ],
)
def test_octets_decide_and_not_how_they_are_written(pattern: str, target: str, is_allowed: bool) -> None:
    assert _allows(f"Disallow: {pattern}", target) == is_allowed
    location = [{"location": pattern, "tdm-reservation": 1}]
    assert parse_tdm(json.dumps(location).encode()).allows(target) == is_allowed


def test_a_path_of_a_robots_txt_that_is_no_utf_8_is_the_path_of_its_bytes() -> None:
    assert not parse_robots(b"User-agent: *\nDisallow: /caf\xe9", "unclip").allows("/caf%E9/a.jpg")


@pytest.mark.parametrize("agent", ["unclip", "UnClip/1.0", "Unclip 2"])
def test_a_group_names_its_agent_with_or_without_a_version(agent: str) -> None:
    rules = parse_robots(f"User-agent: *\nDisallow:\n\nUser-agent: {agent}\nDisallow: /".encode(), "unclip")
    assert not rules.allows("/a.jpg")


def test_a_robots_txt_of_many_rules_holds_nobody_up() -> None:
    lines = [f"Disallow: /*{number}*.gif$" for number in range(20_000)]
    rules = parse_robots("\n".join(["User-agent: *", *lines, "Disallow: /" + "*a" * 10_000]).encode(), "unclip")
    start = time.process_time()
    assert rules.allows("/" + "a" * 5000 + ".jpg")
    assert time.process_time() - start < 0.5


def test_a_robots_txt_of_many_agents_in_one_group_holds_nobody_up() -> None:
    agents = [f"User-agent: a{number}" for number in range(15_000)]
    lines = [*agents, "User-agent: unclip", "User-agent: *", *["Disallow: /x"] * 15_000, "Disallow: /private"]
    data = "\n".join(lines).encode()
    start = time.process_time()
    for token in ("unclip", "other"):
        rules = parse_robots(data, token)
        assert [rules.allows(path) for path in ("/private/a.jpg", "/a.jpg")] == [False, True]
    assert time.process_time() - start < 2


def test_the_start_of_a_robots_txt_that_is_too_long_counts_without_the_line_that_is_cut() -> None:
    start = b"\xef\xbb\xbfUser-agent: *\nDisallow: /private\n"
    filler = b"#" + b"x" * (MAX_BYTES - len(start) - 13) + b"\nDisallow: /"
    rules = parse_robots((start + filler + b"late")[:MAX_BYTES], "unclip")
    assert [rules.allows(path) for path in ("/private/a.jpg", "/a.jpg")] == [False, True]


def test_a_tdmrep_that_is_too_long_reserves_everything_and_a_page_in_its_place_nothing() -> None:
    entries = json.dumps([{"location": f"/{number}", "tdm-reservation": 1} for number in range(20_000)]).encode()
    assert not parse_tdm(entries[:MAX_BYTES]).allows("/a.jpg")
    assert parse_tdm((b"<html>" + entries)[:MAX_BYTES]).allows("/a.jpg")


@given(st.binary(max_size=60), st.text(max_size=20))
def test_any_bytes_are_read_without_an_error(data: bytes, token: str) -> None:
    for rules in (
        parse_robots(data, token),
        parse_robots(b"User-agent: *\nDisallow: " + data, token),
        parse_tdm(data),
        parse_tdm(b'[{"location": "' + data + b'", "tdm-reservation": 1}]'),
    ):
        assert rules.allows("/a.jpg?b=%zz") in {True, False}


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["location", "tdm-reservation"]), inner)
    ),
)


@given(_JSON)
def test_any_json_is_read_without_an_error(value: object) -> None:
    assert parse_tdm(json.dumps([value]).encode()).allows("/a.jpg") in {True, False}


def test_json_without_an_end_is_read_without_an_error() -> None:
    for text in (b"[" * 100_000, b'{"a":' * 50_000, b"[" + b"9" * 100_000 + b"]"):
        assert parse_tdm(text).allows("/a.jpg")


@given(before=st.lists(_OTHER_ITEMS, max_size=3), after=st.lists(_OTHER_ITEMS, max_size=3), token=st.just("unclip"))
def test_a_directive_is_found_between_any_others(before: list[str], after: list[str], token: str) -> None:
    assert opting_directive([", ".join([*before, "NoAI", *after])], token, _DIRECTIVES) == "noai"
    assert opting_directive([", ".join([*before, "unclip: noai", *after])], token, _DIRECTIVES) == "noai"
    others = ", ".join(["otherbot: noai", *after])
    assert not opting_directive([", ".join(before), others], token, _DIRECTIVES)
    assert opting_directive([f"{others}, UnClip/1: noindex"], token, _DIRECTIVES) == "noindex"


def test_robots_txt_is_asked_for_once_and_decides_by_path(hostile: HostileServer) -> None:
    hostile.robots["127.0.0.1"] = "User-agent: *\nDisallow: /ok\nAllow: /ok?seed=7$\n"
    hostile.robots["127.0.0.2"] = "User-agent: *\nAllow: /\n\nUser-agent: UnClip\nDisallow: /*seed=3\n"
    hostile.robots["127.0.0.3"] = "status 503 Busy"
    paths = [f"/ok?seed={seed}" for seed in (3, 7)]
    urls = [f"http://127.0.0.{host}:{hostile.port}{path}" for host in (1, 2, 3) for path in paths]
    expected = ["robots-txt", "picture", "robots-txt", "picture", "robots-txt", "robots-txt"]
    results = fetch_all(urls)
    assert ["picture" if isinstance(one, bytes) else one.cause for one in results] == expected
    assert [hostile.requests[f"127.0.0.{host}/robots.txt"] for host in (1, 2, 3)] == [1, 1, 1]
    assert all(isinstance(one, bytes) for one in fetch_all(urls, replace(CONFIG, robots_txt=False)))


def test_a_robots_txt_counts_as_far_as_it_is_read_and_one_that_cannot_be_read_allows_nothing(
    hostile: HostileServer,
) -> None:
    hostile.robots["127.0.0.1"] = "User-agent: *\nDisallow: /ok?seed=3\n" + "# long\n" * 100_000
    hostile.robots["127.0.0.2"], hostile.robots["127.0.0.3"] = "cut", "garbage"
    paths = [(1, "/ok?seed=3"), (1, "/ok?seed=7"), (2, "/ok"), (3, "/ok")]
    results = fetch_all([f"http://127.0.0.{host}:{hostile.port}{path}" for host, path in paths])
    details = [one.detail if isinstance(one, FetchError) else "picture" for one in results]
    assert details == ["", "picture", "it cannot be read: body-cut", "it cannot be read: protocol"]
    assert {one.cause for one in results if isinstance(one, FetchError)} == {"robots-txt"}


def test_the_rules_of_hosts_take_no_more_memory_than_they_may(
    hostile: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = "".join(f"Disallow: /private/{number}\n" for number in range(100))
    for host in (1, 2, 3):
        hostile.robots[f"127.0.0.{host}"] = f"User-agent: *\n{rules if host < 3 else ''}"
    monkeypatch.setattr(fetch, "_MOST_POLICY_BYTES", 30_000)  # of one host with so many rules

    async def run() -> None:
        async with Fetcher(CONFIG, AddressRules(NEAR)) as fetcher:
            for host in (1, 3, 1, 2, 3, 2, 1):
                (await fetcher.fetch(f"http://127.0.0.{host}:{hostile.port}/ok")).close()

    asyncio.run(run())
    assert [hostile.requests[f"127.0.0.{host}/robots.txt"] for host in (1, 2, 3)] == [2, 1, 1]


def test_a_redirect_does_not_lead_around_robots_txt(hostile: HostileServer) -> None:
    hostile.robots["127.0.0.2"] = "User-agent: *\nDisallow: /\n"
    (result,) = fetch_all([f"{hostile.url}/to?url=http://127.0.0.2:{hostile.port}/ok"])
    assert cause_of(result) == "robots-txt"


def test_a_host_that_does_not_answer_for_robots_txt_costs_its_rows_one_wait(hostile: HostileServer) -> None:
    hostile.robots["127.0.0.2"] = "stall"
    start = time.monotonic()
    results = fetch_all([f"http://127.0.0.2:{hostile.port}/ok?seed={seed}" for seed in range(50)])
    assert {cause_of(result) for result in results} == {"timeout"}
    assert time.monotonic() - start < CONFIG.deadline_s + SPARE_S
    assert hostile.requests["127.0.0.2/robots.txt"] == 1


def test_reservations_of_text_and_data_mining_are_honoured(hostile: HostileServer) -> None:
    hostile.tdm["127.0.0.1"] = (
        '[{"location": "/ok*", "tdm-reservation": 1}, {"location": "/ok?seed=7", "tdm-reservation": 0}]'
    )
    hostile.tdm["127.0.0.2"], hostile.tdm["127.0.0.3"] = "not JSON", "[" * 100_000
    urls = [f"http://127.0.0.{host}:{hostile.port}/ok?seed={seed}" for host, seed in ((1, 3), (1, 7), (2, 3), (3, 3))]
    causes = ["picture" if isinstance(one, bytes) else one.cause for one in fetch_all(urls)]
    assert causes == ["tdm", "picture", "picture", "picture"]
    assert all(isinstance(one, bytes) for one in fetch_all(urls, replace(CONFIG, tdm_reservation=False)))
