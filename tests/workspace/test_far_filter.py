"""The rules of ``[filter]`` on a download in an object store: what is fetched for them."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.recipe.plan import make_plan
from pipeline.runtime.context import StepContext
from pipeline.runtime.filter import MeasureWorker
from tests.filter.planted import Planted, encode, pair, scene_picture, tiny_recipe
from tests.s3_server import S3Server

_WORDS = {"min_caption_words": 2}


@pytest.mark.parametrize(
    ("rules", "is_recorded", "reads_tar"),
    [
        ({}, True, False),
        (_WORDS, False, False),
        (_WORDS | {"languages": ["en"], "min_image_px": 64, "max_nsfw": 0.5}, False, False),
        ({"duplicates": "exact"}, True, False),
        ({"duplicates": "exact"}, False, True),
        (_WORDS | {"duplicates": "exact"}, False, False),  # only a row that is left out has no checksum
        ({"duplicates": "near"}, True, True),
    ],
)
def test_a_tar_is_fetched_only_for_a_rule_that_reads_pictures(
    *,
    rules: dict[str, Any],
    is_recorded: bool,
    reads_tar: bool,
    bucket: str,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    recipe = tiny_recipe(tmp_path, filter=rules, download={"extra_columns": ["punsafe"]})
    step = next(step for step in make_plan(recipe) if step.name == "filter")
    context = StepContext(recipe, step, f"{bucket}/w")
    planted = Planted({}, {})
    planted.add("long", "", pair("", "a red circle", encode(scene_picture(1)), punsafe=0.1))
    checksum = {} if is_recorded else {"sha256": None}
    planted.add("short", "", pair("", "circle", encode(scene_picture(2)), punsafe=0.1, **checksum))
    planted.write(context.inputs["download"])
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "of-another-machine"))
    worker = MeasureWorker(context)
    s3_server.counted()
    record = worker("00000")
    requests = Counter(one.kind for one in s3_server.counted() if one.name.endswith(".tar"))
    assert requests == ({"HEAD": 1, "GET": 1} if reads_tar else {})
    assert record.counts["ok"] == (1 if "min_caption_words" in rules else 2)
