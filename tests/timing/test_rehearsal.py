"""The times of data steps are those of the real ones, whatever the rows of a rehearsal are."""

import io
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from pipeline.data.make_pairs import write_pairs
from pipeline.data.pairs import Pairs
from pipeline.data.sources import source_of
from pipeline.data.tars import take_in
from pipeline.recipe.recipe import parse_recipe
from pipeline.timing.rehearsal import Rehearsal
from pipeline.workspace.store import Artifact
from tests.tiny.recipe import tiny_tables


def _write_tar(path: Path, num_samples: int) -> None:
    """A tar of one picture under many keys, each with a caption of its own."""
    stream = io.BytesIO()
    Image.effect_noise((96, 96), 50).convert("RGB").save(stream, "JPEG")
    with tarfile.open(path, "w") as tar:
        for number in range(num_samples):
            for suffix, data in (("jpg", stream.getvalue()), ("txt", f"caption {number}".encode())):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_the_time_of_shards_is_that_of_whole_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.timing.rehearsal.NUM_ROWS", 16)
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, num_samples in enumerate((1200, 8)):
        _write_tar(folder / f"{number}.tar", num_samples)
    recipe = parse_recipe(tiny_tables(tmp_path / "w", pairs={"source": "shards", "path": str(folder)}))
    pairs, shards = Artifact(str(tmp_path / "pairs")), Artifact(str(tmp_path / "shards-taken"))
    times = [time.perf_counter()]
    write_pairs(source_of(recipe), pairs)
    times.append(time.perf_counter())
    take_in(str(folder / "0.tar"), Pairs(pairs).part("00000"), "00000", shards)
    times.append(time.perf_counter())

    rehearsal = Rehearsal(recipe, tmp_path / "rehearsal", {})
    for units, start, end in zip((rehearsal.pairs(), rehearsal.download()), times, times[1:], strict=False):
        # For each of its 16 rows, the time of the whole tar was 75 times as long.
        assert (end - start) / 1200 / 5 < units.row_s < (end - start) / 1200 * 5
        assert units.fixed_s == 0
    assert rehearsal.num_good == rehearsal.num_pairs == 16  # the other steps are rehearsed on these
