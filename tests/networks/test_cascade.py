from pathlib import Path
from typing import Any

import pytest
import torch

from models.decoder.stage import DecoderStage
from pipeline.networks.cascade import load_cascade
from pipeline.recipe.plan import finished_artifacts
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.workspace.store import Artifact


def weights_on(network: torch.nn.Module) -> set[str]:
    """Where the weights of a network are, but for its empty caption."""
    return {tensor.device.type for name, tensor in network.state_dict().items() if not name.startswith("null_text.")}


@pytest.mark.parametrize("steps", [{"clip", "prior"}, {"decoder"}, {"upsampler_1"}])
def test_a_part_of_a_chain_reads_the_weights_of_its_own_networks_alone(
    tiny: Recipe, steps: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts, read, path_of = finished_artifacts(tiny, CASCADE_STEPS), set[str](), Artifact.path
    steps_of = {artifact.uri: step for step, artifact in artifacts.items()}

    def path(self: Artifact, name: str) -> Path:
        if name.endswith(".safetensors"):
            read.add(steps_of[self.uri])
        return path_of(self, name)

    monkeypatch.setattr(Artifact, "path", path)
    part: Any = load_cascade(artifacts, steps=steps)
    assert read == steps
    assert part.clip.device.type == ("cpu" if "clip" in steps else "meta")
    for stage in part.stages:
        assert weights_on(stage.network) == {"cpu" if stage.name in steps else "meta"}


def test_the_part_with_clip_has_the_empty_caption_of_the_decoder(tiny: Recipe) -> None:
    artifacts = finished_artifacts(tiny, CASCADE_STEPS)
    part, whole = (load_cascade(artifacts, steps=steps) for steps in ({"clip", "prior"}, None))
    own, expected = (cascade.stage("decoder", DecoderStage).network.null_text for cascade in (part, whole))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(getattr(own, name), tensor)
    assert own.hidden.any()
