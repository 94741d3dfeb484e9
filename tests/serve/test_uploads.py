"""Pictures that clients send: how often and where they are decoded, and their masks."""

import asyncio
import concurrent.futures
import io
import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.request import (
    RawPicture,
)
from pipeline.sampling.masks import shrink_mask
from pipeline.serve import uploads
from tests.tiny.pictures import noisy_picture


def test_no_more_than_two_pictures_of_clients_are_decoded_at_once_and_other_threads_stay_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running, most, read = list[int](), list[int](), uploads.read

    def slow(data: bytes, **options: Any) -> Any:
        running.append(1)
        most.append(len(running))
        time.sleep(0.01)
        try:
            return read(data, **options)
        finally:
            running.pop()

    monkeypatch.setattr(uploads, "read", slow)

    async def decode_many() -> list[RawPicture]:
        asyncio.get_running_loop().set_default_executor(concurrent.futures.ThreadPoolExecutor(2))
        decoded = asyncio.gather(*(uploads.decoding(uploads.raw_picture, noisy_picture(1), "image") for _ in range(12)))
        await asyncio.wait_for(asyncio.to_thread(lambda: None), 5)
        assert not decoded.done()
        return await decoded

    pictures = asyncio.run(decode_many())
    assert len({picture.sha256 for picture in pictures}) == 1
    assert max(most) == 2


def test_a_picture_with_a_mask_is_decoded_once_as_it_was_without(monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = uploads.read, list[str]()
    monkeypatch.setattr(
        uploads, "read", lambda data, **options: calls.append(options["where"]) or read(data, **options)
    )
    levels = np.random.default_rng(0).integers(0, 256, (40, 30, 4), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(levels).save(stream, "PNG")
    picture, mask = uploads.masked_picture(stream.getvalue(), None, 16)
    assert calls == ["image"]
    assert picture == uploads.raw_picture(stream.getvalue(), "image", 16)
    assert mask is not None


def test_a_smaller_mask_covers_every_pixel_that_it_touches() -> None:
    masked = np.random.default_rng(0).random((37, 37)) > 0.98
    expected = torch.nn.functional.adaptive_max_pool2d(torch.from_numpy(masked)[None, None].float(), 16)[0, 0] > 0
    np.testing.assert_array_equal(shrink_mask(masked, 16), expected.numpy())
    np.testing.assert_array_equal(shrink_mask(masked, 64), masked)
