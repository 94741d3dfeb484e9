"""CLIP; no other module imports open_clip.

Legend: B batch, L text tokens, D joint space, W text width, H W picture. A checkpoint is a folder in open_clip's
``local-dir:`` layout: open_clip_config.json and open_clip_model.safetensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.clip_config import ClipConfig, ClipDims
from models.pixels import resize_crop, to_pixels
from models.text import TextEncoding
from pipeline.pictures import square, to_image


def _declare_torchvision_operators() -> torch.library.Library | None:
    """Make a CUDA build of torchvision importable with a CPU-only torch.

    Its compiled operators cannot be loaded then, and importing it (as open_clip does) fails with "operator
    torchvision::nms does not exist". The import needs these two schemas and nothing else.
    """
    spec = importlib.util.find_spec("torchvision")
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else Path()
    for binary in [*folder.glob("_C.so"), *folder.glob("_C.*.so")]:
        try:
            ctypes.CDLL(str(binary))
        except OSError:
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            return library
    return None


@contextlib.contextmanager
def _hide_package(name: str) -> Generator[None]:
    """Hide an optional package from imports inside the block, unless it is loaded already."""
    is_loaded = name in sys.modules
    if not is_loaded:
        sys.modules[name] = cast("ModuleType", None)
    try:
        yield
    finally:
        if not is_loaded:
            del sys.modules[name]


_TORCHVISION_SCHEMAS = _declare_torchvision_operators()  # without this reference the schemas would be removed

with _hide_package("wandb"):  # open_clip's timm would import it for half a second; img2dataset depends on it
    import open_clip
from open_clip.loss import ClipLoss  # noqa: E402
from open_clip.tokenizer import SimpleTokenizer  # noqa: E402
from open_clip.transformer import TextTransformer, text_global_pool  # noqa: E402

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
NO_IMAGE_TOWER = (
    "this CLIP has no image tower, so it cannot embed pictures: no edits, no search, no training. Add image_encoder/ "
    "and feature_extractor/ of the same CLIP to the imported folder and import it again; or set clip.name and "
    "clip.tag to a complete CLIP with the same text tower (Karlo's is ViT-L-14-quickgelu, openai)"
)
_NO_IMAGES: dict[str, Any] = {"vision_cfg": {"layers": 1, "width": 64, "patch_size": 32, "image_size": 32}}
"""A tiny image tower, which is built and deleted for a CLIP without one."""
_LENGTH_MULTIPLE = 8
"""Batches of captions are cut to a multiple of this many tokens, so that kernels see few different shapes."""


@dataclass(frozen=True)
class OpenClip:
    """An open_clip model with its tokenizer and its configuration."""

    model: open_clip.CLIP | open_clip.CustomTextCLIP
    tokenizer: SimpleTokenizer
    model_config: dict[str, Any]
    """open_clip's model configuration, as in open_clip_config.json."""
    mean: tuple[float, ...]
    """Mean of each colour channel, which is subtracted from values in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation of each colour channel, by which the difference is divided."""

    @property
    def has_images(self) -> bool:
        """Whether there is an image tower; diffusers' UnCLIPPipeline saves the text tower alone."""
        return "vision_cfg" in self.model_config

    @property
    def image_px(self) -> int:
        """Side of the image tower's square input, in pixels."""
        size = self.model.visual.image_size
        return int(size[0] if isinstance(size, tuple) else size)

    @property
    def dims(self) -> ClipDims:
        """The sizes that the prior and the decoder depend on."""
        text = self.model_config["text_cfg"]
        return ClipDims(
            embed_dim=self.model_config["embed_dim"],
            text_width=text.get("width", 512),
            context_length=text.get("context_length", 77),
        )

    def tokenize(self, captions: Sequence[str]) -> Int[Tensor, "B L"]:
        """Token ids of captions, L = context length, zero after the end token; longer captions are truncated."""
        return self.tokenizer(list(captions), context_length=self.dims.context_length)

    def prepare(self, images: Tensor) -> Float[Tensor, "B 3 px px"]:
        """Preprocess pictures for the image tower: crop the centre square, resize and standardise it.

        Args:
            images: uint8 (B, H, W, 3), cropped and resized by ``pipeline.pictures``; or a network's float (B, 3, H, W)
                in [-1, 1], resized by torch's bicubic, which is the same kernel without rounding and has a gradient.
        """
        is_picture = images.dtype == torch.uint8
        pixels = to_pixels(_squares(images, self.image_px)) if is_picture else resize_crop(images, self.image_px)
        mean = pixels.new_tensor(self.mean).view(1, 3, 1, 1)
        std = pixels.new_tensor(self.std).view(1, 3, 1, 1)
        return (pixels.add(1).div_(2) - mean) / std


class FrozenText(nn.Module):
    """The text tower of the frozen CLIP, without gradients: it embeds captions. Sampling needs no image tower."""

    def __init__(self, clip: OpenClip) -> None:
        super().__init__()
        self.clip = clip
        self.model = clip.model.eval().requires_grad_(requires_grad=False)
        self.tower = _text_tower(clip.model)

    @property
    def dims(self) -> ClipDims:
        """The sizes that the prior and the decoder depend on."""
        return self.clip.dims

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.logit_scale.device

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002  (nn.Module's signature)
        """Stay in evaluation mode, because a frozen tower must not update batch statistics."""
        return self

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> TextEncoding:
        """Encode B captions; L is the length of the longest, rounded up to a multiple of 8 tokens."""
        return self.encode_tokens(self.clip.tokenize(captions))

    @torch.no_grad()
    def encode_tokens(self, tokens: Int[Tensor, "B L"]) -> TextEncoding:
        """Encode the token ids of ``tokenize``.

        The text tower is causal, so tokens after the end of the longest caption are cut off to save time.
        """
        mask = _token_mask(tokens, self.clip.tokenizer.eot_token_id)
        longest = int(mask.sum(1).max())
        length = min(tokens.shape[1], -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE)
        tokens = tokens[:, :length].to(self.device)
        hidden = self._hidden(tokens).float()
        return TextEncoding(
            pooled=self._pool(hidden, tokens),
            hidden=hidden,
            mask=mask[:, :length].to(self.device),
            tokens=tokens,
        )

    def _hidden(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L W"]:
        tower, length = self.tower, tokens.shape[1]
        dtype = tower.transformer.get_cast_dtype()
        x = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding[:length].to(dtype)
        x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
        return tower.ln_final(x)

    def _pool(self, hidden: Float[Tensor, "B L W"], tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        pooled = text_global_pool(hidden, tokens, "argmax")
        projection = self.tower.text_projection
        if projection is None:
            return pooled
        return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection


class FrozenClip(FrozenText):
    """The frozen CLIP of the cascade with both towers, without gradients: it embeds pictures and captions."""

    @property
    def image_px(self) -> int:
        """Side of the image tower's input, in pixels; pictures are resized to it."""
        return self.clip.image_px

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Float[Tensor, "B D"]:
        """Embed pictures.

        Args:
            images: uint8 (B, H, W, 3), or float (B, 3, H, W) in [-1, 1], of any size.

        Returns:
            z_image, of length one.
        """
        pixels = self.clip.prepare(images.to(self.device))
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)


def freeze(clip: OpenClip) -> FrozenText:
    """Freeze a CLIP: as a ``FrozenClip`` if it has an image tower, else as a ``FrozenText``."""
    return FrozenClip(clip) if clip.has_images else FrozenText(clip)


def create_clip(config: ClipConfig) -> OpenClip:
    """Create a CLIP with random weights from torch's global generator, for training."""
    return _assemble(config.to_open_clip())


def clip_loss(
    clip: OpenClip,
    images: Tensor,
    tokens: Int[Tensor, "B L"],
    *,
    negatives: Int[Tensor, "B L"] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Float[Tensor, ""]:
    """open_clip's contrastive loss of B pairs (arXiv:2103.00020, figure 3).

    With hard negatives, each picture is also told from its own: the mean of -log P(caption) against that one caption
    is added. Where a row of ``negatives`` is the caption itself, it adds a constant and no gradient.

    Args:
        clip: The model in training.
        images: Pictures, in a form that ``OpenClip.prepare`` accepts.
        tokens: Token ids of their captions, (B, context length).
        negatives: Token ids of their hard negatives.
        rank: Rank of this process among those that share the batch.
        world_size: Number of these processes; above 1, features are gathered with their gradients.
    """
    image_features, text_features, logit_scale, *bias = clip.model(clip.prepare(images), tokens)
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
    with torch.autocast(image_features.device.type, enabled=False):  # logits near 100 have no digits left in bfloat16
        total = loss(image_features.float(), text_features.float(), logit_scale, *bias)
    if negatives is None:
        return total
    negative_features = clip.model.encode_text(negatives, normalize=True)
    with torch.autocast(image_features.device.type, enabled=False):
        margins = (image_features.float() * (text_features.float() - negative_features.float())).sum(1)
        return total + F.softplus(-logit_scale * margins).mean()


def clamp_logit_scale(clip: OpenClip) -> None:
    """Keep the temperature above 1/100; called after each optimizer step (arXiv:2103.00020, section 2.5)."""
    with torch.no_grad():
        clip.model.logit_scale.clamp_(0, 4.6052)


def save_clip(clip: OpenClip, folder: Path) -> None:
    """Write ``folder`` in open_clip's ``local-dir:`` layout; the same weights give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_cfg": clip.model_config,
        "preprocess_cfg": {"size": clip.image_px, "mean": list(clip.mean), "std": list(clip.std)}
        if clip.has_images
        else {},
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.contiguous().cpu() for name, tensor in clip.model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_FILE)


def load_clip(folder: Path) -> OpenClip:
    """Read a folder that ``save_clip`` or open_clip wrote.

    Raises:
        ValueError: If a file is missing or unreadable, or the weights do not match the configuration.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return build_clip(config["model_cfg"], config.get("preprocess_cfg", {}), load_file(folder / WEIGHTS_FILE))
    except (OSError, KeyError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        message = (
            f"{folder} is not an open_clip folder ({CONFIG_FILE}, {WEIGHTS_FILE}): {type(error).__name__}: {error}"
        )
        raise ValueError(message) from error


def build_clip(model_config: dict[str, Any], preprocess: dict[str, Any], state: dict[str, Tensor]) -> OpenClip:
    """Build a CLIP and load its weights.

    Args:
        model_config: open_clip's model configuration; without ``vision_cfg`` there is no image tower.
        preprocess: ``mean`` and ``std`` of the colour channels; OpenAI's values are the defaults.
        state: Weights of the model.

    Raises:
        RuntimeError: If the weights do not match the configuration.
    """
    clip = _assemble(model_config, preprocess.get("mean"), preprocess.get("std"))
    clip.model.load_state_dict(state)
    return clip


def load_pretrained(name: str, pretrained: str | None = None) -> OpenClip:
    """Load public or local weights through open_clip.

    Args:
        name: An architecture ("ViT-L-14"), "hf-hub:owner/repository" or "local-dir:/folder".
        pretrained: For an architecture: a tag ("laion2b_s32b_b82k") or a weights file; else None.

    Raises:
        ValueError: If the name or tag is unknown, the hub does not answer, or the model has no CLIP token states.
    """
    folder = Path(name.removeprefix("local-dir:"))
    if folder.is_dir() and "vision_cfg" not in (open_clip.get_model_config(name) or {"vision_cfg": None}):
        raise ValueError(f"{folder}: {NO_IMAGE_TOWER}")
    try:
        model: Any = open_clip.create_model(name, pretrained=pretrained, require_pretrained=True)
        model_config = open_clip.get_model_config(name)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip, the hub client and the socket each raise their own
        weights = f" with weights {pretrained!r}" if pretrained else ""
        reason = (str(error).strip().splitlines() or [""])[0]
        message = (
            f"CLIP {name!r}{weights} could not be loaded through open_clip. Without a network, download it once "
            f"and give 'local-dir:/folder' or a weights file. Reason: {type(error).__name__}: {reason}"
        )
        raise ValueError(message) from error
    if not isinstance(tokenizer, SimpleTokenizer) or model_config is None:
        raise ValueError(f"CLIP {name!r} does not use CLIP's own tokenizer; choose one that does")
    _text_tower(model)
    preprocess = model.visual.preprocess_cfg
    return OpenClip(model, tokenizer, model_config, tuple(preprocess["mean"]), tuple(preprocess["std"]))


def describe_clip(name: str) -> OpenClip:
    """Build a public or local CLIP with random weights, to count its parameters and operations.

    Args:
        name: An architecture ("ViT-L-14"), or "local-dir:/folder".

    Raises:
        ValueError: If this machine does not know the architecture, or it has no CLIP token states.
    """
    model_config = open_clip.get_model_config(name) if not name.startswith("hf-hub:") else None
    if model_config is None:
        raise ValueError(f"CLIP {name!r} is unknown on this machine; choose an open_clip architecture or a folder")
    clip = _assemble(model_config)
    _text_tower(clip.model)
    return clip


def count_tokens(captions: Sequence[str]) -> list[int]:
    """Tokens of each caption by CLIP's own tokenizer, with the start and the end token, before anything is cut off."""
    tokenizer = SimpleTokenizer()
    return [len(tokenizer.encode(caption)) + 2 for caption in captions]


def named_context_length(name: str) -> int:
    """Context length of an open_clip model or folder; 77, which nearly all have, if this machine does not know it."""
    config = open_clip.get_model_config(name) if not name.startswith("hf-hub:") else None
    return int((config or {}).get("text_cfg", {}).get("context_length", 77))


def wrap_clip(
    model: nn.Module,
    model_config: dict[str, Any],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> OpenClip:
    """Combine an open_clip model with its tokenizer and its mean and std of colours (by default OpenAI's)."""
    mean = tuple(mean or open_clip.OPENAI_DATASET_MEAN)
    std = tuple(std or open_clip.OPENAI_DATASET_STD)
    tokenizer = SimpleTokenizer(context_length=model_config["text_cfg"].get("context_length", 77))
    return OpenClip(cast("open_clip.CLIP", model), tokenizer, model_config, mean, std)


def _assemble(
    model_config: dict[str, Any], mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> OpenClip:
    arguments = {key: value for key, value in model_config.items() if key != "custom_text"}
    kind = open_clip.CustomTextCLIP if model_config.get("custom_text") else open_clip.CLIP
    model = kind(**_NO_IMAGES | arguments)
    if "vision_cfg" not in model_config:
        del model.visual  # open_clip cannot build a text tower alone
    return wrap_clip(model, model_config, mean, std)


def _squares(images: Tensor, side_px: int) -> Tensor:
    """Crop and resize uint8 (B, H, W, 3) to (B, side_px, side_px, 3), on the same device."""
    if images.shape[1:3] == (side_px, side_px):
        return images
    squares = [square(to_image(image), side_px) for image in images.cpu().numpy()]
    return torch.from_numpy(np.stack(squares)).to(images.device)


def _text_tower(model: nn.Module) -> Any:
    """The module with the text tower's layers: open_clip's CLIP itself, or the ``text`` of other models."""
    tower: Any = getattr(model, "text", model)
    is_text_tower = isinstance(tower, open_clip.CLIP | TextTransformer)
    if not is_text_tower or tower.attn_mask is None or getattr(tower, "cls_emb", None) is not None:
        raise ValueError("this model's text tower has no causal CLIP token states; choose a plain CLIP")
    return tower


def _token_mask(tokens: Int[Tensor, "B L"], end: int) -> Tensor:
    """Mask (B, L) that is True up to and including the first end token of each row."""
    ends = (tokens == end).int()
    return ends.cumsum(1) - ends == 0
