import random
import tracemalloc
from itertools import combinations_with_replacement
from pathlib import Path

import pytest

from pipeline.data.negatives import Bigrams, bigrams_of, hard_negatives
from pipeline.data.training_rows import sample_captions
from pipeline.shapes.captions import canonical_caption
from pipeline.shapes.scene import evaluation_scenes, training_scene
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact
from tests.tiny.shards import drawn_sample, write_shard


def _all(caption: str, bigrams: Bigrams) -> set[str]:
    return set(hard_negatives(caption, bigrams, 10**6, random.Random(0), len(caption.split())))


def _plain_swaps(caption: str, bigrams: Bigrams) -> set[str]:
    """The same rule without any shortcut: every swap is written, then every pair of its words is looked up."""
    words, swaps = caption.split(), set[str]()
    for a, b, c, d in combinations_with_replacement(range(len(words) + 1), 4):
        if 1 <= b - a <= 3 and 1 <= d - c <= 3:
            swaps.add(" ".join([*words[:a], *words[c:d], *words[b:c], *words[a:b], *words[d:]]))
    return {text for text in swaps if bigrams_of([text]) <= bigrams | bigrams_of([caption])} - {" ".join(words)}


def test_negatives_swap_two_spans_whose_neighbours_the_corpus_has() -> None:
    caption = "a red star above a blue cross"
    assert _all(caption, bigrams_of([caption, "a red cross above a blue star"])) == {
        "a blue star above a red cross",
        "a red cross above a blue star",
        "a blue cross above a red star",
    }


def test_negatives_are_exactly_those_of_the_rule_written_plainly() -> None:
    captions = [canonical_caption(training_scene(0, index)) for index in range(400)]
    bigrams = bigrams_of(captions)
    counts: list[int] = []
    for caption in [canonical_caption(each.scene) for each in evaluation_scenes(16, seed=0)]:
        negatives = _all(caption, bigrams)
        assert negatives == _plain_swaps(caption, bigrams)
        assert all(sorted(negative.split()) == sorted(caption.split()) for negative in negatives)
        counts.append(len(negatives))
    assert sum(counts) > 20


@pytest.mark.parametrize("caption", ["", "cat", "red red", "a cat", "a cat and a cat"])
def test_a_caption_that_no_swap_changes_into_another_of_the_corpus_has_no_negative(caption: str) -> None:
    assert _all(caption, bigrams_of(["a cat and a cat", "red red"])) == set()


def test_case_is_ignored_and_punctuation_belongs_to_its_word() -> None:
    bigrams = bigrams_of(["The cat sees the dog.", "a dog sees the cat"])
    assert _all("The cat sees the dog.", bigrams) == set()  # "dog." begins no pair of the corpus, it ends captions
    assert [text.lower() for text in _all("The cat sees the dog", bigrams)] == ["the dog sees the cat"]


def test_the_choice_depends_on_the_state_of_the_generator_alone() -> None:
    captions = [canonical_caption(training_scene(0, index)) for index in range(300)]
    bigrams, caption = bigrams_of(captions), "a large red star above a small blue circle on a white background"
    assert hard_negatives(caption, bigrams, 2, random.Random(5), 99) == hard_negatives(
        caption, bigrams, 2, random.Random(5), 99
    )
    negatives = {hard_negatives(caption, bigrams, 1, random.Random(seed), 99)[0] for seed in range(40)}
    assert len(negatives) > 5
    assert negatives <= _all(caption, bigrams)


@pytest.mark.parametrize("num_words", [5, 7, 9])
def test_only_the_words_that_are_read_change_places(num_words: int) -> None:
    words = ["a", "red", "star", "above", "a", "blue", "cross", "on", "a", "gray", "field"]
    bigrams = bigrams_of([" ".join([a, b]) for a in words for b in words])
    negatives = hard_negatives(" ".join(words), bigrams, 10**6, random.Random(0), num_words)
    heads = [negative.split()[:num_words] for negative in negatives]
    assert len(heads) > 10
    assert all(sorted(head) == sorted(words[:num_words]) for head in heads)
    assert all(negative.split()[num_words:] == words[num_words:] for negative in negatives)


def test_a_swap_that_makes_a_new_pair_with_the_first_word_behind_is_none() -> None:
    words, corpus = "one two three four", ["one two three", "two one", "one three", "three four"]
    assert hard_negatives(words, bigrams_of(corpus), 9, random.Random(0), 3) == ["two one three four"]
    assert hard_negatives(words, bigrams_of([*corpus, "three two", "two four"]), 99, random.Random(0), 3) != [
        "two one three four"
    ]


def test_a_caption_of_tags_takes_little_memory() -> None:
    """Every order of a shop's ten words is a negative: some 16,000 swaps, of which one is kept."""
    words = [f"tag{number % 10}" for number in range(60)]
    bigrams = bigrams_of([f"{a} {b}" for a in set(words) for b in set(words)])
    tracemalloc.start()
    assert len(hard_negatives(" ".join(words * 100), bigrams, 1, random.Random(0), 60)) == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("num_captions", [6, 9, 1000])
def test_sampled_captions_come_from_the_training_rows_of_every_shard(tmp_path: Path, num_captions: int) -> None:
    rows, training = Artifact(str(tmp_path)), dict[str, list[str]]()
    for shard, size in (("00000", 3), ("00001", 20), ("00002", 20)):
        first = 100 * int(shard)
        samples = [drawn_sample(first + i, is_validation=i % 2 == 0) for i in range(size)]
        write_shard(rows, shard, samples, "png")
        rows.commit_shard(ShardRecord(shard=shard, counts={}, files={}))
        training[shard] = [sample.caption for i, sample in enumerate(samples) if i % 2]
    captions = sample_captions(rows, num_captions)
    assert captions == sample_captions(rows, num_captions)
    parts = [[caption for caption in captions if caption in training[shard]] for shard in sorted(training)]
    assert len(captions) == min(num_captions, 1 + 10 + 10)
    assert min(map(len, parts)) >= 1
    assert abs(len(parts[1]) - len(parts[2])) <= 2
