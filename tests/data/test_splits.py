"""A shard in parts: the rows that take workers down are found, whatever they are."""

import json

from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.splits import Split


def _run(num_rows: int, killers: set[int], *, losses: set[int] = frozenset()) -> tuple[Split, int]:  # type: ignore[assignment]
    """Make all parts; a worker dies at a killer's row, and once more at the steps that ``losses`` names."""
    split, num_losses, steps = Split([(0, num_rows)]), 0, 0
    while True:
        split = Split.from_dict(json.loads(json.dumps(split.to_dict())))  # as it goes through its file
        part = split.begin()
        if part is None:
            return split, num_losses
        steps += 1
        if any(part[0] <= row < part[1] for row in killers) or steps in losses:
            split.lose()
            num_losses += 1
        else:
            split.finish()


@given(st.integers(1, 300), st.data())
def test_exactly_the_rows_that_take_workers_down_are_found(num_rows: int, data: st.DataObject) -> None:
    killers = data.draw(st.sets(st.integers(0, num_rows - 1), max_size=3))
    split, num_losses = _run(num_rows, killers)
    assert set(split.killers) == killers
    made = [row for start, stop in split.done for row in range(start, stop)]
    assert sorted([*made, *killers]) == list(range(num_rows))
    assert num_losses <= len(killers) * (num_rows.bit_length() + 2)


@given(st.integers(2, 60), st.integers(1, 12))
def test_a_worker_that_is_lost_for_another_reason_costs_no_row(num_rows: int, step: int) -> None:
    split, _ = _run(num_rows, set(), losses={step})
    assert split.killers == []
    assert sum(stop - start for start, stop in split.done) == num_rows


def test_a_part_that_was_running_when_the_driver_was_lost_is_made_again() -> None:
    split = Split([(0, 4)])
    assert split.begin() == (0, 4)
    assert Split.from_dict(split.to_dict()).begin() == (0, 4)
