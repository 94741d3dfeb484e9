"""CLIP; no other module imports open_clip.

Legend: B batch, L text tokens, D joint space, W text width, H W picture. A checkpoint is a folder in open_clip's
``local-dir:`` layout: open_clip_config.json and open_clip_model.safetensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import sys
from collections.abc import Generator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
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
from pipeline.errors import ConfigError
from pipeline.pictures import Framing, to_image


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


@contextlib.contextmanager
def _hide_compiler() -> Generator[None]:
    """Keep torchvision from importing torch's compiler inside the block, unless it is loaded already.

    Its ``roi_align``, which CLIP does not use, asks the compiler for one function; importing the compiler takes as long
    as importing torch. The first ``torch.compile`` imports it.
    """
    name = "torch._dynamo"
    if name in sys.modules:
        yield
        return
    compiler, utils = ModuleType(name), ModuleType(f"{name}.utils")
    vars(utils)["is_compile_supported"] = lambda _device: False
    stand_ins = {name: compiler, utils.__name__: utils}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for stand_in in stand_ins:
            del sys.modules[stand_in]


_TORCHVISION_SCHEMAS = _declare_torchvision_operators()  # without this reference the schemas would be removed

with _hide_package("timm"), _hide_compiler():  # see ``_add_timm``
    import open_clip
from open_clip import model as open_clip_model  # noqa: E402
from open_clip import timm_model  # noqa: E402
from open_clip.modified_resnet import Bottleneck  # noqa: E402
from open_clip.tokenizer import SimpleTokenizer  # noqa: E402
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, text_global_pool  # noqa: E402

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
NO_IMAGE_TOWER = (
    "this CLIP has no image tower, so it cannot embed pictures: no edits, no search, no training. Add image_encoder/ "
    "and feature_extractor/ of the same CLIP to the imported folder and import it again; or set clip.name and "
    "clip.tag to a complete CLIP with the same text tower (Karlo's is ViT-L-14-quickgelu, openai)"
)
_NO_IMAGES: dict[str, Any] = {"vision_cfg": {"layers": 1, "width": 64, "patch_size": 32, "image_size": 32}}
"""A tiny image tower, which is built and deleted for a CLIP without one."""
_NO_STATES = (
    "clip: the text tower of this CLIP has no causal states of CLIP's own tokens, and the prior and the decoder read "
    "them: it can embed and search, not train or sample; for that, choose a plain CLIP (for example ViT-L-14)"
)
_MAX_REASON_CHARS = 400
_MAX_CAPTION_CHARS = 2048
_MAX_CACHED_WORDS = 1 << 20
_LENGTH_MULTIPLE = 8
"""Batches of captions are cut to a multiple of this many tokens, so that kernels see few different shapes."""


@dataclass(frozen=True)
class ClipInputs:
    """How pictures and captions become the inputs of a CLIP. It holds no weights, so that other processes can do it."""

    framing: Framing
    """The image tower's own preprocessing, up to the standardisation of levels."""
    model_config: dict[str, Any]
    """open_clip's model configuration, as in open_clip_config.json."""
    source: str
    """Where open_clip finds a Hugging Face tokenizer: ``local-dir:FOLDER``, ``hf-hub:OWNER/REPOSITORY`` or one of its
    own names; CLIP's tokenizer needs none."""

    @property
    def context_length(self) -> int:
        """Length of a tokenised caption, in tokens."""
        return self.model_config["text_cfg"].get("context_length", 77)

    @cached_property
    def tokenizer(self) -> Any:
        """open_clip's tokenizer: CLIP's own, or one that wraps Hugging Face's.

        Raises:
            ConfigError: If a Hugging Face tokenizer cannot be loaded; says what is missing.
        """
        text: dict[str, Any] = self.model_config["text_cfg"]
        if "hf_tokenizer_name" not in text:
            options = text.get("tokenizer_kwargs")
            if not options:
                return _plain_tokenizer(self.context_length)
            return SimpleTokenizer(context_length=self.context_length, **options)
        try:
            return open_clip.get_tokenizer(self.source)
        except ImportError as error:
            raise ConfigError(
                f"clip: the tokenizer {text['hf_tokenizer_name']} is from Hugging Face and needs the package "
                f"{error.name or 'transformers'}, which is not installed: pip install 'unclip[hf]'"
            ) from error
        except Exception as error:  # transformers, the hub client and the socket each raise their own
            raise ConfigError(
                f"clip: the tokenizer {text['hf_tokenizer_name']} of {self.source} cannot be loaded; without a network "
                f"its tokenizer.json and tokenizer_config.json must be in the CLIP's folder. {_first_line(error)}"
            ) from error

    def tokenize(self, captions: Sequence[str]) -> Int[Tensor, "B L"]:
        """Token ids of captions, L = context length; longer captions are truncated."""
        if isinstance(self.tokenizer, SimpleTokenizer) and len(self.tokenizer.cache) > _MAX_CACHED_WORDS:
            self.tokenizer.cache.clear()  # it keeps every word that it has ever seen
        return self.tokenizer([_shorten(caption) for caption in captions], context_length=self.context_length)


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


class FrozenText(nn.Module):
    """The text tower of the frozen CLIP, without gradients: it embeds captions. Sampling needs no image tower."""

    def __init__(self, clip: OpenClip) -> None:
        super().__init__()
        self.clip = clip
        self.model = clip.model.eval().requires_grad_(requires_grad=False)
        self.tower = _causal_tower(clip)

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
    def embed_text(self, captions: Sequence[str]) -> Float[Tensor, "B D"]:
        """z_text of captions, of length one; with any of open_clip's text towers."""
        return self.embed_tokens(self.clip.tokenize(captions))

    @torch.no_grad()
    def embed_tokens(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """z_text of the token ids of ``tokenize``."""
        if self.tower is not None:
            return self.encode_tokens(tokens).z_text
        return F.normalize(self.model.encode_text(tokens.to(self.device)).float(), dim=-1)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> TextEncoding:
        """Encode B captions; L is the length of the longest, rounded up to a multiple of 8 tokens.

        Raises:
            ConfigError: If this is no plain CLIP: its text tower has no causal states of CLIP's tokens.
        """
        return self.encode_tokens(self.clip.tokenize(captions))

    @torch.no_grad()
    def encode_tokens(self, tokens: Int[Tensor, "B L"]) -> TextEncoding:
        """Encode the token ids of ``tokenize``.

        The text tower is causal, so tokens after the end of the longest caption are cut off to save time.

        Raises:
            ConfigError: See ``encode_text``.
        """
        if self.tower is None:
            raise ConfigError(_NO_STATES)
        mask = _token_mask(tokens, self.clip.tokenizer.eot_token_id)
        longest = int(mask.sum(1).max())
        length = min(tokens.shape[1], -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE)
        tokens = tokens[:, :length].to(self.device)
        hidden = self._hidden(self.tower, tokens).float()
        return TextEncoding(
            pooled=self._pool(self.tower, hidden, tokens),
            hidden=hidden,
            mask=mask[:, :length].to(self.device),
            tokens=tokens,
        )

    def _hidden(self, tower: Any, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L W"]:
        length = tokens.shape[1]
        dtype = tower.transformer.get_cast_dtype()
        x = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding[:length].to(dtype)
        x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
        return tower.ln_final(x)

    def _pool(self, tower: Any, hidden: Float[Tensor, "B L W"], tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        pooled = text_global_pool(hidden, tokens, "argmax")
        projection = tower.text_projection
        if projection is None:
            return pooled
        # In float32 also of a tower in half precision: it is one small product.
        if isinstance(projection, nn.Linear):
            bias: Tensor | None = getattr(projection, "bias", None)
            return F.linear(pooled, projection.weight.float(), None if bias is None else bias.float())
        return pooled @ projection.float()


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
            images: uint8 (B, H, W, 3), or float (B, 3, H, W) in [-1, 1], of any size; pictures of another size than
                ``image_px`` are framed as the model's own preprocessing does.

        Returns:
            z_image, of length one.
        """
        pixels = self.clip.prepare(images.to(self.device)).to(self.model.logit_scale.dtype)
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)

    def compile_towers(self) -> None:
        """Compile both towers when they are first called; names and values of the weights stay."""
        self.model.visual.compile()
        text: Any = getattr(self.model, "text", self.model)
        text.transformer.compile()


def freeze(clip: OpenClip) -> FrozenText:
    """Freeze a CLIP: as a ``FrozenClip`` if it has an image tower, else as a ``FrozenText``."""
    return FrozenClip(clip) if clip.has_images else FrozenText(clip)


def create_clip(config: ClipConfig) -> OpenClip:
    """Create a CLIP with random weights from torch's global generator, for training."""
    clip = _assemble(config.to_open_clip())
    setattr(clip.model, "config", config)  # noqa: B010  (open_clip's class has no such attribute; a copy keeps it)
    return clip


def blocks_of_clip(model: nn.Module) -> list[nn.Module]:
    """The blocks of both towers that run one after another."""
    return [module for module in model.modules() if isinstance(module, Bottleneck | ResidualAttentionBlock)]


def clamp_logit_scale(clip: OpenClip) -> None:
    """Keep the temperature above 1/100; called before each step (arXiv:2103.00020, section 2.5)."""
    with torch.no_grad():
        clip.model.logit_scale.clamp_(0, 4.6052)


def save_clip(clip: OpenClip, folder: Path) -> None:
    """Write ``folder`` in open_clip's ``local-dir:`` layout; the same weights give the same bytes.

    A Hugging Face tokenizer or text tower brings its own files, so that the folder is read without a network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    framing = clip.inputs.framing
    preprocess: dict[str, Any] = {"size": clip.image_px, "mean": list(clip.mean), "std": list(clip.std)}
    if framing != Framing(clip.image_px):
        preprocess |= {"resize_mode": framing.resize_mode, "interpolation": framing.interpolation}
        preprocess |= {"fill_color": framing.fill_level}
    config = {"model_cfg": clip.model_config, "preprocess_cfg": preprocess if clip.has_images else {}}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    text = clip.model_config["text_cfg"]
    if "hf_tokenizer_name" in text:
        clip.tokenizer.save_pretrained(str(folder))
    if "hf_model_name" in text:
        cast("Any", clip.model).text.config.save_pretrained(str(folder))
    tensors = {name: tensor.contiguous().cpu() for name, tensor in clip.model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_FILE)


def load_clip(folder: Path) -> OpenClip:
    """Read a folder that ``save_clip`` or open_clip wrote.

    Raises:
        ValueError: If a file is missing or unreadable, or the weights do not match the configuration.
    """
    with _name_folder(folder):
        config = _read_config(folder)
        state = load_file(folder / WEIGHTS_FILE)
        return build_clip(config["model_cfg"], config.get("preprocess_cfg", {}), state, source=f"local-dir:{folder}")


def load_inputs(folder: Path) -> ClipInputs:
    """Read how a folder's CLIP takes pictures and captions, without its weights.

    Raises:
        ValueError: If the configuration is missing or unreadable.
    """
    with _name_folder(folder):
        config = _read_config(folder)
        return _inputs(config["model_cfg"], config.get("preprocess_cfg", {}), f"local-dir:{folder}")


def build_clip(
    model_config: dict[str, Any], preprocess: dict[str, Any], state: dict[str, Tensor], source: str = ""
) -> OpenClip:
    """Build a CLIP and load its weights.

    Args:
        model_config: open_clip's model configuration; without ``vision_cfg`` there is no image tower.
        preprocess: open_clip's preprocessing; OpenAI's values are the defaults.
        state: Weights of the model.
        source: See ``ClipInputs``.

    Raises:
        RuntimeError: If the weights do not match the configuration.
    """
    clip = _assemble(model_config, preprocess, source)
    clip.model.load_state_dict(state)
    return clip


def load_pretrained(name: str, pretrained: str | None = None) -> OpenClip:
    """Load public or local weights through open_clip, with the preprocessing and the tokenizer that they came with.

    Args:
        name: An architecture ("ViT-L-14"), "hf-hub:owner/repository" or "local-dir:/folder".
        pretrained: For an architecture: a tag ("laion2b_s32b_b82k") or a weights file; else None.

    Raises:
        ConfigError: If the model's tokenizer cannot be loaded.
        ValueError: If the name or tag is unknown, the hub does not answer, or the weights need another architecture.
    """
    folder = Path(name.removeprefix("local-dir:"))
    if folder.is_dir() and "vision_cfg" not in (open_clip.get_model_config(name) or {"vision_cfg": None}):
        raise ValueError(f"{folder}: {NO_IMAGE_TOWER}")
    _require_activation(name, pretrained or "")
    _add_timm()
    try:
        model: Any = open_clip.create_model(name, pretrained=pretrained, require_pretrained=True)
        model_config = open_clip.get_model_config(name.replace("/", "-") if ":" not in name else name)
    except Exception as error:  # open_clip, the hub client and the socket each raise their own
        weights = f" with weights {pretrained!r}" if pretrained else ""
        message = (
            f"CLIP {name!r}{weights} could not be loaded through open_clip. Without a network, download it once "
            f"and give 'local-dir:/folder' or a weights file. Reason: {_first_line(error)}"
        )
        raise ValueError(message) from error
    assert model_config is not None
    clip = wrap_clip(model, model_config, model.visual.preprocess_cfg, name)
    clip.tokenize([""])  # a tokenizer that cannot be loaded is named here, before anything is written
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


@lru_cache(maxsize=4)
def _plain_tokenizer(context_length: int) -> SimpleTokenizer:
    """CLIP's own tokenizer; making one takes half a second, so all CLIPs of a process share it."""
    return SimpleTokenizer(context_length=context_length)


def count_tokens(captions: Sequence[str]) -> list[int]:
    """Tokens of each caption by CLIP's own tokenizer, with the start and the end token, before anything is cut off."""
    tokenizer = _plain_tokenizer(77)  # the length only matters where captions are cut
    return [len(tokenizer.encode(caption)) + 2 for caption in captions]


def named_context_length(name: str) -> int:
    """Context length of an open_clip model or folder; 77, which nearly all have, if this machine does not know it."""
    config = open_clip.get_model_config(name) if not name.startswith("hf-hub:") else None
    return int((config or {}).get("text_cfg", {}).get("context_length", 77))


def wrap_clip(
    model: nn.Module, model_config: dict[str, Any], preprocess: dict[str, Any] | None = None, source: str = ""
) -> OpenClip:
    """Combine an open_clip model with its preprocessing (by default OpenAI's) and its tokenizer."""
    preprocess = preprocess or {}
    mean = tuple(preprocess.get("mean") or open_clip.OPENAI_DATASET_MEAN)
    std = tuple(preprocess.get("std") or open_clip.OPENAI_DATASET_STD)
    return OpenClip(cast("open_clip.CLIP", model), _inputs(model_config, preprocess, source), mean, std)


def _inputs(model_config: dict[str, Any], preprocess: dict[str, Any], source: str) -> ClipInputs:
    size = preprocess.get("size") or model_config.get("vision_cfg", {}).get("image_size", 224)
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) > 1:
        raise ValueError(f"CLIP {source!r}: its pictures are {size} px, no square")
    # "random" is of open_clip's training alone; it resizes with the bicubic kernel otherwise.
    kernel = "bilinear" if preprocess.get("interpolation") == "bilinear" else "bicubic"
    mode, fill_level = preprocess.get("resize_mode") or "shortest", preprocess.get("fill_color") or 0
    return ClipInputs(Framing(sides.pop(), mode, kernel, fill_level), model_config, source)


def _assemble(model_config: dict[str, Any], preprocess: dict[str, Any] | None = None, source: str = "") -> OpenClip:
    arguments = {key: value for key, value in deepcopy(model_config).items() if key != "custom_text"}
    text = arguments["text_cfg"]
    if "timm_model_name" in arguments.get("vision_cfg", {}):
        _add_timm()
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


def _add_timm() -> None:
    """Import timm, by which open_clip builds the image towers that are not its own, such as SigLIP's.

    It takes a process longer than torch does, so it is hidden from open_clip until a CLIP needs it.
    """
    module: Any = timm_model
    if module.timm is None:
        with _hide_package("wandb"):  # timm would import it for half a second; img2dataset depends on it
            importlib.reload(timm_model)
        cast("Any", open_clip_model).TimmModel = timm_model.TimmModel


def _require_activation(name: str, tag: str) -> None:
    """Refuse weights that were trained with QuickGELU in an architecture with GELU: open_clip would only warn."""
    architecture = name.replace("/", "-")
    weights = open_clip.get_pretrained_cfg(architecture, tag) or {}
    config = open_clip.get_model_config(architecture) if ":" not in name else None
    if config is not None and weights.get("quick_gelu") and not config.get("quick_gelu"):
        raise ValueError(
            f"the weights {tag!r} were trained with QuickGELU, and {name} has GELU, which gives other embeddings; set "
            f'clip.name = "{architecture}-quickgelu"'
        )


@contextlib.contextmanager
def _name_folder(folder: Path) -> Generator[None]:
    """Turn the errors of a damaged folder into a ValueError that names it."""
    try:
        yield
    except (OSError, KeyError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        files = f"{CONFIG_FILE}, {WEIGHTS_FILE}"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{folder} is not an open_clip folder ({files}): {reason[:_MAX_REASON_CHARS]}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _shorten(caption: str) -> str:
    """A caption of at most ``_MAX_CAPTION_CHARS``: more than any context length holds.

    CLIP's tokenizer takes time with the square of a word's length: minutes for a page without spaces.
    """
    return caption if len(caption) <= _MAX_CAPTION_CHARS else " ".join(caption.split())[:_MAX_CAPTION_CHARS]


def _causal_tower(clip: OpenClip) -> Any:
    """The module with the text tower's layers, if it has causal states of CLIP's own tokens; else None.

    That is open_clip's CLIP itself, or the ``text`` of other models. SigLIP's text tower looks both ways, CoCa's has an
    added token, and others have a vocabulary of their own.
    """
    tower: Any = getattr(clip.model, "text", clip.model)
    if "hf_tokenizer_name" in clip.model_config["text_cfg"] or not isinstance(tower, open_clip.CLIP | TextTransformer):
        return None
    is_plain = tower.attn_mask is not None and getattr(tower, "cls_emb", None) is None
    return tower if is_plain else None


def _token_mask(tokens: Int[Tensor, "B L"], end: int) -> Tensor:
    """Mask (B, L) that is True up to and including the first end token of each row."""
    ends = (tokens == end).int()
    return ends.cumsum(1) - ends == 0
