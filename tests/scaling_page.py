"""The tables of docs/scaling.md that count requests by hand."""

import math
import re

from tests.s3_server import Request
from tests.tiny.command import ROOT

PAGE_NAMES = 1000
"""Files of a page: what one LIST names, and one DELETE removes."""
_BY_THE_CLOCK = re.compile(r"/\.lock|/live/((progress|pulse)\.json|shard-|stop)|/metrics\.jsonl")
_TERM = re.compile(r"(?:(\d+) )?(?:([NBEQ])|P\(([^)]*)\))|(\d+)")


def counted_by_hand() -> dict[str, dict[str, str]]:
    """The cells by step and kind of request, see ``value``."""
    return _table("| step | GET |")


def asked_by_the_clock() -> dict[str, dict[str, str]]:
    """The cells by what asks; "every s" is how often, the others are kinds of requests."""
    return _table("| by the clock |")


def _table(begin: str) -> dict[str, dict[str, str]]:
    """The cells of the table that begins so, by the first cell of their row and the name of their column."""
    lines = (ROOT / "docs/scaling.md").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(begin))
    kinds = [cell.strip() for cell in lines[first].strip("|").split("|")][1:]
    table: dict[str, dict[str, str]] = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        step, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        table[step] = dict(zip(kinds, cells, strict=True))
    return table


def value(cell: str, letters: dict[str, int], page_names: int = PAGE_NAMES) -> int:
    """What a cell comes to: a sum of numbers, of multiples of letters, and of multiples of P(files), which are pages.

    Args:
        cell: Such as ``2 N + 3 P(4 N + 2) + 7``.
        letters: What N, B, E and Q stand for.
        page_names: Files of a page.
    """
    total = 0
    for text in re.split(r" \+ (?![^(]*\))", cell):
        term = _TERM.fullmatch(text)
        assert term, cell
        times, letter, files, number = term.groups()
        if number:
            total += int(number)
        else:
            one = math.ceil(value(files, letters) / page_names) if files else letters[letter]
            total += int(times or 1) * one
    return total


def by_the_clock(request: Request) -> bool:
    """Whether a request is made every few seconds, as long as a step runs: the table leaves it out."""
    return bool(_BY_THE_CLOCK.search(request.name))
