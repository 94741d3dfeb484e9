"""What is left of a request, as the next engine of a chain gets it."""

import pickle
from dataclasses import replace
from typing import Any

import torch

from models.cascade import Cascade
from models.request import SampleRequest
from models.stage import Batch
from pipeline.serve.work import Work, packed, portable


def _work(batch: Batch) -> Work:
    return Work(batch, (), "", is_last=True, num_steps=0)


def _size(batch: Batch) -> int:
    return len(packed(_work(batch)))


def test_no_more_is_sent_than_the_next_stages_read(cascade: Cascade) -> None:
    _, decoder, upsampler = cascade.stages
    whole = cascade.batch_of(SampleRequest("a red circle", tuple(range(64))))
    one = replace(whole[:1], values={"pixels": torch.zeros(64, 3, 8, 8)[:1]})
    alone = cascade.batch_of(SampleRequest("a red circle", (0,)))
    assert _size(portable(one, [decoder])) < _size(alone) + 3 * 8 * 8 * 4 + 1000
    last = portable(one, [upsampler])
    assert len(last) == 1
    assert _size(last) < 3 * 8 * 8 * 4 + 4000  # without the caption
    assert torch.equal(portable(one, [decoder]).text.hidden, one.text.hidden)


def test_what_all_items_share_is_sent_once(cascade: Cascade) -> None:
    _, decoder, _ = cascade.stages
    one, many = (cascade.batch_of(SampleRequest("a red circle", tuple(range(number)))) for number in (1, 100))
    many = many.with_values(picture=torch.zeros(1, 3, 16, 16).expand(100, 3, 16, 16))
    sent = portable(many, [decoder])
    assert _size(sent) < _size(portable(one, [decoder])) + 3 * 16 * 16 * 4 + 2000
    received: Work = pickle.loads(packed(_work(sent)))
    assert received.batch.values["picture"].shape == (100, 3, 16, 16)
    assert torch.equal(received.batch.text.hidden, many.text.hidden)
    assert received.num_bytes == _work(sent).num_bytes == _work(portable(one, [decoder])).num_bytes + 3 * 16 * 16 * 4


def test_what_is_sent_comes_as_it_was(cascade: Cascade) -> None:
    batch = cascade.batch_of(SampleRequest("a red circle", (0, 1, 2), negative_prompt="blue"))
    values: dict[str, torch.Tensor] = {
        "pixels": torch.rand(6, 3, 8, 8)[::2],
        "half": torch.rand(3, 4).half(),
        "brain": torch.rand(3, 4).bfloat16(),
        "empty": torch.rand(3, 0),
        "shared": torch.rand(1, 5).expand(3, 5),
    }
    with torch.inference_mode():
        values["inferred"] = torch.rand(3, 2) * 2
    work = replace(_work(batch.with_values(**values)), stages=(2, 3), step="upsampler_1", num_steps=7, taken_s=0.5)
    received: Work = pickle.loads(packed(work))
    assert replace(received, batch=batch) == replace(work, batch=batch)
    assert (received.batch.seeds, received.batch.request) == (batch.seeds, batch.request)
    sent, left = (_tensors(one.batch) for one in (work, received))
    assert sent.keys() == left.keys()
    for name, tensor in sent.items():
        assert left[name].dtype == tensor.dtype
        assert torch.equal(left[name], tensor)
    assert left["shared"].stride(0) == 0
    left["pixels"].add_(1)  # it may be written


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    texts: dict[str, Any] = {"text": batch.text, "negative": batch.negative}
    names = ("pooled", "hidden", "mask", "tokens")
    return {f"{kind}.{name}": getattr(text, name) for kind, text in texts.items() for name in names} | dict(
        batch.values
    )
