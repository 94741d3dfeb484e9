"""Opt-outs of a host: robots.txt (RFC 9309), X-Robots-Tag, and TDM reservations (W3C TDMRep), as pure functions.

``robots.txt`` and ``/.well-known/tdmrep.json`` name paths by the same patterns: ``*`` stands for any characters, ``$``
for the end, and the longest pattern that matches decides.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ROBOTS_PATH = "/robots.txt"
TDM_PATH = "/.well-known/tdmrep.json"
MAX_BYTES = 512_000
"""Bytes of such a file that are read; RFC 9309 demands at least 500 KiB."""


@dataclass(frozen=True)
class PathRules:
    """Which paths may be fetched."""

    rules: tuple[tuple[str, bool], ...] = ()
    """Pattern of a path, and whether it is allowed."""

    def allows(self, target: str) -> bool:
        """Whether the rule with the longest pattern allows a path with its query; of equals, the one that allows."""
        matching = [(len(pattern), allowed) for pattern, allowed in self.rules if _regex(pattern).match(target)]
        return max(matching)[1] if matching else True


EVERYTHING = PathRules()
"""Allows every path."""
NOTHING = PathRules((("/", False),))
"""Allows no path."""


def parse_robots(text: str, token: str) -> PathRules:
    """The rules of a robots.txt for one user agent.

    Args:
        text: The file.
        token: Product token of the user agent; groups that name it replace those of ``*``.
    """
    groups: dict[str, list[tuple[str, bool]]] = {}
    agents: list[str] = []
    in_rules = False
    for line in text.lstrip("\ufeff").splitlines():
        field, _, value = (part.strip() for part in line.partition("#")[0].partition(":"))
        field = field.lower()
        if field == "user-agent":
            if in_rules:
                agents, in_rules = [], False
            agents.append(value.lower())
            groups.setdefault(value.lower(), [])
        elif field in {"allow", "disallow"}:
            in_rules = True
            if value:
                for agent in agents:
                    groups[agent].append((value, field == "allow"))
    return PathRules(tuple(groups.get(token.lower(), groups.get("*", []))))


def parse_tdm(data: bytes) -> PathRules:
    """The reservations of a ``tdmrep.json``; a file that is none reserves nothing."""
    try:
        entries: Any = json.loads(data)
    except ValueError:
        return EVERYTHING
    entries = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    rules = [(str(entry.get("location", "")), str(entry.get("tdm-reservation")) != "1") for entry in entries]
    return PathRules(tuple(rule for rule in rules if rule[0]))


def reserves_rights(headers: Mapping[str, str]) -> bool:
    """Whether an answer has the header ``tdm-reservation: 1``."""
    return headers.get("tdm-reservation", "").strip() == "1"


def opting_directive(values: Iterable[str], token: str, directives: Collection[str]) -> str:
    """The directive by which ``X-Robots-Tag`` headers forbid a picture; empty if they do not.

    Args:
        values: The headers' values: ``directive, ...`` for all, or ``agent: directive, ...`` for one user agent.
        token: Product token of the user agent.
        directives: Directives that forbid.
    """
    for value in values:
        agent, colon, rest = value.partition(":")
        if colon and agent.strip().lower() != token.lower():
            continue
        for directive in (rest if colon else value).split(","):
            if directive.strip().lower() in directives:
                return directive.strip().lower()
    return ""


@functools.lru_cache(maxsize=4096)
def _regex(pattern: str) -> re.Pattern[str]:
    is_whole = pattern.endswith("$")
    parts = (pattern[:-1] if is_whole else pattern).split("*")
    # Groups that cannot be given back: a pattern of many stars must not take exponential time.
    body = re.escape(parts[0]) + "".join(f"(?>.*?{re.escape(part)})" for part in parts[1:-1])
    if len(parts) == 1:
        return re.compile(body + ("$" if is_whole else ""), re.DOTALL)
    last = re.escape(parts[-1])
    return re.compile(f"{body}.*{last}$" if is_whole else f"{body}.*?{last}", re.DOTALL)
