"""The times of data steps are those of the real ones, whatever the rows of a rehearsal are."""

import io
import os
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.data.decoders import Measures, _Decoder
from pipeline.data.download import Downloader
from pipeline.data.make_pairs import write_pairs
from pipeline.data.pairs import Pairs
from pipeline.data.sources import source_of
from pipeline.data.tars import take_in
from pipeline.errors import DataError, StepError
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.timing.companion import companions
from pipeline.timing.measure import measure
from pipeline.timing.rehearsal import Rehearsal
from pipeline.timing.units import RowUnits
from pipeline.workspace.store import Artifact
from tests.tiny.companions import start_no_companion
from tests.tiny.recipe import tiny_tables


def _picture() -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((96, 96), 50).convert("RGB").save(stream, "JPEG")
    return stream.getvalue()


def _write_tar(path: Path, num_samples: int) -> None:
    """A tar of one picture under many keys, each with a caption of its own."""
    picture = _picture()
    with tarfile.open(path, "w") as tar:
        for number in range(num_samples):
            for suffix, data in (("jpg", picture), ("txt", f"caption {number}".encode())):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_the_time_of_shards_is_that_of_whole_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.timing.rehearsal.NUM_ROWS", 16)
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, num_samples in enumerate((1200, 8)):
        _write_tar(folder / f"{number}.tar", num_samples)
    tables = {"pairs": {"source": "shards", "path": str(folder)}, "download": {"resources": {"cpus_per_worker": 2.0}}}
    recipe = parse_recipe(tiny_tables(tmp_path / "w", **tables))
    decoders, start_decoder = list[Any](), _Decoder.start

    async def start(decoder: Any) -> None:
        decoders.append(decoder)
        await start_decoder(decoder)

    rehearsal = Rehearsal(recipe, tmp_path / "rehearsal", {})
    with monkeypatch.context() as patch:
        patch.setattr(_Decoder, "start", start)
        units = [rehearsal.pairs(), rehearsal.download()]
    assert len(decoders) == 2  # as many as the step's workers have

    pairs, shards = Artifact(str(tmp_path / "pairs")), Artifact(str(tmp_path / "shards-taken"))
    times = [time.perf_counter()]
    write_pairs(source_of(recipe), pairs)
    times.append(time.perf_counter())
    with Measures(recipe.download) as measures:
        times[-1] = time.perf_counter()
        take_in(str(folder / "0.tar"), Pairs(pairs).part("00000"), "00000", shards, measures)
    times.append(time.perf_counter())
    for unit, begin, end in zip(units, times, times[1:], strict=False):
        # For each of its 16 rows, the time of the whole tar was 75 times as long.
        assert (end - begin) / 1200 / 60 < unit.row_s < (end - begin) / 1200 * 60
        assert unit.fixed_s == 0
    assert rehearsal.num_good == rehearsal.num_pairs == 16  # the other steps are rehearsed on these


class _Handler(BaseHTTPRequestHandler):
    """Answers with a picture after as many seconds as the path ends with."""

    def do_GET(self) -> None:
        if "/robots.txt" in self.path or ".well-known" in self.path:
            self.send_error(404)
            return
        server: Any = self.server
        server.requests.append(self.path)
        if self.path.startswith("/gone/"):
            self.send_error(404)
            return
        time.sleep(float(self.path.rpartition("-")[2]))
        data = _picture()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *_: Any) -> None:
        del format


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, requests: list[str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests = requests


@pytest.fixture
def requests() -> list[str]:
    """The pictures that the server is asked for."""
    return []


@pytest.fixture
def address(requests: list[str]) -> Generator[str]:
    """A server of pictures that come late."""
    server = _Server(requests)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def _list_recipe(folder: Path, urls: list[str], num_connections: int, **resources: float) -> Recipe:
    (folder / "pairs.csv").write_text("url,caption\n" + "".join(f"{url},a\n" for url in urls))
    resources |= {"num_connections": num_connections}
    download = {"allowed_networks": ["127.0.0.0/8"], "resources": resources}
    pairs = {"source": "list", "path": str(folder / "pairs.csv")}
    return parse_recipe(tiny_tables(folder / "w", pairs=pairs, download=download))


def _download(recipe: Recipe, folder: Path) -> RowUnits:
    rehearsal = Rehearsal(recipe, folder, {})
    rehearsal.pairs()
    return rehearsal.download()


def _download_row_s(recipe: Recipe, folder: Path) -> float:
    return _download(recipe, folder).row_s


def test_one_slow_url_holds_up_its_own_connection_alone(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.timing.rehearsal._DEADLINE_S", 4.0)
    urls = [f"{address}/{row}-0" for row in range(63)]
    walls_s, download = list[float](), Downloader.download

    def timed(*args: Any, **options: Any) -> Counter[str]:
        start = time.monotonic()
        counts = download(*args, **options)
        walls_s.append(time.monotonic() - start)
        return counts

    monkeypatch.setattr(Downloader, "download", timed)
    row_s = _download_row_s(_list_recipe(tmp_path, [*urls, f"{address}/dead-60"], 64), tmp_path / "rehearsal")
    assert row_s < 0.7 * walls_s[0] / 64  # on a busy machine the other rows wait for two seconds, too


def test_rows_wait_for_slow_hosts_as_many_at_a_time_as_there_are_connections(address: str, tmp_path: Path) -> None:
    urls = [f"{address}/{row}-0.2" for row in range(16)]
    assert _download_row_s(_list_recipe(tmp_path, urls, 2), tmp_path / "rehearsal") >= 0.2 / 2


@pytest.mark.parametrize("num_connections", [32, 1024])
def test_dead_hosts_take_the_deadline_of_a_real_run(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_connections: int
) -> None:
    monkeypatch.setattr("pipeline.timing.rehearsal._DEADLINE_S", 1.0)
    urls = [f"{address}/{row}-{seconds}" for row in range(16) for seconds in (0, 60)]
    recipe = _list_recipe(tmp_path, urls, num_connections)
    waits_s = 16 * recipe.download.deadline_s
    seconds = _download_row_s(recipe, tmp_path / "rehearsal") * 32
    assert seconds >= waits_s / num_connections
    assert (seconds >= waits_s / 32) == (num_connections == 32)  # a real run has rows for all of them


@pytest.mark.parametrize(("limits", "row_s"), [({"max_rate_per_host": 50.0}, 1 / 50), ({"max_per_host": 1}, 0.05)])
def test_more_workers_do_not_shorten_what_a_limited_host_holds_up(
    address: str, tmp_path: Path, limits: dict[str, float], row_s: float
) -> None:
    recipe = _list_recipe(tmp_path, [f"{address}/{row}-0.05" for row in range(24)], 64, num_workers=16, **limits)
    unit = _download(recipe, tmp_path / "rehearsal")
    assert unit.unshared_row_s + unit.row_s / 16 >= 0.8 * row_s
    assert unit.row_s < 24 * row_s / 2  # the waits for turns are no part of it


def test_few_rows_of_a_limited_host_are_fetched_and_stand_for_all(
    address: str, requests: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.timing.limited_hosts._REQUESTS_S", 0.2)
    urls = [f"{address}/{row}-0" for row in range(64)]
    limits = {"num_workers": 16, "max_rate_per_host": 100.0}
    rehearsal = Rehearsal(_list_recipe(tmp_path, urls, 64, **limits), tmp_path / "rehearsal", {})
    rehearsal.pairs()
    unit = rehearsal.download()
    assert len(requests) == 20
    assert (rehearsal.num_good, rehearsal.num_read) == (64, 64)
    assert unit.unshared_row_s + unit.row_s / 16 == pytest.approx(max(1 / 100, unit.row_s / 16))


@pytest.mark.parametrize("live", [1, 15])
def test_a_limited_host_with_many_dead_links_is_asked_for_other_rows(
    address: str, requests: list[str], tmp_path: Path, live: int
) -> None:
    paths = [f"{row}-0" if row % 16 == live or row >= 48 else f"gone/{row}-0" for row in range(64)]
    recipe = _list_recipe(tmp_path, [f"{address}/{path}" for path in paths], 64, max_per_host=1)
    rehearsal = Rehearsal(recipe, tmp_path / "rehearsal", {})
    rehearsal.pairs()
    rehearsal.download()
    assert len(requests) == len({*requests}) == 64
    assert rehearsal.num_good == 19


def test_a_limited_host_is_asked_for_no_more_rows_than_it_takes(
    address: str, requests: list[str], tmp_path: Path
) -> None:
    paths = [f"{row}-0" if row % 16 < 7 else f"gone/{row}-0" for row in range(64)]
    recipe = _list_recipe(tmp_path, [f"{address}/{path}" for path in paths], 64, max_per_host=1)
    rehearsal = Rehearsal(recipe, tmp_path / "rehearsal", {})
    rehearsal.pairs()
    rehearsal.download()
    assert len(requests) == 16 + 3
    assert rehearsal.num_good == pytest.approx(64 * 10 / 19)


def test_a_limited_host_of_which_nothing_comes_is_not_asked_again(
    address: str, requests: list[str], tmp_path: Path
) -> None:
    urls = [f"{address}/gone/{row}-0" for row in range(64)]
    rehearsal = Rehearsal(_list_recipe(tmp_path, urls, 64, max_per_host=1), tmp_path / "rehearsal", {})
    rehearsal.pairs()
    with pytest.raises(DataError, match=r"0 of 16 rows came through, too few to measure with"):
        rehearsal.download()
    assert len(requests) == 16


def test_a_long_wait_for_a_limited_host_is_said_before(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.timing.rehearsal._LONG_S", 0.05)
    words = list[str]()
    recipe = _list_recipe(tmp_path, [f"{address}/{row}-0" for row in range(18)], 4, max_rate_per_host=200.0)
    rehearsal = Rehearsal(recipe, tmp_path / "rehearsal", {}, words.append)
    rehearsal.pairs()
    rehearsal.download()
    assert words == ["download of 18 rows: 0 s, at 200/s from a host"]


def test_repeated_rows_are_no_rows_of_the_next_steps(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_no_companion(monkeypatch)
    urls = [f"{address}/{row}-0" for row in range(8)]
    units = measure(_list_recipe(tmp_path, [*urls, *urls], 4), {}, only=["download"])
    assert (units.num_rows, units.rows_of("embed")) == (16, 8)


class _MakesAFolder:
    """Makes a folder with a relative path where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("made-here",))


def test_a_companion_starts_in_the_folder_of_the_person_and_imports_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pipeline.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    job: Any = _MakesAFolder()  # to the companion it is no job, so that it ends
    with pytest.raises(StepError, match="before it was ready"), companions(job, 1):
        pass
    assert (tmp_path / "made-here").is_dir()
