import pytest
import torch
from torch import nn

from pipeline.recipe.train_sections import TrainConfig
from pipeline.train.muon import Muon, kernels_of, orthogonal
from pipeline.train.state import create_state


@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 32, 90), (2, 90, 32)])
def test_orthogonal_brings_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    near = orthogonal(matrices)
    values = torch.linalg.svdvals(near)
    assert values.max() < 1.3
    assert values.quantile(0.05) > 0.5  # the smallest may need more iterations
    exact = u @ vh
    cosines = (near * exact).sum((1, 2)) / (near.norm(dim=(1, 2)) * exact.norm(dim=(1, 2)))
    assert cosines.min() > 0.95


def test_orthogonal_does_not_depend_on_scale_and_survives_zero() -> None:
    matrix = torch.randn(1, 32, 48, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(orthogonal(1e-4 * matrix), orthogonal(matrix), atol=1e-4)
    assert not orthogonal(torch.zeros(1, 32, 32)).any()


def test_kernels_of_takes_the_large_kernels_of_convolutions_and_linear_layers() -> None:
    network = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3), nn.Embedding(50, 64), nn.Linear(64, 32))
    ids = {id(kernel) for kernel in kernels_of(network)}
    assert ids == {id(network[1].weight), id(network[3].weight)}


def test_muon_moves_a_kernel_by_the_orthogonal_matrix_of_its_gradient_and_the_rest_as_adamw() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 40, 3).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    config = TrainConfig(optimizer="muon", learning_rate=0.01)
    state = create_state(layer, config, torch.device("cpu"))
    assert isinstance(state.optimizer, Muon)
    before, bias = layer.weight.detach().clone(), layer.bias.detach().clone()  # pyright: ignore
    layer(torch.randn(4, 32, 5, 5)).square().mean().backward()
    assert layer.weight.grad is not None
    expected = 0.01 * 0.2 * (32 * 9) ** 0.5 * orthogonal(layer.weight.grad.flatten(1)[None])[0]
    state.optimizer.step()
    assert torch.allclose(before - layer.weight.detach(), expected.view_as(before), atol=1e-5)
    assert torch.allclose((bias - layer.bias.detach()).abs(), torch.full_like(bias, 0.01), atol=1e-4)  # pyright: ignore
    assert expected.square().mean().sqrt() == pytest.approx(0.01 * 0.2 * (288 / 40 / 7.2) ** 0.5, rel=0.2)


def test_muon_looks_ahead_decays_and_leaves_all_as_it_is_where_a_gradient_is_not_finite() -> None:
    generator = torch.Generator().manual_seed(3)
    kernel, unused = nn.Parameter(torch.randn(40, 48, generator=generator)), nn.Parameter(torch.ones(32, 32))
    group = {"params": [kernel, unused], "weight_decay": 0.1, "muon": True}
    optimizer = Muon([group], lr=0.01, fused=True)
    expected, momentum = kernel.detach().clone(), torch.zeros(40, 48)
    for _ in range(3):
        kernel.grad = torch.randn(40, 48, generator=generator)
        momentum = 0.95 * momentum + 0.05 * kernel.grad
        ahead = 0.95 * momentum + 0.05 * kernel.grad
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 48**0.5 * orthogonal(ahead[None])[0]
        optimizer.step()
        torch.testing.assert_close(kernel.detach(), expected, rtol=0, atol=1e-5)
    kernel.grad = torch.full((40, 48), torch.inf)
    optimizer.found_inf = torch.ones(())
    before = kernel.detach().clone()
    optimizer.step()
    assert torch.equal(kernel, before)
    torch.testing.assert_close(optimizer.state[kernel]["momentum"], momentum)
    assert torch.equal(unused, torch.ones(32, 32))
