"""What is left of a request, as the next engine of a chain gets it."""

import pickle
from dataclasses import replace

import torch

from models.cascade import Cascade
from models.request import SampleRequest
from pipeline.serve.work import portable


def _size(value: object) -> int:
    return len(pickle.dumps(value))


def test_no_more_is_sent_than_the_next_stages_read(cascade: Cascade) -> None:
    _, decoder, upsampler = cascade.stages
    whole = cascade.batch_of(SampleRequest("a red circle", tuple(range(64))))
    one = replace(whole[:1], values={"pixels": torch.zeros(64, 3, 8, 8)[:1]})
    assert _size(one) > _size(whole)  # each part has the memory of the whole
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
    received = pickle.loads(pickle.dumps(sent))
    assert received.values["picture"].shape == (100, 3, 16, 16)
    assert torch.equal(received.text.hidden, many.text.hidden)
