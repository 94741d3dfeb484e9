"""Guidance: what the wrapped denoiser means, exactly where the answer is known."""

import pytest
import torch
from gaussian_data import GaussianData, make_diffusion, output_from_x0
from torch import Tensor

from models.diffusion.guidance import classifier_free, clip_log_prob, score_guided


def fixed_output(uncond: Tensor, cond: Tensor):  # noqa: ANN201  (a closure that counts its calls)
    calls: list[int] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        assert torch.equal(x[: len(x) // 2], x[len(x) // 2 :])
        assert torch.equal(t[: len(t) // 2], t[len(t) // 2 :])
        return torch.cat([uncond, cond])

    return denoise, calls


@pytest.mark.parametrize(("scale", "share"), [(0.0, 0.0), (1.0, 1.0), (3.0, 3.0)])
def test_classifier_free_extrapolates_from_uncond_to_cond_in_one_call(scale: float, share: float) -> None:
    uncond, cond = torch.randn(2, 2, 3, 4, 4).unbind(0)
    denoise, calls = fixed_output(uncond, cond)
    actual = classifier_free(denoise, scale)(torch.randn(2, 3, 4, 4), torch.tensor([1, 2]))
    torch.testing.assert_close(actual, uncond + share * (cond - uncond))
    assert calls == [4]


def test_classifier_free_takes_the_learned_variance_from_the_conditional_half() -> None:
    uncond, cond = torch.randn(2, 2, 6, 4, 4).unbind(0)
    denoise, _ = fixed_output(uncond, cond)
    actual = classifier_free(denoise, 4.0)(torch.randn(2, 3, 4, 4), torch.tensor([1, 2]))
    assert torch.equal(actual[:, 3:], cond[:, 3:])
    torch.testing.assert_close(actual[:, :3], uncond[:, :3] + 4 * (cond[:, :3] - uncond[:, :3]))


def test_classifier_free_takes_a_scale_per_item() -> None:
    uncond, cond = torch.zeros(2, 5), torch.ones(2, 5)
    denoise, _ = fixed_output(uncond, cond)
    actual = classifier_free(denoise, torch.tensor([1.5, 7.0]))(torch.randn(2, 5), torch.tensor([1, 2]))
    assert actual[:, 0].tolist() == [1.5, 7.0]


def test_classifier_free_is_the_same_guidance_for_every_prediction() -> None:
    t = torch.tensor([20, 600])
    x, x0_uncond, x0_cond = torch.randn(3, 2, 7, dtype=torch.float64).unbind(0)
    actual = []
    for prediction in ("eps", "x0", "v"):
        diffusion = make_diffusion(prediction=prediction)
        both = [output_from_x0(diffusion, x0, x, t) for x0 in (x0_uncond, x0_cond)]
        denoise, _ = fixed_output(*both)
        actual.append(diffusion.predict(classifier_free(denoise, 2.5)(x, t), x, t, t - 1).x0)
    torch.testing.assert_close(actual[0], actual[1])
    torch.testing.assert_close(actual[2], actual[1])


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_classifier_guidance_turns_a_mixture_into_its_component(prediction: str) -> None:
    # score(x | y) = score(x) + grad log p(y | x): with the exact classifier and scale 1, the exact conditional network
    diffusion = make_diffusion(prediction=prediction)
    components = [GaussianData(std=0.3, mean=-0.5), GaussianData(std=0.3, mean=0.6)]

    def log_densities(x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = diffusion.alpha_bar(t)[:, None]
        means = torch.tensor([[-0.5, 0.6]], dtype=torch.float64) * alpha_bar.sqrt()
        return -0.5 * (x - means) ** 2 / (alpha_bar * 0.09 + 1 - alpha_bar)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        share = torch.softmax(log_densities(x, t), dim=1)
        means = torch.cat([one.posterior_mean(diffusion, x, t) for one in components], dim=1)
        return output_from_x0(diffusion, (share * means).sum(dim=1, keepdim=True), x, t)

    t = torch.tensor([50, 300, 600])
    x = torch.randn(3, 1, dtype=torch.float64)
    for label in (0, 1):

        def log_prob(x: Tensor, t: Tensor, label: int = label) -> Tensor:
            return torch.log_softmax(log_densities(x, t), dim=1)[:, label]

        with torch.no_grad():  # samplers run without gradients; the guidance makes its own
            actual = score_guided(denoise, log_prob, diffusion, 1.0)(x, t)
        expected = components[label].denoiser(diffusion)(x, t)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_score_guidance_leaves_the_learned_variance_and_scales_per_item() -> None:
    diffusion, t = make_diffusion(variance="learned_range"), torch.tensor([300, 300])
    x, output = torch.randn(2, 3, 2, 2), torch.randn(2, 6, 2, 2)
    guided = score_guided(
        lambda _x, _t: output, lambda x, _t: x.flatten(1).sum(dim=1), diffusion, torch.tensor([0.0, 2.0])
    )
    actual = guided(x, t)
    s = (1 - diffusion.alpha_bar(t)).sqrt()[0].item()
    assert torch.equal(actual[:, 3:], output[:, 3:])
    assert torch.equal(actual[0], output[0])
    torch.testing.assert_close(actual[1, :3], output[1, :3] - 2 * s)


def test_clip_guidance_moves_the_sample_towards_the_caption() -> None:
    diffusion, t = make_diffusion(prediction="x0"), torch.tensor([200, 500])
    torch.manual_seed(0)
    project = torch.randn(12, 5)
    z_text = torch.nn.functional.normalize(torch.randn(2, 5), dim=1)

    def encode(x: Tensor, t: Tensor) -> Tensor:
        return x.flatten(1) @ project

    x, x0 = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    guided = score_guided(lambda _x, _t: x0, clip_log_prob(encode, z_text, 10.0), diffusion, 1.0)
    before = torch.cosine_similarity(encode(x, t), z_text)
    moved = x + 0.05 * (guided(x, t) - x0)
    assert bool((torch.cosine_similarity(encode(moved, t), z_text) > before).all())
    twice = score_guided(lambda _x, _t: x0, clip_log_prob(encode, z_text, 20.0), diffusion, 1.0)
    torch.testing.assert_close(twice(x, t) - x0, 2 * (guided(x, t) - x0))


def test_clip_guidance_is_the_same_in_inference_mode() -> None:
    """A server draws in inference mode, in which nothing can be differentiated without leave."""
    diffusion, t = make_diffusion(prediction="x0"), torch.tensor([200, 500])

    def moved() -> Tensor:
        x, z_text = torch.arange(24.0).view(2, 3, 2, 2) / 10 - 1, torch.eye(12)[:2].clone()
        return score_guided(lambda x, _t: x, clip_log_prob(lambda x, _t: x.flatten(1), z_text, 10.0), diffusion, 1.0)(
            x, t
        )

    with torch.inference_mode():
        actual = moved()
    torch.testing.assert_close(actual.clone(), moved())
