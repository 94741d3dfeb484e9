"""Our networks in the layout of diffusers' ``UnCLIPPipeline`` (0.37.1), and back: names and configurations alone.

Nothing here reads or writes a file (pipeline/networks/diffusers.py does) and nothing imports diffusers. The layout is
that of Karlo's public weights: PriorTransformer, UnCLIPTextProjModel, UNet2DConditionModel, UNet2DModel,
UnCLIPScheduler. A field that it cannot hold is refused by name. CLIP is in models/interchange/towers.py.

Weights are copied, or multiplied by a power of two, so that import and export undo each other exactly. The length of
the embeddings that the weights read (``image_norm``) is saved in the configurations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.clip_config import ClipDims
from models.decoder.config import DecoderConfig
from models.decoder.network import Decoder, image_scale
from models.diffusion.config import DiffusionConfig, SamplerConfig
from models.interchange.unet import from_unet_config, rename, rename_back, unet_config, unet_keys, unet_problems
from models.prior.config import PriorConfig
from models.prior.network import EMBEDDING_SCALE, Prior
from models.upsampler.config import UpsamplerConfig
from models.upsampler.network import Upsampler

Json = dict[str, Any]

DIFFUSERS_VERSION = "0.37.1"
"""The release whose layout is written, and with which it is tested."""
TRAINING_FIELDS = frozenset({"dropout", "text_drop_prob", "image_drop_prob", "pooled_drop_prob", "unknown_prob"})
"""Fields that change no forward pass: the layout need not hold them."""
_SAMPLER_FIELDS = frozenset({"clip_x0", "clip_range", "num_steps", "guidance_scale", "method"})
"""In a scheduler, arguments of the pipeline's call, or (``method``) reported to the user by `unclip export`."""

_PREDICTIONS = {"eps": "epsilon", "x0": "sample"}
_VARIANCES = {"fixed_small": "fixed_small_log", "learned_range": "learned_range"}
_PRIOR_KEYS = {
    "text_in": ("encoder_hidden_states_proj",),
    "pooled_in": ("embedding_proj",),
    "image_in": ("proj_in",),
    "timestep.expand": ("time_embedding.linear_1",),
    "timestep.project": ("time_embedding.linear_2",),
    "transformer.norm": ("norm_out",),
    "out": ("proj_to_clip_embeddings",),
}
_BLOCK_KEYS = {
    "norm_attention": ("norm1",),
    "query": ("attn1.to_q",),
    "key_value": ("attn1.to_k", "attn1.to_v"),
    "out": ("attn1.to_out.0",),
    "norm_mlp": ("norm3",),
    "mlp_in": ("ff.net.0.proj",),
    "mlp_out": ("ff.net.2",),
}
_TEXT_PROJ_KEYS = {
    "image_to_embedding": ("clip_image_embeddings_project_to_time_embeddings",),
    "pooled_to_embedding": ("embedding_proj",),
    "image_to_tokens": ("clip_extra_context_tokens_proj",),
    "text_to_tokens": ("encoder_hidden_states_proj",),
    "norm_text": ("text_encoder_hidden_states_norm",),
}
_NULL_IMAGE = "learned_classifier_free_guidance_embeddings"
_SCALED = ("image_to_embedding.weight", "image_to_tokens.weight")


@dataclass(frozen=True)
class Component:
    """One folder of the layout."""

    config: Json
    """Its ``config.json``."""
    tensors: dict[str, Tensor]
    """Its weights, by diffusers' names."""


def export_prior(prior: Prior, image_norm: float = 1.0) -> Component:
    """The prior as a PriorTransformer; our scale of embeddings becomes ``clip_mean`` and ``clip_std``.

    Args:
        prior: The network.
        image_norm: Length of the embeddings that it passes to the decoder: the decoder's.

    Raises:
        ValueError: If the layout cannot hold it; names each field.
    """
    config, dims = prior.config, prior.dims
    refuse("prior.model", prior_problems(config, dims))
    state = prior.state_dict()
    tensors = rename(state, _prior_keys(config.depth))
    tensors["positional_embedding"] = state["positions"]
    tensors["prd_embedding"] = state["query"]
    factor = image_norm / config.image_norm  # 1 if both were imported together: the numbers stay exactly equal
    tensors["clip_mean"], tensors["clip_std"] = state["z_mean"][None] * factor, state["z_std"][None] * factor
    layout = {
        "_class_name": "PriorTransformer",
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.width // config.num_heads,
        "num_layers": config.depth,
        "embedding_dim": dims.embed_dim,
        "num_embeddings": dims.context_length,
        "additional_embeddings": 4,
        "dropout": config.dropout,
    }
    return Component(layout, _plain(tensors))


def import_prior(component: Component, scheduler: Json) -> tuple[PriorConfig, ClipDims, dict[str, Tensor]]:
    """Read a prior of ``export_prior``, or Karlo's: our configuration, CLIP's widths and the weights.

    ``x0_variance`` and the null caption, which the layout does not hold, are left at zero.

    Raises:
        ValueError: If it is a PriorTransformer of another architecture.
    """
    layout, theirs = component.config, component.tensors
    expected = {
        "added_emb_type": "prd",
        "encoder_hid_proj_type": "linear",
        "norm_in_type": None,
        "embedding_proj_norm_type": None,
        "additional_embeddings": 4,
        "time_embed_act_fn": "silu",
    }
    require_values("prior", layout, expected)
    width = layout["num_attention_heads"] * layout["attention_head_dim"]
    dims = ClipDims(
        embed_dim=layout["embedding_dim"], text_width=layout["embedding_dim"], context_length=layout["num_embeddings"]
    )
    mean, std = theirs["clip_mean"][0], theirs["clip_std"][0]
    config = PriorConfig(
        width=width,
        depth=layout["num_layers"],
        num_heads=layout["num_attention_heads"],
        num_candidates=1,
        dropout=layout.get("dropout", 0.0),
        image_norm=norm_of_statistics(mean, std),
        diffusion=import_diffusion("prior_scheduler", scheduler),
        sampler=import_sampler(scheduler, num_steps=25, guidance_scale=4.0),
    )
    state = rename_back(theirs, _prior_keys(config.depth))
    state["positions"], state["query"] = theirs["positional_embedding"], theirs["prd_embedding"]
    state["z_mean"], state["z_std"] = mean, std
    with torch.device("meta"):
        blank = Prior(config, dims)
    return config, dims, _completed(state, blank)


def norm_of_statistics(mean: Float[Tensor, " D"], std: Float[Tensor, " D"]) -> float:
    """Length of the embeddings that a folder's networks pass on, from its prior's ``clip_mean`` and ``clip_std``.

    The mean of |z|^2 is |mean|^2 + |std|^2 where these are statistics of CLIP's embeddings (Karlo's are). Without a
    mean and with one deviation for all features they are a scale, ours and the paper's: length / (0.5375 sqrt(D)).

    Returns:
        The length, to three digits: that of one picture's embedding is within some per cent of it.

    Raises:
        ValueError: If they are no statistics: diffusers leaves them at zero until somebody sets them.
    """
    if not mean.any() and torch.equal(std, std[:1].expand_as(std)):
        norm = std[0].item() * EMBEDDING_SCALE * math.sqrt(len(std))
    else:
        norm = torch.cat([mean, std]).double().norm().item()
    if not 0 < norm < math.inf:
        raise ValueError("prior: clip_mean and clip_std say nothing of CLIP's embeddings: they are zero or not finite")
    return float(f"{norm:.3g}")


def export_decoder(decoder: Decoder) -> tuple[Component, Component]:
    """The decoder as (UNet2DConditionModel, UnCLIPTextProjModel).

    Raises:
        ValueError: If the layout cannot hold it; names each field.
    """
    config, dims = decoder.config, decoder.dims
    refuse("decoder.model", decoder_problems(config, dims))
    state, scale = decoder.state_dict(), image_scale(config, dims)
    projection = rename(
        {name: tensor * scale if name in _SCALED else tensor for name, tensor in state.items()}, _TEXT_PROJ_KEYS
    )
    projection[_NULL_IMAGE] = state["null_image"] / scale
    projection_layout = {
        "_class_name": "UnCLIPTextProjModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "clip_extra_context_tokens": config.num_image_tokens,
        "clip_embeddings_dim": dims.embed_dim,
        "time_embed_dim": decoder.unet.width,
        "cross_attention_dim": config.context_width,
    }
    unet = rename(state, unet_keys(config.unet, config.image_px), prefix="unet.")
    layout = unet_config(config.unet, config.image_px, decoder.out_channels, context_width=config.context_width)
    layout["_diffusers_version"] = DIFFUSERS_VERSION
    return Component(layout, _plain(unet)), Component(projection_layout, _plain(projection))


def import_decoder(
    unet: Component, projection: Component, scheduler: Json, *, context_length: int, image_norm: float
) -> tuple[DecoderConfig, ClipDims, dict[str, Tensor]]:
    """Read a decoder of ``export_decoder``, or Karlo's.

    Args:
        unet: ``decoder/``.
        projection: ``text_proj/``.
        scheduler: ``decoder_scheduler/``.
        context_length: That of the prior; the decoder's own parts do not have it.
        image_norm: That of the prior, too.

    Raises:
        ValueError: If it is a UNet of another architecture.
    """
    layout = projection.config
    dims = ClipDims(
        embed_dim=layout["clip_embeddings_dim"], text_width=layout["clip_embeddings_dim"], context_length=context_length
    )
    shape, image_px, out_channels = from_unet_config("decoder", unet.config)
    diffusion = import_diffusion("decoder_scheduler", scheduler)
    if out_channels != (6 if diffusion.variance == "learned_range" else 3):
        raise ValueError(f"decoder: out_channels {out_channels} with variance_type {scheduler['variance_type']}")
    config = DecoderConfig(
        image_px=image_px,
        unet=shape,
        num_image_tokens=layout["clip_extra_context_tokens"],
        context_width=layout["cross_attention_dim"],
        image_norm=image_norm,
        diffusion=diffusion,
        sampler=import_sampler(scheduler, num_steps=25, guidance_scale=8.0),
    )
    state, scale = rename_back(projection.tensors, _TEXT_PROJ_KEYS), image_scale(config, dims)
    state |= {name: state[name] / scale for name in _SCALED}
    state["null_image"] = projection.tensors[_NULL_IMAGE] * scale
    state |= rename_back(unet.tensors, unet_keys(shape, image_px), prefix="unet.")
    with torch.device("meta"):
        blank = Decoder(config, dims)
    return config, dims, _completed(state, blank)


def export_upsampler(upsampler: Upsampler) -> Component:
    """An upsampler as a UNet2DModel: both ``super_res_first`` and ``super_res_last``.

    Raises:
        ValueError: If the layout cannot hold it; names each field.
    """
    config = upsampler.config
    refuse("upsampler_1.model", upsampler_problems(config))
    layout = unet_config(config.unet, config.image_px, upsampler.out_channels, in_channels=6)
    layout["_diffusers_version"] = DIFFUSERS_VERSION
    keys = unet_keys(config.unet, config.image_px)
    return Component(layout, _plain(rename(upsampler.state_dict(), keys, prefix="unet.")))


def import_upsampler(
    component: Component, scheduler: Json, low_res_px: int
) -> tuple[UpsamplerConfig, dict[str, Tensor]]:
    """Read an upsampler of ``export_upsampler``, or Karlo's; ``low_res_px`` is the side of the decoder's pictures.

    Raises:
        ValueError: If it is a UNet of another architecture.
    """
    shape, image_px, _ = from_unet_config("super_res_first", component.config)
    quarter, step = image_px // 4, 2 ** (len(shape.channel_mults) - 1)
    fits = quarter >= step and quarter % step == 0 and quarter % (image_px // low_res_px) == 0
    config = UpsamplerConfig(
        image_px=image_px,
        low_res_px=low_res_px,
        crop_px=quarter if fits else image_px,
        unet=shape,
        rounded=False,
        diffusion=import_diffusion("super_res_scheduler", scheduler),
        sampler=import_sampler(scheduler, num_steps=7, guidance_scale=1.0),
    )
    state = rename_back(component.tensors, unet_keys(shape, image_px), prefix="unet.")
    with torch.device("meta"):
        blank = Upsampler(config)
    return config, _completed(state, blank)


def scheduler_config(diffusion: DiffusionConfig, sampler: SamplerConfig) -> Json:
    """The UnCLIPScheduler of a diffusion process."""
    return {
        "_class_name": "UnCLIPScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": diffusion.num_timesteps,
        "variance_type": _VARIANCES[diffusion.variance],
        "clip_sample": sampler.clip_x0,
        "clip_sample_range": sampler.clip_range,
        "prediction_type": _PREDICTIONS[diffusion.prediction],
    }


def import_diffusion(name: str, scheduler: Json) -> DiffusionConfig:
    """The process that an UnCLIPScheduler describes.

    Raises:
        ValueError: If it is of another kind.
    """
    require_values(name, scheduler, {"_class_name": "UnCLIPScheduler", "beta_schedule": "squaredcos_cap_v2"})
    try:
        return DiffusionConfig(
            num_timesteps=scheduler.get("num_train_timesteps", 1000),
            prediction={theirs: ours for ours, theirs in _PREDICTIONS.items()}[scheduler["prediction_type"]],  # pyright: ignore[reportArgumentType]
            variance={theirs: ours for ours, theirs in _VARIANCES.items()}[scheduler["variance_type"]],  # pyright: ignore[reportArgumentType]
        )
    except KeyError as error:
        raise ValueError(f"{name}: no meaning known for {error}") from None


def import_sampler(scheduler: Json, *, num_steps: int, guidance_scale: float) -> SamplerConfig:
    """Ancestral sampling as UnCLIPPipeline does it; the caller passes its default steps and guidance."""
    return SamplerConfig(
        num_steps=min(num_steps, scheduler.get("num_train_timesteps", 1000)),
        guidance_scale=guidance_scale,
        clip_x0=scheduler.get("clip_sample", True),
        clip_range=float(scheduler.get("clip_sample_range", 1.0)),
    )


def prior_problems(config: PriorConfig, dims: ClipDims) -> list[str]:
    """Fields of a prior that the layout cannot hold, one message each."""
    supported = {"width", "depth", "num_heads", "num_candidates", "image_norm"}
    problems = [*_changed(config, supported), *_diffusion_problems(config.diffusion), *_dims_problems(dims)]
    if config.diffusion.variance == "learned_range":
        problems.append("diffusion.variance = 'learned_range': a PriorTransformer predicts the embedding alone")
    return problems


def decoder_problems(config: DecoderConfig, dims: ClipDims) -> list[str]:
    """Fields of a decoder that the layout cannot hold, one message each."""
    supported = {"image_px", "unet", "num_image_tokens", "context_width", "image_norm"}
    problems = [*_changed(config, supported), *_diffusion_problems(config.diffusion), *_dims_problems(dims)]
    problems += [f"unet.{problem}" for problem in unet_problems(config.unet)]
    if not config.unet.attention_resolutions:
        problems.append("unet.attention_resolutions: empty, but a UNet2DConditionModel reads its context by attention")
    if config.diffusion.variance != "learned_range":
        problems.append(
            f"diffusion.variance = {config.diffusion.variance!r}: UnCLIPPipeline takes six channels from the decoder "
            "('learned_range')"
        )
    return problems


def upsampler_problems(config: UpsamplerConfig) -> list[str]:
    """Fields of an upsampler that the layout cannot hold, one message each."""
    supported = {"image_px", "low_res_px", "crop_px", "unet", "rounded", "degradation"}
    problems = [*_changed(config, supported), *_diffusion_problems(config.diffusion)]
    return problems + [f"unet.{problem}" for problem in unet_problems(config.unet)]


def refuse(name: str, problems: list[str]) -> None:
    """Raise ValueError with every problem, if there is one."""
    if problems:
        raise ValueError(
            f"{name}: diffusers' UnCLIPPipeline cannot hold " + "; ".join(f"{name}.{problem}" for problem in problems)
        )


def require_values(name: str, config: Json, expected: Mapping[str, Any]) -> None:
    """Raise ValueError unless ``config`` has the expected values; an absent key has the expected one."""
    others = {key: config[key] for key, value in expected.items() if key in config and config[key] != value}
    if others:
        raise ValueError(f"{name}: {others} is not what this unclip reads, which is {dict(expected)}")


def _diffusion_problems(config: DiffusionConfig) -> list[str]:
    problems: list[str] = []
    if config.schedule != "cosine":
        problems.append(f"diffusion.schedule = {config.schedule!r}: an UnCLIPScheduler is 'cosine'")
    if config.prediction not in _PREDICTIONS:
        problems.append(f"diffusion.prediction = {config.prediction!r}: an UnCLIPScheduler knows 'eps' and 'x0'")
    if config.variance not in _VARIANCES:
        problems.append(f"diffusion.variance = {config.variance!r}: an UnCLIPScheduler knows {list(_VARIANCES)}")
    return problems


def _dims_problems(dims: ClipDims) -> list[str]:
    if dims.embed_dim == dims.text_width:
        return []
    return [
        f"(CLIP's embed_dim = {dims.embed_dim} and text_width = {dims.text_width}: "
        "its projections take both at one width)"
    ]


def _changed(config: PriorConfig | DecoderConfig | UpsamplerConfig, supported: set[str]) -> list[str]:
    """Fields that the layout does not know and that are not at their default: their effect would be lost."""
    problems = _not_at_default(config, supported | TRAINING_FIELDS | {"sampler", "diffusion"})
    return problems + [f"sampler.{problem}" for problem in _not_at_default(config.sampler, _SAMPLER_FIELDS)]


def _not_at_default(
    config: PriorConfig | DecoderConfig | UpsamplerConfig | SamplerConfig, supported: AbstractSet[str]
) -> list[str]:
    problems: list[str] = []
    for field in fields(config):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(config, field.name)
        if field.name not in supported and value != default:
            problems.append(f"{field.name} = {value!r}: only {default!r} can be held")
    return problems


def _prior_keys(depth: int) -> dict[str, tuple[str, ...]]:
    keys = dict(_PRIOR_KEYS)
    for index in range(depth):
        ours, theirs = f"transformer.blocks.{index}", f"transformer_blocks.{index}"
        keys |= {f"{ours}.{name}": tuple(f"{theirs}.{n}" for n in names) for name, names in _BLOCK_KEYS.items()}
    return keys


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _completed(state: dict[str, Tensor], blank: nn.Module) -> dict[str, Tensor]:
    """The weights, and zeros for the buffers that the layout does not hold; ``blank`` is a network of their shape."""
    shapes = blank.state_dict()
    absent = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in shapes.items() if name not in state}
    missing = [name for name in absent if not name.startswith("null_text.") and name != "x0_variance"]
    if missing:
        raise ValueError(f"weights are missing, among them that of {missing[0]}")
    others = [name for name, tensor in state.items() if name not in shapes or tensor.shape != shapes[name].shape]
    if others:
        raise ValueError(f"weights do not fit the configuration, among them that of {others[0]}")
    return state | absent
