"""Our download beside the real img2dataset's, from the same server: the same shards, byte for byte where it can be."""

import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.resize import Resizer
from pipeline.data.rows import make_uid
from pipeline.data.shard_tables import Place
from pipeline.data.shard_writer import ShardFiles
from pipeline.data.urls import AddressRules
from pipeline.pictures import stored
from pipeline.pictures.read import decode
from pipeline.pictures.stored import fit
from pipeline.recipe.sections import DownloadConfig
from tests.data.conftest import PictureServer
from tests.tiny.shards import download_shard

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

_CONFIG = DownloadConfig(
    samples_per_shard=100, image_px=48, timeout_s=2, deadline_s=3, retries=0, robots_txt=False, tdm_reservation=False
)
_PATHS = [
    *(f"jpg/{i}" for i in range(6)),
    "exif/1",
    "gone/1",
    "grey/1",
    *(f"png/{i}" for i in range(4)),
    "html/1",
    "noai/1",
]


def _rows(url: str) -> pa.Table:
    urls = [f"{url}/{path}" for path in _PATHS]
    captions: list[str | None] = [f"caption of {path}" for path in _PATHS]
    captions[2] = None
    uids = [make_uid(one, caption or "") for one, caption in zip(urls, captions, strict=True)]
    scores = [index / 4 for index in range(len(urls))]
    return pa.table({"uid": uids, "split": ["train"] * len(urls), "score": scores, "caption": captions, "url": urls})


def _img2dataset(rows: pa.Table, config: DownloadConfig, folder: Path) -> ShardFiles:
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer as TheirResizer
    from img2dataset.writer import WebDatasetSampleWriter

    folder.mkdir()
    with pa.ipc.new_file(str(folder / "rows.arrow"), rows.schema) as sink:
        sink.write_table(rows)
    resizer = TheirResizer(
        image_size=config.image_px,
        resize_mode=config.resize_mode,
        resize_only_if_bigger=config.resize_only_if_bigger,
        encode_quality=config.encode_quality,
        encode_format=config.encode_format,
        skip_reencode=config.skip_reencode,
        min_image_size=config.min_image_px,
        max_aspect_ratio=config.max_aspect_ratio,
    )
    downloader = Downloader(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=resizer,
        thread_count=4,
        save_caption=True,
        extract_exif=True,
        output_folder=str(folder),
        column_list=rows.column_names,
        timeout=config.timeout_s,
        number_sample_per_shard=config.samples_per_shard,
        oom_shard_count=5,
        compute_hash=config.compute_hash,
        verify_hash_type=None,
        encode_format=config.encode_format,
        retries=0,
        user_agent_token=config.user_agent_token,
        disallowed_header_directives=list(config.disallowed_header_directives),
    )
    downloader.download_shard((3, str(folder / "rows.arrow")))
    return ShardFiles(folder / "00003.tar", folder / "00003.parquet", folder / "00003_stats.json")


def _ours(rows: pa.Table, config: DownloadConfig, folder: Path) -> ShardFiles:
    folder.mkdir()
    files = ShardFiles(folder / "00003.tar", folder / "00003.parquet", folder / "00003_stats.json")
    download_shard(rows, "00003", config, files, AddressRules(["127.0.0.1/32"]))
    return files


def _members(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as opened:
        return {member.name: opened.extractfile(member).read() for member in opened}  # type: ignore[union-attr]


def _good(files: ShardFiles) -> pa.Table:
    return pq.read_table(files.parquet).sort_by("key")


@pytest.fixture
def rows(server: PictureServer) -> pa.Table:
    """Good and failing rows."""
    return _rows(server.url)


@pytest.mark.parametrize("encode_format", ["jpg", "png"])
def test_unchanged_pictures_give_the_same_shard(rows: pa.Table, tmp_path: Path, encode_format: Any) -> None:
    quality = 9 if encode_format == "png" else 95
    config = replace(
        _CONFIG,
        resize_mode="no",
        skip_reencode=True,
        encode_format=encode_format,
        encode_quality=quality,
        extra_columns=("score",),
    )
    ours, theirs = _ours(rows, config, tmp_path / "ours"), _img2dataset(rows, config, tmp_path / "theirs")
    our_files, their_files = _members(ours.tar), _members(theirs.tar)
    assert our_files.keys() == their_files.keys()
    kept = {"jpg": range(7), "png": range(9, 13)}[encode_format]  # theirs are not encoded again either
    for name in their_files:
        if not name.endswith(encode_format) or int(name[5:7]) in kept:
            assert our_files[name] == their_files[name], name
    our_table, their_table = _good(ours).drop_columns(list(Place._fields)), _good(theirs)
    assert our_table.schema.equals(their_table.schema)
    assert our_table.drop_columns(["error_message"]).equals(their_table.drop_columns(["error_message"]))
    our_stats, their_stats = (json.loads(files.stats.read_text()) for files in (ours, theirs))
    assert their_stats.keys() <= our_stats.keys()
    for name in ("count", "successes", "failed_to_download", "failed_to_resize"):
        assert our_stats[name] == their_stats[name]


def _noise(size: tuple[int, int], seed: int) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


_SIZES = ((96, 64), (64, 97), (131, 77), (48, 48), (31, 45), (200, 33), (37, 37), (96, 96), (500, 400))


@pytest.mark.parametrize("only_if_bigger", [False, True])
@pytest.mark.parametrize("mode", ["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"])
@pytest.mark.parametrize(("extension", "quality"), [("jpg", 95), ("png", 1), ("webp", 80)])
def test_every_mode_and_format_gives_the_same_file(
    extension: Any, quality: int, mode: Any, only_if_bigger: bool
) -> None:
    from img2dataset.resizer import Resizer as TheirResizer

    config = replace(
        _CONFIG, resize_mode=mode, resize_only_if_bigger=only_if_bigger, encode_format=extension, encode_quality=quality
    )
    theirs = TheirResizer(48, mode, only_if_bigger, encode_format=extension, encode_quality=quality)
    num_equal = 0
    for seed, size in enumerate(_SIZES):
        data = _noise(size, seed)
        stored = Resizer(config).store(data)
        encoded, width, height, *_ = theirs(io.BytesIO(data))
        assert (stored.width, stored.height) == (width, height), size
        scale = (max if mode in {"border", "keep_ratio_largest"} else min)(size) / 48
        is_cut_before = mode == "center_crop" and size[0] != size[1] and not (only_if_bigger and scale <= 1)
        if mode == "no" or (not 1 < scale < 2 and not is_cut_before):
            assert stored.data == encoded, size
            num_equal += 1
        elif extension == "png":  # a square that is cut after the resize lies up to a pixel beside ours
            pixels = [np.asarray(decode(one, where="x")).astype(float) for one in (stored.data, encoded)]
            error = np.mean((pixels[0] - pixels[1]) ** 2)
            assert error < (60 if is_cut_before else 2), (size, error)
    assert num_equal >= 3


def _float_area(pixels: Any, side_px: int) -> Any:
    """The mean of areas, in floats: the reference of ``fit``."""
    edges = np.linspace(0, len(pixels), side_px + 1)
    starts = np.arange(len(pixels))
    weights = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    weights = weights.clip(0) / (len(pixels) / side_px)
    return np.einsum("ij,jkc,lk->ilc", weights, pixels.astype(float), weights)


@pytest.mark.parametrize("side_px", [60, 75, 90, 96, 130, 240])
def test_a_smaller_picture_is_the_mean_of_areas(side_px: int) -> None:
    image = decode(_noise((side_px, side_px), side_px), where="x")
    error = np.mean((fit(image, (48, 48)) - _float_area(np.asarray(image), 48)) ** 2)
    assert error < 1.5, error


@pytest.mark.parametrize("side_px", [60, 75, 90, 130, 240])
def test_a_smaller_picture_has_no_stripes_that_are_too_fine_for_it(side_px: int) -> None:
    levels = np.zeros((side_px, side_px, 3), np.uint8)
    levels[:, ::2] = 255
    assert np.std(fit(Image.fromarray(levels), (48, 48))) < 60 < np.std(np.asarray(levels))


def test_a_picture_that_pillow_holds_in_pieces_is_resized_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    image = decode(_noise((150, 130), 1), where="x")
    expected = [fit(image, (48, 40)), fit(image, (20, 20), (10, 0, 140, 130))]
    monkeypatch.setattr(stored, "STRIP_AREA_PX", 1000)
    monkeypatch.setattr(Image.core, "get_block_size", lambda: 4096)
    pieces = [fit(image, (48, 40)), fit(image, (20, 20), (10, 0, 140, 130))]
    assert all(np.array_equal(*pair) for pair in zip(expected, pieces, strict=True))


@pytest.mark.parametrize("boxes", [[[0.2, 0.1, 0.6, 0.5]], [[0.0, 0.0, 0.3, 0.3], [0.5, 0.5, 1.0, 1.0]]])
def test_boxes_are_blurred_as_theirs(boxes: Sequence[Sequence[float]]) -> None:
    from img2dataset.blurrer import BoundingBoxBlurrer
    from img2dataset.resizer import Resizer as TheirResizer

    config = replace(_CONFIG, encode_format="png", encode_quality=1, blur_column="boxes")
    data = _noise((48, 48), 1)
    theirs = TheirResizer(48, "center_crop", False, encode_format="png", encode_quality=1, blurrer=BoundingBoxBlurrer())
    encoded = theirs(io.BytesIO(data), boxes)[0]
    ours = Resizer(config).store(data, boxes).data
    assert ours != Resizer(config).store(data).data
    assert np.array_equal(np.asarray(decode(ours, where="x")), np.asarray(decode(encoded, where="x")))
