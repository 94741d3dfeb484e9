"""Configurations: cross checks, strictness, and no heavy imports."""

import ast
import dataclasses
import inspect
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from models.ar_prior.config import ArPriorConfig
from models.clip_config import ClipConfig
from models.decoder.config import DecoderConfig
from models.diffusion import config as configs
from models.diffusion.config import DiffusionConfig, SamplerConfig
from models.layers.config import UNetConfig
from models.noisy_clip.config import NoisyClipConfig
from models.prior.config import PriorConfig
from models.upsampler.config import UpsamplerConfig

CLASSES = [value for value in vars(configs).values() if dataclasses.is_dataclass(value)]


@pytest.mark.parametrize("cls", CLASSES)
def test_config_defaults_are_valid_and_hashable(cls: type) -> None:
    assert hash(cls()) == hash(cls())


@pytest.mark.parametrize("cls", CLASSES)
def test_config_documents_every_field(cls: type) -> None:
    tree = ast.parse(Path(inspect.getfile(cls)).read_text())
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    for statement, following in pairwise(body):
        if isinstance(statement, ast.AnnAssign):
            documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            assert documented, f"{cls.__name__}.{ast.unparse(statement.target)} has no docstring"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamplerConfig(num_steps=0), "num_steps = 0"),
        (lambda: SamplerConfig(respacing="fast27", num_steps=50), "takes 27 steps"),
        (lambda: SamplerConfig(respacing="5,3", num_steps=50), "takes 8 steps"),
        (lambda: SamplerConfig(respacing="fast28", num_steps=50), "or sections such as"),
        (lambda: SamplerConfig(respacing="5,0", num_steps=5), "or sections such as"),
        (
            lambda: PriorConfig(sampler=SamplerConfig(respacing="1,501", num_steps=502)),
            "1000 timesteps hold only 500, 500",
        ),
        (lambda: ClipConfig(image_px=50), "multiple of 32"),
        (lambda: ClipConfig(text_width=100, text_heads=3), "multiple of text_heads"),
        (lambda: PriorConfig(width=100, num_heads=3), "multiple of num_heads"),
        (lambda: PriorConfig(text_drop_prob=1.5), "probability"),
        (lambda: PriorConfig(dropout=1.0), "dropout = 1.0: a probability"),
        (lambda: ArPriorConfig(dropout=1 - 2**-17), "dropout = 0.9999"),
        (lambda: UNetConfig(dropout=-0.1), "dropout = -0.1"),
        (lambda: PriorConfig(diffusion=DiffusionConfig(variance="learned_range")), "the prior predicts"),
        (lambda: PriorConfig(diffusion=DiffusionConfig(num_timesteps=10)), "above num_timesteps"),
        (lambda: PriorConfig(diffusion=DiffusionConfig(loss="vlb")), "256 grey levels"),
        (lambda: DiffusionConfig(loss="vlb", loss_weighting="min_snr"), "weighs a squared error"),
        (lambda: DiffusionConfig(min_snr_floor=6.0), "from 0 to min_snr_gamma = 5.0"),
        (lambda: NoisyClipConfig(diffusion=DiffusionConfig(loss="vlb")), "trained by contrast"),
        (lambda: NoisyClipConfig(diffusion=DiffusionConfig(timestep_draws="loss_aware")), "trained by contrast"),
        (lambda: UNetConfig(channels=100, norm_groups=32), "multiple of norm_groups"),
        (lambda: DecoderConfig(image_px=36), "is not a multiple of 8"),
        (lambda: DecoderConfig(image_px=128), "not among the levels"),
        (lambda: DecoderConfig(unet=UNetConfig(channels=96, channel_mults=(1, 2, 3, 5))), "head_channels"),
        (lambda: UpsamplerConfig(low_res_px=100), "larger multiple"),
        (lambda: UpsamplerConfig(crop_px=66), "multiple of 4"),
        (lambda: UpsamplerConfig(unet=UNetConfig()), "an upsampler has none"),
        (lambda: UpsamplerConfig(sampler=SamplerConfig(guidance_scale=2.0)), "not guided"),
        (lambda: UpsamplerConfig(sampler=SamplerConfig(clip_guidance_scale=2.0)), "decoder alone"),
        (lambda: PriorConfig(sampler=SamplerConfig(num_steps=64, clip_guidance_scale=2.0)), "decoder alone"),
        (lambda: DecoderConfig(sampler=SamplerConfig(method="analytic")), "for the prior alone"),
        (lambda: UpsamplerConfig(sampler=SamplerConfig(method="analytic")), "for the prior alone"),
        (lambda: SamplerConfig(clip_guidance_scale=-1.0), "not negative"),
    ],
)
def test_config_refuses_what_cannot_be(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_config_of_the_paper_is_valid() -> None:
    decoder = DecoderConfig(unet=UNetConfig(channels=512))
    assert decoder.unet.level_sides_px(decoder.image_px) == (64, 32, 16, 8)
    UpsamplerConfig(unet=UNetConfig(channels=320, attention_resolutions=()))
    UpsamplerConfig(
        image_px=1024,
        low_res_px=256,
        crop_px=256,
        unet=UNetConfig(channels=192, num_res_blocks=2, channel_mults=(1, 1, 2, 2, 4, 4), attention_resolutions=()),
        degradation="bsr",
    )


def test_config_imports_neither_torch_nor_pydantic() -> None:
    code = "import sys, models.diffusion.config; print(sorted({'torch', 'pydantic', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
