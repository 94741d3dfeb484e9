"""CLIP's own tokenizer, open_clip's, for texts that anybody sends: words of any length, and any number of them."""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heapify, heappop, heappush
from typing import Any, cast

from pipeline.clip.library import SimpleTokenizer

_MAX_CACHED_WORDS = 1 << 20
_MAX_CACHED_CHARS = 64
"""Of a word: longer ones hardly come again, and a million of them would take gigabytes."""
_END = "</w>"


class ClipTokenizer(SimpleTokenizer):
    """open_clip's tokenizer with the same tokens, in a time that is nearly linear in the length of a word.

    open_clip's own takes the square of it: seconds for a caption of 2,000 characters in a language without spaces. It
    also keeps every word that it has ever seen. Several threads may use this one together.
    """

    def bpe(self, token: str) -> str:
        """The tokens of a word, separated by spaces.

        Args:
            token: The word, a character for each of its bytes.
        """
        own = cast("Any", self)
        cache: dict[str, str] = own.cache
        word = cache.get(token)
        if word is None:
            word = " ".join(_merged(token, own.bpe_ranks))
            if len(token) <= _MAX_CACHED_CHARS:
                if len(cache) >= _MAX_CACHED_WORDS:  # the special tokens are in it, which are no words
                    own.cache = {own.decoder[number]: own.decoder[number] for number in own.all_special_ids}
                own.cache[token] = word
        return word


def _merged(token: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """The tokens of a word: again and again, all pairs of the lowest rank are merged, from left to right."""
    parts = [*token[:-1], token[-1] + _END]
    size = len(parts)
    before, after = list(range(-1, size - 1)), list(range(1, size + 1))

    def rank_at(left: int) -> int | None:
        """Rank of the pair that begins at a part; a part that was merged into another one is empty, and has none."""
        right = after[left]
        return ranks.get((parts[left], parts[right])) if left >= 0 and right < size else None

    pairs = [(rank, left) for left in range(size) if (rank := rank_at(left)) is not None]
    heapify(pairs)
    while pairs:
        lowest, changed = pairs[0][0], list[int]()
        while pairs and pairs[0][0] == lowest:
            _, left = heappop(pairs)
            if rank_at(left) != lowest:  # one of its parts was merged meanwhile
                continue
            right = after[left]
            parts[left], parts[right], after[left] = parts[left] + parts[right], "", after[right]
            if after[left] < size:
                before[after[left]] = left
            changed += [before[left], left]
        for left in changed:  # only now: a pair that comes of a merge waits until all of that rank are merged
            if (rank := rank_at(left)) is not None:
                heappush(pairs, (rank, left))
    return [part for part in parts if part]
