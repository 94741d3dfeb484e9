"""A network of the recipe whose features are compared."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import DataError
from pipeline.evaluate import metrics as m
from pipeline.evaluate.features import FeatureExtractor
from pipeline.recipe.recipe import Recipe
from pipeline.shapes.draw import draw_array
from pipeline.workspace.store import Artifact
from tests.evaluate.conftest import run_evaluate
from tests.tiny.workspace import evaluate_step


class _Patches(torch.nn.Module):
    """Stands for an Inception: uint8 pictures to features, with the option that the published file has."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        features = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
        return features if return_features else features.sum(1)


def test_a_recipes_own_features_give_a_frechet_distance(tiny: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "features.pt"
    torch.jit.script(_Patches()).save(str(file))
    evaluate = dataclasses.replace(tiny.evaluate, features_path=str(file))
    recipe, output = dataclasses.replace(tiny, evaluate=evaluate), Artifact(str(tmp_path / "out"))
    assert evaluate_step(recipe).key != evaluate_step(tiny).key
    work, metrics = run_evaluate(recipe, output)
    assert metrics["frechet_features"]["count"] == 10

    def features(picture: Any) -> Any:
        planes = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
        return _Patches()(planes, return_features=True).numpy()[0]

    generated, real = [], []
    for number, prompt in enumerate(work.prompts.prompts):
        with Image.open(output.path(f"samples/{number:05d}-0.png")) as image:
            generated.append(features(image))
        assert prompt.scene is not None
        real.append(features(draw_array(prompt.scene, 32)))
    expected = m.frechet_distance(m.FeatureSums.of(np.array(generated)), m.FeatureSums.of(np.array(real)))
    assert metrics["frechet_features"]["generated"] == pytest.approx(expected, rel=1e-3)


def test_a_feature_file_that_is_none_is_a_data_error_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "features.pt"
    file.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"features\.pt: not a TorchScript file"):
        FeatureExtractor(str(file))
    torch.jit.script(_Patches()).save(str(file))
    with pytest.raises(DataError, match=r"one vector each|fails on"):
        FeatureExtractor(str(file))(np.zeros((2, 0, 0, 3), np.uint8))
