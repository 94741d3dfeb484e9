"""Heads on CLIP's image embeddings: an aesthetic score, a probability of NSFW; weights come from files.

Three layouts are known, by the names of their tensors. Weights are read as tensors alone: no file runs code.
    weight, bias                              LAION-AI/aesthetic-predictor: one linear layer
    layers.N.weight, layers.N.bias            christophschuhmann/improved-aesthetic-predictor, and the H/14 model of
                                              LAION-AI/CLIP-based-NSFW-Detector: an nn.Sequential
    norm.mean, norm.variance, linear_N.*      the B/32 and L/14 models of CLIP-based-NSFW-Detector, in torch
Legend: N rows, D features of an embedding.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import ConfigError

_SEQUENTIALS: dict[tuple[int, ...], frozenset[int]] = {
    (0, 2, 4, 6, 7): frozenset(),  # sac+logos+ava1-l14-linearMSE: dropout between the layers, no activation
    (0, 3, 6, 9, 11): frozenset({0, 3, 6, 9}),  # ava+logos-l14-reluMSE
    (0, 3, 6, 9, 12, 15, 16): frozenset({0, 3, 6, 9, 12}),  # h14_nsfw
}
"""Places of the linear layers in each known nn.Sequential, and those that a ReLU follows."""
_EPS = 1e-10


class Head:
    """A small network on z_image, with one output.

    Args:
        path: File of the weights: .safetensors, or anything that torch.save wrote.
        embed_dim: D of the embeddings.
        field: Field of the recipe that names the file, for messages.

    Raises:
        ConfigError: If the file cannot be read, its layout is unknown or it is for another width.
    """

    def __init__(self, path: str, embed_dim: int, *, field: str) -> None:
        self._where = f"{field}: {path}"
        tensors = _read(path, self._where)
        self._mean, self._scale = _normalisation(tensors)
        self._layers, self._has_relu, self._has_sigmoid = _layers(tensors, self._where)
        for weight, bias in self._layers:
            if weight.ndim != 2 or bias.shape != weight.shape[:1]:
                raise ConfigError(
                    f"{self._where}: a layer has weights of the shape {tuple(weight.shape)} and biases of "
                    f"{tuple(bias.shape)}; a head's are (outputs, features) and (outputs,)"
                )
        widths = [embed_dim, *(int(weight.shape[0]) for weight, _ in self._layers)]
        for (weight, _), width in zip(self._layers, widths, strict=False):
            if weight.shape[1] != width:
                raise ConfigError(
                    f"{self._where}: a layer reads {weight.shape[1]} features where there are {width} "
                    f"(the embeddings have {embed_dim}); the head belongs to another CLIP"
                )
        if widths[-1] != 1:
            raise ConfigError(f"{self._where}: {widths[-1]} outputs; a head has one")

    @torch.no_grad()
    def __call__(self, z_image: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores (N,) of embeddings (N, D) of length one."""
        values = (torch.from_numpy(z_image) - self._mean) / self._scale
        for (weight, bias), has_relu in zip(self._layers, self._has_relu, strict=True):
            values = torch.nn.functional.linear(values, weight, bias)
            values = values.relu() if has_relu else values
        return (values.sigmoid() if self._has_sigmoid else values)[:, 0].numpy()


def _read(path: str, where: str) -> dict[str, Tensor]:
    try:
        loaded = load_file(path) if Path(path).suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{where}: no such file") from None
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise ConfigError(f"{where}: no readable weights ({str(error).splitlines()[0]})") from None
    except Exception as error:  # noqa: BLE001  (torch's unpickler raises an UnpicklingError of its own, and others)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"{where}: not plain tensors ({reason}); it is not read, because it could run code") from None
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ConfigError(f"{where}: not a table of tensors (a state_dict)")
    return {str(name): tensor.float() for name, tensor in tensors.items()}


def _normalisation(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    if "norm.mean" not in tensors or "norm.variance" not in tensors:
        return torch.zeros(1), torch.ones(1)
    return tensors["norm.mean"].reshape(1, -1), tensors["norm.variance"].reshape(1, -1).sqrt() + _EPS


def _layers(tensors: dict[str, Tensor], where: str) -> tuple[list[tuple[Tensor, Tensor]], list[bool], bool]:
    """Weights and biases in order, whether a ReLU follows each, and whether a sigmoid follows the last."""
    names = sorted(
        (name.removesuffix(".weight") for name in tensors if name.endswith("weight")),
        key=lambda name: int("".join(filter(str.isdigit, name.rpartition(".")[2])) or 0),
    )
    try:
        layers = [
            (
                tensors[name if name == "weight" else f"{name}.weight"],
                tensors["bias" if name == "weight" else f"{name}.bias"],
            )
            for name in names
        ]
    except KeyError as error:
        raise ConfigError(f"{where}: a layer has no {error.args[0]}") from None
    places = tuple(int(name.removeprefix("layers.")) for name in names if name.startswith("layers."))
    if len(layers) == 1:
        return layers, [False], False
    if places in _SEQUENTIALS:
        return layers, [place in _SEQUENTIALS[places] for place in places], False
    if layers and all(name.startswith("linear_") for name in names) and "norm.mean" in tensors:
        return layers, [*(True for _ in layers[1:]), False], True
    raise ConfigError(
        f"{where}: unknown layout ({', '.join(sorted(tensors)) or 'no tensors'}); known are one linear layer, LAION's "
        "aesthetic MLP and LAION's NSFW detectors"
    )
