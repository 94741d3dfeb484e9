"""Captions beside their own words in another order."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from models.cascade import Cascade
from pipeline.data.negatives import Bigrams, bigrams_of
from pipeline.evaluate import parts
from pipeline.evaluate.evaluate import plan_work
from pipeline.evaluate.parts import PartRunner, read_part
from pipeline.evaluate.work import Part, Work
from pipeline.recipe.recipe import Recipe
from pipeline.workspace.store import Artifact
from tests.evaluate.conftest import evaluate_inputs


def test_preference_compares_each_caption_with_its_words_in_another_order(
    cascade: Cascade, evaluated: tuple[Artifact, Work, dict[str, Any]]
) -> None:
    output, work, metrics = evaluated
    rows = [row for part in work.parts if part.kind == "samples" for row in read_part(output, part)]
    firsts = [row for row in rows if row["image_number"] == 0]
    reordered = [row for row in firsts if row["negative"]]
    assert 0 < len(reordered) < len(firsts)
    assert all(sorted(row["negative"].split()) == sorted(row["prompt"].split()) for row in reordered)
    clip: Any = cascade.clip
    for column, name in (("z_image", "generated"), ("z_real", "real")):
        hits = 0
        for row in reordered:
            own, other = clip.encode_text([row["prompt"], row["negative"]]).z_text.numpy() @ row[column]
            hits += bool(own > other)
        rate = metrics["preference"][name]
        assert (rate["hits"], rate["total"]) == (hits, len(reordered))
        assert rate["without_negative"] == len(firsts) - len(reordered)
    assert metrics["preference"]["chance"] == 0.5


def test_negatives_are_of_what_clip_reads_of_a_caption(tiny: Recipe, cascade: Cascade, tmp_path: Path) -> None:
    clip: Any = cascade.clip
    words = [f"word{number}" for number in range(60)]
    head, tail = " ".join(words[:50]), "a cat and a dog"  # the tail is behind the end of what is read
    captions = [f"{head} {tail}", f"{tail} {head}", tail]
    assert clip.clip.inputs.cut_at([head])[0] == clip.clip.inputs.context_length
    bigrams = bigrams_of(["a dog and a cat", "cat word0"])
    rows = _rows_of_captions(tiny, cascade, captions, bigrams, tmp_path)
    assert [row["negative"] for row in rows] == ["", f"a dog and a cat {head}", "a dog and a cat"]
    assert [row["margin"] is None for row in rows] == [True, False, False]
    assert rows[1]["margin"] != 0


def test_a_negative_that_the_tokenizer_reads_as_its_caption_is_none(
    tiny: Recipe, cascade: Cascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "hard_negatives", lambda caption, *_: [caption.replace("dog", "DOG")])
    (row,) = _rows_of_captions(tiny, cascade, ["a cat and a dog"], frozenset(), tmp_path)
    assert (row["negative"], row["margin"]) == ("", None)


def _rows_of_captions(
    recipe: Recipe, cascade: Cascade, captions: list[str], bigrams: Bigrams, folder: Path
) -> list[dict[str, Any]]:
    """A part of measured rows, with other captions."""
    work, output = plan_work(recipe, evaluate_inputs(recipe)), Artifact(str(folder))
    rows = [dataclasses.replace(work.rows[0], caption=caption) for caption in captions]
    part = Part("validation", 0, 0, len(rows))
    work = dataclasses.replace(work, rows=rows, bigrams=bigrams)
    runner = PartRunner(cascade, work, evaluate_inputs(recipe)["download"], output, 0)
    runner.run(part)
    return read_part(output, part)
