"""Hard negatives of a caption: the same words in another order that the corpus could have written.

Two spans of at most three words are swapped, and the result is kept if every pair of neighbouring words that is new in
it occurs in the corpus. The rule knows no word: it works for any language that puts spaces between its words.
Such captions measure whether CLIP reads the order of words, and teach it (arXiv:2210.01936). Some of them mean what
their caption means ("a dog and a cat"): whoever counts them counts real pictures too, as the ceiling.

Words are separated by spaces, and punctuation belongs to its word; case is ignored, as CLIP ignores it.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

Bigrams = frozenset[tuple[str, str]]
"""Pairs of neighbouring words in lower case; the empty word stands before the first word and after the last."""

_MAX_SPAN = 3


def hard_negatives(caption: str, bigrams: Bigrams, count: int, rng: random.Random) -> list[str]:
    """Choose hard negatives of a caption: ``count`` different ones, or all of them if there are fewer.

    Args:
        caption: Any text; its negatives have single spaces between the same words.
        bigrams: The corpus's, by ``bigrams_of``.
        count: Most negatives.
        rng: Chooses among all negatives; the same state gives the same choice.
    """
    words = caption.split()
    different = {swap.lower(): swap for swap in _swaps(words, bigrams)}  # CLIP reads lower case
    negatives = [different[low] for low in sorted(different) if low != " ".join(words).lower()]
    return rng.sample(negatives, min(count, len(negatives)))


def bigrams_of(captions: Iterable[str]) -> Bigrams:
    """The pairs of neighbouring words of captions, with their first and last words."""
    pairs: set[tuple[str, str]] = set()
    for caption in captions:
        words = ["", *caption.lower().split(), ""]
        pairs.update(pairwise(words))
    return frozenset(pairs)


def _swaps(caption: Sequence[str], bigrams: Bigrams) -> Iterator[str]:
    """Every caption that swaps the words [a, b) with [c, d) and has no new pair that the corpus lacks."""
    own = bigrams_of([" ".join(caption)])
    words = ["", *caption, ""]
    low = [word.lower() for word in words]
    last = len(caption)
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
