"""The cost of a recipe against published figures, and against real tensors that are counted while they are computed."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.ar_prior.config import ArPriorConfig
from models.ar_prior.network import ArPrior
from models.ar_prior.sampling import initial_tokens, sample_component
from models.decoder.network import Decoder
from models.diffusion.noise import NoiseSource
from models.noisy_clip.config import NoisyClipConfig
from models.noisy_clip.network import NoisyClip
from models.prior.network import Prior
from models.text import TextEncoding
from models.upsampler.network import Upsampler
from pipeline.clip.model import create_clip
from pipeline.errors import ConfigError
from pipeline.networks.costs import NetworkCost, format_costs, recipe_costs
from pipeline.recipe.recipe import Recipe, load_recipe
from pipeline.recipe.train_sections import NoisyClipStepConfig
from tests.models.tiny_models import CONVOLUTION
from tests.tiny.command import ROOT, unclip_json
from tests.tiny.recipe import write_recipe

# Operations and parameters of arXiv:2204.06125's networks, counted elsewhere by hand from its table 3: parameters,
# 1e12 operations of one training sample, samples, A100 hours at 40 %.
PAPER = {
    "prior": (1.23e9, 1.93, 2.46e9, 10.5e3),
    "decoder": (3.4e9, 6.45, 1.64e9, 23.5e3),
    "upsampler_1": (692e6, 1.59, 1.02e9, 3.6e3),
    "upsampler_2": (267e6, 3.72, 0.51e9, 4.2e3),
}


@pytest.fixture(scope="module")
def paper() -> dict[str, NetworkCost]:
    return {cost.name: cost for cost in recipe_costs(load_recipe(ROOT / "configs/dalle2-paper.toml"))}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return load_recipe(write_recipe(tmp_path_factory.mktemp("cost"), port=1))


@pytest.mark.parametrize("name", PAPER)
def test_cost_of_the_papers_recipe_is_the_known_one(paper: dict[str, NetworkCost], name: str) -> None:
    num_parameters, tera, num_samples, hours = PAPER[name]
    cost = paper[name]
    assert cost.num_parameters == pytest.approx(num_parameters, rel=0.06)
    assert cost.training_flops == pytest.approx(tera * 1e12, rel=0.05)
    assert cost.num_samples == pytest.approx(num_samples, rel=0.01)
    assert cost.hours("a100") == pytest.approx(hours, rel=0.05)
    assert cost.weights_bytes == 4 * cost.num_parameters
    assert cost.training_bytes - cost.activations_bytes == 20 * cost.num_parameters


def test_cost_of_public_clips_is_the_known_one() -> None:
    recipe = load_recipe(ROOT / "configs/laion-vit-l14.toml")
    costs = {cost.name: cost for cost in recipe_costs(recipe)}
    assert costs["clip"].sampling_flops == pytest.approx(162e9, rel=0.02)
    assert costs["clip"].num_parameters == 427_616_513
    assert costs["clip"].training_bytes == costs["clip"].weights_bytes
    assert "frozen" in format_costs(list(costs.values()))
    assert costs["prior"].num_parameters == pytest.approx(89e6, rel=0.03)
    unknown = dataclasses.replace(recipe, clip=dataclasses.replace(recipe.clip, name="hf-hub:somebody/something"))
    with pytest.raises(ConfigError, match=r"clip\.name: CLIP .*unknown on this machine"):
        recipe_costs(unknown)


def _text(recipe: Recipe, size: int) -> TextEncoding:
    dims = recipe.clip.model.dims()
    length = dims.context_length
    hidden, mask = torch.randn(size, length, dims.text_width), torch.ones(size, length, dtype=torch.bool)
    return TextEncoding(torch.randn(size, dims.embed_dim), hidden, mask, torch.ones_like(mask).long())


def test_cost_equals_what_real_tensors_take(tiny: Recipe) -> None:
    costs = {cost.name: cost for cost in recipe_costs(tiny)}
    dims, steps = tiny.clip.model.dims(), torch.zeros(2, dtype=torch.int64)
    clip = create_clip(tiny.clip.model).model
    prior, decoder = Prior(tiny.prior.model, dims), Decoder(tiny.decoder.model, dims)
    assert tiny.upsampler_1 is not None
    upsampler = Upsampler(tiny.upsampler_1.model)
    images, crops = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    text, z_image = _text(tiny, 2), torch.randn(2, dims.embed_dim)
    pictures, tokens = torch.randn(2, 3, 32, 32), torch.zeros(2, dims.context_length, dtype=torch.int64)
    runs = {
        "clip": (clip, lambda: sum(part.sum() for part in clip(pictures, tokens)[:2])),
        "prior": (prior, lambda: prior(z_image, steps, prior.encode_condition(text)).sum()),
        "decoder": (decoder, lambda: decoder(images, steps, decoder.encode_condition(z_image, text)).sum()),
        "upsampler_1": (upsampler, lambda: upsampler(crops, steps, crops).sum()),
    }
    for name, (network, run) in runs.items():
        assert costs[name].num_parameters == sum(p.numel() for p in network.parameters())
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run().backward()
        assert costs[name].training_flops == counter.get_total_flops() / 2, name


def test_kept_activations_are_those_of_real_tensors(tiny: Recipe) -> None:
    """Of the upsampler, which has no attention: there a kernel decides what it keeps."""
    assert tiny.upsampler_1 is not None
    upsampler, crops = Upsampler(tiny.upsampler_1.model), torch.randn(2, 3, 8, 8)
    storages: dict[int, int] = {}
    alive = []
    own = {parameter.data_ptr() for parameter in upsampler.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        upsampler(crops, torch.zeros(2, dtype=torch.int64), crops).sum()
    cost = next(cost for cost in recipe_costs(tiny) if cost.name == "upsampler_1")
    share = tiny.upsampler_1.train.batch_size
    assert cost.activations_bytes == pytest.approx(sum(storages.values()) / 2 * share, rel=0.02)


def test_costs_follow_the_parts_of_a_share(tmp_path: Path) -> None:
    def cost(name: str, part: int) -> NetworkCost:
        overrides = ["clip.model.vision=vit", "clip.model.patch_px=8", f"{name}.resources.micro_batch_size={part}"]
        recipe = load_recipe(write_recipe(tmp_path, port=1), overrides)
        return next(cost for cost in recipe_costs(recipe) if cost.name == name)

    size = load_recipe(write_recipe(tmp_path, port=1)).decoder.train.batch_size
    whole, third = cost("decoder", 0), cost("decoder", size // 2)
    assert third.activations_bytes * 2 == pytest.approx(whole.activations_bytes, rel=0.01)
    assert third.training_flops == whole.training_flops
    # A contrastive loss encodes each sample of a divided batch twice: a third more.
    assert cost("clip", 2).training_flops / cost("clip", 0).training_flops == pytest.approx(4 / 3, rel=0.03)
    assert cost("clip", 1 << 20).training_flops == cost("clip", 0).training_flops


def test_what_a_contrastive_loss_keeps_is_counted_with_the_whole_batch(tmp_path: Path) -> None:
    def kept(batch_size: int, part: int, num_workers: int = 1) -> int:
        changes = {"train.batch_size": batch_size, "train.num_steps": 1, "train.warmup_steps": 0}
        changes |= {"resources.micro_batch_size": part, "resources.num_workers": num_workers}
        overrides = ["clip.model.vision=vit", "clip.model.patch_px=8", *(f"clip.{k}={v}" for k, v in changes.items())]
        costs = recipe_costs(load_recipe(write_recipe(tmp_path, port=1), overrides))
        return next(cost.activations_bytes for cost in costs if cost.name == "clip")

    logits = 2 * 4 * 2048**2  # both ways, after their softmax
    assert kept(2048, 1) == pytest.approx(logits, rel=0.05)
    assert kept(2048, 1, num_workers=2) == pytest.approx(logits / 2, rel=0.05)
    assert kept(2048, 0) == pytest.approx(logits + 2048 * kept(8, 1), rel=0.05)


def test_sampling_counts_steps_guidance_and_candidates(tiny: Recipe, tmp_path: Path) -> None:
    def cost(*overrides: str) -> dict[str, NetworkCost]:
        recipe = load_recipe(write_recipe(tmp_path, port=1), overrides)
        return {cost.name: cost for cost in recipe_costs(recipe)}

    base = cost("decoder.model.sampler.guidance_scale=1.0", "prior.model.num_candidates=1")
    more = cost(
        "decoder.model.sampler.guidance_scale=3.0",
        "prior.model.num_candidates=4",
        "upsampler_1.model.sampler.num_steps=6",
    )
    # Each step costs twice as much; the empty caption, of two tokens, is encoded once.
    assert 1.6 < more["decoder"].sampling_flops / base["decoder"].sampling_flops < 2
    assert more["prior"].sampling_flops == 4 * base["prior"].sampling_flops
    assert more["upsampler_1"].sampling_flops == 2 * base["upsampler_1"].sampling_flops
    assert (base["upsampler_1"].num_calls, more["upsampler_1"].num_calls) == (3, 6)


def test_cost_of_an_autoregressive_prior_equals_what_real_tensors_take(tmp_path: Path) -> None:
    def cost(*overrides: str) -> NetworkCost:
        model = ["kind=autoregressive", "width=16", "depth=2", "num_heads=2", "num_components=5", *overrides]
        recipe = load_recipe(write_recipe(tmp_path, port=1), [f"prior_2.model.{field}" for field in model])
        return next(cost for cost in recipe_costs(recipe) if cost.name == "prior_2")

    recipe = load_recipe(write_recipe(tmp_path, port=1))
    config = ArPriorConfig(width=16, depth=2, num_heads=2, num_components=5)
    prior, base = ArPrior(config, recipe.clip.model.dims()), cost()
    tokens, dot = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        prior(tokens, dot, prior.encode_condition(_text(recipe, 2))).sum().backward()
    assert base.training_flops == counter.get_total_flops() / 2
    assert base.num_parameters == sum(p.numel() for p in prior.parameters())
    noise = NoiseSource.from_seeds([0])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        state = initial_tokens(prior, _text(recipe, 1), noise, config.sampler)
        for _ in range(5):
            sample_component(prior, state, config.sampler)
    assert (base.sampling_flops, base.num_calls) == (counter.get_total_flops(), 5)
    assert cost("num_candidates=3", "sampler.guidance_scale=2.0").sampling_flops == 6 * base.sampling_flops
    assert cost("num_components=0").num_calls == recipe.clip.model.embed_dim


def test_plan_prints_costs_as_json() -> None:
    answer = unclip_json("plan", "configs/demo.toml", "--cost")
    assert answer["bill"] is None  # it names no price
    rows = answer["networks"]
    assert [row["name"] for row in rows] == ["clip", "prior", "decoder", "upsampler_1", "upsampler_2"]
    assert all(row["training_bytes"] > row["activations_bytes"] > 0 for row in rows)
    assert rows[2]["h100_hours"] < rows[2]["a100_hours"]


def test_a_noise_aware_clip_is_counted_with_the_gradient_of_its_guidance(tiny: Recipe) -> None:
    section = NoisyClipStepConfig(model=NoisyClipConfig(image_px=8, tower=CONVOLUTION))
    costs = {cost.name: cost for cost in recipe_costs(dataclasses.replace(tiny, noisy_clip=section))}
    network = NoisyClip(section.model, tiny.clip.model.dims())
    assert costs["noisy_clip"].num_parameters == sum(p.numel() for p in network.parameters())
    network.requires_grad_(requires_grad=False)
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        network(x, torch.zeros(1, dtype=torch.int64)).sum().backward()
    assert costs["noisy_clip"].sampling_flops == counter.get_total_flops()
    assert costs["noisy_clip"].sampling_flops < costs["noisy_clip"].training_flops


def test_an_upsampler_with_noise_levels_is_counted_with_its_further_channel(tiny: Recipe) -> None:
    assert tiny.upsampler_1 is not None
    model = dataclasses.replace(tiny.upsampler_1.model, noise_level_max=0.5)
    noisy = dataclasses.replace(tiny, upsampler_1=dataclasses.replace(tiny.upsampler_1, model=model))
    plain, more = (
        next(cost for cost in recipe_costs(recipe) if cost.name == "upsampler_1") for recipe in (tiny, noisy)
    )
    # One more input channel of the first convolution, 3 x 3 kernels to 8 channels, for each pixel of each call.
    assert more.num_parameters - plain.num_parameters == 9 * 8
    assert more.sampling_flops - plain.sampling_flops == plain.num_calls * 2 * 9 * 8 * 16 * 16
