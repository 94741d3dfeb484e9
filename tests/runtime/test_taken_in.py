"""Tars that are taken in: pictures that cannot be decoded, and when they are too many."""

import contextlib
import io
import os
import signal
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data import decoders
from pipeline.data.make_pairs import write_pairs
from pipeline.data.resize import StoredPicture
from pipeline.data.sources import Source
from pipeline.errors import DataError
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import parse_recipe
from pipeline.runtime.context import StepContext
from pipeline.runtime.taken_in import TakeInWorker, require_pictures
from tests.data.conftest import make_picture
from tests.tiny.recipe import tiny_tables


def _large_png() -> bytes:
    """A picture that keeps a decoder busy for a while."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _context(folder: Path, pictures: Sequence[bytes], **download: Any) -> StepContext:
    """The take-in of a tar of pictures, of which the list is made."""
    (folder / "in").mkdir()
    with tarfile.open(folder / "in/0.tar", "w") as tar:
        for number, picture in enumerate(pictures):
            for name, data in ((f"{number}.jpg", picture), (f"{number}.txt", b"text")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    pairs = {"source": "shards", "path": str(folder / "in")}
    recipe = parse_recipe(tiny_tables(folder / "w", pairs=pairs, download=download))
    steps = [StepContext(recipe, step, recipe.workspace) for step in make_plan(recipe, until="download")]
    write_pairs(Source(recipe.pairs), steps[0].output)
    return steps[-1]


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (signal.SIGKILL, "killer: its decoder ended with status -9"),
        (signal.SIGSTOP, "killer: decoding took longer than 3 s"),
    ],
)
def test_a_picture_that_takes_its_decoder_down_or_keeps_it_busy_is_a_row_with_a_cause(
    end: signal.Signals, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, large = decoders._Decoder._answer, _large_png()

    async def end_at_one(decoder: Any, number: int) -> StoredPicture:
        if decoder._asked[number][1] == large:
            os.kill(decoder._process.pid, end)
        return await answer(decoder, number)

    monkeypatch.setattr(decoders, "_LIMIT_S", 3.0)
    monkeypatch.setattr(decoders._Decoder, "_answer", end_at_one)
    context = _context(tmp_path, [large, *map(make_picture, range(4))])
    with contextlib.closing(TakeInWorker(context)) as worker:
        record = worker("00000")
    assert record.counts == {"in": 5, "ok": 4, "failed_to_resize": 1}
    assert record.causes == {"killer": 1}
    rows = pq.read_table(context.output.path("00000.parquet")).to_pylist()
    assert [row["error_message"] for row in rows] == [message, None, None, None, None]
    assert [(row["width"], row["height"]) for row in rows] == [(None, None), *[(96, 64)] * 4]


def test_a_picture_of_a_tar_has_the_area_of_the_recipe_and_the_memory_of_its_readers(tmp_path: Path) -> None:
    pictures = [make_picture(0), make_picture(1, size=(400, 300)), _large_png()]
    context = _context(tmp_path, pictures, max_memory_bytes=20_000, max_image_area_px=1e6)
    with contextlib.closing(TakeInWorker(context)) as worker:
        record = worker("00000")
    assert record.counts == {"in": 3, "ok": 2, "failed_to_resize": 1}
    assert record.causes == {"image area too large": 1}


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
