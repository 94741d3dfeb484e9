"""CLIP's text tower and tokenizer in transformers' layout: CLIPTextModelWithProjection, CLIPTokenizer.

open_clip builds its default text tower as OpenAI did, so that the weights carry over name by name; what other
configurations add is refused by the name of the field. Only names are handled here: no file, no open_clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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
START, END = "<|startoftext|>", "<|endoftext|>"


def text_problems(model_config: Json) -> list[str]:
    """What of an open_clip text tower transformers' CLIP cannot hold, a message for each field."""
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
        state: Weights of the whole open_clip model; the tower's stand at the top or under ``text.``.

    Raises:
        ValueError: If the layout cannot hold it; names each field.
    """
    problems = text_problems(model_config)
    if problems:
        raise ValueError("clip: transformers' CLIPTextModelWithProjection cannot hold " + "; ".join(problems))
    text: Json = model_config["text_cfg"]
    prefix = "text." if "text.token_embedding.weight" in state else ""
    width, depth = int(text.get("width", 512)), int(text.get("layers", 12))

    def ours(name: str) -> Tensor:
        return state[prefix + name]

    tensors = {
        "text_model.embeddings.token_embedding.weight": ours("token_embedding.weight"),
        "text_model.embeddings.position_embedding.weight": ours("positional_embedding"),
        "text_model.final_layer_norm.weight": ours("ln_final.weight"),
        "text_model.final_layer_norm.bias": ours("ln_final.bias"),
        # open_clip multiplies by its projection from the right; a Linear keeps the transpose
        "text_projection.weight": ours("text_projection").T,
    }
    for index in range(depth):
        block, theirs = f"transformer.resblocks.{index}", f"text_model.encoder.layers.{index}"
        for kind in ("weight", "bias"):
            tensors |= {
                f"{theirs}.{name}.{kind}": ours(f"{block}.{our_name}.{kind}") for our_name, name in _BLOCK.items()
            }
            parts = ours(f"{block}.attn.in_proj_{kind}").chunk(3)
            tensors |= {f"{theirs}.self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)}
    config: Json = {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": text.get("vocab_size", 49408),
        "hidden_size": width,
        "intermediate_size": int(width * text.get("mlp_ratio", 4.0)),
        "projection_dim": model_config["embed_dim"],
        "num_hidden_layers": depth,
        "num_attention_heads": text.get("heads", 8),
        "max_position_embeddings": text.get("context_length", 77),
        "hidden_act": "quick_gelu" if model_config.get("quick_gelu") else "gelu",
        "layer_norm_eps": (text.get("norm_kwargs") or {}).get("eps", 1e-5),
        "bos_token_id": text.get("vocab_size", 49408) - 2,
        "eos_token_id": text.get("vocab_size", 49408) - 1,
        "pad_token_id": text.get("vocab_size", 49408) - 1,
        "torch_dtype": "float32",
    }
    return Component(config, {name: tensor.detach().cpu().float().contiguous() for name, tensor in tensors.items()})


def import_text(component: Component) -> tuple[Json, dict[str, Tensor]]:
    """A CLIPTextModelWithProjection as the text part of an open_clip model: ``text_cfg`` and weights.

    Raises:
        ValueError: If a weight is missing or the activation is unknown.
    """
    config, theirs = component.config, component.tensors
    if config["hidden_act"] not in ("gelu", "quick_gelu"):
        raise ValueError(f"text_encoder: hidden_act {config['hidden_act']!r}; open_clip has 'gelu' and 'quick_gelu'")
    try:
        state = {
            "token_embedding.weight": theirs["text_model.embeddings.token_embedding.weight"],
            "positional_embedding": theirs["text_model.embeddings.position_embedding.weight"],
            "ln_final.weight": theirs["text_model.final_layer_norm.weight"],
            "ln_final.bias": theirs["text_model.final_layer_norm.bias"],
            "text_projection": theirs["text_projection.weight"].T.contiguous(),
        }
        for index in range(config["num_hidden_layers"]):
            block, their_block = f"transformer.resblocks.{index}", f"text_model.encoder.layers.{index}"
            for kind in ("weight", "bias"):
                state |= {
                    f"{block}.{ours}.{kind}": theirs[f"{their_block}.{name}.{kind}"] for ours, name in _BLOCK.items()
                }
                parts = [theirs[f"{their_block}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
                state[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
    except KeyError as error:
        raise ValueError(f"text_encoder: no weight {error}") from None
    text_config = {
        "context_length": config["max_position_embeddings"],
        "vocab_size": config["vocab_size"],
        "width": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "layers": config["num_hidden_layers"],
    }
    return text_config, state


def export_tokenizer(
    encoder: Mapping[str, int], merges: Mapping[tuple[str, ...], int], context_length: int
) -> dict[str, Json | str]:
    """The files of a CLIPTokenizer, by name: CLIP's own vocabulary and merges.

    Args:
        encoder: Token -> id; the two last are the start and the end of a text, whatever they are called.
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
