"""Opt-outs of a host: robots.txt (RFC 9309), X-Robots-Tag, and TDM reservations (W3C TDMRep), as pure functions.

``robots.txt`` and ``/.well-known/tdmrep.json`` name paths by the same patterns: ``*`` stands for any characters, ``$``
for the end, and the longest pattern that matches decides. Patterns and paths are compared by their octets, so that it
does not matter which of them are percent-encoded. All that a host sends is read without an error: what is malformed
says nothing.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

ROBOTS_PATH = "/robots.txt"
TDM_PATH = "/.well-known/tdmrep.json"
MAX_BYTES = 512_000
"""Bytes of such a file that are read; RFC 9309 demands at least 500 KiB."""

_WITH_VALUE = frozenset({"max-image-preview", "max-snippet", "max-video-preview", "unavailable_after"})
"""Directives of X-Robots-Tag with a colon of their own."""
_AGENT = re.compile(r"\*|[a-z]\S*")
_ENCODED_MARK = re.compile(b"%3[Ff]")
_STARS = re.compile(rb"\*+")


def _octets(text: bytes) -> bytes:
    """The octets of a path or a pattern; an encoded question mark stays apart from the one that begins a query."""
    return unquote_to_bytes(_ENCODED_MARK.sub(b"%253F", text))


@dataclass(frozen=True, slots=True)
class Rule:
    """Whether the paths of one pattern may be fetched."""

    parts: tuple[bytes, ...]
    """Octets between the stars."""
    is_whole: bool
    """Whether the path ends with the last part."""
    is_allowed: bool

    @classmethod
    def of(cls, pattern: bytes, *, is_allowed: bool) -> Rule:
        """A rule from its pattern."""
        parts = tuple(map(_octets, _STARS.split(pattern.removesuffix(b"$"))))
        return cls(parts, pattern.endswith(b"$"), is_allowed)

    @property
    def length(self) -> int:
        """Octets of the pattern."""
        return sum(map(len, self.parts)) + len(self.parts) - 1 + self.is_whole

    def matches(self, octets: bytes) -> bool:
        """Whether a path with its query matches; nothing is tried twice, so many stars cost no time."""
        first, *others = self.parts
        if not octets.startswith(first):
            return False
        if not others:
            return not self.is_whole or len(octets) == len(first)
        place = len(first)
        for part in others[:-1]:
            begin = octets.find(part, place)
            if begin < 0:
                return False
            place = begin + len(part)
        if self.is_whole:
            return octets.endswith(others[-1]) and len(octets) - len(others[-1]) >= place
        return octets.find(others[-1], place) >= 0


@dataclass(frozen=True)
class PathRules:
    """Which paths may be fetched."""

    rules: tuple[Rule, ...] = ()

    def allows(self, target: str) -> bool:
        """Whether the rule with the longest pattern allows a path with its query; of equals, the one that allows."""
        octets = _octets(target.encode())
        matching = [(rule.length, rule.is_allowed) for rule in self.rules if rule.matches(octets)]
        return max(matching)[1] if matching else True


EVERYTHING = PathRules()
"""Allows every path."""
NOTHING = PathRules((Rule.of(b"/", is_allowed=False),))
"""Allows no path."""


def parse_robots(data: bytes, token: str) -> PathRules:
    """The rules of a robots.txt for one user agent.

    Args:
        data: The file, or its first ``MAX_BYTES``: then the line that is cut does not count.
        token: Product token of the user agent; groups that name it replace those of ``*``.
    """
    if len(data) >= MAX_BYTES:
        data = data[: max(data.rfind(b"\n"), data.rfind(b"\r")) + 1]
    ours = _product(token)
    groups: dict[str, list[Rule]] = {}
    agents = set[str]()  # of the group that is read, without those that do not matter: there may be thousands
    in_rules = False
    for line in re.split(b"[\r\n]+", data.removeprefix(codecs.BOM_UTF8)):
        field, _, value = (part.strip() for part in line.partition(b"#")[0].partition(b":"))
        field = field.lower()
        if field == b"user-agent":
            if in_rules:
                agents, in_rules = set(), False
            agent = _product(value.decode("utf-8", "replace"))
            if agent in {ours, "*"}:
                agents.add(agent)
                groups.setdefault(agent, [])
        elif field in {b"allow", b"disallow"}:
            in_rules = True
            if value and agents:
                rule = Rule.of(value, is_allowed=field == b"allow")
                for agent in agents:
                    groups[agent].append(rule)
    return PathRules(tuple(groups.get(ours, groups.get("*", []))))


def parse_tdm(data: bytes) -> PathRules:
    """The reservations of a ``tdmrep.json``; a file that is none reserves nothing.

    A list that was cut after ``MAX_BYTES`` reserves everything: its owner has more to say than is read.
    """
    if len(data) >= MAX_BYTES:
        return NOTHING if data.lstrip().startswith(b"[") else EVERYTHING
    try:
        entries: Any = json.loads(data)
    except (RecursionError, ValueError):
        return EVERYTHING
    rules = list[Rule]()
    for entry in entries if isinstance(entries, list) else []:
        location = entry.get("location") if isinstance(entry, dict) else None
        if isinstance(location, str) and location:
            is_reserved = entry.get("tdm-reservation") in (1, "1")
            rules.append(Rule.of(location.encode("utf-8", "replace"), is_allowed=not is_reserved))
    return PathRules(tuple(rules))


def reserves_rights(headers: Mapping[str, str]) -> bool:
    """Whether an answer has the header ``tdm-reservation: 1``."""
    return headers.get("tdm-reservation", "").strip() == "1"


def opting_directive(values: Iterable[str], token: str, directives: Collection[str]) -> str:
    """The directive by which ``X-Robots-Tag`` headers forbid a picture; empty if they do not.

    Args:
        values: The headers' values: ``directive, ...`` for all, or ``agent: directive, ...`` for one user agent.
            Some directives have values after a colon, too: ``max-snippet: 5``.
        token: Product token of the user agent.
        directives: Directives that forbid, in lower case.
    """
    ours = _product(token)
    for value in values:
        is_for_us = True
        for item in value.lower().split(","):
            start, colon, rest = (part.strip() for part in item.partition(":"))
            if colon and start not in {*_WITH_VALUE, *directives} and _AGENT.fullmatch(start):
                is_for_us, start = _product(start) in {"*", ours}, rest.partition(":")[0].strip()
            if is_for_us and start in directives:
                return start
    return ""


def _product(agent: str) -> str:
    """The name of a user agent, without its version."""
    return re.split(r"[\s/]", agent.strip().lower(), maxsplit=1)[0]
