"""Tars that are taken in: when too few of their pictures can be decoded."""

from collections import Counter

import pytest

from pipeline.errors import DataError
from pipeline.runtime.taken_in import require_pictures


@pytest.mark.parametrize(
    ("num_ok", "causes", "message"),
    [
        (0, {"not a picture": 4}, "only 0 of 4 pictures .* 4 x not a picture"),
        (1, {"not a picture": 2, "image file is truncated": 1, "forgotten": 6}, "only 1 of 4 .*: 2 x .*; 1 x "),
        (2, {"not a picture": 2, "forgotten": 6}, ""),
        (0, {"forgotten": 3}, ""),
    ],
)
def test_tars_with_few_whole_pictures_are_refused_and_forgotten_pairs_do_not_count(
    num_ok: int, causes: dict[str, int], message: str
) -> None:
    counts = {"in": num_ok + sum(causes.values()), "ok": num_ok}
    if not message:
        require_pictures(counts, Counter(causes), 0.5)
        return
    with pytest.raises(DataError, match=message):
        require_pictures(counts, Counter(causes), 0.5)
