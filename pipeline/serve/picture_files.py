"""Pictures as files: PNG, JPEG or WebP of a side, and what made them, inside a PNG."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
from PIL import Image, PngImagePlugin

from models.request import WALK_STEPS, Edit, RawMask, RawPicture, SampleRequest, StartPicture, is_walk
from pipeline.recipe.provenance import C2PA, CHUNK, Signer
from pipeline.serve.protocols import Images

Format = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True)
class ModelCard:
    """What a server's pictures are made with."""

    name: str
    """Name of the recipe."""
    image_px: int
    """Side of the cascade's pictures, in pixels."""
    networks: Mapping[str, str] = field(default_factory=dict[str, str])
    """Key of each network's artifact, by step."""
    recipe_key: str = ""
    """See ``recipe.plan.recipe_key``."""
    mlflow_runs: Mapping[str, str] = field(default_factory=dict[str, str])
    """Id of the MLflow run that trained a network, by step, of those whose manifest names one."""
    sampling: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """How each stage is sampled unless a request changes it."""
    num_timesteps: int = 1000
    """Timesteps T of the decoder's chain: its most steps."""
    aliases: tuple[str, ...] = ()
    """Other names by which clients may call the model."""
    version: str = ""
    """Of this program."""
    signer: Signer | None = None
    """Signs the pictures; None: they are not signed."""


def encode_picture(
    image: Images,
    side_px: int,
    kind: Format = "png",
    *,
    quality: int = 100,
    made_with: Mapping[str, str] | None = None,
    signer: Signer | None = None,
) -> bytes:
    """A picture (H, W, 3) as a file.

    Args:
        image: The picture.
        side_px: Side of the file's picture; a larger one is shrunk with antialiasing, a smaller one enlarged.
        kind: Format.
        quality: Of JPEG and WebP, from 0 to 100.
        made_with: Text chunks of a PNG.
        signer: Signs a PNG that has them.
    """
    picture = Image.fromarray(np.ascontiguousarray(image))
    if picture.width != side_px:
        resample = Image.Resampling.LANCZOS if picture.width > side_px else Image.Resampling.BICUBIC
        picture = picture.resize((side_px, side_px), resample)
    stream = io.BytesIO()
    if kind == "png":
        chunks = PngImagePlugin.PngInfo()
        for name, text in (made_with or {}).items():
            chunks.add_itxt(name, text)
        if signer is not None and made_with:
            chunks.add_itxt(CHUNK, signer.sign(picture.size, picture.tobytes(), made_with["unclip"]))
        picture.save(stream, "PNG", pnginfo=chunks)
    else:
        picture.save(stream, kind.upper(), quality=quality)
    return stream.getvalue()


def made_with(card: ModelCard, request: SampleRequest, seed: int, side_px: int) -> dict[str, str]:
    """The text chunks of a PNG: A1111's ``parameters``, which other viewers read, and all of it as JSON.

    Args:
        card: What the server's pictures are made with.
        request: The request.
        seed: Of this picture.
        side_px: Side of the file's picture, in pixels.
    """
    walk = {"decoder": {"method": "ddim", "num_steps": WALK_STEPS, "guidance_scale": 1.0, "respacing": ""}}
    usual = {
        stage: {**settings, **(walk if is_walk(request.edit) else {}).get(stage, {})}
        for stage, settings in card.sampling.items()
    }
    sampling = {
        stage: {
            **settings,
            **({"guidance_scale": request.guidance_scale[stage]} if stage in request.guidance_scale else {}),
            **({"num_steps": request.num_steps[stage]} if stage in request.num_steps else {}),
        }
        for stage, settings in usual.items()
    }
    decoder = sampling.get("decoder", {})
    facts = {
        "Steps": decoder.get("num_steps"),
        "Sampler": decoder.get("method"),
        "CFG scale": decoder.get("guidance_scale"),
        "Seed": seed,
        "Size": f"{side_px}x{side_px}",
        "Denoising strength": request.edit.strength if isinstance(request.edit, StartPicture) else None,
        "Model hash": card.networks.get("decoder", "")[:10] or None,
        "Model": card.name,
        "Version": f"unclip {card.version}",
    }
    lines = [request.prompt, *([f"Negative prompt: {request.negative_prompt}"] if request.negative_prompt else [])]
    lines.append(", ".join(f"{name}: {value}" for name, value in facts.items() if value is not None))
    everything = {
        "recipe": card.name,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": seed,
        "side_px": side_px,
        "sampling": sampling,
        **({"num_candidates": request.num_candidates} if request.num_candidates else {}),
        **({"edit": _edit_facts(request.edit)} if request.edit else {}),
        "networks": dict(card.networks),
        "recipe_key": card.recipe_key,
        "mlflow_runs": dict(card.mlflow_runs),
        "version": card.version,
        **C2PA,
    }
    return {"parameters": "\n".join(lines), "unclip": json.dumps(everything, ensure_ascii=False)}


def _edit_facts(edit: Edit) -> dict[str, Any]:
    """An edit by name, with its settings, and with its pictures by the digests of their files."""
    facts: dict[str, Any] = {"kind": type(edit).__name__.lower()}
    for field_ in fields(edit):
        value = getattr(edit, field_.name)
        match value:
            case RawPicture():
                facts["sources"] = [value.sha256]
            case (RawPicture(), *_):
                facts["sources"] = [picture.sha256 for picture in value]
            case RawMask():
                pass
            case _:
                facts[field_.name] = value
    return facts
