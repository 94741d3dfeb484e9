"""The shipped recipes of known systems say what those systems are."""

import re
from pathlib import Path
from typing import Any

import pytest

from models.ar_prior.config import ArPriorConfig
from pipeline.errors import ConfigError
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe, load_recipe

CONFIGS = Path(__file__).parents[2] / "configs"

# arXiv:2204.06125, table 3; each tuple: diffusion prior, decoder, 64 -> 256, 256 -> 1024.
NAMES = ("prior", "decoder", "upsampler_1", "upsampler_2")
TRAINING = {
    "num_steps": (600_000, 800_000, 1_000_000, 1_000_000),
    "batch_size": (4096, 2048, 1024, 512),
    "learning_rate": (1.1e-4, 1.2e-4, 1.2e-4, 1.0e-4),
    "beta1": (0.9, 0.9, 0.9, 0.9),
    "beta2": (0.96, 0.999, 0.999, 0.999),
    "eps": (1e-6, 1e-8, 1e-8, 1e-8),
    "ema_decay": (0.9999, 0.9999, 0.9999, 0.9999),
    "weight_decay": (0.06, 0.0, 0.0, 0.0),
    "warmup_steps": (0, 0, 0, 0),
    "grad_clip_norm": (0.0, 0.0, 0.0, 0.0),
}
SAMPLING = {
    "method": ("analytic", "ddpm", "ddim", "ddim"),
    "num_steps": (64, 250, 27, 15),
}
UNETS = {
    "decoder": (512, 3, (1, 2, 3, 4), (32, 16, 8), 0.1),
    "upsampler_1": (320, 3, (1, 2, 3, 4), (), 0.1),
    "upsampler_2": (192, 2, (1, 1, 2, 2, 4, 4), (), 0.0),
}


@pytest.fixture(scope="module")
def paper() -> Recipe:
    return load_recipe(CONFIGS / "dalle2-paper.toml")


@pytest.mark.parametrize("name", NAMES)
def test_paper_recipe_has_the_rows_of_table_3(paper: Recipe, name: str) -> None:
    section: Any = paper.trained()[name]
    place = NAMES.index(name)
    assert {key: getattr(section.train, key) for key in TRAINING} == {k: row[place] for k, row in TRAINING.items()}
    sampler, diffusion = section.model.sampler, section.model.diffusion
    assert {key: getattr(sampler, key) for key in SAMPLING} == {k: row[place] for k, row in SAMPLING.items()}
    assert (diffusion.num_timesteps, diffusion.schedule) == (1000, "linear" if name == "upsampler_2" else "cosine")
    if name in UNETS:
        unet = section.model.unet
        shape = (unet.channels, unet.num_res_blocks, unet.channel_mults, unet.attention_resolutions, unet.dropout)
        assert shape == UNETS[name]
    if name.startswith("upsampler"):
        assert section.model.crop_px == 0.25 * section.model.image_px


def test_paper_recipe_reads_text_as_table_3_says(paper: Recipe) -> None:
    prior, text = paper.prior.model, paper.decoder.model.text_transformer
    assert text is not None
    assert (prior.width, prior.depth, prior.num_heads) == (text.width, text.depth, text.num_heads) == (2048, 24, 32)
    assert paper.clip.model.dims().context_length == 256
    assert paper.clip.model.dims().embed_dim == 1024


def test_paper_recipe_has_the_autoregressive_prior_of_table_3(paper: Recipe) -> None:
    section = paper.prior_2
    assert section is not None
    assert isinstance(section.model, ArPriorConfig)
    model, train = section.model, section.train
    assert (model.width, model.depth, model.num_heads) == (1664, 24, 26)
    assert (model.num_components, model.num_buckets, model.text_drop_prob) == (319, 1024, 0.1)
    assert (train.num_steps, train.batch_size, train.learning_rate) == (1_000_000, 4096, 1.6e-4)
    assert (train.beta1, train.beta2, train.eps) == (0.9, 0.91, 1e-10)
    assert (train.ema_decay, train.weight_decay) == (0.999, 0.04)


def test_paper_recipe_gives_the_source_of_every_value_of_its_networks() -> None:
    table = ""
    for line in (CONFIGS / "dalle2-paper.toml").read_text().splitlines():
        if line.startswith("["):
            table = line.strip("[]")
        elif re.match(r"(prior|prior_2|decoder|upsampler_\d)\.(model|train)", table) and "=" in line.partition("#")[0]:
            assert "# " in line, f"{table}: {line}"


def test_recipes_on_public_clips_name_weights_that_open_clip_knows() -> None:
    from pipeline.clip.library import open_clip

    public = set(open_clip.list_pretrained())
    named = {recipe.name: (recipe.clip.name, recipe.clip.tag) for recipe in map(load_recipe, CONFIGS.glob("*.toml"))
             if recipe.clip.source == "pretrained"}  # fmt: skip
    assert set(named) == {"karlo", "laion-vit-l14"}
    assert set(named.values()) <= public


def test_recipes_for_a_list_do_not_run_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = {path.stem for path in CONFIGS.glob("*.toml") if load_recipe(path).pairs.source == "drawn"}
    assert recipes == {"demo", "demo-hour", "single-gpu"}
    monkeypatch.chdir(tmp_path)
    for name in ("laion-vit-l14", "karlo", "dalle2-paper"):
        recipe = load_recipe(CONFIGS / f"{name}.toml")
        with pytest.raises(ConfigError, match=r"pairs: (laion|pairs)/ does not exist; relative paths start"):
            make_plan(recipe)
