"""Filters by column: what passes, and by which name a wrong one is refused."""

import pyarrow as pa
import pytest

from pipeline.errors import ConfigError
from pipeline.retrieve.where import parse_filter

_ROWS = pa.table(
    {
        "width": pa.array([100, 512, None, 70_000], pa.int32()),
        "height": pa.array([100, 700, 3, 50_000], pa.int32()),
        "split": ["train", "validation", "train", None],
        "caption": ["a Cat", "dog", "x", None],
        "similarity": ["0.3", "abc", " -1e-3", ""],
        "clip score": pa.array([0.1, 0.2, 0.3, 0.4], pa.float32()),
        "is_photo": [True, False, None, True],
        "num_bytes": pa.array([20_000_001, 0, None, 2**53 + 1], pa.int64()),
        "hash": pa.array([2**63, 1, 2, None], pa.uint64()),
    }
)
_FIELDS = {field.name: field.type for field in _ROWS.schema}


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("width >= 512", [1, 3]),
        ("width>=512 and split == 'validation'", [1]),
        ("not split == 'train'", [1]),  # a missing value fulfils neither a comparison nor its opposite
        ("256 <= width < 600 or height == 3", [1, 2]),
        ("width / height > 1.3", [3]),
        ("width * height >= 512*512", [1, 3]),  # 3.5e9 does not fit into int32
        ("`clip score` > 0.25", [2, 3]),
        ("contains(caption, 'cat')", [0]),
        ("number(similarity) > -1", [0, 2]),
        ("split in ('train', 'x')", [0, 2]),
        ("split not in ['train']", [1]),
        ("caption is None", [3]),
        ("caption is not None", [0, 1, 2]),
        ("is_photo", [0, 3]),
        ("length(caption) < 4 and not is_photo", [1]),
        ("lower(caption) == 'a cat'", [0]),
        ("matches(caption, '^.o')", [1]),
        ("width > -5", [0, 1, 3]),
        # Integers beyond what a float holds exactly: Arrow takes the smallest float type, and refused them.
        ("num_bytes > 0.5", [0, 3]),
        ("20000000.5 < num_bytes", [0, 3]),
        ("num_bytes >= number(similarity)", [0]),
        ("num_bytes not in (0.5, 0)", [0, 3]),
        ("num_bytes + 1 > width", [0, 3]),
        ("num_bytes == 9007199254740993", [3]),
        ("width / num_bytes < 1", [0, 3]),  # a division by zero is a missing value
    ],
)
def test_a_filter_keeps_the_rows_for_which_it_holds(text: str, passes: list[int]) -> None:
    kept = parse_filter(text, _FIELDS).keep(_ROWS)
    assert [row for row, is_kept in enumerate(kept) if is_kept] == passes


def test_a_value_that_cannot_be_compared_is_one_message() -> None:
    with pytest.raises(ConfigError, match=r"--where 'hash < 5': cannot be computed: Integer value 9223372036854775808"):
        parse_filter("hash < 5", _FIELDS).keep(_ROWS)


def test_a_filter_names_the_columns_that_it_reads() -> None:
    assert parse_filter("`clip score` > 0.2 and width < 3 or width > 5", _FIELDS).columns == ("clip score", "width")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("widht >= 3", "no column 'widht'; do you mean width?"),
        ("width >= 'a'", "\"width >= 'a'\" cannot be computed: width is a number"),
        ("width > 3 and similarity > 0.3", "'similarity > 0.3' cannot be computed: similarity is text; number(NAME)"),
        ("width + caption > 3", "'width + caption' cannot be computed"),
        ("matches(caption, '(')", "Invalid regular expression"),
        ("width = 5", "two values are compared with =="),
        ("width >= 5 AND height > 3", "small letters"),
        ("width >", "for example: --where"),
        ("", "for example: --where"),
        ("width", "'width' cannot be computed"),
        ("split in 'train'", "needs a list after `in`"),
        ("caption is 5", "can only ask `is None`"),
        ("contains(caption)", "wrong number of arguments"),
        ("foo(width)", "is no function of a filter; there are contains"),
        ("__import__('os').system('true')", "is no function of a filter"),
        ("width.real > 3", "'width.real' is neither a column"),
        ("caption == None", "'None' is neither a column"),
        ("`clip score` ** 2 > 3", "'`clip score` ** 2' is neither"),
        ("width == 99999999999999999999", "is neither a column, a number"),
        ("1 < 2", "reads no column"),
        ("(" * 300 + "width" + ")" * 300, "too many nested parentheses"),
        ("width > 3\0", "null bytes"),
    ],
)
def test_a_wrong_filter_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_filter(text, _FIELDS)
    assert words in str(caught.value)
