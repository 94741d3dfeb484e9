"""Hard negatives of a caption: the same words in another order that the corpus could have written.

Two spans of at most three words are swapped, and the result is kept if every pair of neighbouring words that is new in
it occurs in the corpus. The rule knows no word: it works for any language that puts spaces between its words.
Such captions measure whether CLIP reads the order of words, and teach it (arXiv:2210.01936). Some of them mean what
their caption means ("a dog and a cat"): whoever counts them counts real pictures too, as the ceiling.

Words are separated by spaces, and punctuation belongs to its word; case is ignored, as CLIP ignores it. Only words that
CLIP reads change places: a swap behind the end of what it reads would be the same caption to it, and one across that
end would be another set of words.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

Bigrams = frozenset[tuple[str, str]]
"""Pairs of neighbouring words in lower case; the empty word stands before the first word and after the last."""

_MAX_SPAN = 3
_NUM_SPARE = 64


def hard_negatives(caption: str, bigrams: Bigrams, count: int, rng: random.Random, num_words: int) -> list[str]:
    """Choose hard negatives of a caption: ``count`` different ones, or all of them if there are fewer.

    All negatives have the same probability. They are told by hashes and not kept, because a caption has up to 4.5 times
    the square of its words.

    Args:
        caption: Any text; its negatives have single spaces between the same words.
        bigrams: The corpus's, by ``bigrams_of``.
        count: Most negatives.
        rng: Chooses among all negatives; the same state gives the same choice.
        num_words: Words at the caption's beginning that may change places: those that are read
            (``ClipInputs.num_whole_words``). The time grows with the square of this number.
    """
    words, salt = caption.split(), rng.randbytes(16)
    own = " ".join(words[:num_words]).lower()
    chosen: dict[bytes, str] = {}
    for swap in _swaps(words, num_words, bigrams):
        low = swap.lower()  # CLIP reads lower case
        if low != own:
            chosen[hashlib.blake2b(low.encode(), key=salt, digest_size=16).digest()] = swap
        if len(chosen) > 2 * count + _NUM_SPARE:
            chosen = {key: chosen[key] for key in sorted(chosen)[:count]}
    return [" ".join([chosen[key], *words[num_words:]]) for key in sorted(chosen)[:count]]


def bigrams_of(captions: Iterable[str]) -> Bigrams:
    """The pairs of neighbouring words of captions, with their first and last words."""
    pairs: set[tuple[str, str]] = set()
    for caption in captions:
        words = ["", *caption.lower().split(), ""]
        pairs.update(pairwise(words))
    return frozenset(pairs)


def _swaps(caption: Sequence[str], num_words: int, bigrams: Bigrams) -> Iterator[str]:
    """The first words of every caption that swaps [a, b) with [c, d) and has no new pair that the corpus lacks."""
    own = bigrams_of([" ".join(caption)])
    last = min(num_words, len(caption))
    words = ["", *caption[:last], *(caption[last : last + 1] or [""])]  # the last one stays: it ends a pair
    low = [word.lower() for word in words]
    for a in range(1, last):
        for c in range(a + 1, last + 1):
            first = (low[a - 1], low[c])  # depends on neither length: most pairs of spans end here
            if first not in bigrams and first not in own:
                continue
            for b in range(a + 1, min(a + _MAX_SPAN, c) + 1):
                for d in range(c + 1, min(c + _MAX_SPAN, last + 1) + 1):
                    after_second, before_first = (low[b], low[c - 1]) if b < c else (low[a], low[d - 1])
                    pairs = ((low[d - 1], after_second), (before_first, low[a]), (low[b - 1], low[d]))
                    if all(pair in bigrams or pair in own for pair in pairs):
                        yield " ".join([*words[1:a], *words[c:d], *words[b:c], *words[a:b], *words[d:-1]])
