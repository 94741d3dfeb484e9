"""The sums that docs/scaling.md says in words are those of its table."""

import re
from typing import Any

import pytest

from tests.scaling_page import counted_by_hand, value
from tests.tiny.command import ROOT

_THOUSAND = {"N": 1000, "Q": 1000, "B": 32, "E": 0}
"""A thousand shards, queries in each, bundles of 32 shards, and no examples of the filter."""


@pytest.mark.parametrize(
    ("steps", "begin"),
    [
        (("download", "embed", "index", "decoder"), "A thousand shards (10 million pairs)"),
        (("filter",), "The filter adds"),
    ],
)
def test_the_sums_of_a_thousand_shards_are_those_of_the_table(steps: tuple[str, ...], begin: str) -> None:
    sentence = (ROOT / "docs/scaling.md").read_text().partition(begin)[2].partition(" DELETE")[0] + " DELETE"
    words = re.findall(r"([\d,]+) (ranged GET|GET|HEAD|PUT|LIST|DELETE)", sentence)
    said = {kind: int(number.replace(",", "")) for number, kind in words}
    table: Any = counted_by_hand()
    assert said == {kind: sum(value(table[step][kind], _THOUSAND) for step in steps) for kind in said}
    assert len(said) == 6
