"""Forty small files that decode to gigabytes: each is a labelled row, and the decoder never takes the memory."""

import io
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks.bombs import make_bombs
from pipeline.data.decoders import _Decoder
from pipeline.data.download import Downloader
from pipeline.data.rows import make_uid
from pipeline.data.shard_writer import ShardFiles
from pipeline.data.urls import AddressRules
from pipeline.pictures.read import PictureError, read
from pipeline.recipe.sections import DownloadConfig
from tests.data.conftest import make_picture

_MOST_BYTES = 400 << 20


def _status_bytes(pid: int, field: str) -> int:
    """A line of /proc/PID/status, in bytes: VmRSS is the resident memory, VmHWM its peak."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def test_bombs_of_every_format_are_rows_with_a_cause_within_400_mb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bombs = make_bombs() | {"a picture": make_picture(0)}
    assert len(bombs) >= 41
    idle: dict[int, int] = {}
    start, stop = _Decoder.start, _Decoder.stop
    peaks: list[int] = []

    async def start_and_look(decoder: Any) -> None:
        await start(decoder)
        idle[decoder._process.pid] = _status_bytes(decoder._process.pid, "VmRSS")

    async def look_and_stop(decoder: Any) -> int | None:
        pid = decoder._process.pid
        peaks.append(_status_bytes(pid, "VmHWM") - idle[pid])
        return await stop(decoder)

    monkeypatch.setattr(_Decoder, "start", start_and_look)
    monkeypatch.setattr(_Decoder, "stop", look_and_stop)
    urls = []
    for number, data in enumerate(bombs.values()):
        (tmp_path / str(number)).write_bytes(data)
        urls.append((tmp_path / str(number)).as_uri())
    uids = [make_uid(url, "") for url in urls]
    rows = pa.table({"uid": uids, "split": ["train"] * len(urls), "caption": [""] * len(urls), "url": urls})
    files = ShardFiles(tmp_path / "a.tar", tmp_path / "a.parquet", tmp_path / "a.json")
    here = _status_bytes(os.getpid(), "VmRSS")
    with Downloader(DownloadConfig(), AddressRules(folders=[str(tmp_path)])) as downloader:
        counts = downloader.download(rows, "00000", files)
    assert counts == {"in": len(bombs), "ok": 1, "failed_to_download": 0, "failed_to_resize": len(bombs) - 1}
    messages = dict(zip(bombs, pq.read_table(files.parquet).column("error_message").to_pylist(), strict=True))
    assert messages.pop("a picture") is None
    assert {message.partition(":")[0] for message in messages.values()} <= {
        "image needs too much memory",
        "image area too large",
        "image cannot be decoded",
        "image file is truncated",
        "not a picture",
    }, messages
    assert len(peaks) == 1
    assert max(peaks) < _MOST_BYTES
    assert _status_bytes(os.getpid(), "VmRSS") - here < _MOST_BYTES


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *((mode, "PNG") for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "I;16")),
        *((mode, "TIFF") for mode in ("L", "RGB", "RGBA", "CMYK", "I;16", "F")),
        *(("RGB", kind) for kind in ("BMP", "PPM", "WEBP", "AVIF", "JPEG2000", "GIF")),
        ("RGBA", "WEBP"),
    ],
)
def test_the_memory_of_a_header_is_what_decoding_takes(mode: str, kind: str) -> None:
    """Measured in a process of its own: no more than the estimate, by which the largest picture is chosen here."""
    side_px = 2600
    options = {"AVIF": {"speed": 10}, "WEBP": {"lossless": True, "method": 0}}.get(kind, {})
    data = _encode(Image.new("RGB", (side_px, side_px)).convert(mode), kind, **options)
    with pytest.raises(PictureError) as caught:
        read(data, where="x", max_memory_bytes=1)
    promised = int(caught.value.detail.partition("px: ")[2].partition(" MiB")[0]) << 20
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes(os.getpid(), "VmRSS")
        read(data, where="x", side_px=0)
        os.write(writer, str(_status_bytes(os.getpid(), "VmHWM") - before).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    taken = int(os.read(reader, 100))
    os.close(reader)
    os.close(writer)
    assert taken < promised + (12 << 20)


def test_a_picture_below_the_limit_is_read() -> None:
    data = _encode(Image.new("RGB", (2000, 2000)), "PNG")
    assert read(data, where="x", max_memory_bytes=17 << 20).width == 2000
    with pytest.raises(PictureError, match=r"image needs too much memory .2000 x 2000 px: 15 MiB; limit: 14 MiB"):
        read(data, where="x", max_memory_bytes=14 << 20)
