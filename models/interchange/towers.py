"""CLIP's towers and tokenizer in transformers' layout: CLIPTextModelWithProjection, CLIPVisionModelWithProjection.

open_clip builds its default towers as OpenAI did, so the weights are copied name by name. A field that transformers'
layout cannot hold is refused by name. Nothing here reads a file or imports open_clip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.clip_config import VOCAB_SIZE
from models.interchange.networks import Component

Json = dict[str, Any]

_PLAIN_TEXT: dict[str, Any] = {
    "ls_init_value": None,
    "embed_cls": False,
    "no_causal_mask": False,
    "final_ln_after_pool": False,
    "pool_type": "argmax",
    "proj_bias": False,
    "proj_type": "linear",
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
    "block_type": None,
    "hf_model_name": None,
    "act_kwargs": None,
}
"""Fields of open_clip's text_cfg and the values that make it OpenAI's tower."""
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TEXT = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
}
_IMAGE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
_PROJECTIONS = ("text_projection", "visual.proj")
"""open_clip multiplies by these from the right; a Linear keeps the transpose."""
_SHARED_DEFAULTS: Json = {
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_TEXT_DEFAULTS = _SHARED_DEFAULTS | {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
}
_IMAGE_DEFAULTS = _SHARED_DEFAULTS | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
"""transformers leaves a field at its default out of the file."""
START, END = "<|startoftext|>", "<|endoftext|>"


def text_problems(model_config: Json) -> list[str]:
    """Fields of an open_clip text tower that transformers' CLIP cannot hold, one message each."""
    text: Json = model_config["text_cfg"]
    return [
        f"text_cfg.{name} = {text[name]!r}: only {value!r} can be held"
        for name, value in _PLAIN_TEXT.items()
        if text.get(name, value) not in (value, {})
    ]


def export_text(model_config: Json, state: Mapping[str, Tensor]) -> Component:
    """The text tower as a CLIPTextModelWithProjection.

    Args:
        model_config: open_clip's model configuration.
        state: Weights of the whole open_clip model; the tower's are at the top level or under ``text.``.

    Raises:
        ValueError: If the layout cannot hold it; names each field.
    """
    problems = text_problems(model_config)
    if problems:
        raise ValueError("clip: transformers' CLIPTextModelWithProjection cannot hold " + "; ".join(problems))
    text: Json = model_config["text_cfg"]
    prefix = "text." if "text.token_embedding.weight" in state else ""
    width, depth = int(text.get("width", 512)), int(text.get("layers", 12))
    tensors = {theirs: state[prefix + ours] for ours, theirs in _TEXT.items()}
    tensors["text_projection.weight"] = tensors["text_projection.weight"].T
    for index in range(depth):
        block, theirs = f"{prefix}transformer.resblocks.{index}", f"text_model.encoder.layers.{index}"
        for kind in ("weight", "bias"):
            tensors |= {f"{theirs}.{name}.{kind}": state[f"{block}.{ours}.{kind}"] for ours, name in _BLOCK.items()}
            parts = state[f"{block}.attn.in_proj_{kind}"].chunk(3)
            tensors |= {f"{theirs}.self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)}
    vocab_size = text.get("vocab_size", VOCAB_SIZE)
    config: Json = {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": int(width * text.get("mlp_ratio", 4.0)),
        "projection_dim": model_config["embed_dim"],
        "num_hidden_layers": depth,
        "num_attention_heads": text.get("heads", 8),
        "max_position_embeddings": text.get("context_length", 77),
        "hidden_act": "quick_gelu" if model_config.get("quick_gelu") else "gelu",
        "layer_norm_eps": (text.get("norm_kwargs") or {}).get("eps", 1e-5),
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 1,
        "torch_dtype": "float32",
    }
    return Component(config, {name: tensor.detach().cpu().float().contiguous() for name, tensor in tensors.items()})


def import_towers(text: Component, image: Component | None = None) -> tuple[Json, dict[str, Tensor]]:
    """Join towers of transformers into one open_clip model: its configuration and its weights.

    Args:
        text: CLIPTextModelWithProjection.
        image: CLIPVisionModelWithProjection; None: the model has no image tower, and no ``vision_cfg``.

    Returns:
        The configuration and the weights. The temperature, which no tower holds, is 1/100, as OpenAI's CLIPs have it.

    Raises:
        ValueError: If a weight is missing, or the towers do not make one model.
    """
    config = _TEXT_DEFAULTS | text.config
    if config["vocab_size"] != VOCAB_SIZE:
        raise ValueError(f"text_encoder: vocab_size {config['vocab_size']}: CLIP's own tokenizer has {VOCAB_SIZE}")
    model_config = _shared(config, "text_encoder")
    state = _import_tower(text, "text_encoder", _TEXT, "transformer", "text_model", config["num_hidden_layers"])
    state["logit_scale"] = torch.tensor(math.log(100.0))
    model_config["text_cfg"] = _shape(config) | {
        "heads": config["num_attention_heads"],
        "context_length": config["max_position_embeddings"],
        "vocab_size": config["vocab_size"],
    }
    if image is None:
        return model_config, state
    config = _IMAGE_DEFAULTS | image.config
    if _shared(config, "image_encoder") != {name: model_config[name] for name in ("embed_dim", "quick_gelu")}:
        raise ValueError("image_encoder, text_encoder: not of one CLIP, for projection_dim or hidden_act differ")
    model_config["vision_cfg"] = _shape(config) | {
        "head_width": config["hidden_size"] // config["num_attention_heads"],
        "image_size": config["image_size"],
        "patch_size": config["patch_size"],
    }
    depth = config["num_hidden_layers"]
    state |= _import_tower(image, "image_encoder", _IMAGE, "visual.transformer", "vision_model", depth)
    return model_config, state


def _shared(config: Json, name: str) -> Json:
    """The fields that open_clip has once for both towers."""
    if config["hidden_act"] not in ("gelu", "quick_gelu"):
        raise ValueError(f"{name}: hidden_act {config['hidden_act']!r}; open_clip has 'gelu' and 'quick_gelu'")
    return {"embed_dim": config["projection_dim"], "quick_gelu": config["hidden_act"] == "quick_gelu"}


def _shape(config: Json) -> Json:
    width = config["hidden_size"]
    return {
        "width": width,
        "layers": config["num_hidden_layers"],
        "mlp_ratio": config["intermediate_size"] / width,
        "norm_kwargs": {"eps": config["layer_norm_eps"]},
    }


def _import_tower(
    component: Component, name: str, names: Mapping[str, str], ours: str, theirs: str, depth: int
) -> dict[str, Tensor]:
    tensors = component.tensors
    try:
        state = {
            our_name: tensors[their_name].T.contiguous() if our_name in _PROJECTIONS else tensors[their_name]
            for our_name, their_name in names.items()
        }
        for index in range(depth):
            block, their_block = f"{ours}.resblocks.{index}", f"{theirs}.encoder.layers.{index}"
            for kind in ("weight", "bias"):
                state |= {
                    f"{block}.{our_name}.{kind}": tensors[f"{their_block}.{their_name}.{kind}"]
                    for our_name, their_name in _BLOCK.items()
                }
                parts = [tensors[f"{their_block}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                state[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
    except KeyError as error:
        raise ValueError(f"{name}: no weight {error}") from None
    return state


def export_tokenizer(
    encoder: Mapping[str, int], merges: Mapping[tuple[str, ...], int], context_length: int
) -> dict[str, Json | str]:
    """The files of a CLIPTokenizer, by name: CLIP's own vocabulary and merges.

    Args:
        encoder: Token -> id; the last two are the start and the end of a text, under any name.
        merges: Pair -> rank.
        context_length: L, in tokens.
    """
    renamed = {len(encoder) - 2: START, len(encoder) - 1: END}
    vocabulary = {renamed.get(number, token): number for token, number in encoder.items()}
    ranked = sorted(merges, key=merges.__getitem__)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    return {
        "vocab.json": vocabulary,
        "merges.txt": "#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in ranked),
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": context_length,
            "do_lower_case": True,
            "add_prefix_space": False,
            **special,
        },
    }
