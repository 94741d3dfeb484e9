"""An open_clip model with its inputs: created, described, assembled from a configuration.

Legend: B batch, L text tokens, H W picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.clip_config import ClipConfig, ClipDims
from models.pixels import resize_crop, to_pixels
from pipeline.clip.inputs import ClipInputs, inputs_of
from pipeline.clip.library import Bottleneck, ResidualAttentionBlock, add_timm, open_clip
from pipeline.pictures.png import to_image

_NO_IMAGES: dict[str, Any] = {"vision_cfg": {"layers": 1, "width": 64, "patch_size": 32, "image_size": 32}}
"""A tiny image tower, which is built and deleted for a CLIP without one."""


@dataclass(frozen=True)
class OpenClip:
    """An open_clip model with what its inputs are made by."""

    model: open_clip.CLIP | open_clip.CustomTextCLIP
    inputs: ClipInputs
    mean: tuple[float, ...]
    """Mean of each colour channel, which is subtracted from values in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation of each colour channel, by which the difference is divided."""

    @property
    def model_config(self) -> dict[str, Any]:
        """open_clip's model configuration, as in open_clip_config.json."""
        return self.inputs.model_config

    @property
    def tokenizer(self) -> Any:
        """See ``ClipInputs.tokenizer``."""
        return self.inputs.tokenizer

    @property
    def has_images(self) -> bool:
        """Whether there is an image tower; diffusers' UnCLIPPipeline saves the text tower alone."""
        return "vision_cfg" in self.model_config

    @property
    def image_px(self) -> int:
        """Side of the image tower's square input, in pixels."""
        return self.inputs.framing.side_px

    @property
    def dims(self) -> ClipDims:
        """The sizes that the prior and the decoder depend on."""
        text = self.model_config["text_cfg"]
        return ClipDims(
            embed_dim=self.model_config["embed_dim"],
            text_width=text.get("width", 512),
            context_length=self.inputs.context_length,
        )

    def without_images(self) -> OpenClip:
        """The same CLIP with its text tower alone; the image tower of this one is gone, too."""
        config = {name: value for name, value in self.model_config.items() if name != "vision_cfg"}
        del self.model.visual
        return replace(self, inputs=replace(self.inputs, model_config=config))

    def without_text(self) -> OpenClip:
        """The same CLIP with its image tower alone; the text tower of this one is gone, too."""
        model: Any = self.model
        for name in [name for name, _ in model.named_children() if name != "visual"]:
            delattr(model, name)
        for name in [name for name, _ in model.named_parameters(recurse=False) if not name.startswith("logit_")]:
            delattr(model, name)
        for name in [name for name, _ in model.named_buffers(recurse=False)]:
            setattr(model, name, None)
        return self

    def tokenize(self, captions: Sequence[str]) -> Int[Tensor, "B L"]:
        """See ``ClipInputs.tokenize``."""
        return self.inputs.tokenize(captions)

    def prepare(self, images: Tensor) -> Float[Tensor, "B 3 px px"]:
        """Preprocess pictures for the image tower: frame and standardise them.

        Args:
            images: uint8 (B, H, W, 3), framed as ``ClipInputs.framing`` does; or a network's float (B, 3, H, W) in
                [-1, 1], resized by torch's bicubic, which is the same kernel without rounding and has a gradient.
        """
        is_picture = images.dtype == torch.uint8
        pixels = to_pixels(self._frame(images)) if is_picture else resize_crop(images, self.image_px)
        mean = pixels.new_tensor(self.mean).view(1, 3, 1, 1)
        std = pixels.new_tensor(self.std).view(1, 3, 1, 1)
        return (pixels.add(1).div_(2) - mean) / std

    def _frame(self, images: Tensor) -> Tensor:
        """Frame uint8 (B, H, W, 3) to (B, px, px, 3), on the same device."""
        if images.shape[1:3] == (self.image_px, self.image_px):
            return images
        squares = [self.inputs.framing(to_image(image)) for image in images.cpu().numpy()]
        return torch.from_numpy(np.stack(squares)).to(images.device)


def create_clip(config: ClipConfig) -> OpenClip:
    """Create a CLIP with random weights from torch's global generator, for training."""
    clip = _assemble(config.to_open_clip())
    setattr(clip.model, "config", config)  # noqa: B010  (open_clip's class has no such attribute; a copy keeps it)
    return clip


def describe_clip(name: str) -> OpenClip:
    """Build a public or local CLIP with random weights, to count its parameters and operations.

    Args:
        name: An architecture ("ViT-L-14"), or "local-dir:/folder".

    Raises:
        ValueError: If this machine does not know the architecture.
    """
    model_config = open_clip.get_model_config(name) if not name.startswith("hf-hub:") else None
    if model_config is None:
        raise ValueError(f"CLIP {name!r} is unknown on this machine; choose an open_clip architecture or a folder")
    return _assemble(model_config, source=name)


def build_clip(
    model_config: dict[str, Any], preprocess: dict[str, Any], state: dict[str, Tensor] | None, source: str = ""
) -> OpenClip:
    """Build a CLIP and load its weights.

    Args:
        model_config: open_clip's model configuration; without ``vision_cfg`` there is no image tower.
        preprocess: open_clip's preprocessing; OpenAI's values are the defaults.
        state: Weights of the model; None: random ones.
        source: See ``ClipInputs``.

    Raises:
        RuntimeError: If the weights do not match the configuration.
    """
    clip = _assemble(model_config, preprocess, source)
    if state is not None:
        clip.model.load_state_dict(state)
    return clip


def wrap_clip(
    model: nn.Module, model_config: dict[str, Any], preprocess: dict[str, Any] | None = None, source: str = ""
) -> OpenClip:
    """Combine an open_clip model with its preprocessing (by default OpenAI's) and its tokenizer."""
    preprocess = preprocess or {}
    mean = tuple(preprocess.get("mean") or open_clip.OPENAI_DATASET_MEAN)
    std = tuple(preprocess.get("std") or open_clip.OPENAI_DATASET_STD)
    return OpenClip(cast("open_clip.CLIP", model), inputs_of(model_config, preprocess, source), mean, std)


def blocks_of_clip(model: nn.Module) -> list[nn.Module]:
    """The blocks of both towers that run one after another."""
    return [module for module in model.modules() if isinstance(module, Bottleneck | ResidualAttentionBlock)]


def clamp_logit_scale(clip: OpenClip) -> None:
    """Keep the temperature above 1/100; called before each step (arXiv:2103.00020, section 2.5)."""
    with torch.no_grad():
        clip.model.logit_scale.clamp_(0, 4.6052)


def _assemble(model_config: dict[str, Any], preprocess: dict[str, Any] | None = None, source: str = "") -> OpenClip:
    arguments = {key: value for key, value in deepcopy(model_config).items() if key != "custom_text"}
    text = arguments["text_cfg"]
    if "timm_model_name" in arguments.get("vision_cfg", {}):
        add_timm()
        arguments["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
        folder = source.removeprefix("local-dir:")
        if (Path(folder) / "config.json").is_file():  # ``save_clip`` wrote it
            text["hf_model_name"] = folder
    kind = open_clip.CLIP
    if model_config.get("custom_text") or "hf_model_name" in text:
        kind = open_clip.CoCa if "multimodal_cfg" in arguments else open_clip.CustomTextCLIP
    model = kind(**_NO_IMAGES | arguments)
    if "vision_cfg" not in model_config:
        del model.visual  # open_clip cannot build a text tower alone
    return wrap_clip(model, model_config, preprocess, source)
