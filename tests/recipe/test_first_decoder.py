"""The decoder on smaller pictures that is trained before it: its tables, and its place in the plan."""

import pytest

from pipeline.errors import ConfigError
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe, load_recipe, parse_recipe
from pipeline.recipe.tables import to_dict

_DECODER = {
    "model": {"image_px": 16, "text_drop_prob": 0.1, "unet": {"channel_mults": [1, 1], "attention_resolutions": [8]}},
    "train": {
        "num_steps": 50,
        "learning_rate": 1e-3,
        "phases": [{"from_step": 40, "grad_clip_norm": 0.5}],
    },
    "resources": {"num_workers": 2},
}
_SAMPLER = "first_decoder.model.sampler.guidance_scale=3.5"
_RECIPE = "configs/ablations/first-decoder.toml"


def _recipe(**first: object) -> Recipe:
    return parse_recipe({"decoder": _DECODER, "first_decoder": first})


def test_what_its_tables_leave_out_is_the_decoders_at_half_the_side() -> None:
    recipe = _recipe(train={"num_steps": 30})
    first, decoder = recipe.first_decoder, recipe.decoder
    assert first is not None
    assert (first.model.image_px, first.model.unet.attention_resolutions) == (8, (4,))
    assert first.model.text_drop_prob == 0.1
    assert (first.train.num_steps, first.train.learning_rate, first.train.phases) == (30, 1e-3, ())
    assert first.resources == decoder.resources
    assert parse_recipe(to_dict(recipe)) == recipe


def test_its_side_may_be_another_one() -> None:
    recipe = _recipe(model={"image_px": 4, "pooled_drop_prob": 0.0})
    assert recipe.first_decoder is not None
    assert recipe.first_decoder.model.unet.attention_resolutions == (2,)
    assert _recipe(model={"image_px": 16}).first_decoder is not None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("first_decoder.model.image_px=32", r"first_decoder\.model\.image_px is 32 px: at most the decoder's 16"),
        ("first_decoder.model.unet.channels=32", r"first_decoder\.model\.unet\.channels is not as in decoder\.model"),
        ("first_decoder.model.unet.attention_resolutions=[2]", r"unet\.attention_resolutions is not as in decoder"),
        ("first_decoder.model.diffusion.prediction=x0", r"first_decoder\.model\.diffusion\.prediction is not as in"),
        ("decoder.init_from=folder", r"decoder\.init_from: the decoder begins with the weights of first_decoder"),
        ("first_decoder.model.image_px=many", r"first_decoder\.model\.image_px: Input should be a valid integer"),
        ("decoder.model=3", r"decoder\.model: "),
        ("decoder.train=3", r"decoder\.train: "),
    ],
)
def test_what_the_decoder_cannot_begin_with_is_refused_by_its_name(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_recipe(_RECIPE, [override])


def test_a_mistake_in_the_decoders_tables_is_said_once() -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(_RECIPE, ["decoder.model.unet.channels=many"])
    assert str(error.value).count("channels") == 1
    assert "decoder.model.unet.channels: Input should be a valid integer, got 'many'" in str(error.value)
    with pytest.raises(ConfigError, match=r"did you mean decoder\.model\.pooled_drop_prob\?"):
        load_recipe(None, ["prior.pooled_drop_prob=0.1"])


def test_its_sampler_is_no_part_of_what_is_measured() -> None:
    keys = [make_plan(load_recipe(_RECIPE, changes))[-1].key for changes in ([], [_SAMPLER])]
    assert keys[0] == keys[1]


def test_the_decoder_waits_for_it_and_its_key_holds_it() -> None:
    with_it, changed, without = (
        {step.name: step for step in make_plan(load_recipe(_RECIPE, overrides))}
        for overrides in ([], ["first_decoder.train.num_steps=99"], ["first_decoder=false"])
    )
    assert "first_decoder" in with_it["decoder"].inputs
    assert with_it["decoder"].key != changed["decoder"].key
    assert "first_decoder" not in without
    assert "first_decoder" not in without["decoder"].inputs
