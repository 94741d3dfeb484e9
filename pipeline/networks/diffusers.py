"""A trained cascade as the folder that diffusers' ``UnCLIPPipeline`` loads, and such a folder (Karlo's too) as ours.

The layout is that of diffusers 0.37.1; see docs/formats.md. Two folders that it does not have are written beside it:
``clip/`` (the whole CLIP in open_clip's layout) and ``upsampler_2/`` in the layout of every network artifact.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.cascade import Cascade
from models.clip_config import ClipDims
from models.decoder.stage import DecoderStage
from models.interchange.networks import (
    DIFFUSERS_VERSION,
    Component,
    export_decoder,
    export_prior,
    export_upsampler,
    import_decoder,
    import_prior,
    import_upsampler,
    scheduler_config,
)
from models.interchange.towers import export_text, export_tokenizer, import_towers
from models.prior.network import Prior
from models.prior.stage import PriorStage
from models.upsampler.network import Upsampler
from models.upsampler.stage import UpsamplerStage
from pipeline.clip.files import NO_IMAGE_TOWER, load_clip
from pipeline.clip.frozen import FrozenText, freeze
from pipeline.clip.model import OpenClip, build_clip
from pipeline.errors import ConfigError, DataError
from pipeline.networks.clip import save_clip_artifact
from pipeline.networks.files import NetworkConfig, save_network, verified_files
from pipeline.recipe.folder import folder_tables
from pipeline.recipe.recipe import default_tables
from pipeline.workspace.hashing import copy_file
from pipeline.workspace.store import Artifact

Json = dict[str, Any]

MODEL_INDEX = "model_index.json"
NETWORK_WEIGHTS = "diffusion_pytorch_model"
TEXT_WEIGHTS = "model"
_WEIGHTS = (
    f"{NETWORK_WEIGHTS}.safetensors",
    f"{NETWORK_WEIGHTS}.bin",
    f"{TEXT_WEIGHTS}.safetensors",
    "pytorch_model.bin",
)
_HEADER = """\
# Imported networks, unchanged: unclip sample and the edits take this recipe at once.
# unclip serve also needs a neighbour index: name the pairs, then: unclip run recipe.toml --until index
# To fine-tune a network, set its train.num_steps (and a learning rate), name the pairs, and: unclip run recipe.toml
# [pairs]
# source = "list"
# path = "pairs.parquet"
"""
_PARTS = {
    "prior": ("diffusers", "PriorTransformer"),
    "decoder": ("diffusers", "UNet2DConditionModel"),
    "text_proj": ("unclip", "UnCLIPTextProjModel"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "super_res_first": ("diffusers", "UNet2DModel"),
    "super_res_last": ("diffusers", "UNet2DModel"),
    "prior_scheduler": ("diffusers", "UnCLIPScheduler"),
    "decoder_scheduler": ("diffusers", "UnCLIPScheduler"),
    "super_res_scheduler": ("diffusers", "UnCLIPScheduler"),
}


def export_diffusers(cascade: Cascade, clip: FrozenText, folder: Path) -> list[str]:
    """Write the folder; ``model_index.json`` comes last.

    Args:
        cascade: With at least one upsampler; the second is written beside the layout.
        clip: Its CLIP.
        folder: Where to write; must not exist, or be empty.

    Returns:
        Notes for the user: settings that the pipeline does not take from the folder.

    Raises:
        ConfigError: If the layout cannot hold a network (names every field), or the folder is not empty.
    """
    _require_empty(folder)
    parts, schedulers = export_components(cascade, clip)
    out = Artifact(str(folder))
    for name, component in parts.items():
        is_text = name == "text_encoder"
        out.write_json(f"{name}/config.json", component.config)
        with out.write(f"{name}/{TEXT_WEIGHTS if is_text else NETWORK_WEIGHTS}.safetensors") as path:
            save_file(component.tensors, path, metadata={"format": "pt"})
    for name, config in schedulers.items():
        out.write_json(f"{name}/scheduler_config.json", config)
    write_tokenizer(clip, Artifact(f"{out.uri}/tokenizer"))
    save_clip_artifact(Artifact(f"{out.uri}/clip"), clip.clip)
    for number, upsampler in enumerate(_upsamplers(cascade)[1:], start=2):
        target = Artifact(f"{out.uri}/upsampler_{number}")
        save_network(target, upsampler.config, None, upsampler.state_dict())
    index = {"_class_name": "UnCLIPPipeline", "_diffusers_version": DIFFUSERS_VERSION}
    out.write_json(MODEL_INDEX, index | {name: list(kind) for name, kind in _PARTS.items()})
    return _notes(cascade)


def _tokenizer_files(clip: OpenClip) -> dict[str, Any]:
    return export_tokenizer(clip.tokenizer.encoder, clip.tokenizer.bpe_ranks, clip.dims.context_length)


def write_tokenizer(clip: FrozenText, out: Artifact) -> None:
    """Write the files of transformers' CLIPTokenizer."""
    for name, content in _tokenizer_files(clip.clip).items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False) + "\n"
        out.write_bytes(name, text.encode())


def export_components(cascade: Cascade, clip: FrozenText) -> tuple[dict[str, Component], dict[str, Json]]:
    """The networks and the schedulers by the names of their folders; weights share memory with ours if possible.

    Raises:
        ConfigError: If the layout cannot hold a network; names every field.
    """
    parts: dict[str, Component] = {}
    problems: list[str] = []

    def add(export: Callable[[], dict[str, Component]]) -> None:
        try:
            parts.update(export())
        except ValueError as error:
            problems.append(str(error))

    add(lambda: {"text_encoder": export_text(clip.clip.model_config, clip.clip.model.state_dict())})
    prior, decoder = _prior(cascade), cascade.stage("decoder", DecoderStage).network
    upsamplers = _upsamplers(cascade)
    if prior is not None:
        add(lambda: {"prior": export_prior(prior, decoder.config.image_norm)})
    else:
        problems.append("prior.model.kind: the layout has a diffusion prior, and this cascade has another, or none")
    add(lambda: dict(zip(("decoder", "text_proj"), export_decoder(decoder), strict=True)))
    if upsamplers:
        # The same network for the last step too: the pipeline would take another one there, as Karlo has.
        add(lambda: dict.fromkeys(("super_res_first", "super_res_last"), export_upsampler(upsamplers[0])))
    else:
        problems.append("upsampler_1: the layout needs one, and this recipe has none")
    if problems or prior is None:
        hint = (
            "Sampler settings can be changed for the export alone, as in --set decoder.model.sampler.eta=0.0; "
            "`unclip export RECIPE --native DIR` writes any cascade in our own layout"
        )
        raise ConfigError(f"export: {'; '.join(problems)}. {hint}")
    networks = {"prior": prior, "decoder": decoder, "super_res": upsamplers[0]}
    schedulers = {
        f"{name}_scheduler": scheduler_config(network.config.diffusion, network.config.sampler)
        for name, network in networks.items()
    }
    return parts, schedulers


def _prior(cascade: Cascade) -> Prior | None:
    return next((stage.network for stage in cascade.stages if isinstance(stage, PriorStage)), None)


def _upsamplers(cascade: Cascade) -> list[Upsampler]:
    return [stage.network for stage in cascade.stages if isinstance(stage, UpsamplerStage)]


def _notes(cascade: Cascade) -> list[str]:
    stage = cascade.stage("prior", PriorStage)
    prior, decoder = stage.sampler, cascade.stage("decoder", DecoderStage).sampler
    upsamplers = _upsamplers(cascade)
    upsampler = upsamplers[0].config.sampler
    notes = [
        "UnCLIPPipeline samples by the ancestral sampler alone; give it prior_num_inference_steps="
        f"{prior.num_steps}, decoder_num_inference_steps={decoder.num_steps}, "
        f"super_res_num_inference_steps={upsampler.num_steps}, prior_guidance_scale={prior.guidance_scale}, "
        f"decoder_guidance_scale={decoder.guidance_scale}"
    ]
    methods = {"prior": prior, "decoder": decoder, "upsampler_1": upsampler}
    notes += [
        f"{name} is sampled here by {sampler.method}: with as few steps the ancestral sampler may make worse pictures"
        for name, sampler in methods.items()
        if sampler.method != "ddpm"
    ]
    notes.append("it leaves the length of z_image as its prior samples it, where unclip brings it back to one")
    if stage.num_candidates > 1:
        notes.append(f"it samples one z_image, where this recipe keeps the best of {stage.num_candidates}")
    if upsamplers[0].config.rounded:
        notes.append("upsampler_1 was trained on pictures rounded to 256 levels; the pipeline does not round")
    if len(upsamplers) > 1:
        notes.append("upsampler_2/ is in our own layout: the pipeline has one upsampler")
    return notes


def _require_empty(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: name a new folder")


def export_native(networks: dict[str, Artifact], folder: Path) -> None:
    """Copy the trained networks, each as its artifact holds it, into ``folder/<step>/``.

    Raises:
        ConfigError: If the folder is not empty.
        DataError: If a file is missing or damaged.
    """
    _require_empty(folder)
    for step, artifact in networks.items():
        for name in verified_files(artifact):
            Artifact(f"{folder.resolve()}/{step}").write_whole(name, partial(copy_file, artifact.path(name)))


def import_diffusers(folder: Path, out: Path) -> list[str]:
    """Read a folder in diffusers' layout and write a folder of our networks, with a ``recipe.toml``.

    The folder holds ``clip/``, ``prior/``, ``decoder/`` and ``upsampler_1/``; the recipe samples with them as they are,
    and trains from them once its user names pairs and numbers of steps.

    Args:
        folder: With ``model_index.json``; weights as safetensors or, as older ones are, as ``.bin``.
        out: Where to write; must not exist, or be empty.

    Returns:
        Notes for the user.

    Raises:
        DataError: If a file is missing or damaged, or a network has an architecture that we do not have.
        ConfigError: If ``out`` is not empty.
    """
    _require_empty(out)
    source = _Source(folder)
    try:
        clip = source.clip()
        prior, dims, prior_state = import_prior(source.component("prior"), source.scheduler("prior"))
        decoder, _, decoder_state = import_decoder(
            source.component("decoder"),
            source.component("text_proj"),
            source.scheduler("decoder"),
            context_length=dims.context_length,
            image_norm=prior.image_norm,
        )
        super_res = source.component("super_res_first")
        upsampler, upsampler_state = import_upsampler(super_res, source.scheduler("super_res"), decoder.image_px)
    except (ValueError, KeyError) as error:
        raise DataError(f"{folder}: {error}") from error
    if clip.dims != dims:
        raise DataError(f"{folder}: text_encoder is {clip.dims}, but prior was made for {dims}")
    empty = freeze(clip).encode_text([""])
    for state in (prior_state, decoder_state):
        state["null_text.pooled"] = empty.pooled
        state["null_text.hidden"] = empty.hidden[:, : state["null_text.hidden"].shape[1]]
    target = Artifact(str(out.resolve()))
    networks: dict[str, tuple[NetworkConfig, ClipDims | None, dict[str, Tensor]]] = {
        "prior": (prior, dims, prior_state),
        "decoder": (decoder, dims, decoder_state),
        "upsampler_1": (upsampler, None, upsampler_state),
    }
    save_clip_artifact(Artifact(f"{target.uri}/clip"), clip)
    for name, (config, widths, state) in networks.items():
        save_network(Artifact(f"{target.uri}/{name}"), config, widths, state)
    target.write_bytes("recipe.toml", _recipe(out).encode())
    notes = [] if clip.has_images else [NO_IMAGE_TOWER]
    first, last = super_res.tensors, source.component("super_res_last").tensors
    if first.keys() != last.keys() or not all(torch.equal(tensor, first[name]) for name, tensor in last.items()):
        notes.append("super_res_last (another network for the last step) is left out: super_res_first takes every step")
    return notes


class _Source:
    """A folder in diffusers' layout."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if self._json(MODEL_INDEX).get("_class_name") != "UnCLIPPipeline":
            raise DataError(f"{folder}/{MODEL_INDEX} is not of an UnCLIPPipeline")

    def component(self, name: str) -> Component:
        """The configuration and the weights of one network, as float32."""
        config, folder = self._json(f"{name}/config.json"), self._folder / name
        path = next((folder / file for file in _WEIGHTS if (folder / file).is_file()), folder / _WEIGHTS[0])
        try:
            is_pickle = path.suffix == ".bin"
            tensors = torch.load(path, "cpu", weights_only=True) if is_pickle else load_file(path)
        except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
            raise DataError(f"{path}: no weights that can be read: {error}") from error
        return Component(config, {key: t.float() if t.is_floating_point() else t for key, t in tensors.items()})

    def scheduler(self, name: str) -> Json:
        """The configuration of one scheduler."""
        return self._json(f"{name}_scheduler/scheduler_config.json")

    def clip(self) -> OpenClip:
        """The folder's CLIP: the whole one that we exported, else its towers; most folders have no image tower."""
        if (self._folder / "clip").is_dir():
            return load_clip(self._folder / "clip")
        image = self.component("image_encoder") if (self._folder / "image_encoder").is_dir() else None
        preprocess = self._folder / "feature_extractor/preprocessor_config.json"
        normalisation = self._json("feature_extractor/preprocessor_config.json") if preprocess.is_file() else {}
        model_config, state = import_towers(self.component("text_encoder"), image)
        try:
            clip = build_clip(
                model_config, {"mean": normalisation.get("image_mean"), "std": normalisation.get("image_std")}, state
            )
        except RuntimeError as error:
            raise ValueError(f"text_encoder, image_encoder: weights do not fit the configuration: {error}") from error
        self._require_tokenizer(clip)
        return clip

    def _require_tokenizer(self, clip: OpenClip) -> None:
        """Refuse a vocabulary other than CLIP's own, the only one that this program tokenises with."""
        ours = _tokenizer_files(clip)
        if (self._folder / "tokenizer/vocab.json").is_file():
            vocabulary = self._json("tokenizer/vocab.json")
            merges = self._text("tokenizer/merges.txt").split("\n")[1:]
        else:  # how transformers writes it from release 5 on
            model = self._json("tokenizer/tokenizer.json")["model"]
            vocabulary = model["vocab"]
            merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
        if (vocabulary, [line for line in merges if line]) != (
            ours["vocab.json"],
            ours["merges.txt"].split("\n")[1:-1],
        ):
            raise ValueError("tokenizer: another vocabulary than CLIP's own, the only one that captions are read with")

    def _json(self, name: str) -> Json:
        try:
            return json.loads(self._text(name))
        except ValueError as error:
            raise DataError(f"{self._folder / name}: not a folder in diffusers' layout: {error}") from error

    def _text(self, name: str) -> str:
        path = self._folder / name
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not a folder in diffusers' layout: {error}") from error


def _recipe(out: Path) -> str:
    """A recipe of the imported networks as they are; it holds only fields that differ from the defaults."""
    tables = folder_tables(out)
    return _HEADER + tomli_w.dumps(_changes(tables, default_tables(tables)))


def _changes(tables: Json, defaults: Json) -> Json:
    changed: Json = {}
    for key, value in tables.items():
        if isinstance(value, dict):
            below = _changes(value, defaults.get(key) or {})
            changed |= {key: below} if below else {}
        elif value is not None and value != defaults.get(key):
            changed[key] = value
    return changed
