"""CLIPs on disk and on the network: folders in open_clip's ``local-dir:`` layout, and public weights.

A checkpoint is a folder with open_clip_config.json and open_clip_model.safetensors.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from pipeline.allocator import is_out_of_memory
from pipeline.clip.inputs import ClipInputs, inputs_of
from pipeline.clip.library import add_timm, open_clip
from pipeline.clip.model import OpenClip, build_clip, wrap_clip
from pipeline.errors import first_line
from pipeline.pictures.frame import Framing

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
NO_IMAGE_TOWER = (
    "this CLIP has no image tower, so it cannot embed pictures: no edits, no search, no training. Add image_encoder/ "
    "and feature_extractor/ of the same CLIP to the imported folder and import it again; or set clip.name and "
    "clip.tag to a complete CLIP with the same text tower (Karlo's is ViT-L-14-quickgelu, openai)"
)
_MAX_REASON_CHARS = 400


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


def load_shape(folder: Path) -> OpenClip:
    """As ``load_clip``, without weights: on torch's meta device, and from the configuration alone.

    Raises:
        ValueError: If the configuration is missing or unreadable.
    """
    with _name_folder(folder), torch.device("meta"):
        config = _read_config(folder)
        return build_clip(config["model_cfg"], config.get("preprocess_cfg", {}), None, source=f"local-dir:{folder}")


def draw_as_loading(folder: Path) -> None:
    """Take from torch's global generator what ``load_clip`` takes, in the memory of one tensor.

    Raises:
        ValueError: If the configuration is missing or unreadable.
    """
    with _name_folder(folder):
        config = _read_config(folder)
        with torch.device("meta"), _Draws():
            build_clip(config["model_cfg"], config.get("preprocess_cfg", {}), None, source=f"local-dir:{folder}")


class _Draws(TorchDispatchMode):
    """Where a tensor without data is filled with random numbers, takes them on the CPU, and keeps none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            func(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs))
        return func(*args, **kwargs)


def _on_cpu(value: Any) -> Any:
    """A tensor of the same shape and memory order on the CPU; any other value as it is, but for the device."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
    return torch.device("cpu") if isinstance(value, torch.device) else value


def load_inputs(folder: Path) -> ClipInputs:
    """Read how a folder's CLIP takes pictures and captions, without its weights.

    Raises:
        ValueError: If the configuration is missing or unreadable.
    """
    with _name_folder(folder):
        config = _read_config(folder)
        return inputs_of(config["model_cfg"], config.get("preprocess_cfg", {}), f"local-dir:{folder}")


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
    add_timm()
    try:
        model: Any = open_clip.create_model(name, pretrained=pretrained, require_pretrained=True)
        model_config = open_clip.get_model_config(name.replace("/", "-") if ":" not in name else name)
    except Exception as error:  # open_clip, the hub client and the socket each raise their own
        weights = f" with weights {pretrained!r}" if pretrained else ""
        message = (
            f"CLIP {name!r}{weights} could not be loaded through open_clip. Without a network, download it once "
            f"and give 'local-dir:/folder' or a weights file. Reason: {type(error).__name__}: {first_line(error)}"
        )
        raise ValueError(message) from error
    assert model_config is not None
    clip = wrap_clip(model, model_config, model.visual.preprocess_cfg, name)
    clip.tokenize([""])  # a tokenizer that cannot be loaded is named here, before anything is written
    return clip


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
        if is_out_of_memory(error):
            raise
        files = f"{CONFIG_FILE}, {WEIGHTS_FILE}"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{folder} is not an open_clip folder ({files}): {reason[:_MAX_REASON_CHARS]}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
