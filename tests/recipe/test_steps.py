"""The table of steps, and everything that is derived from it or must agree with it."""

import hashlib
import importlib
import json
import re
from pathlib import Path

import pytest

from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe, default_tables, load_recipe, parse_recipe
from pipeline.recipe.steps import CASCADE_STEPS, STEPS

ROOT = Path(__file__).parents[2]

# What the key of every step of a shipped recipe is made of, less the versions of the steps: another value here means that
# whoever has such a workspace computes that step again.
CONTENTS = {
    "dalle2-paper": """
        pairs 4821ac1be30e312a
        download 486dca1024cc16ab
        clip a4565305b7557aab
        embed 7e8d0e3cfd20cc05
        decoder fd39b65938ddd2af
        index 9bd77eb34a77de8e
        prior 6204a5a72795ee4b
        prior_2 b2285f260911edcf
        upsampler_1 ba4e141c3c4fa845
        upsampler_2 12ddf9bf17fa1252
        evaluate d010fe18b18d623d
    """,
    "demo": """
        pairs d4143a20d5f28e26
        download cfaf94e8bb9c5a4c
        clip b07bc07c2f50986b
        embed 7e8d0e3cfd20cc05
        decoder 94e2e981156f7e75
        index 9bd77eb34a77de8e
        prior bef8513bb65538b8
        upsampler_1 db6267ee42069dcd
        upsampler_2 ef41a2313ea74048
        evaluate deb317484eec50f6
    """,
    "karlo": """
        pairs 4821ac1be30e312a
        download 6eb911d149989621
        clip 595a59231b5db61b
        embed 7e8d0e3cfd20cc05
        decoder e346ef59806e6fb7
        index 9bd77eb34a77de8e
        prior 2b18fa041b279f49
        upsampler_1 85853803f90d5dc3
        evaluate 76e5ac86c669a200
    """,
    "laion-vit-l14": """
        pairs 784929736a0079fe
        download b656302fd44e6535
        clip fbd4fabb551182fd
        embed 7e8d0e3cfd20cc05
        decoder 5f5e9dc4e553aca7
        index 9bd77eb34a77de8e
        prior 8e29ead0ad459dce
        upsampler_1 06989668d80c7372
        evaluate acd94587f126b62e
    """,
    "single-gpu": """
        pairs 99d7e7a912feb444
        download ca085813e0554905
        clip fcdf02741c8d1135
        embed 7e8d0e3cfd20cc05
        decoder e052f0fd08bc9d89
        index 9bd77eb34a77de8e
        prior befd3707a49f20a1
        upsampler_1 27a8eb5dcd0b5974
        evaluate 700c7d3304af75a6
    """,
}


@pytest.mark.parametrize("name", CONTENTS)
def test_keys_of_the_shipped_recipes_hold_what_they_always_held(name: str) -> None:
    contents = {
        step.name: hashlib.sha256(json.dumps([step.section, sorted(step.inputs)], sort_keys=True).encode()).hexdigest()
        for step in make_plan(load_recipe(ROOT / f"configs/{name}.toml", ["pairs.source=drawn", "pairs.path="]))
    }
    frozen = dict(line.split() for line in CONTENTS[name].strip().splitlines())
    assert {step: digest[:16] for step, digest in contents.items()} == frozen


def test_every_row_configures_a_field_of_the_recipe_and_every_section_of_a_step_has_a_row() -> None:
    no_steps = {"serve", "tracking", "prices", "job", "cache", "name", "workspace", "seed"}
    fields = set(default_tables({row.name: {} for row in STEPS}))
    assert sorted(row.name for row in STEPS) == sorted(fields - no_steps)


def test_every_row_names_fields_that_its_section_has() -> None:
    last = {"model": {"low_res_px": 256, "image_px": 512, "crop_px": 64}}
    off_by_default = ("filter", "filter_embeddings", "prior_2", "first_decoder", "noisy_clip", "upsampler_1")
    recipe = parse_recipe({**{name: {} for name in off_by_default}, "upsampler_2": last, "download": {"image_px": 512}})
    for row in STEPS:
        section = getattr(recipe, row.name)
        assert all(hasattr(section, field) for field in row.files), row.name
        assert (row.name in recipe.trained()) == hasattr(section, "train") == bool(row.trains), row.name
        assert hasattr(section, "init_from") == ("init_from" in row.files), row.name


def test_every_row_stands_after_its_inputs_under_a_title_of_its_own() -> None:
    names = [row.name for row in STEPS]
    for place, row in enumerate(STEPS):
        assert set(row.inputs) <= set(names[:place]), row.name
    assert len({row.title for row in STEPS}) == len(STEPS)


@pytest.mark.parametrize("runner", sorted({row.runner for row in STEPS}))
def test_every_runner_can_be_called(runner: str) -> None:
    module, _, function = runner.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_trained_sections_follow_the_order_of_the_recipe() -> None:
    recipe = parse_recipe(
        {"upsampler_1": {"model": {"image_px": 128, "low_res_px": 64}}, "noisy_clip": {}, "prior_2": {}}
    )
    assert list(recipe.trained()) == ["clip", "prior", "prior_2", "decoder", "noisy_clip", "upsampler_1"]
    assert list(recipe.upsamplers()) == ["upsampler_1"]
    assert set(Recipe().trained()) <= {*CASCADE_STEPS, "prior_2"}


def test_the_picture_of_the_data_flow_names_every_step_that_is_on_by_itself() -> None:
    picture = (ROOT / "docs/images/dataflow.svg").read_text()
    boxes = re.findall(r'<rect class="step".*\n  <text class="name" [^>]*>(\w+)<', picture)
    names = {step.name for step in make_plan(load_recipe(ROOT / "configs/demo.toml"))}
    assert set(boxes) == names - {"first_decoder"}
    assert ", first_decoder<" in picture
