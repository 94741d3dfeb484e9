"""CLIP's tokenizer against open_clip's own: the same tokens, whatever a text holds, in time and memory that are bounded."""

import random
import time
from typing import Any

import pytest

from pipeline.clip import tokenizer
from pipeline.clip.inputs import inputs_of
from pipeline.clip.library import SimpleTokenizer
from pipeline.clip.tokenizer import ClipTokenizer

ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz",
    "etaoin",
    "ab",
    "a",
    "a s",
    "\u6771\u4eac\u90fd\u306b\u4f4f\u3093\u3067\u3044\u308b\u4eba",
    "\u00e9\u00fc\u00dfab",
    "-_/.!",
    "1a",
)


def test_words_of_any_kind_and_length_have_the_tokens_of_open_clip() -> None:
    ours: Any = ClipTokenizer()
    theirs: Any = SimpleTokenizer()
    rng = random.Random(0)
    sizes = [1, 2, 3, 5, 8, 12, 20, 40, 100]
    texts = ["".join(rng.choices(rng.choice(ALPHABETS), k=rng.choice(sizes))) for _ in range(1500)]
    texts += ["", " ", "A red circle, isn't it? <start_of_text>", "the" * 300, "a photograph" * 60]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), text
    assert ours(texts[:50], 20).equal(theirs(texts[:50], 20))


def test_a_long_word_takes_milliseconds_and_is_not_kept() -> None:
    """open_clip's own tokenizer takes a quarter of a second for each of these, and keeps them all."""
    ours: Any = ClipTokenizer()
    rng = random.Random(0)
    words = ["".join(rng.choices(ALPHABETS[0], k=2048)) for _ in range(20)]
    num_kept, before_s = len(ours.cache), time.thread_time()
    for word in words:
        ours.encode(word)
    assert time.thread_time() - before_s < 1.5
    assert len(ours.cache) == num_kept


def test_words_are_forgotten_and_special_tokens_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_MAX_CACHED_WORDS", 10)
    inputs = inputs_of({"text_cfg": {"context_length": 20, "tokenizer_kwargs": {"clean": "lower"}}}, {"size": 32}, "")
    special = "cat <end_of_text>"
    before = inputs.tokenize([special])
    for number in range(50):
        inputs.tokenize(["b" * number])
    assert len(inputs.tokenizer.cache) <= 10
    assert inputs.tokenize([special]).equal(before)
