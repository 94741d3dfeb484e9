"""Networks that are sampled in half precision, in TF32, or compiled."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from models.cascade import Cascade
from models.stage import PIXELS, Z_IMAGE, Batch
from pipeline.errors import ConfigError
from pipeline.networks.arithmetic import Arithmetic
from pipeline.networks.cascade import load_cascade, network_configs
from pipeline.networks.quality import psnr_db
from pipeline.recipe.plan import finished_artifacts
from pipeline.recipe.recipe import load_recipe, parse_recipe
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.runtime.loading import load_engine
from pipeline.runtime.parts import write_tables
from tests.tiny.networks import make_cascade, save_cascade

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_cascade(make_cascade(), tmp_path / "mine")
    return tmp_path / "mine"


@pytest.fixture
def float32_settings() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def _load(folder: Path, arithmetic: Arithmetic) -> Cascade:
    recipe = load_recipe(folder)
    return load_cascade(
        finished_artifacts(recipe, CASCADE_STEPS), "cpu", network_configs(recipe), arithmetic=arithmetic
    )


def test_pictures_in_bfloat16_are_nearly_those_in_float32(folder: Path) -> None:
    whole, half = (
        _load(folder, Arithmetic(precision)).sample(PROMPTS, [0, 1]) for precision in ("float32", "bfloat16")
    )
    assert half.z_image.dtype == torch.float32
    assert not torch.equal(whole.z_image, half.z_image)
    assert (psnr_db(half.images.numpy(), whole.images.numpy()) > 30).all()


def test_the_diffusion_networks_are_compiled_for_any_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, *, dynamic: compiled.append((type(module).__name__, dynamic))
    )
    _load(folder, Arithmetic())
    assert not compiled
    _load(folder, Arithmetic(compiled=True))
    assert set(compiled) == {("Prior", True), ("Decoder", True), ("Upsampler", True)}


@pytest.mark.slow  # a compiler of C++ takes minutes for a tiny network
@pytest.mark.timeout(900)
def test_a_compiled_network_samples_the_same_for_batches_of_any_size(folder: Path) -> None:
    eager, compiled = (_load(folder, Arithmetic(compiled=is_compiled)) for is_compiled in (False, True))
    counters.clear()
    for size in (2, 3, 4):
        pixels, z_image = torch.zeros(size, 3, 16, 16), torch.zeros(size, eager.clip.dims.embed_dim)
        batch = Batch(eager.clip.encode_text(["a"] * size), tuple(range(size)), {PIXELS: pixels, Z_IMAGE: z_image})
        one, other = (cascade.run_stage(cascade.stages[-1], batch) for cascade in (eager, compiled))
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1


def test_float32_is_whole_on_a_gpu_unless_tf32_is_asked_for(float32_settings: None) -> None:
    del float32_settings
    for precision, expected in (("tf32", ("high", True)), ("float32", ("highest", False))):
        Arithmetic(precision).set_up()
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == expected


def test_a_replica_computes_as_its_recipe_says(folder: Path, float32_settings: None) -> None:
    del float32_settings
    recipe = load_recipe(folder, ["serve.precision=bfloat16"])
    engine = load_engine(write_tables(recipe, finished_artifacts(recipe, CASCADE_STEPS)))
    engine.close()
    types = {type(stage.network.forward).__name__ for stage in engine._stages}  # pyright: ignore
    assert types == {"function"}  # a method is what a network has of its own


@pytest.mark.parametrize("precision", ["tf32", "float16"])
def test_what_needs_a_gpu_is_refused_without_one(precision: str) -> None:
    with pytest.raises(ConfigError, match=r"needs accelerator = \"cuda\""):
        parse_recipe({"serve": {"precision": precision}})
