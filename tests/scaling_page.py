"""The table of docs/scaling.md that counts requests by hand."""

import re

from tests.s3_server import Request
from tests.tiny.command import ROOT

_BY_THE_CLOCK = re.compile(r"/\.lock|/live/(progress\.json|shard-|stop)|/metrics\.jsonl")
_TERM = re.compile(r"(?:(\d+) N)?(?: \+ )?(\d+)?")


def counted_by_hand() -> dict[str, dict[str, tuple[int, int]]]:
    """Requests for each shard and for the step, by step and kind."""
    lines = (ROOT / "docs/scaling.md").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| step | GET |"))
    kinds = [cell.strip() for cell in lines[first].strip("|").split("|")][1:]
    table: dict[str, dict[str, tuple[int, int]]] = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        step, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        terms = [_TERM.fullmatch(cell) for cell in cells]
        assert all(terms), line
        table[step] = {
            kind: (int(term[1] or 0), int(term[2] or 0)) for kind, term in zip(kinds, terms, strict=True) if term
        }
    return table


def by_the_clock(request: Request) -> bool:
    """Whether a request is made every few seconds, as long as a step runs: the table leaves it out."""
    return bool(_BY_THE_CLOCK.search(request.name))
