"""open_clip, imported without what no CLIP of its own kinds needs; no other module imports it.

Importing timm takes a process longer than importing torch does, and torch's compiler as long: see ``add_timm`` and
``_hide_compiler``.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import sys
from collections.abc import Generator
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch


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

with _hide_package("timm"), _hide_compiler():
    import open_clip
from open_clip import model as _model  # noqa: E402
from open_clip import timm_model as _timm_model  # noqa: E402
from open_clip.modified_resnet import Bottleneck  # noqa: E402
from open_clip.tokenizer import SimpleTokenizer  # noqa: E402
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, text_global_pool  # noqa: E402

__all__ = [
    "Bottleneck",
    "ResidualAttentionBlock",
    "SimpleTokenizer",
    "TextTransformer",
    "add_timm",
    "open_clip",
    "text_global_pool",
]


def add_timm() -> None:
    """Import timm, by which open_clip builds the image towers that are not its own, such as SigLIP's.

    It takes a process longer than torch does, so it is hidden from open_clip until a CLIP needs it.
    """
    module: Any = _timm_model
    if module.timm is None:
        with _hide_package("wandb"):  # timm would import it for half a second; img2dataset depends on it
            importlib.reload(_timm_model)
        cast("Any", _model).TimmModel = _timm_model.TimmModel
