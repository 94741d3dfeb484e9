"""Heads: LAION's layouts against the modules that wrote them, and files that are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.errors import ConfigError
from pipeline.filter.heads import Head

DIM = 12


def _aesthetic_mlp() -> nn.Sequential:
    """As in improved-aesthetic-predictor, smaller."""
    return nn.Sequential(
        *(nn.Linear(DIM, 16), nn.Dropout(0.2), nn.Linear(16, 8), nn.Dropout(0.2), nn.Linear(8, 8), nn.Dropout(0.1)),
        *(nn.Linear(8, 4), nn.Linear(4, 1)),
    )


def _relu_mlp() -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, after in ((DIM, 16), (16, 8), (8, 8)):
        layers += [nn.Linear(width, after), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))


def _h14_nsfw() -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, after in ((DIM, 16), (16, 32), (32, 16), (16, 8), (8, 8)):
        layers += [nn.Linear(width, after), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(8, 4), nn.Linear(4, 1))


class _Nsfw(nn.Module):
    """As the torch models of CLIP-based-NSFW-Detector, smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Module()
        self.norm.register_buffer("mean", torch.linspace(-0.1, 0.1, DIM))
        self.norm.register_buffer("variance", torch.linspace(0.5, 2.0, DIM))
        self.linear_1, self.linear_2, self.linear_3 = nn.Linear(DIM, 8), nn.Linear(8, 4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x - self.norm.mean) / (self.norm.variance.sqrt() + 1e-10)  # type: ignore[operator]
        x = self.linear_2(self.linear_1(x).relu()).relu()
        return self.linear_3(x).sigmoid()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", ["linear", "aesthetic", "relu", "h14", "nsfw"])
def test_a_head_scores_as_the_module_that_was_saved(tmp_path: Path, kind: str, suffix: str) -> None:
    torch.manual_seed(0)
    makers = {"linear": lambda: nn.Linear(DIM, 1), "aesthetic": _aesthetic_mlp, "relu": _relu_mlp, "h14": _h14_nsfw}
    module = _Nsfw() if kind == "nsfw" else makers[kind]()
    is_sequential = isinstance(module, nn.Sequential)
    state = {f"layers.{name}" if is_sequential else name: value for name, value in module.state_dict().items()}
    path = tmp_path / f"head{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    z = np.random.default_rng(0).standard_normal((9, DIM)).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    with torch.no_grad():
        expected = module.eval()(torch.from_numpy(z))[:, 0].numpy()
    assert np.ptp(expected) > 0
    assert np.allclose(Head(str(path), DIM, field="f")(z), expected, atol=1e-6)


class _Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("harm"),))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.zeros(1, 5), "bias": torch.zeros(1)}, "reads 5 features where there are 12"),
        ({"weight": torch.zeros(3, DIM), "bias": torch.zeros(3)}, "3 outputs; a head has one"),
        ({"weight": torch.zeros(1, DIM)}, "no bias"),
        ({"weight": torch.zeros(DIM), "bias": torch.zeros(1)}, r"weights of the shape \(12,\)"),
        ({"weight": torch.zeros(()), "bias": torch.zeros(1)}, r"weights of the shape \(\)"),
        ({"weight": torch.zeros(1, DIM), "bias": torch.zeros(3)}, r"biases of \(3,\)"),
        ({f"layers.{n}.{name}": torch.zeros(1, DIM) for n in (0, 1) for name in ("weight", "bias")}, "unknown layout"),
        ({}, "unknown layout"),
        ([1, 2], "not a table of tensors"),
        ({"weight": _Harmful()}, "not read, because it could run code"),
    ],
)
def test_a_file_that_is_no_head_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "head.pth")
    with pytest.raises(ConfigError, match=rf"f: .*head\.pth: .*{message}"):
        Head(str(tmp_path / "head.pth"), DIM, field="f")
    assert not (tmp_path / "harm").exists()


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        Head(str(tmp_path / "none.pth"), DIM, field="f")
    for name in ("head.pth", "head.safetensors"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(ConfigError, match=name):
            Head(str(tmp_path / name), DIM, field="f")
