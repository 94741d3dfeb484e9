"""What a picture says of how it was made: text chunks of a PNG, which `unclip lineage` and other viewers read."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from typing import Any

from models.request import WALK_STEPS, Edit, Inpainting, RawMask, RawPicture, SampleRequest, is_walk
from pipeline.recipe.keys import recipe_key
from pipeline.recipe.lineage import exported_weights, weights_of
from pipeline.recipe.provenance import C2PA, C2PA_EDITED, Signer
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.workspace.store import Artifact

_HASH_DIGITS = 10
"""A1111's hash of a model: so many of the first digits of its file's SHA-256."""


@dataclass(frozen=True)
class ModelCard:
    """What pictures are made with."""

    name: str
    """Name of the recipe."""
    image_px: int
    """Side of the cascade's pictures, in pixels."""
    networks: Mapping[str, str] = field(default_factory=dict[str, str])
    """Key of each network's artifact, by step."""
    weights: Mapping[str, str] = field(default_factory=dict[str, str])
    """SHA-256 of each network's file of weights, by step, of those whose manifest or exported folder says it."""
    recipe_key: str = ""
    """See ``recipe.keys.recipe_key``."""
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

    def facts(self) -> dict[str, Any]:
        """What every picture's text says."""
        return {
            "recipe": self.name,
            "networks": dict(self.networks),
            "weights": dict(self.weights),
            "recipe_key": self.recipe_key,
            "mlflow_runs": dict(self.mlflow_runs),
            "version": self.version,
            **C2PA,
        }


def model_card(recipe: Recipe, artifacts: dict[str, Artifact]) -> ModelCard:
    """What the pictures of a recipe are made with; they are not signed.

    Args:
        recipe: The recipe.
        artifacts: The finished steps, by name.
    """
    cascade = {name: artifact for name, artifact in artifacts.items() if name in CASCADE_STEPS}
    networks = {name: artifact.key for name, artifact in cascade.items()}
    manifests = {name: manifest for name, artifact in cascade.items() if (manifest := artifact.manifest()) is not None}
    weights = {
        name: weights_of(manifests[name]) if name in manifests else exported_weights(artifact)
        for name, artifact in cascade.items()
    }
    stages = {name: getattr(recipe, name).model for name in networks if name != "clip"}
    return ModelCard(
        recipe.name,
        [recipe.decoder.model, *recipe.upsamplers().values()][-1].image_px,
        networks=networks,
        weights={name: digest for name, digest in weights.items() if digest},
        recipe_key=recipe_key(recipe),
        mlflow_runs={
            name: manifest.tracking_run_id for name, manifest in manifests.items() if manifest.tracking_run_id
        },
        sampling={name: asdict(model.sampler) for name, model in stages.items() if hasattr(model, "sampler")},
        num_timesteps=recipe.decoder.model.diffusion.num_timesteps,
        version=version("unclip"),
    )


def made_with(
    card: ModelCard, request: SampleRequest, seed: int, side_px: int, frame: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """The text chunks of the PNG of a request; see ``texts_of``.

    Args:
        card: What the pictures are made with.
        request: The request.
        seed: Of this picture.
        side_px: Side of the file's picture, in pixels.
        frame: Its place among the frames of an edit, which all have the same seed.
    """
    usual = dict(card.sampling)
    if is_walk(request.edit) and "decoder" in usual:
        usual["decoder"] = {
            **usual["decoder"],
            "method": "ddim",
            "num_steps": min(WALK_STEPS, card.num_timesteps),
            "guidance_scale": 1.0,
            "respacing": "",
            "eta": getattr(request.edit, "eta", 0.0),
            "clip_guidance_scale": 0.0,
        }
    sampling = {
        stage: {
            **settings,
            **({"guidance_scale": request.guidance_scale[stage]} if stage in request.guidance_scale else {}),
            **({"num_steps": request.num_steps[stage]} if stage in request.num_steps else {}),
        }
        for stage, settings in usual.items()
    }
    facts = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": seed,
        "side_px": side_px,
        "sampling": sampling,
        **({"num_candidates": request.num_candidates} if request.num_candidates else {}),
        **({"edit": _edit_facts(request.edit)} if request.edit else {}),
        **({"frame": dict(frame)} if frame else {}),
        **(C2PA_EDITED if isinstance(request.edit, Inpainting) else {}),
    }
    return texts_of(card, facts)


def texts_of(card: ModelCard, facts: Mapping[str, Any]) -> dict[str, str]:
    """The text chunks of a PNG: A1111's ``parameters``, which other viewers read, and all of it as JSON.

    Args:
        card: What the picture is made with.
        facts: What its JSON says beside that: ``prompt``, ``negative_prompt``, ``seed``, ``side_px``, ``sampling`` of
            each stage by name, and of an edit ``edit``.
    """
    decoder = facts["sampling"].get("decoder", {})
    parameters = {
        "Steps": decoder.get("num_steps"),
        "Sampler": decoder.get("method"),
        "CFG scale": decoder.get("guidance_scale"),
        "Seed": facts["seed"],
        "Size": f"{facts['side_px']}x{facts['side_px']}",
        "Denoising strength": facts.get("edit", {}).get("strength"),
        "Model hash": card.weights.get("decoder", "")[:_HASH_DIGITS] or None,
        "Model": card.name,
        "Version": f"unclip {card.version}",
    }
    negative = facts["negative_prompt"]
    lines = [facts["prompt"], *([f"Negative prompt: {negative}"] if negative else [])]
    lines.append(", ".join(f"{name}: {value}" for name, value in parameters.items() if value is not None))
    return {"parameters": "\n".join(lines), "unclip": json.dumps({**card.facts(), **facts}, ensure_ascii=False)}


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
            case RawMask() | bytes():
                pass
            case _:
                facts[field_.name] = value
    return facts
