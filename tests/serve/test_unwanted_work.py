"""Embeddings and searches that nobody waits for end with their part, and hold no thread that others need."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from models.cascade import Cascade
from pipeline.retrieve.retriever import Conditions
from pipeline.serve import deadlines, local_neighbours
from pipeline.serve.deadlines import NotWanted
from pipeline.serve.engine import Engine
from pipeline.serve.local_neighbours import LocalNeighbours
from pipeline.serve.protocols import Vectors
from tests.serve.test_engine import wait_until
from tests.tiny.shards import plain_picture


def test_embeddings_that_nobody_waits_for_end_with_their_part_or_do_not_begin(
    cascade: Cascade, make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, begun, may_end = cascade.clip, list[str](), threading.Event()

    def embed(texts: Sequence[str]) -> torch.Tensor:
        begun.append(texts[0])
        may_end.wait(60)
        return torch.ones(len(texts), 2)

    monkeypatch.setattr(clip, "embed_text", embed)
    engine = make_engine()

    async def leave() -> Vectors:
        first = asyncio.create_task(engine.embed_texts(["first"] * 2048))
        await asyncio.to_thread(wait_until, lambda: begun == ["first"])
        waiting = asyncio.create_task(engine.embed_texts(["waiting"]))
        picture = asyncio.create_task(engine.embed_image(np.zeros((8, 8, 3), np.uint8)))
        await asyncio.sleep(0.05)
        for task in (first, waiting, picture):
            task.cancel()
        await asyncio.wait([first, waiting, picture])
        may_end.set()
        return await engine.embed_texts(["last"])

    encode = Mock(side_effect=AssertionError("a picture is encoded that nobody waits for"))
    monkeypatch.setattr(clip, "encode_image", encode)
    assert asyncio.run(leave()).shape == (1, 2)
    assert begun == ["first", "last"]
    encode.assert_not_called()


def test_texts_that_nobody_waits_for_are_looked_at_no_further_and_hold_no_thread_that_others_need(
    cascade: Cascade, make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end, engine = list[int](), threading.Event(), make_engine()

    def cut_at(texts: Sequence[str]) -> list[int]:
        begun.append(len(texts))
        may_end.wait(60)
        return [len(text) for text in texts]

    inputs = SimpleNamespace(cut_at=cut_at)
    monkeypatch.setattr(cascade.clip, "clip", SimpleNamespace(inputs=inputs))

    async def leave() -> list[int]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        first = asyncio.create_task(engine.cut_at(["a"] * 2048))
        waiting = asyncio.create_task(engine.cut_at(["a"]))
        await asyncio.wait_for(asyncio.to_thread(wait_until, lambda: len(begun) == 1), 60)
        for task in (first, waiting):
            task.cancel()
        await asyncio.wait([first, waiting])
        may_end.set()
        return await engine.cut_at(["ab"] * 65 + [""])

    assert asyncio.run(leave()) == [2] * 65 + [0]
    assert begun == [64, 64, 2]


def test_embeddings_and_searches_hold_no_thread_that_others_need(
    cascade: Cascade, make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end, engine, width = threading.Event(), make_engine(), cascade.clip.dims.embed_dim

    def embed(texts: Sequence[str]) -> torch.Tensor:
        may_end.wait(60)
        return torch.ones(len(texts), width)

    monkeypatch.setattr(cascade.clip, "embed_text", embed)

    async def ask_many() -> list[Any]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        searches = [deadlines.while_wanted(lambda _: may_end.wait(60)) for _ in range(20)]
        waiting = asyncio.gather(*(engine.embed_texts(["a"]) for _ in range(20)), *searches)
        await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.to_thread(lambda: None), 5)  # as the files of pictures are written
        assert not waiting.done()
        may_end.set()
        return await waiting

    answers = asyncio.run(ask_many())
    assert [one.shape for one in answers[:20]] == [(1, width)] * 20
    assert answers[20:] == [True] * 20


def test_a_search_that_nobody_waits_for_reads_no_further_pictures(
    neighbours: LocalNeighbours, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, read, may_end = LocalNeighbours(neighbours._retriever), list[int](), threading.Event()

    def picture(neighbour: Any) -> bytes:
        read.append(neighbour.id)
        may_end.wait(60)
        return plain_picture("red")

    monkeypatch.setattr(own._retriever, "picture", picture)

    async def leave() -> None:
        width = await own.embed_dim()
        vectors = np.eye(width, dtype=np.float32)[:2]
        task = asyncio.create_task(own.search(vectors, 4, "image", num_pictures=4))
        await asyncio.to_thread(wait_until, lambda: len(read) == 1)
        task.cancel()
        await asyncio.wait([task])
        may_end.set()

    with ThreadPoolExecutor(1) as of_pictures, ThreadPoolExecutor(1) as threads:  # whose end is waited for
        monkeypatch.setattr(local_neighbours, "_PICTURES", of_pictures)
        monkeypatch.setattr(deadlines, "_THREADS", threads)
        asyncio.run(leave())
    assert len(read) == 1
    with pytest.raises(NotWanted):  # before the first candidates, and before any further ones
        own._retriever.search(
            np.eye(asyncio.run(own.embed_dim()), dtype=np.float32)[:1],
            2,
            conditions=Conditions(distinct=0.9),
            check=Mock(side_effect=NotWanted),
        )
