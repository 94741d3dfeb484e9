"""The noise-aware CLIP: what it reads, what it learns, and that its guidance turns pictures towards a caption."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CONVOLUTION
from torch import Tensor

from models.clip_config import ClipDims
from models.diffusion.config import DiffusionConfig, SamplerConfig
from models.diffusion.guidance import clip_log_prob, score_guided
from models.diffusion.process import Diffusion
from models.diffusion.samplers import sample
from models.noisy_clip.config import NoisyClipConfig
from models.noisy_clip.network import NoisyClip, clip_guided

DIMS = ClipDims(embed_dim=4)
CONFIG = NoisyClipConfig(image_px=8, tower=CONVOLUTION, diffusion=DiffusionConfig(num_timesteps=100))
DIFFUSION = Diffusion(CONFIG.diffusion)
# Two kinds of pictures, dark and bright, and the embeddings of their captions.
Z_TEXT = torch.eye(4)[:2]


def _pictures(kinds: Tensor, generator: torch.Generator) -> Tensor:
    brightness = torch.tensor([-0.7, 0.7])[kinds][:, None, None, None]
    return brightness + 0.1 * torch.randn(len(kinds), 3, 8, 8, generator=generator)


def _loss(network: NoisyClip, x_t: Tensor, t: Tensor) -> Tensor:
    logits, own = network.logit_scale * network(x_t, t) @ Z_TEXT.T, torch.arange(2)
    return F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)


@pytest.fixture(scope="module")
def trained() -> NoisyClip:
    torch.manual_seed(0)
    network, generator = NoisyClip(CONFIG, DIMS), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for _ in range(80):
        kinds = torch.tensor([0, 1])
        x0, t = _pictures(kinds, generator), torch.randint(100, (2,), generator=generator)
        x_t = DIFFUSION.q_sample(x0, t, torch.randn(x0.shape, generator=generator))
        _loss(network, x_t, t).backward()
        optimizer.step()
        optimizer.zero_grad()
    return network.eval().requires_grad_(requires_grad=False)


def test_temperature_stays_above_a_hundredth() -> None:
    network = NoisyClip(CONFIG, DIMS)
    assert float(network.logit_scale.detach()) == pytest.approx(1 / 0.07)
    network.log_scale.data.fill_(50.0)
    assert float(network.logit_scale.detach()) == pytest.approx(100)


def test_noisy_clip_embeds_pictures_at_their_timestep_with_length_one() -> None:
    torch.manual_seed(2)
    network = NoisyClip(CONFIG, DIMS)
    for parameter in network.stages.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 3, 8, 8)
    early, late = network(x, torch.tensor([1, 1])), network(x, torch.tensor([90, 90]))
    torch.testing.assert_close(early.norm(dim=1), torch.ones(2))
    assert (early - late).abs().max() > 1e-3


def test_noisy_clip_folds_patches_and_halves_the_side_between_levels() -> None:
    torch.manual_seed(3)
    folded = NoisyClip(replace(CONFIG, tower=replace(CONVOLUTION, patch_px=2)), DIMS)
    sides: list[int] = []
    for stage in folded.stages:
        stage.register_forward_hook(lambda _stage, _given, actual: sides.append(actual.shape[-1]))
    folded(torch.randn(2, 3, 8, 8), torch.tensor([1, 90]))
    assert sides == [4, 2, 2]


def test_noisy_clip_tells_kinds_apart_through_noise(trained: NoisyClip) -> None:
    generator = torch.Generator().manual_seed(5)
    kinds = torch.arange(64) % 2
    x0 = _pictures(kinds, generator)
    for step, least in ((5, 1.0), (40, 0.95)):
        t = torch.full((64,), step)
        x_t = DIFFUSION.q_sample(x0, t, torch.randn(x0.shape, generator=generator))
        right = (trained(x_t, t) @ Z_TEXT.T).argmax(1) == kinds
        assert right.float().mean() >= least


def test_guidance_turns_pictures_towards_the_caption(trained: NoisyClip) -> None:
    """The unguided denoiser knows the mixture of both kinds alone, and draws each as often."""
    x_T = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(3))

    def mixture(x: Tensor, t: Tensor) -> Tensor:
        a, s = DIFFUSION.signal_noise(x, t)
        variance = (a * 0.1) ** 2 + s**2
        score = (1.4 * a * x / variance).flatten(1).sum(1)  # log odds of bright against dark
        mean = 0.7 * torch.tanh(score / 2)[:, None, None, None]
        x0 = mean + a * 0.01 / variance * (x - a * mean)
        return DIFFUSION.eps_from_x0(x0, x, t)

    config = SamplerConfig(method="ddim", num_steps=10, clip_x0=False)
    brightness: list[float] = []
    for label in (0, 1):
        z_text = Z_TEXT[label : label + 1].expand(16, -1)
        guided = clip_guided(mixture, trained, z_text, DIFFUSION, scale=3.0)
        with torch.no_grad():
            pictures = sample(guided, x_T, DIFFUSION, config)
        brightness.append(float((pictures.mean((1, 2, 3)) > 0).float().mean()))
    plain = sample(mixture, x_T, DIFFUSION, config)
    assert 0.2 < (plain.mean((1, 2, 3)) > 0).float().mean() < 0.8
    assert brightness[0] < 0.15
    assert brightness[1] > 0.85
    t = torch.full((16,), 50)
    by_clip = score_guided(mixture, clip_log_prob(trained, z_text, float(trained.logit_scale)), DIFFUSION, 3.0)
    torch.testing.assert_close(guided(x_T, t), by_clip(x_T, t))  # as sharp as it was trained to be
    torch.testing.assert_close(
        clip_guided(mixture, trained, Z_TEXT[:1].expand(16, -1), DIFFUSION, scale=0.0)(x_T, torch.full((16,), 50)),
        mixture(x_T, torch.full((16,), 50)),
    )
