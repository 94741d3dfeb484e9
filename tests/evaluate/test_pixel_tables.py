"""What the pixel check says of the pictures of drawn prompts."""

import json
from typing import Any

import numpy as np
from PIL import Image

from models.cascade import Cascade
from pipeline.evaluate.parts import read_part
from pipeline.evaluate.work import Work
from pipeline.recipe.recipe import Recipe
from pipeline.shapes.check import check, describe
from pipeline.shapes.perceive import perceive
from pipeline.shapes.scene import is_held_out, novelties
from pipeline.workspace.store import Artifact


def test_metrics_of_the_pixel_check_agree_with_the_pictures_that_were_written(
    evaluated: tuple[Artifact, Work, dict[str, Any]],
) -> None:
    output, work, metrics = evaluated
    hits: dict[str, list[bool]] = {}
    for number, prompt in enumerate(work.prompts.prompts):
        assert prompt.scene is not None
        if len(prompt.scene.objects) == 1:
            with Image.open(output.path(f"samples/{number:05d}-0.png")) as image:
                right = check(np.asarray(image), prompt.scene).correct
            for name, hit in right.items():
                hits.setdefault(name, []).append(hit)
    table = metrics["pixel_check"]["one object"]
    assert set(table) == set(hits)
    for name, flags in hits.items():
        assert (table[name]["generated"]["hits"], table[name]["generated"]["total"]) == (sum(flags), len(flags))
        assert table[name]["guess"]["total"] == len(flags)
    assert table["background"]["real"]["rate"] == 1.0
    assert metrics["num_prompts"] == 10


def test_trained_twins_are_sampled_and_compared_with_the_held_out_prompts(
    tiny: Recipe, cascade: Cascade, evaluated: tuple[Artifact, Work, dict[str, Any]]
) -> None:
    output, work, metrics = evaluated
    assert len(work.trained.prompts) == tiny.evaluate.num_trained_prompts == 4
    rows = [row for part in work.parts if part.kind == "trained" for row in read_part(output, part)]
    for number, (row, prompt) in enumerate(zip(rows, work.trained.prompts, strict=True)):
        own = work.prompts.prompts[number].scene
        assert prompt.scene is not None
        assert own is not None
        assert not is_held_out(prompt.scene)
        assert [item.shape for item in prompt.scene.objects] == [item.shape for item in own.objects]
        assert (row["prompt_number"], row["prompt"], row["seed"]) == (number, prompt.text, 7 + 1000 * (10 + number))
        picture = cascade.sample([prompt.text], [row["seed"]]).images[0].numpy()
        assert json.loads(row["check"]) == check(picture, prompt.scene).correct
    assert set(metrics["held_out"]) == {"one object", "two objects"}
    for kinds in metrics["held_out"].values():
        for kind, checks in kinds.items():
            new = [kind in novelties(prompt.scene) for prompt in work.prompts.prompts[:4] if prompt.scene is not None]
            assert 0 < checks["background"]["trained"]["total"] <= sum(new)


def test_failures_are_the_pictures_in_which_something_is_wrong(
    evaluated: tuple[Artifact, Work, dict[str, Any]],
) -> None:
    output, _, metrics = evaluated
    samples = [json.loads(line) for line in output.path("samples.jsonl").read_text().splitlines()]
    failed = [row for row in samples if row["file"].endswith("-0.png") and not row["check"]["everything"]]
    groups = output.read_json("pictures.json")["failures"]
    pictures = [picture for group in groups for picture in group["pictures"]]
    assert sorted(picture["file"] for picture in pictures) == sorted(row["file"] for row in failed)
    assert pictures
    for picture in pictures:
        right = next(row["check"] for row in failed if row["file"] == picture["file"])
        assert picture["wrong"]
        assert not any(right[name] for name in picture["wrong"])
        with Image.open(output.path(picture["file"])) as image:
            assert picture["shows"] == describe(perceive(np.asarray(image)))
    for group in groups:
        rate = metrics["pixel_check"][group["title"]]["everything"]["generated"]
        assert (group["failed"], group["total"]) == (rate["total"] - rate["hits"], rate["total"])
